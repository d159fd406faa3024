"""Predict the disk and the memory that a run needs before it starts.

This reads the model's configuration and a sample of the documents. The model is built without weights
(FakeTensorMode). That is enough to find its layers and to add up the bytes of its graph.
"""

import math
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedTokenizerBase

from logra import hessian, loss
from logra.hooks import GradientCapture
from logra.inputs.documents import load_documents
from logra.inputs.examples import SLICE_DOCUMENTS, document_order, examples_in_memory, token_counts
from logra.inputs.file_rows import Stream
from logra.models import layers, model
from logra.projection import Shapes
from logra.quantise import FLOAT_DTYPES, INTEGER_BITS, stored_bytes
from logra.run_dir import RunDir, RunRecord, TrainPart
from logra.runtime import processes
from logra.runtime.memory import available_memory
from logra.runtime.progress import say
from logra.runtime.settings import CPU_BATCH_TOKENS, Execution, RunSettings
from logra.stages import open_run
from logra.stages.fine_run import FineRun, choose_rank
from logra.store import layout_bytes, projection_layout, projections_of_tensors

SAMPLE = 1000  # documents that are tokenised


class DataSize(NamedTuple):
    """Predicted size of a run's data: examples, tokens, bytes of train/, and seconds of tokenising."""

    examples: int
    tokens: float
    bytes: float
    seconds: float


def estimate(
    settings: RunSettings,
    folder: Path,
    kind: str,
    execution: Execution,
    cache_dir: str | None,
    checkpoints: int,
    rerank_rank: int | str | None,
) -> tuple[RunDir, DataSize, Dataset]:
    """Print what a new run in `folder` with a Hessian of this kind needs, and the disk of so many checkpoints' runs.

    With rerank_rank (see RerankSettings) also what re-ranking needs.

    Returns:
        The run as it will be, the size of its data, and a sample of its examples.

    Raises:
        ValueError: As extract_log.py.
    """
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    config, tokenizer = (load(settings.model_name, **hub) for load in (model.load_config, model.load_tokenizer))
    batch_tokens = execution.batch_tokens or CPU_BATCH_TOKENS
    try:
        with FakeTensorMode():
            lm = model.empty_model(config, FLOAT_DTYPES[settings.dtype], execution.trust_remote_code)
            described = layers.describe(lm, "", tokenizer, settings)
            open_run.say_tracked(lm, described, settings)
            run = RunDir(folder, RunRecord(settings, {"hessian": kind}, **described))
            weight_bytes = sum(p.numel() * p.element_size() for p in lm.parameters())
            batch_bytes = graph_bytes(lm, run.shapes, run.projected, batch_tokens, settings.block_size)
    except RuntimeError as error:  # of FakeTensorMode: the model's code computes with values
        raise ValueError(
            f"expected a model whose code runs without its weights, got type {config.model_type} ({error}); leave out "
            "--dry_run and --trial"
        ) from error
    documents = load_documents(settings, cache_dir)
    size, sample = data_size(documents, tokenizer, settings)
    run, on_gpu = with_examples(run, size.examples), processes.state().device.type == "cuda"
    say_layers(run)
    count = "of a stream" if isinstance(documents, Stream) else f"the data have {len(documents):,} documents"
    say(f"\n{size.tokens:,.0f} tokens in {size.examples:,} examples; {count}\n")
    say_disk(run, kind, size.bytes, checkpoints)
    say_memory(run, weight_bytes, batch_bytes, batch_tokens, on_gpu)
    if rerank_rank:
        say_rerank(run, rerank_rank)
    if checkpoints > 1:
        say(f"one of the {checkpoints} models is in memory at a time")
    return run, size, sample


