"""A table, bar, mark or sentence of stage 4 is about exactly what it names: examples or documents, mode, layers."""

import csv
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import vouch, write_jsonl
from helpers import extract, influence, refused

from logra.analysis import report
from logra.run_dir import RunDir
from logra.runtime.settings import MODES

ANALYSIS = ("analysis", "--log_dir", "log")


@pytest.fixture
def blocks(cli, tiny, workspace) -> RunDir:
    """A run of 20 documents of one to eight blocks each."""
    return extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac", "--block_size", 6)


def analyse(cli, folder: Path, *flags) -> tuple[str, str]:
    """Run stage 4 with --bottom; return what it printed, and the page."""
    status, out, err = cli(*ANALYSIS, "--bottom", *flags)
    assert status == 0, err
    return out, (folder / "report.html").read_text()


def listed(folder: Path, side: str, query: str) -> list[dict]:
    """Return a query's rows of top_k.jsonl."""
    rows = [json.loads(line) for line in open(folder / "top_k.jsonl")]
    return [row for row in rows if (row["side"], row["query"]) == (side, query)]


def plant(folder: Path, scores: np.ndarray) -> None:
    """Put other scores into a folder."""
    np.save(folder / "scores.npy", scores.astype(np.float32))
    vouch(folder)


def plain(source: str) -> str:
    """Return a part of the page as text, in one line."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", source)).split())


def cards(source: str) -> list[str]:
    """Return the cards of the page."""
    return re.findall('<article class="card".*?</article>', source, re.DOTALL)


def bars(source: str) -> dict[str, float]:
    """Return the first query's bars of blocks of layers."""
    figure = re.search('<div class="layers".*?</div>', source, re.DOTALL)
    found = re.findall(r"<span>([^<]*)</span><i.*?</i><span>([^<]*)</span>", figure[0]) if figure else []
    return {name: float(value) for name, value in found}


def marks(source: str) -> list[float]:
    """Return the positions of all marks of the histograms."""
    return [float(x) for x in re.findall(r'class="mark-\w+" x1="([^"]*)"', source)]


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_documents_have_the_statistics_of_documents(cli, blocks, combine):
    """Table, lists, percentiles, z-scores, histograms and marks are of documents' scores, of the side's own kind."""
    scores, folder = influence(cli)
    out, source = analyse(cli, folder, "--by", "document", "--combine", combine, "--top_k", 6)
    owners = np.array(blocks.train()["document_id"])
    names, counts = np.unique(owners, return_counts=True)
    assert counts.max() > 2
    pick = {"sum": (np.sum, np.sum), "max": (np.max, np.min)}[combine]
    for side, of in zip(("top", "bottom"), pick, strict=True):
        values = {name: of(scores[2, owners == name]) for name in names}
        rows = listed(folder, side, "pr")
        best = sorted(values, key=values.get, reverse=side == "top")[:6]
        assert [row["document"] for row in rows] == best
        every = np.array(list(values.values()), np.float64)
        for row in rows:
            assert row["score"] == pytest.approx(values[row["document"]], rel=1e-5)
            assert row["z"] == pytest.approx((row["score"] - every.mean()) / every.std(), rel=1e-4)
            assert row["percentile"] == pytest.approx(100 * (every < row["score"] * (1 - 1e-6)).mean(), abs=5)
        assert f"from {every.min():.3g} to {every.max():.3g}" in source
        if side == "top":
            table = out.split("pr: ")[1].splitlines()[1:4]
            assert [line.split() for line in table] == [
                [f"{row['rank']}.", f"{row['score']:+.4g}", row["document"]] for row in rows[:3]
            ]
    assert len(marks(source)) == 2 * 6 * 3 and all(-0.01 <= x <= 100.01 for x in marks(source))
    assert {row["combine"] for row in rows} == {combine}
    word = f"sum of {counts.max()} examples; text of" if combine == "sum" else f"the lowest of {counts.max()}"
    analyse(cli, folder, "--by", "document", "--combine", combine, "--top_k", 10)
    assert word in plain((folder / "report.html").read_text()) and word in (folder / "top_k.txt").read_text()


def test_parts_of_a_documents_sum(cli, blocks):
    """--layerwise splits the sum; --tokens alone says whose text is shaded, and shows no bars of another score."""
    _, folder = influence(cli, "--layerwise", "--mode", "cosine")
    _, source = analyse(cli, folder, "--by", "document", "--top_k", 5)
    mean = np.mean([row["score"] for row in listed(folder, "top", "0")])
    assert sum(bars(source).values()) == pytest.approx(mean, rel=0.01)
    _, folder = influence(cli, "--mode", "l2")
    _, source = analyse(cli, folder, "--by", "document", "--top_k", 5, "--tokens")
    assert not bars(source) and "of the one example whose text is shown" in source
    assert source.count("Parts by block of layers are not shown") == 3


