"""Load documents from a local file or folder, from Python's own manual, or from the Hub."""

import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import xxhash
from datasets import Dataset

from logra.runtime import files

HUB_NAMES = {
    "openwebtext": ("Skylion007/openwebtext", None),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
MAX_SHORT_TOPIC_CHARACTERS = 12_000  # pydoc's configuration `short` leaves out longer topics
datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the script prints each error once


def load_documents(name: str, config: str | None, split: str, cache_dir: str | None = None) -> Dataset:
    """Load documents from a local file or folder if one has this name, else pydoc, openwebtext, wikitext or a Hub id.

    Raises:
        ValueError: The data can't be found or read, or has no such configuration or split.
    """
    try:
        return _load(name, config, split, cache_dir)
    except Exception as error:  # each loader raises exceptions of its own
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error
        reason = str(error).strip().split("\n")[0] or "there is nothing in it"
        raise ValueError(
            f"expected the split {split} of a data set in a local file or folder or on the Hub, got {name!r}, which "
            f"can't be loaded ({type(error).__name__}: {reason}); check the name, the file and the network"
        ) from error


def _load(name: str, config: str | None, split: str, cache_dir: str | None) -> Dataset:
    path, options = Path(name), {"split": split, "cache_dir": cache_dir}
    if path.is_file():
        if path.suffix not in LOADERS:
            raise ValueError(f"its suffix is not one of {', '.join(LOADERS)}")
        return datasets.load_dataset(LOADERS[path.suffix], data_files={"train": str(path)}, **options)
    if path.is_dir():
        if not any((path / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path), config, **options)
        saved = datasets.load_from_disk(path)
        return _only_split(saved if isinstance(saved, dict) else {"train": saved}, split)
    if name == "pydoc":
        return _only_split({"train": _load_pydoc(config)}, split)
    hub_name, hub_config = HUB_NAMES.get(name, (name, None))
    return datasets.load_dataset(hub_name, config or hub_config, **options)


def _only_split(splits: dict[str, Dataset], split: str) -> Dataset:
    if split not in splits:
        raise ValueError(f"its splits are {', '.join(splits)}, not {split}")
    return splits[split]


def _load_pydoc(config: str | None) -> Dataset:
    if config not in (None, "all", "short"):
        raise ValueError(f"expected --data_config all or short for pydoc, got {config!r}")
    limit = MAX_SHORT_TOPIC_CHARACTERS if config == "short" else math.inf
    chosen = {topic: text for topic, text in sorted(topics.items()) if len(text) < limit}
    return Dataset.from_dict({"id": list(chosen), "text": list(chosen.values())})


def source_fingerprint(name: str) -> str | None:
    """Return a hash of the names and contents of a local data set's files; None for a Hub name."""
    checksums = files.file_checksums(Path(name))
    return xxhash.xxh3_64_hexdigest(json.dumps(checksums).encode()) if checksums else None
