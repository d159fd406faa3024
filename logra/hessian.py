"""The Hessian (empirical Fisher) of each layer: statistics, damping, and (C + lambda I)^-1 (arXiv 2405.13954, sec. 2).

Notation: N train examples, r_in/r_out projected sizes, k = r_in * r_out, g [N, k] projected gradients, C [k, k],
x~ and d~ projected inputs and output gradients of a token, (x) the Kronecker product.
    raw    C = mean g g^T, solved by Cholesky, or in the N x N dual where N < k
    kfac   C ~ (tokens per example) * B (x) A with A = sum x~ x~^T / tokens, B = sum d~ d~^T / tokens
    ekfac  eigenvectors of kfac (or the basis of a rotated projection), eigenvalues mean (U_B G~ U_A^T)^2
    none   the identity, without damping
Statistics are stored undamped, as sums beside counts. U_A and U_B hold eigenvectors as rows. vec(G~) is row-major,
which makes it B (x) A.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from logra.projection import Shapes, eigenbasis

MAX_LAMBDA = 1e36  # float32 holds at most 3e38


class GradientSource(Protocol):
    """What statistics() reads; run_dir.RunDir is one."""

    projected: Shapes
    examples: int

    @property
    def shards(self) -> list[range]: ...
    def read(self, name: str, shards: Iterable[int], kind: str = "gradients") -> Iterator[Tensor]: ...


def damping_lambda(trace: float, k: int, damping: float | None, absolute: float | None) -> float:
    """Return lambda = damping * trace(C) / k, or `absolute` if that is given.

    Raises:
        ValueError: The damping is not positive and finite, or lambda is too large for float32.
    """
    value = damping if absolute is None else absolute
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"expected a positive, finite damping, got {value}; use --damping 0.1, say")
    lam = damping * trace / k if absolute is None else absolute
    if not lam <= MAX_LAMBDA:
        raise ValueError(
            f"expected lambda of at most {MAX_LAMBDA:.0e}, for float32, got {lam:.3g} (mean eigenvalue "
            f"{trace / k:.3g}); lower the damping, or remove the examples with the largest gradients"
        )
    return lam


def _cholesky(matrix: Tensor, shift: float) -> Tensor:
    """Return the lower Cholesky factor of matrix + shift I, float64."""
    eye = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix.double() + shift * eye)
    if failed:
        raise ValueError(f"expected C + lambda I to be positive definite, got lambda {shift:.1e}; raise --damping")
    return factor


class IdentityPreconditioner:
    """The identity instead of (C + lambda I)^-1; with `zero` the zero matrix, for a layer whose gradients are all 0."""

    def __init__(self, zero: bool = False):
        self.zero = zero

    def solve(self, g: Tensor) -> Tensor:
        """Return g, [n, k], or zeros."""
        return torch.zeros_like(g) if self.zero else g

    def quadratic(self, g: Tensor) -> Tensor:
        """Return g^T g for each row of g, [n], or zeros."""
        return g.new_zeros(len(g)) if self.zero else g.square().sum(dim=1)


def change_basis(g: Tensor, basis_in: Tensor, basis_out: Tensor) -> Tensor:
    """Return U_B G~ U_A^T of each row of g [n, k], as [n, r_out, r_in]; U_A is basis_in, U_B is basis_out."""
    return basis_out.to(g) @ g.view(-1, len(basis_out), len(basis_in)) @ basis_in.to(g).T


class EigenPreconditioner:
    """For kfac and ekfac: C = U^T diag(eigenvalues) U with U = U_B (x) U_A."""

    def __init__(self, values: Tensor, basis_in: Tensor | None, basis_out: Tensor | None, damping: float):
        """Take eigenvalues [r_out, r_in], U_A [r_in, r_in], U_B [r_out, r_out] and lambda.

        The bases are None where the gradients are stored in the eigenbasis.
        """
        self.inverse = (1 / (values.double() + damping)).float()
        self.bases = None if basis_in is None or basis_out is None else (basis_in.float(), basis_out.float())

    def solve(self, g: Tensor) -> Tensor:
        """Return (C + lambda I)^-1 g for each row of g, [n, k] float32."""
        solved = self._in_eigenbasis(g) * self.inverse.to(g.device)
        if self.bases:
            u_a, u_b = self.bases
            solved = change_basis(solved, u_a.T, u_b.T)
        return solved.flatten(1)

    def quadratic(self, g: Tensor) -> Tensor:
        """Return g^T (C + lambda I)^-1 g for each row of g, [n]."""
        return self._in_eigenbasis(g).square().mul_(self.inverse.to(g.device)).sum(dim=(1, 2))

    def _in_eigenbasis(self, g: Tensor) -> Tensor:
        """Return U_B G~ U_A^T of each row of g, [n, r_out, r_in]."""
        return change_basis(g, *self.bases) if self.bases else g.view(-1, *self.inverse.shape)


class DensePreconditioner:
    """For raw: C [k, k], solved by Cholesky in float64."""

    def __init__(self, cov: Tensor, damping: float):
        """Take C [k, k] and lambda > 0."""
        self.factor = _cholesky(cov, damping)

    def solve(self, g: Tensor) -> Tensor:
        """Return (C + lambda I)^-1 g for each row of g, [n, k] float32."""
        return torch.cholesky_solve(g.double().T, self.factor).T.float()

    def quadratic(self, g: Tensor) -> Tensor:
        """Return g^T (C + lambda I)^-1 g for each row of g, [n]."""
        return torch.linalg.solve_triangular(self.factor, g.double().T, upper=False).square().sum(dim=0).float()


class DualPreconditioner:
    """For raw with N < k: C = G^T G / N with G [N, k], solved through the Gram matrix G G^T [N, N].

    (C + lambda I)^-1 g = (g - G^T (G G^T + N lambda I)^-1 G g) / lambda.
    """

    def __init__(self, grads: Tensor, gram: Tensor, damping: float):
        """Take G [N, k], its Gram matrix [N, N] and lambda > 0."""
        self.grads, self.damping = grads.double(), damping
        self.factor = _cholesky(gram, len(gram) * damping)

    def solve(self, g: Tensor) -> Tensor:
        """Return (C + lambda I)^-1 g for each row of g, [n, k] float32."""
        g = g.double()
        inner = torch.cholesky_solve(self.grads @ g.T, self.factor)  # [N, n]
        return ((g - inner.T @ self.grads) / self.damping).float()

    def quadratic(self, g: Tensor) -> Tensor:
        """Return g^T (C + lambda I)^-1 g for each row of g, [n]."""
        return (g.double() * self.solve(g).double()).sum(dim=1).float()


Preconditioner = IdentityPreconditioner | EigenPreconditioner | DensePreconditioner | DualPreconditioner


def covariance_sum(blocks: Iterable[Tensor], k: int) -> Tensor:
    """Return sum g g^T over blocks of gradients [n, k], as [k, k] float32."""
    cov = torch.zeros(k, k)
    for block in blocks:
        cov = cov.to(block.device).addmm_(block.T, block)
    return cov


def gram_rows(blocks: Iterable[Tensor], rows: list[range]) -> Tensor:
    """Return the Gram matrix G G^T of all blocks together, [N, N] float64; rows outside `rows` stay 0.

    float64 is needed because the dual subtracts nearly equal terms: N lambda is far below the largest eigenvalue.
    """
    grads = torch.cat(list(blocks))
    gram = torch.zeros(len(grads), len(grads), dtype=torch.float64, device=grads.device)
    for columns in grads.split(2**16, dim=1):
        columns = columns.double()
        for ids in rows:
            gram[ids.start : ids.stop] += columns[ids.start : ids.stop] @ columns.T
    return gram


def rotated_squares(blocks: Iterable[Tensor], basis_in: Tensor, basis_out: Tensor) -> Tensor:
    """Return sum (U_B G~ U_A^T)^2 over blocks of gradients [n, k], as [k] float64."""
    squares = torch.zeros(len(basis_out) * len(basis_in), dtype=torch.float64)
    for block in blocks:
        squares += change_basis(block, basis_in, basis_out).square().sum(dim=0).flatten().double().cpu()
    return squares


def eigen(kind: str, stats: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the eigenvalues [r_out, r_in] float64 of kfac or ekfac, U_A [r_in, r_in] and U_B [r_out, r_out].

    The bases are None where the gradients are stored in the eigenbasis. `stats` is as for preconditioners.
    """
    count = stats["examples"].item()
    if kind == "ekfac":
        return stats["square"].double() / count, stats.get("basis_in"), stats.get("basis_out")
    tokens = max(stats["tokens"].item(), 1)
    (a, basis_in), (b, basis_out) = eigenbasis(stats["A"]), eigenbasis(stats["B"])
    return torch.outer(b, a) / (tokens * count), basis_in, basis_out  # (tokens / count) * (b / tokens) (a / tokens)


