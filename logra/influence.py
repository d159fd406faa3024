"""Influence scores of train examples for queries (arXiv 2405.13954, sec. 2). This module alone defines their sign.

Notation: Q queries, N train examples, S dampings, q and z projected gradients of a query's and an example's loss, C the
Hessian, rows = S * Q preconditioned queries (C + lambda I)^-1 q.
    dot     q^T (C + lambda I)^-1 z
    cosine  dot / sqrt(z^T (C + lambda I)^-1 z), and 0 where the self-influence z^T (C + lambda I)^-1 z is 0
    l2      dot - z^T (C + lambda I)^-1 z / 2
Dots and self-influences are summed over layers before the root or the half is taken. A positive score means that
training on z lowers the query's loss (z is a proponent). Over several checkpoints of one training a score is the mean
of the checkpoints' scores, each divided by its scale (see checkpoint_factors).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from logra.quantise import MAX_INTEGER_QUERIES, BitQueries, LevelQueries, SplitQueries, row_blocks, unpack


class GradientFile(Protocol):
    """A shard's gradients, open for reading; store.TensorFile is one."""

    def size(self, name: str) -> int: ...
    def read(self, name: str, buffer: Tensor | None = None) -> Tensor: ...
    def close(self) -> None: ...


class PackedQueries(Protocol):
    """Queries [rows, k] that score packed gradients without their float32; see quantise."""

    shape: torch.Size
    device: torch.device

    def score(self, packed: Tensor, scale: Tensor) -> Tensor: ...


QUEUED_LAYERS = 2  # layers that wait for a core
MANY_QUERIES = 256  # up to here each core works on a layer of its own; above, all cores share a matrix product
QuadraticForm = Callable[[Tensor], Tensor]  # z [n, k] -> z^T (C + lambda I)^-1 z, [n]


def _fast_queries(queries: Tensor, bits: int | None, device: torch.device | str) -> Tensor | PackedQueries:
    """Return a layer's queries [rows, k] in the form that the device multiplies fastest.

    On a CPU, matrix products with 10 rows are slower than with 16. So zero rows are added.
    """
    count, cpu = len(queries), torch.device(device).type == "cpu"
    if bits and not cpu:
        return SplitQueries(queries.to(device), bits)
    if bits and count <= MAX_INTEGER_QUERIES:
        return BitQueries(queries) if bits == 1 else LevelQueries(queries, bits)
    return torch.nn.functional.pad(queries, (0, 0, 0, -count % 16 if count > 4 and cpu else 0)).to(device)


def _score_layer(
    stored: Tensor, scale: Tensor | None, query: Tensor | PackedQueries, forms: list[QuadraticForm], bits: int | None
) -> tuple[Tensor, list[Tensor]]:
    """Return (dots [n, rows], self-influences, S times [n]) of one layer of a shard, as it is stored.

    The bytes that are stored go to the device.
    """
    stored, scale = stored.to(query.device), None if scale is None else scale.to(query.device)
    functions = [lambda z: z @ query.T, *forms] if isinstance(query, Tensor) else forms
    blocks = _float32_blocks(stored, scale, bits, query.shape[1]) if functions else ()
    parts = [[function(z) for function in functions] for z in blocks]
    results = [torch.cat(values) for values in zip(*parts, strict=True)]
    return (results[0], results[1:]) if isinstance(query, Tensor) else (query.score(stored, scale), results)


def _float32_blocks(stored: Tensor, scale: Tensor | None, bits: int | None, k: int) -> Iterable[Tensor]:
    """Return the gradients that a layer's tensors stand for, in blocks of rows [., k] float32."""
    if bits is None:
        return (stored,) if stored.dtype == torch.float32 else (rows.float() for rows in row_blocks(stored, k))
    blocks = zip(row_blocks(stored, k), row_blocks(scale, k), strict=True)
    return (unpack(*block, bits, k) for block in blocks)


