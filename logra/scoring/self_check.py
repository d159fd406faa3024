"""Compute a few scores again in float64, straight from the shards, and compare them with the finished score files.

This finds scores that were computed, copied, written or joined wrongly on this machine, disk or network, whatever the
cause. It shares no code with the fast path but the reading and unpacking of a row.
Notation: k = r_out * r_in coordinates of a layer, q a preconditioned query, z a stored gradient.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from logra.influence import scores_of_mode
from logra.quantise import unpack
from logra.run_dir import RunDir
from logra.runtime import processes

PAIRS = 3  # (query, example) pairs of each rank and pass
TOLERANCE = 0.01  # in units of |q| |z| / sqrt(k), the size of a dot of independent q and z
FLOAT32_TOLERANCE = 1e-5  # in units of |q| |z|: a long sum in float32


class CheckedPair(NamedTuple):
    """A dot of one query and one example, and by how much the fast path may differ from it."""

    damping: int
    query: int
    example: int
    dot: float
    tolerance: float


class Scores(Protocol):
    """The scores of one damping; score_files.ScoreFile is one."""

    def kept_examples(self, first_query: int, query: int, ids: range) -> Sequence[int]: ...
    def read(self, query: int, example: int) -> float | None: ...


def recomputed(
    run: RunDir, shards: Sequence[int], queries: dict[str, Tensor], files: Sequence[Scores], first_query: int
) -> Iterator[CheckedPair]:
    """Yield the dots of random pairs of this rank's examples and of a pass's queries, computed in float64.

    Args:
        run: It stores gradients.
        shards: Those of this rank.
        queries: Layer -> preconditioned queries [rows, k], by damping, then by query.
        files: One for each damping.
        first_query: Number of the pass's first query.
    """
    count = len(next(iter(queries.values()))) // len(files)
    for _ in range(PAIRS if shards else 0):
        damping, query = secrets.randbelow(len(files)), secrets.randbelow(count)
        ids = run.shards[secrets.choice(shards)]
        example = secrets.choice(files[damping].kept_examples(first_query, query, ids))
        dot, tolerance = _dot(run, {layer: q[damping * count + query] for layer, q in queries.items()}, example)
        yield CheckedPair(damping, first_query + query, example, dot, tolerance)


def _dot(run: RunDir, query: dict[str, Tensor], example: int) -> tuple[float, float]:
    """Return the dot of a query {layer: [k]} with an example's stored gradient, and its tolerance."""
    bits = run.settings.bits
    shard = next(number for number, ids in enumerate(run.shards) if example in ids)
    dot, variance, lost = 0.0, 0.0, 0.0
    with run.open_shard(shard) as file:
        position = example - run.shards[shard].start
        for layer, q in query.items():
            q, z = q.double(), file.read_row(layer, position)
            if bits is not None:
                z = unpack(z[None], file.read_row(f"{layer}.scale", position)[None], bits, len(q))[0]
            z = z.double()
            dot += (q @ z).item()
            error = (TOLERANCE / math.sqrt(len(q)) + FLOAT32_TOLERANCE) * q.norm() * z.norm()
            variance += error.item() ** 2
            lost += (_lost_bits(q) @ z).item() if bits == 1 else 0
    return dot, math.sqrt(variance) + abs(lost)


def _lost_bits(query: Tensor) -> Tensor:
    """Return what a query [k] loses when a CPU rounds it to 8 bits (see quantise.BitQueries)."""
    steps = query.abs().amax().clamp_min(1e-38) / 127 / torch.tensor([[1.0], [2.0], [4.0]])
    lost = query - (query / steps).round().clamp(-128, 127) * steps  # [3, k]
    return lost[lost.square().sum(dim=1).argmin()]


def check(pairs: list[CheckedPair], files: Sequence[Scores], mode: str, self_influence: Tensor | None) -> None:
    """Compare the pairs of all ranks with the finished files, on rank 0.

    Args:
        pairs: Of this rank.
        files: One for each damping, closed.
        mode: dot, cosine or l2.
        self_influence: [S, N]; not needed for dot.

    Raises:
        ValueError: A score in the files is another one.
    """
    gathered = processes.gather_list(pairs)
    for pair in gathered if processes.state().is_main_process else ():
        score = files[pair.damping].read(pair.query, pair.example)
        own = None if mode == "dot" else self_influence[pair.damping, pair.example].double().view(1)
        expected = scores_of_mode(torch.tensor([[pair.dot]], dtype=torch.float64), own, mode).item()
        tolerance = pair.tolerance / (math.sqrt(own.clamp_min(1e-30).item()) if mode == "cosine" else 1)
        if score is not None and not abs(score - expected) <= tolerance + 1e-6 * abs(expected):
            raise ValueError(
                f"expected the score {expected:.6g} of query {pair.query} and example {pair.example}, computed again "
                f"from its shard, got {score:.6g} in the file; run compute_influence.py again, and if this comes back, "
                "report it"
            )
