"""How often the first k examples for a question about Python are of the right topic of Python's manual.

Reads folders of scores over `pydoc` of queries whose ids are topics (topics.jsonl). Prints a row for each folder, and
one for a random order of the examples.

    python evaluation/topic_recall.py logs/*/scores/queries-*
"""

import argparse
import sys
from math import comb
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored

from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("scores", nargs="+", type=Path, help="folders under logs/<run>/scores/")
    parser.add_argument("--k", type=positive_int, default=10, help="number of first examples (10)")
    return parser


def recall(folder: Path, k: int) -> dict[str, tuple[float, float, float, int]]:
    """Return the share of questions with their topic in the first k examples, in the first one, mean 1 / rank, Q.

    By name: of the folder's scores and, if it has them, of its re-ranked scores.
    """
    found = scored.load(folder)
    documents, queries = np.array(found.documents), found.queries
    if unknown := set(queries) - set(found.documents):
        raise ValueError(
            f"expected query ids that are topics in {folder}, got {sorted(unknown)}; use evaluation/topics.jsonl"
        )
    rows = {}
    for name, scores in scored.rankings(folder, found).items():
        ranked = documents[np.argsort(-scores, axis=1, kind="stable")]
        ranks = 1 + (ranked == np.array(queries)[:, None]).argmax(axis=1)
        rows[name] = ((ranks <= k).mean(), (ranks == 1).mean(), (1 / ranks).mean(), len(queries))
    return rows


def chance(folder: Path, k: int) -> float:
    """Return the share of questions with their topic in the first k of a random order of the examples."""
    found = scored.load(folder)
    total = len(found.documents)
    others = [total - found.documents.count(topic) for topic in found.queries]
    return float(np.mean([1 - comb(other, k) / comb(total, k) for other in others]))


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print(f"| scores | questions | topic in the top {args.k} | topic first | mean 1/rank |\n|---|---|---|---|---|")
    for folder in args.scores:
        for name, (top, first, reciprocal, count) in recall(folder, args.k).items():
            print(f"| {name} | {count} | {top:.2f} | {first:.2f} | {reciprocal:.2f} |")
    print(f"| random order | | {chance(args.scores[0], args.k):.2f} | | |")


if __name__ == "__main__":
    run_script(main, build_parser())
