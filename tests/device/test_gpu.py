"""A GPU computes what the CPU computes, to stated tolerances.

`TEST_GPUS=1 pytest -m gpu tests/device` runs the cases on the GPU; scripts/gpu_check.sh does so. Other runs hide the
GPUs (conftest.py) and run a few cases on a stand-in (stand_in.py), which keeps to a GPU's rules.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.state import AcceleratorState
from conftest import ROOT, make_model
from helpers import (
    DATA,
    InMemory,
    compute_gradients,
    draw_projections,
    extract,
    hessian_tensors,
    influence,
    launch,
    random_ids,
    relative,
    start,
    stored_gradients,
)
from stand_in import GpuStandIn

from logra import quantise
from logra.analysis.tokens import TokenSplitter
from logra.hooks import GradientCapture, _SideProjection
from logra.influence import score_shards
from logra.models import model as models
from logra.models.model import blocks
from logra.run_dir import RunDir
from logra.runtime.settings import MODES
from logra.scoring.rank import read_record
from logra.scoring.reranked import Reranked

NAMES, DTYPES = ("llama", "gpt2", "neox"), ("float32", "bfloat16")
PRESETS = ("--preset paper", "--preset best --rerank_rank none")
INT8, NONE = "--hessian ekfac --store_dtype int8", "--hessian ekfac --store_dtype none"
OTHERS = (  # with the presets: each store type, Hessian and kind of projection
    INT8, NONE, "--hessian kfac --store_dtype bfloat16", "--hessian ekfac --store_dtype float16",
    "--hessian kfac --store_dtype int4", "--hessian ekfac --lora none --store_dtype none --layers mlp",
)  # fmt: skip
FEW_BITS = 0.05  # tolerance of scores where a sign may flip; a CPU also rounds the queries of int1 to 8 bits


def on_both(on_stand_in: list[tuple], on_gpu: list[tuple]) -> list:
    """Return cases for `device` and further parameters."""
    cases = [("stand-in", *case) for case in on_stand_in]
    return cases + [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in on_gpu]


@contextmanager
def stages_on(device: str) -> Iterator[None]:
    """Let the stages in this process run on the device."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def devices(name: str, count: int = 1) -> Iterator[None]:
    """Let stages run on this many devices of a kind; skip the test without as many GPUs."""
    if name == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs GPUs: {count}, and TEST_GPUS=1")
    with GpuStandIn(count) if name == "stand-in" else nullcontext(), stages_on(name):
        yield


@pytest.fixture
def device(request) -> Iterator[torch.device]:
    """The device on which stages run; without a GPU, cases for one are skipped."""
    with devices(request.param):
        yield torch.device("cpu" if request.param == "cpu" else "cuda")


@pytest.mark.parametrize(
    ("device", "name", "dtype", "flags"),
    on_both(
        [("llama", "bfloat16", PRESETS[1]), ("llama", "float32", OTHERS[2]), ("gpt2", "float32", OTHERS[-1])],
        [*product(NAMES, DTYPES, PRESETS), *product(["llama"], DTYPES, OTHERS)],
    ),
    indirect=["device"],
)
def test_a_run_against_float64(device, cli, tiny, workspace, name, dtype, flags):
    """Every part that --verify compares with the CPU's reference in float64, to --verify's tolerances.

    Gradients, factor sums, stored values bit for bit, scores in all modes, re-ranked scores; in float32 to 1e-3.
    """
    status, out, err = cli(
        "extract_log", "--model_name", tiny / name, *DATA, "--verify", "--dtype", dtype, *flags.split()
    )
    assert status == 0 and "FAIL" not in out and "reference in float64" in out, out + err
    parts = ("train gradients", "query gradients", "factor sums", "stored values", "scores")
    assert all(f"  pass  {part}: " in out for part in parts), out


