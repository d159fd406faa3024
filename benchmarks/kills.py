"""kill -9 at random moments of stages 2 and 3: do later starts end with the scores of an undisturbed run?

A tiny Llama reads short texts on 1 to 4 processes. What is killed is a rank, all ranks, or the launcher. After five
killed starts the stages run once more to their ends, and their scores are compared with the undisturbed ones. Then the
next five starts begin in a new folder. Starts get no help: no lock or other file is removed by hand. No rank may
outlive its launcher by two minutes. Prints a row for each victim, and one JSON line.

    python benchmarks/kills.py --kills 50
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.soak import ROOT, make_model, write_texts
from logra.runtime.flag_types import positive_int, seed_int
from logra.runtime.flags import Parser, run_script

STAGES = {
    "extract_log.py": "--model_name model --data_name texts.jsonl --hessian ekfac --rank 8 --shard_examples 100",
    "compute_influence.py": "--split queries.jsonl --mode cosine",
}
VICTIMS = ("a rank", "all ranks", "the launcher")
KILLS_PER_RUN = 5


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--kills", type=positive_int, default=50, help="(50)")
    parser.add_argument("--texts", type=positive_int, default=4000, help="(4000)")
    parser.add_argument("--seed", type=seed_int, default=0, help="(0)")
    return parser


def begin(stage: str, processes: int, folder: Path, flags: str, **options: Any) -> subprocess.Popen:
    """Start a stage in a folder and return at once; `options` go to Popen."""
    launch = ["-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", 1, "--multi_gpu"]
    command = [sys.executable, *(launch if processes > 1 else []), ROOT / stage, *flags.split()]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen([*map(str, command)], cwd=folder, env=environment, start_new_session=True, **options)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the ranks that a launcher has started; none where the stage runs without a launcher."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if any(stage in " ".join(child.cmdline()) for stage in STAGES)]
    except psutil.Error:
        return []


def kill(process: subprocess.Popen, victim: str, draw: random.Random) -> str:
    """Kill the victim (the launcher if no rank has started yet), and wait until all processes are gone.

    Returns:
        What was killed, or "" where the stage had ended before.

    Raises:
        ValueError: A rank outlives its launcher.
    """
    running, ranks = process.poll() is None, workers(process)
    victim = victim if ranks else "the launcher"
    for one in {"a rank": ranks and [draw.choice(ranks)], "all ranks": ranks, "the launcher": [process]}[victim]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait(60)
    if alive := psutil.wait_procs(ranks, 120)[1]:
        raise ValueError(f"expected all ranks to end, got {len(alive)} alive after the kill of {victim}")
    return victim if running else ""


def finish(folder: Path, log: str) -> np.ndarray:
    """Run both stages to their ends, and return the scores.

    Raises:
        ValueError: A stage fails, or leaves a temporary file or a lock.
    """
    for stage, flags in STAGES.items():
        process = begin(stage, 1, folder, f"{flags} --log_dir {log}", stderr=subprocess.PIPE, text=True)
        said = process.communicate()[1]
        if process.returncode:
            raise ValueError(f"expected {stage} to succeed after the kills, got {said.splitlines()[-1:]}")
    if left := [*(folder / log).rglob("*.tmp"), *(folder / log).rglob("*.lock"), *folder.glob("*.lock")]:
        raise ValueError(f"expected no temporary file or lock to remain, got {left}")
    return np.load(next((folder / log).glob("scores/*/scores.npy")))


def main(args: argparse.Namespace) -> None:
    """Kill, finish and compare, until there were enough kills; print a table and a JSON line."""
    draw, counts, differences = random.Random(args.seed), Counter(), []
    with TemporaryDirectory() as name:
        folder, done = Path(name), 0
        make_model(folder / "model")
        write_texts(folder / "texts.jsonl", args.texts, 0)
        write_texts(folder / "queries.jsonl", 3, 1)
        started = time.perf_counter()
        reference = finish(folder, "reference")
        stage_seconds = (time.perf_counter() - started) / len(STAGES)
        bar = tqdm(total=args.kills, unit="kill")
        while done < args.kills:
            log = f"log-{len(differences)}"
            for _ in range(KILLS_PER_RUN):
                extracted = (folder / log / "hessian/ekfac.json").exists()
                stage = "compute_influence.py" if extracted and draw.random() < 0.7 else "extract_log.py"
                process = begin(stage, draw.randint(1, 4), folder, f"{STAGES[stage]} --log_dir {log}")
                time.sleep(draw.uniform(0.2, 1.2) * stage_seconds)
                if victim := kill(process, draw.choice(VICTIMS), draw):
                    counts[victim, stage] += 1
                    done += 1
                    bar.update()
            scores = finish(folder, log)
            differences.append(float(np.linalg.norm(scores - reference) / np.linalg.norm(reference)))
            if differences[-1] > 1e-5:
                raise ValueError(f"expected the undisturbed scores to 1e-5 in {log}, got {differences[-1]:.2g}")
    print(f"| killed | {' | '.join(STAGES)} |\n|---|---|---|")
    for victim in VICTIMS:
        print(f"| {victim} | {' | '.join(str(counts[victim, stage]) for stage in STAGES)} |")
    found = {"kills": done, "runs": len(differences), "largest": max(differences), "equal": differences.count(0.0)}
    print(json.dumps(found | {"cores": os.cpu_count()}))


if __name__ == "__main__":
    run_script(main, build_parser())