def graph_bytes(lm: torch.nn.Module, shapes: Shapes, projected: Shapes, tokens: int, length: int) -> int:
    """Return the bytes that the graph of a batch keeps for the backward pass. Call it in FakeTensorMode.

    Args:
        lm: The model.
        shapes: Layer -> (d_out, d_in).
        projected: Layer -> (r_out, r_in).
        tokens: Tokens in the batch.
        length: Tokens in an example.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*lm.parameters(), *lm.buffers())}
    saved = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # kept alive, so that its address is not used again
        return tensor

    layout = projection_layout(shapes, projected, rotated=False)
    sides = {key: torch.empty(size) for key, (_, size) in layout.items()}
    capture = GradientCapture(lm, projections_of_tensors(sides, shapes))
    ids = torch.zeros(max(1, tokens // length), min(tokens, length), dtype=torch.long)
    with capture, saved_tensors_hooks(save, lambda tensor: tensor):
        loss.hidden_states(lm, ids)
    return sum(storage.nbytes() for storage in saved.values())


def data_size(
    documents: Dataset | Stream, tokenizer: PreTrainedTokenizerBase, settings: RunSettings
) -> tuple[DataSize, Dataset]:
    """Predict the size of a run's data from the documents that it takes; also return examples of these.

    At most SAMPLE documents are tokenised, in the run's order: the first ones, and while these stay within the limits,
    a sample of four times as many.
    """
    unlimited = replace(settings, max_examples=None, max_tokens=None, shuffle_seed=None)
    if isinstance(documents, Stream):
        return _stream_size(documents, tokenizer, settings, unlimited)
    order = document_order(len(documents), settings.shuffle_seed)
    taken, kept, lengths = 0, 0, np.zeros(0)
    while kept == len(lengths) and taken < len(order):
        taken = min(len(order), 4 * taken or SAMPLE)
        rows = order[np.linspace(0, taken - 1, min(SAMPLE, taken)).astype(int)]
        begin = time.perf_counter()
        sample = examples_in_memory(documents.select(rows), tokenizer, unlimited)
        seconds, lengths, factor = time.perf_counter() - begin, token_counts(sample), taken / len(rows)
        kept = int((factor * np.cumsum(lengths) <= settings.max_tokens).sum())
        kept = max(1, min(kept, round((settings.max_examples or factor * kept) / factor)))
    read = min(len(order), math.ceil(taken * kept / len(lengths) / SLICE_DOCUMENTS) * SLICE_DOCUMENTS)
    sample, tokens = sample.select(range(kept)), factor * int(lengths[:kept].sum())
    return DataSize(round(factor * kept), tokens, factor * sample.data.nbytes, seconds * read / len(rows)), sample


def _stream_size(
    documents: Stream, tokenizer: PreTrainedTokenizerBase, settings: RunSettings, unlimited: RunSettings
) -> tuple[DataSize, Dataset]:
    """Return data_size of a stream: its first documents, and as many more like them as the limits allow."""
    rows, begin = documents.take(SAMPLE), time.perf_counter()
    sample = examples_in_memory(Stream(rows), tokenizer, unlimited)
    seconds, tokens = time.perf_counter() - begin, int(token_counts(sample).sum())
    factor = min(settings.max_tokens / max(1, tokens), (settings.max_examples or np.inf) / len(sample))
    if len(rows) < SAMPLE:  # that is all
        factor = min(1.0, factor)
    kept = max(1, round(min(1.0, factor) * len(sample)))
    size = DataSize(round(factor * len(sample)), round(factor * tokens), factor * sample.data.nbytes, factor * seconds)
    return size, sample.select(range(kept))


def with_examples(run: RunDir, examples: int) -> RunDir:
    """Return a run as it will be with so many examples."""
    sizes, counts = run.shard_sizes(examples), dict.fromkeys(("documents", "rows", "tokens", "dropped_rows"), 0)
    part = TrainPart(run.settings.data, None, "", {}, examples, **counts, **sizes)
    return RunDir(run.folder, replace(run.record, parts=(part,)))


def gigabytes(size: float) -> str:
    """Return a number of bytes as text, in GB or MB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def say_layers(run: RunDir) -> None:
    """Print the tracked layers by size."""
    say(f"{'layers':24s}{'[d_out, d_in]':>16s}{'[r_out, r_in]':>16s}{'k':>12s}")
    for (shape, projected), number in Counter((run.shapes[n], run.projected[n]) for n in run.layers).items():
        say(f"{number:<24d}{list(shape)!s:>16s}{list(projected)!s:>16s}{math.prod(projected):12,d}")


