"""Runs that are killed, short of memory, sharded or locked end with what an undisturbed run gives."""

import random
import shutil
import time

import numpy as np
import psutil
import pytest
from conftest import CONFIGS, ROOT, make_texts, save_model, write_jsonl
from helpers import launch, same_run, start

from benchmarks.kills import begin, kill, workers
from logra.run_dir import RunDir
from logra.runtime import files

FLAGS = "--data_name docs.jsonl --rank 4 --shard_examples 10 --batch_tokens 400 --hessian ekfac"


@pytest.fixture
def undisturbed(cli, workspace, request):
    """A finished run in ref/ of 60 documents of like length, and the flags that made it. By default of a Llama."""
    folder = save_model(workspace / "model", getattr(request, "param", "llama"))
    write_jsonl(workspace / "docs.jsonl", [{"id": f"d{i}", "text": t[:40]} for i, t in enumerate(make_texts(60))])
    # of all 60 examples two eigenvalues nearly agree, and rounding turns their eigenvectors by more than 1e-5
    flags = f"--model_name {folder} {FLAGS} --calibration_examples 32"
    status, _, err = cli("extract_log", *flags.split(), "--log_dir", "ref")
    assert status == 0, err
    return flags


def test_a_model_sharded_over_two_processes(undisturbed, workspace):
    """--fsdp gives what one process with the whole model gives; with gradient checkpointing too."""
    done = launch(2, workspace, f"{undisturbed} --log_dir log --fsdp --gradient_checkpointing")
    assert done.returncode == 0, done.stderr
    same_run(workspace / "log", workspace / "ref")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama_tied", "llama4", "bert"])
def test_other_models_sharded_over_two_processes(cli, tiny, workspace, name):
    """The same for the other architectures; scores by two processes with a sharded model are those of one."""
    folder = tiny / name if name in CONFIGS else save_model(workspace / "model", name)
    flags = f"--model_name {folder} {FLAGS}"
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
        f"python {ROOT}/tests/robustness/short_of_memory.py extract_log {undisturbed} --log_dir log",
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


@pytest.mark.parametrize("undisturbed", ["mixtral"], indirect=True)  # the ranks share its projections, too
def test_memory_that_runs_out_on_one_rank_of_a_sharded_model(undisturbed, workspace):
    """The ranks decide together to take smaller batches, wherever one of them failed; none waits for ever."""
    done = start(
        "RANKS=1 FAULTS=forward,backward,none,gather,batch,none,none,forward,gather "
        "accelerate launch --num_processes 2 --num_machines 1 "
        f"--multi_gpu {ROOT}/tests/robustness/short_of_memory.py extract_log {undisturbed} --log_dir log --fsdp",
        workspace,
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory" in done.stdout
    same_run(workspace / "log", workspace / "ref")


def test_memory_that_runs_out_while_a_sharded_model_scores(undisturbed, workspace):
    """A pass over the examples has a Lockstep of its own beside the queries'; neither replays the other's gathers."""
    begin = "accelerate launch --num_processes 2 --num_machines 1 --multi_gpu"
    flags = f"{undisturbed} --store_dtype none --split queries.jsonl"
    done = launch(2, workspace, f"{undisturbed} --store_dtype none --log_dir log --fsdp")
    assert done.returncode == 0, done.stderr
    write_jsonl(workspace / "queries.jsonl", [{"text": text} for text in make_texts(12, seed=2)])
    faults = f"RANKS=1 QUERIES=6 FAULTS={','.join(['forward', 'backward'] * 20)}"
    script = f"{ROOT}/tests/robustness/short_of_memory.py compute_influence"
    done = start(f"{faults} {begin} {script} {flags} --log_dir log --fsdp", workspace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out of memory") > 1
    found = np.load(next(workspace.glob("log/scores/*/scores.npy")))
    shutil.rmtree(workspace / "log/scores")
    assert start(f"python {ROOT}/compute_influence.py {flags} --log_dir log", workspace).returncode == 0
    expected = np.load(next(workspace.glob("log/scores/*/scores.npy")))
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


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
