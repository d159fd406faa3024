"""Atomic writes, JSON with a checksum, locks, and checks of files that may come from anyone.

A file or folder is written under a temporary name and then renamed. So a reader finds it whole or not at all.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import xxhash
from filelock import SoftFileLease, Timeout

T = TypeVar("T")
MAX_NAME_BYTES = 160  # of the 255 that file systems allow
LOCK_LEASE_SECONDS = 60.0  # see locked
NETWORK_DISK_SECONDS = 60.0  # for so long an NFS client may remember that a file is missing, or its old size


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path, tag: str = "") -> Path:
    """Return the name under which `path` is written until it is complete."""
    return path.with_name(f"{fitting(path.name)}{tag}.tmp")


@contextmanager
def atomic(path: Path, tag: str = "", parents: bool = True) -> Iterator[Path]:
    """Yield a temporary path. If the block succeeds, flush it to the disk and rename it to `path`, else delete it.

    Args:
        path: A file, or a folder.
        tag: Part of the temporary name. Processes that write to the same path at once give different tags.
        parents: Create all missing folders above `path`. False: only the last one, so that a run's folder that someone
            removes at this moment does not come back with a part of its files.

    Raises:
        ValueError: A folder would replace a file, or a file a folder.
    """
    path.parent.mkdir(parents=parents, exist_ok=True)
    replaces_folder, temporary = path.is_dir(), temporary_path(path, tag)
    remove(temporary)
    try:
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            sync(written)
        if replaces_folder != temporary.is_dir() and path.exists():
            kind = "folder" if replaces_folder else "file"
            raise ValueError(f"expected no {kind} at {path}, got one; choose another name, or delete it")
        if replaces_folder:  # a rename does not replace a folder
            remove(path)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        remove(temporary)
        raise


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file inside the block. It works on network file systems too, as it uses no lock of the kernel.

    The lock of a process that died is taken over: at once if it ran on this host, else when it has not been renewed for
    LOCK_LEASE_SECONDS.

    Args:
        path: The lock file, deleted at the end.
        what: What the lock protects, for the message.

    Raises:
        ValueError: A living process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(path, lease_duration=LOCK_LEASE_SECONDS, timeout=1)
    try:
        try:
            held = lock.acquire()
        except Timeout:
            if path.exists() and f"host={socket.gethostname()}\n" in path.read_text():
                raise
            held = lock.acquire(timeout=2 * LOCK_LEASE_SECONDS)
    except Timeout:
        raise ValueError(
            f"expected {what} for this run alone, got another one at work there (see {path}); wait until it ends"
        ) from None
    with held:
        yield


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists. A folder is renamed first, so nobody sees a part of it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    renamed = temporary_path(path, ".deleted")
    shutil.rmtree(renamed, ignore_errors=True)
    path.rename(renamed)
    shutil.rmtree(renamed)


def link_files(source: Path, folder: Path) -> None:
    """Make a folder with hard links to the files of another one; with copies where the file system has no links."""
    with atomic(folder, parents=False) as temporary:
        temporary.mkdir()
        for file in source.iterdir():
            try:
                os.link(file, temporary / file.name)
            except OSError:
                shutil.copyfile(file, temporary / file.name)


def short_name(name: str) -> str:
    """Return the last part of a model's or data set's name or path, usable as a file name."""
    return re.sub(r"[^\w.+-]", "_", Path(name).name or "root").lstrip(".")


def fitting(name: str) -> str:
    """Return a file's or folder's name, or its beginning and a hash if other parts of a name may not fit after it."""
    content = os.fsencode(name)
    if len(content) <= MAX_NAME_BYTES:
        return name
    return f"{content[: MAX_NAME_BYTES - 9].decode(errors='ignore')}-{xxhash.xxh32_hexdigest(content)}"


def same_name(one: str, two: str) -> bool:
    """Return whether two names of a model or data set are equal, or paths of the same file or folder."""
    return one == two or (Path(one).exists() and Path(two).exists() and Path(one).samefile(two))


def read_lines(path: Path) -> list[str]:
    """Return the non-blank lines of a text file. Only a newline ends a line, as in JSON Lines.

    Raises:
        ValueError: The file is not UTF-8.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 in {path}, got {error}; convert the file") from error


