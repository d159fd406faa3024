"""Influence scores from tensors and from shards, and the one place that fixes their sign.

Notation: Q queries, N train examples, S dampings, q and z projected gradients of the losses, C the Hessian.
    dot     q^T (C + lambda I)^-1 z
    cosine  dot / sqrt(z^T (C + lambda I)^-1 z), and 0 where that is 0
    l2      dot - z^T (C + lambda I)^-1 z / 2
Sums over layers come before root and half. Positive: training on z lowers the query's loss (z is a proponent).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from logra.quantise import MAX_BIT_COUNT_QUERIES, BitQueries, unpack


class GradientFile(Protocol):
    """A shard's gradients, open for reading; see store.TensorFile."""

    def size(self, name: str) -> int: ...
    def read(self, name: str, buffer: Tensor | None = None) -> Tensor: ...
    def close(self) -> None: ...


MODES = ("dot", "cosine", "l2")
UNPACK_BLOCK = 2**22  # coordinates that are unpacked at a time
QUEUED_LAYERS = 2  # layers that wait for a core
MANY_QUERIES = 256  # queries from which all cores work on one layer, since the products are large enough for that
QuadraticForm = Callable[[Tensor], Tensor]  # z [n, k] -> z^T (C + lambda I)^-1 z, [n]


def _prepared(
    queries: dict[str, Tensor], bits: int | None, device: torch.device | str
) -> dict[str, Tensor | BitQueries]:
    """Return queries {layer: [rows, k]} as they are multiplied fastest.

    A CPU's matrix products with 10 rows are slower than those with 16: zero rows are added.
    """
    count, cpu = len(next(iter(queries.values()))), torch.device(device).type == "cpu"
    if bits == 1 and cpu and count <= MAX_BIT_COUNT_QUERIES:
        return {layer: BitQueries(p) for layer, p in queries.items()}
    more = -count % 16 if count > 4 and cpu else 0
    return {layer: torch.nn.functional.pad(p, (0, 0, 0, more)).to(device) for layer, p in queries.items()}


def _score_layer(
    file: GradientFile,
    layer: str,
    query: Tensor | BitQueries,
    own: list[QuadraticForm],
    bits: int | None,
    buffer: Tensor,
    k: int,
) -> tuple[Tensor, list[Tensor]]:
    """Return (dots [n, rows], self-influences, each [n]) of a layer of a shard, read into the buffer."""
    rows = file.read(layer, buffer)
    if bits is None and not isinstance(query, BitQueries):
        z = rows.to(query)
        return z @ query.T, [solver(z) for solver in own]
    scale = file.read(f"{layer}.scale")
    if isinstance(query, BitQueries):
        dots = query.score(rows, scale)
        if not own:
            return dots, []
    parts: list[tuple] = []
    for begin in range(0, len(rows), max(1, UNPACK_BLOCK // k)):
        block = slice(begin, begin + max(1, UNPACK_BLOCK // k))
        device = "cpu" if isinstance(query, BitQueries) else query.device
        z = unpack(rows[block].to(device), scale[block].to(device), bits, k)
        parts.append((dots[block] if isinstance(query, BitQueries) else z @ query.T, *(solver(z) for solver in own)))
    dots, *selves = (torch.cat(part) for part in zip(*parts, strict=True))
    return dots, selves


def score_shards(
    open_shard: Callable[[int], GradientFile],
    shards: Iterable[int],
    queries: dict[str, Tensor],
    own: dict[str, list[QuadraticForm]],
    device: torch.device | str,
    bits: int | None = None,
    groups: dict[str, str] | None = None,
) -> Iterator[tuple[int, dict[str, Tensor], list[Tensor]]]:
    """Yield (shard, {group: dots [n, rows]}, self-influences, S times [n]); each layer is read, checked, once.

    On a CPU each core reads and multiplies layers of its own: a block is multiplied while it is in the core's cache.
    There may be more rows of dots than queries.

    Args:
        open_shard: Opens a shard's gradients; see store.TensorFile.
        shards: Which ones.
        queries: Layer -> preconditioned queries (of all dampings) [rows, k] float32.
        own: Layer -> a solver for each damping; an empty list where self-influence is not wanted.
        device: That scores.
        bits: Of a coordinate, where the gradients are whole numbers (see quantise).
        groups: Layer -> the group over whose layers dots are summed; all layers are one, "", without it.
    """
    layers, local, prepared = list(queries), threading.local(), _prepared(queries, bits, device)
    gpu = torch.device(device).type == "cuda"
    threads = torch.get_num_threads()
    workers = 2 if gpu else threads if len(queries[layers[0]]) <= MANY_QUERIES else 1

    def score(shard: int, file: GradientFile, layer: str) -> tuple[int, GradientFile, str, Tensor, list[Tensor]]:
        size = file.size(layer)
        if len(getattr(local, "buffer", ())) < size:
            local.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=gpu)
        k = queries[layer].shape[1]
        return shard, file, layer, *_score_layer(file, layer, prepared[layer], own[layer], bits, local.buffer, k)

    calls = ((score, shard, file, layer) for shard in shards for file in [open_shard(shard)] for layer in layers)
    with ThreadPoolExecutor(workers, None, torch.set_num_threads, (max(1, threads // workers),)) as pool:
        try:
            dots: dict[str, Tensor] = {}
            selves: list[Tensor] = []
            for shard, file, layer, part, own_part in _in_order(pool, calls, workers + QUEUED_LAYERS):
                group = groups[layer] if groups else ""
                dots[group] = dots[group].add_(part) if group in dots else part
                selves = [a.add_(b) for a, b in zip(selves, own_part, strict=True)] if selves else own_part
                if layer == layers[-1]:
                    file.close()
                    yield shard, dots, selves
                    dots, selves = {}, []
        finally:
            torch.set_num_threads(threads)


def _in_order(pool: ThreadPoolExecutor, calls: Iterable[tuple], ahead: int) -> Iterator:
    """Yield the results of calls (function, arguments ...) in their order, of which `ahead` are at work or waiting."""
    waiting: deque[Future] = deque()
    for call in calls:
        waiting.append(pool.submit(*call))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def scores_of_mode(dots: Tensor, self_influence: Tensor | None, mode: str) -> Tensor:
    """Turn dots [Q, n] into the scores of `mode` with self_influence [n] (not needed for dot).

    Raises:
        ValueError: One of them is NaN or infinite.
    """
    for values in (dots,) if self_influence is None else (dots, self_influence):
        if not values.sum(dtype=torch.float64).isfinite():
            raise ValueError("expected finite scores, got NaN or infinity; raise the damping, or look for odd examples")
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
