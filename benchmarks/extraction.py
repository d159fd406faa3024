"""Speed and memory of extraction compared with the bare forward pass, interleaved in one process.

Times batches of random tokens through: the plain forward pass with logits; forward and full backward (the gradient of
every weight); ours (projected per-example gradients and factor sums, written to a shard); and ours without the factor
sums, which only kfac and ekfac need. Prints medians, the median of the pairwise ratios, and one JSON line. Flags with
several values make a sweep over all combinations.

    python benchmarks/extraction.py --block_size 128 256 512
    python benchmarks/extraction.py --random experts dense   # 32 experts, 4 of a token, and a dense model as wide
"""

import argparse
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra import experts, projection, store
from logra.hooks import GradientCapture
from logra.models import layers, model
from logra.quantise import FLOAT_DTYPES
from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import DEFAULT_MODEL
from logra.stages.gradients import Extractor

SIZES = {
    "vocab_size": 32000,
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
RANDOM_CONFIGS = {
    "experts": Qwen3MoeConfig(**SIZES, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=256),
    "dense": Qwen3Config(**SIZES, intermediate_size=4 * 256),  # as many active parameters
}


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model_name", default=DEFAULT_MODEL, help="(%(default)s)")
    parser.add_argument(
        "--random", choices=list(RANDOM_CONFIGS), nargs="+", default=[None], help="random models of 8 layers instead"
    )
    several: dict[str, Any] = {"type": positive_int, "nargs": "+"}
    parser.add_argument("--block_size", **several, default=[256], help="tokens in an example (256)")
    parser.add_argument("--batch_size", **several, default=[4], help="examples in a batch (4)")
    parser.add_argument("--rank", **several, default=[64], help="(64)")
    parser.add_argument("--dtype", choices=list(FLOAT_DTYPES), nargs="+", default=[None], help="of the model (default)")
    parser.add_argument("--batches", type=positive_int, default=2, help="per measurement (2)")
    parser.add_argument("--all_layers", action="store_true", help="attention too, not the MLP only")
    parser.add_argument("--repeats", type=positive_int, default=5, help="of each, interleaved (5)")
    return parser


class PeakMemory:
    """Context manager: `bytes` is the peak of the process's resident memory, or of the GPU's allocated memory."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._stop = 0, threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()


def timed(function: Callable[[], object]) -> tuple[float, int]:
    """Return (seconds, peak bytes) of a call."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, memory.bytes


def passes(
    lm: PreTrainedModel, shapes: projection.Shapes, rank: int, rows: list[list[int]], batch_size: int
) -> dict[str, Callable[[], None]]:
    """Return what is timed.

    Args:
        lm: The model.
        shapes: Its tracked layers.
        rank: Of both sides.
        rows: Token ids of the examples, equally long.
        batch_size: Examples in a batch.
    """
    projected = projection.projected_shapes(shapes, rank, rank)
    projections = projection.draw(shapes, projected, 0, experts.wide_sides(lm))
    batches = torch.tensor(rows, device=lm.device).split(batch_size)

    def forward() -> None:
        with torch.no_grad():
            for ids in batches:
                lm(input_ids=ids, use_cache=False)

    def backward() -> None:
        lm.requires_grad_(True)
        for ids in batches:
            lm(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            lm.zero_grad(set_to_none=True)
        lm.requires_grad_(False)

    def ours(factors: bool) -> None:
        with GradientCapture(lm, projections, factors=factors) as capture, TemporaryDirectory() as folder:
            extractor = Extractor(lm, capture, batch_size * len(rows[0]))
            layouts = {"gradients": store.gradient_layout(projected, len(rows), "float32")}
            layouts["factors"] = store.factor_layout(projected, False) if factors else {}
            store.Shard(Path(folder), 0, range(len(rows)), layouts).write(*extractor.gradients(rows).wait())

    without = {"forward": forward, "forward and full backward": backward}
    return without | {"ours": partial(ours, True), "ours, without factors": partial(ours, False)}


def make_model(name: str, random: str | None, dtype: str | None, device: str) -> PreTrainedModel:
    """Load a model, or make one of random weights."""
    torch_dtype = FLOAT_DTYPES[dtype or model.default_dtype(device)]
    if random is None:
        return model.load_model(name, torch_dtype, device)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(RANDOM_CONFIGS[random], dtype=torch_dtype).to(device).eval()


def measure(args: argparse.Namespace, lm: PreTrainedModel, block_size: int, batch_size: int, rank: int) -> dict:
    """Time the passes at one combination of the sweep; print and return the medians."""
    shapes = layers.choose_layers(lm, not args.all_layers, None)
    rows = torch.randint(0, lm.config.vocab_size, (args.batches * batch_size, block_size)).tolist()
    functions = passes(lm, shapes, rank, rows, batch_size)
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in functions}
    for repeat in range(args.repeats + 1):
        for name, function in functions.items():
            result = timed(function)
            if repeat:  # the first repeat warms up
                results[name].append(result)
    tokens = len(rows) * block_size
    speeds = {name: tokens / median(seconds for seconds, _ in values) for name, values in results.items()}
    ratios = [f / o for (f, _), (o, _) in zip(results["forward"], results["ours"], strict=True)]
    print(f"{type(lm).__name__}, {lm.dtype}, blocks of {block_size} tokens, batches of {batch_size}, rank {rank}")
    for name, values in results.items():
        peak = max(memory for _, memory in values) / 1e9
        relative = speeds[name] / speeds["forward"]
        print(f"  {name:28s} {speeds[name]:9.0f} tokens/s  {relative:.2f} of forward  {peak:.2f} GB", flush=True)
    about: dict[str, Any] = {"model": type(lm).__name__, "dtype": str(lm.dtype)}
    about |= {"block_size": block_size, "batch_size": batch_size, "rank": rank, "layers": len(shapes)}
    about |= {"tokens_per_second": speeds, "ratio": median(ratios), "ratios": ratios}
    return about | {"peak_bytes": {name: max(m for _, m in values) for name, values in results.items()}}


def main(args: argparse.Namespace) -> None:
    """Time each combination of the sweep, print tables and a JSON line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = []
    for random, dtype in product(args.random, args.dtype):
        lm = make_model(args.model_name, random, dtype, device)
        measured += [measure(args, lm, *sizes) for sizes in product(args.block_size, args.batch_size, args.rank)]
    about = {"benchmark": "extraction", "model_name": args.model_name, "device": device, "torch": torch.__version__}
    about |= {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(json.dumps(about | {"repeats": args.repeats, "measured": measured}))


if __name__ == "__main__":
    run_script(main, build_parser())