def results(cli, model: Path, flags: str) -> dict[str, torch.Tensor]:
    """Run stages 2 and 3 in float32, in small batches and shards; return what they stored, scores, shares of tokens."""
    shutil.rmtree("log", ignore_errors=True)
    log = extract(cli, model, "--dtype", "float32", "--shard_examples", 7, "--batch_tokens", 90, *flags.split())
    found = stored_gradients(log) if log.settings.bits is None else {}
    found |= {f"Hessian {key}": value for key, value in hessian_tensors(log, log.first_hessian).items()}
    for mode in MODES:
        scores, folder = influence(cli, "--mode", mode, "--rerank", 20)
        record, shown = read_record(folder, log), [[0, 3, 7], [3], [19, 2]]
        reranked = Reranked.load(folder, record, None)
        shares, of_queries = TokenSplitter(log, record, False).split(log.train(), shown, shown)
        found[f"{mode}, scores"] = torch.from_numpy(scores)
        found |= {f"{mode}, re-ranked {q}": torch.from_numpy(reranked.candidates(q)[1]) for q in range(len(shown))}
        found |= {f"{mode}, tokens of {pair}": share.tokens for pair, share in shares.items()}
        found |= {f"{mode}, tokens of query {q}": share for q, share in enumerate(of_queries)}
    return {name: value.double() for name, value in found.items()}


@pytest.mark.parametrize(
    ("device", "name", "flags"),
    on_both([("llama", PRESETS[0]), ("gpt2", NONE)], [*product(NAMES, PRESETS), ("llama", INT8), ("llama", NONE)]),
    indirect=["device"],
)
def test_stages_against_the_cpu(device, cli, tiny, workspace, name, flags):
    """Stored gradients, Hessian, scores, re-ranked scores and shares of tokens are the CPU's to 1e-3.

    Copies of one batch run while the next is computed.
    """
    flags += " --rank 4 --calibration_examples 20"
    with stages_on("cpu"):
        expected = results(cli, tiny / name, flags)
    found = results(cli, tiny / name, flags)
    tolerance = FEW_BITS if "int" in flags or "best" in flags else 1e-3
    errors = {key: (found[key] - value).norm() / value.norm().clamp_min(1e-30) for key, value in expected.items()}
    wrong = {key: error.item() for key, error in errors.items() if not error <= tolerance}
    assert found.keys() == expected.keys() and not wrong


@pytest.mark.parametrize(
    ("device", "store_dtype", "count"),
    on_both(*2 * [[*product(("float32", "bfloat16", "int8", "int4", "int1"), (1, 600))]]),
    indirect=["device"],
)
def test_scores_of_stored_gradients(device, store_dtype, count):
    """Dots and self-influence of shards, against the stored values in float64, to 1e-5."""
    generator = torch.Generator().manual_seed(count)
    sizes, shards = {"a": 64 * 64, "b": 100}, [17, 5]
    queries = {layer: torch.randn(count, k, generator=generator) for layer, k in sizes.items()}
    files = []
    for n in shards:
        tensors: dict[str, torch.Tensor] = {}
        for layer, k in sizes.items():
            tensors |= quantise.stored_tensors(layer, torch.randn(n, k, generator=generator), store_dtype)
        files.append(InMemory(tensors))
    bits = quantise.INTEGER_BITS.get(store_dtype)
    forms = {layer: [lambda z: z.square().sum(dim=1)] for layer in sizes}
    for file, (_, dots, own) in zip(
        files, score_shards(files.__getitem__, range(2), queries, forms, device, bits), strict=True
    ):
        stored = {
            layer: (file.tensors[layer] if bits is None else quantise.unpack(
                file.tensors[layer], file.tensors[f"{layer}.scale"], bits, k)).double()
            for layer, k in sizes.items()
        }  # fmt: skip
        expected = sum(z @ queries[layer].double().T for layer, z in stored.items())
        assert relative(dots[""][:, :count].cpu(), expected) < 1e-5
        assert relative(own[0].cpu(), sum(z.square().sum(dim=1) for z in stored.values())) < 1e-5


