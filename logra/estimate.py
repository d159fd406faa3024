"""What a run will need, before it runs: disk, memory, and, from a timed trial, hours.

Only the configuration and a sample of the documents are read; the model exists without its weights (FakeTensorMode),
which is enough to find the layers and to add up what its graph keeps.
"""

import argparse
import math
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from logra import data, hessian, loss, model, progress, projection, run
from logra.extraction import CALIBRATION, CPU_TOKENS
from logra.hooks import GradientCapture
from logra.log import Log
from logra.prepare import find_folder, load, make_extractor
from logra.quantise import BITS, stored_bytes
from logra.store import DTYPES, layout_bytes

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


def count(documents, tokenizer, settings: dict) -> tuple[dict[str, float], Dataset]:
    """Return examples, tokens, bytes of train/ and tokenising seconds of a run's data, and a sample's examples."""
    limits = {"max_examples": None, "max_tokens": None, "shuffle_seed": None}
    rows, begin = np.linspace(0, len(documents) - 1, min(SAMPLE, len(documents))).astype(int), time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        choice = data.choice(settings, **limits)
        sample, _ = data.build_examples(documents.select(np.unique(rows)), tokenizer, choice, None, Path(work))
        lengths, size, sample = data.token_counts(sample), sample.data.nbytes, Dataset.from_list(sample.to_list())
    factor = len(documents) / len(np.unique(rows))
    examples, tokens = factor * len(lengths), factor * int(lengths.sum())
    share = min(1.0, (settings["max_examples"] or examples) / examples, settings["max_tokens"] / tokens)
    scale = share * factor
    seconds = scale * (time.perf_counter() - begin)
    found = {"examples": round(scale * len(lengths)), "tokens": share * tokens, "bytes": scale * size}
    return found | {"seconds": seconds}, sample


def run_bytes(log: Log, kind: str, train: float) -> dict[str, float]:
    """Return the bytes of each part of a run's folder."""
    sizes = log.shard_size(log.examples)
    shards = math.ceil(log.examples / sizes["shard_examples"])
    return {
        "gradients": log.examples * sizes["bytes_per_example"],
        "factor sums": shards * sizes["factor_bytes_per_shard"],
        "Hessian": layout_bytes(log.hessian_layout(kind)) if kind != "none" else 0,
        "projections": layout_bytes(log.projections_layout),
        "train": train,
    }


def trial(args: argparse.Namespace, log: Log, examples, seconds: float, accelerator: Accelerator) -> dict[str, float]:
    """Load the model and extract for some seconds; return tokens/s, seconds of loading, peak memory in bytes."""
    begin = time.perf_counter()
    lm, _, _ = load(log.settings, args, accelerator.device)
    loading, kinds = time.perf_counter() - begin, {"factors": True, "squares_only": log.squares_only}
    projections = projection.draw(log.shapes, log.projected, log.settings["seed"])
    with GradientCapture(lm, projections, **kinds) as capture:
        extractor, tokens, first, begin = make_extractor(args, lm, capture, log), 0, 0, 0.0
        with progress.bar(desc="trial", unit="tok", unit_scale=True, leave=False) as bar:
            while not begin or time.perf_counter() - begin < seconds:
                rows = examples[[i % len(examples) for i in range(first, first + 16)]]
                extractor.gradients(
                    rows["input_ids"], rows.get("counted"), 0, log.settings["store_dtype"], bar.update
                ).wait()
                if begin:  # the first ones warm up
                    tokens, first = tokens + sum(map(len, rows["input_ids"])), first + 16
                begin = begin or time.perf_counter()
            passed = time.perf_counter() - begin
    return {"rate": tokens / passed, "loading": loading, "peak": progress.peak_memory()}


