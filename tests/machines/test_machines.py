"""Two machines: network namespaces of this one, each with an address of its own, and one disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from helpers import stored_gradients

from logra.run_dir import RunDir

HOSTS = [f"lg{os.getpid()}{side}" for side in "ab"]


def ip(command: str) -> bool:
    return subprocess.run(["ip", *command.split()], capture_output=True).returncode == 0


@pytest.fixture
def machines():
    """Two namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    if not shutil.which("ip") or not ip(f"netns add {HOSTS[0]}"):
        pytest.skip("needs root and iproute2, to make network namespaces")
    try:
        made = [
            ip(f"netns add {HOSTS[1]}"),
            ip(f"link add name end0 netns {HOSTS[0]} type veth peer name end1 netns {HOSTS[1]}"),
        ]
        for host, name, address in zip(HOSTS, ("end0", "end1"), ("10.77.0.1", "10.77.0.2"), strict=True):
            made += [ip(f"-n {host} addr add {address}/24 dev {name}")]
            made += [ip(f"-n {host} link set {device} up") for device in ("lo", name)]
        if not all(made):
            pytest.skip("network namespaces can't be connected here")
        yield HOSTS
    finally:
        for host in HOSTS:
            ip(f"netns del {host}")


def launch(hosts: list[str], script: str, flags: str) -> None:
    """Start a script on all hosts, as the recipes do, and wait for it."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    running = []
    for rank, host in enumerate(hosts):
        sizes = f"--num_processes {len(hosts)} --num_machines {len(hosts)} --machine_rank {rank} --multi_gpu"
        to = f"--config_file {ROOT}/scripts/accelerate.yaml --main_process_ip 10.77.0.1 --main_process_port 29500"
        command = f"ip netns exec {host} accelerate launch {sizes} {to} {ROOT}/{script} {flags}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command.split(), env=environment, **pipes))
    try:
        said = [process.communicate(timeout=200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(hosts), "\n".join(said)


@pytest.mark.slow
def test_two_machines_give_what_one_process_gives(machines, tiny, workspace, cli):
    """Gradients, Hessian and scores of two machines are those of one process; gloo finds the way between them."""
    flags = f"--model_name {tiny}/llama --data_name docs.jsonl --rank 4 --shard_examples 3 --hessian ekfac --log_dir"
    scored = [f"{flags} log{n} --split queries.jsonl --mode cosine" for n in (1, 2)]
    assert cli("extract_log", *f"{flags} log1".split())[0] == cli("compute_influence", *scored[0].split())[0] == 0
    launch(machines, "extract_log.py", f"{flags} log2")
    launch(machines, "compute_influence.py", scored[1])
    one, two = (stored_gradients(RunDir.load(workspace / f"log{n}")) for n in (1, 2))
    assert all((one[layer] - two[layer]).norm() < 1e-5 * one[layer].norm() for layer in one)
    one, two = (np.load(next(workspace.glob(f"log{n}/scores/*/scores.npy"))) for n in (1, 2))
    assert one.shape[1] == 20 and np.abs(one - two).max() < 1e-4 * np.abs(one).max()
