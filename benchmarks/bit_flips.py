"""Bit flips: a random bit of a random file of a finished run is flipped. Is it noticed, or does a result change?

After each flip the stages run in this process: 4 (on the stored scores), 3 (new scores), 2 (which computes altered
parts again), then 3 and 4 once more. Then the folder is restored. The outcome is `noticed` if a stage ends with one
line and exit status 2, `mended` if stage 2 computed the part again (with the scores of before, to 1e-5), and `harmless`
if all results are equal to those of before, bit for bit. Two outcomes are defects: `silent` (a stage succeeds with
other results) and `crash` (a traceback). Prints a row for each kind of file, and one JSON line.

    python benchmarks/bit_flips.py --flips 1000
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.soak import make_model, write_texts
from logra.runtime.flag_types import positive_int, seed_int
from logra.runtime.flags import Parser, run_script

RUN = "--model_name model --data_name texts.jsonl --log_dir log --hessian ekfac --rank 8 --shard_examples 8"
STAGES = {
    "extract_log": RUN.split(),
    "compute_influence": "--log_dir log --split queries.jsonl --mode cosine".split(),
    "analysis": ["--log_dir", "log"],
}
ORDER = ("analysis", "compute_influence", "extract_log", "compute_influence", "analysis")


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--flips", type=positive_int, default=1000, help="(1000)")
    parser.add_argument("--seed", type=seed_int, default=0, help="(0)")
    return parser


def run_stage(name: str) -> tuple[Any, str]:
    """Run a stage; return its exit status (None: a traceback) and what it printed."""
    module, argv, status = importlib.import_module(name), sys.argv, 0
    sys.argv, said = [f"{name}.py", "--quiet", *STAGES[name]], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            run_script(module.main, module.build_parser())
        except SystemExit as stop:
            status = stop.code
        except Exception as error:
            status = None
            print(f"{type(error).__name__}: {error}")
        finally:
            sys.argv = argv
    return status, said.getvalue()


def results(run_dir: Path) -> dict[str, bytes]:
    """Return the files that stages 3 and 4 wrote."""
    names = {"compute_influence": "scores.npy", "analysis": "top_k.jsonl"}
    return {name: path.read_bytes() for name, file in names.items() for path in run_dir.glob(f"scores/*/{file}")}


def same_result(name: str, found: dict[str, bytes], before: dict[str, bytes], exact: bool) -> bool:
    """Say whether a stage's result is that of before.

    Where a part was computed again (not exact), only scores are compared, to 1e-5: their order may differ.
    """
    if exact or name != "compute_influence":
        return not exact or found.get(name) == before.get(name)
    one, two = (np.load(io.BytesIO(part[name])) for part in (found, before))
    return bool(np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two))


def outcome(run_dir: Path, before: dict[str, bytes]) -> tuple[str, str]:
    """Run the stages on a folder with a flipped bit; return the outcome, and what the stages printed."""
    status, noticed, mended = 0, "", ""
    for name in ORDER:
        status, said = run_stage(name)
        if status not in (0, 2) or (status == 2 and len(re.findall("error: ", said)) != 1):
            return "crash", f"{name}: {said}"
        if "computing it again" in said:
            mended = said
        if status == 2:
            noticed = noticed or said
        elif not same_result(name, results(run_dir), before, exact=not mended):
            return "silent", name
    if status == 2:
        return "noticed", noticed
    return ("mended", mended) if mended else ("noticed", noticed) if noticed else ("harmless", "")


def file_kind(path: Path, run_dir: Path) -> str:
    """Return the name of a file's row: its path without numbers and without the name of the scores' folder."""
    return re.sub(r"\b\d{5}\b", "N", re.sub("scores/[^/]*", "scores/*", str(path.relative_to(run_dir))))


def flip_bit(path: Path, draw: random.Random) -> None:
    """Flip a random bit of a file."""
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def main(args: argparse.Namespace) -> None:
    """Make a run, flip bits, print the table and a JSON line."""
    draw, counts = random.Random(args.seed), {}
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_model(Path("model"))
        write_texts(Path("texts.jsonl"), 40, 0)
        write_texts(Path("queries.jsonl"), 3, 1)
        for name in STAGES:
            status, said = run_stage(name)
            if status != 0:
                raise ValueError(f"expected {name} to succeed, got {said}")
        run_dir, copy = Path("log"), Path("copy")
        shutil.copytree(run_dir, copy)
        before = results(run_dir)
        paths = sorted(path for path in run_dir.rglob("*") if path.is_file() and path.stat().st_size)
        for _ in tqdm(range(args.flips), unit="flip"):
            path = draw.choice(paths)
            flip_bit(path, draw)
            found, said = outcome(run_dir, before)
            counts.setdefault(file_kind(path, run_dir), Counter())[found] += 1
            if found in ("silent", "crash"):
                tqdm.write(f"{found}: {path}: {said}")
            shutil.rmtree(run_dir)
            shutil.copytree(copy, run_dir)
    names = ("noticed", "mended", "harmless", "silent", "crash")
    print(f"| file | flips | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    counts["all"] = sum(counts.values(), Counter())
    for name, found in counts.items():
        print(f"| {name} | {found.total()} | {' | '.join(str(found[name]) for name in names)} |")
    print(json.dumps({"flips": args.flips} | {name: counts["all"][name] for name in names} | {"cores": os.cpu_count()}))


if __name__ == "__main__":
    run_script(main, build_parser())
