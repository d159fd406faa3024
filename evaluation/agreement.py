"""How well scores agree with reference scores of the same queries and examples, such as uncompressed EK-FAC's.

    python evaluation/agreement.py logs/full/scores/queries-* logs/other/scores/queries-*

The first folder is the reference. Prints a row for each other folder: the mean over queries of Spearman's correlation,
the mean share of the reference's 10 best examples that are among the folder's 10 best, both with 95% bootstrap
intervals, and the stored bytes per example.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored
from lds import gradient_bytes, ranks, runs_of

from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import positive_int


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("reference", type=Path, help="a folder under logs/<run>/scores/")
    parser.add_argument("scores", nargs="+", type=Path, help="folders of the same queries and examples")
    parser.add_argument("--k", type=positive_int, default=10, help="number of best examples to compare (10)")
    return parser


def overlap(one: np.ndarray, two: np.ndarray, k: int) -> np.ndarray:
    """Return the share of the k highest of each row of `one` [Q, N] that are among those of `two`, [Q]."""
    best = [np.argsort(-scores, axis=1, kind="stable")[:, :k] for scores in (one, two)]
    return np.array([len(np.intersect1d(a, b)) / k for a, b in zip(*best, strict=True)])


def main(args: argparse.Namespace) -> None:
    """Print a row for each folder."""
    reference = scored.load(args.reference)
    for folder in args.scores:
        other = scored.load(folder)
        if (other.queries, other.documents) != (reference.queries, reference.documents):
            raise ValueError(
                f"expected the queries and examples of {args.reference} in {folder}, got others; score them"
            )
        correlation = (ranks(other.scores) * ranks(reference.scores)).sum(axis=1)
        shared = overlap(reference.scores, other.scores, args.k)
        size = sum(gradient_bytes(run, len(other.documents)) for run in runs_of(folder))
        print(f"{scored.interval(correlation)}  {scored.interval(shared)}  {size:12,.0f} bytes  {folder}")


if __name__ == "__main__":
    run_script(main, build_parser())
