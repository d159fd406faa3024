"""The benchmarks run, on tiny sizes, and end with one line of JSON; their documented commands parse."""

import importlib
import json

import pytest
from conftest import ROOT, run_cli
from helpers import check, shown_commands

TINY = {
    "extraction": "--block_size 16 32 --batch_size 2 --rank 4 --repeats 1",
    "scoring": "--examples 40 --layers 2 --rank 4 --queries 1 10 --shard_mb 1 --repeats 1",
    "hessian": "--examples 40 --layers 1 --rank 4 --shard_examples 7 --repeats 1",
    "llama3_8b_gpu": "--tiny --examples 20 --repeats 1 --block_size 32",
    "scaling": "--point 4 16 4",
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
    names = (*TINY, "peers", "kronfluence_compare", "soak", "kills", "bit_flips", "compare_commits")
    commands += [
        line.strip()
        for name in names
        for line in importlib.import_module(f"benchmarks.{name}").__doc__.splitlines()
        if line.strip().startswith("python ")
    ]
    assert {check(command) for command in commands} == {f"benchmarks/{name}.py" for name in names}
    assert not shown_commands(ROOT / "benchmarks/README.md"), "they stand in the table"
