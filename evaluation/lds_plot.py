"""The table and the two plots of the numbers of lds.py: LDS against stored bytes, and LDS against the damping.

    python evaluation/lds_plot.py testbeds/results

Reads <folder>/<testbed>.json (lds.py --json). Writes lds.md, lds_bytes.png and lds_damping.png there. Ratios are to the
first row of each file.
"""

import argparse
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra.runtime import files
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import default_damping

SCORES_PATTERN = re.compile(r"(?P<run>[^/]+)/scores/.*-(?P<mode>dot|cosine|l2)-(?P<hessian>\w+)-(?P<damping>[\d.e-]+)$")
LABELS = {  # run of lds_table.sh -> its label in the table, where the name of the run does not give it
    "full": "uncompressed",
    "full-kfac": "uncompressed",
    "full-int1": "unprojected, int1",
    "best": "rank 136, int1 (--preset best)",
}
MARKS = {  # Hessian -> marker and colour
    "raw": ("s", "tab:gray"),
    "kfac": ("^", "tab:green"),
    "ekfac": ("o", "tab:blue"),
    "none": ("x", "tab:red"),
}


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the .json files; the table and the plots are written there too")
    return parser


def label(run: str) -> str:
    """Return the name of a run of lds_table.sh in the table."""
    if run in LABELS:
        return LABELS[run]
    match = re.fullmatch(r"([a-z]+(?:\d+-)?)(\d+)", run)  # eigen64, int4-128
    if not match:
        return run
    kind, rank = match[1].removesuffix("-"), match[2]
    kind = {"raw": "float32", "eigen": "float32", "pca": "pca, float32"}.get(kind, kind)
    return f"rank {rank}, {kind}"


def methods(rows: list[dict]) -> list[dict]:
    """Return a dict for each method, the best first, from the rows of lds.py.

    Its keys are label, mode, hessian, bytes, uncompressed (bool), rows (damping -> row of lds.py) and default (the
    damping that the table shows).
    """
    found: dict[tuple, dict] = {}
    for row in rows:
        match = SCORES_PATTERN.search(row["scores"])
        name, mode, kind, damping = match.groups() if match else (Path(row["scores"]).name, "", "", "0")
        about = {"label": label(name) if match else name, "mode": mode, "hessian": kind, "bytes": row["bytes"]}
        about |= {"uncompressed": name.startswith("full") and "int" not in name, "rows": {}}
        method = found.setdefault((name, mode, kind), about)
        method["rows"][float(damping)] = row
        bits = re.search(r"int\d", LABELS.get(name, name))
        default = default_damping(kind, bits[0] if bits else "float32") if kind not in ("", "none") else float(damping)
        method["default"] = default if default in method["rows"] else float(damping)
    return sorted(found.values(), key=lambda method: -method["rows"][method["default"]]["mean"])


def share(mean: float, ceiling: float) -> str:
    """Return an LDS as a share of the ceiling, which is 0 where the second training agrees with the first by chance."""
    return f"{mean / ceiling:.0%}" if ceiling > 0 else "-"


def table(name: str, found: list[dict], ceiling: float) -> str:
    """Return a Markdown table of a testbed's methods. `ceiling` is the LDS that none can exceed but by chance."""
    lines = [
        f"### {name}: ceiling {ceiling:.3f}",
        "",
        "| Hessian | gradients | mode | bytes an example | LDS (95%) | of the ceiling | ratio (95%) | best damping |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for method in found:
        row = method["rows"][method["default"]]
        best = max(method["rows"], key=lambda damping: method["rows"][damping]["mean"])
        shown = f"{best:g}: {method['rows'][best]['mean']:.3f}" if len(method["rows"]) > 1 else ""
        size = "none" if method["uncompressed"] or not row["bytes"] else f"{row['bytes']:,.0f}"
        lines.append(
            f"| {method['hessian']} | {method['label']} | {method['mode']} | {size} | {row['mean']:.3f} "
            f"({row['low']:.3f} to {row['high']:.3f}) | {share(row['mean'], ceiling)} | {row['ratio']:.2f} "
            f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) | {shown} |"
        )
    return "\n".join(lines) + "\n"


def plot_bytes(folder: Path, testbeds: dict[str, list[dict]]) -> None:
    """Draw LDS against stored bytes, one panel for each testbed."""
    figure = Figure(figsize=(5.5 * len(testbeds), 4.2), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(testbeds), squeeze=False)[0], testbeds.items(), strict=True):
        for method in (m for m in found if m["hessian"] and m["mode"] == "dot" and not m["uncompressed"]):
            row = method["rows"][method["default"]]
            mark, colour = MARKS[method["hessian"]]
            error = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
            axes.errorbar(row["bytes"], row["mean"], error, fmt=mark, color=colour, ecolor="lightgray", markersize=5)
            short = method["label"].replace("rank ", "").replace(", float32", "").replace("--preset ", "")
            if method["hessian"] == "kfac":
                continue  # its points are at those of ekfac
            axes.annotate(short, (row["bytes"], row["mean"]), fontsize=7, xytext=(4, 3), textcoords="offset points")
        for method in (m for m in found if m["uncompressed"]):
            axes.axhline(method["rows"][method["default"]]["mean"], ls="--", lw=0.8, color=MARKS[method["hessian"]][1])
        axes.margins(x=0.14)
        axes.set(xscale="log", xlabel="stored bytes an example", ylabel="LDS", title=f"{name} (dashed: uncompressed)")
        axes.legend(
            handles=[axes.plot([], [], mark, color=colour, label=kind)[0] for kind, (mark, colour) in MARKS.items()],
            fontsize=8, loc="lower right",
        )  # fmt: skip
    figure.savefig(folder / "lds_bytes.png", dpi=150)


def plot_damping(folder: Path, testbeds: dict[str, list[dict]]) -> None:
    """Draw LDS against the relative damping, one line for each method."""
    figure = Figure(figsize=(6.5 * len(testbeds), 4.6), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(testbeds), squeeze=False)[0], testbeds.items(), strict=True):
        for method in (m for m in found if len(m["rows"]) > 1 and m["mode"] == "dot" and m["hessian"] != "kfac"):
            dampings = sorted(method["rows"])
            means = [method["rows"][damping]["mean"] for damping in dampings]
            style = "--" if method["hessian"] == "raw" else "-"
            axes.plot(dampings, means, style, marker=".", lw=1, label=f"{method['hessian']} {method['label']}")
        axes.set(xscale="log", xlabel="damping, in units of the mean eigenvalue", ylabel="LDS", title=name)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "lds_damping.png", dpi=150)


def main(args: argparse.Namespace) -> None:
    """Read the numbers, write the table and the plots."""
    paths = sorted(args.folder.glob("*.json"))
    if not paths:
        raise ValueError(
            f"expected .json files of lds.py --json in {args.folder}, got none; run evaluation/lds_table.sh"
        )
    contents = {path.stem: files.read_json(path, "run lds.py again") for path in paths}
    testbeds = {name: methods(content["rows"]) for name, content in contents.items()}
    text = "\n".join(table(name, found, contents[name]["ceiling"]) for name, found in testbeds.items())
    with files.atomic(args.folder / "lds.md") as path:
        path.write_text(text, "utf-8")
    plot_bytes(args.folder, testbeds)
    plot_damping(args.folder, testbeds)
    print(text)


if __name__ == "__main__":
    run_script(main, build_parser())
