"""Local data files (.jsonl, .json, .parquet, .txt): which ones hold a split, and their rows as a Dataset.

A path is literal. No type is inferred: an id is the text that the file has, and other values stay what they are.
"""

import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets import Dataset
from filelock import FileLock
from pyarrow import parquet

from logra.runtime import files, progress

ROW_KINDS = (".jsonl", ".json", ".parquet")
KINDS = (*ROW_KINDS, ".txt")
SAVED = ("dataset_info.json", "dataset_dict.json")  # of folders that datasets saved
METADATA = (*SAVED, "dataset_infos.json", "config.json", "state.json")
SPLITS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
SPLIT_NAMES = {split: re.compile(rf"({names})([-._ ]?\d+(-of-\d+.*)?)?") for split, names in SPLITS.items()}
SHARD_NAME = re.compile(r"data/([\w.]+)-\d{5}-of-\d{5}")  # the Hub's; its splits may have any name
READER = 1  # raise it where the reader's results change: rows that another one cached are then not used
BATCH_ROWS = 1000
NOT_TEXT = "(not text)"  # a column: the names of the row's columns that hold JSON instead of text


def is_saved(folder: Path) -> bool:
    """Return whether datasets saved this folder (save_to_disk)."""
    return any((folder / name).is_file() for name in SAVED)


def load_saved(folder: Path, cache: Path) -> dict[str, Dataset]:
    """Return the splits of a folder that `datasets` saved. It is read through a link, as `::` in a path is no address.

    Args:
        folder: The folder.
        cache: A folder for links.
    """
    link = cache / "links" / xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode())
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(uuid.uuid4().hex)
    temporary.symlink_to(folder.resolve())
    temporary.replace(link)
    saved = datasets.load_from_disk(link)
    return saved if isinstance(saved, dict) else {"train": saved}


def find(path: Path, config: str | None, split: str) -> list[Path]:
    """Return the files of a local path that hold a split, in the order in which they are read.

    Args:
        path: A file, or a folder: one that `datasets` saved (then all its files), one whose README.md names its
            configurations, one whose files or folders have the names of splits, or else all data files are `train`.
        config: A configuration in README.md.
        split: Its name.

    Raises:
        ValueError: There is no such split or no data file, or some names are of splits and others are not.
    """
    if not path.is_dir() and not path.is_file():
        raise ValueError("it is neither a file nor a folder")
    if path.is_dir() and not is_saved(path) and _has_configs(path):
        splits = _configured_splits(path, config)
    elif config:
        raise ValueError(f"it has no configurations; leave --data_config {config} out")
    elif path.is_dir() and is_saved(path):
        return _visible_files(path)
    else:
        splits = _find_splits(path) if path.is_dir() else {"train": [path]}
    if split not in splits:
        raise ValueError(f"its splits are {', '.join(sorted(splits))}, not {split}")
    if other := [file.name for file in splits[split] if file.suffix not in KINDS]:
        raise ValueError(f"the suffix of {other[0]} is not one of {', '.join(KINDS)}")
    return splits[split]


def _has_configs(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and re.search(r"^configs:", card.read_text("utf-8", "replace"), re.MULTILINE) is not None


def _configured_splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """Return the files of each split in a configuration of README.md. Its patterns are resolved among links to them."""
    with tempfile.TemporaryDirectory() as mirror:
        for file in _visible_files(folder):
            link = mirror / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        found = datasets.load_dataset_builder(mirror, config, cache_dir=mirror).config.data_files
        return {split: [folder / Path(file).relative_to(mirror) for file in names] for split, names in found.items()}


def _visible_files(folder: Path) -> list[Path]:
    """Return all files below a folder in the order of their names, without hidden ones. Links are followed."""
    return [file for file in _all_files(folder) if not _is_hidden(file.relative_to(folder))]


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _all_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=True):
        above = {path.resolve() for path in (Path(root), *Path(root).parents)}
        folders[:] = [name for name in folders if Path(root, name).resolve() not in above]  # a link may make a loop
        found += [path for name in names if (path := Path(root, name)).is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder. Text files beside files of rows are notes, and no data."""
    found = _visible_files(folder)
    rows = [file for file in found if file.suffix in ROW_KINDS and file.name not in METADATA]
    return rows or [file for file in found if file.suffix == ".txt"]


def say_left_out(folder: Path) -> None:
    """Print which files of a folder are no data files. Where README.md names the files, it says what is data."""
    if not folder.is_dir() or _has_configs(folder):
        return
    data = set(_data_files(folder))
    others = [file.relative_to(folder) for file in _all_files(folder) if file not in data]
    if names := [str(name) for name in others if not _is_hidden(name) or name.suffix in ROW_KINDS]:
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        progress.say(f"left out of {folder}, as no data files: {', '.join(names[:20])}{more}")


def _find_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by split."""
    data = _data_files(folder)
    if not data:
        raise ValueError(f"it has no file that ends with one of {', '.join(KINDS)}")
    splits: dict[str | None, list[Path]] = {}
    for file in data:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if None not in splits:
        return splits
    if named := splits.keys() - {None, "train"}:
        one, other = splits[min(named)][0].name, splits[None][0].name
        raise ValueError(f"{one} has the name of a split and {other} has not; name all, or none, after their split")
    return {"train": data}


def _split_of(name: Path) -> str | None:
    """Return the split that a file's relative path names, as the Hub reads it; None if it names none."""
    if shard := SHARD_NAME.match(name.as_posix()):
        return shard[1]
    parts = (*name.parts[:-1], name.stem)
    return next((split for part in parts for split, names in SPLIT_NAMES.items() if names.fullmatch(part)), None)


def read(paths: list[Path], columns: tuple[str, ...], cache: Path) -> Dataset:
    """Return the rows of data files. They are copied into an Arrow file that is named after their content.

    Args:
        paths: Files, in order.
        columns: Which columns to keep. `id` is text; for the others see values_of.
        cache: A folder. A file there is used again for the same content, whatever the names.

    Raises:
        ValueError: A row can't be read, columns differ from file to file, or a file changed while it was read.
    """
    contents = [(path.suffix, files.file_content(path)) for path in paths]
    key = xxhash.xxh3_64_hexdigest(json.dumps([READER, columns, contents]).encode())
    copy = cache / f"{key}.arrow"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_suffix(".lock")):  # the other ranks wait
        if not copy.exists():
            with files.atomic(copy, tag=f".{uuid.uuid4().hex}") as temporary:
                _write(temporary, paths, columns)
                if contents != [(path.suffix, files.file_content(path)) for path in paths]:
                    raise ValueError("it changed while it was read; start again when nobody writes to it")
    rows = Dataset.from_file(str(copy))
    if len(rows) == 0:
        raise ValueError("there is nothing in it")
    return rows.remove_columns([name for name in rows.column_names if rows.data[name].null_count == len(rows)])


