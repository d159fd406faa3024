"""How well scores agree with reference scores of the same queries and examples, such as uncompressed EK-FAC's.

    python evaluation/agreement.py logs/full/scores/queries-* logs/other/scores/queries-*

The first folder is the reference. Prints a row for each other folder, with 95% bootstrap intervals over the queries:
Spearman's correlation; the share of the reference's 10 best examples that are among the folder's K best, for several K;
the same for the 10 best of re-ranked scores (--rerank), if the folder has them; and the stored bytes per example.
--plot draws the shares against K: how many candidates re-ranking needs.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored
from lds import gradient_bytes, ranks, runs_of

from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script

CANDIDATES = (10, 20, 50, 100, 200)


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("reference", type=Path, help="a folder under logs/<run>/scores/")
    parser.add_argument("scores", nargs="+", type=Path, help="folders of the same queries and examples")
    parser.add_argument("--k", type=positive_int, default=10, help="number of best examples to compare (10)")
    parser.add_argument("--plot", type=Path, help="draw the shares in this file")
    return parser


def overlap(reference: np.ndarray, other: np.ndarray, k: int, candidates: int | None = None) -> np.ndarray:
    """Return the share of the k highest of each row of `reference` [Q, N] among the first candidates of `other`, [Q].

    By default the first k.
    """
    best, first = (np.argsort(-scores, axis=1, kind="stable") for scores in (reference, other))
    rows = zip(best[:, :k], first[:, : candidates or k], strict=True)
    return np.array([len(np.intersect1d(*row)) / k for row in rows])


def main(args: argparse.Namespace) -> None:
    """Print a row for each folder, and draw the plot."""
    reference, rows, curves = scored.load(args.reference), [], {}
    for folder in args.scores:
        other = scored.load(folder)
        if (other.queries, other.documents) != (reference.queries, reference.documents):
            raise ValueError(
                f"expected the queries and examples of {args.reference} in {folder}, got others; score them"
            )
        correlation = (ranks(other.scores) * ranks(reference.scores)).sum(axis=1)
        shares = [overlap(reference.scores, other.scores, args.k, count) for count in CANDIDATES]
        size = sum(gradient_bytes(run, len(other.documents)) for run in runs_of(folder))
        again = [overlap(reference.scores, order, args.k) for order in scored.rankings(folder, other).values()][1:]
        rows.append([str(folder), correlation, *shares, *(again or [""]), f"{size:,.0f}"])
        curves["/".join(folder.absolute().parts[-4:-2])] = [share.mean() for share in shares]
    first = [f"{args.k} best in first {count}" for count in CANDIDATES]
    scored.print_table(["scores", "Spearman", *first, "re-ranked", "bytes"], rows)
    if args.plot:
        draw(args.plot, curves, args.k)


def draw(path: Path, curves: dict[str, list[float]], k: int) -> None:
    """Draw the mean shares of each run."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, shares in curves.items():
        axes.plot(CANDIDATES, shares, marker=".", label=name)
    axes.set(xscale="log", xticks=CANDIDATES, xticklabels=CANDIDATES, xlabel="candidates of a query (K)")
    axes.set(ylabel=f"share of the {k} best among them", ylim=(0, 1.02))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_script(main, build_parser())
