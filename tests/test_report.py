"""What a person sees: rankings, shares of tokens and layers, the report."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, make_tokenizer, write_jsonl
from reference import full_gradient, layer_io
from test_pipeline import extract, influence

from logra.run_dir import RunDir
from logra.stages.rank import Ranking, by_document, percentile_and_z_score, read_record
from logra.tools import report
from logra.tools.tokens import TokenSplitter, pieces


def equal(one, two, scale) -> bool:
    """Say whether two numbers differ by at most 1e-4 of a scale."""
    return abs(float(one) - float(two)) <= 1e-4 * float(scale)


def shares_of(folder: Path, shown: list[list[int]]):
    """Return the TokenSplitter of a folder of scores, and the shares of the pairs and of the queries."""
    run = RunDir.load(folder.parents[1])
    splitter = TokenSplitter(run, read_record(folder, run), False, Accelerator(cpu=True))
    return splitter, *splitter.split(splitter.run.train(), shown, shown)


@pytest.mark.parametrize("mode", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("hessian", ["raw", "ekfac"])
def test_shares_add_up_to_the_score(cli, tiny, workspace, model_name, mode, hessian):
    """A pair's shares add up to its score, by token and by block of layers; a query's to its summed dots."""
    extract(cli, tiny / model_name, "--rank", 5, "--hessian", hessian, "--block_size", 16)
    scores, folder = influence(cli, "--mode", mode)
    shown = [[0, 3, 7], [3], [19, 2]]
    splitter, pairs, of_queries = shares_of(folder, shown)
    assert set(pairs) == {(q, e) for q, row in enumerate(shown) for e in row}
    train = splitter.run.train()
    for (q, e), shares in pairs.items():
        assert len(shares.tokens) == len(train[e]["input_ids"]) and len(shares.blocks) == 2
        scale = shares.tokens.abs().sum()
        assert equal(shares.tokens.sum(), scores[q, e], scale) and equal(
            sum(shares.blocks.values()), scores[q, e], scale
        )
    dots, _ = influence(cli, "--mode", "dot")
    for q, row in enumerate(shown):
        assert len(of_queries[q]) == len(splitter.groups[q][0].token_ids)
        assert equal(of_queries[q].sum(), dots[q, row].sum(), of_queries[q].abs().sum())


def test_shares_are_those_of_autograd(cli, tiny, workspace, model_name):
    """Without projection and Hessian, position t's share is d_t^T G x_t, with autograd's full gradient G."""
    extract(cli, tiny / model_name, "--lora", "none", "--hessian", "none")
    _, folder = influence(cli, "--hessian", "none")
    splitter, pairs, _ = shares_of(folder, [[4], [], []])
    model, layers = make_model(model_name), splitter.run.layers
    query, example = (ids.token_ids for ids in (splitter.groups[0][0], splitter.groups[0][0]._replace(
        token_ids=splitter.run.train()[4]["input_ids"])))  # fmt: skip
    grads, io = full_gradient(model, layers, query), layer_io(model, layers, example)
    expected = sum((io[layer][1] @ grads[layer] * io[layer][0]).sum(dim=1) for layer in layers)
    torch.testing.assert_close(pairs[0, 4].tokens, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_shares_of_few_bits_and_of_groups(cli, tiny, workspace):
    """Of signs the shares are of the exact gradients; a group of queries has shares of its pairs, not of its tokens."""
    write_jsonl(Path("groups.jsonl"), [{"text": f"the river {w}", "kind": "a"} for w in ("ran", "past", "old")])
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac")
    exact, _ = influence(cli, "--damping", 0.2)
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac", "--store_dtype", "int1", "--log_dir", "few")
    status, out, err = cli("compute_influence", "--log_dir", "few", "--split", "queries.jsonl")
    assert status == 0, err
    folder = Path(next(line for line in out.splitlines() if " in " in line).split(" in ")[1])
    _, pairs, _ = shares_of(folder, [[1], [], []])
    assert equal(pairs[0, 1].tokens.sum(), exact[0, 1], pairs[0, 1].tokens.abs().sum())
    assert cli("compute_influence", "--log_dir", "log", "--split", "groups.jsonl", "--group_by", "kind")[0] == 0
    status, _, err = cli("analysis", "--log_dir", "log", "--tokens", "--format", "csv")
    assert status == 2 and "html" in err, "the shares are in the page alone"
    status, out, err = cli("analysis", "--log_dir", "log", "--tokens", "--top_k", 2)
    assert status == 0, err


def test_pieces_keep_every_character_and_share():
    """The pieces of a text's tokens join to the text, also where a character is several tokens; shares are kept."""
    tokenizer, text = make_tokenizer(), "the “old” mill 😀 ünï"
    ids = tokenizer(text)["input_ids"]
    shares = torch.arange(len(ids), dtype=torch.float64)
    found = pieces(tokenizer, ids, shares)
    assert "".join(piece for piece, _ in found) == text and sum(share for _, share in found) == shares.sum()
    shaded = report.shade(found)
    assert "".join(run.text for run in shaded) == text and max(shaded)[0] == report.SHADE_LEVELS
    assert sum(run.share for run in shaded) == shares.sum()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("combine", ["sum", "max"])