def preconditioner(
    kind: str,
    stats: dict[str, Tensor],
    damping: float | None,
    absolute: float | None = None,
    grads: Tensor | None = None,
) -> Preconditioner:
    """Build (C + lambda I)^-1 of one layer for one damping, relative or absolute; see preconditioners."""
    return preconditioners(kind, stats, [(damping, absolute)], grads)[0]


def preconditioners(
    kind: str,
    stats: dict[str, Tensor],
    dampings: Sequence[tuple[float | None, float | None]],
    grads: Tensor | None = None,
) -> list[Preconditioner]:
    """Build (C + lambda I)^-1 of one layer for each damping, from its stored statistics. kfac is decomposed once.

    Args:
        kind: raw, kfac, ekfac or none.
        stats: raw: cov [k, k] or gram [N, N]. kfac: A, B, tokens. ekfac: square [r_out, r_in] and, unless the
            gradients are stored in the eigenbasis, basis_in and basis_out. All are sums; `examples` is the count.
        dampings: (relative to the mean eigenvalue, absolute), of which one is None.
        grads: All gradients [N, k] of the layer; for raw with a gram only.

    Raises:
        ValueError: See damping_lambda; or C + lambda I is not positive definite in float64.
    """
    if kind == "none":
        return [IdentityPreconditioner() for _ in dampings]
    count = stats["examples"].item()
    if kind == "raw" and grads is not None:
        trace, k = stats["gram"].trace().item() / count, grads.shape[1]
        build: Callable[[float], Preconditioner] = partial(DualPreconditioner, grads, stats["gram"])
    elif kind == "raw":
        cov = stats["cov"].double() / count
        trace, k, build = cov.trace().item(), len(cov), partial(DensePreconditioner, cov)
    else:
        values, *bases = eigen(kind, stats)
        trace, k, build = values.sum().item(), values.numel(), partial(EigenPreconditioner, values, *bases)
    shifts = [damping_lambda(trace, k, *damping) for damping in dampings]
    return [build(shift) if shift > 0 else IdentityPreconditioner(zero=True) for shift in shifts]


