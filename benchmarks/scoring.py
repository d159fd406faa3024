"""Speed of scoring: gigabytes of stored gradients per second, compared with a plain read of the same files.

Writes shards of random gradients. Then times, interleaved in one run: a plain read of the files (into one buffer, no
checksum), and ours for each number of queries (checksums, one matrix product for each layer and shard). The product's
peak is the best rate of that product alone, on data in the processor's cache. With --cold the files are dropped from
the page cache before each pass. --device cuda scores on a GPU. Prints a table and one JSON line.

    python benchmarks/scoring.py --examples 2000 --queries 1 10 100 1000
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra import influence, quantise, store
from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--examples", type=positive_int, default=2000, help="(2000)")
    parser.add_argument(
        "--layers", type=positive_int, default=90, help="each of rank x rank (90, as in SmolLM2-135M's MLP)"
    )
    parser.add_argument("--rank", type=positive_int, default=64, help="(64)")
    parser.add_argument("--queries", type=positive_int, nargs="+", default=[1, 10, 100, 1000], help="(1 10 100 1000)")
    kinds = [*quantise.FLOAT_DTYPES, "int8", "int4", "int1"]
    parser.add_argument("--store_dtype", choices=kinds, default="float32", help="(float32)")
    parser.add_argument("--shard_mb", type=positive_int, default=256, help="size of a shard in MB (256)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="of each, interleaved (5)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each pass")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="which scores (cpu)")
    parser.add_argument("--folder", type=Path, help="where a temporary folder for the shards is made (the system's)")
    return parser


def write_shards(folder: Path, args: argparse.Namespace) -> list[store.Shard]:
    """Write shards of random gradients, and return them."""
    k, shards = args.rank**2, []
    projected = {f"layer{i}": (args.rank, args.rank) for i in range(args.layers)}
    size = max(1, args.shard_mb * 10**6 // (args.layers * quantise.stored_bytes(k, args.store_dtype)))
    for index, first in enumerate(tqdm(range(0, args.examples, size), desc="writing", unit="shard")):
        ids, grads = range(first, min(first + size, args.examples)), dict[str, torch.Tensor]()
        for layer in projected:
            grads |= quantise.stored_tensors(layer, torch.randn(len(ids), k), args.store_dtype)
        layouts = {"gradients": store.gradient_layout(projected, len(ids), args.store_dtype), "factors": {}}
        shards.append(store.Shard(folder, index, ids, layouts))
        shards[-1].write(grads, {})
    return shards


def drop_cache(folder: Path) -> None:
    """Ask the kernel to drop the files from the page cache."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(folder: Path, size: int) -> None:
    """Read all gradients, `size` bytes at a time, into one buffer."""
    buffer = memoryview(bytearray(size))
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        if "factors" not in path.name:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def score(shards: list[store.Shard], queries: dict[str, torch.Tensor], store_dtype: str, device: str) -> None:
    """Score all shards, as compute_influence.py does."""
    found = influence.score_shards(
        lambda index: shards[index].open(),
        range(len(shards)),
        queries,
        {layer: [] for layer in queries},
        device,
        quantise.INTEGER_BITS.get(store_dtype),
    )
    count = len(next(iter(queries.values())))
    scores = torch.zeros(shards[-1].ids.stop, count)
    for shard, dots, _ in found:
        scores[shards[shard].ids.start : shards[shard].ids.stop] = dots[""][:, :count]


def product_peak(n: int, k: int, rows: int, device: str) -> float:
    """Return the best rate, in FLOP/s, of the product alone, at the sizes of one layer and shard."""
    z, p, out = (torch.randn(size, device=device) for size in ((n, k), (rows, k), (n, rows)))
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        out.addmm_(z, p.T)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n * k * rows / (time.perf_counter() - start))
    return best


def time_passes(folder: Path, shards: list[store.Shard], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each repeat of the plain read, "read", and of scoring each number of queries."""
    k = args.rank**2
    buffer_size = len(shards[0].ids) * quantise.stored_bytes(k, args.store_dtype)
    passes: dict[str, Callable[[], None]] = {"read": lambda: plain_read(folder, buffer_size)}
    for count in args.queries:
        queries = {f"layer{i}": torch.randn(count, k) for i in range(args.layers)}
        passes[str(count)] = partial(score, shards, queries, args.store_dtype, args.device)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(args.repeats + 1):
        for name, function in passes.items():
            if args.cold:
                drop_cache(folder)
            start = time.perf_counter()
            function()
            if repeat:  # the first repeat warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main(args: argparse.Namespace) -> None:
    """Write shards, time the passes, print a table and a JSON line."""
    k = args.rank**2
    with TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        shards = write_shards(folder, args)
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors") if "factors" not in path.name)
        seconds = time_passes(folder, shards, args)
    result: dict[str, Any] = {"read_gb_per_s": total / median(seconds.pop("read")) / 1e9, "queries": {}}
    print(f"plain read {result['read_gb_per_s']:.1f} GB/s, {'cold' if args.cold else 'warm'}; {total / 1e9:.2f} GB")
    for name, values in seconds.items():
        rate = total / median(values) / 1e9
        flops = 2 * args.examples * args.layers * k * int(name) / median(values)
        rows = int(name) + (-int(name) % 16 if int(name) > 4 else 0)  # as influence.score_shards pads them on a CPU
        share = flops / product_peak(len(shards[0].ids), k, rows, args.device)
        result["queries"][name] = {
            "gb_per_s": rate,
            "of_read": rate / result["read_gb_per_s"],
            "of_product_peak": share,
        }
        per_second = args.examples / median(values)
        print(
            f"{name:>5s} queries  {rate:6.2f} GB/s  {rate / result['read_gb_per_s']:.2f} of the read  "
            f"{flops / 1e9:6.1f} GFLOP/s  {share:.2f} of the product's peak  {per_second:.0f} examples/s"
        )
    about = {"benchmark": "scoring", "examples": args.examples, "layers": args.layers, "rank": args.rank}
    about |= {
        "store_dtype": args.store_dtype,
        "cold": args.cold,
        "device": args.device,
        "bytes": total,
        "cores": os.cpu_count(),
    }
    about |= {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps(about | result))


if __name__ == "__main__":
    run_script(main, build_parser())