@pytest.mark.parametrize("mode", MODES)
def test_bars_add_up_to_the_score(cli, blocks, mode):
    """The bars of --layerwise are parts of the mode's scores; what l2 subtracts has a bar of its own."""
    _, folder = influence(cli, "--layerwise", "--mode", mode)
    _, source = analyse(cli, folder, "--top_k", 4)
    mean = np.mean([row["score"] for row in listed(folder, "top", "0")])
    assert sum(bars(source).values()) == pytest.approx(mean, rel=0.02)
    assert any("self-influence" in name for name in bars(source)) == (mode == "l2")


def test_few_scores_of_documents(cli, blocks):
    """--top_k_only: an example is the highest of its whole document, and missing rows are explained."""
    status, out, err = cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", "--top_k_only", 5)
    assert status == 0, err
    folder = Path(next(line for line in out.splitlines() if " in " in line).split(" in ")[1])
    out, source = analyse(cli, folder, "--by", "document", "--combine", "max", "--top_k", 12)
    owners = blocks.train()["document_id"][:]
    for row in listed(folder, "top", "0"):
        assert row["examples"] == owners.count(row["document"])
    for name in ("Highest", "Lowest"):
        assert re.search(rf"{name} scores: \d instead of 12, since --top_k_only kept no more", out)
        assert re.search(rf"{name} scores: \d instead of 12, since --top_k_only kept no more", source)
    out, _ = analyse(cli, folder, "--top_k", 25)
    assert "Highest scores: 5 instead of 25, since --top_k_only kept no more (3 of 3 queries)" in out


def test_words_of_the_whole_document(cli, blocks):
    """A document whose words are in another block than the one shown is a word match; an example is not."""
    scores, folder = influence(cli)
    train = blocks.train()
    owners = np.array(train["document_id"])
    document = np.flatnonzero(owners == "doc19")
    query = " ".join(train[int(document[0])]["text"].split())
    rows = [json.loads(line) for line in open(folder / "queries.jsonl")]
    write_jsonl(folder / "queries.jsonl", [row | {"text": query} for row in rows])
    scores = np.zeros_like(scores)
    scores[:, document[1:]] = 1
    plant(folder, scores)
    _, source = analyse(cli, folder, "--by", "document", "--combine", "max", "--top_k", 1)
    assert "doc19" in cards(source)[0] and "BM25 rank 1" in cards(source)[0]
    assert "1 of the 1 documents with the highest scores are among the 1 best word matches" in plain(source)


def test_words_of_a_group(cli, tiny, workspace):
    """A group's word matches are those of its queries' texts, not of its label."""
    texts = ["zebra crossing", "purple onion", "queries of q0 and q1", *["the old mill"] * 5]
    write_jsonl(Path("docs.jsonl"), [{"id": f"doc{i}", "text": text} for i, text in enumerate(texts)])
    rows = [{"id": "q0", "prompt": "a zeb", "response": "ra", "of": "g"}, {"id": "q1", "text": "the onion", "of": "g"}]
    write_jsonl(Path("queries.jsonl"), rows)
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac")
    _, folder = influence(cli, "--group_by", "of")
    _, source = analyse(cli, folder, "--top_k", 8)
    found = {re.search(r"doc\d", card)[0] for card in cards(source) if "BM25 rank" in card}
    assert {"doc0", "doc1"} <= found and "doc2" not in found
    assert "mean gradient of 2 queries: q0, q1" in source and "a zebra\nthe onion" in source


def test_a_page_that_is_cut(monkeypatch, cli, blocks):
    """It names the files that were written and what they hold; marks and means are of the cards that are shown."""
    _, folder = influence(cli, "--layerwise")
    monkeypatch.setattr(report, "MAX_REPORT_BYTES", 40_000)
    assert cli(*ANALYSIS, "--top_k", 30, "--format", "html")[0] == 0
    source = (folder / "report.html").read_text()
    assert "top_k." not in source and "--format jsonl, csv or txt" in source
    count, shown = len(cards(source)), int(re.search(r"and up to (\d+) of 30 examples on each side", plain(source))[1])
    queries = source.count("<details class=")
    assert count == 2 * shown * queries and len(marks(source)) == count
    assert cli(*ANALYSIS, "--top_k", 30, "--format", "html", "txt")[0] == 0
    assert (
        "top_k.txt: up to 30 examples for every query, with the highest scores (--bottom lists the lowest too)"
        in (folder / "report.html").read_text()
    )
    _, source = analyse(cli, folder, "--top_k", 30)
    assert "top_k.jsonl, top_k.csv, top_k.txt: up to 30 examples for every query, on each side." in plain(source)
    mean = np.mean([row["score"] for row in listed(folder, "top", "0")][:shown])
    assert sum(bars(source).values()) == pytest.approx(mean, rel=0.02)


