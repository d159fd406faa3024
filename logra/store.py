"""Tensor files with checksums, the gradient shards made of them, and the layout of every tensor file of a run.

gradients/00000.safetensors          <layer> [n, r_out * r_in] for each layer; of an integer type <layer> [n, bytes] and
                                     <layer>.scale [n] (see quantise)
gradients/00000.factors.safetensors  factor sums of the same examples (hooks.GradientCapture.take_factors)
gradients/00000.json                 manifest, written last: first id, count, checksums (xxh3) of the tensors; of an
                                     integer type also the estimated relative error of scores

The run's settings determine a file's layout: the names, dtypes and shapes of its tensors. A reader compares the file's
header with the layout and never trusts it. Each tensor has its own checksum, so a reader checks only what it reads.
Notation: n examples of a shard, r_in/r_out projected sizes, k = r_out * r_in.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import xxhash
from torch import Tensor

from logra.projection import Projection, Shapes
from logra.quantise import stored_tensors
from logra.runtime.files import atomic, read_json, write_json

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
Layout = dict[str, tuple[torch.dtype, list[int]]]  # tensor name -> (dtype, shape), in the file's order
COUNTS_LAYOUT: Layout = {"examples": (torch.int64, []), "tokens": (torch.int64, [])}


def _byte_ranges(layout: Layout) -> dict[str, range]:
    """Return the bytes of each tensor, counted after the header."""
    ranges, end = {}, 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        ranges[name] = range(begin, end)
    return ranges


def layout_bytes(layout: Layout) -> int:
    """Return the bytes of all tensors together."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def _header(layout: Layout) -> bytes:
    """Return the header of a file with these tensors, in the safetensors format."""
    entries = {}
    for name, span in _byte_ranges(layout).items():
        dtype, shape = layout[name]
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [span.start, span.stop]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> dict[str, str]:
    """Write tensors to `path` in the safetensors format, one at a time in the layout's order.

    safetensors' own save holds all tensors in memory at once and gives no checksums.

    Returns:
        Tensor name -> checksum (xxh3).

    Raises:
        ValueError: A tensor does not fit the layout.
    """
    checksums = {}
    with open(path, "wb") as file:
        file.write(_header(layout))
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if tensor.dtype != dtype or list(tensor.shape) != list(shape):
                raise ValueError(f"expected {dtype} {shape} for {name}, got {tensor.dtype} {list(tensor.shape)}")
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            checksums[name] = xxhash.xxh3_64_hexdigest(data)
    return checksums


def save_tensors(path: Path, layout: Layout, tensors: dict[str, Tensor], tag: str = "") -> dict[str, str]:
    """Write tensors atomically (see files.atomic for `tag`) and return their checksums.

    Raises:
        ValueError: The tensors do not fit the layout.
    """
    if tensors.keys() != layout.keys():
        raise ValueError(f"expected the tensors {', '.join(layout)} for {path}, got {', '.join(tensors)}")
    with atomic(path, tag, parents=False) as temporary_path:
        return write_tensors(temporary_path, layout, (tensors[name] for name in layout))


class TensorFile:
    """A file of write_tensors, open for reading. Neither the file nor the checksums are trusted.

    Args:
        path: The file.
        checksums: What write_tensors returned, as read from JSON.
        layout: The tensors that the file must hold.

    Raises:
        ValueError: The file is missing or was altered. `read` raises this too. The message names the file.
    """

    def __init__(self, path: Path, checksums: Any, layout: Layout):
        self.path, self.layout, self.byte_ranges = path, layout, _byte_ranges(layout)
        self.checksums = checksums if isinstance(checksums, dict) else {}
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        self.header = _header(layout)
        if os.fstat(self.file.fileno()).st_size != len(self.header) + layout_bytes(layout):
            self._altered("its size differs")
        if self.file.read(len(self.header)) != self.header:
            self._altered("its tensors are not those of the run's settings")

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _altered(self, how: str) -> NoReturn:
        self.file.close()
        raise ValueError(f"{self.path} was altered ({how})")

    def size(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return len(self.byte_ranges[name])

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Read a tensor into the start of `buffer` (uint8, large enough), or into new memory, and check it."""
        size, (dtype, shape) = self.size(name), self.layout[name]
        data = (torch.empty(size, dtype=torch.uint8) if buffer is None else buffer)[:size]
        view, begin, done = memoryview(data.numpy()), len(self.header) + self.byte_ranges[name].start, 0
        while done < size and (count := os.preadv(self.file.fileno(), [view[done:]], begin + done)):
            done += count
        if done < size or xxhash.xxh3_64_hexdigest(view) != self.checksums.get(name):
            self._altered(f"the checksum of {name} differs")
        return data.view(dtype).view(shape)


def problem(open_file: Callable[[], TensorFile]) -> str | None:
    """Open a file and read every tensor. Return what is wrong (missing, altered, other examples), or None."""
    try:
        with open_file() as file:
            for name in file.layout:
                file.read(name)
    except ValueError as error:
        return str(error)
    return None


def load_tensors(path: Path, checksums: Any, layout: Layout) -> dict[str, Tensor]:
    """Return all tensors of a file, checked (see TensorFile)."""
    with TensorFile(path, checksums, layout) as file:
        return {name: file.read(name) for name in layout}


def read_manifest(path: Path) -> dict:
    """Return the JSON beside a tensor file.

    Raises:
        ValueError: It is missing or was altered. The message names the file.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing")
    try:
        return read_json(path, "")
    except ValueError:
        raise ValueError(f"{path} was altered") from None


PROJECTION_PARTS = ("in", "out", "in.values", "out.values")  # names in the file of the fields of a Projection


def projection_layout(shapes: Shapes, projected: Shapes, rotated: bool) -> Layout:
    """Return the layout of projections.safetensors.

    Args:
        shapes: Layer -> (d_out, d_in).
        projected: Layer -> (r_out, r_in).
        rotated: The projections hold eigenvectors, also on sides that keep their width.
    """
    layout: Layout = {}
    for name, (d_out, d_in) in shapes.items():
        r_out, r_in = projected[name]
        sizes = ([r_in, d_in], [r_out, d_out], [r_in], [r_out])
        stored = (rotated or r_in < d_in, rotated or r_out < d_out, rotated, rotated)
        layout |= {f"{name}.{PROJECTION_PARTS[i]}": (torch.float32, size) for i, size in enumerate(sizes) if stored[i]}
    return layout


def projection_tensors(projections: dict[str, Projection]) -> dict[str, Tensor]:
    """Return the content of projections.safetensors: <layer>.in, .out and so on, without those that are None."""
    return {
        f"{name}.{part}": tensor
        for name, projection in projections.items()
        for part, tensor in zip(PROJECTION_PARTS, projection, strict=True)
        if tensor is not None
    }


def projections_of_tensors(tensors: dict[str, Tensor], layers: Iterable[str]) -> dict[str, Projection]:
    """Return the projections of the layers from the content of projections.safetensors."""
    return {name: Projection(*(tensors.get(f"{name}.{part}") for part in PROJECTION_PARTS)) for name in layers}


def gradient_layout(projected: Shapes, n: int, store_dtype: str) -> Layout:
    """Return the layout of a shard's gradients of n examples (see quantise.stored_tensors)."""
    tensors = {}
    for layer, (r_out, r_in) in projected.items():
        tensors |= stored_tensors(layer, torch.empty(n, r_out * r_in, device="meta"), store_dtype)
    return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}


