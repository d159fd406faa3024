"""How far scores agree with reference scores of the same queries and examples, as uncompressed EK-FAC's.

    python evaluation/agreement.py logs/full/scores/queries-* logs/other/scores/queries-*

The first folder is the reference. Prints, for each other one, the mean over queries of Spearman's correlation and of
the share of the reference's 10 best examples that are among its own, with 95% bootstrap intervals, and stored bytes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import scored
from lds import describe, gradient_bytes, ranks

from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import positive_int


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("reference", type=Path, help="a folder under logs/<run>/scores/")
    parser.add_argument("scores", nargs="+", type=Path, help="folders of the same queries and examples")
    parser.add_argument("--k", type=positive_int, default=10, help="best examples that are compared (10)")
    return parser


def overlap(one: np.ndarray, two: np.ndarray, k: int) -> np.ndarray:
    """Return the share of the k highest of each row of `one` [Q, N] that are among those of `two`, [Q]."""
    best = [np.argsort(-scores, axis=1, kind="stable")[:, :k] for scores in (one, two)]
    return np.array([len(np.intersect1d(a, b)) / k for a, b in zip(*best, strict=True)])


def main(args: argparse.Namespace) -> None:
    """Print a row a folder."""
    reference, *asked = scored.load(args.reference)[:3]
    for folder in args.scores:
        scores, *found = scored.load(folder)[:3]
        if found != asked:
            raise ValueError(
                f"expected the queries and examples of {args.reference} in {folder}, got others; score them"
            )
        found = (ranks(scores) * ranks(reference)).sum(axis=1), overlap(reference, scores, args.k)
        shown = (describe(values.tolist(), values.tolist()) for values in found)
        size = gradient_bytes(folder.parents[1], scores.shape[1])
        print(
            "  ".join(f"{about['mean']:.3f} [{about['low']:.3f}, {about['high']:.3f}]" for about in shown)
            + f"  {size:12,.0f} bytes  {folder}"
        )


if __name__ == "__main__":
    run_script(main, build_parser())
