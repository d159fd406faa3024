"""Gradients in few bits, and runs that store none: round trips, scores, refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import DATA, close, extract, influence, stored_gradients

from logra import quantise, store
from logra.influence import score_shards

BITS = {"int8": 8, "int4": 4, "int1": 1}


def random_rows(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Return rows with a few large coordinates, and one row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator) * torch.rand(k, generator=generator) ** 3
    rows[n // 2] = 0
    return rows


@pytest.mark.parametrize("k", [64, 100, 1, 4096])
@pytest.mark.parametrize("name", BITS)
def test_rounding_is_to_the_nearest_level(name, k):
    """What is stored is, bit by bit, the nearest level of each coordinate; a row of zeros stays zero."""
    z, bits = random_rows(21, k), BITS[name]
    packed, scale = quantise.pack(z, bits)
    assert packed.shape == (21, quantise.packed_bytes(k, bits)) and packed.dtype == torch.uint8
    assert quantise.stored_bytes(k, name) == packed.shape[1] + 4
    unpacked = quantise.unpack(packed, scale, bits, k)
    assert not unpacked[10].any()
    if bits == 1:
        expected = torch.where(z > 0, 1, -1) * z.abs().mean(dim=1, keepdim=True)
    else:
        top = 2 ** (bits - 1) - 1
        step = quantise.STEPS_IN_RMS[bits] * z.square().mean(dim=1).sqrt()
        expected = (z / step.clamp_min(1e-30)[:, None]).round().clamp(-top, top) * step[:, None]
    torch.testing.assert_close(unpacked, expected.float(), rtol=1e-5, atol=1e-7)
    whole = [
        int(f"{byte:08b}"[::-1][i * bits : (i + 1) * bits][::-1], 2) for byte in packed[0] for i in range(8 // bits)
    ]
    levels = [(2 * w - 1 if bits == 1 else w - 2 ** (bits - 1)) * scale[0].item() for w in whole[:k]]
    np.testing.assert_allclose(unpacked[0].numpy(), levels, rtol=1e-6)


@pytest.mark.parametrize("name", BITS)
def test_rounding_twice_changes_nothing(name):
    """Unpacked signs are packed into the same bytes; int4's and int8's levels stay, where nothing was cut off."""
    bits = BITS[name]
    z = random_rows(9, 128) if bits == 1 else torch.rand(9, 128).sign() * torch.rand(9, 128)
    packed, scale = quantise.pack(z, bits)
    unpacked = quantise.unpack(packed, scale, bits, 128)
    again, scale2 = quantise.pack(unpacked, bits)
    if bits == 1:
        assert torch.equal(packed, again)
        torch.testing.assert_close(scale, scale2)
    else:
        difference = quantise.unpack(again, scale2, bits, 128) - unpacked
        assert difference.norm() < (0.1 if bits == 4 else 0.01) * unpacked.norm()


@pytest.mark.parametrize("k", [64, 100, 1024])
def test_counted_bits_are_the_product_with_the_rounded_queries(k):
    """AND and counting gives the integer product exactly, and the float product within the queries' rounding."""
    z, q = random_rows(37, k), random_rows(5, k, seed=1) + 1e-3
    packed, scale = quantise.pack(z, 1)
    queries = quantise.BitQueries(q)
    got, rows = queries.score(packed, scale).double(), quantise.unpack(packed, scale, 1, k).double()
    rounded = torch.stack(
        [(row / step).round().clamp(-128, 127) * step for row, step in zip(q, queries.step, strict=True)]
    )
    torch.testing.assert_close(got, rows @ rounded.double().T, rtol=1e-5, atol=1e-6)
    assert (got - rows @ q.double().T).norm() < 0.05 * (rows @ q.double().T).norm()


@pytest.mark.parametrize("count", [1, 10, quantise.MAX_BIT_COUNT_QUERIES + 1])
@pytest.mark.parametrize("name", BITS)
def test_streamed_scores_of_few_bits(tmp_path, name, count):
    """Shards of whole numbers give the unpacked gradients' dots and self-influence, for few queries and many."""
    k, bits, shards, files = 96, BITS[name], [range(7), range(7, 11)], []
    z = {layer: random_rows(11, k, seed) for seed, layer in enumerate("ab")}
    q = {layer: random_rows(count, k, seed + 5) + 1e-3 for seed, layer in enumerate("ab")}
    for i, ids in enumerate(shards):
        grads: dict = {}
        for layer, rows in z.items():
            grads |= quantise.stored_tensors(layer, rows[ids.start : ids.stop], name)
        layouts = {"gradients": store.gradient_layout(dict.fromkeys(z, (8, 12)), len(ids), name), "factors": {}}
        files.append(store.Shard(tmp_path, i, ids, layouts))
        files[-1].write(grads, {})
    rounded = {layer: quantise.unpack(*quantise.pack(rows, bits), bits, k) for layer, rows in z.items()}
    own = {layer: [lambda rows: rows.square().sum(dim=1)] for layer in z}
    for wanted in ({layer: [] for layer in z}, own):
        found = score_shards(lambda i: files[i].open(), range(2), q, wanted, "cpu", bits)
        for shard, dots, selves in found:
            part = slice(shards[shard].start, shards[shard].stop)
            expected = sum(rounded[layer][part] @ q[layer].T for layer in z)
            assert (dots[""][:, :count] - expected).norm() < (0.05 if bits == 1 else 1e-5) * expected.norm()
            if wanted is own:
                torch.testing.assert_close(selves[0], sum(rows[part].square().sum(dim=1) for rows in rounded.values()))


