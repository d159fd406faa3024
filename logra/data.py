"""Data sets, tokenising, blocks with stable ids, batches of like length.

An example is a block of at most block_size tokens of one document; with pack, documents are joined end to end into
full blocks. Example ids are row numbers. Notation: B batch, T tokens.
"""

import gc
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import xxhash
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from logra.loss import IGNORE
from logra.store import atomic

HUB_NAMES = {
    "openwebtext": ("Skylion007/openwebtext", None),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
SLICE = 10_000  # documents that are tokenised at a time
SHORT_TOPIC = 12_000  # characters; pydoc's `short` configuration leaves out the longer topics
datasets.disable_progress_bars()


def _load_pydoc(config: str | None) -> Dataset:
    from pydoc_data.topics import topics

    if config not in (None, "all", "short"):
        raise ValueError(f"expected --data_config all or short for pydoc, got {config!r}")
    kept = {key: text for key, text in sorted(topics.items()) if config != "short" or len(text) < SHORT_TOPIC}
    return Dataset.from_dict({"id": list(kept), "text": list(kept.values())})


def load_documents(name: str, config: str | None, split: str, cache_dir: str | None = None) -> Dataset:
    """Load documents: a local file or folder, else pydoc, openwebtext, wikitext or a Hub id.

    Raises:
        ValueError: It can't be found or read, or has no such configuration or split.
    """
    path, options = Path(name), {"split": split, "cache_dir": cache_dir}
    try:
        if path.is_file():
            if path.suffix not in LOADERS:
                raise ValueError(f"its suffix is not one of {', '.join(LOADERS)}")
            return datasets.load_dataset(LOADERS[path.suffix], data_files={"train": str(path)}, **options)
        if path.is_dir() and any((path / mark).exists() for mark in ("dataset_info.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(path)
            if isinstance(loaded, Dataset):
                loaded = datasets.DatasetDict(train=loaded)
            if split not in loaded:
                raise ValueError(f"it has the splits {', '.join(loaded)}, not {split}")
            return loaded[split]
        if path.is_dir():
            return datasets.load_dataset(str(path), config, **options)
        if name == "pydoc":
            if split != "train":
                raise ValueError(f"it has the split train, not {split}")
            return _load_pydoc(config)
        hub, hub_config = HUB_NAMES.get(name, (name, None))
        return datasets.load_dataset(hub, config or hub_config, **options)
    except Exception as error:  # every loader has exceptions of its own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"expected the split {split} of a data set in a local file or folder or on the Hub, got {name!r}, which "
            f"can't be loaded ({type(error).__name__}: {reason}); check the name, the file and the network"
        ) from error


def source_fingerprint(name: str) -> str | None:
    """Return a hash of the names and sizes of a local data set's files and their contents; None for a Hub name."""
    path, checksum = Path(name), xxhash.xxh3_64()
    if not path.exists():
        return None
    for file in sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()):
        checksum.update(f"{file.relative_to(path)}:{file.stat().st_size}\n".encode())
        with open(file, "rb") as content:
            while chunk := content.read(2**24):
                checksum.update(chunk)
    return checksum.hexdigest()


class Choice(NamedTuple):
    """Which documents, and how they become examples."""

    text_column: str = "text"
    block_size: int = 512
    pack: bool = False
    max_examples: int | None = None
    max_tokens: int | None = None
    shuffle_seed: int | None = None
    skip_bad_rows: bool = False
    blank_is_usual: bool = False  # wikitext and text files: blank lines are dropped and counted anyway


def choice(settings: dict, max_examples: int | None) -> Choice:
    """Return how documents become examples, from a run's settings."""
    names = ("text_column", "block_size", "pack", "max_tokens", "shuffle_seed", "skip_bad_rows")
    name = Path(settings["data_name"]).name
    usual = "wikitext" in name or name.endswith(".txt")
    return Choice(**{name: settings[name] for name in names}, max_examples=max_examples, blank_is_usual=usual)


def check_column(documents: Dataset, column: str) -> None:
    """Raise a ValueError where there is no such column."""
    if column not in documents.column_names:
        have = ", ".join(documents.column_names)
        raise ValueError(f"expected a text column {column!r}, got {have}; give --text_column")


def _good_rows(texts: list, ids: list[str], choice: Choice) -> list[int]:
    """Return the rows that hold text; refuse bad ones unless they are to be skipped."""
    bad = [i for i, text in enumerate(texts) if not (isinstance(text, str) and text.strip())]
    unusual = [i for i in bad if not (choice.blank_is_usual and isinstance(texts[i], str))]
    if unusual and not choice.skip_bad_rows:
        first = ", ".join(
            f"{ids[i]} ({'empty' if isinstance(texts[i], str) else type(texts[i]).__name__})" for i in unusual[:5]
        )
        raise ValueError(
            f"expected text in every row of column {choice.text_column!r}, got {len(unusual)} empty or other rows "
            f"among {len(texts)}, the first ones: {first}; mend them or give --skip_bad_rows"
        )
    return sorted(set(range(len(texts))) - set(bad))


def _tokenise(tokenizer: PreTrainedTokenizerBase, block_size: int | None) -> Callable[[dict], dict]:
    """Return a function for Dataset.map: documents to blocks (whole documents where block_size is None)."""

    def tokenise(batch: dict) -> dict:
        rows: dict = {"input_ids": [], "document_id": [], "block": []}
        encoded = tokenizer(batch["text"], return_attention_mask=False)["input_ids"]
        for ids, document in zip(encoded, batch["document_id"], strict=True):
            size = block_size or max(len(ids), 1)
            for block, start in enumerate(range(0, max(len(ids), 1), size)):
                rows["input_ids"].append(ids[start : start + size])
                rows["document_id"].append(document)
                rows["block"].append(block)
        return rows

    return tokenise


def _pack(documents: Dataset, block_size: int):
    """Yield full blocks of documents joined end to end, the last one as long as it gets, with what each holds."""
    ids, names, starts = [], [], []
    for row in documents:
        tokens, used = row["input_ids"], 0
        while used < len(tokens):
            names, starts = [*names, row["document_id"]], [*starts, len(ids)]
            piece = tokens[used : used + block_size - len(ids)]
            ids, used = ids + piece, used + len(piece)
            if len(ids) == block_size:
                yield {"input_ids": ids, "document_id": names[0], "document_ids": names, "document_starts": starts}
                ids, names, starts = [], [], []
    if ids:
        yield {"input_ids": ids, "document_id": names[0], "document_ids": names, "document_starts": starts}


def _cut(examples: Dataset, choice: Choice) -> Dataset:
    """Keep the first examples, up to max_examples and max_tokens."""
    total = np.cumsum(token_counts(examples))
    keep = int((total <= choice.max_tokens).sum()) if choice.max_tokens is not None else len(total)
    keep = min(keep, choice.max_examples if choice.max_examples is not None else keep)
    if keep == 0:
        raise ValueError(
            f"expected at least one example within the limits, got none of {len(total)}; raise --max_tokens"
        )
    return examples if keep == len(examples) else examples.select(range(keep))


def _tokenised(documents: Dataset, function: Callable, choice: Choice, options: dict, work: Path):
    """Return (tokenised slices of the chosen documents, number of dropped rows)."""
    order = np.arange(len(documents))
    if choice.shuffle_seed is not None:
        order = np.random.default_rng(choice.shuffle_seed).permutation(order)
    parts, tokens, examples, dropped = [], 0, 0, 0
    limit = (choice.max_examples or np.inf) * (choice.block_size if choice.pack else 1)
    with tqdm(total=choice.max_tokens, unit="tok", unit_scale=True, desc="tokenising", leave=False) as bar:
        for start in range(0, len(order), SLICE):
            part = documents.select(order[start : start + SLICE])
            ids = part["id"] if "id" in documents.column_names else order[start : start + SLICE]
            texts, ids = list(part[choice.text_column]), list(ids)
            if None in ids:
                raise ValueError(f"expected an id in every row, got none in row {start + ids.index(None)}; add it")
            ids = [str(i) for i in ids]
            good = _good_rows(texts, ids, choice)
            dropped += len(texts) - len(good)
            if not good:
                continue
            part = Dataset.from_dict({"document_id": [ids[i] for i in good], "text": [texts[i] for i in good]})
            cache = str(work / f"part-{start // SLICE:06d}.arrow")
            parts.append(part.map(function, remove_columns=["text"], cache_file_name=cache, **options))
            count = int(token_counts(parts[-1]).sum())
            tokens, examples = tokens + count, examples + len(parts[-1])
            bar.update(count)
            if (tokens if choice.pack else examples) >= limit or tokens >= (choice.max_tokens or np.inf):
                break
    return parts, dropped


def build_examples(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, choice: Choice, num_proc: int | None, work: Path
) -> tuple[Dataset, dict]:
    """Tokenise documents into examples.

    Args:
        documents: With choice.text_column and perhaps `id`, which becomes the document id (else the row number).
        tokenizer: Adds the tokens that it adds itself, and no others.
        choice: Which documents, and how they become examples.
        num_proc: Processes that tokenise.
        work: Folder for intermediate files.

    Returns:
        Examples with columns input_ids, document_id, text and block (its number in the document) or, packed,
        document_ids and document_starts; and {"documents", "dropped_rows"}, counts.

    Raises:
        ValueError: No such column, bad rows, or nothing left.
    """
    check_column(documents, choice.text_column)
    options = {"batched": True, "num_proc": num_proc, "load_from_cache_file": False}
    function = _tokenise(tokenizer, None if choice.pack else choice.block_size)
    parts, dropped = _tokenised(documents, function, choice, options, work)
    if not parts:
        raise ValueError(f"expected rows with text, got {dropped} empty ones and no other; check --text_column")
    rows = datasets.concatenate_datasets(parts)
    if choice.pack:
        packed = {"documents": rows, "block_size": choice.block_size}
        rows = Dataset.from_generator(_pack, gen_kwargs=packed, cache_dir=str(work))
    rows = _cut(rows, choice).map(
        lambda batch: {"text": tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)},
        cache_file_name=str(work / "text.arrow"),
        **options,
    )
    names = chain.from_iterable(rows["document_ids"]) if choice.pack else rows["document_id"]
    return rows, {"documents": len(set(names)), "dropped_rows": dropped}


