"""What a run on a GPU costs, computed from the shape of Llama-3-8B: FLOPs, bytes, and the rates that follow.

Nothing is measured. Prints the tables of docs/gpu.md and one JSON line; tests/project compares the page with them, and
the FLOPs with those that torch counts in a tiny model.

    python benchmarks/plan.py
    python benchmarks/plan.py --share 0.55 --block_size 2048    # with a share that was measured, and longer examples
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra.quantise import stored_bytes
from logra.runtime.flag_types import positive, positive_int
from logra.runtime.flags import Parser, run_script

LLAMA3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
)  # fmt: skip
PEAK_FLOPS = {  # end of the device's name -> dense bfloat16 FLOP/s, from the data sheets of NVIDIA
    "H100 80GB HBM3": 989e12, "H200": 989e12, "GH200 480GB": 989e12, "A100-SXM4-80GB": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12,
}  # fmt: skip
BF16, FP32, FP64 = 989e12, 67e12, 67e12  # FLOP/s of an H100 SXM; FP64 on tensor cores
SHARE = 0.4  # of the peak, assumed
PCIE, DISK = 25e9, 5e9  # bytes/s, assumed: PCIe 4.0 x16 in one direction, and a fast NVMe disk
EXAMPLES, TOKENS = 1e6, 1e9  # of what is scored, and of what is extracted
STORES = [  # rank, store type, its preset
    (64, "float32", "`--preset paper`"), (64, "bfloat16", ""), (136, "float32", ""), (136, "int8", ""),
    (136, "int4", ""), (136, "int1", "`--preset best`"), (136, "none", ""),
]  # fmt: skip


def attention_matrices(config: LlamaConfig) -> list[tuple[int, int]]:
    """Return the (d_out, d_in) of q, k, v and o of a block."""
    width = config.hidden_size
    head = width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return [(queries, width), (keys, width), (keys, width), (width, queries)]


def mlp_matrices(config: LlamaConfig) -> list[tuple[int, int]]:
    """Return the (d_out, d_in) of gate, up and down of a block; --mlp_only tracks them."""
    width, wide = config.hidden_size, config.intermediate_size
    return [(wide, width), (wide, width), (width, wide)]


def size(matrices: list[tuple[int, int]]) -> int:
    """Return the number of weights of some matrices."""
    return sum(d_out * d_in for d_out, d_in in matrices)


def flops_per_token(config: LlamaConfig, block_size: int, rank: int) -> dict[str, float]:
    """Return the FLOPs of each part of the extraction, per token of blocks of `block_size` tokens.

    A product of [a, b] and [b, c] is 2abc FLOPs. Attention is causal: half of its products. The graph starts at the
    first tracked layers, gate and up of the first block, so nothing before their outputs has a backward pass.
    """
    blocks, mlp, attention = config.num_hidden_layers, mlp_matrices(config), attention_matrices(config)
    scores = 2 * block_size * config.hidden_size  # the two causal products of a block: QK^T and PV
    head = 2 * config.vocab_size * config.hidden_size
    sides = [sum(rank * width for width in widths if rank < width) for widths in zip(*mlp, strict=True)]
    reduced = [(min(rank, d_out), min(rank, d_in)) for d_out, d_in in mlp]
    return {
        "forward pass of the blocks": blocks * (2 * size(mlp + attention) + scores),
        "backward pass of the blocks, activations only": (
            2 * size(mlp[2:]) + (blocks - 1) * (2 * size(mlp + attention) + 2 * scores)
        ),
        "head, forward: logits": head,
        "head, backward: gradient of its input": head,
        "projections of inputs, x P_in^T": 2 * blocks * sides[1],
        "projections of output gradients, d P_out^T": 2 * blocks * sides[0],
        "gradients, sum over tokens of d x^T": 2 * blocks * size(reduced),
        "factor sums A and B (kfac, ekfac)": 2 * blocks * sum(r_out**2 + r_in**2 for r_out, r_in in reduced),
    }


def tokens_per_second(config: LlamaConfig, block_size: int, rank: int, share: float = SHARE) -> float:
    """Return the tokens/s of the extraction at a share of the peak."""
    return share * BF16 / sum(flops_per_token(config, block_size, rank).values())


def coordinates(config: LlamaConfig, rank: int | None) -> list[int]:
    """Return k of each tracked matrix; without a rank there is no projection."""
    sizes = [(min(rank or d_out, d_out), min(rank or d_in, d_in)) for d_out, d_in in mlp_matrices(config)]
    return config.num_hidden_layers * [r_out * r_in for r_out, r_in in sizes]


def example_bytes(config: LlamaConfig, rank: int | None, store_dtype: str) -> int:
    """Return the bytes that an example's gradients take on their way to the CPU and in a shard."""
    return sum(stored_bytes(k, store_dtype) for k in coordinates(config, rank))


def memory_bytes(config: LlamaConfig, rank: int) -> tuple[float, float]:
    """Return the bytes of the weights and of the projections on the GPU, in bfloat16."""
    mlp, blocks = mlp_matrices(config), config.num_hidden_layers
    weights = blocks * size(mlp + attention_matrices(config)) + 2 * config.vocab_size * config.hidden_size
    return 2 * weights, 2 * blocks * rank * sum(map(sum, mlp))


