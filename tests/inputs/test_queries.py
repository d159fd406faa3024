"""Queries of each form and from each kind of file, contrasts of two answers, and queries that are too long."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import make_texts, write_jsonl
from datasets import Dataset
from helpers import refused, relative, stored_gradients

from logra.inputs.queries import load_queries
from logra.models.model import load_model, load_tokenizer
from logra.run_dir import RunDir
from logra.runtime.settings import QuerySettings, RunSettings
from logra.scoring.rank import read_queries

CHOSEN, REJECTED = " river ran past the mill", " dog barked"
ROWS = [{"id": "one", "text": "the river ran"}, {"id": "two", "text": 'a dog, "barked"'}]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of a finished run of Llama."""
    from conftest import run_cli

    folder = tmp_path_factory.mktemp("queries")
    write_jsonl(folder / "docs.jsonl", [{"text": text} for text in make_texts(12)])
    flags = ("--model_name", tiny / "llama", "--data_name", folder / "docs.jsonl", "--hessian", "none", "--rank", 4)
    assert run_cli("extract_log", *flags, "--log_dir", folder / "log") == 0
    return folder / "log"


def scores_of(cli, run: Path, split: str, *flags) -> np.ndarray:
    """Score the run with the queries of a file; return the scores [Q, N]."""
    status, _, err = cli("compute_influence", "--log_dir", run, "--split", split, *flags)
    assert status == 0, err
    return np.load(max(run.glob("scores/*/scores.npy"), key=lambda path: path.stat().st_mtime_ns))


def test_contrasts(cli, run, workspace):
    """A contrast's scores are those of the gradient of loss(chosen) - loss(rejected), as autograd has it."""
    row = {"id": "x", "prompt": "the old", "chosen": CHOSEN, "rejected": REJECTED}
    pairs = [{"prompt": "the old", "response": answer} for answer in (CHOSEN, REJECTED)]
    write_jsonl(Path("both.jsonl"), [row])
    write_jsonl(Path("pairs.jsonl"), pairs)
    scores, one = scores_of(cli, run, "both.jsonl"), scores_of(cli, run, "pairs.jsonl")
    assert np.allclose(scores, one[:1] - one[1:], rtol=1e-5, atol=1e-5 * np.abs(one).max())

    log = RunDir.load(run)
    model, tokenizer = (
        load(log.settings.model_name, *more) for load, more in ((load_model, (torch.float32,)), (load_tokenizer, ()))
    )
    gradients = []
    for answer in (CHOSEN, REJECTED):
        ids, start = tokenizer("the old" + answer)["input_ids"], len(tokenizer("the old")["input_ids"])
        gradients.append(reference.full_gradient(model, log.shapes, ids, start))
    stored, expected = stored_gradients(log), 0
    for layer, projection in log.projections().items():
        difference = gradients[0][layer] - gradients[1][layer]
        expected = expected + stored[layer].double() @ reference.project(difference, *projection[:2]).flatten().double()
    assert relative(torch.from_numpy(scores[0]), expected) < 1e-5

    swapped = row | {"chosen": REJECTED, "rejected": CHOSEN}
    write_jsonl(Path("swapped.jsonl"), [swapped])
    assert np.allclose(scores_of(cli, run, "swapped.jsonl"), -scores)
    write_jsonl(Path("group.jsonl"), [row | {"g": 1}, {"id": "y", **pairs[0], "g": 1}])
    grouped = scores_of(cli, run, "group.jsonl", "--group_by", "g")
    assert np.allclose(grouped, (scores + one[:1]) / 2, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_the_common_part_of_a_contrast_cancels(cli, run, workspace):
    """With --query_loss all the prompt counts in both answers, and so in neither."""
    write_jsonl(Path("both.jsonl"), [{"prompt": "the old", "chosen": CHOSEN, "rejected": REJECTED}])
    scores, whole = (scores_of(cli, run, "both.jsonl", "--query_loss", loss) for loss in ("response", "all"))
    assert np.allclose(scores, whole, rtol=1e-4, atol=1e-4 * np.abs(scores).max())


def test_contrasts_of_chats_are_shown(cli, run, workspace):
    """The lists and the report show prompt and both answers, and say why the query's tokens are not shaded."""
    turn = {"role": "assistant", "content": "the river"}
    row = {
        "prompt": [{"role": "user", "content": "which <b>way</b>"}],
        "chosen": [turn],
        "rejected": [turn | {"content": "birds"}],
    }
    write_jsonl(Path("chats.jsonl"), [row])
    scores_of(cli, run, "chats.jsonl")
    status, out, err = cli("analysis", "--log_dir", run, "--split", "chats.jsonl", "--tokens")
    assert status == 0, err
    page = max(run.glob("scores/chats-*/report.html")).read_text()
    assert "assistant: birds" in page and "assistant: the river" in page and "<b>way</b>" not in page
    assert "a contrast of two answers" in page


@pytest.mark.parametrize(
    "name", ["q.jsonl", "q.json", "q.csv", "q.parquet", "q.jsonl.gz", "q.jsonl.zst", "folder:test"]
)
def test_kinds_of_files(tiny, workspace, name):
    """The same queries in each kind of file, and as a split of a data set."""
    text = "\n".join(map(json.dumps, ROWS)) + "\n"
    if ":" in name:
        write_jsonl(Path("folder/test.jsonl"), ROWS)
        write_jsonl(Path("folder/train.jsonl"), ROWS[:1])
    elif name.endswith((".json", ".jsonl")):
        Path(name).write_text(json.dumps(ROWS) if name == "q.json" else text)
    elif name.endswith((".csv", ".parquet")):
        getattr(Dataset.from_list(ROWS), f"to_{name[2:]}")(name)
    elif name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(text.encode()))
    else:
        import pyarrow

        with pyarrow.output_stream(name, compression="zstd") as file:
            file.write(text.encode())
    settings, tokenizer = RunSettings(model_name=str(tiny / "llama")), load_tokenizer(str(tiny / "llama"))
    query_set, queries = load_queries(QuerySettings(name), settings, tokenizer, cache_dir="cache")
    assert query_set == ("folder-test" if ":" in name else "q")
    assert [query.id for query in queries] == ["one", "two"]
    assert [query.token_ids for query in queries] == [tokenizer(row["text"])["input_ids"] for row in ROWS]
    assert all(all(query.counted) for query in queries)


