"""Before the long step: a check of the flags on the user's own model (--verify). Its faults are in verify_faults.py."""

import gc
import json
import re
from pathlib import Path

import pytest
import torch
import verify_faults
from conftest import ROOT, save_model
from helpers import DATA, launch, one_model_at_a_time, refused
from transformers.models.llama.modeling_llama import LlamaMLP

from logra.tools.verify_reference import random_errors

FLAGS = [
    "", "--preset best --rerank_rank none", "--preset paper --rerank_rank 6",
    "--hessian kfac", "--hessian none", "--hessian ekfac --basis projected",
    "--store_dtype bfloat16", "--store_dtype float16", "--store_dtype int8 --hessian ekfac",
    "--store_dtype int4 --hessian kfac", "--store_dtype none --hessian ekfac", "--lora pca", "--lora none --layers mlp",
    "--pack", "--train_loss response --data_name pairs.jsonl", "--dtype bfloat16 --preset best",
    "--dtype bfloat16 --lora none --store_dtype none --hessian ekfac --layers mlp",
]  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """The folder of planted faults. Without the objects of all other tests, garbage is collected faster."""
    folder = tmp_path_factory.mktemp("faults")
    verify_faults.prepare(folder)
    gc.freeze()
    yield folder
    gc.unfreeze()


@pytest.mark.parametrize("name", verify_faults.FAULTS)
def test_a_planted_fault_is_found(planted, name):
    """--verify ends with status 2, and the lines that fail are those of docs/limits.md."""
    status, row = verify_faults.found(name, planted)
    assert status == 2 and f"\n{row}\n" in (ROOT / "docs/limits.md").read_text("utf-8"), row


def test_the_page_has_all_faults():
    """And no others. Each row names a line of --verify."""
    rows = re.findall(r"^\| (.+?) \| .*\| (.+?) \|$", (ROOT / "docs/limits.md").read_text("utf-8"), re.MULTILINE)
    named = [fault for fault, _ in rows if fault in verify_faults.FAULTS]
    assert named == [*verify_faults.FAULTS] and len(named) >= 27


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "llama_tied", "longrope", "xglm", "mixtral"])
def test_verify_passes_without_a_fault(cli, workspace, monkeypatch, name):
    """With the presets on every architecture, and with all kinds of flags on one. Nothing is left behind.

    Nor do stage 3's own checks find any, of many scores.
    """
    monkeypatch.setattr(verify_faults.self_check, "PAIRS", 10)
    save_model(workspace / "m", name)
    rows = [{"prompt": "the old mill", "response": f" ran past {w}"} for w in ("birds", "cold water", "a dog")]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for flags in FLAGS if name == "gpt2" else FLAGS[:3]:
        status, out, err = cli("extract_log", "--model_name", "m", *DATA, "--verify", *flags.split())
        assert status == 0 and "FAIL" not in out, (flags, out, err)
        lines = ["tracked layers", "train gradients", "query gradients", "factor sums", "stored values", "scores"]
        lines += ["re-ranked scores"] if "rerank" in flags else []
        assert all(f"  pass  {line}: " in out for line in lines) and "reference in float64" in out, out
    assert {path.name for path in workspace.iterdir()} == {"m", "docs.jsonl", "pairs.jsonl", "queries.jsonl"}


@pytest.mark.parametrize("flags", ["--verify 2", "--preset best", "--store_dtype none --hessian ekfac"])
def test_verify_passes_with_checkpoints(cli, planted, workspace, monkeypatch, flags):
    """Each one's scores, and the combined ones. One model is in memory at a time, and nothing is left behind."""
    one_model_at_a_time(monkeypatch)
    checkpoints = [planted / name for name in ("step-1", "step-2", "llama")]
    status, out, err = cli("extract_log", "--checkpoints", *checkpoints, *DATA, "--verify", *flags.split())
    assert status == 0 and "FAIL" not in out, err
    assert [f"checkpoint {i} of 3: {path}" in out for i, path in enumerate(checkpoints, 1)] == 3 * [True]
    assert "pass  scores of the other checkpoints: 8 compared" in out
    count = 2 * (2 * 3 + 2) if "none --hessian ekfac" in flags else 2 * 3 + 2 + 4 * 3 + 2
    assert f"pass  combined scores: {count} compared" in out
    assert {path.name for path in workspace.iterdir()} == {"docs.jsonl", "queries.jsonl"}


