"""Data sets: a local file or folder, Python's own manual, or a data set of the Hub."""

import json
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
MAX_SHORT_TOPIC = 12_000  # characters; pydoc's `short` configuration leaves out the longer topics
datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is said once, by the script


def _load_pydoc(config: str | None) -> Dataset:
    if config not in (None, "all", "short"):
        raise ValueError(f"expected --data_config all or short for pydoc, got {config!r}")
    kept = {key: text for key, text in sorted(topics.items()) if config != "short" or len(text) < MAX_SHORT_TOPIC}
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
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        error = (generating and error.__cause__) or error
        reason = str(error).strip().split("\n")[0] or "there is nothing in it"
        raise ValueError(
            f"expected the split {split} of a data set in a local file or folder or on the Hub, got {name!r}, which "
            f"can't be loaded ({type(error).__name__}: {reason}); check the name, the file and the network"
        ) from error


def source_fingerprint(name: str) -> str | None:
    """Return a hash of a local data set's files, names and contents; None for a Hub name."""
    sums = files.file_checksums(Path(name))
    return xxhash.xxh3_64_hexdigest(json.dumps(sums).encode()) if sums else None
