"""Runs that are killed, short of memory, sharded, locked or extended end with what an undisturbed run gives."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, make_texts, write_jsonl
from test_pipeline import hessian_tensors, stored_gradients
from test_processes import launch, start

from benchmarks.kills import begin, kill, workers
from logra.run_dir import RunDir
from logra.runtime import files

FLAGS = "--data_name docs.jsonl --rank 4 --shard_examples 10 --batch_tokens 400 --hessian ekfac"


def same_run(folder: Path, other: Path) -> None:
    """Assert that two runs hold the same gradients to 1e-5, whole, and the same Hessian."""
    one, two = RunDir.load(folder), RunDir.load(other)
    assert one.fingerprints == two.fingerprints
    assert one.shards == two.shards
    assert not any(one.shard(i).problem() for i in range(len(one.shards)))
    expected = stored_gradients(two)
    for layer, grads in stored_gradients(one).items():
        assert (grads - expected[layer]).norm() < 1e-5 * expected[layer].norm()
    assert one.hessian_problem("ekfac") is None
    sums = hessian_tensors(two, "ekfac")
    for key, tensor in hessian_tensors(one, "ekfac").items():
        assert (tensor - sums[key]).double().norm() <= 1e-4 * sums[key].double().norm()


@pytest.fixture
def undisturbed(cli, tiny, workspace):
    """A finished run in ref/ of 60 documents of like length, and the flags that made it."""
    write_jsonl(workspace / "docs.jsonl", [{"id": f"d{i}", "text": t[:40]} for i, t in enumerate(make_texts(60))])
    # of all 60 examples two eigenvalues nearly agree, and rounding turns their eigenvectors by more than 1e-5
    flags = f"--model_name {tiny}/llama {FLAGS} --calibration_examples 32"
    status, _, err = cli("extract_log", *flags.split(), "--log_dir", "ref")
    assert status == 0, err
    return flags


def test_a_model_sharded_over_two_processes(undisturbed, workspace):
    """--fsdp gives what one process with the whole model gives; with gradient checkpointing too."""
    done = launch(2, workspace, f"{undisturbed} --log_dir log --fsdp --gradient_checkpointing")
    assert done.returncode == 0, done.stderr
    same_run(workspace / "log", workspace / "ref")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama_tied"])
def test_other_models_sharded_over_two_processes(cli, tiny, workspace, name):
    """The same for the other architectures; scores by two processes with a sharded model are those of one."""
    flags = f"--model_name {tiny}/{name} {FLAGS}"
    assert cli("extract_log", *flags.split(), "--log_dir", "ref")[0] == 0
    done = launch(2, workspace, f"{flags} --log_dir log --fsdp")
    assert done.returncode == 0, done.stderr
    same_run(workspace / "log", workspace / "ref")
    begin = "accelerate launch --num_processes 2 --num_machines 1 --multi_gpu"
    query = f"{ROOT}/compute_influence.py --split queries.jsonl --mode cosine"
    done = start(f"python {query} --log_dir ref && {begin} {query} --log_dir log --fsdp", workspace)
    assert done.returncode == 0, done.stderr
    one, two = (np.load(next(workspace.glob(f"{name}/scores/*/scores.npy"))) for name in ("ref", "log"))
    assert one.shape == two.shape and np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(one)


def test_memory_that_runs_out(undisturbed, workspace):
    """A batch in whose forward or backward pass memory runs out is halved; no example is lost or counted twice."""
    done = start(
        "RANKS=0 FAULTS=forward,none,backward,batch,none,none,none,none,none,forward,none,batch,none,backward "
        f"python {ROOT}/tests/short_of_memory.py {undisturbed} --log_dir log",
        workspace,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out of memory") == 6, done.stdout
    same_run(workspace / "log", workspace / "ref")
    sums, expected = (
        {key: sum(RunDir.load(workspace / name).read(key, range(6), "factors")) for key in ("examples", "tokens")}
        for name in ("log", "ref")
    )
    assert sums == expected


def test_memory_that_runs_out_on_one_rank_of_a_sharded_model(undisturbed, workspace):
    """The ranks decide together to take smaller batches, wherever one of them failed; none waits for ever."""
    done = start(
        "RANKS=1 FAULTS=forward,backward,none,gather,batch,none,none,forward,gather "
        "accelerate launch --num_processes 2 --num_machines 1 "
        f"--multi_gpu {ROOT}/tests/short_of_memory.py {undisturbed} --log_dir log --fsdp",
        workspace,
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory" in done.stdout
    same_run(workspace / "log", workspace / "ref")


@pytest.mark.slow
def test_killed_twice(undisturbed, workspace):
    """After two kills the run ends with the same gradients; finished shards stay, nothing is left over."""
    log, draw, killed = workspace / "log", random.Random(1), 0
    for processes, victim in ((2, "the launcher"), (1, "a rank")):
        process = begin("extract_log.py", processes, workspace, f"{undisturbed} --log_dir log")
        time.sleep(draw.uniform(4, 9))
        killed += bool(kill(process, victim, draw))
    assert killed
    manifests = {path: path.stat().st_mtime_ns for path in log.glob("gradients/?????.json")}
    done = launch(2, workspace, f"{undisturbed} --log_dir log")
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == modified for path, modified in manifests.items())
    same_run(log, workspace / "ref")
    assert not list(log.rglob("*.tmp")) and not list(workspace.glob("*.lock"))


@pytest.mark.slow
def test_workers_end_with_their_launcher(undisturbed, workspace):
    """kill -9 of the launcher ends its workers, and the lock that they leave is taken over at once."""
    write_jsonl(workspace / "docs.jsonl", [{"text": t} for t in make_texts(20000)])
    process = begin("extract_log.py", 2, workspace, f"{undisturbed} --log_dir log")
    deadline = time.time() + 60
    while not list(workspace.glob("log/gradients/*.json")) and time.time() < deadline:
        time.sleep(0.2)
    started = workers(process)
    assert len(started) == 2 and (workspace / "log.lock").exists()
    done = launch(1, workspace, f"{undisturbed} --log_dir log")
    assert done.returncode == 2 and "another one at work" in done.stderr, "a second run is refused"
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(started, 10)
    assert not alive
    begun = time.time()
    with files.locked(workspace / "log.lock", "log"):
        assert time.time() - begun < 1, "taken over at once"
    assert not (workspace / "log.lock").exists()


def test_a_lock_of_another_host(tmp_path, monkeypatch):
    """A heartbeat that goes on is respected; one that has stopped is waited for, then the lock is taken."""
    monkeypatch.setattr(files, "LOCK_LEASE_SECONDS", 1.0)
    path = tmp_path / "log.lock"
    code = "import filelock, sys, time; lock = filelock.SoftFileLease(sys.argv[1], lease_duration=1.0)"
    code += "; lock.acquire(); print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    holder.stdout.readline()
    text = path.read_text()
    holder.kill()
    holder.wait()
    path.write_text(re.sub("host=.*", "host=elsewhere", text))
    touching = threading.Event()

    def touch() -> None:
        while not touching.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(ValueError, match="another one at work"), files.locked(path, "log"):
        pass
    touching.set()
    thread.join()
    with files.locked(path, "log"):
        assert "host=elsewhere" not in path.read_text()


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
    assert status == 2 and "doc0" in err and not Path("log/train-00001").exists()
    write_jsonl(Path("docs.jsonl"), [*rows, {"id": "new", "text": "the river"}])
    status, _, err = cli("extract_log", *flags, "--data_name", "docs.jsonl", "--extend")
    assert status == 2 and "a file of their own" in err
    write_jsonl(Path("plain.jsonl"), [{"text": "the old mill"}])
    write_jsonl(Path("docs.jsonl"), rows)
    assert cli("extract_log", *flags, "--data_name", "plain.jsonl", "--extend")[0] == 0
    assert RunDir.load(Path("log")).train()["document_id"][-1] == "20", "rows without an id go on with the numbers"