def gigabytes(size: float) -> str:
    """Return a number of bytes as text."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def show(args: argparse.Namespace) -> None:
    """Print what the run of a command line of extract_log.py will need.

    Raises:
        ValueError: As extract_log.py itself.
    """
    accelerator, kind = run.start_processes(), args.hessian or "raw"
    settings, folder = run.with_defaults(run.given_settings(args), kind), find_folder(args, must_exist=False)
    hessian.check_kind(kind, settings, kind)
    name, hub = settings["model_name"], model.hub_options(settings, args.trust_remote_code)
    config, tokenizer = model.load_config(name, **hub), model.load_tokenizer(name, **hub)
    model.complete(settings, config, accelerator.device, run.say)
    with FakeTensorMode():
        dtype, trust = DTYPES[settings["dtype"]], args.trust_remote_code
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
        described = model.describe(lm, "", tokenizer, settings, run.say)
        log = Log(folder, {"settings": settings, "arguments": vars(args)} | described)
        weights = sum(p.numel() * p.element_size() for p in lm.parameters())
        tokens = args.batch_tokens if isinstance(args.batch_tokens, int) else CPU_TOKENS
        graph = graph_bytes(lm, log.projected, tokens, settings["block_size"])
    documents = data.load_documents(
        settings["data_name"], settings["data_config"], settings["data_split"], args.cache_dir
    )
    counts, sample = count(documents, tokenizer, settings)
    log.content["data"] = {"examples": counts["examples"]}
    run.say(f"{'layers':24s}{'[d_out, d_in]':>16s}{'[r_out, r_in]':>16s}{'k':>12s}")
    for (shape, projected), number in Counter((log.shapes[n], log.projected[n]) for n in log.layers).items():
        run.say(f"{number:<24d}{list(shape)!s:>16s}{list(projected)!s:>16s}{math.prod(projected):12,d}")
    run.say(f"\n{counts['tokens']:,.0f} tokens in {counts['examples']:,} examples of {len(documents):,} documents\n")
    show_disk(log, kind, counts["bytes"])
    cuda = accelerator.device.type == "cuda"
    show_memory(log, weights, graph, tokens, cuda)
    if args.trial:
        show_hours(log, counts, trial(args, log, sample, args.trial, accelerator), cuda)


def show_memory(log: Log, weights: int, graph: int, tokens: int, cuda: bool) -> None:
    """Print the memory of the Hessians and of the model, and warn where it is not there."""
    for kind in hessian.KINDS[:3]:
        size = hessian.memory_bytes(kind, log.projected, log.examples)
        run.say(f"memory for the Hessian {kind:6s} {gigabytes(size)}")
    peak = weights + graph + 8 * loss.CHUNK  # two float32 blocks of logits
    batch = f"{gigabytes(graph)} of graph with {tokens} tokens in a batch"
    run.say(f"memory for the model: {gigabytes(weights)} of weights, {batch}; at least {gigabytes(peak)} a process")
    room = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    if peak > room:
        text = "of memory are free; use --gradient_checkpointing, --fsdp or --batch_tokens"
        run.say(f"WARNING: {gigabytes(room)} {text}")


def show_disk(log: Log, kind: str, train: float) -> None:
    """Print the disk that the run takes, and its gradients would in other types; warn where it is not there."""
    parts = run_bytes(log, kind, train)
    run.say("disk: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items()))
    run.say(f"      {gigabytes(sum(parts.values()))} in all, {log.settings['store_dtype']}, Hessian {kind}")
    for name in (*DTYPES, *BITS):
        size = sum(stored_bytes(o * i, name) for o, i in log.projected.values())
        run.say(f"      {name:10s}{size:14,d} bytes an example{gigabytes(size * log.examples):>12s}")
    folder = log.folder.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if sum(parts.values()) > free:
        run.say(f"WARNING: {gigabytes(free)} of disk are free; use a lower --rank, --store_dtype or another --log_dir")


def show_hours(log: Log, counts: dict[str, float], found: dict[str, float], cuda: bool) -> None:
    """Print the hours that the run takes, from a trial."""
    calibration = 0
    if log.rotated:
        asked = log.settings["calibration_examples"] or min(CALIBRATION, max(64, log.examples // 4))
        calibration = min(log.examples, asked) / log.examples * counts["tokens"]
    hours = (counts["tokens"] + calibration) / found["rate"] / 3600
    fixed = (counts["seconds"] + found["loading"]) / 3600
    run.say(f"\ntrial: {found['rate']:,.0f} tokens/s, peak memory {gigabytes(found['peak'])}")
    for processes in PROCESSES if cuda else (1,):
        run.say(f"{processes} process{'es' * (processes > 1):2s} {hours / processes + fixed:10.3g} hours")
    run.say("each with a GPU of its own" if cuda else "more processes on this machine share its cores: no faster")