def queries_before_products_count(store_dtype: str, share: float = SHARE) -> float:
    """Return the queries with which the products of scoring take as long as the copy over PCIe.

    Floats: one float32 product. Integers: two products of 16 bits, of the levels with both parts of the query.
    """
    coordinates_per_second = PCIE / (stored_bytes(2**16, store_dtype) / 2**16)
    products = 2 * BF16 / 4 if store_dtype.startswith("int") else FP32
    return share * products / (2 * coordinates_per_second)


def raw_seconds(config: LlamaConfig, rank: int, share: float = SHARE) -> tuple[float, float]:
    """Return the seconds of Hessian `raw`: C over EXAMPLES in float32, and its Cholesky factors in float64."""
    ks = coordinates(config, rank)
    sums, cholesky = 2 * EXAMPLES * sum(k**2 for k in ks), sum(k**3 for k in ks) / 3
    return sums / (share * FP32), cholesky / (share * FP64)


def row(*cells: object) -> str:
    """Return a row of a table in Markdown."""
    return "| " + " | ".join(map(str, cells)) + " |"


def flops_table(config: LlamaConfig, block_size: int, share: float) -> list[str]:
    """Return the FLOPs per token of each part at two ranks, and the tokens/s."""
    narrow, wide = (flops_per_token(config, block_size, rank) for rank in (64, 136))
    totals = [sum(parts.values()) for parts in (narrow, wide)]
    speeds = [tokens_per_second(config, block_size, rank, share) for rank in (64, 136)]
    rows = [
        row("part", "rank 64: MFLOP per token", "share", "rank 136: MFLOP per token", "share"),
        "|---|---|---|---|---|",
    ]
    for part in narrow:
        cells = [f(x[part], t) for x, t in zip((narrow, wide), totals, strict=True) for f in (in_mega, in_percent)]
        rows.append(row(part, *cells))
    rows.append(row("total", in_mega(totals[0]), "100%", in_mega(totals[1]), "100%"))
    rows.append(row(f"tokens/s at {share:.0%} of the peak", f"{speeds[0]:,.0f}", "", f"{speeds[1]:,.0f}", ""))
    hours = [f"{TOKENS / speed / 3600:.1f}" for speed in speeds]
    return [*rows, row(f"GPU hours for {TOKENS:.0e} tokens".replace("+0", ""), hours[0], "", hours[1], "")]


def in_mega(flops: float, _total: float = 0) -> str:
    """Return FLOPs in millions, as text."""
    return f"{flops / 1e6:,.0f}" if flops >= 1e7 else f"{flops / 1e6:.1f}"


def in_percent(flops: float, total: float) -> str:
    """Return a share in per cent, as text."""
    return f"{100 * flops / total:.1f}%" if flops >= 0.001 * total else f"{100 * flops / total:.2g}%"


def copies_table(config: LlamaConfig, block_size: int, share: float) -> list[str]:
    """Return, for each store type, the bytes that leave the GPU, and the tokens/s up to which PCIe carries them."""
    heads = ("rank", "store type", "KB per example", "MB/s at the speed above", "PCIe's bound, million tokens/s",
             "TB for 1e9 tokens")  # fmt: skip
    rows = [row(*heads), "|---|---|---|---|---|---|"]
    for rank, store, preset in STORES:
        each, speed = example_bytes(config, rank, store), tokens_per_second(config, block_size, rank, share)
        rate, total = each * speed / block_size / 1e6, each * TOKENS / block_size / 1e12
        name = " ".join(filter(None, (store, preset)))
        bound = f"{PCIE / each * block_size / 1e6:,.1f}"
        rows.append(row(rank, name, f"{each / 1e3:,.1f}", f"{rate:,.2f}", bound, f"{total:,.3g}"))
    return rows


def scoring_table(config: LlamaConfig, share: float) -> list[str]:
    """Return, for each store type, examples/s from the disk and from the page cache, and where products count."""
    heads = ("rank", "store type", "examples/s from the disk", "examples/s from the page cache",
             "seconds for 1e6 examples, from the disk", "queries from which the products bound")  # fmt: skip
    rows = [row(*heads), "|---|---|---|---|---|---|"]
    for rank, store, _ in STORES:
        if store != "none":
            each, queries = example_bytes(config, rank, store), queries_before_products_count(store, share)
            speeds = [f"{rate / each:,.0f}" for rate in (DISK, PCIE)]
            rows.append(row(rank, store, *speeds, f"{EXAMPLES * each / DISK:,.0f}", f"{queries:,.0f}"))
    return rows


def tables(config: LlamaConfig, block_size: int = 512, share: float = SHARE) -> dict[str, list[str]]:
    """Return the rows of the tables of docs/gpu.md, in Markdown."""
    return {
        "FLOPs": flops_table(config, block_size, share),
        "copies": copies_table(config, block_size, share),
        "scoring": scoring_table(config, share),
    }


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--block_size", type=positive_int, default=512, help="tokens in an example (512)")
    parser.add_argument("--share", type=positive, default=SHARE, help="of the peak FLOP/s (0.4)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the tables and a JSON line."""
    for name, rows in tables(LLAMA3_8B, args.block_size, args.share).items():
        print(f"{name}:", *rows, "", sep="\n")
    speeds = {rank: tokens_per_second(LLAMA3_8B, args.block_size, rank, args.share) for rank in (64, 136)}
    print(json.dumps({"benchmark": "plan", "computed": True, "tokens_per_second": speeds} | vars(args)))


if __name__ == "__main__":
    run_script(main, build_parser())