def test_text_files(tiny, workspace):
    """Each line of a .txt that is not blank is a query."""
    Path("q.txt").write_text("the river ran\n\na dog\n")
    settings, tokenizer = RunSettings(model_name=str(tiny / "llama")), load_tokenizer(str(tiny / "llama"))
    _, queries = load_queries(QuerySettings("q.txt"), settings, tokenizer)
    assert [(query.id, query.row["text"]) for query in queries] == [("0", "the river ran"), ("1", "a dog")]


def test_long_queries(cli, run, workspace):
    """--truncate_queries keeps the last tokens and says how many; an answer is never cut."""
    prompt, answer = "the river " * 60, " a dog barked"
    write_jsonl(Path("long.jsonl"), [{"prompt": prompt, "response": answer}, {"text": prompt}])
    flags = ("compute_influence", "--log_dir", run, "--split", "long.jsonl")
    refused(cli(*flags), "64 tokens", "--truncate_queries")
    status, out, err = cli(*flags, "--truncate_queries")
    assert status == 0 and "query 0: the last 64 of" in out and "query 1: the last 64 of" in out, err
    rows = read_queries(max(run.glob("scores/long-*/queries.jsonl")))
    assert [row["tokens"] for row in rows] == [64, 64] and rows[1]["counted"] == 64
    tokenizer = load_tokenizer(RunDir.load(run).settings.model_name)
    ids = tokenizer(prompt + answer)["input_ids"]
    counted = len(ids) - len(tokenizer(prompt)["input_ids"])
    assert rows[0]["counted"] == counted
    assert cli("analysis", "--log_dir", run, "--split", "long.jsonl", "--tokens")[0] == 0
    write_jsonl(Path("long.jsonl"), [{"prompt": answer, "response": prompt}])
    refused(cli(*flags, "--truncate_queries"), "answers of less than 64 tokens")
