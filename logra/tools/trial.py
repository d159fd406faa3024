"""Time small copies of a run, stage by stage, and predict the seconds of the whole run (--trial).

A stage's seconds are a constant and a part that grows with its work: copies of several sizes show both. They lie in a
temporary folder beside the run, so that its disk is measured too.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from torch import nn

from logra.inputs.examples import examples_fingerprint, token_counts
from logra.run_dir import RunDir, TrainPart
from logra.runtime import files, processes, progress
from logra.runtime.memory import peak_memory
from logra.runtime.settings import Execution
from logra.stages import calibrate, extract, open_run

FIRST_EXAMPLES = 4  # in the smallest copy; each further one has twice as many
MIN_COPIES = 2
PROCESSES = (1, 2, 4, 8)
Step = Callable[[nn.Module, RunDir], object]


class Measured(NamedTuple):
    """A copy's work and seconds, by stage. The work is in tokens, that of the Hessian in its largest term."""

    work: dict[str, float]
    seconds: dict[str, float]


def hessian_work(kind: str, run: RunDir) -> float:
    """Return the part of a Hessian's work that grows with the examples N, in any unit; see hessian.statistics."""
    if kind != "raw":
        return run.examples
    sizes = [r_out * r_in for r_out, r_in in run.projected.values()]
    return sum(run.examples * k * (k if k <= run.examples else 2 * run.examples) for k in sizes)  # N x N is in float64


def work_of(run: RunDir, kind: str, tokens: float) -> dict[str, float]:
    """Return a run's work by stage; `tokens` is the number of its examples' tokens."""
    calibrated = calibrate.calibration_size(run) / run.examples if run.rotated else 0
    return {"calibration": calibrated * tokens, "gradients": tokens, "Hessian": hessian_work(kind, run)}


def stages_of(kind: str, execution: Execution) -> dict[str, Step]:
    """Return the stages of extract_log.py with a Hessian of this kind, by name."""
    return {
        "calibration": lambda lm, copy: calibrate.make_projections(lm, copy, execution),
        "gradients": lambda lm, copy: extract.write_shards(lm, copy, extract.unfinished_shards(copy), execution),
        "Hessian": lambda lm, copy: extract.write_hessian(kind, copy),
    }


def trial(
    run: RunDir, kind: str, tokens: float, sample: Dataset, execution: Execution, seconds: float
) -> dict[str, float]:
    """Return the predicted seconds of loading the model and of a run's stages, in one process.

    Args:
        run: It does not exist yet; its number of examples is predicted.
        kind: Its Hessian.
        tokens: Of all its examples.
        sample: Some of its examples.
        execution: As for extract_log.py.
        seconds: About how long gradients are extracted.
    """
    begin, steps = time.perf_counter(), stages_of(kind, execution)
    lm, _, _ = open_run.load_model(run.settings, execution)
    predicted = {"loading": time.perf_counter() - begin}
    measured: list[Measured] = []
    with processes.temporary_folder(
        ".trial-", next(path for path in run.folder.absolute().parents if path.exists())
    ) as folder:
        count, spent = min(FIRST_EXAMPLES, run.examples), 0.0
        _time_copy(_copy(run, folder, sample, count), kind, lm, steps)  # warms up
        while True:
            measured.append(_time_copy(_copy(run, folder, sample, count), kind, lm, steps))
            last = measured[-1].seconds["gradients"]
            spent += last
            enough = len(measured) >= MIN_COPIES and spent + 2 * last > seconds
            if processes.on_rank_0(bool)(enough or count == run.examples):
                break
            count = min(2 * count, run.examples)
    whole = work_of(run, kind, tokens)
    return predicted | {stage: predict(measured, stage, whole[stage]) for stage in steps}


def predict(measured: list[Measured], stage: str, work: float) -> float:
    """Return the seconds of one process for a stage's whole work, on the line through the first and the last copy."""
    first, last = measured[0], measured[-1]
    further_work = last.work[stage] - first.work[stage]
    slope = max(0.0, last.seconds[stage] - first.seconds[stage]) / further_work if further_work > 0 else 0.0
    return (last.seconds[stage] + slope * (work - last.work[stage])) * processes.state().num_processes


def _copy(run: RunDir, folder: Path, sample: Dataset, count: int) -> RunDir:
    """Write the start of a run with `count` examples, spread over the sample, and with the run's size of shards."""
    settings = replace(
        run.settings, shard_examples=run.parts[0].shard_examples,
        calibration_examples=min(count, calibrate.calibration_size(run)),
    )  # fmt: skip
    copy = RunDir(folder / "run", replace(run.record, settings=settings, parts=()))

    @processes.on_rank_0
    def write() -> None:
        files.remove(copy.folder)
        examples = sample.select(np.arange(count) * len(sample) // count)
        examples.save_to_disk(copy.train_folder(0))
        counts = dict.fromkeys(("documents", "rows", "dropped_rows"), 0) | {"examples": count}
        counts |= copy.shard_sizes(count) | {"tokens": int(token_counts(examples).sum())}
        found = files.file_checksums(copy.train_folder(0))
        copy.save(parts=(TrainPart(settings.data, None, examples_fingerprint(examples), found, **counts),))

    write()
    return open_run.reload(copy.folder)


def _time_copy(copy: RunDir, kind: str, lm: nn.Module, steps: dict[str, Step]) -> Measured:
    """Run the stages on a copy, without output."""
    seconds = {}
    for stage, step in steps.items():
        begin = time.perf_counter()
        with progress.silent():
            step(lm, copy)
        seconds[stage] = time.perf_counter() - begin
        copy = open_run.reload(copy.folder)
    return Measured(work_of(copy, kind, copy.parts[0].tokens), seconds)


def say_hours(
    run: RunDir, tokens: float, tokenising: float, sample: Dataset, kind: str, execution: Execution, seconds: float,
    checkpoints: int,
) -> None:  # fmt: skip
    """Time a run's stages on small copies; print speed, peak memory, and the predicted hours of the run.

    Args:
        run, tokens, sample, kind, execution, seconds: See trial.
        tokenising: Predicted seconds; the first process tokenises, once for all checkpoints.
        checkpoints: Number of runs.
    """
    on_gpu = processes.state().device.type == "cuda"  # further processes have a GPU of their own
    predicted = trial(run, kind, tokens, sample, execution, seconds)
    progress.say(
        f"\ntrial: {tokens / predicted['gradients']:,.0f} tokens/s, at most {peak_memory() / 1e9:.2g} GB of memory"
    )
    parts = {"tokenising": tokenising} | predicted
    of_one = " of one checkpoint" if checkpoints > 1 else ""
    progress.say(f"predicted seconds{of_one}: {', '.join(f'{name} {value:,.2f}' for name, value in parts.items())}")
    for count in PROCESSES if on_gpu else (1,):
        shared = sum(value for name, value in predicted.items() if name != "loading") / count
        hours = (tokenising + checkpoints * (predicted["loading"] + shared)) / 3600
        progress.say(f"{count} process{'es' * (count > 1):2s} {hours:10.3g} hours")
    if checkpoints > 1:
        progress.say(f"for all {checkpoints} checkpoints, one after another; their examples are tokenised once")
    progress.say(
        "each with a GPU of its own" if on_gpu else "more processes on this machine share its cores: no faster"
    )
