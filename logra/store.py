"""Files of a run that are whole or absent: atomic writes, gradient shards with manifests and checksums.

gradients/00000.safetensors          a tensor <layer> [n, r_out * r_in] for each layer
gradients/00000.factors.safetensors  factor sums of the same examples (hooks.GradientCapture.take_factors)
gradients/00000.json                 manifest, written last: first id, count, sizes and checksums (xxh3)
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, flush it and rename it to `path` (a file or a folder)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    was_folder = path.is_dir()
    temporary = path.with_name(f"{path.name}.tmp")
    remove(temporary)
    try:
        yield temporary
        for part in [*temporary.rglob("*"), temporary]:
            sync(part)
        if was_folder != temporary.is_dir() and path.exists():
            raise ValueError(f"expected to replace {path} by one of its kind, got a folder there; choose another name")
        if was_folder:  # a folder is not replaced in one step
            remove(path)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there; a folder in one step, as seen from outside."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f"{path.name}.deleted.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank. Only a newline ends a line, as in JSON Lines."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_json(path: Path, content: dict) -> None:
    """Write JSON atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, remedy: str) -> dict:
    """Read a JSON object, or raise a ValueError that ends with `remedy`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a JSON file {path}, got {type(error).__name__}; {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(content).__name__}; {remedy}")
    return content


def write_tensors(path: Path, layout: dict[str, tuple[torch.dtype, list[int]]], tensors: Iterable[Tensor]) -> dict:
    """Write tensors, one at a time in the layout's order, to `path` in the safetensors format.

    safetensors' own save needs all tensors in memory at once and gives no checksum.

    Returns:
        {"bytes": size of the file, "xxh3": its checksum}
    """
    header, offset = {}, 0
    for name, (dtype, shape) in layout.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksum, size = xxhash.xxh3_64(), 0
    with open(path, "wb") as file:

        def put(data) -> None:
            nonlocal size
            file.write(data)
            checksum.update(data)
            size += len(data)

        put(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if tensor.dtype != dtype or list(tensor.shape) != list(shape):
                raise ValueError(f"expected {dtype} {shape} for {name}, got {tensor.dtype} {list(tensor.shape)}")
            put(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"bytes": size, "xxh3": checksum.hexdigest()}


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> dict:
    """Write a dict of tensors atomically; see write_tensors."""
    layout = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        return write_tensors(temporary, layout, tensors.values())


def file_checksum(path: Path) -> dict:
    """Return {"bytes", "xxh3"} of a file, as write_tensors does."""
    checksum, size = xxhash.xxh3_64(), 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            checksum.update(chunk)
            size += len(chunk)
    return {"bytes": size, "xxh3": checksum.hexdigest()}


def shard_ids(examples: int, shard_examples: int) -> list[range]:
    """Return the example ids of each shard."""
    return [range(i, min(i + shard_examples, examples)) for i in range(0, examples, shard_examples)]


def shard_files(folder: Path, index: int) -> dict[str, Path]:
    """Return the paths of a shard: gradients, factors, manifest."""
    names = {"gradients": f"{index:05d}.safetensors", "factors": f"{index:05d}.factors.safetensors"}
    return {key: folder / name for key, name in (names | {"manifest": f"{index:05d}.json"}).items()}


def write_shard(folder: Path, index: int, ids: range, grads: dict[str, Tensor], factors: dict[str, Tensor]) -> None:
    """Write one shard, its manifest last."""
    files = shard_files(folder, index)
    manifest: dict = {"first_example": ids.start, "examples": len(ids)}
    manifest |= {key: save_tensors(files[key], t) for key, t in (("gradients", grads), ("factors", factors))}
    write_json(files["manifest"], manifest)


def shard_problem(folder: Path, index: int, ids: range) -> str | None:
    """Say what is wrong with a shard: missing, of other examples, or altered; None where it is whole."""
    files = shard_files(folder, index)
    if not files["manifest"].exists():
        return f"{files['manifest']} is missing"
    try:
        manifest = read_json(files["manifest"], "")
    except ValueError:
        return f"{files['manifest']} was altered (it is no JSON)"
    if (manifest.get("first_example"), manifest.get("examples")) != (ids.start, len(ids)):
        return f"{files['manifest']} is not of examples {ids.start} to {ids.stop - 1}"
    for key in ("gradients", "factors"):
        if not files[key].exists():
            return f"{files[key]} is missing"
        if file_checksum(files[key]) != manifest.get(key):
            return f"{files[key]} was altered (its checksum differs)"
    return None


def check_shards(folder: Path, shards: list[range]) -> None:
    """Raise a ValueError that names the first shard which is missing or altered."""
    for index, ids in enumerate(shards):
        if problem := shard_problem(folder, index, ids):
            raise ValueError(f"expected {len(shards)} whole shards, but {problem}; run extract_log.py again")


def load_shard(folder: Path, index: int, layers: Iterable[str], factors: bool = False) -> dict[str, Tensor]:
    """Return {layer: tensor} of one shard, memory-mapped; of its factor file with factors=True."""
    path = shard_files(folder, index)["factors" if factors else "gradients"]
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in layers}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, memory-mapped."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
