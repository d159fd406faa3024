"""The GPU's rules, on a stand-in: paths keep to them, and each kind of mistake is seen when it is planted."""

import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import make_model
from helpers import InMemory, compute_gradients, draw_projections, random_ids, relative
from stand_in import Event, GpuStandIn, OnGpu

from logra import influence
from logra.hooks import GradientCapture, ScoreCapture, SquareCapture, TokenCapture, _SideProjection
from logra.loss import example_losses
from logra.stages.batches import make_batch
from logra.stages.gradients import CopyStreams, Extractor

LENGTHS = [12, 3, 20, 1, 9, 20, 17]
BATCH_TOKENS = 40


def extract(gpu: GpuStandIn, name: str = "llama", dtype: torch.dtype = torch.float32, store_dtype: str = "float32"):
    """Return gradients and factor sums of some examples from the CPU and from the device; check what the host did.

    The host waits once a batch (transformers looks at the positions, for each kind of mask), and once for the copies
    at the end.
    """
    model, ids = make_model(name, dtype=dtype), random_ids(LENGTHS)
    _, projections = draw_projections(model)
    with GradientCapture(model, projections, factors=True) as capture:
        expected = Extractor(model, capture, BATCH_TOKENS).gradients(ids, None, 0, store_dtype).wait()
    model.to("cuda")
    with GradientCapture(model, projections, factors=True) as capture:
        extractor = Extractor(model, capture, BATCH_TOKENS)
        extractor.gradients(ids).wait()  # copies the projections
        gpu.waits.clear()
        gpu.bytes.clear()
        found = extractor.gradients(ids, None, 0, store_dtype).wait()
    batches, masks = len(extractor.batches(LENGTHS)), 2 if name == "gemma2" else 1
    assert gpu.waits.total() <= masks * batches + 1, f"the host waits within a batch: {gpu.waits}"
    on_host = sum(tensor.nbytes for part in found for key, tensor in part.items() if key != "examples")
    assert gpu.bytes["to host"] == on_host, "each value is copied once"
    assert gpu.bytes["to device"] < 200 * sum(LENGTHS), "tokens alone go to the device"
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for part, expected_part in zip(found, expected, strict=True):
        for key, tensor in expected_part.items():
            if tensor.dtype == torch.uint8:  # packed
                assert (part[key] == tensor).float().mean() > 0.99
            else:
                assert relative(part[key].float(), tensor.float()) < tolerance


@pytest.fixture
def gpu():
    with GpuStandIn() as stand_in:
        yield stand_in


@pytest.mark.parametrize(
    ("name", "dtype", "store_dtype"),
    [
        ("gpt2", torch.float32, "float32"), ("neox", torch.bfloat16, "bfloat16"), ("llama", torch.float32, "int1"),
        ("mixtral", torch.bfloat16, "float32"), ("gemma2", torch.float32, "int4"),
    ],
)  # fmt: skip
def test_gradients_on_the_device(gpu, name, dtype, store_dtype):
    """Hooks, fused loss, factor sums, rounding and copies, of dense models and of experts."""
    extract(gpu, name, dtype, store_dtype)


@contextmanager
def no_wait(streams: CopyStreams, tensor):
    """CopyStreams.use without waiting for the work that is queued."""
    if not tensor.is_cuda:
        yield
        return
    stream = streams.streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
    with torch.cuda.stream(stream):
        yield
    tensor.record_stream(stream)


def projected_by_the_host(side, x, pairs=None):
    return x if side.p is None else x @ side.p.T


def add_on_host(capture):
    for key, value in capture._batch_sums.items():
        capture._factor_sums[key] = capture._factor_sums.get(key, torch.zeros(value.shape)) + value


def wait_in_each_layer(capture, name, x, d):
    assert x.sum().item() == x.sum().item()
    return torch.bmm(d.float().mT, x.float()).flatten(1)


@pytest.mark.parametrize(
    ("owner", "name", "mistake", "seen"),
    [
        (_SideProjection, "__call__", projected_by_the_host, "expected all tensors on one device"),
        (GradientCapture, "commit", add_on_host, "expected all tensors on one device"),
        (GradientCapture, "_reduce", wait_in_each_layer, "the host waits within a batch"),
        (CopyStreams, "use", no_wait, "without waiting for it"),
        (OnGpu, "record_stream", lambda tensor, stream: None, "record_stream is missing"),
        (Event, "synchronize", lambda event: None, "expected finite gradients, got NaN"),
    ],
)
def test_a_planted_mistake_is_seen(monkeypatch, owner, name, mistake, seen):
    """A projection left on the host, sums across devices, a wait in each layer, streams and buffers that don't wait."""
    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises((RuntimeError, AssertionError, ValueError), match=seen), GpuStandIn() as stand_in:
        extract(stand_in)
        gc.collect()


