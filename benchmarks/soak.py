"""Soak: many small examples through stages 2 to 4; time, peak memory and files against the number of examples.

A tiny Llama (1 layer, width 16, a vocabulary of 256 bytes) reads texts of 6 to 10 random letters. Each stage is a
process of its own, as when a user starts it; its peak memory is the kernel's number (ru_maxrss). The exponent of a
stage's time is the slope of log time over log examples between the two largest sizes, after the time of the smallest
size (mostly imports) was subtracted. An exponent of 1 means linear. Prints a table and one JSON line.

    python benchmarks/soak.py --examples 1000 100000 300000 1000000
    python benchmarks/soak.py --examples 1000 10000 --queries 10000
"""

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("extract_log.py", "compute_influence.py", "analysis.py")


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    sizes = [1000, 10_000, 100_000]
    parser.add_argument("--examples", type=positive_int, nargs="+", default=sizes, help=f"({sizes})")
    parser.add_argument("--queries", type=positive_int, default=3, help="(3)")
    parser.add_argument("--flags", default="--preset best --shard_examples 8192", help="of stage 2 (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    return parser


def make_model(folder: Path) -> None:
    """Save a tiny Llama and a tokenizer with one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **sizes)).save_pretrained(folder)


def write_texts(path: Path, count: int, seed: int) -> None:
    """Write rows with a random text of 6 to 10 letters each."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            file.write(json.dumps({"text": "".join(draw.choices("abcdefgh ", k=draw.randint(5, 9))) + "."}) + "\n")


def timed(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command; return its seconds and its peak memory in GB."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"expected {' '.join(command)} to succeed, got status {os.waitstatus_to_exitcode(status)}")
    return {"seconds": time.perf_counter() - begin, "gb": used.ru_maxrss * 1024 / 1e9}


def soak(folder: Path, count: int, args: argparse.Namespace) -> dict:
    """Run the stages on `count` examples; return what each took."""
    run_dir = folder / f"log-{count}"
    write_texts(folder / "texts.jsonl", count, 0)
    flags = {
        "extract_log.py": ["--model_name", "model", "--data_name", "texts.jsonl", *args.flags.split(), "--overwrite"],
        "compute_influence.py": ["--split", "queries.jsonl"],
        "analysis.py": [],
    }
    row: dict = {"examples": count, "queries": args.queries}
    for stage in STAGES:
        row[stage] = timed([str(ROOT / stage), "--quiet", "--log_dir", str(run_dir), *flags[stage]], folder)
        print(f"{count} {stage} {row[stage]['seconds']:.1f} s {row[stage]['gb']:.2f} GB", flush=True)
    sizes = [path.stat().st_size for path in run_dir.rglob("*") if path.is_file()]
    row["files"], row["disk_gb"] = len(sizes), sum(sizes) / 1e9
    return row


def main(args: argparse.Namespace) -> None:
    """Run each size, then print the table and a JSON line."""
    with TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        make_model(folder / "model")
        write_texts(folder / "queries.jsonl", args.queries, 1)
        rows = [soak(folder, count, args) for count in sorted(args.examples)]
    print("| examples | " + " | ".join(f"{stage}: s, GB" for stage in STAGES) + " | files | GB on disk |")
    print("|---" * (len(STAGES) + 3) + "|")
    for row in rows:
        cells = " | ".join(f"{row[stage]['seconds']:.0f}, {row[stage]['gb']:.2f}" for stage in STAGES)
        print(f"| {row['examples']:,} | {cells} | {row['files']} | {row['disk_gb']:.2f} |")
    exponents = {}
    if len(rows) > 2:
        for stage in STAGES:
            first, before, last = (rows[i][stage]["seconds"] for i in (0, -2, -1))
            growth = math.log(max(last - first, 0.1) / max(before - first, 0.1))
            exponents[stage] = growth / math.log(rows[-1]["examples"] / rows[-2]["examples"])
    print(json.dumps({"rows": rows, "exponents": exponents, "cores": os.cpu_count(), "machine": platform.machine()}))


if __name__ == "__main__":
    run_script(main, build_parser())
