"""Load documents from a local file or folder, from Python's own manual, or from the Hub."""

import errno
import glob
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import datasets
from datasets import Dataset

from logra.inputs import data_files, file_rows
from logra.inputs.file_rows import Stream
from logra.runtime import files, progress
from logra.runtime.settings import DataSettings

HUB_NAMES = {
    "openwebtext": ("Skylion007/openwebtext", None),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
OPENWEBTEXT_TOKENS = 9e9  # about; a run of less than a tenth streams
SHUFFLE_BUFFER = 10_000  # documents of a stream that are mixed
NOT_WRITTEN = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT)
MAX_SHORT_TOPIC_CHARACTERS = 12_000  # pydoc's configuration `short` leaves out longer topics
datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the script prints each error once


def load_documents(settings: DataSettings, cache_dir: str | None = None) -> Dataset | Stream:
    """Load documents from a local file, folder or pattern if one has this name, else pydoc, openwebtext, wikitext or a
    Hub id.

    Of local data files only the columns that documents can have are kept, see file_rows.read.

    Raises:
        ValueError: The data can't be found or read, or has no such configuration or split.
    """
    with _errors_of(settings.data_name, settings.data_split):
        documents = _load(settings, cache_dir)
        return documents if isinstance(documents, Stream) else _with_text_ids(documents)


def _cache_folder(cache_dir: str | None) -> Path:
    """Return a folder for copies of data files: --cache_dir, or that of `datasets`, or a temporary one."""
    folder = cache_dir or str(datasets.config.HF_DATASETS_CACHE)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if cache_dir:
            raise
        folder = _temporary_cache().name
        progress.say(
            f"data files are copied to {folder}, since this can't be written: {error}; --cache_dir chooses a folder"
        )
    return Path(folder, "logra")


@cache
def _temporary_cache() -> tempfile.TemporaryDirectory:
    """Make a folder that is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="data-")


@contextmanager
def _errors_of(name: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each loader raises exceptions of its own
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error
        reason = str(error).strip().split("\n")[0] or "there is nothing in it"
        remedy = "check the name, the file and the network"
        if isinstance(error, OSError) and error.errno in NOT_WRITTEN and not str(error.filename).startswith(name):
            remedy = "give a folder that can be written, and has room, as --cache_dir"
        raise ValueError(
            f"expected the split {split} of a data set in a local file or folder or on the Hub, got {name!r}, which "
            f"can't be loaded ({type(error).__name__}: {reason[:300]}); {remedy}"
        ) from error


def _load(settings: DataSettings, cache_dir: str | None) -> Dataset | Stream:
    name, config, split = settings.data_name, settings.data_config, settings.data_split
    path = Path(name)
    if settings.streaming and (name == "pydoc" or (path.is_dir() and data_files.is_saved(path))):
        raise ValueError("it is small or on the disk already; leave --streaming out")
    if data_files.exists(name) or glob.has_magic(name):
        found = data_files.find(path, config, split)
        cache = _cache_folder(cache_dir)
        if path.is_dir() and data_files.is_saved(path):
            return _only_split(data_files.load_saved(path, cache), split)
        data_files.say_left_out(path)
        if settings.streaming:
            rows = datasets.IterableDataset.from_generator(file_rows.read_all, gen_kwargs={"paths": found})
            return _stream(rows, settings)
        return file_rows.read(found, settings.text_column, settings.row_form, settings.keep_columns or (), cache)
    if name == "pydoc":
        return _only_split({"train": _load_pydoc(config)}, split)
    hub_name, hub_config = HUB_NAMES.get(name, (name, None))
    streaming = settings.streaming or (name == "openwebtext" and settings.max_tokens < OPENWEBTEXT_TOKENS / 10)
    options = {"split": split, "cache_dir": cache_dir, "streaming": streaming}
    documents = datasets.load_dataset(hub_name, config or hub_config, **options)
    return _stream(documents, settings) if streaming else documents


def _stream(documents: datasets.IterableDataset, settings: DataSettings) -> Stream:
    """Return a data set of which a run reads the first documents; with a seed, mixed by a buffer."""
    progress.say("reading only the documents that are needed (--streaming)")
    if settings.shuffle_seed is not None:
        documents = documents.shuffle(settings.shuffle_seed, buffer_size=SHUFFLE_BUFFER)
    return Stream(documents)


def _with_text_ids(documents: Dataset) -> Dataset:
    """Return the documents if their ids are known exactly: text, or whole numbers. A CSV's numbers may be rounded."""
    feature = documents.features.get("id", datasets.Value("string"))
    kind = getattr(feature, "dtype", str(feature))
    exact = "(large_)?string" if documents.info.builder_name == "csv" else r"(large_)?string|u?int\d+"
    if not re.fullmatch(exact, kind):
        raise ValueError(f"its ids have the type {kind} and not text or whole numbers; convert them")
    return documents


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


def source_contents(settings: DataSettings) -> dict[str, str] | None:
    """Return the content of each file of a local data set's split, by name and in order.

    None for a Hub name, and for a stream: files of which only the beginning is read are not compared.

    Raises:
        ValueError: As load_documents.
    """
    name, split = settings.data_name, settings.data_split
    if settings.streaming or not data_files.exists(name):
        return None
    with _errors_of(name, split):
        found = data_files.find(Path(name), settings.data_config, split)
        return {str(file.relative_to(data_files.base(name))): files.file_content(file) for file in found}
