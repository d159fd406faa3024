"""Gradients in few bits: a scale for each example and layer, and whole numbers packed into bytes.

Notation: n examples, k = r_out * r_in coordinates of a layer, Q queries. An example's row is stored as `packed`
[bytes] uint8 and `scale`, and stands for scale * level[i], i in 0 .. 2^bits - 1:
    int8  level i - 128, scale 0.05 root mean squares; the few coordinates beyond 127 of these are cut off
    int4  level i - 8, scale 0.3 root mean squares; so are those beyond 7
    int1  level -1 or 1, scale mean |z|
    none  nothing but the scale, mean |z|: stage 3 runs the model again
Coordinate j of a row is in byte j * bits // 8, lower bits first; rows end with zero bits up to 8 bytes. In the
eigenbasis a sign is enough (README, "More truth per byte"); in others, a few large directions drown the rest.
"""

from functools import cache

import numba
import numpy as np
import torch
from numba.extending import intrinsic
from torch import Tensor

FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGER_BITS = {"int8": 8, "int4": 4, "int1": 1, "none": 0}
STEPS_IN_RMS = {8: 0.05, 4: 0.3}  # bits -> scale in root mean squares (evaluation/results/variants_*)
MAX_BIT_COUNT_QUERIES = (
    512  # queries up to which a CPU counts bits: 100 are 4 times as fast as a matrix product, with vpopcntq
)


