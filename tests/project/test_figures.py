"""Each number that README.md and docs/ take from a record is read from it, and compared.

A figure is (page, its words there, where it comes from, formula). In these words `#` stands for a number and `~` for
anything in a line; other numbers, such as the size of a run, stand literally. Where it comes from is a list of (record,
its words there). The formula makes the page's numbers of the record's; without one they are the same. So a test fails
when the page or the record changes alone. New text that cites a record needs an entry for each of its numbers.
docs/gpu.md cites none: all its numbers are computed by benchmarks/plan.py.
"""

# ruff: noqa: E501 (a figure is one line)

import re
from decimal import Decimal

import pytest
from conftest import ROOT

from benchmarks import plan

RECORDS = {
    "lds": "evaluation/results/lds_epyc-2-cores_2026-11-24.md",
    "fortunes": "evaluation/results/lds_fortunes_epyc-2-cores_2026-11-24.md",
    "moe": "evaluation/results/lds_moe_epyc-2-cores_2026-11-27.md",
    "rerank": "evaluation/results/rerank_epyc-2-cores_2026-11-28.md",
    "trajectory": "evaluation/results/lds_trajectory_epyc-2-cores_2026-11-28.md",
    "trajectory_fortunes": "evaluation/results/lds_trajectory_fortunes_epyc-2-cores_2026-11-28.md",
    "variants_checkpoints": "evaluation/results/variants_checkpoints_2026-11-28.md",
    "mixed_in": "evaluation/results/mixed_in_epyc-2-cores_2026-11-28.md",
    "agreement": "evaluation/results/agreement_smollm2_epyc-2-cores_2026-11-24.md",
    "planted": "evaluation/results/planted_epyc-2-cores_2026-11-24.md",
    "tail": "evaluation/results/tail_patch_brittleness_epyc-2-cores_2026-11-25.md",
    "variants": "evaluation/results/variants_2026-11-24.md",
    "extraction": "benchmarks/results/extraction_epyc-2-cores_2026-11-24.md",
    "extraction_experts": "benchmarks/results/extraction_experts_epyc-2-cores_2026-11-27.md",
    "bfloat16": "benchmarks/results/extraction_bfloat16_epyc-2-cores_2026-11-28.md",
    "faults": "benchmarks/results/faults_epyc-2-cores_2026-11-25.md",
    "few_bits": "benchmarks/results/few_bits_epyc-2-cores_2026-11-24.md",
    "hessian": "benchmarks/results/hessian_epyc-2-cores_2026-11-24.md",
    "peers": "benchmarks/results/peers_epyc-2-cores_2026-11-24.md",
    "scaling": "benchmarks/results/scaling_epyc-2-cores_2026-11-24.md",
    "scoring": "benchmarks/results/scoring_epyc-2-cores_2026-11-24.md",
    "scoring_types": "benchmarks/results/scoring_store_types_epyc-2-cores_2026-11-28.md",
    "startup": "benchmarks/results/startup_epyc-2-cores_2026-11-28.md",
    "soak": "benchmarks/results/soak_epyc-2-cores_2026-11-25.md",
    "quickstart": "scripts/quickstart.sh",
    "topics": "evaluation/results/topic_recall_epyc-2-cores_2026-11-24.md",
    "selection": "evaluation/results/selection_smollm2_epyc-2-cores_2026-11-28.md",
}
README, RESULTS, SPEED, PLAN = "README.md", "docs/results.md", "benchmarks/README.md", "docs/gpu.md"
PAGES = [README, "CONTRIBUTING.md", "benchmarks/README.md", "evaluation/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
NUMBER = r"(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e-?\d+)?)"
TESTBEDS = ("lds#gpt2", "lds#llama", "fortunes#gpt2", "fortunes#llama")
LAYERS = (6, 9, 6, 9)
BEST, RAW = "| ekfac | rank 136, int1 (--preset best) | dot | ~ |", "| raw | rank 64, float32 | dot | ~ |"


def everywhere(words: str) -> list[tuple[str, str]]:
    """Return the words in each testbed's table."""
    return [(testbed, words) for testbed in TESTBEDS]


def bytes_and_lds(*numbers: float) -> list[float]:
    """Return the bytes per example and layer without the files' headers, each once, and the LDS."""
    sizes = [total / layers for total, layers in zip(numbers[::2], LAYERS, strict=True)]
    return [*dict.fromkeys(size - size % 4 for size in sizes), *numbers[1::2]]


def lds_rows() -> list[tuple]:
    """Return the figures of the table of LDS in docs/results.md."""
    plain = {
        "uncompressed (`--lora none --store_dtype none`) | `ekfac` | none stored": "| ekfac | uncompressed | dot |",
        "BM25 on the words | | ": "| | bm25 | |",
        "cosine of hidden states | | ": "| | embedding | |",
    }
    sized = {
        "unprojected signs (`--lora none --store_dtype int1`) | `ekfac` | #; #": "| ekfac | unprojected, int1 | dot",
        "rank 128, float32 | `ekfac` | #": "| ekfac | rank 128, float32 | dot",
        "**rank 136, signs (`--preset best`)** | `ekfac` | #": "| ekfac | rank 136, int1 (--preset best) | dot",
        "rank 64, float32 | `ekfac` | #": "| ekfac | rank 64, float32 | dot",
        "rank 64, int8 | `ekfac` | #": "| ekfac | rank 64, int8 | dot",
        "rank 64, int4 | `ekfac` | #": "| ekfac | rank 64, int4 | dot",
        "rank 64, signs | `ekfac` | #": "| ekfac | rank 64, int1 | dot",
        "rank 64, float32 (`--preset paper`) | `raw` | #": "| raw | rank 64, float32 | dot",
        "rank 64, dot of the gradients | `none` | #": "| none | rank 64, float32 | dot",
        "TRAK-like, from the stored gradients of rank 64 | | #": "| | trak | ",
    }
    found = [
        (RESULTS, f"| {page} | # | # | # | # |", everywhere(f"{row} none | #"), None) for page, row in plain.items()
    ]
    for page, row in sized.items():
        numbers = "**#** | **#** | **#** | **#**" if page.startswith("**") else "# | # | # | #"
        found.append((RESULTS, f"| {page} | {numbers} |", everywhere(f"{row} | # | #"), bytes_and_lds))
    sources = [*everywhere("| raw | rank 64, float32 | dot | ~ | ~ | ~ | #: #"), ("lds", "default damping (raw #,")]
    words = "| the same, best damping (#; #; #; # instead of #) | `raw` | 16,384 | # | # | # | # |"
    return [*found, (RESULTS, words, sources, lambda *x: [*x[:8:2], x[8], *x[1:8:2]])]


def readme_lds(model: str, texts: str, testbed: str) -> tuple:
    """Return the figures of a row of README.md's table."""
    words = f"| LDS, small {model}, {texts} | **#** | # (#) | uncompressed EK-FAC #, BM25 # |"
    rows = (f"{BEST} #", f"{RAW} # (~) | ~ | ~: #", "| ekfac | uncompressed | dot | none | #", "| | bm25 | | none | #")
    return README, words, [(testbed, row) for row in rows], None


def moe_rows() -> list[tuple]:
    """Return the figures of the table of LDS of a mixture of experts in docs/results.md."""
    plain, sized = "# (# to #) | # (# to #) |", "# | # (# to #) | # (# to #) |"
    rows = {
        f"uncompressed wide layers | `ekfac` | none stored | {plain}": "| ekfac | uncompressed | dot | none",
        "**rank 136, signs (`--preset best`)** | `ekfac` | # | **# (# to #)** | **# (# to #)** |": BEST[:-4],
        f"rank 64, float32 | `ekfac` | {sized}": "| ekfac | rank 64, float32 | dot |",
        f"BM25 on the words | | | {plain}": "| | bm25 | | none",
        f"rank 64, float32 (`--preset paper`) | `raw` | {sized}": RAW[:-4],
    }
    found = []
    for page, row in rows.items():
        sources = [
            (f"moe#{bed}", f"{row} {'| #' if row.endswith('none') else '# | #'} (# to #)")
            for bed in ("olmoe_half", "olmoe")
        ]
        formula = None if row.endswith("none") else lambda *x: [*check_is(x[0], x[4], 0), *x[:4], *x[5:]]
        found.append((RESULTS, f"| {page}", sources, formula))
    return found


RATIOS = everywhere(f"{BEST} # (~) | # (# to #)")  # LDS, ratio and its interval
RAW_BEST = everywhere(f"{RAW} ~ | ~ | ~: #")
PLANTED = [
    ("planted", f"| {row} | # (~) | # (~)")
    for row in ("BM25", "raw, cosine", "raw, dot", "ekfac, cosine", "ekfac, dot")
]
RISE = [
    ("tail", "texts (2000, of which 50 are left out), the first 10 queries"),
    ("tail", "(ekfac, signs of rank 136, damping 0.2) | **# (# to #)**"),
    ("tail", "| raw, rank 64, float32, damping 0.1 | # (# to #) | ~ | 10 of 10 |"),
    ("tail", "| 50 random texts, mean of 4 draws | # (# to #)"),
]
AGREEMENT = [
    ("agreement", "| `--preset best` (rank 136, signs) | 0.2 | **#** (~) | **#** (~) | # |"),
    ("agreement", "| raw rank 64, float32 | 0.1 | # (~) | # (~) | # |"),
    ("agreement", "| ekfac rank 64, float32 | 0.01 | # (~) | # (~) | # |"),
]
MIXED_IN = [
    ("mixed_in#" + model, f"| {row} | # (~) | # (~)")
    for model in ("gpt2", "llama")
    for row in ("best, dot-ekfac-0.2", "paper, dot-raw-0.1", "bm25")
]
MIXED_IN += [
    ("mixed_in#" + model + ", other dampings", "| paper, dot-raw-10 | # (~) | # (~)") for model in ("gpt2", "llama")
]
FEW = [
    ("trajectory", "trained again. Ceiling #"), ("trajectory", "| raw, rank 64, final model | 7.5 times | # (~)"),
    ("trajectory", "| the final model alone | 1 | # (~)"), ("trajectory", "after half of the training | 1 | # (~)"),
    ("trajectory", "| three: .2, .5 and the final one | 3 times | # (~)"),
]  # fmt: skip
SPEEDS = [("few_bits", f"| {queries} | ~ | ~ | # |") for queries in (1, 10, 50, 100)]
RETRAINED = [
    ("rerank", "| rank 136, signs (`--preset best`) | # (~) | | # (~) | |"),
    ("rerank", "| re-ranked, final model | # (~) | ~ | # (~) |"),
    ("rerank", "| re-ranked over three checkpoints | # (~) | ~ | # (~) |"),
    ("rerank", "| raw rank 64, float32 (`--preset paper`) | # (~) | ~ | # (~) |"),
    ("rerank", "| 20 random texts, mean of 4 draws | # (~) | | # (~) | |"),
    ("rerank", "final model minus `best` # (# to #), over three checkpoints # (# to #)."),
]
KRONFLUENCE = [("few_bits", "default batches, 1024 tokens and 8 shards, two runs before that: # and # against # and #")]
KRONFLUENCE += [("few_bits", "nice) at work: ours # s, kronfluence # (CPU")]
PEERS = [("peers", f"none {name} # tokens/s") for name in ("ours", "bergson", "logix")]
MILLION = [("soak", "| 1,000,000 | #, # | #, # | #, # |")]


def check(holds: bool) -> list[float]:
    """Refuse words that the record does not bear out; they have no number."""
    assert holds
    return []


def check_is(found: float, said: float, tolerance: float) -> list[float]:
    """The same for a number that the page has in words or rounds: is it near the record's?"""
    return check(abs(found - said) <= tolerance)


def percent(*shares: float) -> list[float]:
    """Return the first share, the least and the largest of the others, in percent."""
    return [100 * share for share in (shares[0], min(shares[1:]), max(shares[1:]))]


def default_batches(a: float, b: float, c: float, d: float, e: float, f: float) -> list[float]:
    """Return the least and the largest share of kronfluence's time."""
    return [min(a / c, b / d, e / f), max(a / c, b / d, e / f)]


def shape_of(config) -> list[int]:
    """Return the sizes of a model, and the number of its tracked matrices."""
    heads = [config.num_attention_heads, config.num_key_value_heads, config.vocab_size]
    sizes = [config.num_hidden_layers, config.hidden_size, config.intermediate_size, *heads]
    return [*sizes, len(plan.coordinates(config, 64))]


def gigabytes(*sizes: float) -> list[float]:
    """Return bytes in GB."""
    return [size / 1e9 for size in sizes]


def share_of_ours(rank: int) -> float:
    """Return the share of the FLOPs that this method adds to a forward and a backward pass."""
    flops = [*plan.flops_per_token(plan.LLAMA3_8B, 512, rank).values()]
    return sum(flops[4:]) / sum(flops)


def of_signs(rank: int) -> float:
    """Return an example's bytes in float32 as a multiple of those of signs of rank 136."""
    return plan.example_bytes(plan.LLAMA3_8B, rank, "float32") / plan.example_bytes(plan.LLAMA3_8B, 136, "int1")


def speed_at(rank: int) -> float:
    """Return the tokens/s at a rank."""
    return plan.tokens_per_second(plan.LLAMA3_8B, 512, rank)


def busy_link(rank: int, store: str) -> float:
    """Return the share of the time in which PCIe carries gradients."""
    return plan.example_bytes(plan.LLAMA3_8B, rank, store) * speed_at(rank) / 512 / plan.PCIE


def unprojected() -> float:
    """Return an example's bytes without projection in bfloat16."""
    return plan.example_bytes(plan.LLAMA3_8B, None, "bfloat16")


def seconds_of_raw() -> list[float]:
    """Return the seconds of raw's sums at two ranks, and of its Cholesky factors, each with share and peak."""
    (sums, factors), (wide_sums, wide_factors) = (plan.raw_seconds(plan.LLAMA3_8B, rank) for rank in (64, 136))
    share = 100 * plan.SHARE
    return [sums, wide_sums, share, plan.FP32 / 1e12, factors, wide_factors, share, plan.FP64 / 1e12]


# fmt: off
FIGURES: list[tuple] = [
    (README, "each text seen # times: ~ the mean over three | #, #, **#**; #, #, **#** | | three of rank 80, # times the bytes of one: #; # |", [("trajectory", "Each text is seen # times,"), ("trajectory", "| the final model alone | 1 | #, 1.00 | #% | #, 1.00 | #% |"), ("trajectory", "| one checkpoint, after half of the training | the same | #, # (# to #) | #% | #, # (# to #) | #% |"), ("trajectory", "| three: .2, .5 and the final one | 3 times | #, # (# to #) | #% | #, # (# to #) | #% |"), ("trajectory", "| three of rank 80 (.2, .5 and the final one) | # times | #, # | #, # |")], lambda *x: (x[0], x[1], x[5], x[15], x[3], x[10], x[20], x[25], x[26], x[28])),
    (RESULTS, "trained for # epochs on 2000 texts of the manual, so each text is seen # times", [("trajectory", "trained for # epochs on 2000 passages"), ("trajectory", "Each text is seen # times,")], None),
    (RESULTS, "training texts: # and #.", [("trajectory", "gpt2: ceiling #"), ("trajectory", "llama: ceiling #")], None),
    (RESULTS, "| the final model | 1 | # | 1 | #% | # | 1 | #% |", [("trajectory", "| the final model alone | 1 | #, 1.00 | #% | #, 1.00 | #% |")], None),
    (RESULTS, "| one checkpoint, after half of the training | 1 | # | # (# to #) | #% | # | # (# to #) | #% |", [("trajectory", "| one checkpoint, after half of the training | the same | #, # (# to #) | #% | #, # (# to #) | #% |")], None),
    (RESULTS, "the final one** | 3 | **#** | # (# to #) | #% | **#** | # (# to #) | #% |", [("trajectory", "| three: .2, .5 and the final one | 3 times | #, # (# to #) | #% | #, # (# to #) | #% |")], None),
    (RESULTS, "| all eight, from .05 to 1 | 8 | # | # (# to #) | #% | # | # (# to #) | #% |", [("trajectory", "| all eight | 8 times | #, # (# to #) | #% | #, # (# to #) | #% |")], None),
    (RESULTS, "| three at rank 80 | # | # | # | #% | # | # | #% |", [("trajectory", "| three of rank 80 (.2, .5 and the final one) | # times | #, # | #, # |"), ("trajectory", "gpt2: ceiling #"), ("trajectory", "llama: ceiling #")], lambda size, a, b, c, d, one, two: (size, a, b, 100 * a / one, c, d, 100 * c / two)),
    (RESULTS, "| reference | store (preset) | GPT-2: first 10 | 50 | 100 | 200 | Llama: first 10 | 50 | 100 | 200 |", [], None),
    (RESULTS, "last but one section, # examples, # queries, the whole", [("rerank", "# examples, # queries")], None),
    (RESULTS, "| final model | `best` | # | # | # | # | # | # | # | # |", [("rerank", "| GPT-2, final model | rank 136, signs (`--preset best`) | # | # | # | # | # | # |"), ("rerank", "| Llama, final model | rank 136, signs (`--preset best`) | # | # | # | # | # | # |")], lambda *x: (x[1], *x[3:6], x[7], *x[9:12])),
    (RESULTS, "| final model | `paper` | # | # | # | # | # | # | # | # |", [("rerank", "| GPT-2, final model | raw rank 64, float32 | # | # | # | # | # | # |"), ("rerank", "| Llama, final model | raw rank 64, float32 | # | # | # | # | # | # |")], lambda *x: (x[1], *x[3:6], x[7], *x[9:12])),
    (RESULTS, "| mean of three checkpoints | `best` | # | # | # | # | # | # | # | # |", [("rerank", "| GPT-2, mean of three checkpoints | rank 136, signs | # | # | # | # | # | # |"), ("rerank", "| Llama, mean of three checkpoints | rank 136, signs | # | # | # | # | # | # |")], lambda *x: (x[1], *x[3:6], x[7], *x[9:12])),
    (RESULTS, "With # candidates the re-ranked top ten holds # of the uncompressed one on both (on GPT-2 the scores agree to #), and # and # of that", [("rerank", "Re-ranked with K #, share"), ("rerank", "| final model | # | # | # | # |"), ("rerank", "uncompressed run, to # of"), ("rerank", "(`--rerank_checkpoints`) | # | # | # | # |")], lambda *x: (x[0], min(x[1], x[3]), x[5], x[6], x[8])),
    (RESULTS, "all MLP layers, # questions over # examples: # of the ten are in the first 10, # in 50, # in 100.", [("rerank", "SmolLM2-135M-Instruct, # blocks of pydoc's shorter topics, # questions"), ("rerank", "| 90: all MLP layers | # | # | # | # | # | # |")], lambda *x: (x[1], x[0], x[3], x[5], x[6])),
    (RESULTS, "Of three blocks alone #, #, #; at `--rerank_rank` 256 and 512 only # and # of 100 candidates' ten", [("rerank", "| 9: MLP layers of 3 of 30 blocks | # | # | # | # | # | # |"), ("rerank", "| 256 | # | # | # | # |"), ("rerank", "| 512 | # | # | # | # |")], lambda *x: (x[1], x[3], x[4], x[8], x[12])),
    (RESULTS, "`--mode cosine` # minutes for # of the quickstart's", [("rerank", "# min for every # examples")], None),
    (README, "small GPT-2, small Llama | **#**, **#**; #, #; stored alone #, # | stored alone #, # | SmolLM2 #, stored alone # |", [("rerank", "| final model | # | # | # | # |"), ("rerank", "(`--rerank_checkpoints`) | # | # | # | # |"), ("rerank", "| GPT-2, final model | rank 136, signs (`--preset best`) | # | # | # | # | # | # |"), ("rerank", "| Llama, final model | rank 136, signs (`--preset best`) | # | # | # | # | # | # |"), ("rerank", "| GPT-2, final model | raw rank 64, float32 | # | # | # | # | # | # |"), ("rerank", "| Llama, final model | raw rank 64, float32 | # | # | # | # | # | # |"), ("rerank", "| 90: all MLP layers | # | # | # | # | # | # |")], lambda *x: (x[0], x[2], x[4], x[6], x[9], x[15], x[21], x[27], x[36], x[33])),
    (README, "| the same without its top 20; ~ | #, #; #, #; **#**, **#** | #, # | 20 random texts: #, # |", RETRAINED[:5], None),
    (RESULTS, "Without the first 20 texts the losses of 10 queries on GPT-2 and 10 on Llama rise by # and # nats with the scores of `best`, by # and # with raw, by # and # with `best` re-ranked, and by **#** and **#** with `best` re-ranked over three checkpoints: # (# to #) more", [*RETRAINED, ("rerank", "the first 10 queries of each")], lambda *x: (*x[:2], *x[6:8], *x[2:6], *x[13:])),
    (RESULTS, "first texts made no clear difference: # (# to #;", RETRAINED[5:], lambda *x: x[:3]),
    (README, "saw each text twice; ceiling #, wide intervals | #, #, # | # |", FEW, lambda *x: [x[0], x[2], x[3], x[4], x[1]]),
    (RESULTS, "saw # texts twice (ceiling #, # halves): #, # and, three, #, # (# to #) times; raw #.", [("trajectory", "on # passages of the manual and of"), *FEW, ("trajectory", "2 epochs, # random halves"), ("trajectory", "| three: .2, .5 and the final one | 3 times | # (# to #) | #% | # (# to #) |")], lambda *x: (round(x[0], -3), x[1], x[6], x[3], x[4], x[5], *x[11:14], x[2])),
    (README, "GPT-2; Llama; 24 halves, wide intervals | #, #, **#**; #, #, **#** | #; # | three of rank 80: #; # |", [("trajectory_fortunes", "| the final model alone | 1 | # (~), 1.00 | 29% | # (~)"), ("trajectory_fortunes", "after half of the training | the same | # (~), ~ | 28% | # (~)"), ("trajectory_fortunes", "| three: .2, .5 and the final one | 3 times | # (~), ~ | 35% | # (~)"), ("trajectory_fortunes", "final model | 7.5 times | # (~), ~ | 22% | # (~)"), ("trajectory_fortunes", "| three of rank 80 (.2, .5 and the final one) | 1.11 times | # (~), ~ | 30% | # (~)")], lambda a, b, c, d, e, f, g, h, i, j: [a, c, e, b, d, f, g, h, i, j]),
    (RESULTS, "(# halves, ceilings # and #): GPT-2 #, # and, three, #, # (# to #) times; Llama #, # and #, # (# to #) times", [("trajectory_fortunes", "# random halves, 8 of them"), ("trajectory_fortunes", "for the ceiling: # (GPT-2) and # (Llama)"), ("trajectory_fortunes", "| the final model alone | 1 | # (~), 1.00 | 29% | # (~)"), ("trajectory_fortunes", "after half of the training | the same | # (~), ~ | 28% | # (~)"), ("trajectory_fortunes", "| three: .2, .5 and the final one | 3 times | # (~), # (# to #) | 35% | # (~), # (# to #) |")], lambda n, c, d, f, g, h, i, a, p, q, r, b, s, t, u: [n, c, d, f, h, a, p, q, r, g, i, b, s, t, u]),
    (RESULTS, "| # times the final Llama's LDS with three checkpoints | # |", [("trajectory", "were hoped to have # times the final model's LDS"), ("trajectory", "| three: .2, .5 and the final one | 3 times | #, # (# to #) | #% | #, # (# to #) | #% |")], lambda *x: (x[0], x[7])),
    ("docs/method.md", "LDS # instead of #", [("variants_checkpoints", "| a seed of its own for each | #, #, #, #, # |"), ("variants_checkpoints", "| one seed for all checkpoints | #, # |")], lambda *x: [sum(x[:5]) / 5, sum(x[5:]) / 2]),
    (RESULTS, "on # passages of the manual and # of another topic. The average precision of finding the 50 with # other texts", [("mixed_in", "fine-tuned for 3 epochs on # passages of Python's manual and # passages"), ("mixed_in", "Queries are # other passages of turtle")], None),
    (RESULTS, "`--preset best` **#**; **#**, `paper` #; # (at damping 10, its best, #; #), BM25 #. Among 50 decoys with the queries' words: #; #, #; # (#; #), #.", MIXED_IN, lambda *x: [*check_is(x[4], x[10], 0), *(x[i + variant] for variant in (0, 1) for i in (0, 6, 2, 8, 12, 14, 4))]),
    (SPEED, "on a CPU that multiplies it (AVX512-BF16); cosine of their gradients | #; #; # |", [("bfloat16", "| float32 | ~ | ~ | # tokens/s"), ("bfloat16", "| bfloat16 | ~ | ~ | # tokens/s"), ("bfloat16", "at rank 136, is # in the mean")], None),
    (SPEED, "| two seconds until `analysis.py` prints, and until `extract_log.py --dry_run` does | #, # s beside", [("startup", "20 examples: first line | ~ | #"), ("startup", "of a tiny model: first line | ~ | #")], None),
    *lds_rows(),
    readme_lds("GPT-2", "Python's manual", "lds#gpt2"),
    readme_lds("Llama", "Python's manual", "lds#llama"),
    readme_lds("GPT-2", "fortunes", "fortunes#gpt2"),
    readme_lds("Llama", "fortunes", "fortunes#llama"),
    readme_lds("mixture of experts", "Python's manual", "moe#olmoe"),
    # README.md
    (README, "finding 50 rows of another topic in a fine-tuning set; among decoys with the same words; small GPT-2, small Llama | **#**, **#**; **#**, **#** | #, # (#, #); #, # (#, #) | BM25 #; # |", MIXED_IN, lambda *x: [x[i] for i in (0, 6, 1, 7, 2, 8, 12, 14, 3, 9, 13, 15, 4, 5)]),
    (README, "rank 136, one bit per stored number) over `--preset paper` (the paper's setting: raw Hessian, rank 64, float32)", [], None),
    (README, "It stores a seventh of the bytes", [AGREEMENT[1], AGREEMENT[0]], lambda *x: check_is(x[2] / x[5], 7, 0.1)),
    (README, "no 4096 x 4096 matrix per layer", [], lambda: check_is(64 * 64, 4096, 0)),
    (README, "up to 10 queries at least three times as fast (100 queries: as fast; 300: half as fast; measured with rank 128)", [*SPEEDS, ("few_bits", "300 queries 12,454 and 6,105, ratio #")], lambda one, ten, _, hundred, more: check_is(min(one, ten, 4), 3, 0.2) + check_is(hundred, 1, 0.02) + check_is(more, 0.5, 0.02)),
    (README, "from 2 CPU cores (AMD EPYC) and small models, 2026-11-24 to 28", [("few_bits", "- More queries (2026-11-27, ")], None),
    (README, "minus the query's loss under the half's model. 1 is perfect", [], None),
    (README, "The LDS of `best` is #, #, # and # times that of `paper` at its default damping (#). It is #, #, # and # times", [*RATIOS, *RAW_BEST, ("lds", "default damping (raw #,")], lambda *x: [*x[1:16:4], x[20], *(best / raw for best, raw in zip(x[0:16:4], x[16:20], strict=True))]),
    (README, "| bytes per example and layer, computed for layers wider than 136 | # | # |", [], lambda: [136 * 136 / 8 + 4, 64 * 64 * 4]),
    (README, "without its top 50 texts, nats; small GPT-2, Python's manual, 10 queries | **#** | # | 50 random texts: # |", RISE, lambda *x: x[::3]),
    (README, "on SmolLM2-135M, 24 queries, 120 examples: Spearman; top 10 | **#**; **#** | #; # | random order 0; # |", [*AGREEMENT[:2], ("agreement", "a random order has 0 and #."), ("agreement", "120 blocks"), ("agreement", "24 questions")], lambda *x: (x[0], x[1], x[3], x[4], x[6])),
    (README, "| right topic among the first 10 (in first place), 24 questions, `cosine`, damping 0.1 | | | rank 64 in float32: `ekfac` # (#), `raw` # (#); random order # |", [("topics", "| `ekfac` | `cosine` | # | #"), ("topics", "| `raw` | `cosine` | # | #"), ("topics", "| random order | | #")], None),
    (README, "signs of rank 128 against float32 of rank 64: 1; 10; 50; 100 queries | #; #; #; # times | 1 |", SPEEDS, None),
    (README, "tokens/s | | | rank 64: this program #; two others, bergson #, LogIX # |", PEERS, None),
    (README, "| quickstart, without installation | | | 4 min 40 s; when run again 31 s |", [("quickstart", "4 min 40 s")], None),
    (README, "stages 2, 3, 4 (tiny model) | #, #, # s; # GB of memory", MILLION, lambda *x: (x[0], x[2], x[4], max(x[1::2]))),
    (README, "BM25 had #% among the first 10, the influence scores #% to #%.", PLANTED, lambda *x: percent(*x[1::2])),
    # docs/results.md: retraining
    (RESULTS, "60 models (50 with fortunes), each trained on a random half of 2000 texts", [("lds", "60 models of random halves"), ("lds", "on 2000 passages"), ("fortunes", "with 50 halves instead of 60")], None),
    (RESULTS, "The table shows the mean over 100 queries", [("lds", "100 other passages as queries")], None),
    (RESULTS, "(80 minutes; `REDUCED=1` shows that it works in 3 minutes)", [], None),
    (RESULTS, "- **Models**: 3 layers, width 128; MLP layers only; default damping (# for `raw`, # for `ekfac`, # for its signs; unprojected signs #)", [("lds", "default damping (raw #, ekfac and kfac #, int1 #; ~"), ("lds", "not scored at 0.2, are at #)"), ("lds", "GPT-2 (3 layers, width 128)")], None),
    (RESULTS, "headers of files (less than 1%)", [], None),
    (RESULTS, "The preset's are # where both sides of a layer are wider than 136: these layers have one side of 128", [], lambda: [136 * 136 / 8 + 4]),
    (RESULTS, "passages of Python's manual (# tokens in the mean)", [("lds", "mean # tokens")], None),
    (RESULTS, "the preset has # (# to #), # (# to #), # (# to #) and # (# to #) times the LDS of raw at raw's default damping, and #, #, # and # times", [*RATIOS, *RAW_BEST], lambda *x: [*(x[i] for i in range(16) if i % 4), *(best / raw for best, raw in zip(x[0:16:4], x[16:20], strict=True))]),
    (RESULTS, "the 95% intervals of an LDS extend about # to each side", everywhere(f"{BEST} ~ (# to #)"), lambda *x: check(all(abs((high - low) / 2 - 0.035) < 0.004 for low, high in zip(x[::2], x[1::2], strict=True))) or [0.035]),
    (RESULTS, "a standard error of # became #, a factor of about #.", [("lds", "standard error # becomes #"), ("lds", "factor of about #.")], None),
    (RESULTS, "# of the manual's # queries share half or more of their 5-grams", [("lds", "# of the # share half or more of their 5-grams")], None),
    (RESULTS, "at rank 16 and 32, raw is better than ekfac on GPT-2 with fortunes (the intervals overlap), and worse elsewhere", [(bed, f"| {kind} | rank {rank}, float32 | dot | ~ | #") for bed in TESTBEDS for rank in (16, 32) for kind in ("raw", "ekfac")], lambda *x: check([raw > ekfac for raw, ekfac in zip(x[::2], x[1::2], strict=True)] == [False] * 4 + [True] * 2 + [False] * 2)),
    (
        RESULTS,
        "raw of rank 64 goes from # at # to # at # (GPT-2, manual), and so on Llama from # to #.",
        [("lds", "From damping # over 0.1 to #, raw"), ("lds", "goes from # over ~ to # on GPT-2 and from # over ~ to # on Llama"), ("lds#gpt2", f"{RAW} ~ | ~ | #: #")],
        lambda low, high, a, b, c, d, damping, lds: [*check(damping == high and lds == b), a, low, b, high, c, d],
    ),
    (RESULTS, "ten times its default costs #% to #% of the LDS", [("variants", f"| {row} | ~ / # / # |") for row in ("rank 64", "rank 128", "rank 153 ~", "rank 256", "all ~")], lambda *x: [100 * pick(1 - b / a for a, b in zip(x[::2], x[1::2], strict=True)) for pick in (min, max)]),
    # docs/results.md: mixture of experts
    *moe_rows(),
    (RESULTS, "A small OLMoE: # layers, width #, # experts in a layer, of which a token takes #. # models were trained on random halves of # texts", [("moe", "from a config: # layers, width #, # experts of width 96 in each layer, of which a token takes #;"), ("moe", "queries. # models were trained on random halves"), ("moe", "on # passages")], None),
    (RESULTS, "The preset has # (# to #) times raw's LDS at half of the training and # (# to #) times at the end, at # of its bytes", [("moe", "| `--preset best` against raw rank 64 float32: ~ | # (# to #), at 0.133 | # (# to #), at # |"), *((f"moe#{bed}", f"{BEST} ~ | # (# to #)") for bed in ("olmoe_half", "olmoe"))], lambda *x: check(x[:6] == x[7:]) + list(x[:7])),
    (RESULTS, "(# instead of #, chosen by the same queries) it has # (# to #) and # (# to #) times its LDS", [("moe", "| `--preset best` against raw at damping #, the best one tried | # (# to #) | # (# to #) |"), ("moe", "default damping (raw #,")], lambda *x: [x[0], x[7], *x[1:7]]),
    (RESULTS, "against the uncompressed wide layers # (# to #) and # (# to #) times.", [("moe", "| `--preset best` against uncompressed ekfac | # (# to #) | # (# to #) |")], None),
    # docs/results.md: agreement, brittleness, tail patch
    (RESULTS, "120 examples, 24 queries, default damping. A random order has a correlation of 0 and an overlap of #.", [("agreement", "a random order has 0 and #."), ("agreement", "120 blocks"), ("agreement", "24 questions")], None),
    (RESULTS, "| `--preset best` | # | # | # |", AGREEMENT[:1], None),
    (RESULTS, "| ekfac rank 64, float32 | # | # | # |", AGREEMENT[2:], None),
    (RESULTS, "| raw rank 64, float32 (seven times the preset's bytes) | # | # | # |", AGREEMENT[1:2], None),
    (RESULTS, "overlap of the 10 best", [], None),
    (RESULTS, "without the 50 of 2000 texts with the highest scores for a query (10 queries, one training seed). The loss of the query rises by # nats (# to #) with the scores of `--preset best`, by # (# to #) with those of raw rank 64 at damping 0.1, and by # (# to #) without 50 random texts", RISE, None),
    (RESULTS, "step on the top 5 examples helped SmolLM2's log-probability of each of 12 answers more than a step on 5 random ones", [("tail", f"| {kind} | ~ | # of 12 |") for kind in ("`none` (gradients)", "`raw`", "`ekfac`")], lambda *x: check(set(x) == {12})),
    (RESULTS, "In the mean it rose by # to # nats; # of the # rose", [*(("tail", f"| {kind} | #") for kind in ("`ekfac`", "`raw`", "`none` (gradients)")), ("tail", "found # of #")], lambda a, b, c, rose, total: [min(a, b), c, rose, total]),
    # docs/results.md: topic recall, which has no other record
    (RESULTS, "answered # questions about one topic each. The train examples are # blocks from # topics", [("topics", "answered # questions about one topic"), ("topics", "examples are # blocks of"), ("topics", "tokens from # topics")], None),
    (RESULTS, "has the topic in the first 10 for # of the questions and in first place for #, `raw` for # and #, no Hessian for # and #; in random order the first 10 have it for #.", [*(("topics", f"| `{kind}` | `cosine` | # | #") for kind in ("ekfac", "raw", "none")), ("topics", "| random order | | #")], None),
    (RESULTS, "(# against # of 24 questions; Fisher's exact test, p = #), the first 10 do not. With `dot` neither does (# against #; p = #)", [("topics", "does with cosine (# against # of 24 questions; Fisher's exact test, p = #), but not with dot (# against #; p = #)")], None),
    (RESULTS, "# instructions about Python's standard library (docstrings), a target of # others", [("selection", "docstring. # rows to select from"), ("selection", "the target are # other rows")], None),
    (RESULTS, "before #; after fine-tuning on the tenth that `analysis.py --select 0.1` chose #, on a random tenth # (# more, # to #), on all #. Of the # chosen rows # are about email; in all #, # are", [("selection", "before, #:"), ("selection", "| selected, 10% | 60 | # (~)"), ("selection", "| random, 10% | 60 | # (~) | # (~) | # (# to #)"), ("selection", "| all | 600 | # (~)"), ("selection", "Of the # selected rows # are of email"), ("selection", "docstring. # rows to select from, of which # are")], lambda before, best, random, change, more, low, high, whole, *rest: [before, best, random, more, low, high, whole, *rest]),
    (README, "For #% of 24 questions, the right topic is among the ten", [("topics", "| `ekfac` | `cosine` | #")], lambda share: [100 * share]),
    # benchmarks/README.md: results
    (SPEED, "| quickstart, with model conversion, without installation | 4 min 40 s |", [("quickstart", "4 min 40 s")], None),
    (SPEED, "| the same again | 31 s |", [], None),
    (SPEED, "predicted by a trial of 30 s; measured | 206 s; 227 s |", [], None),
    (SPEED, "| shading the tokens of 4 queries x 20 examples | 1 min 50 s |", [], None),
    (SPEED, "as wide as a token's experts | #, #; #, # |", [("extraction_experts", "included: # at rank 64 and # at rank 136"), ("extraction_experts", "dense model has # and #")], None),
    (SPEED, "median of five pairs (lowest, highest) | # (#, #) |", [("extraction", "hoped for): #, the median of five pairs that were disturbed (# to #)")], None),
    (SPEED, "batches of 1024 tokens, shards of # MB | # GB |", [("peers", "none ours ~ MB stored # GB")], lambda peak: [16 * 90 * 4096 * 4 / 1e6, peak]),
    (SPEED, "shards of # MB, two of which are in memory | # GB (computed) |", [("peers", "none ours ~ MB stored # GB")], lambda peak: [268, peak - 0.024 + 2 * 0.268]),
    (SPEED, "| tokens/s, gradients only: this program, bergson 2.5.1, LogIX 0.1.1 | #, #, # |", PEERS, None),
    (SPEED, "fewer examples than k (see the record) | #, #, # |", [("peers", f"raw {name} # tokens/s") for name in ("ours", "bergson", "logix")], None),
    (SPEED, "| scoring 1, 10 queries: its bytes/s as a share of a plain read of the same files, in the page cache | #, # |", [("scoring", "plain read 17.9 GB/s, warm; 2.95 GB 1 queries ~ GB/s # of the read ~ 10 queries ~ GB/s # of the read")], None),
    (SPEED, "| scoring 100, 1000 queries: its FLOP/s as a share of the matrix product's peak | #, # |", [("scoring", f"{queries} queries {speed} GB/s ~ GFLOP/s # of the product's peak") for queries, speed in ((100, "2.50"), (1000, "0.30"))], None),
    (
        SPEED,
        "| scoring 10 queries: its time as a multiple of one query's; float32 of rank 64, signs of rank 128 | #, # |",
        [("few_bits", "| 1 | # | # | ~ | | 10 | # | # |"), ("scoring", "0.79 of the read ~ peak # examples/s 10 queries ~ peak # examples/s")],
        lambda a, b, c, d, one, ten: [*check_is(a / c, one / ten, 0.1), one / ten, b / d],
    ),
    (SPEED, "signs of rank 128 against float32 of rank 64; 1, 10, 50, 100, 300 queries: ratio of examples/s (300: one thread, other sizes) | #, #, #, #, # |", [*SPEEDS, ("few_bits", "300 queries # and #, ratio #")], lambda *x: [*check_is(x[5] / x[4], x[6], 0.005), *x[:4], x[6]]),
    (
        SPEED,
        "| scoring int8, int4 against float32 of the same rank (64); 1, 10, 100 queries: ratio of examples/s | #, #, #; #, #, # |",
        [("scoring_types#By wall time", f"| {queries} | ~ | # (~) | # (~) | ~ |") for queries in (1, 10, 100)],
        lambda *x: [*x[::2], *x[1::2]],
    ),
    (
        SPEED,
        "against kronfluence 1.0.1: difference of the scores; share of its time, 2 threads, with batches as large as kronfluence's; with this program's default batches | #; #; # to # |",
        [("few_bits", "Scores differ by # (relative"), ("few_bits", "ours 3.90, kronfluence 5.01: **#**"), *KRONFLUENCE],
        lambda scores, share, *x: [scores, share, *default_batches(*x)],
    ),
    (SPEED, "| a million short examples, tiny model: stages 2, 3, 4; peak memory | #, #, # s; # GB |", MILLION, lambda *x: (x[0], x[2], x[4], max(x[1::2]))),
    (SPEED, "| a store of # GB (5 million examples): scored for 3 queries; peak memory; files | # s; # GB; # |", [("soak", "| 5,000,000 | ~ | #, # | ~ | # | # |")], lambda s, gb, count, disk: [disk, s, gb, count]),
    (SPEED, "before the scripts parsed first | #, # s; #, # s |", [("startup", "| `generate.py --help` | ~ | ~ | # | # |"), ("startup", "| `analysis.py --help` | ~ | ~ | # | # |")], lambda *x: [x[1], x[3], x[0], x[2]]),
    (SPEED, "of a layer from 10,000 examples | #, #, # s |", [("hessian", "a layer's: raw # s ~ kfac # s ~ ekfac # s ~ ekfac, second pass")], None),
    (SPEED, "| speed of two processes of one thread each against one | # times |", [("scaling", "two processes are # times as fast as one ")], None),
    (
        SPEED,
        "| killed with SIGKILL at # random moments of # runs: scores after the restarts | those of an undisturbed run: # bit for bit, one to # |",
        [("faults", "| # kills (~), and # after the last change"), ("faults", "| # runs, each ~: # with scores ~ one to #, which")],
        lambda a, b, runs, same, error: [a + b, runs, same, error],
    ),
    (SPEED, "| # random bits flipped in a run's files: results that changed silently | # |", [("faults", "| all | # | ~ | ~ | ~ | # | 0 |")], None),
    # docs/results.md: targets, negative results
    (SPEED, "| 1.5 times bergson's speed, without a Hessian | #; the matrix products alone allow # |", [*PEERS[:2], ("peers", "set (see the record of extraction): # times")], lambda a, b, most: [a / b, most]),
    (SPEED, "| 3 times LogIX's speed, with a Hessian | # with `raw`, # with `kfac` |", [("peers", "with its Hessian: # with `raw`, # with `kfac`")], None),
    (SPEED, "| 10 queries at half the speed of a plain read | # |", [("scoring", "0.79 for 1, # for 10")], None),
    (RESULTS, "| 1.5 times the LDS of raw on GPT-2 with fortunes | #; uncompressed EK-FAC has # |", [("fortunes#gpt2", f"{BEST} ~ | # ("), ("fortunes#gpt2", "| ekfac | uncompressed | dot | none | ~ | # (")], None),
    (RESULTS, "| signs of rank 64 within 5% of float32, on Llama with fortunes | #% |", [("fortunes#llama", f"| ekfac | rank 64, {kind} | dot | ~ | #") for kind in ("int1", "float32")], lambda a, b: [100 * (1 - a / b)]),
    (SPEED, "default batches | # to # times its time |", KRONFLUENCE, lambda *x: default_batches(*x)),
    (RESULTS, "40 facts with invented names were planted in 3 texts each, and a GPT-2 of 2 layers", [("planted", "40 invented facts in 3 wordings each"), ("planted", "a GPT-2 of 2 layers")], None),
    (RESULTS, "BM25 had #% of a fact's texts among the first 10, the influence scores #% to #%.", PLANTED, lambda *x: percent(*x[1::2])),
    (RESULTS, "Among the first 3 it was #% against #% to #%", PLANTED, lambda *x: percent(*x[::2])),
    (RESULTS, "than `random` at rank 64 (# against #, # against #;", [(bed, f"| ekfac | rank 64, {kind} | dot | ~ | #") for bed in TESTBEDS[:2] for kind in ("pca, float32", "float32")], None),
    (SPEED, "# times as fast in the forward pass, after # s of compiling", [("extraction", "forward # times as fast"), ("extraction", "after # s of ")], None),
    # other pages
    ("docs/faq.md", "So 10 queries took # times as long as one (float32 of rank 64, 2 CPU cores,", [("scoring", "0.79 of the read ~ peak # examples/s 10 queries ~ peak # examples/s")], lambda one, ten: [one / ten]),
    ("docs/faq.md", "with signs of rank 128 # times", [("few_bits", "| 1 | ~ | # | ~ | | 10 | ~ | # |")], lambda one, ten: [one / ten]),
    ("docs/faq.md", "From about 1000 queries", [], None),
    ("evaluation/README.md", "too narrow by a factor of about #", [("lds", "factor of about #."), ("fortunes", "factor of about #)")], None),
    ("docs/paper.md", "drawn from N(0, 1/r)", [], None),
    ("docs/many_gpus.md", "3.3 instead of 2.3 forward passes' time (computed from [0.44]", [("extraction", "hoped for): #, the median")], lambda share: check_is(1 / share, 2.3, 0.05)),
    ("docs/many_gpus.md", "Tested with # kills at random moments and # flipped bits", [("faults", "| # kills (~), and # after the last change"), ("faults", "| all | # |")], lambda a, b, bits: [a + b, bits]),
    ("docs/many_gpus.md", "Two processes of one thread each are # times as fast as one, on 2 cores", [("scaling", "two processes are # times as fast as one ")], None),
    # computed
    ("docs/paper.md", "# GFLOP per token, 3.0e19 FLOP; # GPU hours at 40% of an H100's # TFLOP/s", [], lambda: [0.4 * plan.BF16 / speed_at(64) / 1e9, plan.TOKENS / speed_at(64) / 3600, plan.BF16 / 1e12]),
    *((PLAN, row, [], list) for rows in plan.tables(plan.LLAMA3_8B).values() for row in rows if "---" not in row),
    (PLAN, "# blocks of width #, MLP of #, # heads and # key-value heads, vocabulary #. `--mlp_only` tracks # matrices", [], lambda: shape_of(plan.LLAMA3_8B)),
    (PLAN, "Examples have 512 tokens.", [], list),
    (PLAN, "a peak of # TFLOP/s in bfloat16 (dense)", [], lambda: [plan.BF16 / 1e12]),
    (PLAN, "We assume #% of it", [], lambda: [100 * plan.SHARE]),
    (PLAN, "the factor sums together are #% of the FLOPs", [], lambda: [100 * share_of_ours(64)]),
    (PLAN, "The weights take # GB in bfloat16, and the projections # GB at rank 64 and # GB at rank 136", [], lambda: gigabytes(*plan.memory_bytes(plan.LLAMA3_8B, 64), plan.memory_bytes(plan.LLAMA3_8B, 136)[1])),
    (PLAN, "We assume # GB/s, PCIe 4.0 x16", [], lambda: gigabytes(plan.PCIE)),
    (PLAN, "at rank 64 in float32 it takes #% of the time", [], lambda: [100 * busy_link(64, "float32")]),
    (PLAN, "Signs of rank 136 take a seventh of the bytes of float32 at rank 64, and 1/# of float32 at the same rank", [], lambda: [*check_is(of_signs(64), 7, 0.1), of_signs(136)]),
    (PLAN, "an example takes # GB in bfloat16. PCIe then bounds at # tokens/s", [], lambda: [unprojected() / 1e9, plan.PCIE / unprojected() * 512]),
    (PLAN, "We assume # GB/s for a disk", [], lambda: gigabytes(plan.DISK)),
    (PLAN, "at #% of the peak: # TFLOP/s in float32; for integers # TFLOP/s", [], lambda: [100 * plan.SHARE, plan.FP32 / 1e12, plan.BF16 / 1e12]),
    (PLAN, "takes # s at rank 64, and # s at rank 136, at #% of # TFLOP/s; its Cholesky factors # s and # s at #% of # TFLOP/s in float64", [], lambda: seconds_of_raw()),
    (PLAN, "It takes less than 8 minutes on one GPU", [], list),
]
# fmt: on


def pattern(words: str) -> re.Pattern:
    """Return the regular expression of words with # and ~."""
    parts = (re.escape(part).replace("\\#", NUMBER).replace("\\~", "[^\n]*?") for part in words.split())
    return re.compile(r"\s+".join(parts))


def find(text: str, words: str) -> re.Match:
    """Return the one place of the words in a text."""
    found = list(pattern(words).finditer(text))
    assert len(found) == 1, f"expected once, found {len(found)} times: {words}"
    return found[0]


def number(text: str) -> float:
    """Return a shown number, with thousands' commas."""
    return float(text.replace(",", ""))


def record_numbers(record: str, words: str) -> list[float]:
    """Return the numbers at the words in a record, or in a section of it (record#section)."""
    name, _, section = record.partition("#")
    text = (ROOT / RECORDS[name]).read_text()
    if section:
        text = text.partition(f"### {section}\n")[2].partition("\n### ")[0]
    return [number(group) for group in find(text, words).groups()]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure[0]}: {figure[1][:60]}")