def score_shards(
    open_shard: Callable[[int], GradientFile],
    shards: Iterable[int],
    queries: dict[str, Tensor],
    quadratic_forms: dict[str, list[QuadraticForm]],
    device: torch.device | str,
    bits: int | None = None,
    groups: dict[str, str] | None = None,
) -> Iterator[tuple[int, dict[str, Tensor], list[Tensor]]]:
    """Yield (shard, {group: dots [n, rows]}, self-influences, S times [n]). Each layer is read, and checked, once.

    On a CPU each core reads and multiplies layers of its own. The dots may have more rows than there are queries.

    Args:
        open_shard: Opens a shard's gradients; see store.TensorFile.
        shards: The shards to score.
        queries: Layer -> preconditioned queries of all dampings, [rows, k] float32.
        quadratic_forms: Layer -> a function for each damping; an empty list where self-influence is not wanted.
        device: The device that scores.
        bits: Bits per coordinate of an integer store type (see quantise); None of a floating-point type.
        groups: Layer -> the group over whose layers the dots are summed. Without it all layers are one group, "".

    Raises:
        ValueError: A shard is missing or was altered.
    """
    layers, thread, fast_queries = list(queries), threading.local(), dict[str, Tensor | PackedQueries]()
    gpu = torch.device(device).type == "cuda"
    threads = torch.get_num_threads()
    many_queries = len(queries[layers[0]]) > (MAX_INTEGER_QUERIES if bits else MANY_QUERIES)
    workers = 2 if gpu else 1 if many_queries else threads

    def score(shard: int, file: GradientFile, layer: str) -> tuple[int, GradientFile, str, Tensor, list[Tensor]]:
        size = file.size(layer)
        if len(getattr(thread, "buffer", ())) < size:
            thread.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=gpu)
        stored, scale = file.read(layer, thread.buffer), None if bits is None else file.read(f"{layer}.scale")
        scores = _score_layer(stored, scale, fast_queries[layer], quadratic_forms[layer], bits)
        return shard, file, layer, *scores

    calls = ((score, shard, file, layer) for shard in shards for file in [open_shard(shard)] for layer in layers)
    with ThreadPoolExecutor(workers, None, torch.set_num_threads, (max(1, threads // workers),)) as pool:
        try:
            forms = pool.map(_fast_queries, queries.values(), repeat(bits), repeat(device))
            fast_queries.update(zip(layers, forms, strict=True))
            dots: dict[str, Tensor] = {}
            self_influences: list[Tensor] = []
            for shard, file, layer, layer_dots, layer_self in _in_order(pool, calls, workers + QUEUED_LAYERS):
                group = groups[layer] if groups else ""
                dots[group] = dots[group].add_(layer_dots) if group in dots else layer_dots
                sums = zip(self_influences, layer_self, strict=True)
                self_influences = [a.add_(b) for a, b in sums] if self_influences else layer_self
                if layer == layers[-1]:
                    file.close()
                    yield shard, dots, self_influences
                    dots, self_influences = {}, []
        finally:
            torch.set_num_threads(threads)


def _in_order(pool: ThreadPoolExecutor, calls: Iterable[tuple], queued: int) -> Iterator:
    """Yield the results of calls (function, arguments ...), in order, with at most `queued` of them submitted ahead."""
    futures: deque[Future] = deque()
    for call in calls:
        futures.append(pool.submit(*call))
        if len(futures) > queued:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def scores_of_mode(dots: Tensor, self_influence: Tensor | None, mode: str) -> Tensor:
    """Return the scores [Q, n] of `mode` from dots [Q, n] and self_influence [n] (not needed for dot).

    Raises:
        ValueError: A dot or a self-influence is NaN or infinite.
    """
    for values in (dots,) if self_influence is None else (dots, self_influence):
        if not values.sum(dtype=torch.float64).isfinite():
            raise ValueError(
                "expected finite scores, got NaN or infinity; raise the damping, or remove the extreme examples"
            )
    if mode == "dot":
        return dots
    if mode == "l2":
        return dots - self_influence / 2
    return torch.where(self_influence > 0, dots / self_influence.clamp_min(1e-30).sqrt(), 0)


def top_k(scores: Tensor, k: int, largest: bool = True) -> Tensor:
    """Return the ids of the k largest (or smallest) scores [..., N], best first. Ties go to the smaller id."""
    return torch.sort(scores, dim=-1, descending=largest, stable=True).indices[..., :k]


class RunningTopK:
    """The k best scores of each query and their example ids, updated block by block.

    Attributes:
        scores: [Q, k] float32, best first; fewer columns until k examples have come.
        ids: [Q, k] int64, the example ids of the scores.
        parts: [C, Q, k], the parts that the scores are sums of, if they were given.
    """

    def __init__(self, queries: int, k: int, largest: bool, parts: int = 0):
        self.k, self.largest = k, largest
        self.scores, self.ids = torch.zeros(queries, 0), torch.zeros(queries, 0, dtype=torch.int64)
        self.parts = torch.zeros(parts, queries, 0)

    def add(self, scores: Tensor, ids: Tensor, parts: Tensor | None = None) -> None:
        """Take scores [Q, n], their parts [C, Q, n] and example ids, [n] or [Q, n]. Ties go to the smaller id."""
        parts = scores.new_zeros(0, *scores.shape) if parts is None else parts
        scores, ids = torch.cat([self.scores, scores], dim=1), torch.cat([self.ids, ids.expand(scores.shape)], dim=1)
        ids, order = ids.sort(dim=1)
        scores = scores.gather(1, order)
        best = top_k(scores, self.k, self.largest)
        self.scores, self.ids = scores.gather(1, best), ids.gather(1, best)
        index = order.gather(1, best).expand(len(parts), *best.shape)
        self.parts = torch.cat([self.parts, parts], dim=2).gather(2, index)


def checkpoint_factors(deviations: Tensor, weights: Sequence[float], mode: str) -> Tensor:
    """Return what the scores of each checkpoint are multiplied by in the combined scores, [C, Q] float64.

    Dots and l2 are divided by their standard deviation over the train examples, since a checkpoint with large gradients
    would decide alone. Cosines are of one scale already. Then the mean over checkpoints is taken.

    Args:
        deviations: Standard deviation of each query's scores over the train examples, [C, Q] float64. Where it is 0,
            all examples have the same score, and the checkpoint does not count.
        weights: Of each checkpoint in the mean.
        mode: dot, cosine or l2.
    """
    shares = torch.tensor(weights, dtype=torch.float64)[:, None] / max(weights)  # their sum may be infinite
    shares = shares / shares.sum()
    if mode == "cosine":
        return shares.expand(deviations.shape).clone()
    return torch.where(deviations > 0, shares / deviations.clamp_min(1e-300), 0.0)


def layer_parts(dots: Sequence[tuple[Tensor, Tensor | None]], factors: Tensor, mode: str) -> Tensor:
    """Return the parts of combined scores by block of layers, [L, Q, n] float32.

    They add up to the scores; for l2, up to the part of the scores that is not self-influence.

    Args:
        dots: Of each checkpoint: dots of the blocks [L, Q, n], and self-influence [n] (not needed for dot and l2).
        factors: What the checkpoints' scores are multiplied by, [C, Q] float64.
        mode: dot, cosine or l2.
    """
    own_mode = "cosine" if mode == "cosine" else "dot"
    parts = [scores_of_mode(of_blocks, self_influence, own_mode) for of_blocks, self_influence in dots]
    return sum(factor[:, None] * part for factor, part in zip(factors, parts, strict=True)).float()


def low_rank(queries: Tensor, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    """Approximate each query by a sum of `rank` outer products (torch.svd_lowrank).

    Args:
        queries: [rows, r_out * r_in].
        shape: (r_out, r_in).
        rank: R; at most min(shape) is used.

    Returns:
        Left factors [rows, R, r_out], scaled by the singular values, and right factors [rows, R, r_in].
    """
    with torch.random.fork_rng(devices=[queries.device] if queries.is_cuda else []):
        torch.manual_seed(0)  # svd_lowrank draws random numbers; all ranks need the same result
        u, s, v = torch.svd_lowrank(queries.view(-1, *shape), q=min(rank, *shape), niter=4)
    return (u * s[:, None]).mT.contiguous(), v.mT.contiguous()


def cut(queries: Tensor, shape: tuple[int, int], rank: int) -> Tensor:
    """Return the approximations of low_rank as matrices, [rows, r_out * r_in]."""
    left, right = low_rank(queries, shape, rank)
    return (left.mT @ right).flatten(1)