def packed_bytes(k: int, bits: int) -> int:
    """Return the bytes of a row of k coordinates: a multiple of 8."""
    return -(-k * bits // 64) * 8


def stored_bytes(k: int, store_dtype: str) -> int:
    """Return the bytes that an example's k coordinates of a layer take in a shard, its scale included."""
    bits = INTEGER_BITS.get(store_dtype)
    return k * FLOAT_DTYPES[store_dtype].itemsize if bits is None else packed_bytes(k, bits) + 4


def stored_tensors(layer: str, grads: Tensor, store_dtype: str) -> dict[str, Tensor]:
    """Return a shard's tensors of a layer's gradients [n, k]: <layer>, and of whole numbers <layer>.scale.

    Of `none` there is <layer>.scale alone, the mean of |z|.
    """
    if store_dtype not in INTEGER_BITS:
        return {layer: grads.to(FLOAT_DTYPES[store_dtype])}
    packed, scale = pack(grads, INTEGER_BITS[store_dtype])
    return {layer: packed, f"{layer}.scale": scale} if packed.numel() else {f"{layer}.scale": scale}


def pack(grads: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round gradients [n, k] to (packed [n, packed_bytes] uint8, scale [n] float32), on their device."""
    grads = grads.float()
    n, k = grads.shape
    if not bits:
        return torch.empty(n, 0, dtype=torch.uint8, device=grads.device), grads.abs().mean(dim=1)
    if bits == 1:
        scale, whole = grads.abs().mean(dim=1), (grads > 0).to(torch.uint8)
    else:
        half = 2 ** (bits - 1)
        scale = STEPS_IN_RMS[bits] * grads.square().mean(dim=1).sqrt()
        whole = (grads / scale.clamp_min(1e-38)[:, None]).round_().clamp_(1 - half, half - 1).add_(half).to(torch.uint8)
    whole = torch.nn.functional.pad(whole, (0, packed_bytes(k, bits) * 8 // bits - k)).view(n, -1, 8 // bits)
    shifts = torch.arange(0, 8, bits, device=grads.device, dtype=torch.uint8)
    return (whole << shifts).sum(dim=2, dtype=torch.uint8), scale


@cache
def _levels(bits: int, device: torch.device) -> Tensor:
    """Return the levels that a byte stands for, [256, 8 // bits] float32."""
    shifts = torch.arange(0, 8, bits, device=device)
    whole = (torch.arange(256, device=device)[:, None] >> shifts) & (2**bits - 1)
    return (2.0 * whole - 1) if bits == 1 else (whole - 2.0 ** (bits - 1))


def unpack(packed: Tensor, scale: Tensor, bits: int, k: int) -> Tensor:
    """Return the gradients [n, k] float32 that packed [n, packed_bytes] and scale [n] stand for."""
    if bits == 8:
        return (packed[:, :k].float() - 128) * scale[:, None]
    levels = torch.nn.functional.embedding(packed.int(), _levels(bits, packed.device))
    return levels.flatten(1)[:, :k] * scale[:, None]


class ScoreErrorEstimate:
    """The relative error that rounding makes in the scores between some examples, summed over layers.

    Scores are those of K-FAC with the calibration sample's eigenvalues; an example's with itself is left out.
    """

    def __init__(self, eigenvalues: dict[str, tuple[Tensor, Tensor]], store_dtype: str, damping: float):
        """Take layer -> the calibration sample's eigenvalues (inputs [r_in], output gradients [r_out])."""
        self.eigenvalues, self.store_dtype, self.damping = eigenvalues, store_dtype, damping
        self.scores: Tensor | None = None

    def add(self, layer: str, grads: Tensor) -> None:
        """Take a layer's gradients [n, k], of the same n examples for each layer."""
        values_in, values_out = self.eigenvalues[layer]
        values = torch.outer(values_out, values_in).flatten().to(grads.device)
        whitened = grads.float() / (values + self.damping * values.mean()).clamp_min(1e-38)
        packed, scale = pack(grads, INTEGER_BITS[self.store_dtype])
        rounded = unpack(packed, scale, INTEGER_BITS[self.store_dtype], grads.shape[1])
        scores = torch.stack([whitened @ grads.float().T, whitened @ rounded.T])  # [2, n, n]
        self.scores = scores if self.scores is None else self.scores + scores

    def result(self) -> float:
        """Return |c rounded - exact| / |exact| with the best factor c, from 0 to 1 (0 of a single example).

        A common factor changes no order, and a sign's scores are larger than those of the gradient.
        """
        if self.scores is None:
            return 0.0
        exact, rounded = self.scores.double() * (1 - torch.eye(len(self.scores[0]), device=self.scores.device))
        cosine = (exact * rounded).sum() / (exact.norm() * rounded.norm()).clamp_min(1e-38)
        return (1 - cosine.square()).clamp_min(0).sqrt().item() if exact.any() else 0.0


@intrinsic
def _ones(_context, _word):
    """Count the ones of a 64-bit word: LLVM's ctpop."""

    def generate(_context, builder, _signature, arguments):
        return builder.ctpop(arguments[0])

    return numba.types.uint64(numba.types.uint64), generate


@numba.njit(nogil=True, cache=True)
def _count(signs: np.ndarray, planes: np.ndarray, sums: np.ndarray) -> None:
    """Set sums [n, Q] to the sum over planes b of 2^b (-2^7 for the last) times the ones in signs [n, W] and planes.

    planes [Q, 8, W] are the bits of the queries' values, in two's complement.
    """
    for first in range(0, len(signs), 16):  # these rows stay in the cache for all queries
        for query in range(len(planes)):
            for row in range(first, min(first + 16, len(signs))):
                total = np.int64(0)
                for word in range(signs.shape[1]):
                    bits = signs[row, word]
                    for plane in range(7):
                        total += np.int64(_ones(bits & planes[query, plane, word])) << plane
                    total -= np.int64(_ones(bits & planes[query, 7, word])) << 7
                sums[row, query] = total


class BitQueries:
    """Queries in 8 bits, for rows of one bit: scores by AND and counting ones, bit plane by bit plane.

    Query values are rounded to whole multiples, -128 to 127, of a step a query: of max |q| / 127, and a half and a
    quarter of it, whichever leaves the smallest squared error.
    """

    def __init__(self, queries: Tensor):
        """Take queries [Q, k] float32 on the CPU."""
        self.count, k = queries.shape
        peak = queries.abs().amax(dim=1, keepdim=True).clamp_min(1e-38) / 127
        steps = torch.cat([peak, peak / 2, peak / 4], dim=1)
        whole = (queries[:, None] / steps[..., None]).round_().clamp_(-128, 127)  # [Q, 3, k]
        error = (whole * steps[..., None] - queries[:, None]).square().sum(dim=2)
        best = error.argmin(dim=1, keepdim=True)
        self.step = steps.gather(1, best)[:, 0]
        whole = whole.gather(1, best[..., None].expand(-1, 1, k))[:, 0]
        self.total = whole.sum(dim=1)
        values = np.pad(whole.char().numpy().view(np.uint8), ((0, 0), (0, packed_bytes(k, 1) * 8 - k)))
        planes = [np.packbits(values & (1 << plane), axis=1, bitorder="little") for plane in range(8)]
        self.planes = np.stack(planes, axis=1).view(np.uint64)

    def score(self, packed: Tensor, scale: Tensor) -> Tensor:
        """Return scores [n, Q] float32 of rows of one bit, packed [n, packed_bytes] and scale [n]."""
        signs, sums = packed.numpy().view(np.uint64), np.empty((len(packed), self.count), dtype=np.int64)
        _count(signs, self.planes, sums)
        return (2 * torch.from_numpy(sums) - self.total).mul_(self.step).mul_(scale[:, None])
