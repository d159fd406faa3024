"""Files of tensors, and the gradient shards that are made of them, with manifests and checksums.

gradients/00000.safetensors          a tensor <layer> [n, r_out * r_in] for each layer; of whole numbers, <layer>
                                     [n, bytes] and <layer>.scale [n] (see quantise)
gradients/00000.factors.safetensors  factor sums of the same examples (hooks.GradientCapture.take_factors)
gradients/00000.json                 manifest, written last: first id, count, sizes and checksums (xxh3), and of whole
                                     numbers the relative error of a sample's scores

A file of tensors comes with an entry {"bytes", "header", "tensors"}: its size, and the checksums of its header and of
each tensor, so that whoever reads one tensor checks just that one.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
import xxhash
from torch import Tensor

from logra.disk import atomic, fits, is_count, parse_json, read_json, write_json

MOST_HEADER = 10**8  # bytes, as safetensors has it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_TYPES = {code: dtype for dtype, code in _CODES.items()}
Layout = dict[str, tuple[torch.dtype, list[int]]]  # a tensor's name -> its dtype and shape


def write_tensors(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> dict:
    """Write tensors, one at a time in the layout's order, to `path` in the safetensors format; return its entry.

    safetensors' own save needs all tensors in memory at once and gives no checksum.
    """
    header, offset = {}, 0
    for name, (dtype, shape) in layout.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    checksums = {}
    with open(path, "wb") as file:
        file.write(text)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if tensor.dtype != dtype or list(tensor.shape) != list(shape):
                raise ValueError(f"expected {dtype} {shape} for {name}, got {tensor.dtype} {list(tensor.shape)}")
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            checksums[name] = xxhash.xxh3_64_hexdigest(data)
    return {"bytes": len(text) + offset, "header": xxhash.xxh3_64_hexdigest(text), "tensors": checksums}


def save_tensors(path: Path, tensors: dict[str, Tensor], tag: str = "") -> dict:
    """Write a dict of tensors atomically; return the file's entry."""
    layout = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    with atomic(path, tag) as made:
        return write_tensors(made, layout, tensors.values())


class TensorFile:
    """A file of write_tensors, open for reading. What is read is checked against the file's entry.

    Args:
        path: The file, which may come from anyone, and so may its entry.
        entry: What write_tensors returned.
        layout: The tensors that it has to hold, as for write_tensors; None where that is not known.

    Raises:
        ValueError: The file is missing or was altered; so does `read`. The message names the file.
    """

    def __init__(self, path: Path, entry: Any, layout: Layout | None = None):
        self.path, self.entry = path, entry
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        size = int.from_bytes(self.file.read(8), "little")
        known = fits(entry, {"bytes": is_count, "tensors": dict})
        if (
            not known
            or os.fstat(self.file.fileno()).st_size != entry["bytes"]
            or size > min(entry["bytes"], MOST_HEADER)
        ):
            self._altered("its size differs")
        text = size.to_bytes(8, "little") + self.file.read(size)
        if xxhash.xxh3_64_hexdigest(text) != entry.get("header"):
            self._altered("the checksum of its header differs")
        self.header, self.start = self._tensors(text[8:], entry["bytes"] - 8 - size), 8 + size
        found = {name: (_TYPES[tensor["dtype"]], tensor["shape"]) for name, tensor in self.header.items()}
        if layout is not None and found != layout:
            self._altered("it holds other tensors than the run's settings say")

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def _altered(self, how: str) -> NoReturn:
        self.file.close()
        raise ValueError(f"{self.path} was altered ({how})")

    def _tensors(self, text: bytes, size: int) -> dict[str, dict]:
        """Return the header; each tensor has to fill a part of the file's `size` bytes."""
        try:
            header = parse_json(text)
        except ValueError:
            header = None
        about = {"dtype": str, "shape": [is_count], "data_offsets": [is_count]}
        for name, tensor in header.items() if isinstance(header, dict) else [("header", None)]:
            good = fits(tensor, about) and tensor["dtype"] in _TYPES
            good = good and len(tensor["data_offsets"]) == 2 and len(tensor["shape"]) < 9
            first, end = tensor["data_offsets"] if good else (0, 0)
            if not good or end > size or end - first != math.prod(tensor["shape"]) * _TYPES[tensor["dtype"]].itemsize:
                self._altered(f"{name} does not fit")
        return header

    def size(self, name: str) -> int:
        """Return the bytes of a tensor."""
        if name not in self.header:
            self._altered(f"it has no {name}")
        first, end = self.header[name]["data_offsets"]
        return end - first

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Return a tensor, in `buffer` (uint8, large enough) or in memory of its own."""
        size, about = self.size(name), self.header[name]
        first = about["data_offsets"][0]
        data = (torch.empty(size, dtype=torch.uint8) if buffer is None else buffer)[:size]
        view, done = memoryview(data.numpy()), 0
        while done < size and (got := os.preadv(self.file.fileno(), [view[done:]], self.start + first + done)):
            done += got
        if done < size or xxhash.xxh3_64_hexdigest(view) != self.entry["tensors"].get(name):
            self._altered(f"the checksum of {name} differs")
        return data.view(_TYPES[about["dtype"]]).view(about["shape"])


def check_tensors(file: TensorFile) -> None:
    """Read a file through, a tensor at a time, and close it; raise a ValueError where it was altered."""
    with file:
        for name in file.header:
            file.read(name)


def load_tensors(path: Path, entry: Any, layout: Layout | None = None) -> dict[str, Tensor]:
    """Return all tensors of a file, checked (see TensorFile)."""
    with TensorFile(path, entry, layout) as file:
        return {name: file.read(name) for name in file.header}


def shard_files(folder: Path, index: int) -> dict[str, Path]:
    """Return the paths of a shard: gradients, factors, manifest."""
    names = {"gradients": f"{index:05d}.safetensors", "factors": f"{index:05d}.factors.safetensors"}
    return {key: folder / name for key, name in (names | {"manifest": f"{index:05d}.json"}).items()}


def write_shard(
    folder: Path, index: int, ids: range, grads: dict[str, Tensor], factors: dict[str, Tensor], **about: object
) -> None:
    """Write one shard, its manifest, with what else there is to say `about` it, last."""
    files = shard_files(folder, index)
    manifest: dict = {"first_example": ids.start, "examples": len(ids)} | about
    manifest |= {key: save_tensors(files[key], t) for key, t in (("gradients", grads), ("factors", factors))}
    write_json(files["manifest"], manifest)


def open_shard(
    folder: Path, index: int, ids: range, kind: str = "gradients", layout: Layout | None = None
) -> TensorFile:
    """Open a shard's gradients {layer: [n, k]} or its factors (see TensorFile).

    Raises:
        ValueError: The shard is missing, of other examples, or altered.
    """
    files = shard_files(folder, index)
    if not files["manifest"].exists():
        raise ValueError(f"{files['manifest']} is missing")
    try:
        manifest = read_json(files["manifest"], "")
    except ValueError:
        raise ValueError(f"{files['manifest']} was altered") from None
    if (manifest.get("first_example"), manifest.get("examples")) != (ids.start, len(ids)):
        raise ValueError(f"{files['manifest']} is not of examples {ids.start} to {ids.stop - 1}")
    return TensorFile(files[kind], manifest.get(kind), layout)


def shard_problem(folder: Path, index: int, ids: range) -> str | None:
    """Say what is wrong with a shard: missing, of other examples, or altered; None where it is whole."""
    try:
        for kind in ("gradients", "factors"):
            check_tensors(open_shard(folder, index, ids, kind))
    except ValueError as error:
        return str(error)
    return None