def write_examples(
    folder: Path, documents: Dataset, tokenizer: PreTrainedTokenizerBase, choice: Choice, num_proc: int | None
) -> dict:
    """Build the examples (see build_examples) into folder/train, and return their counts and fingerprint."""
    work = folder / "work.tmp"
    work.mkdir()
    try:
        examples, counts = build_examples(documents, tokenizer, choice, num_proc, work)
        with atomic(folder / "train") as train:
            examples.save_to_disk(train)
        del examples
    except datasets.exceptions.DatasetGenerationError as error:
        raise OSError(f"packing failed: {error.__cause__}") from error
    finally:
        gc.collect()  # a network file system keeps files that are still mapped
        shutil.rmtree(work, ignore_errors=True)
    examples = datasets.load_from_disk(folder / "train")
    counts |= {"examples": len(examples), "tokens": int(token_counts(examples).sum())}
    return counts | {"fingerprint": examples_fingerprint(examples)}


def token_lists(examples: Dataset) -> Iterator:
    """Yield input_ids as Arrow list arrays, a thousand examples at a time."""
    for table in examples.with_format("arrow").select_columns(["input_ids"]).iter(1000):
        yield table["input_ids"].combine_chunks()


def token_counts(examples: Dataset) -> np.ndarray:
    """Return the number of tokens of each example, [N] int64."""
    counts = [np.diff(np.asarray(lists.offsets)) for lists in token_lists(examples)]
    return np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)


