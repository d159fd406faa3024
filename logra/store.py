"""Files of tensors, and the gradient shards that are made of them, with manifests and checksums.

gradients/00000.safetensors          a tensor <layer> [n, r_out * r_in] for each layer; of whole numbers, <layer>
                                     [n, bytes] and <layer>.scale [n] (see quantise)
gradients/00000.factors.safetensors  factor sums of the same examples (hooks.GradientCapture.take_factors)
gradients/00000.json                 manifest, written last: first id, count, checksums (xxh3) of the tensors, and of
                                     whole numbers the relative error of a sample's scores

Which tensors a file has to hold, and where, follows from the run's settings (its layout), so its header is compared
and never trusted. Each tensor has a checksum of its own: whoever reads one checks just that one.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import xxhash
from torch import Tensor

from logra.projection import Projection, Shapes
from logra.quantise import stored_tensors
from logra.runtime.files import atomic, has_shape, read_json, write_json

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
Layout = dict[str, tuple[torch.dtype, list[int]]]  # a tensor's name -> its dtype and shape, in the file's order


def _places(layout: Layout) -> dict[str, tuple[int, int]]:
    """Return where each tensor begins and ends, in bytes after the header."""
    found, begin = {}, 0
    for name, (dtype, shape) in layout.items():
        found[name] = begin, begin + math.prod(shape) * dtype.itemsize
        begin = found[name][1]
    return found


def layout_bytes(layout: Layout) -> int:
    """Return the bytes of all tensors together."""
    return max((end for _, end in _places(layout).values()), default=0)


def _header(layout: Layout) -> bytes:
    """Return what a file with these tensors begins with, in the safetensors format."""
    entries = {
        name: {"dtype": _CODES[layout[name][0]], "shape": list(layout[name][1]), "data_offsets": place}
        for name, place in _places(layout).items()
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> dict[str, str]:
    """Write tensors, one at a time in the layout's order, to `path` in the safetensors format; return their checksums.

    safetensors' own save needs all tensors in memory at once and gives no checksum.
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
    """Write a dict of tensors atomically (see disk.atomic for `tag`); return their checksums."""
    if tensors.keys() != layout.keys():
        raise ValueError(f"expected the tensors {', '.join(layout)} for {path}, got {', '.join(tensors)}")
    with atomic(path, tag) as made:
        return write_tensors(made, layout, (tensors[name] for name in layout))


class TensorFile:
    """A file of write_tensors, open for reading.

    Args:
        path: The file, which may come from anyone.
        checksums: What write_tensors returned, or what someone else put in its place.
        layout: The tensors that it has to hold.

    Raises:
        ValueError: The file is missing or was altered; so does `read`. The message names the file.
    """

    def __init__(self, path: Path, checksums: Any, layout: Layout):
        self.path, self.layout = path, layout
        self.checksums = checksums if has_shape(checksums, dict) else {}
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        header, self.places = _header(layout), _places(layout)
        self.start = len(header)
        if os.fstat(self.file.fileno()).st_size != self.start + layout_bytes(layout):
            self._altered("its size differs")
        if self.file.read(self.start) != header:
            self._altered("it holds other tensors than the run's settings say")

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
        begin, end = self.places[name]
        return end - begin

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Return a tensor, in `buffer` (uint8, large enough) or in memory of its own."""
        size, (dtype, shape) = self.size(name), self.layout[name]
        data = (torch.empty(size, dtype=torch.uint8) if buffer is None else buffer)[:size]
        view, first, done = memoryview(data.numpy()), self.start + self.places[name][0], 0
        while done < size and (got := os.preadv(self.file.fileno(), [view[done:]], first + done)):
            done += got
        if done < size or xxhash.xxh3_64_hexdigest(view) != self.checksums.get(name):
            self._altered(f"the checksum of {name} differs")
        return data.view(dtype).view(shape)

    def check(self) -> None:
        """Read the file through, a tensor at a time, and close it."""
        with self:
            for name in self.layout:
                self.read(name)


def load_tensors(path: Path, checksums: Any, layout: Layout) -> dict[str, Tensor]:
    """Return all tensors of a file, checked (see TensorFile)."""
    with TensorFile(path, checksums, layout) as file:
        return {name: file.read(name) for name in layout}


PROJECTION_PARTS = ("in", "out", "in.values", "out.values")  # tensors of a layer's Projection in its file


def projection_layout(shapes: Shapes, projected: Shapes, rotated: bool) -> Layout:
    """Return name -> (dtype, shape) of the tensors of projections.safetensors.

    Args:
        shapes, projected: Layer -> sizes before, and after.
        rotated: The projections are made of eigenvectors, of sides that keep their width too.
    """
    found: Layout = {}
    for name, (d_out, d_in) in shapes.items():
        r_out, r_in = projected[name]
        sizes = ([r_in, d_in], [r_out, d_out], [r_in], [r_out])
        kept = (rotated or r_in < d_in, rotated or r_out < d_out, rotated, rotated)
        found |= {f"{name}.{PROJECTION_PARTS[i]}": (torch.float32, size) for i, size in enumerate(sizes) if kept[i]}
    return found


def projection_tensors(projections: dict[str, Projection]) -> dict[str, Tensor]:
    """Return the content of projections.safetensors: <layer>.in, .out and so on, where they are there."""
    parts = (
        (f"{name}.{key}", part)
        for name, p in projections.items()
        for key, part in zip(PROJECTION_PARTS, p, strict=True)
    )
    return {key: part for key, part in parts if part is not None}


def projections_of_tensors(tensors: dict[str, Tensor], layers: Iterable[str]) -> dict[str, Projection]:
    """Return the layers' projections that the content of projections.safetensors holds."""
    return {name: Projection(*(tensors.get(f"{name}.{key}") for key in PROJECTION_PARTS)) for name in layers}


