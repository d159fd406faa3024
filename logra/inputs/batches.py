"""Batches of like length, padded on the right.

Notation: B batch, T tokens. `counted` says for each token of an example whether it counts in the loss.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logra.loss import IGNORE


def length_batches(
    lengths: list[int] | np.ndarray, batch_tokens: int, batch_size: int | None = None
) -> list[list[int]]:
    """Group positions into batches of like length, longest first, of at most batch_tokens with padding (or one).

    A batch that is at least an eighth full ends where the next example is a fifth shorter than its longest: little
    padding is worth more than few batches.
    """
    batches: list[list[int]] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        longest = max(lengths[batches[-1][0]], 1) if batches else 0
        filled = len(batches[-1]) * longest if batches else 0
        full = filled + longest > batch_tokens or (batches and len(batches[-1]) == batch_size)
        if not batches or full or (lengths[i] < 0.8 * longest and filled >= batch_tokens / 8):
            batches.append([])
        batches[-1].append(i)
    return batches


class Batch(NamedTuple):
    """Right-padded token ids, and what the loss and the gradients need to know of them.

    input_ids and targets are [B, T] (see loss.example_losses); positions [B, T] bool are those that can carry a
    gradient: real tokens before an example's last counted one; rows are the flat positions whose target counts.
    """

    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    rows: Tensor


def make_batch(
    token_ids: list[list[int]], counted: list[list[bool]] | None = None, device: torch.device | str = "cpu"
) -> Batch:
    """Pad token ids on the right. Without `counted` every token counts that has one before it."""
    shape = (len(token_ids), max(1, *map(len, token_ids)))
    ids, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    for row, tokens in enumerate(token_ids):
        length = len(tokens)
        ids[row, :length] = torch.as_tensor(tokens, dtype=torch.long)
        targets[row, : max(length - 1, 0)] = ids[row, 1:length]
        if counted is not None and length:
            targets[row, : length - 1][~torch.as_tensor(counted[row][1:], dtype=torch.bool)] = IGNORE
    counts = targets != IGNORE
    positions = counts.flip(1).cumsum(1).flip(1) > 0  # up to the last position whose target counts
    rows = counts.flatten().nonzero().squeeze(1)
    return Batch(*(t.to(device, non_blocking=True) for t in (ids, targets, positions, rows)))
