"""Join what the steps of scripts/gpu_check.sh left in a folder to one record. If a step failed, the exit status is 2.

python benchmarks/gpu_record.py --folder steps --card "NVIDIA H100 80GB HBM3"
"""

import argparse
import json
import re
import sys
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra.runtime.flags import Parser, run_script

TAIL = 4000  # characters of output that are kept of a step that failed


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="has <step>.step, .out and .err")
    parser.add_argument("--card", required=True, help="name of the GPU")
    parser.add_argument("--records", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    return parser


def result(path: Path) -> dict:
    """Return what is recorded of a step, of its file <step>.step: status, seconds, command."""
    status, seconds, command = path.read_text().splitlines()
    out, err = (path.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err"))
    last = (out.strip().splitlines() or [""])[-1]
    found = {"command": command, "status": int(status), "seconds": int(seconds)}
    if found["status"]:
        return found | {"out": out[-TAIL:], "err": err[-TAIL:]}
    try:
        return found | {"result": json.loads(last)}
    except json.JSONDecodeError:  # of pytest
        return found | {"result": last}


def main(args: argparse.Namespace) -> None:
    """Write the record, and print its path."""
    steps = {path.stem: result(path) for path in sorted(args.folder.glob("*.step"))}
    failed = [name for name, step in steps.items() if step["status"]]
    about = {"card": args.card, "date": date.today().isoformat(), "torch": torch.__version__}
    about |= {"cuda": torch.version.cuda, "failed": failed, "steps": steps}
    card = re.sub(r"\W+", "-", args.card.removeprefix("NVIDIA ")).strip("-").lower()
    path = args.records / f"gpu_{card}_{about['date']}.json"
    args.records.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(path)
    if failed:
        raise ValueError(f"expected all steps to succeed, got failures of {', '.join(failed)}; see {path}")


if __name__ == "__main__":
    run_script(main, build_parser())
