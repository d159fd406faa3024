"""The scripts as users start them: subprocesses, accelerate launch, the five commands of the design."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from conftest import ROOT, make_texts, save_model, write_jsonl
from helpers import COMMANDS, hessian_tensors, launch, poison_model, start, stored_gradients

from logra import store
from logra.run_dir import RunDir
from logra.runtime import processes
from logra.scoring.score_files import extremes_layout


def test_the_five_commands(tmp_path):
    """The commands at the head of the design, unchanged, on tiny stand-ins of the same names."""
    for name in ("generate.py", "generate_llama3.py", "extract_log.py", "compute_influence.py", "analysis.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("logra", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    save_model(tmp_path / "meta-llama/Meta-Llama-3-8B-Instruct", "llama", context=512)
    save_model(tmp_path / "EleutherAI/pythia-1.4b", "neox", context=512)
    write_jsonl(tmp_path / "openwebtext/train.jsonl", [{"text": text} for text in make_texts(30)])
    for command in COMMANDS.splitlines():
        done = start(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    log = RunDir.load(tmp_path / "logs/Meta-Llama-3-8B-Instruct_openwebtext_random64x64_mlp")
    rows = [json.loads(line) for line in open(next(log.folder.glob("scores/queries-*-cosine-raw-0.1/top_k.jsonl")))]
    assert log.examples == 30 and len(rows) == 12 * 20
    for model in ("Meta-Llama-3-8B-Instruct", "pythia-1.4b"):
        assert len(open(tmp_path / f"data/generated/{model}/queries.jsonl").readlines()) == 12
    again = start(COMMANDS.splitlines()[2], tmp_path)
    assert again.returncode == 0 and "extracting" not in again.stderr, "a finished run is not computed again"


def written_files() -> list[set[str]]:
    """Return which files each of two ranks opened to write (see watch_writes/); assert that none has two writers."""
    written = [{*Path(f"written.{rank}").read_text().splitlines()} for rank in (0, 1)]
    assert not written[0] & written[1], "one writer a file"
    return written


@pytest.mark.parametrize("flags", [pytest.param("--hessian raw", marks=pytest.mark.slow), "--hessian ekfac"])
def test_two_processes_give_what_one_gives(cli, tiny, workspace, monkeypatch, flags):
    """The same gradients for every example, to 1e-5, each once; the same Hessian; also after half was lost."""
    flags += f" --model_name {tiny}/llama --data_name docs.jsonl --rank 4 --shard_examples 3 --batch_tokens 60"
    status, out, err = cli("extract_log", *flags.split(), "--log_dir", "log1")
    assert status == 0, err
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests/runtime/watch_writes")
    done = launch(2, workspace, f"{flags} --log_dir log2")
    assert done.returncode == 0, done.stderr
    assert all(any("gradients" in name for name in names) for names in written_files())
    assert out.count("Next:") == done.stdout.count("Next:") == 1, "rank 0 alone prints"
    logs = [RunDir.load(workspace / f"log{n}") for n in (1, 2)]
    one, two = (stored_gradients(log) for log in logs)
    assert logs[0].parts[0].fingerprint == logs[1].parts[0].fingerprint
    for layer in one:
        assert (one[layer] - two[layer]).norm() < 1e-5 * one[layer].norm()
    kind = flags.split()[1]
    hessians = [hessian_tensors(log, kind) for log in logs]
    for key in hessians[0]:
        one_sum, two_sum = (tensors[key].double() for tensors in hessians)
        assert (one_sum - two_sum).norm() <= 1e-5 * one_sum.norm()
    for index in (0, 2, 3):
        logs[0].shard(index).path("manifest").unlink()
    done = launch(2, workspace, f"{flags} --log_dir log1")
    assert done.returncode == 0, done.stderr
    again = stored_gradients(logs[0])
    assert all((one[layer] - again[layer]).norm() < 1e-5 * one[layer].norm() for layer in one)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param("--text_column body", "text_column", marks=pytest.mark.slow),
        ("--layers zzz", "zzz"),
        ("--no_flag", "no_flag"),
    ],
)
def test_an_error_of_all_ranks_is_said_once(tiny, workspace, flags, words):
    """Under accelerate launch rank 0 prints the line, and the status is not 0."""
    done = launch(2, workspace, f"--model_name {tiny}/llama --data_name docs.jsonl {flags}")
    assert done.returncode != 0 and done.stderr.count("extract_log.py: error: ") == 1, done.stderr
    assert words in done.stderr and not list(workspace.glob("logs/*/run.json"))


def test_an_error_of_one_rank_is_said_too(tiny, workspace):
    """A NaN that only rank 1 meets stops the run, and names the example."""
    rows = [{"text": "the river"}] * 3 + [{"text": "the zebra"}]
    write_jsonl(workspace / "docs.jsonl", rows)
    broken = workspace / "broken"
    poison_model(tiny / "llama", broken, "z")
    done = launch(2, workspace, f"--model_name {broken} --data_name docs.jsonl --shard_examples 1")
    assert done.returncode != 0 and "example 3" in done.stderr and "(rank 1)" in done.stderr


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        pytest.param("raw", "float32", marks=pytest.mark.slow),
        ("ekfac", "float32"),
        pytest.param("ekfac", "int1", marks=pytest.mark.slow),
        pytest.param("ekfac", "none", marks=pytest.mark.slow),
    ],
)
def test_two_processes_score_as_one(cli, tiny, workspace, monkeypatch, kind, stored):
    """Two processes that share queries, layers and shards write the scores of one, whole or their ends only."""
    flags = ("--model_name", tiny / "llama", "--data_name", "docs.jsonl", "--rank", 4, "--shard_examples", 3)
    assert cli("extract_log", *flags, "--log_dir", "log", "--hessian", kind, "--store_dtype", stored)[0] == 0
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests/runtime/watch_writes")
    query = "--log_dir log --split queries.jsonl --mode cosine --damping 0.1 1"
    begin = f"accelerate launch --num_processes 2 --num_machines 1 --multi_gpu {ROOT}/compute_influence.py {query}"
    done = start(f"{begin} --layerwise && {begin} --top_k_only 4", workspace)
    assert done.returncode == 0, done.stderr
    assert all(any("scores.npy" in name for name in names) for names in written_files())
    assert done.stdout.count("Next:") == 2
    folders = sorted(Path("log/scores").glob("*/scores.npy"))
    two = [np.load(path) for path in folders]
    shutil.rmtree("log/self_influence")
    assert cli("compute_influence", *query.split())[0] == 0
    for path, scores in zip(folders, two, strict=True):
        one = np.load(path)
        assert one.shape == scores.shape == (3, 20) and np.allclose(one, scores, rtol=1e-4, atol=1e-5)
    for path in Path("log/scores").glob("*/top.json"):
        found = store.load_tensors(
            path.with_suffix(".safetensors"), json.loads(path.read_text()), extremes_layout(3, 4, 0)
        )
        whole = np.load(next(p for p in folders if p.parent.name.endswith(path.parent.name.split("-cosine")[1])))
        assert np.allclose(np.sort(whole, axis=1)[:, ::-1][:, :4], found["scores"], rtol=1e-4, atol=1e-5)


def test_scripts_start_from_any_folder(tiny, workspace):
    """Plain python, one process, from another working directory, is what accelerate launch gives; scores follow."""
    flags = f"--model_name {tiny}/gpt2 --data_name docs.jsonl --rank 4 --hessian kfac"
    assert launch(1, workspace, flags).returncode == 0
    done = start(f"python {ROOT}/compute_influence.py {flags} --split queries.jsonl", workspace)
    assert done.returncode == 0, done.stderr
    assert np.load(next(workspace.glob("logs/*/scores/*/scores.npy"))).shape[0] == 3


def test_a_rank_that_dies_ends_the_others(tmp_path):
    """Even a rank that waits for nobody, on another machine: no launcher is shared, and no collective is open."""
    program = "import time; from logra.runtime import processes; processes.start(); print('up', flush=True)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", f"{program}; time.sleep(100)"]
        ranks.append(subprocess.Popen(command, env=os.environ | master | place, stdout=subprocess.PIPE, text=True))
    try:
        assert all(rank.stdout.readline() == "up\n" for rank in ranks)
        ranks[1].kill()
        assert ranks[0].wait(20) == 1
    finally:
        for rank in ranks:
            rank.kill()


def test_the_connection_ends_before_python_does(monkeypatch):
    """A rank says goodbye, and gloo's threads end: one that still runs while Python ends aborted the process (5%)."""
    own, other = socket.socketpair()
    monkeypatch.setattr(processes, "_connections", [own])
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    processes.finish()
    assert other.recv(1) == processes.GOODBYE and not dist.is_initialized()
    own.close()
    other.close()


def test_a_decision_inside_a_decision(monkeypatch):
    """Rank 0 alone runs a decided function; one that it calls must not broadcast, as no other rank would receive."""
    broadcasts = []
    monkeypatch.setattr(processes, "broadcast_object_list", lambda outcome: broadcasts.append(list(outcome)))
    inner = processes.on_rank_0(lambda: Path("log"))
    assert processes.on_rank_0(lambda: [inner(), 1])() == [Path("log"), 1]
    assert broadcasts == [[[Path("log"), 1], None]]
    assert inner() == Path("log") and len(broadcasts) == 2
