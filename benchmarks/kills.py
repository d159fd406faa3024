"""kill -9 at random moments of stages 2 and 3: does the rerun end with the scores of an undisturbed run?

A tiny Llama and short texts; 1 to 4 processes; what is killed is a rank, all ranks, or the launcher. After five starts
that were killed the stages are started once more and left alone; then scores are compared, and the next five begin in
a new folder. A start must need no help: no lock or other file is removed by hand, and no rank outlives its launcher by
two minutes. Prints a row a victim, and one JSON line.

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

import numpy as np
import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.soak import ROOT, make_model, write_texts
from logra.runtime import flags, settings

STAGES = {
    "extract_log.py": "--model_name model --data_name texts.jsonl --hessian ekfac --rank 8 --shard_examples 100",
    "compute_influence.py": "--split queries.jsonl --mode cosine",
}
VICTIMS = ("a rank", "all ranks", "the launcher")
EACH = 5  # starts that are killed before a run is left alone


def build_parser() -> flags.Parser:
    """Return the command line's parser."""
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--kills", type=settings.positive_int, default=50, help="(50)")
    parser.add_argument("--texts", type=settings.positive_int, default=4000, help="(4000)")
    parser.add_argument("--seed", type=settings.seed_int, default=0, help="(0)")
    return parser


def begin(stage: str, processes: int, folder: Path, flags: str, **options) -> subprocess.Popen:
    """Start a stage and return at once."""
    launch = ["-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", 1, "--multi_gpu"]
    command = [sys.executable, *(launch if processes > 1 else []), ROOT / stage, *flags.split()]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen([*map(str, command)], cwd=folder, env=environment, start_new_session=True, **options)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the ranks that a launcher has started; of one process, none."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if any(stage in " ".join(child.cmdline()) for stage in STAGES)]
    except psutil.Error:
        return []


def kill(process: subprocess.Popen, victim: str, draw: random.Random) -> str:
    """Kill, and wait until all are gone; say what was killed (the launcher if no rank has begun), or nothing.

    Raises:
        ValueError: A rank outlives its launcher.
    """
    at_work, ranks = process.poll() is None, workers(process)
    victim = victim if ranks else VICTIMS[-1]
    for one in {"a rank": ranks and [draw.choice(ranks)], "all ranks": ranks, "the launcher": [process]}[victim]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait(60)
    if alive := psutil.wait_procs(ranks, 120)[1]:
        raise ValueError(f"expected all ranks to end, got {len(alive)} alive after the kill of {victim}")
    return victim if at_work else ""


def finish(folder: Path, log: str) -> np.ndarray:
    """Run both stages to their ends, and return the scores."""
    for stage, flags in STAGES.items():
        process = begin(stage, 1, folder, f"{flags} --log_dir {log}", stderr=subprocess.PIPE, text=True)
        said = process.communicate()[1]
        if process.returncode:
            raise ValueError(f"expected {stage} to end well after the kills, got {said.splitlines()[-1:]}")
    if left := [*(folder / log).rglob("*.tmp"), *(folder / log).rglob("*.lock"), *folder.glob("*.lock")]:
        raise ValueError(f"expected nothing to be left over, got {left}")
    return np.load(next((folder / log).glob("scores/*/scores.npy")))


def main(args: argparse.Namespace) -> None:
    """Kill, finish and compare, until there were enough kills."""
    draw, counts, differences = random.Random(args.seed), Counter(), []
    with TemporaryDirectory() as made:
        folder, done = Path(made), 0
        make_model(folder / "model")
        write_texts(folder / "texts.jsonl", args.texts, 0)
        write_texts(folder / "queries.jsonl", 3, 1)
        started = time.perf_counter()
        reference = finish(folder, "reference")
        each = (time.perf_counter() - started) / 2
        bar = tqdm(total=args.kills, unit="kill")
        while done < args.kills:
            log = f"log-{len(differences)}"
            for _ in range(EACH):
                extracted = (folder / log / "hessian/ekfac.json").exists()
                stage = "compute_influence.py" if extracted and draw.random() < 0.7 else "extract_log.py"
                process = begin(stage, draw.randint(1, 4), folder, f"{STAGES[stage]} --log_dir {log}")
                time.sleep(draw.uniform(0.2, 1.2) * each)
                if victim := kill(process, draw.choice(VICTIMS), draw):
                    counts[victim, stage] += 1
                    done += 1
                    bar.update()
            scores = finish(folder, log)
            differences.append(float(np.linalg.norm(scores - reference) / np.linalg.norm(reference)))
            if differences[-1] > 1e-5:
                raise ValueError(f"expected the scores of {log} to 1e-5, got {differences[-1]:.2g}")
    print(f"| killed | {' | '.join(STAGES)} |\n|---|---|---|")
    for victim in VICTIMS:
        print(f"| {victim} | {' | '.join(str(counts[victim, stage]) for stage in STAGES)} |")
    found = {"kills": done, "runs": len(differences), "largest": max(differences), "equal": differences.count(0.0)}
    print(json.dumps(found | {"cores": os.cpu_count()}))


if __name__ == "__main__":
    flags.run_script(main, build_parser())
