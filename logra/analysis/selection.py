"""Select documents for all queries together, and write their rows as they stand in the source (analysis.py --select).

For each query a document's score is the sum or mean of its blocks' scores. It becomes a z-score among the documents (or
the share of documents with lower scores), so that no query dominates. Notation: Q queries, N examples, D documents.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from logra.inputs import data_files, file_rows
from logra.inputs.documents import load_documents
from logra.inputs.groups import column_groups, document_numbers
from logra.run_dir import RunDir
from logra.runtime import files, progress
from logra.runtime.settings import SelectionSettings
from logra.scoring.rank import StoredScores
from logra.stages.extract import check_data_files

NAME = "selected.jsonl"
PLACE = {"score": float, "rank": int}  # what a row gets under the key `logra`


class Selection(NamedTuple):
    """Of each document: its score over all queries [D] float64, its rank [D] from 1, and whether it is chosen [D]."""

    scores: np.ndarray
    ranks: np.ndarray
    chosen: np.ndarray


def aggregate_scores(matrix: np.ndarray, owners: np.ndarray, combine: str, aggregate: str) -> np.ndarray:
    """Return each document's score over all queries, [D] float64. One query is in memory at a time.

    Args:
        matrix: Scores [Q, N].
        owners: Number of each example's document, [N].
        combine: sum or mean, over a document's examples.
        aggregate: mean or max of the z-scores over the queries; or rank, the mean over the queries of the share of
            documents with lower scores, where an equal score counts half.
    """
    counts = np.bincount(owners)
    total = np.full(len(counts), -np.inf if aggregate == "max" else 0.0)
    for row in progress.bar(matrix, desc="selecting", unit="query"):
        values = np.bincount(owners, weights=row)
        if combine == "mean":
            values /= counts
        if aggregate == "rank":
            order = np.sort(values)
            places = np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right")
            values = places / (2 * len(values))
        else:
            deviation = values.std()
            values = (values - values.mean()) / (deviation if deviation > 0 else 1.0)
        total = np.maximum(total, values) if aggregate == "max" else total + values / len(matrix)
    return total


def choose(scores: np.ndarray, count: int, groups: np.ndarray) -> Selection:
    """Choose the documents with the highest scores, the same share of each group.

    Args:
        scores: [D].
        count: How many documents.
        groups: Number of each document's group, [D]. What remains of `count` goes to the groups whose shares were
            rounded down the most.
    """
    order = np.lexsort((-scores, groups))  # by group, highest first; equal scores as in the source
    sizes = np.bincount(groups)
    quotas, rests = np.divmod(count * sizes, len(scores))
    quotas[np.argsort(-rests, kind="stable")[: count - quotas.sum()]] += 1
    places = np.arange(len(scores)) - (np.cumsum(sizes) - sizes)[groups[order]]
    chosen = np.zeros(len(scores), bool)
    chosen[order] = places < quotas[groups[order]]
    ranks = np.empty(len(scores), np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return Selection(scores, ranks, chosen)


def select(
    settings: SelectionSettings, combine: str | None, examples: Dataset, scores: StoredScores, packed: bool
) -> Selection:
    """Choose documents by the flags.

    Raises:
        ValueError: Scores, examples or flags do not allow it.
    """
    if packed or scores.matrix is None:
        raise ValueError(
            "expected all scores, and examples of one document each, for --select, got --top_k_only or --pack; leave "
            "--select out"
        )
    if combine == "max":
        raise ValueError("expected --combine sum or mean with --select, got max; leave --combine out")
    owners = document_numbers(examples, packed)
    first = np.unique(owners, return_index=True)[1]
    groups = column_groups(examples, settings.per, "--per")[0][first] if settings.per else np.zeros(len(first), int)
    count = settings.select if isinstance(settings.select, int) else max(1, round(settings.select * len(first)))
    if count > len(first) - settings.drop:
        raise ValueError(
            f"expected at most {len(first) - settings.drop} documents for --select, got {count}, and the run has "
            f"{len(first)}; lower --select"
        )
    return choose(aggregate_scores(scores.matrix, owners, combine or "sum", settings.aggregate), count, groups)


def source_rows(run: RunDir) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the document id and all columns of each row of the run's data sets, in order.

    Raises:
        ValueError: The data is gone or has changed.
    """
    check_data_files(run)
    first_row, cache_dir = 0, run.record.arguments.get("cache_dir")
    for part in run.parts:
        data, number = part.settings, -1
        name, path, is_local = data.data_name, Path(data.data_name), data_files.exists(data.data_name)
        if not data.streaming and (part.source is not None) != is_local:
            kind = "data set of the Hub" if is_local else "local file or folder"
            raise ValueError(
                f"expected {name} to be a {kind}, as it was when {run.folder} was started, got another one or none; "
                "restore it, and start analysis.py in the same folder"
            )
        if data.streaming or not is_local or data_files.is_saved(path):
            rows = load_documents(data, cache_dir)
            rows = rows.take(part.rows) if isinstance(rows, file_rows.Stream) else rows
        else:
            rows = file_rows.read_all(data_files.find(path, data.data_config, data.data_split))
        for number, row in enumerate(rows):
            yield str(first_row + number) if row.get("id") is None else str(row["id"]), row
        if number + 1 != part.rows:
            raise ValueError(
                f"expected {part.rows} rows in {name}, as when {run.folder} was started, got {number + 1}; restore it"
            )
        first_row += part.rows


