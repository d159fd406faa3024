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
from itertools import chain, count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from logra.inputs.chats import ChatTemplate
from logra.inputs.file_rows import Stream, kind, values_of
from logra.inputs.row_forms import FORMS, Row, RowError, choose, detect, make_row, with_columns
from logra.inputs.rows import (
    Encoded,
    add_text,
    encode_row,
    encode_texts,
    pack,
    special_tokens,
)
from logra.runtime import files, progress
from logra.runtime.settings import RunSettings

SLICE_DOCUMENTS, STREAM_DOCUMENTS = 10_000, 1_000  # documents tokenised at a time; of a Stream


def build_examples(
    documents: Dataset | Stream,
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
        examples = Dataset.from_generator(pack, gen_kwargs=arguments, cache_dir=str(work))
    examples = _within_limits(examples, settings)
    arguments = {"examples": examples, "tokenizer": tokenizer}
    options = map_options | {"with_indices": True, "input_columns": "input_ids", "fn_kwargs": arguments}
    examples = examples.map(add_text, cache_file_name=str(work / "text.arrow"), **options)
    ids = set(chain.from_iterable(examples["document_ids"][:]) if settings.pack else examples["document_id"][:])
    if not settings.pack and (repeated := examples["block"][:].count(0) - len(ids)):
        progress.say(f"{repeated} rows have the id of another row: rows of one id are one document")
    return examples, {"documents": len(ids), "dropped_rows": dropped_rows, "rows": len(documents)}


def examples_in_memory(
    documents: Dataset | Stream, tokenizer: PreTrainedTokenizerBase, settings: RunSettings
) -> Dataset:
    """Return the examples of build_examples, without files."""
    with tempfile.TemporaryDirectory() as work:
        examples, _ = build_examples(documents, tokenizer, settings, None, Path(work))
        return Dataset.from_list(examples.to_list())


def say_form(columns: list[str], settings: RunSettings) -> None:
    """Print the form of a data set's rows, see row_forms.choose, unless they are texts and nothing else.

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


def document_order(count: int, shuffle_seed: int | None) -> np.ndarray:
    """Return the numbers of `count` documents in the order in which a run takes them: the data's, or a random one."""
    order = np.arange(count)
    return order if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(order)


def _tokenise(
    documents: Dataset | Stream,
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
    slices, tokens, examples, dropped_rows, done = [], 0, 0, 0, 0
    total = None if isinstance(documents, Stream) else len(documents)
    columns = _columns(documents, form, settings)
    with progress.bar(total=total, unit="doc", unit_scale=True, desc="tokenising", leave=False) as bar:
        for number, read in enumerate(_read_slices(documents, columns, settings.shuffle_seed, first_row)):
            rows, done = _rows_with_text(read, form, settings), done + len(read)
            dropped_rows += len(read) - len(rows)
            if len(rows) == 0:
                continue
            if number == 0 and form != "text":
                _say_ignored_tools(rows, tokenizer, settings.chat_date)
            options = map_options | {"fn_kwargs": {"tokenizer": tokenizer, "settings": settings}}
            cache = str(work / f"part-{number:06d}.arrow")
            blocks = rows.map(_to_blocks, cache_file_name=cache, remove_columns=["row"], **options)
            dropped_rows += len(rows) - blocks["block"][:].count(0)
            slices.append(blocks)
            tokens, examples = tokens + int(token_counts(blocks).sum()), examples + len(blocks)
            reached = max(examples / max_examples, tokens / max_tokens)
            if reached > 0:  # the limits may end the loop before the last slice
                needed = math.ceil(done / min(1, reached) / len(read)) * len(read)
                bar.total = min(total or needed, needed)
            bar.update(done - bar.n)
            if reached >= 1:
                break
    return slices, dropped_rows


def _columns(documents: Dataset | Stream, form: str, settings: RunSettings) -> tuple[str, ...]:
    """Return the columns of the documents that the form of their rows uses, and those to be kept."""
    chosen = with_columns(form, settings.text_column)
    used = [name for name in (*chosen.needed, *chosen.optional) if name in documents.column_names]
    return tuple(dict.fromkeys([*used, *(settings.keep_columns or ())]))


def _read_slices(
    documents: Dataset | Stream, columns: tuple[str, ...], shuffle_seed: int | None, first_row: int
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Yield the documents in the run's order, some at a time: id, and values of the columns."""
    names = ("id", *columns) if "id" in documents.column_names else columns
    order = [] if isinstance(documents, Stream) else document_order(len(documents), shuffle_seed).tolist()
    for start in count(0, STREAM_DOCUMENTS if isinstance(documents, Stream) else SLICE_DOCUMENTS):
        if isinstance(documents, Stream):
            rows = documents.take(STREAM_DOCUMENTS)
            numbers = list(range(start, start + len(rows)))
        else:
            numbers = order[start : start + SLICE_DOCUMENTS]
            values = values_of(documents.select(numbers), names)
            rows = [dict(zip(names, of_row, strict=True)) for of_row in values]
        if not rows:
            return
        if "id" in names and (missing := [n for n, row in zip(numbers, rows, strict=True) if row.get("id") is None]):
            raise ValueError(f"expected an id in every row, got none in row {missing[0]}; add it")
        yield [(str(row.get("id", first_row + n)), row) for n, row in zip(numbers, rows, strict=True)]


def _rows_with_text(documents: list[tuple[str, dict[str, Any]]], form: str, settings: RunSettings) -> Dataset:
    """Return those of some documents that hold text: document_id, and `row`, a row_forms.Row as JSON; `kept`, JSON.

    Raises:
        ValueError: Some do not, and are not to be dropped.
    """
    names = ["document_id", "row", *(["kept"] if settings.keep_columns else [])]
    table: dict[str, list[str]] = {name: [] for name in names}
    problems = []
    for document_id, values in documents:
        try:
            row = make_row(form, values, settings.text_column)
        except RowError as error:
            problems.append((document_id, str(error)))
            continue
        table["document_id"].append(document_id)
        table["row"].append(json.dumps(row))
        if settings.keep_columns:
            table["kept"].append(json.dumps({name: values.get(name) for name in settings.keep_columns}, default=str))
    if _has_blank_rows(settings.data_name):
        problems = [problem for problem in problems if problem[1] != "empty"]
    _refuse(problems, len(documents), settings)
    return Dataset.from_dict(table)


def _say_ignored_tools(rows: Dataset, tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    """Print it if the chat template ignores the tools of the first row that has some; so it did in the training."""
    row = next((row for text in rows["row"] if (row := Row(*json.loads(text))).tools), None)
    if row and ChatTemplate(tokenizer, date, row.tools).ignores_tools(row.messages):
        progress.say("the model's chat template ignores the rows' tools, so they are no tokens of the chats")


def _refuse(problems: list[tuple[str, str]], rows: int, settings: RunSettings) -> None:
    """Raise a ValueError that names bad rows, (document id, problem), unless they are to be dropped."""
    if problems and not settings.skip_bad_rows:
        named = ", ".join(f"{name} ({problem})" for name, problem in problems[:5])
        raise ValueError(
            f"expected text in every row, got {len(problems)} empty or other rows among {rows}, the first ones: "
            f"{named}; fix them or give --skip_bad_rows"
        )


def _has_blank_rows(data_name: str) -> bool:
    """Return whether the data usually has blank rows (wikitext, text files), which are dropped without a flag."""
    path = Path(data_name)
    return "wikitext" in path.name or kind(path) == ".txt"


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
    encoded, problems = {}, []
    for number, row in enumerate(rows):
        try:
            encoded[number] = encode_row(tokenizer, row, settings.chat_date, ends)
        except RowError as error:
            problems.append((ids[number], str(error)))
    _refuse(problems, len(rows), settings)
    return encoded


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


def write_examples(
    path: Path,
    documents: Dataset | Stream,
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
