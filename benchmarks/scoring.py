"""Speed of scoring: gigabytes of stored gradients per second, compared with a plain read of the same files.

Writes shards of random gradients. Then times, interleaved in one run: a plain read of the files (into one buffer, no
checksum), and ours for each number of queries (checksums, one matrix product for each layer and shard). The product's
peak is the best rate of that product alone, on data in the processor's cache. With --cold the files are dropped from
the page cache before each pass. With several store types the passes of all are interleaved, and the table has the
ratio of each one's examples/s to the first one's, by wall time and by the processor's time, which other programs
disturb less. --device cuda scores on a GPU. Prints a table and one JSON line.

    python benchmarks/scoring.py --examples 2000 --queries 1 10 100 1000
    python benchmarks/scoring.py --examples 16384 --layers 4 --queries 1 10 100 --store_dtype float32 int8 int4 int1
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
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra import influence, quantise, store
from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script


class Seconds(NamedTuple):
    """The time of one pass, and the processor's time of all threads."""

    wall: float
    cpu: float


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
    parser.add_argument("--store_dtype", choices=kinds, nargs="+", default=["float32"], help="(float32)")
    parser.add_argument("--shard_mb", type=positive_int, default=256, help="size of a shard in MB (256)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="of each, interleaved (5)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each pass")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="which scores (cpu)")
    parser.add_argument("--folder", type=Path, help="where a temporary folder for the shards is made (the system's)")
    return parser


def write_shards(folder: Path, store_dtype: str, args: argparse.Namespace) -> list[store.Shard]:
    """Write shards of random gradients into a new folder, and return them."""
    folder.mkdir()
    k, shards = args.rank**2, []
    projected = {f"layer{i}": (args.rank, args.rank) for i in range(args.layers)}
    size = max(1, args.shard_mb * 10**6 // (args.layers * quantise.stored_bytes(k, store_dtype)))
    for index, first in enumerate(tqdm(range(0, args.examples, size), desc="writing", unit="shard")):
        ids, grads = range(first, min(first + size, args.examples)), dict[str, torch.Tensor]()
        for layer in projected:
            grads |= quantise.stored_tensors(layer, torch.randn(len(ids), k), store_dtype)
        layouts = {"gradients": store.gradient_layout(projected, len(ids), store_dtype), "factors": {}}
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


def time_passes(
    folder: Path, shards: dict[str, list[store.Shard]], args: argparse.Namespace
) -> dict[str, dict[int, list[Seconds]]]:
    """Return store type -> number of queries -> times of each repeat; those of the plain read for 0 queries."""
    k, passes = args.rank**2, dict[tuple[str, int], Callable[[], None]]()
    for kind, parts in shards.items():
        buffer_size = len(parts[0].ids) * quantise.stored_bytes(k, kind)
        passes[kind, 0] = partial(plain_read, folder / kind, buffer_size)
        for count in args.queries:
            queries = {f"layer{i}": torch.randn(count, k) for i in range(args.layers)}
            passes[kind, count] = partial(score, parts, queries, kind, args.device)
    seconds: dict[str, dict[int, list[Seconds]]] = {kind: {0: [], **{q: [] for q in args.queries}} for kind in shards}
    for repeat in range(args.repeats + 1):
        for (kind, count), function in passes.items():
            if args.cold:
                drop_cache(folder / kind)
            start, start_cpu = time.perf_counter(), time.process_time()
            function()
            if repeat:  # the first repeat warms up
                found = Seconds(time.perf_counter() - start, time.process_time() - start_cpu)
                seconds[kind][count].append(found)
    return seconds


def summary(n: int, total: int, seconds: dict[int, list[Seconds]], args: argparse.Namespace) -> dict[str, Any]:
    """Print a store type's table and return its numbers; n is the examples of a shard, total the bytes of all."""
    k, read = args.rank**2, total / median(t.wall for t in seconds[0]) / 1e9
    print(f"plain read {read:.1f} GB/s, {'cold' if args.cold else 'warm'}; {total / 1e9:.2f} GB")
    result: dict[str, Any] = {"bytes": total, "read_gb_per_s": read, "queries": {}}
    for count in args.queries:
        wall = median(t.wall for t in seconds[count])
        rate, flops = total / wall / 1e9, 2 * args.examples * args.layers * k * count / wall
        rows = count + (-count % 16 if count > 4 else 0)  # as influence.score_shards pads them
        share = flops / product_peak(n, k, rows, args.device)
        result["queries"][count] = {"gb_per_s": rate, "of_read": rate / read, "of_product_peak": share}
        print(
            f"{count:5d} queries  {rate:6.2f} GB/s  {rate / read:.2f} of the read  {flops / 1e9:6.1f} GFLOP/s  "
            f"{share:.2f} of the product's peak  {args.examples / wall:.0f} examples/s"
        )
    return result


def print_ratios(seconds: dict[str, dict[int, list[Seconds]]], args: argparse.Namespace) -> None:
    """Print the examples/s of each store type as multiples of the first one's: median (least, most) of the repeats."""
    first, *others = args.store_dtype
    for kind in others:
        for count in args.queries:
            ratios = []
            for clock in range(2):
                found = [a[clock] / b[clock] for a, b in zip(seconds[first][count], seconds[kind][count], strict=True)]
                ratios.append(f"{median(found):.2f} ({min(found):.2f}, {max(found):.2f})")
            print(f"{kind}, {count} queries: {ratios[0]} times {first}'s examples/s; by processor time {ratios[1]}")


def main(args: argparse.Namespace) -> None:
    """Write shards, time the passes, print tables and a JSON line."""
    with TemporaryDirectory(dir=args.folder) as made:
        folder, totals = Path(made), {}
        shards = {kind: write_shards(folder / kind, kind, args) for kind in args.store_dtype}
        for kind in shards:
            paths = [path for path in (folder / kind).glob("*.safetensors") if "factors" not in path.name]
            totals[kind] = sum(path.stat().st_size for path in paths)
        seconds = time_passes(folder, shards, args)
    results = {}
    for kind, parts in shards.items():
        print(f"{kind}: ", end="")
        results[kind] = summary(len(parts[0].ids), totals[kind], seconds[kind], args)
    print_ratios(seconds, args)
    about = {"benchmark": "scoring", "examples": args.examples, "layers": args.layers, "rank": args.rank}
    about |= {"cold": args.cold, "device": args.device, "cores": os.cpu_count()}
    about |= {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps(about | {"store_dtype": results}))


if __name__ == "__main__":
    run_script(main, build_parser())
