"""Kept columns of the documents: shown in lists and report, and ranked as groups (--by COLUMN)."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import edit_json
from datasets import Dataset
from helpers import extract, influence, refused
from pyarrow import parquet

from logra.inputs.groups import column_groups
from logra.run_dir import RunDir
from logra.runtime import files

ANALYSIS = ("analysis", "--log_dir", "log")
HOSTILE = "<a href='javascript:f()'>x</a>\"'"
URLS = {
    "https://example.org/a?b=1&c=2": True, "http://例え.jp/頁": True, "javascript:alert(1)": False,
    "https://a.org/\" onclick=f()": False, " https://a.org": False, "https://a.org/\u202egpj": False,
    "ftp://a.org": False,
    "data:text/html,<script>f()</script>": False, "//a.org": False, "https://": False, HOSTILE: False,
}  # fmt: skip


def keep(kept: dict[str, dict | None]) -> None:
    """Write the column `kept` into the train examples of log/: {document id: columns}."""
    run, folder = RunDir.load(Path("log")), Path("log/train")
    texts = [None if (row := kept.get(name)) is None else json.dumps(row) for name in run.train()["document_id"][:]]
    run.train().add_column("kept", texts).save_to_disk("kept")
    files.remove(folder)
    Path("kept").rename(folder)
    edit_json(Path("log/run.json"), lambda about: about["data"].update(files=files.file_checksums(folder)))


@pytest.fixture
def scored(cli, tiny, workspace) -> tuple[np.ndarray, Path, np.ndarray]:
    """A run of 20 documents of several blocks: scores, their folder, and each example's document id."""
    run = extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac", "--block_size", 6)
    return *influence(cli, "--layerwise"), np.array(run.train()["document_id"])


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "top_k.jsonl").read_text("utf-8").split("\n") if line]


def analyse(cli, *flags) -> str:
    status, out, err = cli(*ANALYSIS, *flags)
    assert status == 0, err
    return out


def test_kept_columns_are_shown(cli, scored):
    """In all lists and on the cards; only an http(s) address becomes a link, and everything is escaped."""
    _, folder, owners = scored
    values = [*URLS, None, 7, [1, "a"], "", "קריאה 🎉"]
    kept = {f"doc{i}": {"url": value, "n": i} for i, value in enumerate(values)} | {"doc19": None}
    keep(kept)
    analyse(cli, "--top_k", 100, "--format", "html", "jsonl", "csv", "txt", "parquet")
    rows = listed(folder)
    assert len(rows) == 3 * len(owners) and all(row["kept"] == (kept.get(row["document"]) or {}) for row in rows)
    with open(folder / "top_k.csv", encoding="utf-8", newline="") as file:
        cells = {row["document"]: row["kept.url"] for row in csv.DictReader(file)}
    assert cells["doc0"] == values[0] and cells[f"doc{values.index([1, 'a'])}"] == '[1, "a"]' and cells["doc19"] == ""
    table = parquet.read_table(folder / "top_k.parquet").to_pylist()
    assert [row["text"] for row in table] == [row["text"] for row in rows]
    assert [row["kept.n"] for row in table] == [row["kept"].get("n") for row in rows]
    assert {row["kept.url"] for row in table} >= {json.dumps(value) for value in URLS}  # mixed kinds: JSON
    assert f"url: {values[0]}\nn: 0\n" in (folder / "top_k.txt").read_text()
    source = (folder / "report.html").read_text()
    links = set(re.findall(r'<a href="([^"]*)" rel="noopener noreferrer">', source))
    assert links == {url.replace("&", "&amp;") for url, is_link in URLS.items() if is_link}
    assert source.count("<a ") == source.count(' rel="noopener noreferrer"') and "<a href='java" not in source


