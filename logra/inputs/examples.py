"""Documents to train examples: token ids in blocks, with stable ids.

An example is a block of at most block_size tokens of one document; with pack, documents are joined end to end into
full blocks. Example ids are row numbers.
"""

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from logra.inputs.rows import ROW_COLUMNS, make_encoder, row_form, row_problem
from logra.runtime import files, progress
from logra.runtime.settings import RunSettings

SLICE_DOCUMENTS = 10_000  # documents that are tokenised at a time


def _blank_rows_are_usual(data_name: str) -> bool:
    """Say whether blank rows are dropped, and counted, without --skip_bad_rows: of wikitext and of text files."""
    name = Path(data_name).name
    return "wikitext" in name or name.endswith(".txt")


def _good_rows(form: str, rows: list[tuple], ids: list[str], settings: RunSettings) -> list[int]:
    """Return the rows that hold text; refuse bad ones unless they are to be skipped."""
    bad = {i: problem for i, row in enumerate(rows) if (problem := row_problem(form, row))}
    blank_is_usual = _blank_rows_are_usual(settings.data_name)
    unusual = [i for i, problem in bad.items() if not (blank_is_usual and problem == "empty")]
    if unusual and not settings.skip_bad_rows:
        raise ValueError(
            f"expected text in every row, got {len(unusual)} empty or other rows among {len(rows)}, the first ones: "
            f"{', '.join(f'{ids[i]} ({bad[i]})' for i in unusual[:5])}; mend them or give --skip_bad_rows"
        )
    return [i for i in range(len(rows)) if i not in bad]


def _tokenise(
    encode: Callable, columns: Sequence[str], block_size: int | None, response: bool
) -> Callable[[dict], dict]:
    """Return a function for Dataset.map: documents to blocks (whole documents where block_size is None)."""

    def tokenise(batch: dict) -> dict:
        rows: dict = {"input_ids": [], "document_id": [], "block": []} | ({"counted": []} if response else {})
        encoded = encode(list(zip(*(batch[column] for column in columns), strict=True)))
        for (ids, counted), document in zip(encoded, batch["document_id"], strict=True):
            size = block_size or max(len(ids), 1)
            for block, start in enumerate(range(0, max(len(ids), 1), size)):
                rows["input_ids"].append(ids[start : start + size])
                rows["document_id"].append(document)
                rows["block"].append(block)
                if response:
                    rows["counted"].append(counted[start : start + size])
        return rows

    return tokenise


def _pack(documents: Dataset, block_size: int):
    """Yield full blocks of documents joined end to end, the last one as long as it gets, with what each holds."""
    kept = [name for name in ("input_ids", "counted") if name in documents.column_names]
    block, names, starts = {name: [] for name in kept}, [], []
    for row in documents:
        used = 0
        while used < len(row["input_ids"]):
            filled = len(block["input_ids"])
            names, starts = [*names, row["document_id"]], [*starts, filled]
            block = {name: block[name] + row[name][used : used + block_size - filled] for name in kept}
            used += block_size - filled
            if len(block["input_ids"]) == block_size:
                yield block | {"document_id": names[0], "document_ids": names, "document_starts": starts}
                block, names, starts = {name: [] for name in kept}, [], []
    if names:
        yield block | {"document_id": names[0], "document_ids": names, "document_starts": starts}


def _cut(examples: Dataset, settings: RunSettings) -> Dataset:
    """Keep the first examples, up to max_examples and max_tokens."""
    total = np.cumsum(token_counts(examples))
    keep = int((total <= settings.max_tokens).sum()) if settings.max_tokens is not None else len(total)
    keep = min(keep, settings.max_examples if settings.max_examples is not None else keep)
    if keep == 0:
        raise ValueError(
            f"expected at least one example within the limits, got none of {len(total)}; raise --max_tokens"
        )
    return examples if keep == len(examples) else examples.select(range(keep))