def memory_bytes(kind: str, projected: Shapes, examples: int) -> int:
    """Return an upper bound of the bytes that the statistics of the widest layer and their solution take, on a rank.

    In the 40 of ekfac, two ranks or more hold a layer of their own, and one that is summed or exchanged.
    """
    k = max(r_out * r_in for r_out, r_in in projected.values())
    if kind == "raw":
        return 24 * k * k if k <= examples else 24 * examples * examples + 20 * examples * k
    return 40 * max(r_out**2 + r_in**2 + r_out * r_in for r_out, r_in in projected.values())


def _eigenbases(
    source: GradientSource,
    shards: range,
    sum_over_ranks: Callable[[Tensor], Tensor],
    factor: Callable[[str, list[int]], Tensor],
) -> Iterator[list[Tensor]]:
    """Yield U_A and U_B of each layer, on every rank.

    In each round as many layers as there are ranks are summed, then decomposed side by side, one by each rank. A rank
    holds the matrices of its own layer, and of the one that is being summed or yielded.
    """
    layers, rank, ranks = list(source.projected.items()), shards.start, shards.step
    for first in range(0, len(layers), ranks):
        together = layers[first : first + ranks]
        own: list[Tensor] = []
        for owner, (name, (r_out, r_in)) in enumerate(together):
            covs = (factor(f"{name}.{side}", [size, size]) for side, size in (("A", r_in), ("B", r_out)))
            own += [cov for cov in covs if owner == rank]
        own = [eigenbasis(cov)[1] for cov in own]
        for owner, (_, (r_out, r_in)) in enumerate(together):
            others = (torch.zeros(size, size, dtype=torch.float64) for size in (r_in, r_out))
            yield [sum_over_ranks(basis) for basis in (own if owner == rank else others)]


def statistics(
    kind: str,
    source: GradientSource,
    shards: range,
    sum_over_ranks: Callable[[Tensor], Tensor],
    rotated: bool,
    device: torch.device | str,
) -> Iterator[Tensor]:
    """Yield the tensors of store.hessian_layout, in its order, each summed over all ranks.

    Sums over shards and ranks are in float64, except for raw's C (float32, relative rounding error of about 1e-6).

    Args:
        kind: raw, kfac or ekfac.
        source: Yields gradients and factor sums shard by shard.
        shards: This rank's shards, range(rank, shards, ranks). Each layer's eigenvectors are computed by one rank.
        sum_over_ranks: Sums a tensor over ranks. All ranks make the same calls.
        rotated: The gradients are stored in the eigenbasis.
        device: Where raw's C and ekfac's second pass are computed.
    """

    def blocks(layer: str, indices: range) -> Iterator[Tensor]:
        return (block.to(device).float() for block in source.read(layer, indices))

    def factor(key: str, shape: list[int]) -> Tensor:
        total = torch.zeros(shape, dtype=torch.float64)
        for tensor in source.read(key, shards, "factors"):
            total += tensor
        return sum_over_ranks(total)

    bases = _eigenbases(source, shards, sum_over_ranks, factor)
    for name, (r_out, r_in) in source.projected.items():
        if kind == "raw" and r_out * r_in <= source.examples:
            yield sum_over_ranks(covariance_sum(blocks(name, shards), r_out * r_in).cpu())
        elif kind == "raw":  # every rank reads all gradients and computes the rows of its shards
            every = range(len(source.shards))
            yield sum_over_ranks(gram_rows(blocks(name, every), [source.shards[i] for i in shards]))
        elif kind == "kfac":
            yield factor(f"{name}.A", [r_in, r_in])
            yield factor(f"{name}.B", [r_out, r_out])
        elif rotated:
            yield factor(f"{name}.square", [r_out * r_in]).view(r_out, r_in)
        else:
            both = next(bases)
            yield sum_over_ranks(rotated_squares(blocks(name, shards), *both)).view(r_out, r_in)
            while both:  # none is left in memory when the next layers are summed
                yield both.pop(0)
    yield factor("examples", []).long()
    yield factor("tokens", []).long()
