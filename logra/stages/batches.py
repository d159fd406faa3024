"""Group examples of similar length into batches, padded on the right.

Notation: B examples in a batch, T tokens in the longest. `counted` marks the tokens that count in an example's loss.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from logra.loss import IGNORE


def length_batches(
    lengths: list[int] | np.ndarray,
    batch_tokens: int,
    batch_size: int | None = None,
    boundaries: Collection[int] = (),
) -> list[list[int]]:
    """Group positions into batches of similar length, longest first.

    A batch has at most batch_tokens tokens, padding included, or a single example. Its lengths are all above a
    boundary or none is (see models.model.rope_boundaries). A batch that is at least an eighth full also ends where the
    next example is more than a fifth shorter than the longest: more batches cost less than more padding.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = 0
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        padded_tokens = len(batch) * longest
        full = padded_tokens + longest > batch_tokens or len(batch) == batch_size
        much_shorter = lengths[i] < 0.8 * longest and padded_tokens >= batch_tokens / 8
        if not batch or full or much_shorter or any(lengths[i] <= b < longest for b in boundaries):
            batch, longest = [], max(lengths[i], 1)
            batches.append(batch)
        batch.append(i)
    return batches


class Batch(NamedTuple):
    """Token ids padded on the right, with what the loss and the gradients need.

    Attributes:
        input_ids: [B, T].
        targets: [B, T]; see loss.example_losses.
        positions: [B, T] bool, the positions that can carry a gradient: those before an example's last counted token.
        rows: Flat positions whose target counts.
    """

    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    rows: Tensor


def make_batch(
    token_ids: list[list[int]], counted: list[list[bool]] | None = None, device: torch.device | str = "cpu"
) -> Batch:
    """Pad token ids on the right. Without `counted`, every token but an example's first one counts."""
    counted = counted or [[True] * len(tokens) for tokens in token_ids]
    # An example without tokens takes one position.
    input_ids = pad_sequence([torch.tensor(tokens or [0]) for tokens in token_ids], batch_first=True)
    is_counted = pad_sequence([torch.tensor(marks or [False]) for marks in counted], batch_first=True)
    counts = pad(is_counted[:, 1:], (0, 1))  # of the next token; after the last position there is none
    targets = input_ids.roll(-1, 1).masked_fill(~counts, IGNORE)
    positions = counts.flip(1).cumsum(1).flip(1) > 0  # up to the last position whose target counts
    rows = counts.flatten().nonzero().squeeze(1)
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in (input_ids, targets, positions, rows)))