def _tokenised(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RunSettings,
    options: dict,
    work: Path,
    first_row: int,
) -> tuple[list[Dataset], int]:
    """Return (tokenised slices of the chosen documents, number of dropped rows)."""
    order = np.arange(len(documents))
    if settings.shuffle_seed is not None:
        order = np.random.default_rng(settings.shuffle_seed).permutation(order)
    response = settings.train_loss == "response"
    form = row_form(documents.column_names, settings.text_column, response)
    columns = ROW_COLUMNS.get(form, (settings.text_column,))
    size = None if settings.pack else settings.block_size
    function = _tokenise(make_encoder(form, tokenizer), columns, size, response)
    parts, tokens, examples, dropped = [], 0, 0, 0
    limit = (settings.max_examples or np.inf) * (settings.block_size if settings.pack else 1)
    with progress.bar(total=settings.max_tokens, unit="tok", unit_scale=True, desc="tokenising", leave=False) as bar:
        for start in range(0, len(order), SLICE_DOCUMENTS):
            part, ids = _slice(documents, order[start : start + SLICE_DOCUMENTS], first_row)
            rows = list(zip(*(part[column][:] for column in columns), strict=True))
            good = _good_rows(form, rows, ids, settings)
            dropped += len(rows) - len(good)
            if not good:
                continue
            table = {column: [rows[i][c] for i in good] for c, column in enumerate(columns)}
            part = Dataset.from_dict(table | {"document_id": [ids[i] for i in good]})
            cache = str(work / f"part-{start // SLICE_DOCUMENTS:06d}.arrow")
            parts.append(part.map(function, remove_columns=part.column_names, cache_file_name=cache, **options))
            count = int(token_counts(parts[-1]).sum())
            tokens, examples = tokens + count, examples + len(parts[-1])
            bar.update(count)
            if (tokens if settings.pack else examples) >= limit or tokens >= (settings.max_tokens or np.inf):
                break
    return parts, dropped


def _slice(documents: Dataset, numbers: np.ndarray, first_row: int) -> tuple[Dataset, list[str]]:
    """Return some rows and their documents' ids."""
    part = documents.select(numbers)
    ids = part["id"][:] if "id" in documents.column_names else (numbers + first_row).tolist()
    if None in ids:
        raise ValueError(f"expected an id in every row, got none in row {numbers[ids.index(None)]}; add it")
    return part, [str(i) for i in ids]


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
        documents: Rows of text, of prompt and response, or of messages (see rows.row_form), and perhaps with `id`,
            which becomes the document id (else the row number).
        tokenizer: Adds the tokens that it adds itself, and no others.
        settings: Which documents, and how they become examples.
        num_proc: Processes that tokenise.
        work: Folder for intermediate files.
        first_row: Number of the first row: an extension continues the run's numbers.

    Returns:
        Examples with columns input_ids, document_id, text, counted (with --train_loss response: which tokens count),
        and block (its number in the document) or, packed, document_ids and document_starts; and counts,
        {"documents", "dropped_rows", "rows"}.

    Raises:
        ValueError: No such column, bad rows, or nothing left.
    """
    options = {"batched": True, "num_proc": num_proc, "load_from_cache_file": False}
    try:
        parts, dropped = _tokenised(documents, tokenizer, settings, options, work, first_row)
    except UnicodeDecodeError as error:  # Arrow's JSON reader lets it pass
        raise ValueError(f"expected UTF-8 in every row, got {error.object[:40]!r}; convert the file") from error
    if not parts:
        raise ValueError(f"expected rows with text, got {dropped} empty ones and no other; check --text_column")
    rows = datasets.concatenate_datasets(parts)
    if settings.pack:
        packed = {"documents": rows, "block_size": settings.block_size}
        rows = Dataset.from_generator(_pack, gen_kwargs=packed, cache_dir=str(work))
    rows = _cut(rows, settings).map(
        lambda batch: {"text": tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)},
        cache_file_name=str(work / "text.arrow"),
        **options,
    )
    names = chain.from_iterable(rows["document_ids"][:]) if settings.pack else rows["document_id"][:]
    return rows, {"documents": len(set(names)), "dropped_rows": dropped, "rows": len(documents)}


def write_examples(
    path: Path,
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RunSettings,
    num_proc: int | None,
    first_row: int = 0,
) -> dict[str, Any]:
    """Build the examples (see build_examples) into the folder `path`; return their counts, fingerprint and files."""
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
    except ValueError as error:  # of closing a file that could not be written
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        gc.collect()  # a network file system keeps files that are still mapped
        shutil.rmtree(work, ignore_errors=True)
    examples = datasets.load_from_disk(path)
    counts |= {"examples": len(examples), "tokens": int(token_counts(examples).sum())}
    return counts | {"fingerprint": examples_fingerprint(examples), "files": files.file_checksums(path)}


def _lists(examples: Dataset, column: str) -> Iterator:
    """Yield a column as Arrow list arrays, a thousand examples at a time."""
    for table in examples.with_format("arrow").select_columns([column]).iter(1000):
        yield table[column].combine_chunks()


def token_counts(examples: Dataset) -> np.ndarray:
    """Return the number of tokens of each example, [N] int64."""
    counts = [np.diff(np.asarray(lists.offsets)) for lists in _lists(examples, "input_ids")]
    return np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)


def examples_fingerprint(examples: Dataset) -> str:
    """Return a hash of all token ids, lengths, document ids and what counts in a response's loss, in order."""
    checksum = xxhash.xxh3_64()
    for column in ("input_ids", "counted"):
        for lists in _lists(examples, column) if column in examples.column_names else ():
            checksum.update(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64).data)
    checksum.update(token_counts(examples).data)
    checksum.update("\0".join(examples["document_id"][:]).encode())
    return checksum.hexdigest()
