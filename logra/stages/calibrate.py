"""Make a run's projections: draw them at random, and rotate them into the eigenbasis of a calibration sample.

The statistics of re-ranking come from the same sample.

Notation: r_in/r_out projected sizes of a layer; A and B are sums of x~ x~^T and d~ d~^T over the sample's tokens.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from logra import experts, projection
from logra.hooks import GradientCapture, SquareCapture
from logra.inputs.examples import token_counts
from logra.projection import Projection, Shapes
from logra.run_dir import RunDir
from logra.runtime import processes, progress
from logra.runtime.settings import Execution
from logra.stages.fine_run import FineRun
from logra.stages.gradients import Extractor, HostCopies, make_extractor

MAX_DEFAULT_SAMPLE = 2048  # examples; LDS at 250, 500, 1000, 2000 examples: .5004, .5062, .5079, .5103


def make_projections(lm: nn.Module, run: RunDir, execution: Execution) -> None:
    """Draw the run's projections, rotate them if its settings say so, and save them."""
    projections = drawn(lm, run)
    if run.rotated:
        projections = in_eigenbasis(lm, run, projections, execution)
    if processes.state().is_main_process:
        run.save_projections(projections)


def drawn(lm: nn.Module, run: RunDir) -> dict[str, Projection]:
    """Return the run's projections before any rotation."""
    if run.settings.lora == "random":
        return projection.draw(run.shapes, run.projected, run.settings.seed, experts.wide_sides(lm))
    return projection.identity(run.shapes)


def in_eigenbasis(
    lm: nn.Module, run: RunDir, projections: dict[str, Projection], execution: Execution
) -> dict[str, Projection]:
    """Rotate projections into the eigenbasis of the run's calibration sample."""
    sizes = run.projected if run.settings.lora == "random" else run.shapes
    processes.check_memory(sum(12 * (o * o + i * i) for o, i in sizes.values()), "all layers' covariances")
    layout: dict[str, tuple[int, ...]] = {f"{layer}.A": (r_in, r_in) for layer, (_, r_in) in sizes.items()}
    layout |= {f"{layer}.B": (r_out, r_out) for layer, (r_out, _) in sizes.items()}
    with GradientCapture(lm, projections, grads=False, factors=True) as capture:
        sums = sample_sums(make_extractor(lm, capture, execution, run), run, layout)
    return rotate(projections, sums, run.projected)


def make_fine_statistics(lm: nn.Module, run: FineRun, execution: Execution) -> None:
    """Write the eigenbasis and the eigenvalues of re-ranking, unless they are there: two passes over the sample."""
    if processes.on_rank_0(run.problem)() is None:
        return
    progress.say(f"statistics of re-ranking, rank {run.rank or 'none'}: {run.bytes / 1e9:.3g} GB of disk and memory")
    run.check_room()
    projections = in_eigenbasis(lm, run, drawn(lm, run), execution)
    with SquareCapture(lm, projections) as capture:
        layout: dict[str, tuple[int, ...]] = {"examples": (), "tokens": ()}
        layout |= {f"{layer}.square": (math.prod(size),) for layer, size in run.projected.items()}
        sums = sample_sums(make_extractor(lm, capture, execution, run), run, layout)
    squares = {key: processes.sum_over_ranks(sums.pop(key)) for key in list(sums)}
    if processes.state().is_main_process:
        run.save_statistics(projections, squares)
    processes.state().wait_for_everyone()


def calibration_size(run: RunDir) -> int:
    """Return the number of examples in the calibration sample: by default a quarter of all, 64 to 2048."""
    default = min(MAX_DEFAULT_SAMPLE, max(64, run.examples // 4))
    return min(run.examples, run.settings.calibration_examples or default)


def sample_sums(extractor: Extractor, run: RunDir, layout: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return this rank's sums over the calibration sample, float64.

    The sample does not depend on the number of processes.

    Args:
        extractor: Its capture computes the sums; no gradients are kept.
        run: Its examples, and the seed and size of the sample.
        layout: Name (see GradientCapture.take_factors) -> shape of the sums.

    Raises:
        ValueError: A sum is NaN or infinite; or as Extractor.gradients.
    """
    examples, generator = run.train(), np.random.default_rng(run.settings.seed)
    sample = np.sort(generator.choice(run.examples, calibration_size(run), replace=False))
    sample = sample[processes.share(len(sample))]  # before batching: ranks may have found different batch sizes
    batches = extractor.batches(token_counts(examples)[sample])
    sums = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in layout.items()}

    def add(ids: list[int], copies: HostCopies) -> None:
        factors = copies()
        for key, total in sums.items():
            total += factors[key]
            if not total.sum().isfinite():
                raise ValueError(
                    f"expected finite gradients, got NaN or infinity in one of the examples {ids} "
                    f"(layer {key.rpartition('.')[0]}); use --dtype float32, or leave the example out"
                )

    copying: list[tuple[list[int], HostCopies]] = []  # the last batch, while the next one is computed
    for batch in progress.bar(batches, desc="calibrating", unit="batch"):
        ids = sample[batch].tolist()
        rows = examples[ids]
        extractor.check_vocabulary(rows["input_ids"], ids)
        for _ in extractor.run(rows["input_ids"], rows.get("counted"), list(range(len(ids)))):
            pass
        if copying:
            add(*copying.pop())
        copying.append((ids, extractor.streams.to_host(extractor.capture.take_factors())))
    if copying:
        add(*copying.pop())
    extractor.finish()
    return sums


def rotate(projections: dict[str, Projection], sums: dict[str, Tensor], projected: Shapes) -> dict[str, Projection]:
    """Rotate the projections into the eigenbasis of the sums over all ranks. Each rank decomposes its share of layers.

    Args:
        projections: Before the rotation.
        sums: <layer>.A [r_in, r_in] and <layer>.B [r_out, r_out] of this rank; emptied.
        projected: Layer -> (r_out, r_in) after the rotation.
    """
    layers, own_sums, rotated = list(projections), {}, {}
    own_layers = [layers[number] for number in processes.share(len(layers))]
    for layer, (p_in, p_out, *_) in projections.items():  # the shapes of what other ranks compute
        r_out, r_in = projected[layer]
        d_in, d_out = (len(sums[f"{layer}.{s}"]) if p is None else p.shape[1] for s, p in (("A", p_in), ("B", p_out)))
        shapes = (r_in, d_in), (r_out, d_out), (r_in,), (r_out,)
        rotated[layer] = Projection(*(torch.empty(shape, device="meta") for shape in shapes))
    for key in list(sums):  # all sums first: then no rank waits for another one's layer
        total = processes.sum_over_ranks(sums.pop(key))
        if key.rpartition(".")[0] in own_layers:
            own_sums[key] = total
    for layer in own_layers:
        a, b = (own_sums.pop(f"{layer}.{factor}") for factor in "AB")
        rotated[layer] = projection.rotate(projections[layer], a, b, projected[layer])
    for number, layer in enumerate(layers):
        rotated[layer] = Projection(*(processes.from_owner(number, tensor) for tensor in rotated[layer]))
    return rotated
