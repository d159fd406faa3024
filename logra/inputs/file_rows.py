"""The rows of local data files, as a Dataset with the columns that are used.

No type is inferred: an id is the text that the file has, and other values stay what they are.
"""

import csv
import io
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash
from datasets import Dataset
from filelock import FileLock
from pyarrow import parquet

from logra.inputs.row_forms import COLUMNS, FORMS, choose
from logra.runtime import files

ROW_KINDS = (".jsonl", ".json", ".parquet", ".csv")
KINDS = (*ROW_KINDS, ".txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READER = 2  # raise it where the reader's results change: rows that another one cached are then not used
BATCH_ROWS, BATCH_CHARACTERS = 1000, 2**25  # of a batch that is written
PEEKED_ROWS = 100  # of a stream, whose columns are known before the first is tokenised
MAX_CSV_FIELD = 2**31 - 1  # characters
NOT_TEXT = "(not text)"  # a column: the names of the row's columns that hold JSON instead of text
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def compression(path: Path) -> str:
    """Return the suffix of a compressed file, .gz or .zst, or ""."""
    return path.suffix if path.suffix in COMPRESSIONS else ""


def kind(path: Path) -> str:
    """Return the suffix that says what a file holds: .jsonl of `a.jsonl` and of `a.jsonl.zst`."""
    return Path(path.stem).suffix if compression(path) else path.suffix


def suffixes(path: Path) -> str:
    """Return the end of a file's name that says what it holds: `.jsonl.zst`."""
    return kind(path) + compression(path)


def _open(path: Path) -> BinaryIO:
    """Open a file, compressed or not, for reading. A compressed file that is cut off raises an OSError."""
    return pa.input_stream(str(path), compression=COMPRESSIONS.get(path.suffix))


def read(paths: list[Path], text_column: str, row_form: str | None, kept: Sequence[str], cache: Path) -> Dataset:
    """Return the rows of data files. They are copied into an Arrow file that is named after their content.

    Args:
        paths: Files, in order.
        text_column, row_form: See row_forms.choose. The Dataset has `id`, which is text, and all columns that a form of
            rows may need, if they are there. For their values see values_of.
        kept: Further columns.
        cache: A folder. A file there is used again for the same content, whatever the names.

    Raises:
        ValueError: A row can't be read, forms differ from file to file, or a file changed while it was read.
    """
    columns = tuple(dict.fromkeys(["id", text_column, *COLUMNS, *kept]))
    contents = [(suffixes(path), files.file_content(path)) for path in paths]
    key = xxhash.xxh3_64_hexdigest(json.dumps([READER, columns, contents]).encode())
    copy = cache / f"{key}.arrow"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_suffix(".lock")):  # the other ranks wait
        if not copy.exists():
            with files.atomic(copy, tag=f".{uuid.uuid4().hex}") as temporary:
                _write(temporary, paths, columns, lambda seen: choose(seen, text_column, row_form, False))
                if [content for _, content in contents] != [files.file_content(path) for path in paths]:
                    raise ValueError("it changed while it was read; start again when nobody writes to it")
    rows = Dataset.from_file(str(copy))
    if len(rows) == 0:
        raise ValueError("there is nothing in it")
    return rows.remove_columns([name for name in rows.column_names if rows.data[name].null_count == len(rows)])


