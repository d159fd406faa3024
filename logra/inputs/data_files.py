"""Local data files: which files of a path hold a split.

A path that exists is literal, even with the characters of a pattern.
"""

import glob
import os
import re
import tempfile
import uuid
from pathlib import Path

import datasets
import xxhash
from datasets import Dataset

from logra.inputs.file_rows import KINDS, ROW_KINDS, kind, suffixes
from logra.runtime import progress

SAVED = ("dataset_info.json", "dataset_dict.json")  # of folders that datasets saved
METADATA = (*SAVED, "dataset_infos.json", "config.json", "state.json")
SPLITS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
SPLIT_NAMES = {split: re.compile(rf"({names})([-._ ]?\d+(-of-\d+.*)?)?") for split, names in SPLITS.items()}
SHARD_NAME = re.compile(r"data/([\w.]+)-\d{5}-of-\d{5}")  # the Hub's; its splits may have any name


def is_saved(folder: Path) -> bool:
    """Return whether datasets saved this folder (save_to_disk)."""
    return any((folder / name).is_file() for name in SAVED)


def load_saved(folder: Path, cache: Path) -> dict[str, Dataset]:
    """Return the splits of a folder that `datasets` saved. It is read through a link, as `::` in a path is no address.

    Args:
        folder: The folder.
        cache: A folder for links.
    """
    link = cache / "links" / xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode())
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(uuid.uuid4().hex)
    temporary.symlink_to(folder.resolve())
    temporary.replace(link)
    saved = datasets.load_from_disk(link)
    return saved if isinstance(saved, dict) else {"train": saved}


def exists(name: str) -> bool:
    """Return whether a name is a local file or folder, or a pattern (*, ?, [...], ** for subfolders) of some."""
    return Path(name).exists() or bool(_matches(name))


def _matches(name: str) -> list[Path]:
    """Return the files, of any kind, that a pattern matches, in the order of their names."""
    if not glob.has_magic(name):
        return []
    return sorted(path for found in glob.glob(name, recursive=True) if (path := Path(found)).is_file())


def base(name: str) -> Path:
    """Return the path to which the names of a data set's files are relative: itself; of a pattern, its fixed part."""
    path = Path(name)
    while not path.exists() and glob.has_magic(str(path)):
        path = path.parent
    return path


def find(path: Path, config: str | None, split: str) -> list[Path]:
    """Return the files of a local path that hold a split, in the order in which they are read.

    Args:
        path: A file, a pattern of files (all are `train`), or a folder: one that `datasets` saved (then all its files),
            one whose README.md names its configurations, one whose files or folders have the names of splits, or else
            all data files are `train`.
        config: A configuration in README.md.
        split: Its name.

    Raises:
        ValueError: There is no such split or no data file, or some names are of splits and others are not.
    """
    matches = [] if path.exists() else _matches(str(path))
    if not path.is_dir() and not path.is_file() and not matches:
        raise ValueError("it is neither a file nor a folder, and no pattern of files that are there")
    if path.is_dir() and not is_saved(path) and _has_configs(path):
        splits = _configured_splits(path, config)
    elif config:
        raise ValueError(f"it has no configurations; leave --data_config {config} out")
    elif path.is_dir() and is_saved(path):
        return _visible_files(path)
    else:
        splits = _find_splits(path) if path.is_dir() else {"train": matches or [path]}
    if split not in splits:
        raise ValueError(f"its splits are {', '.join(sorted(splits))}, not {split}")
    if other := [file.name for file in splits[split] if kind(file) not in KINDS]:
        raise ValueError(f"the suffix of {other[0]} is not one of {', '.join(KINDS)}, with .gz or .zst after it or not")
    return splits[split]


def _has_configs(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and re.search(r"^configs:", card.read_text("utf-8", "replace"), re.MULTILINE) is not None


def _configured_splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """Return the files of each split in a configuration of README.md. Its patterns are resolved among links to them."""
    with tempfile.TemporaryDirectory() as mirror:
        for file in _visible_files(folder):
            link = mirror / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        found = datasets.load_dataset_builder(mirror, config, cache_dir=mirror).config.data_files
        return {split: [folder / Path(file).relative_to(mirror) for file in names] for split, names in found.items()}


def _visible_files(folder: Path) -> list[Path]:
    """Return all files below a folder in the order of their names, without hidden ones. Links are followed."""
    return [file for file in _all_files(folder) if not _is_hidden(file.relative_to(folder))]


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _all_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=True):
        above = {path.resolve() for path in (Path(root), *Path(root).parents)}
        folders[:] = [name for name in folders if Path(root, name).resolve() not in above]  # a link may make a loop
        found += [path for name in names if (path := Path(root, name)).is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder. Text files beside files of rows are notes, and no data."""
    found = _visible_files(folder)
    rows = [file for file in found if kind(file) in ROW_KINDS and file.name not in METADATA]
    return rows or [file for file in found if kind(file) == ".txt"]


def say_left_out(folder: Path) -> None:
    """Print which files of a folder are no data files. Where README.md names the files, it says what is data."""
    if not folder.is_dir() or _has_configs(folder):
        return
    data = set(_data_files(folder))
    others = [file.relative_to(folder) for file in _all_files(folder) if file not in data]
    if names := [str(name) for name in others if not _is_hidden(name) or kind(name) in ROW_KINDS]:
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        progress.say(f"left out of {folder}, as no data files: {', '.join(names[:20])}{more}")


def _find_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by split."""
    data = _data_files(folder)
    if not data:
        raise ValueError(f"it has no file that ends with one of {', '.join(KINDS)}")
    splits: dict[str | None, list[Path]] = {}
    for file in data:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if None not in splits:
        return splits
    if named := splits.keys() - {None, "train"}:
        one, other = splits[min(named)][0].name, splits[None][0].name
        raise ValueError(f"{one} has the name of a split and {other} has not; name all, or none, after their split")
    return {"train": data}


def _split_of(name: Path) -> str | None:
    """Return the split that a file's relative path names, as the Hub reads it; None if it names none."""
    if shard := SHARD_NAME.match(name.as_posix()):
        return shard[1]
    parts = (*name.parts[:-1], name.name.removesuffix(suffixes(name)))
    return next((split for part in parts for split, names in SPLIT_NAMES.items() if names.fullmatch(part)), None)
