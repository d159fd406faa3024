"""Stage 2: what is written, resuming, another Hessian, further documents."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from conftest import make_texts, write_jsonl
from helpers import QUERIES, extract, hessian_tensors, influence, stored_gradients

from logra.run_dir import RunDir
from logra.runtime import files


def test_what_is_written(cli, tiny, workspace):
    """The run directory of DESIGN: readable with plain safetensors, numpy, datasets and json."""
    from datasets import load_from_disk
    from safetensors.torch import load_file

    flags = ("--hessian", "ekfac", "--rank_in", 3, "--rank_out", 4, "--block_size", 16, "--shard_examples", 7)
    log = extract(cli, tiny / "llama", *flags)
    train = load_from_disk("log/train")
    assert log.examples == len(train) > 20 and log.settings.block_size == 16
    assert json.load(open("log/run.json"))["arguments"]["hessian"] == "ekfac"
    total = 0
    for index, ids in enumerate(log.shards):
        grads = load_file(f"log/gradients/{index:05d}.safetensors")
        manifest = json.load(open(f"log/gradients/{index:05d}.json"))
        assert manifest["first_example"] == ids.start and manifest["examples"] == len(ids)
        assert {tuple(g.shape) for g in grads.values()} == {(len(ids), 12)} and set(grads) == set(log.layers)
        total += len(ids)
    assert total == len(train)
    sums = load_file("log/hessian/ekfac.safetensors")
    squares = sum(g.double().square().sum(0) for g in log.read(next(iter(log.layers)), range(len(log.shards))))
    assert torch.allclose(sums[f"{next(iter(log.layers))}.square"].flatten(), squares, rtol=1e-5)
    scores, folder = influence(cli, "--mode", "cosine", "--self_influence")
    assert scores.shape == (3, len(train)) and scores.dtype == np.float32
    assert (np.load(folder / "self_influence.npy") >= 0).all()
    assert [json.loads(line)["id"] for line in open(folder / "queries.jsonl")] == ["0", "1", "pr"]
    assert not list(Path("log").rglob("*.tmp")) and not Path("log/work").exists()
    status, out, err = cli(
        "analysis", "--log_dir", "log", "--top_k", 5, "--bottom", "--by", "document", "--combine", "max"
    )
    assert status == 0, err
    rows = [json.loads(line) for line in open(folder / "top_k.jsonl")]
    assert len(rows) == 3 * 2 * 5
    first = [row for row in rows if row["query"] == "pr" and row["side"] == "top"]
    assert first[0]["score"] == scores[2].max() and [row["rank"] for row in first] == [1, 2, 3, 4, 5]
    assert len({row["document"] for row in first}) == 5
    assert all(train[row["example"]]["text"] == row["text"] for row in rows)
    assert "top_k.jsonl" in out and first[0]["document"] in out
    assert first[0]["text"].strip() in open(folder / "top_k.txt").read()


def test_a_second_start_computes_only_what_is_missing(cli, tiny, workspace):
    """Finished shards are kept as they are; a deleted, altered or truncated one is found and computed again alone."""
    log = extract(cli, tiny / "gpt2", "--shard_examples", 4, "--rank", 4)
    before, times = stored_gradients(log), {p: p.stat().st_mtime_ns for p in log.folder.glob("gradients/*")}
    kinds = ("gradients", "factors", "manifest")
    shards = [{kind: log.shard(index).path(kind) for kind in kinds} for index in range(5)]
    shards[1]["manifest"].unlink()
    content = bytearray(shards[2]["gradients"].read_bytes())
    content[-5] ^= 4
    shards[2]["gradients"].write_bytes(content)
    shards[3]["factors"].write_bytes(shards[3]["factors"].read_bytes()[:-8])
    shards[0]["manifest"].rename("kept.json")
    shards[0]["manifest"].write_text("{")
    status, _, err = cli("compute_influence", *QUERIES)
    assert status == 2 and "00000.json" in err
    Path("kept.json").rename(shards[0]["manifest"])
    for index, words in ((1, "missing"), (2, "altered")):
        status, _, err = cli("compute_influence", *QUERIES)
        assert status == 2 and words in err and f"{index:05d}" in err and len(err.splitlines()) == 1
        if index == 1:
            files.write_json(shards[1]["manifest"], {"first_example": 4, "examples": 4})
            assert cli("compute_influence", *QUERIES)[0] == 2
            shards[1]["manifest"].unlink()
            extract(cli, tiny / "gpt2", "--shard_examples", 4, "--rank", 4)
            content[-5] ^= 4
            shards[2]["gradients"].write_bytes(b"x" + bytes(content[1:]))
    log = extract(cli, tiny / "gpt2", "--shard_examples", 4, "--rank", 4)
    for layer, grads in stored_gradients(log).items():
        assert torch.allclose(grads, before[layer], rtol=1e-5, atol=1e-6)
    for path, time in times.items():
        if path.name.startswith(("00000", "00004")):
            assert path.stat().st_mtime_ns == time, path


def test_another_hessian_needs_no_model_and_no_data(cli, tiny, workspace):
    """--hessian X on a finished log, with model and data gone; the same as a fresh run's."""
    shutil.copytree(tiny / "llama", "model")
    extract(cli, Path("model"), "--rank", 4)
    expected = {}
    for kind in ("kfac", "ekfac"):
        fresh = ("--log_dir", f"log_{kind}", "--hessian", kind, "--basis", "projected", "--rank", 4)
        assert cli("extract_log", "--model_name", "model", "--data_name", "docs.jsonl", *fresh)[0] == 0
        expected[kind] = hessian_tensors(RunDir.load(Path(f"log_{kind}")), kind)
    shutil.move("model", "elsewhere")
    Path("docs.jsonl").unlink()
    for kind in ("kfac", "ekfac"):
        status, _, err = cli("compute_influence", *QUERIES, "--hessian", kind)
        assert status == 2 and f"extract_log.py --log_dir log --hessian {kind}" in err
        assert cli("extract_log", "--log_dir", "log", "--hessian", kind)[0] == 0
        for key, tensor in hessian_tensors(RunDir.load(Path("log")), kind).items():
            assert torch.allclose(tensor, expected[kind][key], rtol=1e-4, atol=1e-6)
    shutil.move("elsewhere", "model")
    kfac, _ = influence(cli, "--hessian", "kfac")
    ekfac, _ = influence(cli, "--hessian", "ekfac")
    assert not np.allclose(kfac, ekfac)