def test_documents_are_ranked_by_sum_or_best(largest, combine):
    """A document's score is the sum, or the best (worst), of its examples' scores."""
    scores, owners = np.random.default_rng(0).normal(size=50).astype(np.float32), np.arange(50) % 7
    order = np.argsort(-scores if largest else scores)
    found = by_document(Ranking(order, scores[order], np.ones(50)), owners, largest, combine)
    pick = {"sum": np.sum, "max": np.max if largest else np.min}[combine]
    expected = {d: pick(scores[owners == d]) for d in range(7)}
    assert [owners[i] for i in found.examples] == sorted(expected, key=expected.get, reverse=largest)
    assert np.allclose(sorted(found.scores), sorted(expected.values()), atol=1e-5)
    extreme = np.argmax if largest else np.argmin
    for i, count in zip(found.examples, found.counts, strict=True):
        of = np.flatnonzero(owners == owners[i])
        assert count == len(of) and i == of[extreme(scores[of])]


def test_standings():
    """The percentile is the share of scores below, the z-score in standard deviations from the mean; ties agree."""
    values = np.random.default_rng(0).integers(0, 30, 100).astype(np.float32)
    found = percentile_and_z_score(values[:20], np.sort(values)[::-1])
    for score, place in zip(values[:20], found, strict=True):
        assert place["percentile"] == pytest.approx(100 * (values < score).mean())
        assert place["z"] == pytest.approx((score - values.mean()) / values.std(), rel=1e-5)
    assert percentile_and_z_score(np.ones(1), np.ones(4, np.float32)) == [{"percentile": 0, "z": 0}]


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


HOSTILE = "<script>f(1)</script><img onerror=g()>\"'&{{7*7}}"


@pytest.fixture
def hostile(cli, tiny, workspace) -> Path:
    """A folder of scores whose documents, ids and queries hold HTML."""
    rows = [json.loads(line) for line in open("docs.jsonl")]
    rows[2] = {"id": f"{HOSTILE}", "text": f"{rows[2]['text']} {HOSTILE}"}
    write_jsonl(Path("docs.jsonl"), rows)
    queries = [{"id": HOSTILE, "text": HOSTILE}, {"id": "b", "prompt": "the mill", "response": f" {HOSTILE}"}]
    write_jsonl(Path("queries.jsonl"), queries)
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac", "--block_size", 16)
    return influence(cli, "--layerwise")[1]


