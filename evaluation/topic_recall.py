"""How often the right topic of Python's manual is among the first k examples of a question about it.

Reads score folders of queries whose ids are topics (topics.jsonl) over `pydoc`. Prints a row a folder, and what a
random order would give.

    python evaluation/topic_recall.py logs/*/scores/queries-*
"""

import argparse
import sys
from math import comb
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored

from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import positive_int


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("scores", nargs="+", type=Path, help="folders under logs/<run>/scores/")
    parser.add_argument("--k", type=positive_int, default=10, help="(10)")
    return parser


def recall(folder: Path, k: int) -> tuple[float, float, float, int]:
    """Return (share of questions with their topic in the first k, in the first, mean of 1 / rank, questions)."""
    run = scored.load(folder)
    documents, queries = np.array(run.documents), run.queries
    if unknown := set(queries) - set(run.documents):
        raise ValueError(
            f"expected query ids that are topics in {folder}, got {sorted(unknown)}; use evaluation/topics.jsonl"
        )
    ranked = documents[np.argsort(-run.scores, axis=1, kind="stable")]
    ranks = 1 + (ranked == np.array(queries)[:, None]).argmax(axis=1)
    return (ranks <= k).mean(), (ranks == 1).mean(), (1 / ranks).mean(), len(queries)


def chance(folder: Path, k: int) -> float:
    """Return the share that a random order of the examples would give."""
    _, queries, documents, *_ = scored.load(folder)
    total = len(documents)
    return float(np.mean([1 - comb(total - documents.count(topic), k) / comb(total, k) for topic in queries]))


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print(f"| scores | questions | topic in the top {args.k} | topic first | mean 1/rank |\n|---|---|---|---|---|")
    for folder in args.scores:
        top, first, reciprocal, count = recall(folder, args.k)
        print(f"| {folder.parents[1].name}/{folder.name} | {count} | {top:.2f} | {first:.2f} | {reciprocal:.2f} |")
    print(f"| random order | | {chance(args.scores[0], args.k):.2f} | | |")


if __name__ == "__main__":
    run_script(main, build_parser())
