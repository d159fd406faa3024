"""Turn documents into train examples: blocks of token ids with stable ids.

An example is a block of at most block_size tokens of one document. With `pack`, documents are joined end to end and
cut into full blocks. Row numbers are example ids.
"""

import gc
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from logra.inputs.file_rows import values_of
from logra.inputs.row_forms import FORMS, Row, RowError, choose, detect, make_row, with_columns
from logra.inputs.rows import (
    Encoded,
    block_text,
    encode_row,
    encode_texts,
    special_tokens,
)
from logra.runtime import files, progress
from logra.runtime.settings import RunSettings

SLICE_DOCUMENTS = 10_000  # documents tokenised at a time


def build_examples(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RunSettings,
    num_proc: int | None,
    work: Path,
    first_row: int = 0,
) -> tuple[Dataset, dict[str, int]]:
    """Tokenise documents into examples.

    Args:
        documents: Rows of one form (see row_forms). A column `id` becomes the document id, else the row number.
        tokenizer: Adds its own special tokens; no others are added.
        settings: Which documents to take, and how to cut them into examples.
        num_proc: Number of processes that tokenise.
        work: Folder for intermediate files.
        first_row: Number of the first row. An extension continues the run's numbers.

    Returns:
        Examples, and the counts {"documents", "dropped_rows", "rows"}. The columns are input_ids, document_id and
        text; `counted` with --train_loss response; `kept`, JSON, with --keep_columns; `block`, the number of the block
        in its document, or, packed, document_ids and document_starts.

    Raises:
        ValueError: The column is missing, rows are bad, or no example is left.
    """
    map_options = {"batched": True, "num_proc": num_proc, "load_from_cache_file": False}
    try:
        slices, dropped_rows = _tokenise(documents, tokenizer, settings, map_options, work, first_row)
    except UnicodeDecodeError as error:  # Arrow's JSON reader accepts bytes that are not UTF-8
        raise ValueError(f"expected UTF-8 in every row, got {error.object[:40]!r}; convert the file") from error
    if not slices:
        raise ValueError(f"expected rows with text, got {dropped_rows} empty ones and no other; check --text_column")
    examples = datasets.concatenate_datasets(slices)
    if settings.pack:
        arguments = {"documents": examples, "block_size": settings.block_size}
        examples = Dataset.from_generator(_pack, gen_kwargs=arguments, cache_dir=str(work))
    examples = _within_limits(examples, settings)
    arguments = {"examples": examples, "tokenizer": tokenizer}
    options = map_options | {"with_indices": True, "input_columns": "input_ids", "fn_kwargs": arguments}
    examples = examples.map(_add_text, cache_file_name=str(work / "text.arrow"), **options)
    ids = chain.from_iterable(examples["document_ids"][:]) if settings.pack else examples["document_id"][:]
    return examples, {"documents": len(set(ids)), "dropped_rows": dropped_rows, "rows": len(documents)}


def examples_in_memory(documents: Dataset, tokenizer: PreTrainedTokenizerBase, settings: RunSettings) -> Dataset:
    """Return the examples of build_examples, without files."""
    with tempfile.TemporaryDirectory() as work:
        examples, _ = build_examples(documents, tokenizer, settings, None, Path(work))
        return Dataset.from_list(examples.to_list())


def say_form(columns: list[str], settings: RunSettings) -> str:
    """Return the form of a data set's rows, see row_forms.choose. Print it unless they are texts and nothing else.

    Raises:
        ValueError: As choose. Or a column to be kept is missing.
    """
    response = settings.train_loss == "response"
    form = choose(columns, settings.text_column, settings.row_form, response)
    others = [name for name in detect(columns, settings.text_column, response) if name != form]
    if form != "text" or others:
        instead = f"; --row_form could be {' or '.join(others)}" if others else ""
        progress.say(f"rows are {FORMS[form].name}{instead}")
    if missing := [name for name in settings.keep_columns or () if name not in columns]:
        raise ValueError(
            f"expected the column {missing[0]} of --keep_columns with values, got {', '.join(columns)}; correct it"
        )
    return form


def document_order(count: int, shuffle_seed: int | None) -> np.ndarray:
    """Return the numbers of `count` documents in the order in which a run takes them: the data's, or a random one."""
    order = np.arange(count)
    return order if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(order)


