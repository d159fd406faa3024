"""Groups of train examples: documents, examples with the same value in a kept column, and equal examples.

A run made with --keep_columns keeps columns of each document's row: JSON text in the column `kept` of its examples.
Notation: N examples.
"""

import json
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash
from datasets import Dataset

from logra.runtime import files

BATCH_EXAMPLES = 1000


class Copies(NamedTuple):
    """Which examples or documents are equal: each example's number among the different ones [N]; how many of each."""

    numbers: np.ndarray
    counts: np.ndarray


def kept_values(example: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of its document's row that a train example keeps (--keep_columns): {column: value}.

    Raises:
        ValueError: They are damaged.
    """
    text = example.get("kept")
    try:
        found = {} if text is None else files.parse_json(text)
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"expected kept columns in train/, got {text!r:.60}; extract again with --overwrite")
    return found


def label(value: Any) -> str:
    """Return a kept column's value as text that UTF-8 can encode: a text as it is, anything else as JSON."""
    if value is None:
        return "(none)"
    text = value if isinstance(value, str) and value.strip() else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()  # half surrogate pairs stay escapes


def document_numbers(examples: Dataset, packed: bool) -> np.ndarray:
    """Return the number of each example's document, [N]; a packed block has a number of its own."""
    if packed:
        return np.arange(len(examples))
    encoded = examples.data["document_id"].dictionary_encode()  # one dictionary for all chunks
    return np.concatenate([chunk.indices for chunk in encoded.chunks])


def column_groups(examples: Dataset, column: str, flag: str) -> tuple[np.ndarray, list]:
    """Group examples by their value in a kept column; a missing value counts as null.

    Args:
        examples: The run's train examples.
        column: Its name.
        flag: That named it, for the message.

    Returns:
        The number of each example's group [N], and each group's value, in the order of the first examples.

    Raises:
        ValueError: The column was not kept.
    """
    texts = examples.data["kept"].dictionary_encode() if "kept" in examples.column_names else None
    kept = [kept_values({"kept": text}) for text in texts.chunk(0).dictionary.to_pylist()] if texts else []
    known = list(dict.fromkeys(name for row in kept for name in row))
    if column not in known:
        choices = f"one of the kept columns ({', '.join(known)})" if known else "a kept column (none was kept)"
        raise ValueError(
            f"expected {choices} for {flag}, got {column}; extract with --keep_columns {column}, or give another one"
        )
    values = [row.get(column) for row in kept] + [None]  # the last one is of rows without any, whose index is -1
    groups: dict[str, int] = {}  # JSON of a value -> number
    of_text = np.array([groups.setdefault(json.dumps(v, sort_keys=True), len(groups)) for v in values])
    indices = np.concatenate([c.indices.fill_null(-1).to_numpy(zero_copy_only=False) for c in texts.chunks])
    found, numbers = np.unique(of_text[indices], return_inverse=True)
    keys = list(groups)
    return numbers, [json.loads(keys[number]) for number in found]


def equal_examples(examples: Dataset) -> Copies:
    """Return which examples have the same tokens, of which the same ones count in the loss."""
    _, numbers, counts = np.unique(_hash_texts(examples), return_inverse=True, return_counts=True)
    return Copies(numbers, counts)


def _hash_texts(examples: Dataset) -> np.ndarray:
    """Return a hash of each example's token ids, and of which of them count in the loss, [N] uint64."""
    columns = [name for name in ("input_ids", "counted") if name in examples.column_names]
    hashes = []
    for table in examples.with_format("arrow").select_columns(columns).iter(BATCH_EXAMPLES):
        lists = [table[name].combine_chunks() for name in columns]
        cuts = np.asarray(lists[0].offsets) - lists[0].offsets[0].as_py()
        parts = [column.flatten().to_numpy(zero_copy_only=False) for column in lists]
        for start, end in pairwise(cuts):
            hashes.append(xxhash.xxh3_64_intdigest(b"".join(part[start:end].tobytes() for part in parts)))
    return np.array(hashes, np.uint64)


def equal_documents(examples: Dataset, owners: np.ndarray) -> Copies:
    """Return which documents have the same examples, in the same order."""
    hashes, order = _hash_texts(examples), np.argsort(owners, kind="stable")
    cuts = np.cumsum(np.bincount(owners))
    documents = [xxhash.xxh3_64_intdigest(part.tobytes()) for part in np.split(hashes[order], cuts[:-1])]
    _, numbers, counts = np.unique(np.array(documents, np.uint64), return_inverse=True, return_counts=True)
    return Copies(numbers[owners], counts)