def test_verify_of_one_example_with_checkpoints(cli, planted, workspace):
    """It has no standard deviation, so nothing could fail."""
    flags = ("--checkpoints", planted / "step-1", planted / "step-2", *DATA, "--verify", 1)
    refused(cli("extract_log", *flags), "at least 2 train examples", "use --verify 2")


def test_two_processes_verify_checkpoints(planted, workspace):
    """Each of them scores and combines its shards."""
    flags = f"--checkpoints {planted}/step-1 {planted}/step-2 --data_name docs.jsonl --log_dir log --verify"
    done = launch(2, workspace, flags)
    assert done.returncode == 0 and "FAIL" not in done.stdout, done.stderr
    assert "pass  combined scores: 22 compared" in done.stdout


@pytest.mark.parametrize("width", [4, 12, 40])
def test_equal_projections_are_told_from_independent_ones(width):
    """Also where there are many. Of few columns P^T P is alike by chance, so nothing is said."""
    torch.manual_seed(0)
    sides = {str(i): (torch.randn(2, width) / 2**0.5, None) for i in range(100)}
    shared = random_errors(sides, False)[1]
    assert len(shared) == (0 if width < 12 else 100) and all(error < 0.9 for error in shared.values())
    shared = random_errors(sides | {"same": sides["7"]}, False)[1]
    assert [name for name, error in shared.items() if error > 0.9] == ([] if width < 12 else ["7.in", "same.in"])


def test_both_solvers_of_raw_run(cli, tiny, workspace, monkeypatch):
    """Where N < k, and where N >= k. Ranks are reduced so that each C can be solved."""
    built = set()
    for name in ("DensePreconditioner", "DualPreconditioner"):
        original = getattr(verify_faults.hessian, name)
        monkeypatch.setattr(verify_faults.hessian, name, lambda *a, f=original: (built.add(f.__name__), f(*a))[1])
    assert cli("extract_log", "--model_name", tiny / "gpt2", *DATA, "--verify")[0] == 0
    assert built == {"DensePreconditioner", "DualPreconditioner"}


def test_a_model_that_computes_a_part_in_float32(cli, tiny, workspace, monkeypatch):
    """It can't run in float64, so the reference is in float32."""
    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: original(self, x.float()))
    status, out, err = cli("extract_log", "--model_name", tiny / "llama", *DATA, "--verify", 2)
    assert status == 0 and "reference in float32" in out and "FAIL" not in out, err


def test_verify_copies_no_model(cli, tiny, workspace, monkeypatch):
    """The reference is loaded anew, on the CPU: the device never holds the model twice. Also with a device_map."""

    def refuse(*_):
        raise AssertionError("a copy lies where the model lies")

    monkeypatch.setattr(torch.nn.Module, "__deepcopy__", refuse, raising=False)
    for flags in ((), ("--device_map", "auto")):
        status, out, err = cli("extract_log", "--model_name", tiny / "llama", *DATA, "--verify", 2, *flags)
        assert status == 0 and "FAIL" not in out, err


def test_a_failure_is_one_line(cli, tiny, workspace, monkeypatch):
    """It names what failed."""
    verify_faults.FAULTS["the sign of the scores"][1](monkeypatch)
    monkeypatch.setattr(verify_faults.self_check, "PAIRS", 0)
    status, out, err = cli("extract_log", "--model_name", tiny / "llama", *DATA, "--verify")
    assert status == 2 and "got FAIL in 2 (scores, steps of the model)" in err and len(err.splitlines()) == 1