def _tokenise(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RunSettings,
    map_options: dict,
    work: Path,
    first_row: int,
) -> tuple[list[Dataset], int]:
    """Tokenise slices of documents until max_examples or max_tokens is reached.

    Returns:
        Tokenised slices (blocks; with `pack` whole documents), and the number of dropped rows.
    """
    form = choose(documents.column_names, settings.text_column, settings.row_form, settings.train_loss == "response")
    max_tokens, max_examples = settings.max_tokens or np.inf, settings.max_examples or np.inf
    if settings.pack:  # the number of examples is not known yet
        max_tokens, max_examples = min(max_tokens, max_examples * settings.block_size), np.inf
    order = document_order(len(documents), settings.shuffle_seed)
    slices, tokens, examples, dropped_rows = [], 0, 0, 0
    with progress.bar(total=len(order), unit="doc", unit_scale=True, desc="tokenising", leave=False) as bar:
        for start in range(0, len(order), SLICE_DOCUMENTS):
            row_numbers = order[start : start + SLICE_DOCUMENTS]
            rows = _rows_with_text(documents, row_numbers, form, settings, first_row)
            dropped_rows += len(row_numbers) - len(rows)
            if len(rows) == 0:
                continue
            cache = str(work / f"part-{start // SLICE_DOCUMENTS:06d}.arrow")
            options = map_options | {"fn_kwargs": {"tokenizer": tokenizer, "settings": settings}}
            blocks = rows.map(_to_blocks, cache_file_name=cache, remove_columns=["row"], **options)
            dropped_rows += len(rows) - blocks["block"][:].count(0)
            slices.append(blocks)
            tokens, examples = tokens + int(token_counts(blocks).sum()), examples + len(blocks)
            done, reached = start + len(row_numbers), max(examples / max_examples, tokens / max_tokens)
            if reached > 0:  # the limits may end the loop before the last slice
                needed = math.ceil(done / min(1, reached) / SLICE_DOCUMENTS)
                bar.total = min(len(order), needed * SLICE_DOCUMENTS)
            bar.update(done - bar.n)
            if reached >= 1:
                break
    return slices, dropped_rows


def _rows_with_text(
    documents: Dataset, row_numbers: np.ndarray, form: str, settings: RunSettings, first_row: int
) -> Dataset:
    """Return those of the given rows that hold text: `row`, a row_forms.Row as JSON, and document_id; `kept`, JSON.

    Raises:
        ValueError: Some rows do not, and are not to be dropped.
    """
    selected = documents.select(row_numbers)
    ids = selected["id"][:] if "id" in documents.column_names else (row_numbers + first_row).tolist()
    if None in ids:
        raise ValueError(f"expected an id in every row, got none in row {row_numbers[ids.index(None)]}; add it")
    ids = [str(document_id) for document_id in ids]
    chosen = with_columns(form, settings.text_column)
    columns = tuple(name for name in (*chosen.needed, *chosen.optional) if name in documents.column_names)
    table: dict[str, list[str]] = {"row": [], "document_id": []}
    problems = {}
    for document_id, values in zip(ids, values_of(selected, columns), strict=True):
        try:
            row = make_row(form, dict(zip(columns, values, strict=True)), settings.text_column)
            table["row"].append(json.dumps(row))
            table["document_id"].append(document_id)
        except RowError as error:
            problems[document_id] = str(error)
    if not _has_blank_rows(settings.data_name) or {*problems.values()} - {"empty"}:
        _refuse(problems, len(ids), settings)
    if kept := tuple(settings.keep_columns or ()):
        values = dict(zip(ids, values_of(selected, kept), strict=True))
        dicts = [dict(zip(kept, values[document_id], strict=True)) for document_id in table["document_id"]]
        table["kept"] = [json.dumps(row, default=str) for row in dicts]
    return Dataset.from_dict(table)


def _refuse(problems: dict[str, str], rows: int, settings: RunSettings) -> None:
    """Raise a ValueError that names bad rows, {document id: problem}, unless they are to be dropped."""
    if problems and not settings.skip_bad_rows:
        named = ", ".join(f"{name} ({problem})" for name, problem in [*problems.items()][:5])
        raise ValueError(
            f"expected text in every row, got {len(problems)} empty or other rows among {rows}, the first ones: "
            f"{named}; fix them or give --skip_bad_rows"
        )


def _has_blank_rows(data_name: str) -> bool:
    """Return whether the data usually has blank rows (wikitext, text files), which are dropped without a flag."""
    name = Path(data_name).name
    return "wikitext" in name or ".txt" in Path(name).suffixes[-2:]


def _to_blocks(batch: dict, tokenizer: PreTrainedTokenizerBase, settings: RunSettings) -> dict:
    """Tokenise a batch of rows and cut each document into blocks (with `pack` one block), for Dataset.map."""
    response = settings.train_loss == "response"
    names = ["document_id", *(["kept"] if settings.keep_columns else [])]
    blocks: dict = {"input_ids": [], "block": []} | {name: [] for name in names} | ({"counted": []} if response else {})
    encoded = _encode([Row(*json.loads(row)) for row in batch["row"]], batch["document_id"], tokenizer, settings)
    for number, (ids, counted) in encoded.items():
        length = max(len(ids), 1)  # a document without tokens is an example too
        size = length if settings.pack else settings.block_size
        for block, start in enumerate(range(0, length, size)):
            blocks["input_ids"].append(ids[start : start + size])
            blocks["block"].append(block)
            for name in names:
                blocks[name].append(batch[name][number])
            if response:
                blocks["counted"].append(counted[start : start + size])
    return blocks


