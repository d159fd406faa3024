"""What real corpora hold: repeated texts, one example with a huge gradient, any characters, texts of a megabyte."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import edit_json, make_texts, vouch, write_jsonl
from helpers import extract, influence
from pyarrow import parquet

from logra.analysis import report
from logra.analysis.ranked import SHARED_BY
from logra.run_dir import RunDir
from logra.runtime import files
from logra.runtime.settings import MODES

ANALYSIS = ("analysis", "--log_dir", "log")
ALL_FORMATS = ("--format", "html", "jsonl", "csv", "txt", "parquet")


def analyse(cli, *flags) -> str:
    status, out, err = cli(*ANALYSIS, *flags)
    assert status == 0, err
    return out


def listed(folder: Path, side: str = "top") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "top_k.jsonl").read_text("utf-8").split("\n") if line]
    return [row for row in rows if row["side"] == side]


@pytest.fixture
def repeated(cli, tiny, workspace) -> tuple[np.ndarray, Path]:
    """Scores of 12 documents of two blocks; 0, 5 and 9 are equal, 3 and 4 have the same first block."""
    texts = make_texts(12, seed=4, longest=9)
    texts = [f"{text} {text} stones birds dog" for text in texts]
    texts[5] = texts[9] = texts[0]
    texts[4] = texts[3] + " the old mill and the river"
    write_jsonl(Path("same.jsonl"), [{"text": text} for text in texts])
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac", "--block_size", 8, "--data_name", "same.jsonl")
    return influence(cli, "--mode", "cosine")


def test_equal_texts_have_equal_scores(repeated):
    """To rounding."""
    scores, train = repeated[0], RunDir.load(Path("log")).train()
    groups: dict[tuple, list[int]] = {}
    for number, ids in enumerate(train["input_ids"][:]):
        groups.setdefault(tuple(ids), []).append(number)
    copies = [group for group in groups.values() if len(group) > 1]
    assert {3} <= {len(group) for group in copies}
    for group in copies:
        assert np.ptp(scores[:, group], axis=1).max() < 1e-5 * np.abs(scores).max()


@pytest.mark.parametrize("by", ["example", "document"])
def test_equal_texts_once(cli, repeated, by):
    """--unique: the first of the equal ones, with their count, in lists, table and report; never on both sides."""
    _, folder = repeated
    train = RunDir.load(Path("log")).train()
    texts: dict[str, tuple] = {}  # of an example or document
    for name, block, ids in zip(train["document_id"], train["block"], train["input_ids"], strict=True):
        key = f"{name}/{block}" if by == "example" else name
        texts[key] = (*texts.get(key, ()), *ids)
    analyse(cli, "--by", by, "--top_k", 100)
    assert len(listed(folder)) == 3 * len(texts) and "copies" not in listed(folder)[0]
    out = analyse(cli, "--by", by, "--top_k", 100, "--unique", *ALL_FORMATS)
    for query in {row["query"] for row in listed(folder)}:
        rows = [row for row in listed(folder) if row["query"] == query]
        keys = [f"{row['document']}/{row['block']}" if by == "example" else row["document"] for row in rows]
        assert len(keys) == len({texts[key] for key in keys}) == len(set(texts.values()))
        assert [row["copies"] for row in rows] == [[*texts.values()].count(texts[key]) for key in keys]
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert "</bdi> x3</span>" in (folder / "report.html").read_text() and " x3  (" in (folder / "top_k.txt").read_text()
    assert parquet.read_table(folder / "top_k.parquet")["copies"].to_pylist() == [r["copies"] for r in listed(folder)]
    analyse(cli, "--by", by, "--top_k", 4, "--unique", "--bottom")
    for query in {row["query"] for row in listed(folder)}:
        rows = [row for side in ("top", "bottom") for row in listed(folder, side) if row["query"] == query]
        keys = [f"{row['document']}/{row['block']}" if by == "example" else row["document"] for row in rows]
        assert len({texts[key] for key in keys}) == len(keys) == 8
    scores = np.load(folder / "scores.npy")
    equal = [i for i, name in enumerate(train["document_id"]) if name in ("0", "5", "9")]
    scores[:, equal] += 100
    np.save(folder / "scores.npy", scores)
    vouch(folder)
    out = analyse(cli, "--by", by, "--unique")
    assert out.count("  1. +") == 3 and out.count(" x3\n") >= 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by", ["example", "document"])
def test_one_example_on_top_of_most_queries(cli, tiny, workspace, mode, by):
    """A line says so, where it is more than half of the queries and at least three, and names --mode cosine."""
    write_jsonl(Path("queries.jsonl"), [{"text": text} for text in make_texts(5, seed=8)])
    extract(cli, tiny / "llama", "--rank", 3)
    scores, folder = influence(cli, "--mode", mode)
    scores = np.random.default_rng(0).uniform(size=scores.shape).astype(np.float32)
    for shared in (2, 3):
        scores[:, 7:12] = 0
        scores[[*range(5)], [7] * shared + [*range(8, 13 - shared)]] = 1000
        np.save(folder / "scores.npy", scores)
        vouch(folder)
        out, source = analyse(cli, "--by", by), (folder / "report.html").read_text()
        line = next((line for line in out.splitlines() if "have the same highest" in line), "")
        assert bool(line) == ('class="warning"' in source) == (shared == 3)
    assert f"3 of 5 queries have the same highest {by}, " in line and "doc7" in line
    assert ("--mode cosine" in line) == (mode != "cosine") and SHARED_BY[mode] in line


SCRIPTS = {
    "cjk": "日本語の文章、中文與한국어。",
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd",
    "right to left": "שלום עולם, مرحبا بالعالم!",
    "zero width": "a\u200bb\u200d\ufeffc\u00ad",
    "combining": "e\u0301 n\u0303 \u1e9b\u0323",
    "separators": "one\u2028two\u2029three\u0085four\x0bfive",
    "override": "x\u202egpj.exe\u202c",
    "astral": "\U0001d518\U0001d52b\U0001d526 \U00010348",
    "quotes": "\"'`,;\t<b>&amp;\\n",
}


class Texts(HTMLParser):
    """Collects the texts of the cards."""

    def __init__(self, source: str):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "div" and ("class", "text") in attrs
        if self.inside:
            assert ("dir", "auto") in attrs
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def rewrite(texts: list[str]) -> None:
    """Give the train examples of log/ other texts and the same as kept columns."""
    run, folder = RunDir.load(Path("log")), Path("log/train")
    kept = [json.dumps({"of": text}) for text in texts]
    train = run.train().remove_columns("text").add_column("text", texts).add_column("kept", kept)
    train.save_to_disk("rewritten")
    files.remove(folder)
    Path("rewritten").rename(folder)
    edit_json(Path("log/run.json"), lambda about: about["data"].update(files=files.file_checksums(folder)))


def in_all_files(folder: Path, texts: list[str]) -> None:
    """Assert that the lists of examples hold these texts, of all examples, as they are."""
    rows = listed(folder)
    assert all(row["text"] == texts[row["example"]] == row["kept"]["of"] for row in rows)
    csv.field_size_limit(2**30)
    with open(folder / "top_k.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert all(row["text"].removeprefix("'") == texts[int(row["example"])] for row in table)
    for row in parquet.read_table(folder / "top_k.parquet").to_pylist():
        assert row["text"] == texts[row["example"]] == row["kept.of"]
    assert len(rows) == len(table) == 3 * len(texts)


def test_any_characters(cli, tiny, workspace):
    """Through all stages: texts, ids and kept columns are the same in every file; .txt escapes only what controls."""
    texts = [f"{text} of {name}" for name, text in SCRIPTS.items()]
    write_jsonl(Path("any.jsonl"), [{"id": text, "text": text} for text in texts])
    write_jsonl(Path("queries.jsonl"), [{"id": text, "text": text} for text in texts[:3]])
    extract(cli, tiny / "llama", "--rank", 3, "--data_name", "any.jsonl", "--block_size", 64)
    run = RunDir.load(Path("log"))
    decoded = run.train()["text"][:]
    assert "".join(decoded) == "".join(texts)
    rewrite(texts := decoded)
    _, folder = influence(cli)
    out = analyse(cli, "--top_k", 100, *ALL_FORMATS)
    in_all_files(folder, texts)
    source, lines = (folder / "report.html").read_text("utf-8"), (folder / "top_k.txt").read_text("utf-8")
    assert sorted(Texts(source).found) == sorted(texts * 3)
    assert all(text.strip() in lines for text in texts if not set(text) & set("\u202e\x0b\x85"))
    assert "\\u202egpj" in lines and not set(out + lines) & set("\u202e\x0b\x85")
    analyse(cli, "--by", "of", "--top_k", 100, *ALL_FORMATS)
    assert {row["group"] for row in listed(folder)} == {*texts}
    assert set(parquet.read_table(folder / "top_k.parquet")["group"].to_pylist()) == {*texts}


def test_texts_of_a_megabyte(cli, tiny, workspace):
    """Lists hold them whole, in one line of the .jsonl; the report stays below its limit and says what is left out."""
    extract(cli, tiny / "llama", "--rank", 3, "--max_examples", 3)
    texts = [f"{number} " + "雪🎉 שלום river " * 50_000 for number in range(3)]
    assert len(texts[0].encode()) > 10**6
    rewrite(texts)
    _, folder = influence(cli)
    analyse(cli, "--top_k", 6, *ALL_FORMATS)
    in_all_files(folder, texts)
    out = analyse(cli, "--by", "of", "--top_k", 6, "--format", "jsonl")
    assert {row["group"] for row in listed(folder)} == {*texts} and len(out) < 10_000
    source = (folder / "report.html").read_text("utf-8")
    assert len(source.encode()) <= report.MAX_REPORT_BYTES and "So that the page stays small" in source
    assert set(Texts(source).found) <= {*texts} and Texts(source).found


def test_a_document_of_a_hundred_thousand_tokens(cli, tiny, workspace):
    """It is one document of many examples, whose texts join to its own, and selected.jsonl has it whole."""
    text = " ".join(f"{words} 雪🎉 שלום" for words in make_texts(3000, seed=2))
    write_jsonl(Path("long.jsonl"), [{"id": "long", "text": text}, {"id": "short", "text": "the mill"}])
    flags = ("--data_name", "long.jsonl", "--rank", 2, "--layers", "down_proj", "--store_dtype", "int1")
    run = extract(cli, tiny / "llama", *flags, "--hessian", "ekfac")
    assert run.parts[0].tokens > 100_000
    scores, folder = influence(cli)
    analyse(cli, "--by", "document", "--select", 1, "--combine", "mean", *ALL_FORMATS)
    of = {row["document"]: row for row in listed(folder) if row["query"] == listed(folder)[0]["query"]}
    assert of["long"]["score"] == pytest.approx(scores[0, :-1].mean(), rel=1e-3)
    assert of["long"]["examples"] == run.examples - 1
    analyse(cli, "--by", "document", "--select", 1, "--drop")
    chosen = [json.loads(line) for line in (folder / "selected.jsonl").read_text("utf-8").split("\n") if line]
    analyse(cli, "--by", "document", "--select", 1)
    chosen += [json.loads(line) for line in (folder / "selected.jsonl").read_text("utf-8").split("\n") if line]
    assert {row["id"]: row["text"] for row in chosen} == {"long": text, "short": "the mill"}
