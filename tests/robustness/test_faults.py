"""What a machine can do to a run: full and read-only disks, folders that vanish, ranks that stop, kills, turned bits.

Each ends in one line or in the right scores, and so does the next start.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_texts, write_jsonl
from helpers import launch, refused, same_run

from benchmarks.kills import begin, workers
from logra.stages import extract

STAGES = {
    "extract_log": ("--data_name", "docs.jsonl", "--rank", 8, "--hessian", "ekfac", "--shard_examples", 5),
    "compute_influence": ("--split", "queries.jsonl", "--mode", "cosine"),
    "analysis": (),
}


def scores(folder: Path) -> np.ndarray:
    """Return a run's scores."""
    (path,) = folder.glob("scores/*/scores.npy")
    return np.load(path)


def run_all(cli, model: Path, folder: Path) -> tuple[int, str, str]:
    """Run the stages until one fails; return what the last one gave."""
    for script, flags in STAGES.items():
        given = ("--model_name", model) if script == "extract_log" else ()
        done = cli(script, "--log_dir", folder, *given, *flags)
        if done[0]:
            break
    return done


@pytest.fixture
def small_disk(tmp_path):
    """A function size -> a folder on a disk of that size, which can be changed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        kind = ["-o", f"remount,{options}"] if os.path.ismount(folder) else ["-t", "tmpfs", "-o", options, "tmpfs"]
        if subprocess.run(["mount", *kind, folder], capture_output=True).returncode:
            pytest.skip("mounting a disk needs root")
        return folder

    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk(cli, tiny, workspace, small_disk, monkeypatch):
    """Wherever the disk gets full, it is one line; with room again, the scores are those of an undisturbed run."""
    assert run_all(cli, tiny / "llama", Path("ref"))[0] == 0
    monkeypatch.setattr(extract, "check_disk", lambda run: None)  # which would say it beforehand
    needed, stopped = sum(path.stat().st_size for path in Path("ref").rglob("*") if path.is_file()), set()
    for share in np.linspace(0.05, 1.2, 14):
        run = small_disk(f"size={int(share * needed / 1024)}k") / "log"
        status, _, error = run_all(cli, tiny / "llama", run)
        if status:
            refused((status, "", error), "No space left")
            stopped.add(error.split(":")[0])
        small_disk("size=100m")
        assert run_all(cli, tiny / "llama", run)[0] == 0
        assert np.allclose(scores(run), scores(Path("ref")), rtol=1e-4, atol=1e-6)
        assert not list(run.rglob("*.tmp"))
        shutil.rmtree(run)
    assert {"extract_log.py", "compute_influence.py", "analysis.py"} <= stopped


def test_a_read_only_folder(cli, tiny, workspace, small_disk):
    """Each stage says so in one line; what is there can be used again afterwards."""
    run = small_disk("size=100m") / "log"
    assert run_all(cli, tiny / "llama", run)[0] == 0
    before = scores(run)
    small_disk("ro")
    for script, flags in STAGES.items():
        refused(cli(script, "--log_dir", run, *flags), "Read-only")
    refused(run_all(cli, tiny / "llama", run.parent / "other"), "Read-only")
    small_disk("rw")
    assert run_all(cli, tiny / "llama", run)[0] == 0 and np.array_equal(scores(run), before)


def write_documents(folder: Path) -> None:
    """Write docs.jsonl: 3000 short documents."""
    write_jsonl(folder / "docs.jsonl", [{"text": text[:40]} for text in make_texts(3000)])


@pytest.fixture(scope="module")
def flags(tiny) -> str:
    """Of an extraction of docs.jsonl."""
    sample = "--calibration_examples 300"  # of all, two eigenvalues may nearly agree
    return f"--model_name {tiny}/llama --data_name docs.jsonl --rank 4 --shard_examples 50 --hessian ekfac {sample}"


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> Path:
    """The run that one process makes of docs.jsonl."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_documents(folder)
    assert launch(1, folder, f"{flags} --log_dir log").returncode == 0
    return folder / "log"


def in_the_middle(workspace: Path, flags: str, processes: int) -> subprocess.Popen:
    """Start an extraction of docs.jsonl, and return when it has written a shard."""
    write_documents(workspace)
    process = begin("extract_log.py", processes, workspace, f"{flags} --log_dir log", stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not list(workspace.glob("log/gradients/*.json")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    return process


@pytest.mark.slow
def test_a_folder_that_is_removed(flags, workspace, undisturbed):
    """It ends with one line; the next start begins anew, and ends as an undisturbed run."""
    process = in_the_middle(workspace, flags, 1)
    (workspace / "log").rename(workspace / "gone")
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 2 and "Traceback" not in error, error
    assert launch(1, workspace, f"{flags} --log_dir log").returncode == 0
    same_run(workspace / "log", undisturbed)


@pytest.mark.slow
def test_a_rank_that_is_slow(flags, workspace, undisturbed):
    """Two ranks wait for the third."""
    process = in_the_middle(workspace, flags, 3)
    rank = workers(process)[-1]
    rank.send_signal(signal.SIGSTOP)
    time.sleep(10)
    rank.send_signal(signal.SIGCONT)
    process.communicate(timeout=300)
    assert process.returncode == 0
    same_run(workspace / "log", undisturbed)


@pytest.mark.slow
def test_a_rank_that_is_killed(flags, workspace, undisturbed):
    """Where one of three is, 1, 2 or 4 processes go on: the same run, and finished shards stay as they are."""
    process = in_the_middle(workspace, flags, 3)
    workers(process)[-1].send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode
    for then in (1, 2, 4):
        log = workspace / f"log{then}"
        shutil.copytree(workspace / "log", log)
        whole = {path: path.stat().st_mtime_ns for path in log.glob("gradients/?????.json")}
        assert len(whole) < 60
        assert launch(then, workspace, f"{flags} --log_dir {log.name}").returncode == 0
        same_run(log, undisturbed)
        assert all(path.stat().st_mtime_ns == time for path, time in whole.items())


@pytest.mark.slow
def test_two_starts_at_once(flags, workspace, undisturbed):
    """One is refused, or finds the run finished; what they leave is what one makes."""
    write_documents(workspace)
    both = [
        begin("extract_log.py", 1, workspace, f"{flags} --log_dir log", stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = sorted((process.returncode, error) for process in both for _, error in [process.communicate(timeout=300)])
    assert ends[0][0] == 0 and (ends[1][0] == 0 or (ends[1][0] == 2 and "another one at work" in ends[1][1])), ends
    same_run(workspace / "log", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags", [("kills", "--kills 5 --texts 1000"), ("bit_flips", "--flips 40"), ("soak", "--examples 40 80")]
)
def test_the_benchmarks_of_faults(script, flags):
    """Five kills, and forty turned bits: scores as undisturbed, nothing silent, no traceback; and a small soak."""
    command = [sys.executable, ROOT / f"benchmarks/{script}.py", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.get("kills", 5) >= 5 and not found.get("silent") and not found.get("crash")
