"""How extraction scales on a CPU: with the number of processes, with examples N, their tokens T, and the rank.

Processes: extract_log.py on full blocks of Python's manual, as one process and as two (accelerate launch), each with
one thread. The clock runs from the first shard's manifest to the last one's (modification times of gradients/*.json).
The tokens are those of all shards but the first one of each process. So start-up, tokenising and Hessian are left out.

N, T and rank: seconds and peak memory of the gradients of N random examples of T tokens, MLP only, with all threads,
after a batch as warm-up. Each point has a process of its own. One of the three varies, the others stay at --base. Peak
memory is that of the process since its start (ru_maxrss), with weights and imports; `before` is its peak before the
first example. With --repeats times are medians. Prints tables and one JSON line.

    python benchmarks/scaling.py --N 8 32 64 --rank 16 64 256
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra import projection
from logra.hooks import GradientCapture
from logra.models import layers, model
from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import CPU_BATCH_TOKENS, DEFAULT_MODEL
from logra.stages.gradients import Extractor

ROOT = Path(__file__).resolve().parent.parent
AXES = ("N", "T", "rank")
LAUNCH = "-m accelerate.commands.launch --num_processes 2 --num_machines 1 --multi_gpu"
SHARDS = 8  # in a run of extract_log.py
PLOT = ROOT / "benchmarks/results/scaling.png"


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    several: dict[str, Any] = {"type": positive_int, "nargs": "+"}
    parser.add_argument("--model_name", default=DEFAULT_MODEL, help="(%(default)s)")
    parser.add_argument(
        "--shard_examples", type=positive_int, default=4, help="for processes: examples in each of 8 shards (4)"
    )
    parser.add_argument("--block_size", type=positive_int, default=128, help="for processes (128)")
    parser.add_argument("--N", **several, default=[8, 32, 64], help="examples (8 32 64)")
    parser.add_argument("--T", **several, default=[64, 128, 256, 512], help="tokens in an example (64 128 256 512)")
    parser.add_argument("--rank", **several, default=[16, 64, 256], help="of both sides (16 64 256)")
    point: dict[str, Any] = {"type": positive_int, "nargs": 3, "metavar": AXES}
    parser.add_argument("--base", **point, default=[8, 128, 64], help="values of those that do not vary (8 128 64)")
    parser.add_argument("--point", **point, help="measure only this point, in this process")
    parser.add_argument("--repeats", type=positive_int, default=1, help="of everything, interleaved (1)")
    parser.add_argument("--plot", action="store_true", help="save benchmarks/results/scaling.png; needs matplotlib")
    return parser


def run_python(words: list[str], **environment: str) -> str:
    """Run this interpreter, without a GPU, and return what it prints."""
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run([sys.executable, *words], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"expected status 0, got {done.returncode}: {' '.join(words)}: {done.stderr[-1000:]}")
    return done.stdout


def extraction_speed(args: argparse.Namespace, processes: int) -> float:
    """Return the tokens per second of extract_log.py with 1 or 2 processes."""
    with TemporaryDirectory() as folder:
        flags = "--data_name pydoc --pack --mlp_only --hessian ekfac --basis projected"
        flags += f" --max_examples {SHARDS * args.shard_examples} --shard_examples {args.shard_examples}"
        flags += f" --block_size {args.block_size}"
        words = [*(LAUNCH.split() if processes > 1 else []), str(ROOT / "extract_log.py"), *flags.split()]
        run_python([*words, "--model_name", args.model_name, "--log_dir", f"{folder}/log"], OMP_NUM_THREADS="1")
        written = [path.stat().st_mtime for path in Path(folder, "log/gradients").glob("*.json")]
        tokens = json.loads(Path(folder, "log/run.json").read_text())["data"]["tokens"]
    if tokens != SHARDS * args.shard_examples * args.block_size:
        raise ValueError(f"expected full blocks in {SHARDS} shards, got {tokens} tokens; lower --shard_examples")
    return tokens * (1 - processes / SHARDS) / (max(written) - min(written))


def measure(name: str, n: int, t: int, rank: int) -> dict:
    """Return the seconds and the peak memory of the gradients of n examples of t tokens."""
    lm = model.load_model(name, torch.float32)
    shapes = layers.choose_layers(lm, True, None)
    projections = projection.draw(shapes, projection.projected_shapes(shapes, rank, rank), seed=0)
    rows = torch.randint(0, lm.config.vocab_size, (n, t)).tolist()
    with GradientCapture(lm, projections, factors=True) as capture:
        extractor = Extractor(lm, capture, CPU_BATCH_TOKENS)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        extractor.gradients(rows[: max(1, CPU_BATCH_TOKENS // t)]).wait()
        begin = time.perf_counter()
        extractor.gradients(rows).wait()
        seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_bytes": 1024 * peak, "before_bytes": 1024 * before}  # Linux counts in KiB


def plot(points: list[dict]) -> None:
    """Draw seconds and peak memory against each of the three."""
    from matplotlib.figure import Figure  # not at the top: only --plot needs matplotlib
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(2, 3, sharey="row")
    for column, axis in enumerate(AXES):
        chosen = [p for p in points if p["varied"] == axis]
        for row, (key, unit, label) in enumerate((("seconds", 1, "seconds"), ("peak_bytes", 1e9, "peak GB"))):
            panel = panels[row, column]
            panel.plot([p[axis] for p in chosen], [p[key] / unit for p in chosen], "o-")
            panel.set(xlabel=axis, xscale="log", yscale="log" if row == 0 else "linear")
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_xticks([p[axis] for p in chosen], [p[axis] for p in chosen])
            panel.set(**({} if row else {"title": ", ".join(f"{a} {chosen[0][a]}" for a in AXES if a != axis)}))
            panel.set(**({} if column else {"ylabel": label}))
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=150)


def main(args: argparse.Namespace) -> None:
    """Measure all, each in a process of its own; print tables and a JSON line."""
    if args.point:
        print(json.dumps(measure(args.model_name, *args.point)))
        return
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("expected matplotlib for --plot, got none; run pip install matplotlib, or leave --plot out")
    points = []
    for i, axis in enumerate(AXES):
        for value in getattr(args, axis):
            sizes = [*args.base[:i], value, *args.base[i + 1 :]]
            points.append({"varied": axis, **dict(zip(AXES, sizes, strict=True))})
    speeds: dict[int, list[float]] = {1: [], 2: []}
    results: dict[tuple, list[dict]] = {tuple(p[a] for a in AXES): [] for p in points}
    for _ in range(args.repeats):
        for count, values in speeds.items():
            values.append(extraction_speed(args, count))
            print(f"{count} process{'es' * (count > 1)} of one thread: {values[-1]:.0f} tokens/s", flush=True)
        for sizes, values in results.items():
            words = [__file__, "--model_name", args.model_name, "--point", *map(str, sizes)]
            values.append(json.loads(run_python(words).splitlines()[-1]))
    speedup = median(two / one for one, two in zip(*speeds.values(), strict=True))
    print(f"two processes are {speedup:.2f} times as fast as one")
    print("varied     N     T  rank  seconds  tokens/s  peak GB  before")
    for p in points:
        measured = results[tuple(p[a] for a in AXES)]
        p["seconds"] = median(m["seconds"] for m in measured)
        p |= {key: max(m[key] for m in measured) for key in ("peak_bytes", "before_bytes")}
        print(
            f"{p['varied']:6s} {p['N']:5d} {p['T']:5d} {p['rank']:5d} {p['seconds']:8.2f} "
            f"{p['N'] * p['T'] / p['seconds']:9.0f} {p['peak_bytes'] / 1e9:8.2f} {p['before_bytes'] / 1e9:7.2f}"
        )
    if args.plot:
        plot(points)
    about = {"benchmark": "scaling", "model_name": args.model_name, "torch": torch.__version__}
    about |= {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    about |= {key: getattr(args, key) for key in ("repeats", "shard_examples", "block_size")}
    print(json.dumps(about | {"tokens_per_second": speeds, "speedup": speedup, "points": points}))


if __name__ == "__main__":
    run_script(main, build_parser())
