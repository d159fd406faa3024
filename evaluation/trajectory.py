"""LDS of scores over checkpoints: of each checkpoint alone, and of means over two, three and all of them.

    python evaluation/trajectory.py testbeds/gpt2 testbeds/gpt2/trajectory/rank136 --json testbeds/trajectory/gpt2.json
    python evaluation/trajectory.py --plot testbeds/trajectory

Reads a testbed of lds.py and parent folders of extract_log.py --checkpoints, whose checkpoints compute_influence.py has
scored. A mean is the rule of docs/method.md, computed here from the scores of the single checkpoints, so that many sets
of checkpoints cost nothing. The plots go to trajectory.png, the table to trajectory.md. Ratios are to the last
checkpoint, the final model, of the same parent folder.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lds
import scored
from lds_plot import share

from logra.influence import checkpoint_factors
from logra.runtime import files
from logra.runtime.flags import Parser, run_script
from logra.stages.checkpoints import read_models

RECOMMENDED = ("0.2", "0.5", "model")
NAMED_SETS = (("0.5",), ("0.5", "model"), RECOMMENDED)


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("testbed", type=Path, nargs="?", help="its folder")
    parser.add_argument("parents", type=Path, nargs="*", help="parent folders of runs of its checkpoints")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="instead: draw the .json files of this folder")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print and write the LDS of all sets, or draw the plots."""
    if args.plot:
        draw(args.plot)
        return
    if not args.parents:
        raise ValueError("expected a testbed and parent folders, or --plot, got neither; see --help")
    subsets, losses = np.load(args.testbed / "subsets.npy"), lds.load_losses(args.testbed / "losses")
    highest = lds.ceiling(losses, lds.load_losses(args.testbed / "losses_again"))
    content: dict[str, Any] = {"ceiling": highest, "parents": {}}
    print(f"ceiling {highest:.3f}")
    for parent in args.parents:
        singles, bytes_each = single_scores(parent)
        rows = evaluate(singles, bytes_each, subsets, losses)
        content["parents"][parent.name] = rows
        print(f"{parent}: {bytes_each:,.0f} bytes an example and checkpoint")
        for row in rows:
            if row["shown"]:
                print(f"  {row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})  x{row['ratio']:.2f} "
                      f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})  {row['name']}")  # fmt: skip
    if args.json:
        files.write_json(args.json, content)


def single_scores(parent: Path) -> tuple[dict[str, np.ndarray], float]:
    """Return the scores [Q, N] of each checkpoint by its folder's name, in order, and the bytes an example of one."""
    singles, sizes = {}, []
    for name in read_models(parent):
        folders = sorted((parent / name / "scores").glob("*/run.json"))
        if len(folders) != 1:
            raise ValueError(f"expected one folder of scores in {parent / name}, got {len(folders)}; score it once")
        singles[name] = scored.load(folders[0].parent).scores
        sizes.append(lds.gradient_bytes(parent / name, singles[name].shape[1]))
    return singles, max(sizes)


def combined(singles: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    """Return the mean over checkpoints of dot scores [Q, N], each divided by its standard deviation."""
    scores = np.stack([singles[name] for name in names]).astype(np.float64)  # [C, Q, N]
    factors = checkpoint_factors(torch.from_numpy(scores.std(axis=2)), [1.0] * len(names), "dot").numpy()
    return (factors[:, :, None] * scores).sum(axis=0)


def evaluate(
    singles: dict[str, np.ndarray], bytes_each: float, subsets: np.ndarray, losses: np.ndarray
) -> list[dict[str, Any]]:
    """Return a row for each set of one, two, three and all checkpoints, the final model first.

    Intervals are computed for the shown sets only: single checkpoints, NAMED_SETS, all, and the best pair and three.
    """
    names = tuple(singles)
    sets = [tuple(s) for size in (1, 2, 3) for s in itertools.combinations(names, size)]
    sets += [names] if len(names) > 3 else []
    values = {chosen: lds.lds(combined(singles, chosen), subsets, losses) for chosen in sets}
    best = {max((s for s in sets if len(s) == n), key=lambda s: values[s].mean()) for n in (2, 3) if len(names) >= n}
    final = (names[-1],)
    final_sample = lds.bootstrap_means(singles[names[-1]], subsets, losses)
    rows = []
    for chosen in sorted(sets, key=lambda chosen: (len(chosen), chosen != final)):
        row = {"name": " ".join(chosen), "count": len(chosen), "bytes": len(chosen) * bytes_each}
        row |= {"mean": float(values[chosen].mean()), "best": chosen in best, "shown": True}
        if len(chosen) == 1 or chosen in (*NAMED_SETS, names) or chosen in best:
            sample = lds.bootstrap_means(combined(singles, chosen), subsets, losses)
            row |= lds.describe(values[chosen].tolist(), sample, values[final].tolist(), final_sample)
        else:
            row["shown"] = False
        rows.append(row)
    return rows


def draw(folder: Path) -> None:
    """Write trajectory.png and trajectory.md from the .json files of a folder."""
    beds = {path.stem: files.read_json(path, "run trajectory.py again") for path in sorted(folder.glob("*.json"))}
    figure = Figure(figsize=(4.4 * len(beds), 7.2), layout="constrained")
    axes = figure.subplots(2, len(beds), squeeze=False)
    lines: list[str] = []
    for column, (bed, content) in enumerate(beds.items()):
        of_share, of_count = axes[0][column], axes[1][column]
        lines += [
            f"### {bed}: ceiling {content['ceiling']:.3f}",
            "",
            "| gradients | checkpoints | bytes an example | LDS (95%) | of the ceiling | ratio to the last (95%) |",
            "|---|---|---|---|---|---|",
        ]
        for parent, rows in content["parents"].items():
            singles = [row for row in rows if row["count"] == 1]
            singles = singles[1:] + singles[:1]
            shares = [float(row["name"]) if row["name"] != "model" else 1.0 for row in singles]
            of_share.plot(shares, [row["mean"] for row in singles], marker=".", label=parent)
            counts = sorted({row["count"] for row in rows})
            by_count = [[row["mean"] for row in rows if row["count"] == count] for count in counts]
            of_count.plot(counts, [np.mean(means) for means in by_count], marker=".", label=parent)
            of_count.fill_between(counts, [min(m) for m in by_count], [max(m) for m in by_count], alpha=0.15)
            for row in (row for row in rows if row["shown"]):
                best = " (the best of all sets of this size here)" if row["best"] else ""
                lines.append(
                    f"| {parent} | {row['name']}{best} | {row['bytes']:,.0f} | {row['mean']:.3f} ({row['low']:.3f} to "
                    f"{row['high']:.3f}) | {share(row['mean'], content['ceiling'])} | {row['ratio']:.2f} "
                    f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) |"
                )
        of_share.set(title=bed, xlabel="share of the training", ylabel="LDS of one checkpoint")
        of_count.set(
            title="all sets: mean, lowest, highest", xlabel="checkpoints", xticks=counts, ylabel="LDS of their mean"
        )
        for plot in (of_share, of_count):
            plot.axhline(content["ceiling"], ls="--", lw=0.8, color="gray")
        of_share.legend(fontsize=8)
        lines.append("")
    figure.savefig(folder / "trajectory.png", dpi=150)
    with files.atomic(folder / "trajectory.md") as path:
        path.write_text("\n".join(lines), "utf-8")


if __name__ == "__main__":
    run_script(main, build_parser())