def _write(copy: Path, paths: list[Path], columns: tuple[str, ...]) -> None:
    schema = pa.schema([(name, pa.string()) for name in columns] + [(NOT_TEXT, pa.list_(pa.string()))])
    first_columns = None
    with open(copy, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for path in paths:
            seen: dict[str, None] = {}
            reader = _read_file(path, columns, seen)
            while rows := list(islice(reader, BATCH_ROWS)):
                try:
                    writer.write_batch(_to_arrow(rows, columns, schema))
                except UnicodeEncodeError as error:
                    raise ValueError(f"{path.name}: {error}") from error
            used = [name for name in columns if name in seen]
            if seen and set(used) <= {"id"}:
                raise ValueError(f"{path.name} has the columns {', '.join(seen)}, not {columns[1]}; give --text_column")
            first_columns = first_columns or used  # none in a file without rows
            if seen and used != first_columns:
                first = f"{paths[0].name} uses {', '.join(first_columns)}"
                raise ValueError(f"{path.name} has the columns {', '.join(seen)}, and {first}")


def _to_arrow(rows: list[dict], columns: tuple[str, ...], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows as a batch. A value that is no text is stored as JSON, and its column is named in NOT_TEXT."""
    table: dict[str, list] = {name: [row.get(name) for row in rows] for name in columns}
    not_text: list[list[str] | None] = [None] * len(rows)
    for name, values in table.items():
        for i, value in enumerate(values):
            if value is not None and type(value) is not str:
                values[i] = json.dumps(value)
                not_text[i] = [*(not_text[i] or ()), name]
    return pa.record_batch([*table.values(), not_text], schema=schema)


def values_of(rows: Dataset, columns: tuple[str, ...]) -> list[tuple]:
    """Return the values of each row's columns, of a Dataset of this module or any other."""
    table = {name: rows[name][:] for name in columns}
    for i, names in enumerate(rows[NOT_TEXT][:] if NOT_TEXT in rows.column_names else ()):
        for name in set(names or ()) & table.keys():
            table[name][i] = json.loads(table[name][i])
    return list(zip(*table.values(), strict=True))


def _read_file(path: Path, columns: tuple[str, ...], seen: dict[str, None]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, and add the names of its columns to `seen`."""
    try:
        if path.suffix == ".txt":
            seen["text"] = None
            with open(path, encoding="utf-8") as file:
                yield from ({"text": line.removesuffix("\n")} for line in file)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, columns, seen)
        else:
            yield from _read_json(path, seen)
    except UnicodeDecodeError as error:
        near = error.object[max(0, error.start - 20) : error.start + 20]
        raise ValueError(f"{path.name} is not UTF-8 near {near!r}: {error}") from error


def _read_parquet(path: Path, columns: tuple[str, ...], seen: dict[str, None]) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file, parquet.ParquetFile(file) as table:
        seen.update(dict.fromkeys(table.schema_arrow.names))
        for batch in table.iter_batches(BATCH_ROWS, columns=[name for name in columns if name in seen]):
            for row in batch.to_pylist():
                yield row if row.get("id") is None else row | {"id": files.id_text(row["id"])}


def _read_json(path: Path, seen: dict[str, None]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with an object per line, or of one with a list, which has to fit in memory."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        start = file.read(1)
        while path.suffix == ".json" and start.isspace():
            start = file.read(1)
        is_list = path.suffix == ".json" and start == "["
        file.seek(0)
        lines = [file.read()] if is_list else file
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found = files.parse_rows(line)
                for row in found if is_list else [found]:
                    row = {"text": row} if is_list and isinstance(row, str) else row
                    if not isinstance(row, dict):
                        raise ValueError(f"it holds a {type(row).__name__} and not an object with columns")
                    if row.get("id") is not None:
                        row["id"] = files.id_text(row["id"])
                    seen.update(dict.fromkeys(row))
                    yield row
            except ValueError as error:
                raise ValueError(f"line {number} of {path.name} is no row in JSON: {error}") from error


def whole_rows(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of data files with all their columns; an `id` is text. The rows are those of `read`, in order."""
    for path in paths:
        names = parquet.read_schema(path).names if path.suffix == ".parquet" else ()
        yield from _read_file(path, tuple(names), {})