def factor_layout(projected: Shapes, squares_only: bool) -> Layout:
    """Return the layout of a shard's factor sums (see hooks.GradientCapture.take_factors)."""
    layout: Layout = {}
    for name, (r_out, r_in) in projected.items():
        sizes = {} if squares_only else {"A": [r_in, r_in], "B": [r_out, r_out]}
        sizes["square"] = [r_out * r_in]
        layout |= {f"{name}.{key}": (torch.float32, size) for key, size in sizes.items()}
    return layout | COUNTS_LAYOUT


def hessian_layout(kind: str, projected: Shapes, examples: int, rotated: bool) -> Layout:
    """Return the layout of a Hessian file; all tensors are sums (see hessian.statistics).

    Args:
        kind: raw, kfac or ekfac.
        projected: Layer -> (r_out, r_in).
        examples: N. raw stores the Gram matrix [N, N] of a layer where N < k.
        rotated: The gradients are stored in the eigenbasis.
    """
    layout: Layout = {}
    for name, (r_out, r_in) in projected.items():
        k, dtype = r_out * r_in, torch.float64
        if kind == "raw" and k <= examples:
            sizes, dtype = {"cov": [k, k]}, torch.float32
        elif kind == "raw":
            sizes = {"gram": [examples, examples]}
        elif kind == "kfac":
            sizes = {"A": [r_in, r_in], "B": [r_out, r_out]}
        else:
            sizes = {"square": [r_out, r_in]}
            sizes |= {} if rotated else {"basis_in": [r_in, r_in], "basis_out": [r_out, r_out]}
        layout |= {f"{name}.{key}": (dtype, size) for key, size in sizes.items()}
    return layout | COUNTS_LAYOUT


class Shard(NamedTuple):
    """One shard's files in a folder: the gradients of the examples `ids`, their factor sums, and the manifest."""

    folder: Path
    number: int
    ids: range
    layouts: dict[str, Layout]  # of "gradients" and "factors"

    def path(self, kind: str) -> Path:
        """Return the file of the gradients, the factors or the manifest."""
        suffixes = {"gradients": ".safetensors", "factors": ".factors.safetensors", "manifest": ".json"}
        return self.folder / f"{self.number:05d}{suffixes[kind]}"

    def write(self, grads: dict[str, Tensor], factors: dict[str, Tensor], **entries: Any) -> int:
        """Write the shard, last the manifest with these further entries; return the bytes of all three files."""
        manifest: dict = {"first_example": self.ids.start, "examples": len(self.ids)} | entries
        for kind, tensors in (("gradients", grads), ("factors", factors)):
            manifest[kind] = save_tensors(self.path(kind), self.layouts[kind], tensors)
        write_json(self.path("manifest"), manifest, parents=False)
        return sum(self.path(kind).stat().st_size for kind in ("gradients", "factors", "manifest"))

    def open(self, kind: str = "gradients") -> TensorFile:
        """Open the shard's gradients or factors.

        Raises:
            ValueError: The shard is missing, was altered, or holds other examples.
        """
        path = self.path("manifest")
        manifest = read_manifest(path)
        if (manifest.get("first_example"), manifest.get("examples")) != (self.ids.start, len(self.ids)):
            raise ValueError(f"{path} is not of examples {self.ids.start} to {self.ids.stop - 1}")
        return TensorFile(self.path(kind), manifest.get(kind), self.layouts[kind])

    def problem(self) -> str | None:
        """Return what is wrong with the shard (missing, altered, other examples), or None if it is intact."""
        problems = (problem(partial(self.open, kind)) for kind in self.layouts)
        return next(filter(None, problems), None)