def _checksum(content: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def write_json(path: Path, content: dict, tag: str = "", parents: bool = True) -> None:
    """Write JSON atomically, with a checksum of its content. For `tag` and `parents` see atomic."""
    with atomic(path, tag, parents) as temporary:
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def retried(read: Callable[[], T]) -> T:
    """Return read(), which reads files that another machine may just have written.

    When the processes run on several machines, a ValueError or OSError counts only after NETWORK_DISK_SECONDS.
    """
    several_machines = os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE")
    deadline = time.monotonic() + (NETWORK_DISK_SECONDS if several_machines else 0)
    while True:
        try:
            return read()
        except (ValueError, OSError):
            if time.monotonic() >= deadline:
                raise
        time.sleep(1)


def check_folder(folder: Path) -> None:
    """Check that a folder holds nothing but files and folders. A link may lead out of it; reading a pipe may block.

    Raises:
        ValueError: It holds a link, a pipe or a device.
    """
    with suppress(FileNotFoundError), os.scandir(folder) as entries:  # other processes may rename and delete
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                check_folder(Path(entry))
            elif not entry.is_file(follow_symlinks=False):
                raise ValueError(
                    f"expected files and folders in a run, got the link, pipe or device {entry.path}; delete it"
                )


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """Return the content of JSON text; `hooks` are those of json.loads.

    Raises:
        ValueError: The text is not JSON, or is nested too deeply for Python.
    """
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


class Number(float):
    """A JSON number with a fraction or an exponent. As text it keeps its spelling."""

    text: str

    def __new__(cls, text: str) -> "Number":
        """Parse the number."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object that has a key twice")
    return found


def parse_rows(text: str) -> Any:
    """Return the content of JSON text that a user wrote; see Number.

    Raises:
        ValueError: The text is not JSON, is nested too deeply for Python, or has a key twice.
    """
    return parse_json(text, parse_float=Number, object_pairs_hook=_object)


def read_row(line: str) -> Any:
    """Return the value of one line of JSON Lines.

    Raises:
        ValueError: As parse_rows. Or the line holds half of a surrogate pair, which UTF-8 can't encode.
    """
    row = parse_rows(line)
    json.dumps(row, ensure_ascii=False).encode()  # finds half surrogate pairs
    return row


def row_id(row: Any, number: int) -> str:
    """Return the id of a row of read_row (see id_text); its number if it has none."""
    value = row.get("id") if isinstance(row, dict) else None
    return str(number) if value is None else id_text(value)


def id_text(value: Any) -> str:
    """Return an id as its file has it: a text, a whole number, or a number of parse_rows.

    Raises:
        ValueError: It is of another type, whose text in the file is not known.
    """
    if type(value) not in (str, int, Number):
        raise ValueError(f"an id of the type {type(value).__name__}; write it as text")
    return str(value)


def has_shape(value: Any, shape: Any) -> bool:
    """Return whether parsed JSON has a shape.

    Args:
        value: Any parsed JSON.
        shape: A type or a union of types; a function value -> bool; {key: shape} for an object with at least these
            keys; or [shape] for a list whose items all have that shape.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            key in value and has_shape(value[key], entry_shape) for key, entry_shape in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    return isinstance(value, shape) if isinstance(shape, type | UnionType) else shape(value)


def is_count(value: Any) -> bool:
    """Return whether a value is an integer from 0 to 2^48 - 1, more than any file can count."""
    return type(value) is int and 0 <= value < 2**48


def is_positive(value: Any) -> bool:
    """Return whether a value is a count of at least 1."""
    return is_count(value) and value > 0


def read_json(path: Path, remedy: str) -> dict:
    """Read a file of write_json.

    Raises:
        ValueError: It is missing, is not JSON, or its checksum differs. The message ends with `remedy`.
    """
    if not path.is_file():
        raise ValueError(f"expected a JSON file {path}, got none; {remedy}")
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a JSON file {path}, got {type(error).__name__}; {remedy}") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise ValueError(f"expected {path} as it was written, got other content; {remedy}")
    return content


def file_content(path: Path) -> str:
    """Return what identifies a file's content: its size and its checksum (xxh3)."""
    return f"{path.stat().st_size}-{file_checksums(path)['.']}"


def changed_file(known: dict[str, str], found: dict[str, str]) -> str | None:
    """Compare contents by file name. Return the first file that differs, and how; None if all are the same, in order.

    Names alone may differ: a file or a folder may move.
    """
    if [*known.values()] == [*found.values()]:
        return None
    name = next((name for name in known | found if known.get(name) != found.get(name)), "the order of the files")
    how = "is new" if name not in known else "is gone" if name not in found else "has other content"
    return f"{name} {how}"


def file_checksums(path: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the checksums (xxh3) of files by name.

    Args:
        path: A folder, of which all files count, or one file, whose name is then `.`.
        names: Only these files of the folder.
    """
    checksums = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_file() and (names is None or name in names):
            with open(file, "rb") as content:
                checksums[name] = hashlib.file_digest(content, xxhash.xxh3_64).hexdigest()
    return checksums
