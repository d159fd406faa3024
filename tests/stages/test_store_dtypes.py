"""Runs that store few bits, half precision or nothing: scores, bytes, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, close, extract, influence, stored_gradients

from logra import quantise
from logra.runtime.settings import MODES


def test_a_bfloat16_model(cli, tiny, workspace):
    """--dtype bfloat16 through stages 2 and 3, which reads it from run.json: scores near float32's."""
    extract(cli, tiny / "llama", "--rank", 4)
    expected, _ = influence(cli)
    log = extract(cli, tiny / "llama", "--rank", 4, "--overwrite", "--dtype", "bfloat16")
    got, _ = influence(cli)
    assert log.settings.dtype == "bfloat16"
    assert 0 < np.linalg.norm(got - expected) < 0.3 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_store_dtypes(cli, tiny, workspace, dtype):
    """Half-precision stores: scores within 2% of float32's."""
    extract(cli, tiny / "llama", "--rank", 4, "--hessian", "ekfac")
    expected, _ = influence(cli)
    extract(cli, tiny / "llama", "--rank", 4, "--hessian", "ekfac", "--overwrite", "--store_dtype", dtype)
    got, _ = influence(cli)
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_few_bits_through_the_stages(cli, tiny, workspace, name):
    """int8 scores are within 3% of float32's, int4's within 30%, int1's go the same way; the bytes are as promised."""
    flags = ("--rank", 8, "--hessian", "ekfac")
    extract(cli, tiny / name, *flags)
    exact, _ = influence(cli, "--damping", 0.1)
    for store_dtype, limit in (("int8", 0.03), ("int4", 0.3), ("int1", 0.9)):
        log = extract(cli, tiny / name, *flags, "--overwrite", "--store_dtype", store_dtype)
        got, _ = influence(cli, "--damping", 0.1)
        assert np.linalg.norm(got - exact) < limit * np.linalg.norm(exact)
        assert np.corrcoef(got.ravel(), exact.ravel())[0, 1] > 0.75
        size = log.parts[0].bytes_per_example
        assert size == sum(quantise.stored_bytes(o * i, store_dtype) for o, i in log.projected.values())
        manifest = json.loads(log.shard(0).path("manifest").read_text())
        assert 0 < manifest["relative_score_error"] < min(1, 10 * limit)
        for mode in ("cosine", "l2"):
            assert np.isfinite(influence(cli, "--mode", mode)[0]).all()


@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
@pytest.mark.parametrize("lora", [("--rank", 6), ("--lora", "none")])
def test_a_run_that_stores_nothing_scores_as_one_that_does(cli, tiny, workspace, name, lora):
    """--store_dtype none runs the model again: the same scores, with a projection and without, also from factors."""
    flags = (*lora, "--hessian", "ekfac", "--mlp_only", "--overwrite")
    extract(cli, tiny / name, *flags)
    expected = {mode: influence(cli, "--mode", mode)[0] for mode in MODES}
    log = extract(cli, tiny / name, *flags, "--store_dtype", "none")
    assert log.parts[0].bytes_per_example == 4 * len(log.layers)
    for mode, stored in expected.items():
        shutil.rmtree("log/self_influence", ignore_errors=True)  # each mode computes its own
        assert close(influence(cli, "--mode", mode)[0], stored), mode
        assert close(influence(cli, "--mode", mode, "--query_rank", 64)[0], stored), mode
        few = influence(cli, "--mode", mode, "--query_rank", 1)[0]
        assert not close(few, stored) and np.corrcoef(few.ravel(), stored.ravel())[0, 1] > 0.3, mode


def test_a_rank_as_wide_as_the_layers_is_no_projection(cli, tiny, workspace):
    """With P the identity, compressed and uncompressed EK-FAC agree, also in one bit."""
    for store_dtype in ("float32", "int1"):
        flags = ("--hessian", "ekfac", "--mlp_only", "--overwrite", "--store_dtype", store_dtype)
        extract(cli, tiny / "llama", "--rank", 64, *flags)
        projected = influence(cli)[0]
        extract(cli, tiny / "llama", "--lora", "none", *flags)
        assert close(influence(cli)[0], projected)


def test_bytes_per_example_chooses_the_highest_rank(cli, tiny, workspace):
    """--bytes_per_example N: no more than N bytes, and one rank higher would be more."""
    for store_dtype, hessian in (("float32", "raw"), ("int1", "ekfac")):
        flags = ("--bytes_per_example", 900, "--store_dtype", store_dtype, "--hessian", hessian, "--overwrite")
        log = extract(cli, tiny / "gpt2", *flags)
        rank = max(max(pair) for pair in log.projected.values())
        assert log.parts[0].bytes_per_example <= 900
        more = [tuple(min(rank + 1, width) for width in shape) for shape in log.shapes.values()]
        assert sum(quantise.stored_bytes(o * i, store_dtype) for o, i in more) > 900
    status, _, err = cli("extract_log", "--model_name", tiny / "gpt2", *DATA, "--overwrite", "--bytes_per_example", 3)
    assert status == 2 and "expected --bytes_per_example of at least" in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--store_dtype", "int1"), "expected --hessian ekfac"),
        (("--store_dtype", "none", "--hessian", "raw"), "expected --hessian ekfac"),
        (("--store_dtype", "int4", "--hessian", "ekfac", "--basis", "projected"), "expected --basis eigen"),
        (("--store_dtype", "none", "--hessian", "ekfac", "--basis", "projected"), "expected --basis eigen"),
        (("--lora", "none", "--bytes_per_example", 100), "expected --bytes_per_example with a projection"),
        (("--rank", 4, "--bytes_per_example", 100), "expected no rank"),
    ],
)
def test_what_can_not_be_computed_is_refused(cli, tiny, workspace, flags, told):
    """Each refusal is one line with the reason, before anything is written."""
    status, _, err = cli("extract_log", "--model_name", tiny / "gpt2", *DATA, *flags)
    assert status == 2 and told in err and len(err.splitlines()) == 1
    assert not Path("log/run.json").exists()


def test_kfac_of_a_run_without_factors_is_refused(cli, tiny, workspace):
    """--lora none with ekfac keeps no A and B, and says so when kfac is asked for; begun with kfac it has them."""
    extract(cli, tiny / "gpt2", "--lora", "none", "--hessian", "ekfac", "--mlp_only", "--max_examples", 8)
    status, _, err = cli("extract_log", "--model_name", tiny / "gpt2", "--log_dir", "log", "--hessian", "kfac")
    assert status == 2 and "expected --hessian ekfac, got kfac" in err
    log = extract(
        cli, tiny / "gpt2", "--lora", "none", "--hessian", "kfac", "--mlp_only", "--max_examples", 8, "--overwrite"
    )
    assert stored_gradients(log) and influence(cli)[0].any()
