"""Files that are whole or absent, JSON with a checksum, locks; and what may come from someone else, read with care."""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any

import xxhash
from filelock import SoftFileLease, Timeout

LOCK_LEASE_SECONDS = 60.0  # seconds; see locked


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path, tag: str = "") -> Path:
    """Return where the content of `path` is written before it is whole."""
    return path.with_name(f"{path.name}{tag}.tmp")


@contextmanager
def atomic(path: Path, tag: str = "") -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, flush it and rename it to `path` (a file or a folder).

    Writers that may meet at one path give different tags.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    was_folder, made = path.is_dir(), temporary_path(path, tag)
    remove(made)
    try:
        yield made
        for part in [*made.rglob("*"), made]:
            sync(part)
        if was_folder != made.is_dir() and path.exists():
            raise ValueError(f"expected to replace {path} by one of its kind, got a folder there; choose another name")
        if was_folder:  # a folder is not replaced in one step
            remove(path)
        made.replace(path)
        sync(path.parent)
    except BaseException:
        remove(made)
        raise


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file inside the block. No lock of the kernel is used, so it holds on network file systems too.

    A dead owner's lock is taken over: at once on this host, else after LOCK_LEASE_SECONDS seconds without a sign of life.

    Args:
        path: The lock file; it is removed in the end.
        what: What it stands for, for the message.

    Raises:
        ValueError: A living process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(path, lease_duration=LOCK_LEASE_SECONDS, timeout=1)
    try:
        try:
            lock.acquire()
        except Timeout:
            if path.exists() and f"host={socket.gethostname()}\n" in path.read_text():
                raise
            lock.acquire(timeout=2 * LOCK_LEASE_SECONDS)
    except Timeout:
        raise ValueError(
            f"expected {what} for this run alone, got another one at work there (see {path}); wait until it ends"
        ) from None
    try:
        yield
    finally:
        lock.release()


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there; a folder in one step, as seen from outside."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f"{path.name}.deleted.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def short_name(name: str) -> str:
    """Return the last part of a model's or data set's name or path, fit for a file name."""
    return re.sub(r"[^\w.+-]", "_", Path(name).name or "root").lstrip(".")


def same_name(one: str, two: str) -> bool:
    """Say whether two names of a model or data set are equal, or paths of the same place."""
    paths = Path(one), Path(two)
    return one == two or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank. Only a newline ends a line, as in JSON Lines.

    Raises:
        ValueError: The file is not UTF-8.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 in {path}, got {error}; convert the file") from error


def _checksum(content: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def write_json(path: Path, content: dict, tag: str = "") -> None:
    """Write JSON atomically, with a checksum of its content."""
    with atomic(path, tag) as made:
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1, ensure_ascii=False)
        made.write_text(text + "\n", encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Refuse a folder with anything but files and folders in it: a link may lead out of it, a pipe makes us wait."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:  # other processes rename and delete
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                check_folder(Path(entry))
            elif not entry.is_file(follow_symlinks=False):
                raise ValueError(
                    f"expected files and folders in a run, got the link, pipe or device {entry.path}; delete it"
                )


def parse_json(text: str | bytes) -> Any:
    """Return the content of JSON text, or raise a ValueError, also where it is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def read_row(line: str) -> Any:
    """Return the value of a line of JSON Lines, or raise a ValueError that says what is wrong with it."""
    row = parse_json(line)
    json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair, which is no text, is a ValueError here
    return row


def has_shape(value: Any, shape: Any) -> bool:
    """Say whether parsed JSON has a shape.

    Args:
        value: What may hold anything.
        shape: A type or a union of types; a function that says yes or no; {key: shape} of the least keys of an object;
            or [shape], that of all items of a list.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            key in value and has_shape(value[key], part) for key, part in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    return isinstance(value, shape) if isinstance(shape, type | UnionType) else shape(value)


def is_count(value: Any) -> bool:
    """Say whether a value is a whole number of at least 0, and one that files can hold that many of."""
    return type(value) is int and 0 <= value < 2**48


def is_positive(value: Any) -> bool:
    """Say whether a value is a whole number of at least 1."""
    return is_count(value) and value > 0


def read_json(path: Path, remedy: str) -> dict:
    """Read what write_json wrote, or raise a ValueError that ends with `remedy`."""
    if not path.is_file():
        raise ValueError(f"expected a JSON file {path}, got none; {remedy}")
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a JSON file {path}, got {type(error).__name__}; {remedy}") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise ValueError(f"expected {path} as it was written, got other content; {remedy}")
    return content


def file_checksums(path: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the checksum (xxh3) of each file in a folder, or of those files; or of the file itself, as `.`."""
    found = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_file() and (names is None or name in names):
            checksum = xxhash.xxh3_64()
            with open(file, "rb") as content:
                while chunk := content.read(2**24):
                    checksum.update(chunk)
            found[name] = checksum.hexdigest()
    return found