@pytest.mark.parametrize("flags", [(), ("--tokens",)])
def test_the_report_is_one_escaped_file(cli, hostile, flags):
    """Texts that hold HTML are text; nothing comes from the network; settings and fingerprints are there."""
    status, _, err = cli("analysis", "--log_dir", "log", "--top_k", 20, *flags)
    assert status == 0, err
    source = (hostile / "report.html").read_text()
    page = Page(source)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert HOSTILE in "".join(page.text.split("\n")) and "default-src 'none'" in source
    assert not [v for k, v in page.attributes if k in ("src", "href") or k.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", source)
    assert page.tags.count("article") == 2 * 2 * 20 and ("p4" in dict.fromkeys(v for k, v in page.attributes)) == bool(
        flags
    )
    log = RunDir.load(Path("log"))
    assert log.fingerprints[0] in page.text and log.record.model["fingerprint"] in page.text
    assert "--tokens" in page.text or flags


def test_the_report_stays_small(monkeypatch, cli, hostile):
    """Above the limit fewer cards, then fewer queries are shown, and the page says so; the lists are whole."""
    monkeypatch.setattr(report, "MAX_REPORT_BYTES", 40_000)
    assert cli("analysis", "--log_dir", "log", "--top_k", 20)[0] == 0
    source = (hostile / "report.html").read_text()
    assert len(source.encode()) <= 40_000 and "so that the page stays small" in source
    assert len(open(hostile / "top_k.jsonl").readlines()) == 40


def test_the_lists(cli, hostile):
    """The .csv holds what the .jsonl does; --by document ranks documents; --format chooses the files."""
    assert cli("analysis", "--log_dir", "log", "--top_k", 6, "--bottom", "--by", "document")[0] == 0
    rows = [json.loads(line) for line in open(hostile / "top_k.jsonl")]
    with open(hostile / "top_k.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["text"] for row in table] == [row["text"] for row in rows] and len(rows) == 2 * 2 * 6
    assert [float(row["score"]) for row in table] == [row["score"] for row in rows]
    assert len({row["document"] for row in rows[:6]}) == 6
    scores, train = np.load(hostile / "scores.npy"), RunDir.load(Path("log")).train()
    of = np.flatnonzero(np.array(train["document_id"]) == rows[0]["document"])
    assert rows[0]["score"] == pytest.approx(scores[0, of].sum(), rel=1e-5) and rows[0]["examples"] == len(of)
    for path in hostile.glob("top_k.*"):
        path.unlink()
    assert cli("analysis", "--log_dir", "log", "--format", "csv")[0] == 0
    assert [path.name for path in hostile.glob("top_k.*")] == ["top_k.csv"]


def chromium() -> str | None:
    """Return the browser's path."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


PROBE = """<script>
window.addEventListener("load", () => {
  const say = [];
  const count = () => [...document.querySelectorAll(".card")].filter((card) => card.checkVisibility()).length;
  const set = (id, value, event) => {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event(event));
  };
  say.push(count());
  set("filter", "q1", "change"); say.push(count());
  set("filter", "", "change"); set("search", "no such words", "input"); say.push(count());
  set("search", "", "input"); set("sort", "document", "change");
  say.push([...document.querySelectorAll("#q0 .top .card")].map((card) => card.dataset.rank).join("."));
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "c", bubbles: true })); say.push(count());
  say.push("errors", window.failures || 0, "wide", document.documentElement.scrollWidth > innerWidth);
  document.title = "probe " + say.join(" ");
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs chromium (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [1200, 400])
def test_the_report_works_in_a_browser(cli, hostile, tmp_path, width):
    """It loads without an error or a request; filter, search, sorting and keys work; nothing is too wide."""
    assert cli("analysis", "--log_dir", "log", "--top_k", 5, "--tokens")[0] == 0
    source = (hostile / "report.html").read_text()
    assert source.count("</body>") == 1
    errors = (
        "<head><script>addEventListener('error', () => { window.failures = (window.failures || 0) + 1; });</script>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(source.replace("<head>", errors, 1).replace("</body>", PROBE))
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom",
               "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'browser'}", f"file://{probed}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    rows = [json.loads(line) for line in open(hostile / "top_k.jsonl")][:5]
    ranks = [str(row["rank"]) for row in sorted(rows, key=lambda row: (row["document"].lower(), row["rank"]))]
    assert title == f"probe 20 10 0 {'.'.join(ranks)} 0 errors 0 wide false", done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr


def test_texts_without_a_word():
    """Where no text has a word of two letters, none matches, instead of an error."""
    assert report.word_matches(["a b.", "..", ""], ["what is it?", ""], 2) == [[], []]
    assert report.word_matches(["a b.", "it", ""], ["what is it?", ""], 2) == [[1], []]