def write_selected(folder: Path, run: RunDir, examples: Dataset, selection: Selection, drop: bool) -> None:
    """Write the rows of the chosen documents (or of the others) to selected.jsonl, in the order of the source.

    Args:
        folder: Of the scores.
        run: Their run.
        examples: Its train examples.
        selection: Of `select`.
        drop: Write the documents that were not chosen.

    Raises:
        ValueError: The source is not that of the run, or has a column `logra` of its own.
    """
    first = np.unique(document_numbers(examples, packed=False), return_index=True)[1]
    numbers = {name: number for number, name in enumerate(examples.data["document_id"].take(first).to_pylist())}
    written, others, found = 0, 0, np.zeros(len(first), bool)
    kept = selection.chosen != drop
    with files.atomic(folder / NAME) as path, open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for name, row in source_rows(run):
            number = numbers.get(name)
            if number is None:
                others += 1
                continue
            found[number] = True
            if kept[number]:
                file.write(json_line(row, selection.scores[number].item(), selection.ranks[number].item()))
                written += 1
        if not found.all():
            missing = next(name for name, number in numbers.items() if not found[number])
            raise ValueError(f"expected the documents of {run.folder} in its data, got none with the id {missing}")
    how = f"{'without ' if drop else ''}the {selection.chosen.sum():,} highest of {len(first):,} documents"
    progress.say(f"{folder / NAME}: {written:,} rows, {how}")
    if others:
        progress.say(f"({others:,} rows of the data are not in the run, so have no score and are left out)")


def json_line(row: dict[str, Any], score: float, rank: int) -> str:
    """Return a row of selected.jsonl: that of the source, and its place under `logra`.

    Raises:
        ValueError: The row has a column `logra` that no selection wrote, or a value that JSON lacks.
    """
    if not files.has_shape(row.get("logra", {"score": 0.0, "rank": 0}), PLACE):
        raise ValueError(
            "expected rows without a column logra, or with that of an earlier selection, got another; rename it"
        )
    return json.dumps(row | {"logra": {"score": score, "rank": rank}}, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> str:
    """Return a value of a table that JSON lacks as text, if nothing is lost: a date or time."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise ValueError(
        f"expected columns of text, numbers, lists or dates for {NAME}, got a {type(value).__name__}; leave it out"
    )
