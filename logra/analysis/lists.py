"""Write the lists top_k.jsonl, .csv, .txt and .parquet."""

import csv
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from logra.inputs.groups import label
from logra.runtime import files, progress
from logra.scoring.rank import document_names, move, scored_examples

COLUMNS = {  # of .csv and .parquet; others follow if some row has them
    "query": pa.string(), "side": pa.string(), "rank": pa.int64(), "score": pa.float64(), "percentile": pa.float64(),
    "z": pa.float64(), "document": pa.string(), "documents": pa.string(), "combine": pa.string(),
    "example": pa.int64(), "examples": pa.int64(), "block": pa.int64(), "text": pa.string(),
}  # fmt: skip
FURTHER = {
    "stored_score": pa.float64(), "stored_rank": pa.int64(), "checkpoints": pa.string(), "by": pa.string(),
    "group": pa.string(), "copies": pa.int64(),
}  # fmt: skip


def write_lists(folder: Path, queries: list[dict], sides: Sequence[str], formats: Collection[str]) -> None:
    """Write top_k.jsonl, top_k.csv, top_k.txt and top_k.parquet.

    Args:
        folder: The folder of the scores.
        queries: query_text, and rows ({"top": ranked_rows, "bottom": ranked_rows}) of each query.
        sides: Which of these rows to write.
        formats: Which of jsonl, csv, txt and parquet to write.
    """
    rows = [row for query in queries for side in sides for row in query["rows"][side]]
    if "jsonl" in formats:
        write_text(folder / "top_k.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if "csv" in formats:
        table, columns = flat(rows)
        with files.atomic(folder / "top_k.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in table)
    if "parquet" in formats:
        with files.atomic(folder / "top_k.parquet") as path:
            parquet.write_table(arrow_table(rows), path)
    if "txt" in formats:
        write_text(folder / "top_k.txt", progress.printable("\n".join(text_lines(queries, sides))))


def write_text(path: Path, text: str) -> None:
    """Write a text file. Half of a surrogate pair, which UTF-8 lacks, is written as in JSON."""
    with files.atomic(path) as temporary:
        temporary.write_text(text, "utf-8", "backslashreplace")


def flat(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows of numbers and texts, and their columns. A kept column is `kept.NAME`; other values are JSON."""
    further = [name for name in FURTHER if any(name in row for row in rows)]
    kept = list(dict.fromkeys(name for row in rows for name in row.get("kept", ())))
    table = []
    for row in rows:
        found = {name: _flat_value(row.get(name)) for name in (*COLUMNS, *further)}
        if "group" in row:
            found["group"] = label(row["group"])
        table.append(found | {f"kept.{name}": _flat_value(row.get("kept", {}).get(name)) for name in kept})
    return table, [*COLUMNS, *further, *(f"kept.{name}" for name in kept)]


def _flat_value(value: Any) -> Any:
    return label(value) if isinstance(value, list | dict) or (isinstance(value, str) and value.strip()) else value


def arrow_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows as a table. A kept column whose values are not all of one kind is text: each value as JSON."""
    table, columns = flat(rows)
    types, arrays = COLUMNS | FURTHER, []
    for name in columns:
        values = [row[name] for row in table]
        if name in types:
            arrays.append(pa.array(values, types[name]))
        else:
            arrays.append(_kept_array(values))
    return pa.table(arrays, columns)


def _kept_array(values: list) -> pa.Array:
    """Return a kept column's values as they are if all are texts, or all truth values, or all numbers."""
    kinds = {type(value) for value in values if value is not None}
    if any(kinds <= kind for kind in ({str}, {bool}, {int, float})):
        try:
            return pa.array(values, pa.string() if kinds <= {str} else None)
        except (pa.ArrowInvalid, OverflowError):  # a whole number that no column of numbers can hold
            pass
    return pa.array([value if value is None else json.dumps(value) for value in values], pa.string())


def csv_cell(value: Any) -> Any:
    """Return a cell of top_k.csv: an apostrophe stands before a text that would run as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value


def text_lines(queries: list[dict], sides: Sequence[str]) -> list[str]:
    """Return the lines of top_k.txt (see write_lists)."""
    lines = []
    for query in queries:
        group = f" ({query['group']})" if query["group"] else ""
        lines += ["=" * 100, f"Query {query['id']}{group}: {query['prompt']}", query["response"], ""]
        for row in (row for side in sides for row in query["rows"][side]):
            place = f"{document_names(row)}  ({scored_examples(row)})"
            moved = f" ({move(row)})" if move(row) else ""
            lines += [f"--- {row['side']} {row['rank']}{moved}: {row['score']:+.4g}  {place}"]
            if parts := row.get("checkpoints"):
                lines += [f"by checkpoint: {', '.join(f'{name} {part:+.4g}' for name, part in parts.items())}"]
            lines += [f"{name}: {label(value)}" for name, value in row.get("kept", {}).items()]
            lines += [row["text"].strip(), ""]
    return lines
