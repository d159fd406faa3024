"""The reference of --verify for the combined scores of checkpoints, in float64, in plain code of its own.

It reads the files of scores as data. The definition is that of docs/method.md: a combined score is the weighted mean
over checkpoints of scores, each divided by the standard deviation of its query's scores over the train examples. Of
cosines it is the plain weighted mean. Notation: C checkpoints, Q queries, n train examples.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from logra.tools.verify_reference import relative_error

ROUNDING = 1e-6  # a standard deviation below this share of the root mean square is that of equal scores


def parts(scores: list[Tensor], weights: list[float], divided: bool) -> Tensor:
    """Return what each checkpoint adds to the combined scores, [C, Q, n] float64.

    Args:
        scores: Of each checkpoint, [Q, n].
        weights: Of each checkpoint.
        divided: The scores are divided by their standard deviation.
    """
    found = []
    for score, weight in zip(scores, weights, strict=True):
        score = score.double()
        deviation = (score - score.mean(dim=1, keepdim=True)).square().mean(dim=1, keepdim=True).sqrt()
        differ = deviation > ROUNDING * score.square().mean(dim=1, keepdim=True).sqrt()
        scale = torch.where(differ, 1 / deviation, 0) if divided else 1
        found.append(weight / sum(weights) * scale * score)
    return torch.stack(found)


def combined_errors(
    folder: Path, scores: list[Tensor], self_influence: list[Tensor] | None, weights: list[float], divided: bool
) -> dict[str, float]:
    """Return how far the files in a folder of combined scores are from the definition.

    Args:
        folder: With all scores, or the highest and the lowest ones.
        scores: Of each checkpoint, [Q, n].
        self_influence: Of each checkpoint, [n]; None: the folder has no combined ones.
        weights, divided: See parts.

    Raises:
        ValueError: There is one train example, so no standard deviation.
    """
    if scores[0].shape[1] < 2:
        raise ValueError("expected at least 2 train examples for --verify with checkpoints, got 1; use --verify 2")
    expected, errors = parts(scores, weights, divided), {}
    total = expected.sum(dim=0)
    if (folder / "scores.npy").exists():
        factors = torch.from_numpy(np.load(folder / "factors.npy"))
        errors["scores"] = relative_error(torch.from_numpy(np.load(folder / "scores.npy")), total)
        errors["factors"] = relative_error(factors[:, :, None] * torch.stack(scores).double(), expected)
    else:
        for end in ("top", "bottom"):
            kept = load_file(folder / f"{end}.safetensors")
            best = total.topk(kept["ids"].shape[1], largest=end == "top").values
            of_ids = expected.gather(2, kept["ids"].expand(len(expected), -1, -1))
            errors[f"{end} scores"] = max(relative_error(kept["scores"], best), relative_error(best, of_ids.sum(dim=0)))
            errors[f"parts of {end} scores"] = relative_error(kept["parts"], of_ids)
    if self_influence is not None:
        own = parts([values[None] for values in self_influence], weights, True).sum(dim=0)[0]
        errors["self-influence"] = relative_error(torch.from_numpy(np.load(folder / "self_influence.npy")), own)
    return errors
