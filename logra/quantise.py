"""Gradients in 8, 4 or 1 bits per coordinate: packing, unpacking, and scores straight from the bits.

Notation: n examples, k = r_out * r_in coordinates of a layer, Q queries. A row is one example's gradient in one layer.
It is stored as `packed` [bytes] uint8 and `scale` float32. Coordinate i is scale * level[i]:
    int8  levels -127 to 127, scale = 0.05 * root mean square of the row; larger coordinates are clamped
    int4  levels -7 to 7, scale = 0.3 * root mean square of the row; larger coordinates are clamped
    int1  levels -1 and 1, scale = mean |z|
    none  the scale alone, mean |z|: stage 3 runs the model again
`packed` holds the codes level + 128, level + 8, or 0 and 1. Coordinate i is in byte i * bits // 8, lower bits first. A
row is padded with zero bits to a multiple of 8 bytes. Signs are enough in the eigenbasis (docs/method.md). In another
basis a few large directions dominate the rounded scores.
"""

from collections.abc import Callable
from functools import cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from logra.projection import product

FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGER_BITS = {"int8": 8, "int4": 4, "int1": 1, "none": 0}
STEPS_IN_RMS = {8: 0.05, 4: 0.3}  # bits -> scale / root mean square (evaluation/results/variants_*)
MAX_INTEGER_QUERIES = 512  # up to here a CPU scores with whole numbers; above, it unpacks rows and multiplies
COMPILING = Lock()  # of threads that make the queries of layers
CHUNK = 256  # coordinates with one step of a query: 256 * 255 * 32767 < 2^31