def test_a_figure_is_its_records(figure):
    """To the digits that the page shows."""
    page, words, sources, formula = figure
    shown = find((ROOT / page).read_text(), words).groups()
    values = [value for source in sources for value in record_numbers(*source)]
    values = list(formula(*values)) if formula else values[: len(shown)]
    assert len(values) == len(shown)
    for text, value in zip(shown, values, strict=True):
        digit = Decimal(text.replace(",", "")).as_tuple().exponent
        assert abs(number(text) - value) <= 0.5000001 * 10.0**digit, f"{page} has {text}, the record {value:g}"


def blocks(text: str) -> list[tuple[int, int, str]]:
    """Return (start, end, heading) of each paragraph, list item and row of a table."""
    found, heading = [], ""
    for match in re.finditer(r"^(?:#+ .*|\|.*|(?:- )?\S.*(?:\n(?![-|#]|$).+)*)$", text, re.MULTILINE):
        if match[0].startswith("#"):
            heading = match[0]
        found.append((match.start(), match.end(), heading))
    return found


def cited_numbers(page: str) -> list[tuple[int, str]]:
    """Return (place, number) of the numbers in what cites a record: a block, or the whole section in README and results."""
    text = (ROOT / page).read_text()
    cited = {b for b in blocks(text) if re.search(r"\]\([^)]*results/[^)]*\.md\)", text[b[0] : b[1]])}
    if page in (README, RESULTS, SPEED):
        cited = {b for b in blocks(text) if b[2] in {heading for _, _, heading in cited}}
    if page == PLAN:
        cited = {*blocks(text)}
    hidden = r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv [\d.]+|\d{4}-\d\d-\d\d"  # code, links, dates
    plain = re.sub(hidden, lambda match: " " * len(match[0]), text, flags=re.DOTALL)
    numbers = re.finditer(r"(?<![\w.-])(?:\d[\d,]*(?:\.\d+)*|\.\d+)(?!\w)", plain)
    return [(m.start(), m[0]) for m in numbers if any(b[0] <= m.start() < b[1] for b in cited)]


@pytest.mark.parametrize("page", PAGES)
def test_each_number_that_cites_a_record_is_a_figure(page):
    """In README.md and docs/results.md each number of a section that cites one; elsewhere of a paragraph or row."""
    text = (ROOT / page).read_text()
    spans = [find(text, words).span() for name, words, *_ in FIGURES if name == page]
    lines = text.splitlines()
    missing = [
        f"{value}: {lines[text.count(chr(10), 0, place)]}"
        for place, value in cited_numbers(page)
        if not any(start <= place < end for start, end in spans)
    ]
    assert not missing, "\n".join(missing)


def test_each_record_is_read():
    """A record that no figure is read from has been forgotten."""
    read = {RECORDS[record.partition("#")[0]] for _, _, sources, _ in FIGURES for record, _ in sources}
    found = {
        str(p.relative_to(ROOT))
        for folder in ("evaluation", "benchmarks")
        for p in (ROOT / folder).glob("results/*.md")
    }
    assert found <= read