def _encode(
    rows: list[Row], ids: list[str], tokenizer: PreTrainedTokenizerBase, settings: RunSettings
) -> dict[int, Encoded]:
    """Tokenise rows; return those that can be, by number. The others are refused, or dropped."""
    if all(len(row.texts) == 1 for row in rows):
        return dict(enumerate(encode_texts(tokenizer, [row.texts[0] for row in rows])))
    ends = special_tokens(tokenizer, rows[0].texts[0]) if rows[0].texts else None
    encoded, problems = {}, {}
    for number, row in enumerate(rows):
        try:
            encoded[number] = encode_row(tokenizer, row, settings.chat_date, ends)
        except RowError as error:
            problems[ids[number]] = str(error)
    _refuse(problems, len(rows), settings)
    return encoded


def _pack(documents: Dataset, block_size: int) -> Iterator[dict]:
    """Join documents end to end and yield full blocks; the last one may be shorter.

    Each block names its documents and the positions where they start.
    """
    columns = [name for name in ("input_ids", "counted") if name in documents.column_names]
    block, ids, starts = {name: [] for name in columns}, [], []
    for row in documents:
        used = 0
        while used < len(row["input_ids"]):
            start = len(block["input_ids"])
            end = used + block_size - start
            block = {name: block[name] + row[name][used:end] for name in columns}
            ids, starts, used = [*ids, row["document_id"]], [*starts, start], end
            if len(block["input_ids"]) == block_size:
                yield block | {"document_id": ids[0], "document_ids": ids, "document_starts": starts}
                block, ids, starts = {name: [] for name in columns}, [], []
    if ids:
        yield block | {"document_id": ids[0], "document_ids": ids, "document_starts": starts}


def _within_limits(examples: Dataset, settings: RunSettings) -> Dataset:
    """Keep the first examples, up to max_examples and max_tokens."""
    kept = len(examples)
    if settings.max_tokens is not None:
        kept = int((np.cumsum(token_counts(examples)) <= settings.max_tokens).sum())
    if settings.max_examples is not None:
        kept = min(kept, settings.max_examples)
    if kept == 0:
        raise ValueError(
            f"expected at least one example within the limits, got none of {len(examples)}; raise --max_tokens"
        )
    return examples if kept == len(examples) else examples.select(range(kept))


def _add_text(
    ids: list[list[int]], rows: list[int], examples: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[str]]:
    """Decode a batch of examples, for Dataset.map. The texts of a document's blocks join to its text.

    Args:
        ids: Token ids of consecutive examples.
        rows: Their numbers.
        examples: All examples.
        tokenizer: Of the model.
    """
    first = max(0, rows[0] - 1)
    near = examples[first : rows[-1] + 2]  # and their neighbours
    documents = near.get("document_ids") or [[document_id] for document_id in near["document_id"]]
    texts = []
    for i, block in enumerate(ids, rows[0] - first):
        continues = i > 0 and documents[i - 1][-1] == documents[i][0]
        continued = i + 1 < len(documents) and documents[i][-1] == documents[i + 1][0]
        before, after = near["input_ids"][i - 1] if continues else [], near["input_ids"][i + 1] if continued else []
        texts.append(block_text(tokenizer, before, block, after))
    return {"text": texts}


def write_examples(
    path: Path,
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RunSettings,
    num_proc: int | None,
    first_row: int = 0,
) -> dict[str, Any]:
    """Write the examples (see build_examples) to the folder `path`; return their counts, fingerprint and files."""
    work = path.with_name("work.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        examples, counts = build_examples(documents, tokenizer, settings, num_proc, work, first_row)
        with files.atomic(path) as temporary:
            examples.save_to_disk(temporary)
        del examples
    except datasets.exceptions.DatasetGenerationError as error:
        raise OSError(f"packing failed: {error.__cause__}") from error
    except ValueError as error:  # closing a file that could not be written raises one
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        gc.collect()  # a network file system keeps files that are still mapped
        shutil.rmtree(work, ignore_errors=True)
    examples = datasets.load_from_disk(path)
    counts |= {"examples": len(examples), "tokens": int(token_counts(examples).sum())}
    return counts | {"fingerprint": examples_fingerprint(examples), "files": files.file_checksums(path)}


def _arrow_lists(examples: Dataset, column: str) -> Iterator:
    """Yield a column as Arrow list arrays, a thousand examples at a time."""
    for table in examples.with_format("arrow").select_columns([column]).iter(1000):
        yield table[column].combine_chunks()


def token_counts(examples: Dataset) -> np.ndarray:
    """Return the number of tokens of each example, [N] int64."""
    counts = [np.diff(np.asarray(lists.offsets)) for lists in _arrow_lists(examples, "input_ids")]
    return np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)


def examples_fingerprint(examples: Dataset) -> str:
    """Return a hash of all token ids, counted tokens, lengths and document ids, in order."""
    checksum = xxhash.xxh3_64()
    for column in ("input_ids", "counted"):
        for lists in _arrow_lists(examples, column) if column in examples.column_names else ():
            checksum.update(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64).data)
    checksum.update(token_counts(examples).data)
    checksum.update("\0".join(examples["document_id"][:]).encode())
    return checksum.hexdigest()