def test_the_manifest_reports_the_scores_error():
    """The reported error is that of K-FAC's scores between the examples, but with themselves, up to a factor."""
    z, values = random_rows(6, 12), (torch.rand(3) + 0.1, torch.rand(4) + 0.1)
    error = quantise.ScoreErrorEstimate({"a": values}, "int4", 0.1)
    error.add("a", z)
    c = torch.kron(values[1], values[0])
    solved = z / (c + 0.1 * c.mean())
    exact, rounded = solved @ z.T, solved @ quantise.unpack(*quantise.pack(z, 4), 4, 12).T
    off = ~torch.eye(6, dtype=torch.bool)
    exact, rounded = exact[off].double(), rounded[off].double()
    factor = torch.linalg.lstsq(rounded[:, None], exact[:, None]).solution
    assert error.result() == pytest.approx(((factor * rounded - exact).norm() / exact.norm()).item(), rel=1e-4)


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


@pytest.mark.parametrize("mode", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
def test_a_run_that_stores_nothing_scores_as_one_that_does(cli, tiny, workspace, name, mode):
    """--store_dtype none runs the model again: the same scores, with a projection and without, also from factors."""
    for lora in (("--rank", 6), ("--lora", "none")):
        flags = (*lora, "--hessian", "ekfac", "--mlp_only", "--overwrite")
        extract(cli, tiny / name, *flags)
        stored, _ = influence(cli, "--mode", mode)
        log = extract(cli, tiny / name, *flags, "--store_dtype", "none")
        assert log.parts[0].bytes_per_example == 4 * len(log.layers)
        assert close(influence(cli, "--mode", mode)[0], stored)
        assert close(influence(cli, "--mode", mode, "--query_rank", 64)[0], stored)
        few = influence(cli, "--mode", mode, "--query_rank", 1)[0]
        assert not close(few, stored) and np.corrcoef(few.ravel(), stored.ravel())[0, 1] > 0.3


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


def test_layerwise_scores_add_up(cli, tiny, workspace):
    """--layerwise: a matrix a transformer block, whose sum is the dot."""
    extract(cli, tiny / "gpt2", "--rank", 4, "--hessian", "ekfac")
    scores, folder = influence(cli, "--layerwise")
    parts = np.load(folder / "layer_scores.npy")
    assert json.loads((folder / "run.json").read_text())["blocks"] == ["transformer.h.0", "transformer.h.1"]
    assert parts.shape == (2, *scores.shape) and close(parts.sum(axis=0), scores)
    one, _ = influence(cli, "--score_layers", r"h\.1\.")
    assert not close(parts[0], parts[1])
    assert close(parts[1], one)


def test_a_group_of_queries_is_their_mean(cli, tiny, workspace):
    """--group_by: rows with the same value are one query, whose scores are the mean of its members'."""
    rows = [json.loads(line) for line in open("queries.jsonl")]
    labels = ["x", "y", "x"]
    text = "".join(json.dumps(row | {"kind": kind}) + "\n" for row, kind in zip(rows, labels, strict=True))
    Path("queries.jsonl").write_text(text)
    extract(cli, tiny / "gpt2", "--rank", 4, "--hessian", "ekfac")
    each, _ = influence(cli)
    groups, folder = influence(cli, "--group_by", "kind")
    assert close(groups, np.stack([(each[0] + each[2]) / 2, each[1]]))
    assert [json.loads(line)["id"] for line in open(folder / "queries.jsonl")] == ["x", "y"]
    status, out, err = cli("analysis", "--log_dir", "log", "--top_k", 2)
    assert status == 0, err


def test_presets_are_printed_and_give_way_to_flags(cli, tiny, workspace):
    """--preset best is its flags, word for word; a flag that is given goes before the preset's."""
    base = ("--model_name", tiny / "gpt2", *DATA)
    status, out, err = cli("extract_log", *base, "--preset", "best", "--rank", 8)
    assert status == 0, err
    flags = re.search(r"--preset best: (.*)", out)[1].split()
    status, _, err = cli("extract_log", "--model_name", tiny / "gpt2", *DATA[:2], "--log_dir", "other", *flags)
    assert status == 0, err
    one, two = (json.loads(Path(name, "run.json").read_text())["settings"] for name in ("log", "other"))
    assert one == two and one["store_dtype"] == "int1" and one["rank_in"] == 8
    status, _, err = cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", "--preset", "best")
    assert status == 2 and "--rank_in 8" in err
    status, _, err = cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl")
    assert status == 0, err
    assert next(Path("log/scores").glob("*")).name.endswith("dot-ekfac-0.2")


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
