"""The report and the lists."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl
from helpers import extract, influence

from logra.analysis import report
from logra.analysis.units import Units
from logra.run_dir import RunDir


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


def test_word_scores():
    """BM25 by its formula: a word counts as often as the query has it; words of one letter do not count."""
    texts = ["The mill, the MILL a", "mill Über stones", "", "stones"]
    lengths, found = [4, 3, 0, 1], list(report.bm25_scores(texts, ["mill über MILL unknown a", "a"]))

    def score(text: int, count: int, texts_with_word: int) -> float:
        idf = np.log(1 + (4 - texts_with_word + 0.5) / (texts_with_word + 0.5))
        return idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * lengths[text] / 2))

    assert found[0] == pytest.approx([2 * score(0, 2, 2), 2 * score(1, 1, 2) + score(1, 1, 1), 0, 0])
    assert not found[1].any() and not next(report.bm25_scores(["", "a"], ["mill"])).any()


HOSTILE = "<script>f(1)</script><img onerror=g()>\"'&{{7*7}}"


@pytest.fixture
def hostile(cli, tiny, workspace) -> Path:
    """A folder of scores whose documents, ids and queries hold HTML."""
    rows = [json.loads(line) for line in open("docs.jsonl")]
    rows[2] = {"id": f"{HOSTILE}", "text": f"{rows[2]['text']} {HOSTILE}"}
    write_jsonl(Path("docs.jsonl"), rows)
    queries = [{"id": HOSTILE, "text": HOSTILE}, {"id": "b", "prompt": "the mill", "response": f" {HOSTILE} quagga"}]
    write_jsonl(Path("queries.jsonl"), queries)
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac", "--block_size", 16)
    return influence(cli, "--layerwise")[1]


@pytest.mark.parametrize("flags", [(), ("--tokens",)])
def test_the_report_is_one_escaped_file(cli, hostile, flags):
    """Texts that hold HTML are text; nothing comes from the network; settings and fingerprints are there."""
    status, _, err = cli("analysis", "--log_dir", "log", "--top_k", 15, *flags)
    assert status == 0, err
    source = (hostile / "report.html").read_text()
    page = Page(source)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert HOSTILE in "".join(page.text.split("\n")) and "default-src 'none'" in source
    assert not [v for k, v in page.attributes if k in ("src", "href") or k.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", source)
    assert page.tags.count("article") == 2 * 2 * 15 and ("p4" in dict.fromkeys(v for k, v in page.attributes)) == bool(
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
    assert len(source.encode()) <= 40_000 and "So that the page stays small" in source
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
  const asked = () => [...document.querySelectorAll(".query")].filter((query) => query.checkVisibility()).length;
  say.push(count());
  set("search", "quagga", "input"); say.push(asked()); set("search", "", "input");
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
    assert title == f"probe 20 1 10 0 {'.'.join(ranks)} 0 errors 0 wide false", done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr


def test_texts_without_a_word():
    """Where no text has a word of two letters, none matches, instead of an error."""
    for word, expected in (("..", None), ("it", 1)):
        rows = [{"example": i} for i in range(3)]
        query = {"words": "what is it?", "rows": {"top": rows, "bottom": []}}
        empty = {"words": "", "rows": {"top": [{"example": 1}], "bottom": []}}
        report.add_word_matches([query, empty], ["a b.", word, ""], 2, Units("example", None, np.arange(3)))
        assert [row["word_rank"] for row in rows] == [None, expected, None]
        assert empty["rows"]["top"][0]["word_rank"] is None