def _write(copy: Path, paths: list[Path], columns: tuple[str, ...], form_of: Callable[[dict], str]) -> None:
    schema = pa.schema([(name, pa.string()) for name in columns] + [(NOT_TEXT, pa.list_(pa.string()))])
    first: tuple[str, str] | None = None  # a file and what its rows hold
    with open(copy, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for path in paths:
            seen: dict[str, None] = {}
            for rows in _batches(read_rows(path, columns, seen)):
                try:
                    writer.write_batch(_to_arrow(rows, columns, schema))
                except UnicodeEncodeError as error:
                    raise ValueError(f"{path.name}: {error}") from error
            if not seen:  # there is no row
                continue
            form = FORMS[form_of(seen)].name
            holds = f"{form} and {'an' if 'id' in seen else 'no'} id"
            first = first or (path.name, holds)
            if holds != first[1]:
                raise ValueError(
                    f"rows of {first[0]} are {first[1]}, and those of {path.name} {holds}; make them alike, or give a "
                    "--row_form that all files have"
                )


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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


class Stream:
    """Documents that are read from the first one on, as far as a run needs them (--streaming).

    Its columns are those of the first rows, and its length is the number of rows that were taken.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]):
        iterator = iter(rows)
        first = list(islice(iterator, PEEKED_ROWS))
        if not first:
            raise ValueError("there is nothing in it")
        self.column_names = list(dict.fromkeys(name for row in first for name in row))
        self._rows, self._read = chain(first, iterator), 0

    def take(self, count: int) -> list[dict[str, Any]]:
        """Return the next rows; fewer at the end."""
        try:
            rows = list(islice(self._rows, count))
        except Exception as error:  # each loader raises exceptions of its own
            raise ValueError(f"expected more documents after {self._read}, got an error: {error}; try again") from error
        self._read += len(rows)
        return rows

    def __len__(self) -> int:
        """Return the number of rows that were taken."""
        return self._read


def read_rows(path: Path, columns: tuple[str, ...] | None, seen: dict[str, None]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, and add the names of its columns to `seen`.

    Args:
        path: The file.
        columns: Those that are needed; None: all. Files other than .parquet yield all in any case.
        seen: Filled while the rows are read.

    Raises:
        ValueError: The file, or a row of it, can't be read.
    """
    try:
        if kind(path) == ".parquet":
            yield from _read_parquet(path, columns, seen)
            return
        read = {".txt": _read_text, ".csv": _read_csv}.get(kind(path), _read_json)
        with _open(path) as file:
            yield from read(path, file, seen)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} {_encoding_fault(path)}") from error
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None):  # of the system, such as a missing permission
            raise
        raise ValueError(f"{path.name} is damaged or cut off: {error}") from error


def read_all(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of several files."""
    for path in paths:
        yield from read_rows(path, None, {})


def _encoding_fault(path: Path) -> str:
    """Return how a file that is not UTF-8 is encoded, or where it stops being UTF-8."""
    place, rest = 0, b""
    with _open(path) as file:
        while data := file.read(2**20):
            if place == 0 and data[:2] in UTF16_MARKS:
                return "is in UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
            try:
                (rest + data).decode()
                place, rest = place + len(rest + data), b""
            except UnicodeDecodeError as error:
                data = rest + data
                if error.end < len(data) or "unexpected end" not in error.reason:
                    near = data[max(0, error.start - 20) : error.start + 20]
                    where = f"at byte {place + error.start}, near {near!r}"
                    return f"is not UTF-8 {where}; convert it: iconv -f LATIN1 -t UTF-8, say"
                place, rest = place + error.start, data[error.start :]
    return f"is not UTF-8 at byte {place}, its end, which cuts a character; is it whole?"


def _read_parquet(path: Path, columns: tuple[str, ...] | None, seen: dict[str, None]) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file, parquet.ParquetFile(file) as table:
        seen.update(dict.fromkeys(table.schema_arrow.names))
        for batch in table.iter_batches(BATCH_ROWS, columns=columns and [name for name in columns if name in seen]):
            for row in batch.to_pylist():
                yield row if row.get("id") is None else row | {"id": files.id_text(row["id"])}


def _read_text(path: Path, file: BinaryIO, seen: dict[str, None]) -> Iterator[dict[str, Any]]:
    """Yield each line as a row."""
    seen["text"] = None
    yield from ({"text": line.removesuffix("\n")} for line in io.TextIOWrapper(file, "utf-8-sig"))


def _read_csv(path: Path, file: BinaryIO, seen: dict[str, None]) -> Iterator[dict[str, Any]]:
    """Yield the rows below a line of column names, separated by commas, quoted with double quotes."""
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"{path.name} names a column twice: {', '.join(names)}")
        seen.update(dict.fromkeys(names))
        for row in reader:
            if len(row) != len(names):
                if not row:  # a blank line
                    continue
                raise ValueError(f"line {reader.line_num} of {path.name} has {len(row)} fields, not {len(names)}")
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path.name} is no row of a CSV: {error}") from error


def _read_json(path: Path, file: BinaryIO, seen: dict[str, None]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with an object per line, or of one with a list, which has to fit in memory."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="\n")
    lines: Iterable[str] = text
    is_list = False
    if kind(path) == ".json":
        start: list[str] = []  # up to the first line that is not blank
        while not "".join(start[-1:]).strip() and (line := text.readline()):
            start.append(line)
        is_list = "".join(start).lstrip().startswith("[")
        lines = ["".join(start) + text.read()] if is_list else chain(start, text)
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