def test_extend(cli, tiny, workspace):
    """Further documents get the next ids and shards; what is there stays; scores are those of one run of all."""
    flags = ("--model_name", tiny / "llama", "--rank", 4, "--log_dir", "log", "--shard_examples", 6)
    assert cli("extract_log", *flags, "--data_name", "docs.jsonl")[0] == 0
    assert cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", "--mode", "cosine")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("log/gradients").iterdir()}
    further = [{"id": f"new{i}", "text": text} for i, text in enumerate(make_texts(8, seed=5))]
    write_jsonl(Path("more.jsonl"), further)
    for _ in range(2):
        status, out, err = cli("extract_log", *flags, "--data_name", "more.jsonl", "--extend")
        assert status == 0 and "28 examples of 28 documents" in out, "a second time adds nothing"
    assert all(path.stat().st_mtime_ns == modified for path, modified in before.items())
    log = RunDir.load(Path("log"))
    assert log.shards == [range(0, 6), range(6, 12), range(12, 18), range(18, 20), range(20, 26), range(26, 28)]
    assert log.train()["document_id"][20:] == [row["id"] for row in further]
    status, _, err = cli("analysis", "--log_dir", "log")
    assert status == 2 and "compute_influence.py again" in err, "the old scores lack the new examples"
    write_jsonl(Path("all.jsonl"), [json.loads(line) for line in open("docs.jsonl")] + further)
    assert cli("extract_log", *flags[:4], "--log_dir", "all", "--data_name", "all.jsonl")[0] == 0
    tables = []
    for folder in ("log", "all"):
        assert cli("compute_influence", "--log_dir", folder, "--split", "queries.jsonl")[0] == 0
        assert cli("analysis", "--log_dir", folder, "--top_k", 28)[0] == 0
        rows = [json.loads(line) for line in open(next(Path(folder).glob("scores/queries-*-dot-*/top_k.jsonl")))]
        tables.append({(row["query"], row["document"]): row["score"] for row in rows})
    assert tables[0].keys() == tables[1].keys()
    largest = max(map(abs, tables[0].values()))
    assert all(abs(score - tables[1][key]) < 1e-4 * largest for key, score in tables[0].items())


def test_extend_refuses(cli, tiny, workspace):
    """The same documents again, changed ones of the same name, and a missing run."""
    flags = ("--model_name", tiny / "llama", "--rank", 4, "--log_dir", "log")
    status, _, err = cli("extract_log", *flags, "--data_name", "docs.jsonl", "--extend")
    assert status == 2 and "extract_log.py" in err
    status, _, err = cli("extract_log", *flags, "--extend")
    assert status == 2 and "--data_name" in err
    assert cli("extract_log", *flags, "--data_name", "docs.jsonl")[0] == 0
    rows = [json.loads(line) for line in open("docs.jsonl")]
    write_jsonl(Path("copy.jsonl"), rows)
    status, _, err = cli("extract_log", *flags, "--data_name", "copy.jsonl", "--extend")
    assert status == 2 and "a copy of docs.jsonl" in err and not Path("log/train-00001").exists()
    write_jsonl(Path("docs.jsonl"), [*rows, {"id": "new", "text": "the river"}])
    status, _, err = cli("extract_log", *flags, "--data_name", "docs.jsonl", "--extend")
    assert status == 2 and "a file of their own" in err
    write_jsonl(Path("plain.jsonl"), [{"text": "the old mill"}])
    write_jsonl(Path("docs.jsonl"), rows)
    assert cli("extract_log", *flags, "--data_name", "plain.jsonl", "--extend")[0] == 0
    assert RunDir.load(Path("log")).train()["document_id"][-1] == "20", "rows without an id go on with the numbers"
