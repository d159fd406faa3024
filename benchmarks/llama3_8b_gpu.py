"""Extraction and scoring with the shape of Llama-3-8B and random weights in bfloat16, on one GPU.

MLP only, rank 64, blocks of 512 tokens; fewer transformer blocks where half of the memory does not hold all 32. Times
the bare forward pass, with logits, and ours (gradients, factor sums and their copies to the CPU; batches as large as
--batch_tokens auto finds). One more pass of ours under torch's profiler shows how its time divides: kernels, copies
beside no kernel, and gaps. Then writes shards and scores 10 queries. The share of the peak (mfu) counts the FLOPs of
benchmarks/plan.py: all, and those of forward and backward pass alone. Prints a table and one JSON line. Without a GPU
it says so and ends; --tiny runs a tiny shape there too.

    python benchmarks/llama3_8b_gpu.py
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.plan import LLAMA3_8B, PEAK_FLOPS, attention_matrices, flops_per_token, mlp_matrices, size
from logra import influence, projection, store
from logra.hooks import GradientCapture
from logra.models import layers
from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script
from logra.stages.gradients import Extractor

TINY = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, also without a GPU")
    parser.add_argument("--layers", type=positive_int, help="transformer blocks (as many as half of the memory holds)")
    parser.add_argument("--block_size", type=positive_int, default=512, help="(512)")
    parser.add_argument("--rank", type=positive_int, default=64, help="(64)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="of each, interleaved (5)")
    parser.add_argument("--examples", type=positive_int, default=512, help="examples to score (512)")
    return parser


def seconds_of(function: Callable[[], object]) -> float:
    """Return the seconds of a call, with those of its work on the GPU."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def scoring_rate(projected: projection.Shapes, examples: int, device: str) -> float:
    """Return the bytes of stored gradients that are scored per second, for 10 queries, from the page cache."""
    k = {layer: r_out * r_in for layer, (r_out, r_in) in projected.items()}
    size = max(1, 2**28 // (4 * sum(k.values())))
    shards = [range(i, min(i + size, examples)) for i in range(0, examples, size)]
    queries = {layer: torch.randn(10, n) for layer, n in k.items()}

    with TemporaryDirectory() as name:

        def shard(index: int) -> store.Shard:
            grads = store.gradient_layout(projected, len(shards[index]), "float32")
            return store.Shard(Path(name), index, shards[index], {"gradients": grads, "factors": {}})

        for index, ids in enumerate(shards):
            shard(index).write({layer: torch.randn(len(ids), n) for layer, n in k.items()}, {})

        def score() -> None:
            for _, dots, _ in influence.score_shards(
                lambda i: shard(i).open(), range(len(shards)), queries, {layer: [] for layer in k}, device
            ):
                dots[""].cpu()

        seconds = [seconds_of(score) for _ in range(4)][1:]
    return 4 * examples * sum(k.values()) / median(seconds)


def gradients(extractor: Extractor, rows: list[list[int]]) -> None:
    """Compute the gradients of examples, and copy them to the CPU."""
    extractor.gradients(rows).wait()


def shape(args: argparse.Namespace, device: str) -> LlamaConfig:
    """Return the model's configuration, with the number of blocks that the user gave or the memory holds."""
    config = copy.deepcopy(TINY if args.tiny else LLAMA3_8B)
    if args.layers:
        config.num_hidden_layers = args.layers
    elif device == "cuda":
        head = 2 * config.vocab_size * config.hidden_size  # weights of head and embedding, 2 bytes each
        rest = torch.cuda.get_device_properties().total_memory / 2 - 2 * head
        fitting = int(rest / 2 / size(mlp_matrices(config) + attention_matrices(config)))
        config.num_hidden_layers = max(1, min(config.num_hidden_layers, fitting))
    return config


def union(intervals: list[tuple[float, float]]) -> float:
    """Return the length that (begin, end) intervals cover together."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def shares_of_time(events: list[dict]) -> dict[str, float]:
    """Return the shares of kernels, of copies beside no kernel, and of gaps, of a trace's pass named "ours".

    Args:
        events: `traceEvents` of torch's profiler, with times in microseconds.
    """
    (whole,) = (e for e in events if e.get("cat") == "user_annotation" and e["name"] == "ours")

    def intervals(*kinds: str) -> list[tuple[float, float]]:
        return [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds]

    kernels, busy = union(intervals("kernel")), union(intervals("kernel", "gpu_memcpy", "gpu_memset"))
    shares = {"kernels": kernels, "copies beside no kernel": busy - kernels, "gaps": whole["dur"] - busy}
    copies = {"all copies": union(intervals("gpu_memcpy", "gpu_memset"))}
    return {name: value / whole["dur"] for name, value in (shares | copies).items()}


def profiled(function: Callable[[], object]) -> dict[str, float]:
    """Return the shares of a call's time; see shares_of_time."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found, record_function("ours"):
        seconds_of(function)
    with TemporaryDirectory() as folder:
        found.export_chrome_trace(f"{folder}/trace.json")
        return shares_of_time(json.loads(Path(folder, "trace.json").read_text())["traceEvents"])


def shares_of_peak(flops: dict[str, float], tokens_per_second: float, device: str) -> dict[str, float]:
    """Return the mfu with all FLOPs and with those of forward and backward pass alone; none for an unknown device."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((value for key, value in PEAK_FLOPS.items() if name.endswith(key)), None)
    passes = [value for part, value in flops.items() if "forward" in part or "backward" in part]
    counted = {"mfu": sum(flops.values()), "mfu_forward_and_backward": sum(passes)}
    return {key: value * tokens_per_second / peak for key, value in counted.items()} if peak else {}


def extraction(args: argparse.Namespace, device: str) -> tuple[dict, projection.Shapes]:
    """Build the model and time its passes; return the results, and layer -> (r_out, r_in)."""
    config = shape(args, device)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    shapes = layers.choose_layers(lm, True, None)
    projected = projection.projected_shapes(shapes, args.rank, args.rank)
    capture = GradientCapture(lm, projection.draw(shapes, projected, seed=0), factors=True)
    with capture:
        tokens = Extractor(lm, capture, args.block_size).find_batch_tokens(args.block_size, 64)
    rows = torch.randint(0, config.vocab_size, (4 * tokens // args.block_size, args.block_size)).tolist()
    batches = torch.tensor(rows, device=device).split(tokens // args.block_size)

    def forward() -> None:
        with torch.no_grad():
            for ids in batches:
                lm(input_ids=ids, use_cache=False)

    seconds: dict[str, list[float]] = {"forward": [], "ours": []}
    for _ in range(args.repeats + 1):
        seconds["forward"].append(seconds_of(forward))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # so that the last peak is that of ours
        with capture:
            extractor = Extractor(lm, capture, tokens)
            extractor.gradients(rows[:1]).wait()  # moves the projections to the device
            seconds["ours"].append(seconds_of(partial(gradients, extractor, rows)))
    count = len(rows) * args.block_size
    speeds = {name: count / median(values[1:]) for name, values in seconds.items()}  # the first repeat warms up
    flops = flops_per_token(config, args.block_size, args.rank)
    result = {"tokens_per_second": speeds, "batch_tokens": tokens, "flops_per_token": sum(flops.values())}
    result |= {"blocks": config.num_hidden_layers} | shares_of_peak(flops, speeds["ours"], device)
    result |= {"peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}
    with capture:
        extractor = Extractor(lm, capture, tokens)
        extractor.gradients(rows[:1]).wait()
        shares = profiled(partial(gradients, extractor, rows)) if device == "cuda" else None
    return result | {"shares_of_time": shares}, projected


def main(args: argparse.Namespace) -> None:
    """Time extraction and scoring; print a table and a JSON line."""
    if not torch.cuda.is_available() and not args.tiny:
        print(
            json.dumps({"benchmark": "llama3_8b_gpu", "skipped": "expected a GPU, got none; --tiny runs without one"})
        )
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result, projected = extraction(args, device)
    stored = 4 * sum(r_out * r_in for r_out, r_in in projected.values())
    result |= {"scoring_bytes_per_second": scoring_rate(projected, args.examples, device)}
    result |= {"hours_for_1e9_tokens": 1e9 / result["tokens_per_second"]["ours"] / 3600}
    result |= {"bytes_for_1e9_tokens": 1e9 / args.block_size * stored}
    for key, value in result.items():
        print(f"{key:26s} {value if value is None or isinstance(value, dict) else f'{value:.4g}'}")
    about = {"benchmark": "llama3_8b_gpu", "device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    print(json.dumps(about | {"torch": torch.__version__, "dtype": "bfloat16"} | vars(args) | result))


if __name__ == "__main__":
    run_script(main, build_parser())
