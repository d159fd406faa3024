"""Influence scores from tensors, and the one place that fixes their sign.

Notation: Q queries, N train examples, q and z projected gradients of the losses, C the Hessian.
    dot     q^T (C + lambda I)^-1 z
    cosine  dot / sqrt(z^T (C + lambda I)^-1 z), and 0 where that is 0
    l2      dot - z^T (C + lambda I)^-1 z / 2
Sums over layers come before root and half. Positive: training on z lowers the query's loss (z is a proponent).
"""

import torch
from torch import Tensor

MODES = ("dot", "cosine", "l2")


def dot_scores(queries: dict[str, Tensor], block: dict[str, Tensor]) -> Tensor:
    """Return q^T (C + lambda I)^-1 z, [Q, n], summed over layers.

    Args:
        queries: Layer -> preconditioned query gradients, [Q, k] float32.
        block: Layer -> train gradients, [n, k], of any dtype.
    """
    return torch.stack([p @ block[name].to(p).T for name, p in queries.items()]).sum(dim=0)


def finish(dots: Tensor, self_influence: Tensor | None, mode: str) -> Tensor:
    """Turn dots [Q, n] into the scores of `mode` with self_influence [n] (not needed for dot)."""
    if mode == "dot":
        return dots
    if mode == "l2":
        return dots - self_influence / 2
    return torch.where(self_influence > 0, dots / self_influence.clamp_min(1e-30).sqrt(), 0)


def top_k(scores: Tensor, k: int, largest: bool = True) -> Tensor:
    """Return the ids of the k largest (or smallest) scores [N], best first; of equal scores the smaller id first."""
    order = torch.sort(scores, descending=largest, stable=True).indices
    return order[:k]
