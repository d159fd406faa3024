"""Projections P_in and P_out of each tracked layer: draw, rotate, to and from tensors.

Notation: d_in/d_out layer sizes, r_in/r_out projected sizes. G~ = P_out G P_in^T, [r_out, r_in].
A side that is None is not projected (the identity).
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

Shapes = dict[str, tuple[int, int]]  # layer name -> (d_out, d_in)


class Projection(NamedTuple):
    """The two sides of one layer: p_in [r_in, d_in] or None, p_out [r_out, d_out] or None.

    In the eigenbasis also the calibration sample's eigenvalues, values_in [r_in] and values_out [r_out], in any unit.
    """

    p_in: Tensor | None
    p_out: Tensor | None
    values_in: Tensor | None = None
    values_out: Tensor | None = None


def projected_shapes(shapes: Shapes, rank_in: int | None, rank_out: int | None) -> Shapes:
    """Return layer -> (r_out, r_in). A rank of None, or one at or above the width, keeps the width."""
    if min(rank_in or 1, rank_out or 1) < 1:
        raise ValueError(f"expected ranks of at least 1, got {rank_in} and {rank_out}; give --rank 64, say")
    return {name: (min(rank_out or d_out, d_out), min(rank_in or d_in, d_in)) for name, (d_out, d_in) in shapes.items()}


def rank_for_bytes(shapes: Shapes, limit: int, packed_bytes: Callable[[int], int]) -> int:
    """Return the highest rank, of both sides, whose gradients take at most `limit` bytes an example.

    Args:
        shapes: Layer -> (d_out, d_in).
        limit: Bytes of all layers.
        packed_bytes: Bytes of a layer's row of k coordinates.

    Raises:
        ValueError: Even rank 1 takes more.
    """

    def size(rank: int) -> int:
        return sum(packed_bytes(r_out * r_in) for r_out, r_in in projected_shapes(shapes, rank, rank).values())

    widest = max(map(max, shapes.values()))
    rank = bisect_right(range(1, widest + 1), limit, key=size)
    if rank == 0:
        raise ValueError(f"expected --bytes_per_example of at least {size(1)} for {len(shapes)} layers, got {limit}")
    return rank


def random_side(seed: int, layer: str, side: str, rank: int, width: int) -> Tensor | None:
    """Return P ~ N(0, 1/rank), [rank, width] float32, or None where rank >= width (arXiv 2405.13954, sec. 3).

    Drawn on the CPU from a hash of (seed, layer, side): the same on every device and for every choice of layers.
    """
    if rank >= width:
        return None
    key = xxhash.xxh3_64_intdigest(f"{seed}/{layer}/{side}".encode())
    generator = torch.Generator().manual_seed(key & (2**63 - 1))
    return torch.randn(rank, width, generator=generator) / rank**0.5


def draw(shapes: Shapes, projected: Shapes, seed: int) -> dict[str, Projection]:
    """Draw the random projections of all layers, from their sizes before and after."""
    return {
        name: Projection(
            random_side(seed, name, "in", projected[name][1], d_in),
            random_side(seed, name, "out", projected[name][0], d_out),
        )
        for name, (d_out, d_in) in shapes.items()
    }


def identity(shapes: Shapes) -> dict[str, Projection]:
    """Return no projection at all, for every layer."""
    return {name: Projection(None, None) for name in shapes}


def eigenbasis(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [r], largest first, and eigenvectors as rows [r, r] of a symmetric cov, in float64.

    Each vector's largest entry is positive, so that the basis doesn't depend on the solver's choice of sign.
    """
    values, vectors = torch.linalg.eigh(cov.double())
    vectors = vectors.T.flip(0)
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return values.flip(0).clamp_min(0), vectors * largest.sign()


def rotate(projection: Projection, cov_in: Tensor, cov_out: Tensor, shape: tuple[int, int]) -> Projection:
    """Merge the eigenvectors of the projected covariances into the projection: P <- (U^T P)[:r].

    Args:
        projection: What cov_in and cov_out were measured with.
        cov_in, cov_out: Covariances (any scale) of projected inputs and output gradients.
        shape: (r_out, r_in) to keep; below the covariances' size this is PCA (arXiv 2405.13954, app. C).
    """

    def side(p: Tensor | None, cov: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        values, rows = (part[:rank] for part in eigenbasis(cov))
        return (rows if p is None else rows @ p.double()).float().contiguous(), values.float().contiguous()

    p_in, values_in = side(projection.p_in, cov_in, shape[1])
    p_out, values_out = side(projection.p_out, cov_out, shape[0])
    return Projection(p_in, p_out, values_in, values_out)