@pytest.mark.parametrize(
    ("device", "processes"),
    [*on_both([], [(1,), (2,), (4,)]), pytest.param("cpu", 1, marks=pytest.mark.slow)],
    indirect=["device"],
)  # fmt: skip
def test_a_sharded_model(device, cli, tiny, workspace, processes):
    """--fsdp over one process and more stores what one process on the CPU stores, to 1e-3."""
    if device.type == "cuda" and torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    flags = "--hessian ekfac --rank 4 --mlp_only --shard_examples 4 --dtype float32 --basis projected"
    with stages_on("cpu"):
        expected = extract(cli, tiny / "llama", *flags.split())
    flags += f" --model_name {tiny / 'llama'} --data_name docs.jsonl --log_dir sharded --fsdp"
    if processes == 1:  # accelerate launch connects no single process
        done = start(f"torchrun --nproc_per_node 1 {ROOT}/extract_log.py {flags}", workspace)
    else:
        done = launch(processes, workspace, flags)
    assert done.returncode == 0, done.stderr
    log = RunDir.load(Path("sharded"))
    one, two = ({**stored_gradients(run), **hessian_tensors(run, "ekfac")} for run in (log, expected))
    assert all((one[key] - two[key]).double().norm() <= 1e-3 * two[key].double().norm() for key in two)


@pytest.fixture
def two_devices(request) -> Iterator[None]:
    """Two GPUs, or two stand-ins."""
    with devices(request.param, 2):
        yield


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Put a part of a model's layers on each of two GPUs, as --device_map auto does."""
    memory = {0: sum(p.nbytes for p in model.parameters()) * 2 // 3, 1: 10**9}
    places = infer_auto_device_map(model, memory, [type(blocks(model)[0]).__name__])
    assert {*places.values()} == {0, 1}
    return dispatch_model(model, device_map={part: f"cuda:{number}" for part, number in places.items()})


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize(("two_devices", "name"), on_both(*2 * [[(name,) for name in NAMES]]), indirect=["two_devices"])
def test_gradients_of_a_model_on_two_gpus(name):
    """--device_map auto: layers on two GPUs, their copies in flight while the next batch is computed."""
    model, ids = make_model(name), random_ids([30] * 20)
    _, projections = draw_projections(model)
    with GradientCapture(model, projections) as capture:
        expected = compute_gradients(model, capture, ids, 10**6)
    model = spread(model)
    with GradientCapture(model, projections) as capture:
        for _ in range(5):
            found = compute_gradients(model, capture, ids, 120)
            assert all(relative(found[layer], expected[layer]) < 1e-4 for layer in expected)


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize(
    ("two_devices", "name", "flags"),
    on_both(*2 * [[("llama", PRESETS[1]), ("gpt2", "--hessian kfac --store_dtype none")]]),
    indirect=["two_devices"],
)
def test_a_run_on_two_gpus(cli, tiny, workspace, monkeypatch, name, flags):
    """Stages, scores in all modes and re-ranked scores of a model on two GPUs, as --verify compares them."""
    load = models.load_model

    def load_spread(name, dtype, device="cpu", *_, **hub):
        model = load(name, dtype, **hub)
        return model if torch.device(device).type == "cpu" else spread(model)

    monkeypatch.setattr(models, "load_model", load_spread)
    run = ("extract_log", "--model_name", tiny / name, *DATA, "--verify", "--dtype", "float32")
    status, out, err = cli(*run, *flags.split())
    assert status == 0 and "FAIL" not in out and "reference in float64" in out, out + err


def on_the_first_device(side, x, pairs=None):
    return x if side.p is None else x @ side.p.to("cuda:0").T


def test_a_projection_on_the_wrong_device_is_seen(monkeypatch):
    """The stand-in keeps two devices apart."""
    model = make_model("gpt2")
    _, projections = draw_projections(model)
    monkeypatch.setattr(_SideProjection, "__call__", on_the_first_device)
    error = pytest.raises(RuntimeError, match="got cuda:0 and cuda:1")
    with error, GpuStandIn(2), GradientCapture(spread(model), projections) as capture:
        compute_gradients(model, capture, random_ids([5]), 100)
