"""Before the long step: a check on the user's own model (--verify)."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import save_model
from helpers import DATA

from logra import hessian
from logra.hooks import GradientCapture


def test_verify_passes_on_every_architecture(cli, tiny, workspace, model_name):
    """Gradients, factor sums, Hessians and scores are those of plain autograd; layers left out are named."""
    flags = ("--model_name", tiny / model_name, *DATA, "--verify", 3, "--mlp_only")
    status, out, err = cli("extract_log", *flags)
    assert status == 0, err
    assert out.count("  pass  ") == 6 and "FAIL" not in out and re.search(r"lm_head|embed_out", out)
    assert not Path("logs").exists()


def test_verify_copies_no_model(cli, tiny, workspace, monkeypatch):
    """The reference is loaded anew, on the CPU: the device never holds the model twice. Also with a device_map."""

    def refuse(*_):
        raise AssertionError("a copy lies where the model lies")

    monkeypatch.setattr(torch.nn.Module, "__deepcopy__", refuse, raising=False)
    for flags in ((), ("--device_map", "auto")):
        status, out, err = cli("extract_log", "--model_name", tiny / "llama", *DATA, "--verify", 2, *flags)
        assert status == 0 and "FAIL" not in out, err


def test_verify_takes_texts_of_very_different_lengths(cli, workspace, monkeypatch):
    """Together and alone, one beyond each boundary that the config names. Batches across a boundary are found."""
    save_model(workspace / "phi", "longrope")
    flags = ("--model_name", "phi", *DATA, "--verify", 2, "--max_examples", 2)
    status, out, err = cli("extract_log", *flags)
    assert status == 0 and "together against alone" in out, err
    monkeypatch.setattr("logra.stages.gradients.rope_boundaries", lambda config: [])
    status, out, err = cli("extract_log", *flags)
    assert status == 2 and re.search("FAIL.*together against alone", out), out


def test_verify_counts_the_response_alone(cli, tiny, workspace):
    """With --train_loss response the plain loop counts the same tokens."""
    rows = [json.dumps({"prompt": "the old mill", "response": f" ran past {w}"}) for w in ("birds", "cold water")]
    Path("pairs.jsonl").write_text("\n".join(rows))
    flags = ("--model_name", tiny / "llama", "--data_name", "pairs.jsonl", "--train_loss", "response", "--verify")
    status, out, err = cli("extract_log", *flags)
    assert status == 0 and "2 examples" in out, err


@pytest.mark.parametrize("broken", ["gradients", "factors", "Hessian"])
def test_verify_fails_where_something_is_wrong(cli, tiny, workspace, monkeypatch, broken):
    """A wrong gradient, factor sum or Hessian is found, named, and the exit status is 2."""
    if broken == "gradients":
        monkeypatch.setattr(GradientCapture, "_reduce", lambda self, name, x, d: 1.01 * torch.bmm(d.mT, x).flatten(1))
    elif broken == "factors":
        take = GradientCapture.take_factors

        def wrong(self):
            return {key: 1.01 * value if key.endswith(".A") else value for key, value in take(self).items()}

        monkeypatch.setattr(GradientCapture, "take_factors", wrong)
    else:
        monkeypatch.setattr(hessian, "damping_lambda", lambda trace, k, damping, absolute: 2 * damping * trace / k)
    status, out, err = cli("extract_log", "--model_name", tiny / "llama", *DATA, "--verify")
    assert status == 2 and "FAIL" in out and "leave these layers out" in err and len(err.splitlines()) == 1
