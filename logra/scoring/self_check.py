"""Compute a few scores again in float64, straight from the shards, and compare them with the finished score files.

This finds scores that were computed, copied, written or joined wrongly on this machine, disk or network, whatever the
cause. It shares no code with the fast path but the reading and unpacking of a row.
Notation: k = r_out * r_in coordinates of a layer, q a preconditioned query, z a stored gradient.
"""

import math
import secrets
from collections.abc import Iterator
from typing import NamedTuple

import torch

from logra.influence import scores_of_mode
from logra.quantise import unpack
from logra.runtime import processes
from logra.scoring.score import Scorer
from logra.scoring.score_files import ScoreFile

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


def recomputed(scorer: Scorer, files: list[ScoreFile], first_query: int, queries: int) -> Iterator[CheckedPair]:
    """Yield the dots of random pairs of this rank's examples and of the last pass's queries, computed in float64.

    A run that stores no gradients has none to compute them from.

    Args:
        scorer: After a pass.
        files: One for each damping.
        first_query: Number of the pass's first query.
        queries: Number of the pass's queries.
    """
    for _ in range(PAIRS if scorer.stored_queries and scorer.own_shards else 0):
        damping, query = secrets.randbelow(len(files)), secrets.randbelow(queries)
        ids = scorer.run.shards[secrets.choice(scorer.own_shards)]
        example = secrets.choice(files[damping].kept_examples(first_query, query, ids))
        dot, variance = _dot(scorer, damping * queries + query, example)
        yield CheckedPair(damping, first_query + query, example, dot, math.sqrt(variance))


def _dot(scorer: Scorer, row: int, example: int) -> tuple[float, float]:
    """Return the dot of a row of the queries with an example's stored gradient, and the square of its tolerance."""
    run, bits = scorer.run, scorer.run.settings.bits
    shard = next(number for number, ids in enumerate(run.shards) if example in ids)
    dot, variance = 0.0, 0.0
    with run.open_shard(shard) as file:
        position = example - run.shards[shard].start
        for layer, queries in scorer.stored_queries.items():
            q, z = queries[row].double(), file.read_row(layer, position)
            if bits is not None:
                z = unpack(z[None], file.read_row(f"{layer}.scale", position)[None], bits, len(q))[0]
            z = z.double()
            dot += (q @ z).item()
            error = (TOLERANCE / math.sqrt(len(q)) + FLOAT32_TOLERANCE) * q.norm() * z.norm()
            if bits == 1:  # a CPU rounds queries to steps of at most max|q| / 127; six standard deviations
                error += 6 / math.sqrt(12) / 127 * q.abs().max() * z.norm()
            variance += error.item() ** 2
    return dot, variance


def check(pairs: list[CheckedPair], files: list[ScoreFile], mode: str, self_influence: torch.Tensor | None) -> None:
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
