"""The projections P_in and P_out of each tracked layer: random, or in an eigenbasis (arXiv 2405.13954, sec. 3).

Notation: d_in/d_out layer sizes, r_in/r_out projected sizes, G a layer's gradient [d_out, d_in].
The projected gradient is G~ = P_out G P_in^T, [r_out, r_in]. None stands for the identity: no projection on that side.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

Shapes = dict[str, tuple[int, int]]  # layer name -> (d_out, d_in), or (r_out, r_in) after projection


class Projection(NamedTuple):
    """One layer's projection matrices: p_in [r_in, d_in] or None, p_out [r_out, d_out] or None, float32.

    A rotated projection also has the eigenvalues of the calibration sample's covariances, values_in [r_in] and
    values_out [r_out]. Their scale is arbitrary.
    """

    p_in: Tensor | None
    p_out: Tensor | None
    values_in: Tensor | None = None
    values_out: Tensor | None = None


def projected_shapes(shapes: Shapes, rank_in: int | None, rank_out: int | None) -> Shapes:
    """Return layer -> (r_out, r_in). A rank of None, or one at or above the layer's width, keeps the width.

    Raises:
        ValueError: A rank is below 1.
    """
    if min(rank_in or 1, rank_out or 1) < 1:
        raise ValueError(f"expected ranks of at least 1, got {rank_in} and {rank_out}; use --rank 64, say")
    return {name: (min(rank_out or d_out, d_out), min(rank_in or d_in, d_in)) for name, (d_out, d_in) in shapes.items()}


def rank_for_bytes(shapes: Shapes, limit: int, packed_bytes: Callable[[int], int]) -> int:
    """Return the highest rank, the same for both sides, whose gradients take at most `limit` bytes per example.

    Args:
        shapes: Layer -> (d_out, d_in).
        limit: Bytes per example, summed over layers.
        packed_bytes: k -> bytes of one layer's k coordinates.

    Raises:
        ValueError: Rank 1 already takes more.
    """

    def bytes_at(rank: int) -> int:
        return sum(packed_bytes(r_out * r_in) for r_out, r_in in projected_shapes(shapes, rank, rank).values())

    widest = max(map(max, shapes.values()))
    rank = bisect_right(range(1, widest + 1), limit, key=bytes_at)
    if rank == 0:
        raise ValueError(f"expected --bytes_per_example of at least {bytes_at(1)}, got {limit}; raise it")
    return rank


def random_side(seed: int, layer: str, side: str, rank: int, width: int, experts: int = 0) -> Tensor | None:
    """Return P ~ N(0, 1/rank), [rank, width] float32, or None where rank >= width (arXiv 2405.13954, sec. 3).

    The CPU draws P from a hash of (seed, layer, side), so P is the same on every device and for every choice of layers.
    The wide side of a layer of experts is drawn expert by expert: an expert's part does not depend on their number.
    """
    if rank >= width:
        return None

    def normal(key: str, columns: int) -> Tensor:
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(key.encode()) & (2**63 - 1))
        return torch.randn(rank, columns, generator=generator)

    key = f"{seed}/{layer}/{side}"
    parts = [normal(f"{key}/{e}", width // experts) for e in range(experts)]
    return (torch.cat(parts, dim=1) if experts else normal(key, width)) / rank**0.5


def draw(shapes: Shapes, projected: Shapes, seed: int, experts: dict[str, int] | None = None) -> dict[str, Projection]:
    """Draw the random projections of all layers.

    Args:
        shapes: Layer -> (d_out, d_in).
        projected: Layer -> (r_out, r_in).
        seed: See random_side.
        experts: <layer>.in or <layer>.out -> number of experts, of wide sides (experts.wide_sides).
    """
    counts = experts or {}
    return {
        name: Projection(
            random_side(seed, name, "in", projected[name][1], d_in, counts.get(f"{name}.in", 0)),
            random_side(seed, name, "out", projected[name][0], d_out, counts.get(f"{name}.out", 0)),
        )
        for name, (d_out, d_in) in shapes.items()
    }


def identity(layers: Iterable[str]) -> dict[str, Projection]:
    """Return the projections that leave every layer unprojected."""
    return {name: Projection(None, None) for name in layers}


def eigenbasis(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [r], largest first, and the eigenvectors as rows [r, r] of a symmetric cov, float64.

    The largest entry of each eigenvector is positive, so the basis does not depend on the solver's signs.
    """
    values, vectors = torch.linalg.eigh(cov.double())
    vectors = vectors.T.flip(0)
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return values.flip(0).clamp_min(0), vectors * largest.sign()


def rotate(projection: Projection, cov_in: Tensor, cov_out: Tensor, shape: tuple[int, int]) -> Projection:
    """Merge the eigenvectors U of the projected covariances into the projection: P <- (U^T P)[:r].

    Args:
        projection: The projection under which cov_in and cov_out were measured.
        cov_in: Covariance of the projected inputs, at any scale.
        cov_out: Covariance of the projected output gradients, at any scale.
        shape: (r_out, r_in) to keep. A size below the covariance's is PCA (arXiv 2405.13954, app. C).
    """

    def rotate_side(p: Tensor | None, cov: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        values, vectors = (tensor[:rank] for tensor in eigenbasis(cov))
        return (vectors if p is None else vectors @ p.double()).float().contiguous(), values.float().contiguous()

    p_in, values_in = rotate_side(projection.p_in, cov_in, shape[1])
    p_out, values_out = rotate_side(projection.p_out, cov_out, shape[0])
    return Projection(p_in, p_out, values_in, values_out)


def unrotated(queries: Tensor, projection: Projection, shape: tuple[int, int]) -> Tensor:
    """Return P_out^T Q P_in of queries Q [rows, r_out * r_in].

    Its dot with vec(G) is the dot of Q with vec(P_out G P_in^T), so G need not be rotated.
    """
    q = queries.view(-1, *shape)
    return times(times(q.mT, projection.p_out).mT, projection.p_in).flatten(1)


def wide(x: Tensor) -> Tensor:
    """Return x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product a @ b, or that of two batches, in float32 or wider.

    Products of two 16-bit numbers are exact in float32. A GPU multiplies them as they are, and sums in float32; a CPU
    has no such product.
    """
    if a.is_cuda and a.dtype == b.dtype and a.dtype.itemsize == 2:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return wide(a) @ wide(b)


def times(rows: Tensor, p: Tensor | None) -> Tensor:
    """Return rows [..., r] @ P [r, d]; None stands for the identity."""
    return rows if p is None else rows @ p