def packed_bytes(k: int, bits: int) -> int:
    """Return the bytes of a packed row of k coordinates, a multiple of 8."""
    return -(-k * bits // 64) * 8


def stored_bytes(k: int, store_dtype: str) -> int:
    """Return the bytes that one example's k coordinates of a layer take in a shard, with the scale."""
    bits = INTEGER_BITS.get(store_dtype)
    return k * FLOAT_DTYPES[store_dtype].itemsize if bits is None else packed_bytes(k, bits) + 4


def stored_tensors(layer: str, grads: Tensor, store_dtype: str) -> dict[str, Tensor]:
    """Return the tensors that a shard stores of a layer's gradients [n, k].

    A floating-point type has <layer> [n, k]. An integer type has <layer> [n, bytes] and <layer>.scale [n]; `none` has
    the scale alone.
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
        scale, codes = grads.abs().mean(dim=1), (grads > 0).to(torch.uint8)
    else:
        zero = 2 ** (bits - 1)  # the code of level 0
        scale = STEPS_IN_RMS[bits] * grads.square().mean(dim=1).sqrt()
        codes = (grads / scale.clamp_min(1e-38)[:, None]).round_().clamp_(1 - zero, zero - 1).add_(zero).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, packed_bytes(k, bits) * 8 // bits - k)).view(n, -1, 8 // bits)
    shifts = torch.arange(0, 8, bits, device=grads.device, dtype=torch.uint8)
    return (codes << shifts).sum(dim=2, dtype=torch.uint8), scale


@cache
def _levels_of_bytes(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the levels that each byte holds, [256, 8 // bits]."""
    shifts = torch.arange(0, 8, bits, device=device)
    codes = (torch.arange(256, device=device)[:, None] >> shifts) & (2**bits - 1)
    return (2 * codes - 1 if bits == 1 else codes - 2 ** (bits - 1)).to(dtype)


def _levels(packed: Tensor, bits: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return the levels [n, k] of packed [n, packed_bytes], exact in float32 and bfloat16 (as int8's codes are)."""
    if bits == 8:
        return packed[:, :k].to(dtype) - 128
    levels = torch.nn.functional.embedding(packed.int(), _levels_of_bytes(bits, dtype, packed.device))
    return levels.flatten(1)[:, :k]


def unpack(packed: Tensor, scale: Tensor, bits: int, k: int) -> Tensor:
    """Return the rounded gradients [n, k] float32 of packed [n, packed_bytes] and scale [n]."""
    return _levels(packed, bits, k, torch.float32) * scale[:, None]


def row_blocks(rows: Tensor, k: int) -> tuple[Tensor, ...]:
    """Split rows of k coordinates for unpacking: a block stays in a CPU's cache, or is large enough to occupy a GPU."""
    return rows.split(max(1, (2**20 if rows.device.type == "cpu" else 2**24) // k))


class ScoreErrorEstimate:
    """Estimates the relative error of scores that comes from rounding the gradients.

    It compares the scores of a few examples with each other, before and after rounding, summed over layers. An
    example's score with itself is left out. The preconditioner is K-FAC with the calibration sample's eigenvalues.
    """

    def __init__(self, eigenvalues: dict[str, tuple[Tensor, Tensor]], store_dtype: str, damping: float):
        """Take layer -> eigenvalues (of inputs [r_in], of output gradients [r_out]), and the relative damping."""
        self.eigenvalues, self.bits, self.damping = eigenvalues, INTEGER_BITS[store_dtype], damping
        self.reset()

    def reset(self) -> None:
        """Forget all layers."""
        self.scores: dict[torch.device, Tensor] = {}  # [2, n, n], summed over the layers on each device

    def add(self, layer: str, grads: Tensor) -> None:
        """Add a layer's gradients [n, k]; the n examples are the same for every layer."""
        values_in, values_out = self.eigenvalues[layer]
        values = torch.outer(values_out, values_in).flatten().to(grads.device)
        preconditioned = grads.float() / (values + self.damping * values.mean()).clamp_min(1e-38)
        rounded = unpack(*pack(grads, self.bits), self.bits, grads.shape[1])
        scores = torch.stack([preconditioned @ grads.float().T, preconditioned @ rounded.T])  # [2, n, n]
        self.scores[grads.device] = self.scores.get(grads.device, 0) + scores

    def result(self) -> float:
        """Return min over c of |c rounded - exact| / |exact|, from 0 to 1; 0 for a single example.

        The factor c is free because it changes no ranking: signs give scores larger than the gradient's.
        """
        if not self.scores:
            return 0.0
        scores = sum(part.double().cpu() for part in self.scores.values())
        exact, rounded = scores * (1 - torch.eye(len(scores[0])))
        cosine = (exact * rounded).sum() / (exact.norm() * rounded.norm()).clamp_min(1e-38)
        return (1 - cosine.square()).clamp_min(0).sqrt().item() if exact.any() else 0.0


@cache
def _bit_plane_sums() -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    """Return a compiled function of (signs, planes, sums).

    It sets sums [n, Q] to sum_b w_b * popcount(signs & plane b), with w_b = 2^b and -2^7 for the last plane.
    signs [n, W] uint64. planes [Q, 8, W] uint64 are the bits of the queries' values in two's complement.
    """
    import numba  # not at the head: it takes half a second, and only stores of few bits need it
    from numba.extending import intrinsic

    @intrinsic
    def popcount(_context, _word):
        """Count the ones of a 64-bit word, with LLVM's ctpop."""

        def generate(_context, builder, _signature, arguments):
            return builder.ctpop(arguments[0])

        return numba.types.uint64(numba.types.uint64), generate

    @numba.njit(nogil=True)  # no cache on the disk: it needs a writable folder, and compiling takes half a second
    def sum_bit_planes(signs: np.ndarray, planes: np.ndarray, sums: np.ndarray) -> None:
        for first in range(0, len(signs), 16):  # these rows stay in the cache for all queries
            for query in range(len(planes)):
                for row in range(first, min(first + 16, len(signs))):
                    row_sum = np.int64(0)
                    for word in range(signs.shape[1]):
                        bits = signs[row, word]
                        for plane in range(7):
                            row_sum += np.int64(popcount(bits & planes[query, plane, word])) << plane
                        row_sum -= np.int64(popcount(bits & planes[query, 7, word])) << 7
                    sums[row, query] = row_sum

    return sum_bit_planes


class BitQueries:
    """Queries in 8 bits, scored against rows of one bit with AND and popcount, bit plane by bit plane.

    A query is rounded to step * (-128 .. 127). The step is max |q| / 127, or a half or a quarter of it, whichever gives
    the smallest squared error.
    """

    def __init__(self, queries: Tensor):
        """Take queries [Q, k] float32 on the CPU."""
        self.shape, self.device, k = queries.shape, queries.device, queries.shape[1]
        largest_step = queries.abs().amax(dim=1, keepdim=True).clamp_min(1e-38) / 127
        steps = torch.cat([largest_step, largest_step / 2, largest_step / 4], dim=1)
        levels = (queries[:, None] / steps[..., None]).round_().clamp_(-128, 127)  # [Q, 3, k]
        error = (levels * steps[..., None] - queries[:, None]).square().sum(dim=2)
        best = error.argmin(dim=1, keepdim=True)
        self.step = steps.gather(1, best)[:, 0]
        levels = levels.gather(1, best[..., None].expand(-1, 1, k))[:, 0]
        self.level_sum = levels.sum(dim=1)
        values = np.pad(levels.char().numpy().view(np.uint8), ((0, 0), (0, packed_bytes(k, 1) * 8 - k)))
        planes = [np.packbits(values & (1 << plane), axis=1, bitorder="little") for plane in range(8)]
        self.planes = np.stack(planes, axis=1).view(np.uint64)
        with COMPILING:
            self.sum_bit_planes = _bit_plane_sums()

    def score(self, packed: Tensor, scale: Tensor) -> Tensor:
        """Return scores [n, Q] float32 of rows of one bit, packed [n, packed_bytes] and scale [n]."""
        signs, sums = packed.numpy().view(np.uint64), np.empty((len(packed), self.shape[0]), dtype=np.int64)
        self.sum_bit_planes(signs, self.planes, sums)
        # a sign is 2 * bit - 1
        return (2 * torch.from_numpy(sums) - self.level_sum).mul_(self.step).mul_(scale[:, None])


@cache
def _level_sums() -> Callable[..., None]:
    """Return a compiled function of (packed, bits, values, offsets, steps, sums).

    It sets sums [n, Q] float64 to the sums over chunks of step * (sum_i code_i * value_i - offset). packed [n, bytes]
    uint8 of 8 or 4 bits. values [Q, chunks, CHUNK] int16; offsets and steps [Q, chunks], int32 and float64.
    """
    import numba  # not at the head: it takes half a second, and only stores of few bits need it

    @numba.njit(nogil=True)
    def sum_levels(packed, bits, values, offsets, steps, sums):
        codes, width, mask = np.zeros((16, CHUNK), dtype=np.uint8), CHUNK * bits // 8, np.uint8(2**bits - 1)
        for first in range(0, len(packed), 16):  # these rows stay in the cache for all queries
            rows, row_sums = packed[first : first + 16], sums[first : first + 16]
            row_sums[:] = 0
            for chunk in range(steps.shape[1]):
                for row in range(len(rows)):
                    part = rows[row, chunk * width : (chunk + 1) * width]
                    for i in range(len(part)):
                        codes[row, i] = part[i] & mask
                    high = codes[row, width:]  # empty of 8 bits
                    for i in range(min(len(part), len(high))):
                        high[i] = part[i] >> np.uint8(4)
                for query in range(len(values)):
                    query_values = values[query, chunk]
                    for row in range(len(rows)):
                        chunk_sum = np.int32(0)  # of int32, not numba's int64: 16-bit multiply-adds (vpmaddwd)
                        for i in range(CHUNK):
                            chunk_sum = np.int32(chunk_sum + np.int32(codes[row, i]) * np.int32(query_values[i]))
                        row_sums[row, query] += steps[query, chunk] * (chunk_sum - offsets[query, chunk])

    return sum_levels


class LevelQueries:
    """Queries in 16 bits, scored on a CPU against rows of 8 or 4 bits with whole numbers.

    A chunk of a query is rounded to step * (-32767 .. 32767), with step = max |q| / 32767 over the chunk. That changes
    scores by 5e-5 of their norm, or by up to 1e-3 where a chunk spans six decades. Rounding the gradients changes them
    by more than 1e-2.
    """

    def __init__(self, queries: Tensor, bits: int):
        """Take queries [Q, k] float32 on the CPU."""
        self.shape, self.device, self.bits = queries.shape, queries.device, bits
        chunks = torch.nn.functional.pad(queries, (0, -queries.shape[1] % CHUNK)).view(len(queries), -1, CHUNK).double()
        steps = chunks.abs().amax(dim=2) / 32767
        values = (chunks / torch.where(steps > 0, steps, 1)[..., None]).round_().to(torch.int16)
        if bits == 4:  # as in codes: the coordinates in the bytes' lower bits come first
            values = values.unflatten(2, (-1, 2)).mT.flatten(2)
        offsets = values.sum(dim=2, dtype=torch.int32) * 2 ** (bits - 1)
        self.arrays = values.contiguous().numpy(), offsets.numpy(), steps.numpy()
        with COMPILING:
            self.sum_levels = _level_sums()

    def score(self, packed: Tensor, scale: Tensor) -> Tensor:
        """Return scores [n, Q] float32 of rows of 8 or 4 bits, packed [n, packed_bytes] and scale [n]."""
        sums = torch.empty(len(packed), self.shape[0], dtype=torch.float64)
        self.sum_levels(packed.numpy(), self.bits, *self.arrays, sums.numpy())
        return sums.mul_(scale[:, None]).float()


class SplitQueries:
    """Queries as sums of two bfloat16 numbers, scored on a GPU with its product of bfloat16, summed in float32.

    bfloat16 holds all levels exactly, so only the queries are rounded: by at most 2^-17 of each coordinate.
    """

    def __init__(self, queries: Tensor, bits: int):
        """Take queries [Q, k] float32 on the device that scores."""
        self.shape, self.device, self.bits = queries.shape, queries.device, bits
        high = queries.bfloat16()
        self.high_and_low = torch.cat([high, (queries - high.float()).bfloat16()])  # [2 Q, k]

    def score(self, packed: Tensor, scale: Tensor) -> Tensor:
        """Return scores [n, Q] float32 of packed [n, packed_bytes] and scale [n], on the queries' device."""
        count, k = self.shape
        blocks = (_levels(block, self.bits, k, torch.bfloat16) for block in row_blocks(packed, k))
        sums = torch.cat([product(levels, self.high_and_low.T) for levels in blocks])
        return (sums[:, :count] + sums[:, count:]) * scale[:, None]
