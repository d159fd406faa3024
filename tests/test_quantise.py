"""Gradients in few bits: round trips and scores."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from logra import influence, quantise, store
from logra.influence import score_shards
from logra.runtime import settings

BITS = {"int8": 8, "int4": 4, "int1": 1}


def random_rows(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Return rows with a few large coordinates, and one row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator) * torch.rand(k, generator=generator) ** 3
    rows[n // 2] = 0
    return rows


def test_store_types_of_the_flags():
    """The flags take the types that can be stored."""
    assert settings.INTEGER_BITS == quantise.INTEGER_BITS and tuple(quantise.FLOAT_DTYPES) == settings.FLOAT_DTYPES


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


@pytest.mark.parametrize("k", [1, 100, 300, 4096])
@pytest.mark.parametrize("bits", [8, 4])
def test_whole_numbers_score_as_float64_does(bits, k):
    """Rounding a query to 16 bits changes scores by 1e-4 of their norm at most, or by 1e-3 over six decades."""
    z, q = random_rows(37, k), random_rows(9, k, seed=1) + 1e-3
    q[0] *= 1e-40  # denormal numbers
    q[1] = 0
    q[7:] *= torch.logspace(-3, 3, k)
    packed, scale = quantise.pack(z, bits)
    scale *= 1e10
    scale[3] = 1e-40
    got = quantise.LevelQueries(q, bits).score(packed, scale).double()
    expected = scale.double()[:, None] * (quantise.unpack(packed, torch.ones(37), bits, k).double() @ q.double().T)
    errors = (got - expected).norm(dim=0) / expected.norm(dim=0).clamp_min(1e-300)
    assert errors[:7].max() < 1e-4 and errors.max() < 1e-3 and not got[18].any() and got[3].any()


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
def test_sums_of_whole_numbers_do_not_overflow(bits, top):
    """The largest levels and values, of one sign, in a layer of two million coordinates; NaN and infinity stay such."""
    k = 2**21 + 3
    q, levels = torch.full((4, k), 2e38), torch.full((2, k), float(top))
    levels[1] *= -1
    q[2, 1], q[3, 0] = float("nan"), float("inf")
    codes = (levels + 2 ** (bits - 1)).to(torch.uint8)
    packed = codes if bits == 8 else torch.nn.functional.pad(codes, (0, 1)).unflatten(1, (-1, 2))
    packed = packed if bits == 8 else packed[..., 0] + packed[..., 1] * 16
    packed = torch.nn.functional.pad(packed, (0, quantise.packed_bytes(k, bits) - packed.shape[1]))
    got = quantise.LevelQueries(q, bits).score(packed, torch.full((2,), 1e-20))
    assert not got[:, 2:].isfinite().any()
    expected = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) * top * k * 2e18
    torch.testing.assert_close(got[:, :2].double(), expected.expand(2, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_split_queries_score_as_float64_does(bits):
    """A GPU's product of bfloat16 with both halves of a query: within 2^-17. Here the product is float32's."""
    z, q = random_rows(37, 300), (random_rows(9, 300, seed=1) + 1e-3) * torch.logspace(-3, 3, 300)
    packed, scale = quantise.pack(z, bits)
    got = quantise.SplitQueries(q, bits).score(packed, scale).double()
    expected = quantise.unpack(packed, scale, bits, 300).double() @ q.double().T
    assert ((got - expected).norm(dim=0) / expected.norm(dim=0)).max() < 2**-17
    assert isinstance(influence._fast_queries(q, bits, "meta"), quantise.SplitQueries)


@pytest.mark.parametrize("stored", [torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(3, 16, dtype=torch.uint8)])
def test_a_device_gets_the_bytes_that_are_stored(stored):
    """They are not turned into float32 before, which would be two to four times the bytes."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "copy" in str(function) and args[0].device.type == "cpu":
                copies.append((args[0].dtype, kwargs.get("dtype") or args[0].dtype))
            return function(*args, **(kwargs or {}))

    bits = 8 if stored.dtype == torch.uint8 else None
    query = influence._fast_queries(torch.ones(2, 16), bits, "meta")
    with Copies():
        influence._score_layer(stored, torch.ones(3) if bits else None, query, [], bits)
    assert copies[0] == (stored.dtype, stored.dtype) and {stored.dtype, torch.float32} >= {a for a, _ in copies}


@pytest.mark.filterwarnings("error")
def test_low_rank_leaves_other_devices_alone(monkeypatch):
    """With several GPUs, the random state of matrices in main memory needs none of theirs; it is the same after."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    state = torch.random.get_rng_state()
    influence.low_rank(torch.ones(2, 12), (3, 4), 1)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("count", [1, 10, quantise.MAX_INTEGER_QUERIES + 1])
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
            assert (dots[""][:, :count] - expected).norm() < (0.05 if bits == 1 else 1e-4) * expected.norm()
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