def say_disk(run: RunDir, kind: str, train_bytes: float, checkpoints: int) -> None:
    """Print the bytes of the run's folder, of its gradients in other types, and of the runs of several checkpoints.

    Warn if the disk is too small. The runs of checkpoints have the same files in train/.
    """
    (train,) = run.parts
    parts = {
        "gradients": run.examples * train.bytes_per_example,
        "factor sums": len(run.shards) * train.factor_bytes_per_shard,
        "Hessian": layout_bytes(run.hessian_layout(kind)) if kind != "none" else 0,
        "projections": layout_bytes(run.projection_layout),
        "train": train_bytes,
    }
    say("disk: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items()))
    say(f"      {gigabytes(sum(parts.values()))} in all, {run.settings.store_dtype}, Hessian {kind}")
    for name in (*FLOAT_DTYPES, *INTEGER_BITS):
        size = sum(stored_bytes(math.prod(shape), name) for shape in run.projected.values())
        say(f"      {name:10s}{size:14,d} bytes an example{gigabytes(size * run.examples):>12s}")
    needed = checkpoints * sum(parts.values()) - (checkpoints - 1) * train_bytes
    if checkpoints > 1:
        say(f"disk of the runs of {checkpoints} checkpoints: {gigabytes(needed)}; their files in train/ are the same")
    folder = run.folder.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        say(f"WARNING: {gigabytes(free)} of disk are free; use a lower --rank, --store_dtype or another --log_dir")


def say_memory(run: RunDir, weight_bytes: int, batch_bytes: int, batch_tokens: int, on_gpu: bool) -> None:
    """Print the memory of the Hessians and of the model; warn if it is not free."""
    for kind in ("raw", "kfac", "ekfac"):
        size = hessian.memory_bytes(kind, run.projected, run.examples)
        say(f"memory for the Hessian {kind:6s} {gigabytes(size)}")
    layout = projection_layout(run.shapes, run.projected, rotated=False)
    dtype = FLOAT_DTYPES[run.settings.dtype]  # on the device
    projection_bytes = layout_bytes({key: (dtype, size) for key, (_, size) in layout.items()})
    peak = weight_bytes + projection_bytes + batch_bytes + 8 * loss.CHUNK_LOGITS  # two float32 chunks of logits
    parts = f"{gigabytes(weight_bytes)} of weights, {gigabytes(projection_bytes)} of projections"
    graph = f"{gigabytes(batch_bytes)} of graph with {batch_tokens} tokens in a batch"
    say(f"memory for the model: {parts}, {graph}; at least {gigabytes(peak)} a process")
    free = torch.cuda.mem_get_info()[0] if on_gpu else available_memory()
    if peak > free:
        remedy = "use --gradient_checkpointing, --fsdp or a smaller --batch_tokens"
        say(f"WARNING: {gigabytes(free)} of memory are free; {remedy}")


def say_rerank(run: RunDir, rerank_rank: int | str) -> None:
    """Print the disk and memory of re-ranking; warn if they are not free."""
    fine = FineRun(run, choose_rank(run.shapes, rerank_rank))
    space, query_bytes = f"rank {fine.rank or 'none'}", 4 * sum(map(math.prod, fine.projected.values()))
    say(f"re-ranking, {space}: statistics {gigabytes(fine.bytes)} of disk and memory; a query {gigabytes(query_bytes)}")
    if fine.bytes + query_bytes > available_memory():
        say(f"WARNING: {gigabytes(available_memory())} of memory are free; use a lower --rerank_rank")
