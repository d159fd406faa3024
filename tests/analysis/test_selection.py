"""analysis.py --select: which documents, and the rows of the source in selected.jsonl."""

import json
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_texts, write_jsonl
from datasets import Dataset
from helpers import extract, influence, refused
from pyarrow import parquet

from logra.analysis.selection import aggregate_scores, choose
from logra.run_dir import RunDir

ANALYSIS = ("analysis", "--log_dir", "log", "--format", "csv")


def selected() -> list[dict]:
    """Return the rows of selected.jsonl."""
    (path,) = Path("log/scores").glob("*/selected.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def analyse(cli, *flags) -> str:
    status, out, err = cli(*ANALYSIS, *flags)
    assert status == 0, err
    return out


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("aggregate", ["mean", "max", "rank"])
def test_scores_over_queries(combine, aggregate):
    """They are those of the definition, and a query with scores a thousand times as large counts as any other."""
    random = np.random.default_rng(0)
    matrix, owners = random.normal(size=(3, 40)).astype(np.float32), random.permutation(np.arange(40) % 9)
    matrix[1] = matrix[1] * 1000 + 7
    documents = np.array([[getattr(row[owners == d], combine)(dtype=np.float64) for d in range(9)] for row in matrix])
    if aggregate == "rank":
        expected = np.array([[(row < v).mean() + (row == v).mean() / 2 for v in row] for row in documents]).mean(0)
    else:
        z_scores = (documents - documents.mean(1, keepdims=True)) / documents.std(1, keepdims=True)
        expected = getattr(z_scores, aggregate)(axis=0)
    assert np.allclose(aggregate_scores(matrix, owners, combine, aggregate), expected)
    assert not aggregate_scores(np.ones((2, 40), np.float32), np.arange(40), combine, "mean").any()


def test_the_mix_is_kept():
    """Each group gives its share, best first; what is left goes to the groups that were rounded down the most."""
    scores, groups = np.random.default_rng(1).normal(size=103), np.repeat([0, 1, 2], [70, 23, 10])
    for count in (1, 7, 50, 103):
        found = choose(scores, count, groups)
        sizes = [found.chosen[groups == g].sum() for g in range(3)]
        assert sum(sizes) == count and all(
            abs(n - count * s / 103) < 1 for n, s in zip(sizes, (70, 23, 10), strict=True)
        )
        for g in range(3):
            of = groups == g
            assert (
                not of[~found.chosen].any()
                or not sizes[g]
                or (scores[of & found.chosen].min() >= scores[of & ~found.chosen].max(initial=-np.inf))
            )
    assert (np.argsort(found.ranks) == np.argsort(-scores)).all()


ROWS = [
    {
        "id": f"doc{i}",
        "text": text,
        "note": {"deep": [i, None, 0.5]},
        "url": f"https://a.org/{i}",
        "\u96ea": "\U0001f389",
    }
    for i, text in enumerate(make_texts(20, seed=3))
]


def write_source(kind: str) -> str:
    """Write the rows as a local file or folder; return its path."""
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), "rows.parquet")
    elif kind == "saved":
        Dataset.from_list(ROWS).save_to_disk("rows.saved")
    elif kind == "folder":
        write_jsonl(Path("rows.folder/a.jsonl"), ROWS[:7])
        write_jsonl(Path("rows.folder/b.jsonl"), ROWS[7:])
    elif kind == "txt":
        Path("rows.txt").write_text("".join(row["text"] + "\n" * (1 + i % 2) for i, row in enumerate(ROWS)))
    elif kind == "pattern":
        for name, rows in (("a", ROWS[:7]), ("b", ROWS[7:])):
            with pa.output_stream(f"rows.{name}.jsonl.zst", compression="zstd") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        return "rows.*.zst"
    elif kind == "stream":
        write_jsonl(Path("rows.jsonl"), ROWS)
        return "rows.jsonl"
    elif kind == "no_ids":
        write_jsonl(Path("rows.no_ids.jsonl"), [{k: v for k, v in row.items() if k != "id"} for row in ROWS])
        return "rows.no_ids.jsonl"
    else:
        Path("rows.json").write_text(json.dumps(ROWS))
    return f"rows.{kind}"


@pytest.mark.parametrize("kind", ["json", "parquet", "saved", "folder", "txt", "no_ids", "pattern", "stream"])
def test_rows_of_the_source(cli, tiny, workspace, kind):
    """They are whole, in the source's order, with score and rank; --drop writes the others."""
    name = write_source(kind)
    streaming = ("--streaming",) if kind == "stream" else ()
    extract(cli, tiny / "llama", "--rank", 3, "--block_size", 6, "--data_name", name, *streaming)
    scores, folder = influence(cli)
    owners = np.array(RunDir.load(Path("log")).train()["document_id"])
    assert f"{folder}/selected.jsonl: 5 rows, the 5 highest of 20 documents" in analyse(cli, "--select", 0.25)
    kept, names = selected(), list(dict.fromkeys(owners))
    documents = np.array([[row[owners == d].sum() for d in names] for row in scores.astype(np.float64)])
    z_scores = ((documents - documents.mean(1, keepdims=True)) / documents.std(1, keepdims=True)).mean(0)
    expected = sorted(range(20), key=lambda i: -z_scores[i])[:5]
    texts = [row["text"] for row in ROWS]
    found = [texts.index(row["text"]) for row in kept]
    assert found == sorted(expected)
    for row, i in zip(kept, found, strict=True):
        place = row.pop("logra")
        assert place["rank"] == expected.index(i) + 1 and place["score"] == pytest.approx(z_scores[i], rel=1e-4)
        whole = {"text": texts[i]} if kind == "txt" else ROWS[i]
        assert row == ({k: v for k, v in whole.items() if k != "id"} if kind == "no_ids" else whole)
    analyse(cli, "--select", 5, "--drop")
    rest = [row["text"] for row in selected()]
    assert rest == [text for i, text in enumerate(texts) if i not in found]