def gradient_layout(projected: Shapes, n: int, store_dtype: str) -> Layout:
    """Return name -> (dtype, shape) of the tensors of a shard's gradients of n examples (see stored)."""
    found = {}
    for layer, (r_out, r_in) in projected.items():
        found |= stored_tensors(layer, torch.empty(n, r_out * r_in, device="meta"), store_dtype)
    return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in found.items()}


def factor_layout(projected: Shapes, squares_only: bool) -> Layout:
    """Return name -> (dtype, shape) of a shard's factor sums (see hooks.GradientCapture.take_factors)."""
    found = {}
    for name, (r_out, r_in) in projected.items():
        sums = {} if squares_only else {"A": [r_in, r_in], "B": [r_out, r_out]}
        found |= {f"{name}.{key}": (torch.float32, size) for key, size in (sums | {"square": [r_out * r_in]}).items()}
    return found | {"examples": (torch.int64, []), "tokens": (torch.int64, [])}


def hessian_layout(kind: str, projected: Shapes, examples: int, rotated: bool) -> Layout:
    """Return name -> (dtype, shape) of a Hessian file's tensors, in order; all are sums.

    Args:
        kind: raw, kfac or ekfac.
        projected: Layer -> (r_out, r_in).
        examples: N. raw keeps the N x N Gram matrix of a layer where N < k.
        rotated: The gradients are stored in ekfac's basis already.
    """
    entries: Layout = {}
    for name, (r_out, r_in) in projected.items():
        if kind == "raw":
            size, key = min((r_out * r_in, "cov"), (examples, "gram"))
            entries[f"{name}.{key}"] = (torch.float64 if key == "gram" else torch.float32, [size, size])
            continue
        square = {"square": [r_out, r_in]} | (
            {} if rotated else {"basis_in": [r_in, r_in], "basis_out": [r_out, r_out]}
        )
        sums = {"A": [r_in, r_in], "B": [r_out, r_out]} if kind == "kfac" else square
        entries |= {f"{name}.{key}": (torch.float64, shape) for key, shape in sums.items()}
    return entries | {"examples": (torch.int64, []), "tokens": (torch.int64, [])}


class Shard(NamedTuple):
    """The gradients of the examples `ids`, their factor sums, and a manifest, in a folder."""

    folder: Path
    number: int
    ids: range
    layouts: dict[str, Layout]  # of "gradients" and "factors"

    def path(self, kind: str) -> Path:
        """Return the file of gradients, factors or manifest."""
        ends = {"gradients": ".safetensors", "factors": ".factors.safetensors", "manifest": ".json"}
        return self.folder / f"{self.number:05d}{ends[kind]}"

    def write(self, grads: dict[str, Tensor], factors: dict[str, Tensor], **about: Any) -> int:
        """Write the shard, its manifest, with what else there is to say `about` it, last; return the bytes."""
        manifest: dict = {"first_example": self.ids.start, "examples": len(self.ids)} | about
        for kind, tensors in (("gradients", grads), ("factors", factors)):
            manifest[kind] = save_tensors(self.path(kind), self.layouts[kind], tensors)
        write_json(self.path("manifest"), manifest)
        return sum(self.path(kind).stat().st_size for kind in ("gradients", "factors", "manifest"))

    def open(self, kind: str = "gradients") -> TensorFile:
        """Open the shard's gradients or factors.

        Raises:
            ValueError: The shard is missing, of other examples, or altered.
        """
        path = self.path("manifest")
        if not path.exists():
            raise ValueError(f"{path} is missing")
        try:
            manifest = read_json(path, "")
        except ValueError:
            raise ValueError(f"{path} was altered") from None
        if (manifest.get("first_example"), manifest.get("examples")) != (self.ids.start, len(self.ids)):
            raise ValueError(f"{path} is not of examples {self.ids.start} to {self.ids.stop - 1}")
        return TensorFile(self.path(kind), manifest.get(kind), self.layouts[kind])

    def problem(self) -> str | None:
        """Say what is wrong with the shard: missing, of other examples, or altered; None where it is whole."""
        try:
            for kind in self.layouts:
                self.open(kind).check()
        except ValueError as error:
            return str(error)
        return None