def scored_without_waiting(stored, scale, query, forms, bits):
    return stored.to(query.device, non_blocking=True) @ query.T, []


@pytest.mark.parametrize("reused", [False, True])
def test_a_pinned_buffer_that_is_read_into_too_early(monkeypatch, reused):
    """Shards go to the device through a pinned buffer, which is filled again when its copy is done."""
    shards, query = [torch.randn(4, 6) for _ in range(8)], torch.randn(3, 6)
    if reused:
        monkeypatch.setattr(influence, "_score_layer", scored_without_waiting)
    expected = pytest.raises(RuntimeError, match="a pinned buffer changed") if reused else nullcontext()
    with expected, GpuStandIn():
        found = influence.score_shards(
            lambda shard: InMemory({"l": shards[shard]}), range(8), {"l": query}, {"l": []}, torch.device("cuda", 0)
        )
        for shard, dots, _ in found:
            assert relative(dots[""].cpu(), shards[shard] @ query.T) < 1e-6


def test_queries_stay_on_the_device(gpu):
    """A batch that is scored in the backward pass, as it is split by token, moves tokens to the device only."""
    model = make_model("llama").to("cuda")
    shapes, projections = draw_projections(model)
    widths = {layer: projections[layer].p_out.shape[0] * projections[layer].p_in.shape[0] for layer in shapes}
    queries = {layer: torch.randn(50, width) for layer, width in widths.items()}
    factored = {layer: (torch.randn(50, 2, 4), torch.randn(50, 2, 5)) for layer in widths}
    for of_queries in (queries, factored):
        with ScoreCapture(model, projections, of_queries, {layer: [] for layer in shapes}) as capture:
            extractor = Extractor(model, capture, 10**6)
            for _ in range(2):
                gpu.bytes.clear()
                extractor.gradients(random_ids([20, 20])).wait()
        assert gpu.bytes["to device"] < 100 * 40


def test_projections_stay_on_the_device(gpu):
    """A capture that is entered again does not move them again."""
    model = make_model("llama").to("cuda")
    _, projections = draw_projections(model)
    capture = GradientCapture(model, projections)
    for _ in range(2):
        gpu.bytes.clear()
        with capture:
            compute_gradients(model, capture, random_ids([5]), 100)
    assert gpu.bytes["to device"] < 100 * 5


@pytest.mark.parametrize("capture", [GradientCapture, SquareCapture])
def test_a_batch_is_timed_until_the_device_is_done(gpu, monkeypatch, capture):
    """--batch_tokens auto: the clock is read after the device has finished, whatever the batch is computed for."""
    model = make_model("llama").to("cuda")
    _, projections = draw_projections(model)
    unfinished = []

    def clock() -> float:
        unfinished.append(any(stream.finished < stream.time for stream in gpu.streams))
        return float(len(unfinished))

    monkeypatch.setattr("logra.stages.gradients.time.perf_counter", clock)
    options = {"grads": False, "factors": True} if capture is GradientCapture else {}
    with capture(model, projections, **options) as entered:
        Extractor(model, entered, 10**6).find_batch_tokens(8, 2)
    assert unfinished and not any(unfinished)


def test_dots_by_token(gpu):
    """TokenCapture on the device."""
    model = make_model("gpt2")
    _, projections = draw_projections(model)
    ids = random_ids([9])
    capture = TokenCapture(model, projections)
    capture.matrices = {layer: torch.randn(2, p.p_out.shape[0], p.p_in.shape[0]) for layer, p in projections.items()}
    with capture:
        expected = compute_gradients(model, capture, ids, 100)
    model.to("cuda")
    with capture:
        found = compute_gradients(model, capture, ids, 100)
    assert all(relative(found[layer], expected[layer]) < 1e-5 for layer in expected)


def test_losses_without_positions_given(gpu):
    """example_losses finds the positions that count on the device."""
    model, ids = make_model("llama"), random_ids([9, 4])
    batch = make_batch(ids)
    expected = example_losses(model, batch.input_ids, batch.targets).detach()
    model.to("cuda")
    on_device = make_batch(ids, None, "cuda")
    assert relative(example_losses(model, on_device.input_ids, on_device.targets).detach().cpu(), expected) < 1e-5
