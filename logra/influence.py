"""Influence scores from tensors and from shards, and the one place that fixes their sign.

Notation: Q queries, N train examples, S dampings, q and z projected gradients of the losses, C the Hessian.
    dot     q^T (C + lambda I)^-1 z
    cosine  dot / sqrt(z^T (C + lambda I)^-1 z), and 0 where that is 0
    l2      dot - z^T (C + lambda I)^-1 z / 2
Sums over layers come before root and half. Positive: training on z lowers the query's loss (z is a proponent).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from logra.store import TensorFile

MODES = ("dot", "cosine", "l2")
AHEAD = 2  # blocks that are read while one is scored
Solver = Callable[[Tensor], Tensor]  # z [n, k] -> z^T (C + lambda I)^-1 z, [n]


def pad_queries(solved: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Return preconditioned queries {layer: [rows, k]} on the device, with zero rows up to a multiple of 16.

    A CPU's matrix products with 10 rows are slower than those with 16.
    """
    count = len(next(iter(solved.values())))
    more = -count % 16 if count > 4 and torch.device(device).type == "cpu" else 0
    return {layer: torch.nn.functional.pad(p, (0, 0, 0, more)).to(device) for layer, p in solved.items()}


def read_blocks(
    open_shard: Callable[[int], TensorFile], shards: Iterable[int], layers: list[str], pinned: bool = False
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (shard, layer, z [n, k]), in order, read ahead and checked by a thread.

    The tensor is overwritten later: use it before the next but AHEAD.
    """
    buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * (AHEAD + 1)

    def read(file: TensorFile, layer: str, slot: int) -> Tensor:
        size = file.size(layer)
        if len(buffers[slot]) < size:
            buffers[slot] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return file.read(layer, buffers[slot])

    waiting: deque[tuple[int, str, Future]] = deque()
    with ThreadPoolExecutor(1) as reader:
        number = 0
        for shard in shards:
            with open_shard(shard) as file:
                for layer in layers:
                    waiting.append((shard, layer, reader.submit(read, file, layer, number % len(buffers))))
                    number += 1
                    if len(waiting) > AHEAD:
                        index, name, block = waiting.popleft()
                        yield index, name, block.result()
                while waiting:  # the file is closed then
                    index, name, block = waiting.popleft()
                    yield index, name, block.result()


def score_shards(
    blocks: Iterable[tuple[int, str, Tensor]], queries: dict[str, Tensor], own: dict[str, list[Solver]]
) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """Yield (shard, dots [n, rows], self-influences, S times [n]) from the blocks of read_blocks, each read once.

    Args:
        blocks: All layers of a shard, then of the next one.
        queries: Layer -> preconditioned queries (of all dampings) [rows, k] float32.
        own: Layer -> a solver for each damping; an empty list where self-influence is not wanted.
    """
    last = list(queries)[-1]
    dots: Tensor | None = None
    selves: list[Tensor] = []
    for shard, layer, block in blocks:
        p = queries[layer]
        z = block.to(p)
        dots = z @ p.T if dots is None else dots.addmm_(z, p.T)
        found = [solver(z) for solver in own[layer]]
        selves = [a + b for a, b in zip(selves, found, strict=True)] if selves else found
        if layer == last:
            yield shard, dots, selves
            dots, selves = None, []


def finish(dots: Tensor, self_influence: Tensor | None, mode: str) -> Tensor:
    """Turn dots [Q, n] into the scores of `mode` with self_influence [n] (not needed for dot)."""
    if mode == "dot":
        return dots
    if mode == "l2":
        return dots - self_influence / 2
    return torch.where(self_influence > 0, dots / self_influence.clamp_min(1e-30).sqrt(), 0)


def top_k(scores: Tensor, k: int, largest: bool = True) -> Tensor:
    """Return the ids of the k largest (or smallest) scores [..., N], best first; of equal ones the smaller id first."""
    return torch.sort(scores, dim=-1, descending=largest, stable=True).indices[..., :k]


class RunningTopK:
    """The k best scores of each query and their example ids, from blocks of scores in the order of ids."""

    def __init__(self, queries: int, k: int, largest: bool):
        self.k, self.largest = k, largest
        self.scores, self.ids = torch.zeros(queries, 0), torch.zeros(queries, 0, dtype=torch.int64)

    def add(self, scores: Tensor, ids: Tensor) -> None:
        """Take scores [Q, n] of the examples ids [n] or [Q, n]; of equal scores the smaller id is better."""
        scores, ids = torch.cat([self.scores, scores], dim=1), torch.cat([self.ids, ids.expand(scores.shape)], dim=1)
        ids, order = ids.sort(dim=1)
        scores = scores.gather(1, order)
        best = top_k(scores, self.k, self.largest)
        self.scores, self.ids = scores.gather(1, best), ids.gather(1, best)
