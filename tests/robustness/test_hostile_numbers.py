"""Hostile numbers: a score that is written is finite and right, or a stage says in one line why there is none."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_cli, write_jsonl
from helpers import refused
from transformers import AutoModelForCausalLM

from logra import hessian, influence
from logra.loss import example_losses
from logra.runtime.settings import MODES
from logra.stages.batches import make_batch

KINDS = ("raw", "kfac", "ekfac", "none")


def edited(source: Path, edit) -> str:
    """Return a copy of a model folder whose weights edit(model) has changed."""
    shutil.copytree(source, "model")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        edit(model)
    model.save_pretrained("model")
    return "model"


def scale_head(factor: float):
    """Return an edit that multiplies logits and gradients."""
    return lambda model: model.lm_head.weight.mul_(factor)


def flags(model, *more) -> tuple:
    """Return the flags of a small run."""
    return ("--model_name", model, "--data_name", "docs.jsonl", "--log_dir", "log", "--rank", 4, *more)


def scored(cli, kind: str, *more, mode: str = "cosine") -> np.ndarray:
    """Run stages 3 and 4, which end well, and return the scores, which are finite."""
    query = ("--log_dir", "log", "--split", "queries.jsonl", "--hessian", kind, "--mode", mode)
    for script, *stage in (("compute_influence", *query, *more), ("analysis", "--log_dir", "log", "--diagnose")):
        status, _, err = cli(script, *stage)
        assert status == 0, err
    newest = max(Path("log").glob("scores/*/scores.npy"), key=lambda path: path.stat().st_mtime_ns)
    scores = np.load(newest)
    assert np.isfinite(scores).all()
    return scores


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_beyond_float16(cli, tiny, workspace, dtype):
    """Above 65504 they are refused by example and layer, and no shard of them is written; in float32 they are fine."""
    model = edited(tiny / "llama", scale_head(1e3))
    refused(
        cli("extract_log", *flags(model, "--dtype", dtype, "--store_dtype", "float16")), "infinity", "example", "layer"
    )
    assert not list(Path("log/gradients").glob("*.json"))
    shutil.rmtree("log")
    assert cli("extract_log", *flags(model, "--dtype", dtype))[0] == 0
    assert scored(cli, "raw").any()


def test_logits_beyond_float16(cli, tiny, workspace):
    """A model that overflows in float16 is refused in stages 1 and 2, and not called an unknown architecture."""
    model = edited(tiny / "llama", scale_head(1e6))
    refused(cli("extract_log", *flags(model, "--dtype", "float16")), "finite logits", "--dtype float32")
    Path("p.txt").write_text("the river\n")
    prompts = ("--prompts", "p.txt", "--max_new_tokens", 2, "--output", "o.jsonl")
    refused(cli("generate", "--model_name", model, "--dtype", "float16", *prompts), "finite logits")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("store_dtype", ["float32", "int1", "none"])
def test_weights_that_are_no_numbers(cli, tiny, workspace, value, store_dtype):
    """Refused before anything is extracted."""
    model = edited(tiny / "llama", lambda m: m.model.layers[0].mlp.up_proj.weight[0].fill_(value))
    more = ("--store_dtype", store_dtype, "--hessian", "ekfac")
    refused(cli("extract_log", *flags(model, *more)), "finite logits", "weights")
    assert not Path("log").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees(cli, tiny, workspace, dtype):
    """Scores of a model and gradients in 16 bits are those of float32, to the precision of the forward pass."""
    found = {}
    for name in ("float32", dtype):
        assert cli("extract_log", *flags(tiny / "llama", "--dtype", name, "--store_dtype", name, "--overwrite"))[0] == 0
        found[name] = scored(cli, "none").ravel()
    assert np.corrcoef(found["float32"], found[dtype])[0, 1] > 0.99


def certain(model) -> None:
    """Make GPT-2 sure that every next token is token 7, whatever it read."""
    model.transformer.ln_f.weight.zero_()
    model.transformer.ln_f.bias.copy_(1e4 * model.lm_head.weight[7])


def test_a_loss_of_zero(cli, tiny, workspace):
    """A model that is sure, and right: loss and gradients are exactly 0, and so are the scores."""
    model = AutoModelForCausalLM.from_pretrained(edited(tiny / "gpt2", certain))
    batch = make_batch([[7, 7, 7, 7]])
    assert example_losses(model, batch.input_ids, batch.targets, batch.rows).item() == 0
    for kind in KINDS:
        assert cli("extract_log", *flags("model", "--hessian", kind))[0] == 0
        assert not scored(cli, kind).any() and not scored(cli, kind, mode="l2").any()


@pytest.mark.parametrize(
    ("kind", "store_dtype"),
    [("raw", "float32"), ("kfac", "float32"), ("ekfac", "int1"), ("ekfac", "none"), ("none", "int8")],
)
def test_a_layer_without_gradients(cli, tiny, workspace, kind, store_dtype):
    """It adds 0: the scores are those of the other layers alone."""

    def edit(model) -> None:  # nothing passes through layer 0's MLP, so up_proj and gate_proj get no gradient
        model.model.layers[0].mlp.down_proj.weight.zero_()

    assert (
        cli("extract_log", *flags(edited(tiny / "llama", edit), "--hessian", kind, "--store_dtype", store_dtype))[0]
        == 0
    )
    alone = scored(cli, kind, "--score_layers", r"layers\.1|self_attn|down_proj")
    assert alone.any() and np.array_equal(scored(cli, kind), alone)


@pytest.fixture(scope="module")
def twice(tiny, tmp_path_factory) -> Path:
    """A run of two equal documents: every C has rank 1 of 16, so it is singular, with fewer examples than k."""
    folder = tmp_path_factory.mktemp("twice")
    write_jsonl(folder / "docs.jsonl", [{"text": "the river"}, {"text": "the river"}])
    write_jsonl(folder / "queries.jsonl", [{"text": "the river ran"}, {"text": "the old mill and the dog"}])
    for kind in KINDS:
        named = ("--model_name", tiny / "llama", "--data_name", folder / "docs.jsonl", "--rank", 4, "--hessian", kind)
        assert run_cli("extract_log", *named, "--log_dir", folder / kind) == 0
    return folder


@pytest.mark.parametrize("kind", ["raw", "kfac", "ekfac"])
def test_a_singular_covariance(cli, twice, kind):
    """With any usual damping the scores of equal documents are equal; with a hopeless one there are none."""
    query = ("--log_dir", twice / kind, "--split", twice / "queries.jsonl", "--mode", "cosine")
    assert cli("compute_influence", *query, "--damping", 1e-6, 0.1, 1e30)[0] == 0
    for path in (twice / kind).glob("scores/*/scores.npy"):
        scores = np.load(path)
        assert np.isfinite(scores).all() and scores.any()
        assert np.abs(scores[:, 0] - scores[:, 1]).max() <= 1e-3 * np.abs(scores).max()
    before = set((twice / kind).glob("scores/*"))
    for flag in ("--damping", "--damping_absolute"):
        refused(cli("compute_influence", *query, flag, "1e-300"), "damping")
        refused(cli("compute_influence", *query, flag, "1e300"), "damping", "lambda")
    assert set((twice / kind).glob("scores/*")) == before


@pytest.mark.parametrize("value", ["0", "-0.0", "-1", "nan", "inf", "-inf", "1e-400", "1e400", "", "0,1"])
def test_dampings_that_are_none(cli, twice, value):
    """Zero, negative, not finite, or no number: refused as an argument, for every kind."""
    query = ("compute_influence", "--log_dir", twice / "kfac", "--split", twice / "queries.jsonl")
    for flag in ("--damping", "--damping_absolute"):
        refused(cli(*query, f"{flag}={value}"), flag, "positive")


def test_a_covariance_beyond_float32(cli, tiny, workspace):
    """Gradients of 1e19 are stored, but their squares are no numbers: each kind says so, and writes no scores."""
    model = edited(tiny / "llama", scale_head(1e18))
    assert cli("extract_log", *flags(model))[0] == 0
    for kind, word in (("raw", "lambda"), ("none", "finite scores")):
        query = ("--log_dir", "log", "--split", "queries.jsonl", "--hessian", kind, "--mode", "cosine")
        refused(cli("compute_influence", *query), word)
    refused(cli("extract_log", *flags(model, "--hessian", "ekfac", "--overwrite")), "infinity", "examples")
    assert not list(Path("log").glob("scores/*"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_finished_is_finite(bad):
    """No mode hides a NaN or an infinity, in the dots or in the self-influence; large numbers are not mistaken."""
    dots, own = torch.full((2, 3), 3e38), torch.ones(3)
    assert (
        influence.scores_of_mode(dots, None, "dot").isfinite().all()
        and influence.scores_of_mode(dots, own, "cosine").isfinite().all()
    )
    for mode in MODES:
        broken = dots.clone()
        broken[1, 1] = bad
        with pytest.raises(ValueError, match="finite scores"):
            influence.scores_of_mode(broken, own, mode)
        with pytest.raises(ValueError, match="finite scores"):
            influence.scores_of_mode(dots, own.where(torch.arange(3) != 1, bad), mode)


@pytest.mark.parametrize(("trace", "damping"), [(1.0, 1e300), (float("inf"), 0.1), (float("nan"), 0.1)])
def test_a_lambda_beyond_float32(trace, damping):
    """From the damping or from the covariance."""
    with pytest.raises(ValueError, match="lambda"):
        hessian.damping_lambda(trace, 16, damping, None)
