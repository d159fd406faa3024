"""The benchmarks run, on tiny sizes, and end with one line of JSON; their documented commands parse."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS, ROOT, make_model, run_cli
from helpers import check, draw_projections, random_ids, shown_commands
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import llama3_8b_gpu, plan
from logra.hooks import GradientCapture
from logra.stages.gradients import Extractor

TINY = {
    "extraction": "--block_size 16 32 --batch_size 2 --rank 4 --repeats 1",
    "scoring": "--examples 40 --layers 2 --rank 4 --queries 1 10 --shard_mb 1 --repeats 1",
    "hessian": "--examples 40 --layers 1 --rank 4 --shard_examples 7 --repeats 1",
    "llama3_8b_gpu": "--tiny --examples 20 --repeats 1 --block_size 32",
    "scaling": "--point 4 16 4",
    "plan": "--share 0.5",
}


@pytest.mark.parametrize("name", TINY)
def test_benchmark(name, tiny, monkeypatch, capsys):
    """Tiny sizes, in this process."""
    monkeypatch.chdir(ROOT)
    model = ["--model_name", tiny / "llama"] if name in ("extraction", "scaling") else []
    assert run_cli(f"benchmarks.{name}", *TINY[name].split(), *model) == 0
    assert isinstance(json.loads(capsys.readouterr().out.strip().splitlines()[-1]), dict)


def test_commands():
    """Those of benchmarks/README.md and of the docstrings."""
    table = (ROOT / "benchmarks/README.md").read_text()
    commands = [part for part in table.split("`") if part.startswith("python benchmarks/")]
    names = (*TINY, "peers", "kronfluence_compare", "soak", "kills", "bit_flips", "compare_commits", "gpu_record")
    commands += [
        line.strip()
        for name in names
        for line in importlib.import_module(f"benchmarks.{name}").__doc__.splitlines()
        if line.strip().startswith("python ")
    ]
    assert {check(command) for command in commands} == {f"benchmarks/{name}.py" for name in names}
    assert not shown_commands(ROOT / "benchmarks/README.md"), "they stand in the table"


@pytest.mark.parametrize("rank", [4, 30])
def test_flops_of_the_plan_are_those_that_torch_counts(rank):
    """In a tiny Llama, with projections on all sides and on some. Attention is counted without its causal half."""
    model, (length, count) = make_model("llama"), (16, 3)
    model.set_attn_implementation("eager")
    _, projections = draw_projections(model, rank, rank, "mlp")
    parts, others = (plan.flops_per_token(CONFIGS["llama"], tokens, rank) for tokens in (length, 0))
    total, attention = sum(parts.values()), sum(parts.values()) - sum(others.values())
    with GradientCapture(model, projections, factors=True) as capture, FlopCounterMode(display=False) as counter:
        Extractor(model, capture, 10**6).gradients(random_ids([length] * count)).wait()
    expected = length * (total + attention) - 2 * parts["head, forward: logits"]  # the last token has no loss
    assert counter.get_total_flops() == count * expected


def test_shares_of_the_profilers_time():
    """Kernels that overlap count once, a copy counts where no kernel runs, and the rest of the pass is gaps."""
    spans = [("kernel", 0, 40), ("kernel", 30, 20), ("gpu_memcpy", 45, 15), ("gpu_memset", 80, 5), ("cpu_op", 0, 100)]
    events = [{"cat": cat, "name": cat, "ts": ts, "dur": dur} for cat, ts, dur in spans]
    events += [{"cat": "user_annotation", "name": "ours", "ts": 0, "dur": 100}, {"name": "a thread's name", "ph": "M"}]
    shares = llama3_8b_gpu.shares_of_time(events)
    assert shares == {"kernels": 0.5, "copies beside no kernel": 0.15, "gaps": 0.35, "all copies": 0.2}
    assert llama3_8b_gpu.profiled(lambda: None)["gaps"] == 1


STAND_IN = """\
#!/bin/sh
case "$*" in
    *get_device_name*) echo "$FOUND" ;;
    *"-m pytest"*) echo "25 passed, 3 skipped" ;;
    *extraction*) echo "a table"; echo "no memory" >&2; exit 3 ;;
    *gpu_record*) exec {python} "$@" ;;
    *) echo "a table"; echo '{{"benchmark": "one"}}' ;;
esac
"""


def run_gpu_check(folder: Path, card: str) -> subprocess.CompletedProcess:
    """Run scripts/gpu_check.sh with a program in the place of python, which takes no time; one of its steps fails."""
    (folder / "bin").mkdir()
    (folder / "bin/python").write_text(STAND_IN.format(python=sys.executable))
    (folder / "bin/python").chmod(0o755)
    environment = os.environ | {"PYTHON": str(folder / "bin/python"), "FOUND": card, "RECORDS": str(folder / "records")}
    command = ["bash", ROOT / "scripts/gpu_check.sh"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_gpu_check_records_a_step_that_fails(tmp_path):
    """The other steps run, all are in the record, and the exit status is not 0."""
    done = run_gpu_check(tmp_path, "NVIDIA H100 80GB HBM3")
    assert done.returncode == 2 and "expected all steps to succeed, got failures of smollm2" in done.stderr
    assert "FAILED with status 3" in done.stdout and "no memory" in done.stdout and done.stdout.count("  ok, ") == 4
    (path,) = (tmp_path / "records").iterdir()
    record = json.loads(path.read_text())
    assert path.name == f"gpu_h100-80gb-hbm3_{record['date']}.json" and record["failed"] == ["smollm2"]
    steps = record["steps"]
    assert steps["tests"]["result"] == "25 passed, 3 skipped" and "-m gpu" in steps["tests"]["command"]
    assert steps["llama3_8b"]["result"] == {"benchmark": "one"} and steps["smollm2"]["err"] == "no memory\n"


def test_gpu_check_without_a_gpu(tmp_path):
    """It says so in one line, and succeeds."""
    done = run_gpu_check(tmp_path, "")
    assert done.returncode == 0 and done.stdout == "expected a GPU, got none; nothing was checked\n"
    assert not done.stderr and not (tmp_path / "records").exists()


def test_gpu_check_takes_less_than_eight_minutes():
    """The steps' limits, with half a minute for all else."""
    limits = re.findall(r"^step \w+ (\d+) ", (ROOT / "scripts/gpu_check.sh").read_text(), re.MULTILINE)
    assert len(limits) == 5 and sum(map(int, limits)) + 30 <= 480
