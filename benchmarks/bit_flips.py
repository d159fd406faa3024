"""Bit flips: a random bit of a random file of a finished run is turned. Is it noticed, or does a result change?

After each flip the stages run in this process: 4 (the scores that are there), 3 (new scores), 2 (which computes again
what was altered), and 3 and 4 once more; then the folder is put back. A flip is `noticed` where a stage ends with one
line and exit status 2, `mended` where stage 2 computed the part again (with scores as before, to 1e-5), and `harmless`
where all results are as before, bit by bit. `silent` (a stage ended well with other results) and `crash` (a traceback)
are defects. Prints a row a kind of file, and one JSON line.

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

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.soak import make_model, write_texts
from logra.runtime import flags, settings

RUN = "--model_name model --data_name texts.jsonl --log_dir log --hessian ekfac --rank 8 --shard_examples 8"
STAGES = {
    "extract_log": RUN.split(),
    "compute_influence": "--log_dir log --split queries.jsonl --mode cosine".split(),
    "analysis": ["--log_dir", "log"],
}
ORDER = ("analysis", "compute_influence", "extract_log", "compute_influence", "analysis")


def build_parser() -> flags.Parser:
    """Return the command line's parser."""
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--flips", type=settings.positive_int, default=1000, help="(1000)")
    parser.add_argument("--seed", type=settings.seed_int, default=0, help="(0)")
    return parser


def stage(name: str) -> tuple[int | None, str]:
    """Run a stage; return its exit status (None: a traceback) and what it printed."""
    module, argv, status = importlib.import_module(name), sys.argv, 0
    sys.argv, said = [f"{name}.py", "--quiet", *STAGES[name]], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            flags.run_script(module.main, module.build_parser())
        except SystemExit as stop:
            status = stop.code
        except Exception as error:
            status = None
            print(f"{type(error).__name__}: {error}")
        finally:
            sys.argv = argv
    return status, said.getvalue()


def results(log: Path) -> dict[str, bytes]:
    """Return what stages 3 and 4 found."""
    names = {"compute_influence": "scores.npy", "analysis": "top_k.jsonl"}
    return {name: path.read_bytes() for name, file in names.items() for path in log.glob(f"scores/*/{file}")}


def same(name: str, found: dict[str, bytes], before: dict[str, bytes], exact: bool) -> bool:
    """Say whether a stage's result is as before; where a part was computed again, scores to 1e-5, in any order."""
    if exact or name != "compute_influence":
        return not exact or found.get(name) == before.get(name)
    one, two = (np.load(io.BytesIO(part[name])) for part in (found, before))
    return bool(np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two))


def outcome(log: Path, before: dict[str, bytes]) -> tuple[str, str]:
    """Run the stages on a folder with a turned bit; return what became of it, and what was said."""
    noticed = mended = ""
    for name in ORDER:
        status, said = stage(name)
        if status not in (0, 2) or (status == 2 and len(re.findall("error: ", said)) != 1):
            return "crash", f"{name}: {said}"
        if "computing it again" in said:
            mended = said
        if status == 2:
            noticed = noticed or said
        elif not same(name, results(log), before, exact=not mended):
            return "silent", name
    if status == 2:
        return "noticed", noticed
    return ("mended", mended) if mended else ("noticed", noticed) if noticed else ("harmless", "")


def kind(path: Path, log: Path) -> str:
    """Return the row of a file: its path, with numbers and the scores' folder left out."""
    return re.sub(r"\b\d{5}\b", "N", re.sub("scores/[^/]*", "scores/*", str(path.relative_to(log))))


def turn(path: Path, draw: random.Random) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    place = draw.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def main(args: argparse.Namespace) -> None:
    """Make a run, then turn bits."""
    draw, counts = random.Random(args.seed), {}
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_model(Path("model"))
        write_texts(Path("texts.jsonl"), 40, 0)
        write_texts(Path("queries.jsonl"), 3, 1)
        for name in STAGES:
            status, said = stage(name)
            if status:
                raise ValueError(f"expected {name} to end well, got {said}")
        log, kept = Path("log"), Path("kept")
        shutil.copytree(log, kept)
        before, files = results(log), sorted(path for path in log.rglob("*") if path.is_file() and path.stat().st_size)
        for _ in tqdm(range(args.flips), unit="flip"):
            path = draw.choice(files)
            turn(path, draw)
            found, said = outcome(log, before)
            counts.setdefault(kind(path, log), Counter())[found] += 1
            if found in ("silent", "crash"):
                tqdm.write(f"{found}: {path}: {said}")
            shutil.rmtree(log)
            shutil.copytree(kept, log)
    names = ("noticed", "mended", "harmless", "silent", "crash")
    print(f"| file | flips | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    counts["all"] = sum(counts.values(), Counter())
    for name, found in counts.items():
        print(f"| {name} | {found.total()} | {' | '.join(str(found[name]) for name in names)} |")
    print(json.dumps({"flips": args.flips} | {name: counts["all"][name] for name in names} | {"cores": os.cpu_count()}))


if __name__ == "__main__":
    flags.run_script(main, build_parser())
