"""What a run will need, before it runs: disk, memory, and, from a timed trial, hours.

Only the configuration and a sample of the documents are read; the model exists without its weights (FakeTensorMode),
which is enough to find the layers and to add up what its graph keeps.
"""

import math
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from logra import hessian, loss, projection
from logra.hooks import GradientCapture
from logra.inputs import model
from logra.inputs.documents import load_documents
from logra.inputs.examples import build_examples, token_counts
from logra.quantise import FLOAT_DTYPES, INTEGER_BITS, stored_bytes
from logra.run_dir import RunDir, RunRecord, TrainPart
from logra.runtime import progress
from logra.runtime.flags import RunFlags
from logra.runtime.memory import available_memory, peak_memory
from logra.runtime.progress import say
from logra.runtime.settings import CPU_BATCH_TOKENS, Execution, RunSettings
from logra.stages.calibrate import default_sample
from logra.stages.gradients import make_extractor
from logra.stages.open_run import find_folder, load_model, new_settings
from logra.store import layout_bytes

SAMPLE = 1000  # documents that are tokenised
PROCESSES = (1, 2, 4, 8)


def graph_bytes(lm: torch.nn.Module, projected: projection.Shapes, tokens: int, length: int) -> int:
    """Return the bytes that the graph of a batch of `tokens` keeps for the backward pass; inside FakeTensorMode."""
    own = {t.untyped_storage()._cdata for t in (*lm.parameters(), *lm.buffers())}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    capture = GradientCapture(lm, {name: projection.Projection(None, None) for name in projected})
    ids = torch.zeros(max(1, tokens // length), min(tokens, length), dtype=torch.long)
    with capture, saved_tensors_hooks(keep, lambda tensor: tensor):
        loss.hidden_states(lm, ids)
    return sum(storage.nbytes() for storage in kept.values())


class DataSize(NamedTuple):
    """How large a run's data are: examples, tokens, bytes of train/, and seconds of tokenising."""

    examples: int
    tokens: float
    bytes: float
    seconds: float


def count(documents: Dataset, tokenizer: PreTrainedTokenizerBase, settings: RunSettings) -> tuple[DataSize, Dataset]:
    """Return the size of a run's data, predicted from a sample of its documents, and the sample's examples."""
    rows, begin = np.linspace(0, len(documents) - 1, min(SAMPLE, len(documents))).astype(int), time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        unlimited = replace(settings, max_examples=None, max_tokens=None, shuffle_seed=None)
        sample, _ = build_examples(documents.select(np.unique(rows)), tokenizer, unlimited, None, Path(work))
        lengths, size, sample = token_counts(sample), sample.data.nbytes, Dataset.from_list(sample.to_list())
    factor = len(documents) / len(np.unique(rows))
    examples, tokens = factor * len(lengths), factor * int(lengths.sum())
    share = min(1.0, (settings.max_examples or examples) / examples, settings.max_tokens / tokens)
    scale = share * factor
    seconds = scale * (time.perf_counter() - begin)
    return DataSize(round(scale * len(lengths)), share * tokens, scale * size, seconds), sample


def run_bytes(run: RunDir, kind: str, train: float) -> dict[str, float]:
    """Return the bytes of each part of a run's folder."""
    sizes = run.shard_sizes(run.examples)
    shards = math.ceil(run.examples / sizes["shard_examples"])
    return {
        "gradients": run.examples * sizes["bytes_per_example"],
        "factor sums": shards * sizes["factor_bytes_per_shard"],
        "Hessian": layout_bytes(run.hessian_layout(kind)) if kind != "none" else 0,
        "projections": layout_bytes(run.projection_layout),
        "train": train,
    }


def trial(
    run: RunDir, execution: Execution, examples: Dataset, seconds: float, accelerator: Accelerator
) -> dict[str, float]:
    """Load the model and extract for some seconds; return tokens/s, seconds of loading, peak memory in bytes."""
    begin = time.perf_counter()
    lm, _, _ = load_model(run.settings, execution, accelerator.device)
    loading, tokens, first, begin = time.perf_counter() - begin, 0, 0, 0.0
    projections = projection.draw(run.shapes, run.projected, run.settings.seed)
    with GradientCapture(lm, projections, factors=True, squares_only=run.squares_only) as capture:
        extractor = make_extractor(lm, capture, execution, run.settings.block_size, max(map(len, run.shards)))
        with progress.bar(desc="trial", unit="tok", unit_scale=True, leave=False) as bar:
            while not begin or time.perf_counter() - begin < seconds:
                rows = examples[[i % len(examples) for i in range(first, first + 16)]]
                extractor.gradients(
                    rows["input_ids"], rows.get("counted"), 0, run.settings.store_dtype, bar.update
                ).wait()
                if begin:  # the first ones warm up
                    tokens, first = tokens + sum(map(len, rows["input_ids"])), first + 16
                begin = begin or time.perf_counter()
            passed = time.perf_counter() - begin
    return {"rate": tokens / passed, "loading": loading, "peak": peak_memory()}


def gigabytes(size: float) -> str:
    """Return a number of bytes as text."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def estimate(
    flags: RunFlags, execution: Execution, trial_seconds: float | None, cache_dir: str | None, accelerator: Accelerator
) -> None:
    """Print what the run of a command line of extract_log.py will need; with trial_seconds, its hours too.

    Raises:
        ValueError: As extract_log.py itself.
    """
    kind, settings = flags.hessian or "raw", new_settings(flags, execution, accelerator)
    settings.check_hessian(kind, kind)
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    config, tokenizer = (load(settings.model_name, **hub) for load in (model.load_config, model.load_tokenizer))
    tokens = execution.batch_tokens or CPU_BATCH_TOKENS
    with FakeTensorMode():
        dtype, trust = FLOAT_DTYPES[settings.dtype], execution.trust_remote_code
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
        described = model.describe(lm, "", tokenizer, settings, say)
        weights = sum(p.numel() * p.element_size() for p in lm.parameters())
        record = RunRecord(settings, {"hessian": kind}, **described)
        run = RunDir(find_folder(flags, must_exist=False), record)
        graph = graph_bytes(lm, run.projected, tokens, settings.block_size)
    documents = load_documents(settings.data_name, settings.data_config, settings.data_split, cache_dir)
    size, sample = count(documents, tokenizer, settings)
    run = with_examples(run, size.examples)
    show_layers(run)
    say(f"\n{size.tokens:,.0f} tokens in {size.examples:,} examples of {len(documents):,} documents\n")
    show_disk(run, kind, size.bytes)
    on_gpu = accelerator.device.type == "cuda"
    show_memory(run, weights, graph, tokens, on_gpu)
    if trial_seconds:
        show_hours(run, size, trial(run, execution, sample, trial_seconds, accelerator), on_gpu)


def with_examples(run: RunDir, examples: int) -> RunDir:
    """Return a run as it will be with so many examples."""
    sizes, counts = run.shard_sizes(examples), dict.fromkeys(("documents", "rows", "tokens", "dropped_rows"), 0)
    part = TrainPart(run.settings.data, None, "", {}, examples, **counts, **sizes)
    return RunDir(run.folder, replace(run.record, parts=(part,)))


def show_layers(run: RunDir) -> None:
    """Print the tracked layers by size."""
    say(f"{'layers':24s}{'[d_out, d_in]':>16s}{'[r_out, r_in]':>16s}{'k':>12s}")
    for (shape, projected), number in Counter((run.shapes[n], run.projected[n]) for n in run.layers).items():
        say(f"{number:<24d}{list(shape)!s:>16s}{list(projected)!s:>16s}{math.prod(projected):12,d}")


def show_memory(run: RunDir, weights: int, graph: int, tokens: int, on_gpu: bool) -> None:
    """Print the memory of the Hessians and of the model, and warn where it is not there."""
    for kind in hessian.KINDS[:3]:
        size = hessian.memory_bytes(kind, run.projected, run.examples)
        say(f"memory for the Hessian {kind:6s} {gigabytes(size)}")
    peak = weights + graph + 8 * loss.CHUNK_LOGITS  # two float32 blocks of logits
    batch = f"{gigabytes(graph)} of graph with {tokens} tokens in a batch"
    say(f"memory for the model: {gigabytes(weights)} of weights, {batch}; at least {gigabytes(peak)} a process")
    room = torch.cuda.mem_get_info()[0] if on_gpu else available_memory()
    if peak > room:
        text = "of memory are free; use --gradient_checkpointing, --fsdp or --batch_tokens"
        say(f"WARNING: {gigabytes(room)} {text}")


def show_disk(run: RunDir, kind: str, train: float) -> None:
    """Print the disk that the run takes, and its gradients would in other types; warn where it is not there."""
    parts = run_bytes(run, kind, train)
    say("disk: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items()))
    say(f"      {gigabytes(sum(parts.values()))} in all, {run.settings.store_dtype}, Hessian {kind}")
    for name in (*FLOAT_DTYPES, *INTEGER_BITS):
        size = sum(stored_bytes(o * i, name) for o, i in run.projected.values())
        say(f"      {name:10s}{size:14,d} bytes an example{gigabytes(size * run.examples):>12s}")
    folder = run.folder.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if sum(parts.values()) > free:
        say(f"WARNING: {gigabytes(free)} of disk are free; use a lower --rank, --store_dtype or another --log_dir")


def show_hours(run: RunDir, size: DataSize, measured: dict[str, float], on_gpu: bool) -> None:
    """Print the hours that the run takes, from a trial."""
    calibration = 0
    if run.rotated:
        asked = run.settings.calibration_examples or default_sample(run.examples)
        calibration = min(run.examples, asked) / run.examples * size.tokens
    hours = (size.tokens + calibration) / measured["rate"] / 3600
    fixed = (size.seconds + measured["loading"]) / 3600
    say(f"\ntrial: {measured['rate']:,.0f} tokens/s, peak memory {gigabytes(measured['peak'])}")
    for processes in PROCESSES if on_gpu else (1,):
        say(f"{processes} process{'es' * (processes > 1):2s} {hours / processes + fixed:10.3g} hours")
    say("each with a GPU of its own" if on_gpu else "more processes on this machine share its cores: no faster")