def test_all_documents_of_a_packed_block(cli, tiny, workspace):
    """The table, the lists and the page name each of them."""
    run = extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac", "--pack", "--block_size", 60)
    _, folder = influence(cli)
    out, source = analyse(cli, folder, "--top_k", 4)
    row, train = listed(folder, "top", "0")[0], run.train()
    names = train[row["example"]]["document_ids"]
    assert len(names) > 1 and row["documents"] == names
    shown = ", ".join(names)
    assert shown in out and shown in cards(source)[0] and shown in (folder / "top_k.txt").read_text()
    with open(folder / "top_k.csv", encoding="utf-8", newline="") as file:
        assert json.loads(next(csv.DictReader(file))["documents"]) == names


def test_settings_of_zero_and_no_hessian(cli, tiny, workspace):
    """A seed of 0 is a setting; without a Hessian there is no damping."""
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "none", "--seed", 0, "--shuffle_seed", 0)
    _, folder = influence(cli, "--hessian", "none")
    _, source = analyse(cli, folder, "--top_k", 4)
    assert "<dt>seed</dt><dd>0</dd>" in source and "<dt>shuffle_seed</dt><dd>0</dd>" in source
    assert "Hessian none." in re.sub(" +([.,])", r"\1", plain(source)) and "damping" not in plain(source)


@pytest.mark.parametrize("value", [0.0, 3.2, -3.2])
def test_equal_scores(cli, blocks, value):
    """The caption says the one value; a score of 0 has no colour of a side; no example is on both sides."""
    scores, folder = influence(cli)
    plant(folder, np.full_like(scores, value))
    half = len(blocks.train()) // 2
    out, source = analyse(cli, folder, "--top_k", half + 3)
    assert f"scores: each is {value:.3g}." in source and "from" not in re.findall("<figcaption>.*?</fig", source)[0]
    colour = {0.0: "", 3.2: "up", -3.2: "down"}[value]
    assert all(f'<b class="{colour}">' in card for card in cards(source))
    top, bottom = ({row["example"] for row in listed(folder, side, "0")} for side in ("top", "bottom"))
    assert len(top) == half + 3 and not top & bottom and top | bottom == set(range(len(blocks.train())))
    assert "Lowest scores: " in out and f"of which {half + 3} have the highest scores" in out


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_no_example_is_on_both_sides(cli, blocks, combine):
    """A sum is of a whole document, which is on one side; of best and worst, the same example is not shown twice."""
    _, folder = influence(cli)
    analyse(cli, folder, "--by", "document", "--combine", combine, "--top_k", 17)
    unit = "document" if combine == "sum" else "example"
    top, bottom = ({row[unit] for row in listed(folder, side, "0")} for side in ("top", "bottom"))
    assert len(top) == 17 and bottom and not top & bottom


def test_sides_are_named_by_rank(cli, blocks):
    """l2 scores that are all negative are not called proponents, and the page says why they are negative."""
    scores, folder = influence(cli, "--mode", "l2")
    plant(folder, -1 - np.abs(scores))
    _, source = analyse(cli, folder, "--top_k", 4)
    assert ">Highest scores</h3>" in source and "Proponents" not in source
    assert "does not say that training raises the loss" in plain(source)


def test_combine_is_for_documents(cli, blocks):
    """--combine without --by document would do nothing."""
    influence(cli)
    for combine in ("sum", "max"):
        refused(cli(*ANALYSIS, "--combine", combine), "--by document")


def test_the_printed_table_of_many_queries(cli, tiny, workspace):
    """Ten queries are printed, then how many the files have; the lists have all."""
    extract(cli, tiny / "llama", "--rank", 4)
    write_jsonl(Path("many.jsonl"), [{"id": f"query{i}", "text": "the river"} for i in range(12)])
    _, folder = influence(cli, "--split", "many.jsonl")
    out, _ = analyse(cli, folder)
    assert re.findall(r"^(query\d+): ", out, re.MULTILINE) == [f"query{i}" for i in range(10)]
    assert "The files have 12 queries" in out and len(listed(folder, "top", "query11")) == 20
    assert "The files have" not in analyse(cli, influence(cli)[1], "--split", "queries.jsonl")[0]
