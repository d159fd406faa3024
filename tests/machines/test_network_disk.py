"""Two machines that share a network file system: each with pages and names of its own (see network_disk.py)."""

import ctypes.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_texts, write_jsonl
from helpers import hessian_tensors, stored_gradients

from logra.run_dir import RunDir

REMEMBERED_SECONDS = 12


@pytest.fixture
def machines(tmp_path):
    """Two mounts of one disk."""
    if not ctypes.util.find_library("fuse3"):
        pytest.skip("needs libfuse (Debian: apt install fuse3)")
    disk, mounts, serving = tmp_path / "disk", [tmp_path / "machine0", tmp_path / "machine1"], []
    disk.mkdir()
    try:
        for mount in mounts:
            mount.mkdir()
            program = Path(__file__).with_name("network_disk.py")
            command = [sys.executable, str(program), str(disk), str(mount), str(REMEMBERED_SECONDS)]
            serving.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 20
        while not all(map(os.path.ismount, mounts)) and all(process.poll() is None for process in serving):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if not all(map(os.path.ismount, mounts)):
            pytest.skip("needs the right to mount a file system")
        yield mounts
    finally:
        for mount in mounts:
            subprocess.run(["umount", "-l", str(mount)], capture_output=True)
        for process in serving:
            process.kill()


def launch(mounts: list[Path], script: str, flags: str) -> str:
    """Run a script on both machines, a rank each; return what rank 0 printed."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, running = server.getsockname()[1], []
    for rank, mount in enumerate(mounts):
        command = f"accelerate launch --config_file {ROOT}/scripts/accelerate.yaml --num_processes 2 --num_machines 2"
        command += f" --machine_rank {rank} --main_process_ip 127.0.0.1 --main_process_port {port} --multi_gpu"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        words = f"{command} {ROOT}/{script} {flags}".split()
        running.append(subprocess.Popen(words, cwd=mount, env=environment, **pipes))
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return said[0]


@pytest.mark.slow
def test_two_machines_on_a_network_disk(machines, tiny, tmp_path, cli, monkeypatch):
    """Gradients, Hessian and scores are those of one process, whatever each machine remembers of the disk."""
    model = tiny / "llama"
    texts = make_texts(40, seed=1)
    generated = f"--model_name {model} --prompts prompts.txt --output queries.jsonl --max_new_tokens 8".split()
    for folder in (tmp_path, machines[0]):
        monkeypatch.chdir(folder)
        write_jsonl(folder / "docs.jsonl", [{"id": f"doc{i}", "text": text} for i, text in enumerate(texts)])
        Path("prompts.txt").write_text("\n".join(make_texts(3, seed=2)))
        assert cli("generate", *generated)[0] == 0
    flags = f"--model_name {model} --data_name docs.jsonl --rank 4 --shard_examples 3 --hessian ekfac --log_dir log"
    scored = f"{flags} --split queries.jsonl --mode cosine --layerwise"
    monkeypatch.chdir(tmp_path)
    assert cli("extract_log", *flags.split())[0] == cli("compute_influence", *scored.split())[0] == 0
    for mount in machines:  # each machine remembers that there is no run yet
        assert not (mount / "log").exists()
    launch(machines, "extract_log.py", flags)
    launch(machines, "compute_influence.py", scored)
    one, two = (RunDir.load(folder / "log") for folder in (tmp_path, machines[0]))
    expected = stored_gradients(one)
    assert all(
        (grads - expected[layer]).norm() < 1e-5 * expected[layer].norm()
        for layer, grads in stored_gradients(two).items()
    )
    sums = hessian_tensors(one, "ekfac")
    assert all(
        (tensor - sums[key]).double().norm() <= 1e-5 * sums[key].double().norm()
        for key, tensor in hessian_tensors(two, "ekfac").items()
    )
    for name in ("scores.npy", "layer_scores.npy"):
        found = [np.load(next((folder / "log/scores").glob(f"*/{name}"))) for folder in (tmp_path, machines[0])]
        assert found[0].shape == found[1].shape and np.abs(found[0] - found[1]).max() < 1e-4 * np.abs(found[0]).max()
    monkeypatch.chdir(machines[1])
    assert cli("analysis", "--log_dir", "log")[0] == 0
