"""Speed and memory of extraction against the bare forward pass, in one process and one run, interleaved.

Times a batch of random tokens through: the plain forward pass with logits; forward and full backward (every weight's
gradient); and ours (projected per-example gradients, factor sums, copied to the shard's buffer). Prints medians, the
ratio, and one JSON line.

    python benchmarks/extraction.py --model_name models/SmolLM2-135M-Instruct --block_size 256
"""

import argparse
import json
import os
import platform
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra import model, projection, run
from logra.extraction import gradients
from logra.hooks import GradientCapture
from logra.store import DTYPES


def build_parser() -> run.Parser:
    """Return the command line's parser."""
    parser = run.Parser(description=__doc__)
    parser.add_argument("--model_name", default=model.DEFAULT_MODEL, help="(%(default)s)")
    parser.add_argument("--block_size", type=run.positive_int, default=256, help="tokens in an example (256)")
    parser.add_argument("--batch_size", type=run.positive_int, default=4, help="examples in a batch (4)")
    parser.add_argument("--rank", type=run.positive_int, default=64, help="(64)")
    parser.add_argument("--all_layers", action="store_true", help="attention too, not the MLP only")
    parser.add_argument("--repeats", type=run.positive_int, default=7, help="of each, interleaved (7)")
    return parser


class PeakMemory:
    """Peak of the process's resident memory (or the GPU's allocated memory) inside a with block, in bytes."""

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


def timed(function) -> tuple[float, int]:
    """Return (seconds, peak bytes) of a call."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, memory.bytes


def main(args: argparse.Namespace) -> None:
    """Time the three, print a table and a JSON line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = model.load_model(args.model_name, DTYPES[model.default_dtype(device)], device)
    shapes = model.choose_layers(lm, not args.all_layers, None)
    projections = projection.draw(shapes, projection.projected_shapes(shapes, args.rank, args.rank), seed=0)
    rows = torch.randint(0, lm.config.vocab_size, (args.batch_size, args.block_size)).tolist()
    ids = torch.tensor(rows, device=device)

    def forward() -> None:
        with torch.no_grad():
            lm(input_ids=ids, use_cache=False)

    def backward() -> None:
        lm.requires_grad_(True)
        lm(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        lm.zero_grad(set_to_none=True)
        lm.requires_grad_(False)

    def ours() -> None:
        gradients(lm, capture, rows, 0, (args.batch_size * args.block_size, None))

    runs = {"forward": forward, "forward and full backward": backward, "ours": ours}
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    capture = GradientCapture(lm, projections, factors=True)
    for repeat in range(args.repeats + 1):
        for name, function in runs.items():
            with capture if name == "ours" else nullcontext():
                result = timed(function)
            if repeat:  # the first one warms up
                results[name].append(result)
    tokens = args.batch_size * args.block_size
    speeds = {name: tokens / median(seconds for seconds, _ in values) for name, values in results.items()}
    for name, values in results.items():
        peak = max(memory for _, memory in values) / 1e9
        print(
            f"{name:28s} {speeds[name]:9.0f} tokens/s  {speeds[name] / speeds['forward']:.2f} of forward  {peak:.2f} GB"
        )
    about = {"benchmark": "extraction", **vars(args), "device": device, "torch": torch.__version__}
    about |= {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "layers": len(shapes)}
    about |= {"tokens_per_second": speeds, "ratio": speeds["ours"] / speeds["forward"]}
    print(json.dumps(about | {"peak_bytes": {name: max(m for _, m in values) for name, values in results.items()}}))


if __name__ == "__main__":
    run.guarded(main, build_parser())
