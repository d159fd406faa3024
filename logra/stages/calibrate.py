"""The projections of a run: drawn at random, and rotated into the eigenbasis of a calibration sample.

Notation: r_in/r_out projected sizes; A, B the sums of x~ x~^T and d~ d~^T over the sample's tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from logra import projection
from logra.hooks import GradientCapture
from logra.inputs.batches import length_batches
from logra.inputs.examples import token_counts
from logra.projection import Shapes
from logra.run_dir import RunDir
from logra.runtime import processes, progress
from logra.runtime.memory import available_memory
from logra.runtime.settings import Execution
from logra.stages.gradients import Extractor, make_extractor

MAX_DEFAULT_SAMPLE = 2048  # examples; LDS at 250, 500, 1000, 2000 examples: .5004, .5062, .5079, .5103


def default_sample(examples: int) -> int:
    """Return the size of the calibration sample of a run with so many examples: a quarter, 64 to 2048."""
    return min(MAX_DEFAULT_SAMPLE, max(64, examples // 4))


def calibration_batches(
    lengths: np.ndarray, examples: int | None, seed: int, batch_tokens: int, batch_size: int | None
) -> list[list[int]]:
    """Return the ids of a random sample of examples (None: a quarter, 64 to 2048), in batches.

    The sample does not depend on the number of processes, so that the basis doesn't either.
    """
    count = min(len(lengths), examples or default_sample(len(lengths)))
    chosen = np.sort(np.random.default_rng(seed).choice(len(lengths), count, replace=False))
    return [chosen[batch].tolist() for batch in length_batches(lengths[chosen], batch_tokens, batch_size)]


def factor_sums(
    extractor: Extractor, sizes: Shapes, examples: Dataset, batches: list[list[int]], done: Callable
) -> dict[str, Tensor]:
    """Return <layer>.A [r_in, r_in] and <layer>.B [r_out, r_out], float64 sums over batches of examples.

    Args:
        extractor: With a capture of factors.
        sizes: Layer -> (r_out, r_in) of its projections.
        examples: With a column input_ids, and perhaps counted.
        batches: Ids of the examples of each batch; may be empty.
        done: Called after each batch.

    Raises:
        ValueError: A sum is NaN or infinite, or as Extractor.gradients.
    """
    sums = {}
    for layer, (r_out, r_in) in sizes.items():
        sums[f"{layer}.A"] = torch.zeros(r_in, r_in, dtype=torch.float64)
        sums[f"{layer}.B"] = torch.zeros(r_out, r_out, dtype=torch.float64)
    for batch in batches:
        rows = examples[batch]
        extractor.check_vocabulary(rows["input_ids"], batch)
        for _ in extractor.run(rows["input_ids"], rows.get("counted")):
            pass
        factors = extractor.capture.take_factors()
        for key, total in sums.items():
            total += factors[key].cpu()
            if not total.sum().isfinite():
                raise ValueError(
                    f"expected finite gradients, got NaN or infinity in one of the examples {batch} "
                    f"(layer {key[:-2]}); use --dtype float32, or leave the example out"
                )
        done()
    extractor.finish()
    return sums


def check_memory(need: int, what: str) -> int:
    """Return `need`, the bytes that each process needs for something; refuse it where this machine lacks them."""
    all_processes, available = need * processes.processes_here(), available_memory()
    if all_processes > available:
        raise ValueError(
            f"expected {all_processes / 1e9:.3g} GB of memory for {what}, got {available / 1e9:.3g}; use "
            "--hessian ekfac, --lora random, a lower --rank or fewer --layers"
        )
    return need


def make_projections(lm: nn.Module, run: RunDir, execution: Execution, accelerator: Accelerator) -> None:
    """Draw the run's projections, rotate them where its settings say so, and save them."""
    projections, sizes = projection.identity(run.shapes), run.shapes
    if run.settings.lora == "random":
        projections, sizes = projection.draw(run.shapes, run.projected, run.settings.seed), run.projected
    if run.rotated:
        sums = sample_sums(lm, run, projections, sizes, execution, accelerator)
        projections = rotated(projections, sums, run.projected, accelerator)
    if accelerator.is_main_process:
        run.save_projections(projections)


def sample_sums(
    lm: nn.Module, run: RunDir, projections: dict[str, projection.Projection], sizes: Shapes, execution: Execution,
    accelerator: Accelerator,
) -> dict[str, Tensor]:  # fmt: skip
    """Return factor_sums of this rank's share of the calibration sample."""
    examples, settings = run.train(), run.settings
    check_memory(sum(12 * (o * o + i * i) for o, i in sizes.values()), "all layers' covariances")
    with GradientCapture(lm, projections, grads=False, factors=True) as capture:
        extractor = make_extractor(lm, capture, execution, settings.block_size, max(map(len, run.shards)))
        batches = calibration_batches(
            token_counts(examples), settings.calibration_examples, settings.seed,
            extractor.batch_tokens, execution.batch_size,
        )  # fmt: skip
        mine = [batches[i] for i in processes.share(len(batches), accelerator)]
        with progress.bar(total=len(mine), desc="calibrating", unit="batch") as bar:
            return factor_sums(extractor, sizes, examples, mine, bar.update)


def rotated(
    projections: dict[str, projection.Projection], sums: dict[str, Tensor], projected: Shapes, accelerator: Accelerator
) -> dict[str, projection.Projection]:
    """Return the projections in the eigenbasis of all ranks' sums; a layer's eigenvectors are one rank's work."""
    mine, found = processes.share(len(projections), accelerator), []
    for number, (layer, p) in enumerate(projections.items()):
        a, b = (processes.sum_over_ranks(sums.pop(f"{layer}.{side}"), accelerator) for side in "AB")
        if number in mine:
            found.append((layer, projection.rotate(p, a, b, projected[layer])))
    every = dict(processes.gather_list(found, accelerator))
    return {layer: every[layer] for layer in projections}