def test_a_selection_is_ready_for_training(cli, tiny, workspace):
    """selected.jsonl is a data set of stage 2 like any other, and can be selected from again."""
    write_source("json")
    extract(cli, tiny / "llama", "--rank", 3, "--data_name", "rows.json")
    _, folder = influence(cli)
    analyse(cli, "--select", 8)
    (folder / "selected.jsonl").rename("chosen.jsonl")
    extract(cli, tiny / "llama", "--rank", 3, "--data_name", "chosen.jsonl", "--overwrite")
    influence(cli)
    analyse(cli, "--select", 3, "--aggregate", "rank")
    assert len(selected()) == 3 and all(row["logra"].keys() == {"score", "rank"} for row in selected())
    write_jsonl(Path("own.jsonl"), [row | {"logra": "mine"} for row in ROWS])
    extract(cli, tiny / "llama", "--rank", 3, "--data_name", "own.jsonl", "--overwrite")
    influence(cli)
    refused(cli(*ANALYSIS, "--select", 3), "a column logra")


def test_extensions_and_limits(cli, tiny, workspace):
    """Rows are those of all data sets of the run; rows that the run did not take are counted, and left out."""
    bare = [{"text": row["text"]} for row in ROWS]
    write_jsonl(Path("one.jsonl"), bare[:8])
    write_jsonl(Path("two.jsonl"), [*bare[8:], {"text": "the old mill"}])
    extract(cli, tiny / "llama", "--rank", 3, "--data_name", "one.jsonl", "--max_examples", 6)
    flags = ("--log_dir", "log", "--extend", "--data_name", "two.jsonl")
    status, _, err = cli("extract_log", *flags)
    assert status == 0, err
    run = RunDir.load(Path("log"))
    influence(cli)
    out = analyse(cli, "--select", 4, "--drop")
    documents = sum(part.documents for part in run.parts)
    assert f"without the 4 highest of {documents} documents" in out and len(selected()) == documents - 4
    assert f"({21 - documents} rows of the data are not in the run" in out
    known = dict(zip(run.train()["text"], run.train()["document_id"], strict=True))
    assert len({known[row["text"]] for row in selected()}) == documents - 4


@pytest.mark.parametrize("change", ["altered", "gone", "replaced"])
def test_a_source_that_changed(cli, tiny, workspace, change):
    """Is refused, and the earlier selection stays."""
    extract(cli, tiny / "llama", "--rank", 3)
    influence(cli)
    analyse(cli, "--select", 2)
    before = selected()
    if change == "altered":
        with open("docs.jsonl", "a") as file:
            file.write('{"id": "new", "text": "the mill"}\n')
    else:
        Path("docs.jsonl").unlink()
    if change == "replaced":
        write_jsonl(Path("docs.jsonl"), [{"text": "other"}])
    refused(cli(*ANALYSIS, "--select", 3), "docs.jsonl", "restore")
    assert selected() == before


def test_flags_of_a_selection(cli, tiny, workspace):
    """What makes no sense is refused."""
    extract(cli, tiny / "llama", "--rank", 3)
    influence(cli)
    for flags, word in (
        (("--drop",), "--select with --drop"), (("--per", "source"), "--select with --per"),
        (("--aggregate", "max"), "--select with --aggregate"), (("--select", 21), "at most 20"),
        (("--select", 20, "--drop"), "at most 19"), (("--select", 2, "--combine", "max"), "sum or mean"),
        (("--select", 1.5), "a share below 1"), (("--select", 0), "a share below 1"),
        (("--combine", "sum"), "--select"),
    ):  # fmt: skip
        refused(cli(*ANALYSIS, *flags), word)
    extract(cli, tiny / "llama", "--rank", 3, "--pack", "--overwrite")
    influence(cli)
    refused(cli(*ANALYSIS, "--select", 2), "--pack", "--select")


def test_values_that_json_lacks(cli, tiny, workspace):
    """A date becomes text; bytes are refused in one line."""
    table = {"text": [row["text"] for row in ROWS], "day": [date(2026, 1, 2)] * 20}
    parquet.write_table(pa.table(table), "rows.parquet")
    extract(cli, tiny / "llama", "--rank", 3, "--data_name", "rows.parquet")
    influence(cli)
    analyse(cli, "--select", 2)
    assert [row["day"] for row in selected()] == ["2026-01-02"] * 2
    parquet.write_table(pa.table(table | {"day": [b"\xff"] * 20}), "rows.parquet")
    extract(cli, tiny / "llama", "--rank", 3, "--data_name", "rows.parquet", "--overwrite")
    influence(cli)
    refused(cli(*ANALYSIS, "--select", 2), "bytes", "selected.jsonl")