def test_a_run_without_kept_columns(cli, scored):
    """Lists and report are as before, and a column that was not kept is refused with the names of those that were."""
    _, folder, _ = scored
    analyse(cli)
    assert "kept" not in listed(folder)[0] and 'class="kept"' not in (folder / "report.html").read_text()
    refused(cli(*ANALYSIS, "--by", "source"), "none was kept", "--keep_columns source")
    keep({"doc0": {"url": "a", "source": "b"}})
    refused(cli(*ANALYSIS, "--by", "author"), "url, source", "got author")
    refused(cli(*ANALYSIS, "--by", "source", "--unique"), "--unique")
    refused(cli(*ANALYSIS, "--select", 3, "--per", "author"), "url, source", "--per")


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
def test_groups_are_ranked(cli, scored, combine):
    """A group's score is the mean (sum, maximum) of its examples' scores; rows without a value are one group."""
    scores, folder, owners = scored
    sources = {f"doc{i}": ["web", "книги", None, 3][i % 4] for i in range(19)}  # doc19 has no kept columns at all
    keep({name: {"source": source} if source else {} for name, source in sources.items()})
    out = analyse(cli, "--by", "source", "--combine", combine, "--bottom", "--top_k", 2)
    of = np.array([str(sources.get(name)) for name in owners])
    for number, query in enumerate(dict.fromkeys(row["query"] for row in listed(folder))):
        expected = {str(group): getattr(np, combine)(scores[number, of == group]) for group in set(of)}
        rows = [row for row in listed(folder) if row["query"] == query and row["side"] == "top"]
        order = sorted(expected, key=expected.get, reverse=True)
        assert [str(row["group"]) for row in rows] == order[:2]
        for row in rows:
            name = str(row["group"])
            assert row["score"] == pytest.approx(expected[name], rel=1e-4) and row["combine"] == combine
            assert row["examples"] == (of == name).sum() and row["by"] == "source"
            assert of[row["example"]] == name and scores[number, row["example"]] == scores[number, of == name].max()
        if combine != "max":
            low = [row["group"] for row in listed(folder) if (row["query"], row["side"]) == (query, "bottom")]
            assert [str(group) for group in low] == order[:1:-1]
        shown = [("(none)" if name == "None" else name, (of == name).sum()) for name in order[:3]]
        table = out.split(f"\n{query}: ")[1].splitlines()[1:4]
        assert [line.split(maxsplit=2)[2] for line in table] == [f"{name} ({n} examples)" for name, n in shown]
    word = "highest example" if combine == "max" else f"the {combine} of their examples' scores"
    assert f"Groups of source by {'their ' * (combine == 'max')}{word}" in out
    source = (folder / "report.html").read_text()
    charts = re.findall('<div class="layers groups".*?</div>', source, re.DOTALL)
    assert len(charts) == 3 and charts[0].count("<i ") == (2 if combine == "max" else 4) and "BM25" not in source


def test_the_parts_of_a_mean(cli, scored):
    """Of documents and of groups: bars by block of layers add up to the mean."""
    scores, folder, owners = scored
    keep({f"doc{i}": {"source": "ab"[i % 2]} for i in range(20)})
    for by in ("document", "source"):
        analyse(cli, "--by", by, "--combine", "mean", "--top_k", 1)
        row = listed(folder)[0]
        of = (
            np.array([int(name[3:]) % 2 for name in owners]) == "ab".index(row["group"])
            if by == "source"
            else (owners == row["document"])
        )
        assert row["score"] == pytest.approx(scores[0, of].mean(), rel=1e-4)
        bars = re.search(r"Their sum: (\S+)\.<", (folder / "report.html").read_text())[1]
        assert float(bars) == pytest.approx(row["score"], rel=0.01)


def test_few_scores_of_groups(cli, scored):
    """With --top_k_only only the maximum is known."""
    keep({f"doc{i}": {"source": "ab"[i % 2]} for i in range(20)})
    assert cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", "--top_k_only", 9)[0] == 0
    refused(cli(*ANALYSIS, "--by", "source"), "--by source", "--combine max")
    refused(cli(*ANALYSIS, "--select", 3), "--top_k_only", "--select")
    analyse(cli, "--by", "source", "--combine", "max", "--format", "csv", "parquet")


def test_reranked_groups(cli, scored):
    """Candidates have new scores, other examples have not: no sum or mean of a group, no mean of documents."""
    keep({f"doc{i}": {"source": "ab"[i % 2]} for i in range(20)})
    for by in ("document", "example"):
        flags = ("--rerank", 4, "--rerank_by", by, "--rerank_rank", 4)
        assert cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", *flags)[0] == 0
        refused(cli(*ANALYSIS, "--by", "source"), "mean", "candidates")
        refused(cli(*ANALYSIS, "--by", "source", "--combine", "sum"), "sum", "candidates")
        refused(cli(*ANALYSIS, "--by", "document", "--combine", "mean"), "mean", "candidates")
    assert "a (" in analyse(cli, "--by", "source", "--combine", "max")


@pytest.mark.parametrize("damage", ["[1]", "{", "5"])
def test_damaged_columns(damage):
    """Of a run that comes from elsewhere: one line."""
    with pytest.raises(ValueError, match="expected kept columns"):
        column_groups(Dataset.from_dict({"kept": [damage]}), "source", "--by")
    with pytest.raises(ValueError, match="expected kept columns"):
        column_groups(Dataset.from_dict({"kept": [5]}), "source", "--by")


def test_groups_of_any_values():
    """Text, numbers, lists and null are kept apart; equal ones are one group, in the order of the examples."""
    values = ["1", 1, None, [1], "(none)", 1, [1], None, "1", {"b": 1, "a": 2}, {"a": 2, "b": 1}, "\ud800"]
    texts = [json.dumps({"k": value}) for value in values] + ["{}", None]
    numbers, found = column_groups(Dataset.from_dict({"kept": texts}), "k", "--by")
    assert numbers.tolist() == [0, 1, 2, 3, 4, 1, 3, 2, 0, 5, 5, 6, 2, 2]
    assert found == ["1", 1, None, [1], "(none)", {"a": 2, "b": 1}, "\ud800"]
