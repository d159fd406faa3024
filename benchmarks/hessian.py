"""Seconds of each kind of Hessian for 10^4 examples and one layer, compared with the matrix products that it needs.

Writes shards of random gradients and factor sums, then times, interleaved in one run: raw, kfac, ekfac from the factor
files, and ekfac by a second pass over the gradients, all through logra.hessian.statistics, from files in the page
cache. The floors are the matrix products alone, on blocks of the same sizes in memory: torch.addmm for raw, two batched
products for the second pass. The eigenvectors (of both sides, float64) are timed apart, and their time is subtracted
from the second pass before its ratio is taken. Ratios are medians over the repeats. Prints a table and one JSON line.

    python benchmarks/hessian.py --examples 10000 --rank 64
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra import hessian, projection, store
from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script

KINDS = {  # name -> (kind, whether the gradients are in the eigenbasis already), as for hessian.statistics
    "raw": ("raw", False),
    "kfac": ("kfac", False),
    "ekfac": ("ekfac", True),
    "ekfac, second pass": ("ekfac", False),
}
FLOORS = {"raw": "floor of raw", "ekfac, second pass": "floor of the second pass"}


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--examples", type=positive_int, default=10_000, help="at least rank^2 (10000)")
    parser.add_argument("--layers", type=positive_int, default=2, help="each of rank x rank (2)")
    parser.add_argument("--rank", type=positive_int, default=64, help="(64)")
    parser.add_argument(
        "--shard_examples", type=positive_int, default=170, help="examples per shard (170, as for Llama-3-8B's MLP)"
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="of each, interleaved (5)")
    return parser


class RandomShards:
    """Shards of random gradients and factor sums in a folder: a hessian.GradientSource."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.examples, rank = folder, args.examples, args.rank
        self.projected = {f"layer{i}": (rank, rank) for i in range(args.layers)}
        starts = range(0, args.examples, args.shard_examples)
        self.shards = [range(i, min(i + args.shard_examples, args.examples)) for i in starts]
        for index, ids in enumerate(tqdm(self.shards, desc="writing", unit="shard")):
            grads = {layer: torch.randn(len(ids), rank * rank) for layer in self.projected}
            factors = {"examples": torch.tensor(len(ids)), "tokens": torch.tensor(512 * len(ids))}
            for layer, grad in grads.items():
                x, d = torch.randn(2, 2 * rank, rank)
                factors |= {f"{layer}.A": x.T @ x, f"{layer}.B": d.T @ d, f"{layer}.square": grad.square().sum(dim=0)}
            self.shard(index).write(grads, factors)

    def shard(self, index: int) -> store.Shard:
        """Return a shard, which may not be written yet."""
        grads = store.gradient_layout(self.projected, len(self.shards[index]), "float32")
        layouts = {"gradients": grads, "factors": store.factor_layout(self.projected, False)}
        return store.Shard(self.folder, index, self.shards[index], layouts)

    def read(self, name: str, shards: Iterable[int], kind: str = "gradients") -> Iterator[Tensor]:
        """Yield a tensor, shard by shard; see run_dir.RunDir.read."""
        for index in shards:
            with self.shard(index).open(kind) as file:
                yield file.read(name)


def passes(source: RandomShards, rank: int, device: str) -> dict[str, Callable[[], object]]:
    """Return what is timed: the kinds over all layers, the floors and the eigenvectors for the same number of them."""
    every = range(len(source.shards))
    blocks = [block.to(device) for block in source.read("layer0", every)]
    covs = [next(source.read(f"layer0.{side}", [0], "factors")) for side in "AB"]
    u_in, u_out = (projection.eigenbasis(cov)[1].float().to(device) for cov in covs)
    total = torch.zeros(rank**2, rank**2, device=device)

    def statistics(kind: str, rotated: bool) -> None:
        for _ in hessian.statistics(kind, source, every, lambda t: t, rotated, device):
            pass

    def for_each(function: Callable[[Tensor], object], values: list[Tensor]) -> None:
        for value in values * len(source.projected):
            function(value)

    functions: dict[str, Callable[[], object]] = {name: partial(statistics, *kind) for name, kind in KINDS.items()}
    return functions | {
        "floor of raw": partial(for_each, lambda block: total.addmm_(block.T, block), blocks),
        "floor of the second pass": partial(for_each, lambda g: u_out @ g.view(-1, rank, rank) @ u_in.T, blocks),
        "eigenvectors": partial(for_each, projection.eigenbasis, covs),
    }


def main(args: argparse.Namespace) -> None:
    """Write shards, time the passes, print a table and a JSON line."""
    if args.examples < args.rank**2:
        raise ValueError(f"expected --examples of at least rank^2 = {args.rank**2}, got {args.examples}; raise it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with TemporaryDirectory() as folder:
        functions = passes(RandomShards(Path(folder), args), args.rank, device)
        seconds: dict[str, list[float]] = {name: [] for name in functions}  # per layer
        for repeat in range(args.repeats + 1):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                if device == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first repeat warms up
                    seconds[name].append((time.perf_counter() - start) / args.layers)
    eigen, result = seconds.pop("eigenvectors"), {}
    for name, values in seconds.items():
        result[name] = {"seconds_per_10000_examples": median(values) / args.examples * 1e4}
        if name in FLOORS:
            if name == "ekfac, second pass":
                values = [whole - vectors for whole, vectors in zip(values, eigen, strict=True)]
            result[name]["times_floor"] = median(a / b for a, b in zip(values, seconds[FLOORS[name]], strict=True))
        if name in KINDS:
            layout = store.hessian_layout(KINDS[name][0], {"": (args.rank, args.rank)}, args.examples, KINDS[name][1])
            sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in layout.values()]
            result[name]["bytes"] = sum(sizes[:-2])  # without the two counts
    print(f"{args.layers} layers of {args.rank} x {args.rank}, {args.examples} examples, on the {device}; per layer:")
    for name, row in result.items():
        line = f"{name:26s} {row['seconds_per_10000_examples']:8.4f} s for 10^4 examples"
        line += f"  {row['bytes'] / 1e6:7.3f} MB" if "bytes" in row else ""
        print(line + (f"  {row['times_floor']:.2f} times its floor" if "times_floor" in row else ""))
    print(f"{'eigenvectors':26s} {median(eigen):8.4f} s, for any number of examples")
    about = {"benchmark": "hessian", **vars(args), "device": device, "torch": torch.__version__}
    about |= {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(json.dumps(about | {"eigenvectors_seconds": median(eigen), "layer": result}))


if __name__ == "__main__":
    run_script(main, build_parser())