def examples_fingerprint(examples: Dataset) -> str:
    """Return a hash of all token ids, lengths and document ids, in order."""
    checksum = xxhash.xxh3_64()
    for lists in token_lists(examples):
        checksum.update(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64))
    checksum.update(token_counts(examples))
    checksum.update("\0".join(examples["document_id"]).encode())
    return checksum.hexdigest()


def length_batches(
    lengths: list[int] | np.ndarray, batch_tokens: int, batch_size: int | None = None
) -> list[list[int]]:
    """Group positions into batches of like length, longest first, of at most batch_tokens with padding (or one).

    A batch that is at least an eighth full ends where the next example is a fifth shorter than its longest: little
    padding is worth more than few batches.
    """
    batches: list[list[int]] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        longest = max(lengths[batches[-1][0]], 1) if batches else 0
        filled = len(batches[-1]) * longest if batches else 0
        full = filled + longest > batch_tokens or (batches and len(batches[-1]) == batch_size)
        if not batches or full or (lengths[i] < 0.8 * longest and filled >= batch_tokens / 8):
            batches.append([])
        batches[-1].append(i)
    return batches


class Batch(NamedTuple):
    """Right-padded token ids [B, T], targets [B, T] (see loss.example_losses) and gradient positions [B, T] bool."""

    input_ids: Tensor
    targets: Tensor
    positions: Tensor


def make_batch(
    token_ids: list[list[int]], starts: list[int] | None = None, device: torch.device | str = "cpu"
) -> Batch:
    """Pad token ids on the right. With starts, only tokens from that position on count in an example's loss."""
    width = max(1, *map(len, token_ids))
    shape = (len(token_ids), width)
    ids, targets, positions = (
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, IGNORE),
        torch.zeros(shape, dtype=torch.bool),
    )
    for row, tokens in enumerate(token_ids):
        first = max(starts[row] if starts else 1, 1)
        ids[row, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
        last = max(len(tokens) - 1, 0)
        targets[row, first - 1 : last] = ids[row, first : last + 1]
        positions[row, :last] = True
    return Batch(ids.to(device), targets.to(device), positions.to(device))
