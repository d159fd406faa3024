"""From token ids to projected gradients: calibration sums, the gradients of a shard, of queries.

Notation: k = r_in * r_out of a layer. `limits` is (tokens, examples or None) in a batch at most.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from logra.data import length_batches, make_batch
from logra.hooks import GradientCapture
from logra.loss import example_losses
from logra.projection import Projection, Shapes

CALIBRATION = 256  # examples that the eigenbasis is measured on; 50 gave as good a basis as 2000
Limits = tuple[int, int | None]


def run_batch(
    model: nn.Module, capture: GradientCapture, token_ids: list[list[int]], starts: list[int] | None = None
) -> dict[str, Tensor]:
    """Return {layer: [B, k]} of the summed losses of some examples, from position starts[i] on where given."""
    device = model.get_input_embeddings().weight.device
    batch = make_batch(token_ids, starts, device)
    return capture.backward(example_losses(model, batch.input_ids, batch.targets), batch.positions)


def calibration_batches(lengths: np.ndarray, seed: int, limits: Limits) -> list[list[int]]:
    """Return the ids of a random sample of examples, in batches.

    They do not depend on the number of processes, so that the basis doesn't either.
    """
    count = min(len(lengths), CALIBRATION, max(32, len(lengths) // 8))
    chosen = np.sort(np.random.default_rng(seed).choice(len(lengths), count, replace=False))
    return [chosen[batch].tolist() for batch in length_batches(lengths[chosen], *limits)]


def factor_sums(
    model: nn.Module,
    projections: dict[str, Projection],
    sizes: Shapes,
    examples: Dataset,
    batches: list[list[int]],
    done: Callable,
) -> dict[str, Tensor]:
    """Return <layer>.A [r_in, r_in] and <layer>.B [r_out, r_out], float64 sums over batches of examples.

    Args:
        model, projections: What to measure, and through which projections.
        sizes: Layer -> (r_out, r_in) of these projections.
        examples: With a column input_ids.
        batches: Ids of the examples of each batch; may be empty.
        done: Called after each batch.

    Raises:
        ValueError: A sum is NaN or infinite, or a token id is not in the model's vocabulary.
    """
    sums = {}
    for layer, (r_out, r_in) in sizes.items():
        sums[f"{layer}.A"] = torch.zeros(r_in, r_in, dtype=torch.float64)
        sums[f"{layer}.B"] = torch.zeros(r_out, r_out, dtype=torch.float64)
    with GradientCapture(model, projections, grads=False, factors=True) as capture:
        for batch in batches:
            token_ids = examples[batch]["input_ids"]
            _check_vocabulary(model, token_ids, batch)
            run_batch(model, capture, token_ids)
            factors = capture.take_factors()
            for key, total in sums.items():
                total += factors[key]
                if not total.sum().isfinite():
                    raise ValueError(
                        f"expected finite gradients, got NaN or infinity in one of the examples {batch} "
                        f"(layer {key[:-2]}); use --dtype float32, or leave the example out"
                    )
            done()
    return sums


def _check_vocabulary(model: nn.Module, token_ids: list[list[int]], examples: Sequence[int]) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for example, ids in zip(examples, token_ids, strict=True):
        if max(ids, default=0) >= vocabulary:
            raise ValueError(
                f"expected token ids below {vocabulary}, the model's vocabulary, got {max(ids)} in example {example}; "
                "use the model's own tokenizer"
            )


def gradients(
    model: nn.Module,
    capture: GradientCapture,
    token_ids: list[list[int]],
    first_id: int,
    limits: Limits,
    dtype: torch.dtype = torch.float32,
    starts: list[int] | None = None,
    done: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Tensor]:
    """Return {layer: [n, k]} on the CPU, rows in the order of token_ids, computed in batches of like length.

    Args:
        model, capture: The model, and its capture, which must be entered.
        token_ids: Of n examples.
        first_id: Id of the first one, for messages.
        limits: Of a batch.
        dtype: Of the result.
        starts: First position that counts in each example's loss.
        done: Called with the number of tokens after each batch.

    Raises:
        ValueError: A gradient is NaN or infinite, or a token id is not in the model's vocabulary.
    """
    result: dict[str, Tensor] = {}
    _check_vocabulary(model, token_ids, range(first_id, first_id + len(token_ids)))
    for rows in length_batches([len(ids) for ids in token_ids], *limits):
        batch = [token_ids[i] for i in rows]
        for layer, grad in run_batch(model, capture, batch, [starts[i] for i in rows] if starts else None).items():
            if layer not in result:
                result[layer] = torch.empty(len(token_ids), grad.shape[1], dtype=dtype)
            result[layer][rows] = grad.to(dtype).cpu()
        done(sum(map(len, batch)))
    for layer, grad in result.items():
        bad = (~grad.sum(dim=1, dtype=torch.float32).isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"expected finite gradients, got NaN or infinity in example {first_id + int(bad[0])} (layer {layer}); "
                "use --dtype float32 and --store_dtype float32, or leave the example out"
            )
    return result
