"""The reference of --verify for combined and re-ranked scores, in float64, in plain code of its own.

It reads the files of scores as data. The definition is that of docs/method.md: a combined score is the weighted mean
over checkpoints of scores, each divided by the standard deviation of its query's scores over the train examples. Of
cosines it is the plain weighted mean. Notation: C checkpoints, Q queries, n train examples.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from logra.tools import verify_reference as reference
from logra.tools.verify_reference import Text, relative_error

DAMPING = 0.01  # of re-ranking
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


def reranked_errors(
    folders: dict[str, Path], statistics: Path, lm: nn.Module, train: list[Text], queries: list[Text]
) -> dict[str, float]:
    """Return how far the re-ranked scores of each mode are from EK-FAC by its definition, and its bases from diagonal.

    Args:
        folders: Mode -> folder of its scores, of which all train examples are candidates.
        statistics: The file of re-ranking's statistics. The train examples are its calibration sample.
        lm: The reference's model.
        train: The train examples.
        queries: The queries.
    """
    stored = load_file(statistics)
    layers = [name.removesuffix(".square") for name in stored if name.endswith(".square")]
    sides = {layer: (stored[f"{layer}.in"], stored[f"{layer}.out"]) for layer in layers}
    z, asked = (reference.projected_sums(lm, sides, texts) for texts in (train, queries))
    errors = {
        f"eigenbasis of {name}": error for name, error in reference.eigenbasis_errors(stored, sides, z, False).items()
    }
    solved = {}
    for layer in layers:
        values = z[layer].square().mean(dim=0)
        lam = DAMPING * values.mean()
        solved[layer] = z[layer] / (values + lam) if lam > 0 else torch.zeros_like(z[layer])
    expected = reference.scores({layer: asked[layer] for layer in layers}, z, solved)
    for mode, folder in folders.items():
        found = load_file(folder / "reranked.safetensors")
        by_query = zip(found["ids"].split(len(train)), found["scores"].split(len(train)), strict=True)
        errors[mode] = max(
            relative_error(scores, own[ids]) for (ids, scores), own in zip(by_query, expected[mode], strict=True)
        )
    return errors
