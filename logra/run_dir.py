"""The run directory: run.json, and what the stages read through it.

run.json holds a RunRecord: `settings` (RunSettings), `arguments` (the first command line), `versions`, `model` (class,
fingerprint), `tokenizer` (fingerprint), `layers` (name -> [d_out, d_in, r_out, r_in]); then `data`, what train/ holds,
`extensions`, what train-00001/ and so on hold (extract_log.py --extend), and `projections` (checksums) once these are
written. Notation: N train examples, k = r_out * r_in of a layer.
"""

import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from torch import Tensor

from logra import hessian, projection, quantise, store
from logra.runtime import files
from logra.runtime.files import has_shape, is_count, is_positive
from logra.runtime.settings import DataSettings, RunSettings, is_setting

FORMAT = 5
SHARD_BYTES = 2**28
MAX_SHARD_EXAMPLES = 2**14
MIN_SHARDS = 8  # of a run, so that several processes have work
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "safetensors")


@dataclass(frozen=True)
class TrainPart:
    """What run.json says of the examples in train/, or of those of an extension.

    `source` is the fingerprint of a local data set's files, None of a Hub's; `files` are the checksums of the folder's.
    """

    settings: DataSettings
    source: str | None
    fingerprint: str
    files: dict[str, str]
    examples: int
    documents: int
    rows: int
    tokens: int
    dropped_rows: int
    shard_examples: int
    bytes_per_example: int
    factor_bytes_per_shard: int

    @classmethod
    def from_json(cls, content: dict) -> Self:
        """Return what an entry of run.json says, which PART_JSON fits."""
        return cls(**content | {"settings": DataSettings(**content["settings"])})


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json; see the head of this file. `parts` are `data` and the `extensions`."""

    settings: RunSettings
    arguments: dict[str, Any]
    model: dict[str, str]
    tokenizer: str
    layers: dict[str, list[int]]
    versions: dict[str, str] | None = None
    parts: tuple[TrainPart, ...] = ()
    projections: dict[str, str] | None = None

    @classmethod
    def from_json(cls, content: dict) -> Self:
        """Return the record that parsed JSON holds, which may come from anyone.

        Raises:
            ValueError: Entries are missing or impossible.
        """
        parts = (
            [content["data"], *content.get("extensions", [])] if isinstance(content, dict) and "data" in content else []
        )
        if not has_shape(content, RUN_JSON) or not has_shape(parts, [PART_JSON]):
            raise ValueError("missing or impossible entries")
        names = [part.name for part in fields(cls) if part.name in content]
        record = {name: content[name] for name in names} | {"settings": RunSettings(**content["settings"])}
        return cls(**record, parts=tuple(map(TrainPart.from_json, parts)))

    def to_json(self) -> dict[str, Any]:
        """Return the content of run.json."""
        content = {"format": FORMAT} | asdict(self)
        parts = content.pop("parts")
        content |= ({"data": parts[0]} if parts else {}) | ({"extensions": parts[1:]} if parts[1:] else {})
        return {name: value for name, value in content.items() if name != "projections" or value is not None}


class RunDir:
    """One run's folder and its record."""

    def __init__(self, folder: Path, record: RunRecord):
        self.folder, self.record = folder, record
        self.settings, self.layers = record.settings, record.layers
        self.shapes = {name: (sizes[0], sizes[1]) for name, sizes in self.layers.items()}
        self.projected = {name: (sizes[2], sizes[3]) for name, sizes in self.layers.items()}

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read run.json.

        Raises:
            ValueError: There is none, or it is of another format.
        """
        path, remedy = folder / "run.json", f"restore it, or delete {folder} and run extract_log.py"
        files.check_folder(folder)
        content = files.read_json(path, remedy)
        if content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT} in {path}, got {content.get('format')}; {remedy}")
        try:
            run = cls(folder, RunRecord.from_json(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"expected a whole {path}, got {error}; {remedy}") from error
        held = sum(file.stat().st_size for n in range(len(run.parts)) for file in run.train_folder(n).glob("*"))
        if run.examples > held:  # before memory is taken for so many
            raise ValueError(f"expected {run.examples} examples in {folder}, got {held} bytes of them; {remedy}")
        return run

    def save(self, **changes: Any) -> None:
        """Write run.json, with changes of the record."""
        packages = {name: version(name) for name in PACKAGES}
        first = self.record.versions or {"python": platform.python_version()} | packages
        self.record = replace(self.record, **{"versions": first} | changes)
        self.__dict__.pop("shards", None)
        files.write_json(self.folder / "run.json", self.record.to_json())

    @property
    def first_hessian(self) -> str:
        """The Hessian that the run was started with."""
        return self.record.arguments["hessian"] or "raw"

    @property
    def rotated(self) -> bool:
        """Say whether the projections hold eigenvectors of a sample's covariances."""
        return self.settings.basis == "eigen" or self.settings.lora == "pca"

    @property
    def squares_only(self) -> bool:
        """Say whether the shards hold no factors A and B; see RunSettings.squares_only."""
        return self.settings.squares_only(self.first_hessian)

    @property
    def parts(self) -> tuple[TrainPart, ...]:
        """What run.json says of train/ and of each extension, in order."""
        return self.record.parts

    @property
    def examples(self) -> int:
        """Number of train examples, N."""
        return sum(part.examples for part in self.parts)

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprint of each part's examples."""
        return [part.fingerprint for part in self.parts]

    @cached_property
    def shards(self) -> list[range]:
        """Example ids of each shard. A shard is of one part."""
        shards: list[range] = []
        for part in self.parts:
            first = shards[-1].stop if shards else 0
            end, size = first + part.examples, part.shard_examples
            shards += [range(i, min(i + size, end)) for i in range(first, end, size)]
        return shards

    def shard_sizes(self, examples: int) -> dict[str, int]:
        """Return {"shard_examples", "bytes_per_example", "factor_bytes_per_shard"} for a number of examples.

        A shard has at most SHARD_BYTES, or as many as its factors where these are larger.
        """
        size = sum(quantise.stored_bytes(o * i, self.settings.store_dtype) for o, i in self.projected.values())
        factors = store.layout_bytes(store.factor_layout(self.projected, self.squares_only))
        fitting = max(SHARD_BYTES, factors) // max(size, SHARD_BYTES // MAX_SHARD_EXAMPLES)
        chosen = self.settings.shard_examples or max(1, min(fitting, math.ceil(examples / MIN_SHARDS)))
        return {"shard_examples": chosen, "bytes_per_example": size, "factor_bytes_per_shard": factors}

    def train_folder(self, part: int) -> Path:
        """Return the folder of a part's examples."""
        return self.folder / (f"train-{part:05d}" if part else "train")

    def train(self) -> Dataset:
        """Load the train examples, and check that they are those of run.json."""
        loaded = []
        for number, part in enumerate(self.parts):
            folder = self.train_folder(number)
            try:
                whole = files.file_checksums(folder) == part.files
                loaded.append(load_from_disk(folder))
                loaded[-1].data.table.validate(full=True)  # offsets that lead out of a buffer
                columns = [loaded[-1].data[name] for name in ("document_id", "text")]
                if any(column.type != "string" or column.null_count for column in columns):
                    raise ValueError("other columns")
            except Exception as error:  # Arrow has exceptions of its own
                raise ValueError(
                    f"expected examples in {folder}, got {error}; extract again with --overwrite"
                ) from error
            if not whole or len(loaded[-1]) != part.examples:
                raise ValueError(f"expected {folder} as it was written, got other examples; use --overwrite")
        return concatenate_datasets(loaded) if len(loaded) > 1 else loaded[0]

    @property
    def projection_layout(self) -> store.Layout:
        """The tensors of projections.safetensors."""
        return store.projection_layout(self.shapes, self.projected, self.rotated)

    def projections(self) -> dict[str, projection.Projection]:
        """Load the projections, and check that they are those of run.json."""
        path, checksums = self.folder / "projections.safetensors", self.record.projections
        try:
            tensors = store.load_tensors(path, checksums, self.projection_layout)
        except ValueError as error:
            raise ValueError(f"expected the run's projections, but {error}; extract again with --overwrite") from error
        return store.projections_of_tensors(tensors, self.shapes)

    def save_projections(self, projections: dict[str, projection.Projection]) -> None:
        """Write projections.safetensors, then its checksums to run.json."""
        path, tensors = self.folder / "projections.safetensors", store.projection_tensors(projections)
        self.save(projections=store.save_tensors(path, self.projection_layout, tensors))

    def matching_layers(self, pattern: str | None) -> list[str]:
        """Return the tracked layers whose name `pattern` matches (all without one).

        Raises:
            ValueError: None does.
        """
        names = [name for name in self.layers if pattern is None or re.search(pattern, name)]
        if not names:
            raise ValueError(
                f"expected tracked layers that match {pattern!r}, got none of {', '.join(self.layers)[:200]}"
            )
        return names

    def check_model(self, described: dict[str, Any]) -> None:
        """Raise a ValueError where model, tokenizer or layers (inputs.model.describe) are not those of run.json."""
        for key, value in described.items():
            if getattr(self.record, key) != value:
                raise ValueError(
                    f"expected the {key} of {self.folder / 'run.json'}, got another one under the name "
                    f"{self.settings.model_name}; give another --log_dir"
                )

    def hessian_path(self, kind: str) -> Path:
        """Return the file of a kind of Hessian; checksums and number of examples are beside it, in .json."""
        return self.folder / "hessian" / f"{kind}.safetensors"

    def hessian_layout(self, kind: str) -> store.Layout:
        """Return the tensors of a Hessian file."""
        return store.hessian_layout(kind, self.projected, self.examples, self.settings.basis == "eigen")

    def save_hessian(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Write a Hessian file, a tensor at a time, then the .json beside it."""
        path = self.hessian_path(kind)
        with files.atomic(path) as temporary:
            checksums = store.write_tensors(temporary, self.hessian_layout(kind), tensors)
        files.write_json(path.with_suffix(".json"), {"examples": self.examples, "checksums": checksums})

    def _hessian_file(self, kind: str) -> store.TensorFile:
        path = self.hessian_path(kind)
        if not path.exists() or not path.with_suffix(".json").exists():
            raise ValueError(f"{path} is missing")
        try:
            entry = files.read_json(path.with_suffix(".json"), "")
        except ValueError:
            raise ValueError(f"{path.with_suffix('.json')} was altered") from None
        if entry.get("examples") != self.examples:
            raise ValueError(f"{path} is of {entry.get('examples')} examples, not of {self.examples}")
        return store.TensorFile(path, entry.get("checksums"), self.hessian_layout(kind))

    def hessian_problem(self, kind: str) -> str | None:
        """Say what is wrong with a Hessian file: missing, altered or of other examples; None where it is whole."""
        try:
            self._hessian_file(kind).check()
        except ValueError as error:
            return str(error)
        return None

    def statistics(self, kind: str) -> Callable[[str], dict[str, Tensor]]:
        """Return a function layer -> its tensors of a Hessian file, for hessian.preconditioner."""
        if kind == "none":
            return lambda layer: {}
        file, layout = self._hessian_file(kind), self.hessian_layout(kind)
        counts = {"examples": torch.tensor(self.examples), "tokens": file.read("tokens")}
        keys = ("cov", "gram", "A", "B", "square", "basis_in", "basis_out")
        return lambda layer: counts | {k: file.read(f"{layer}.{k}") for k in keys if f"{layer}.{k}" in layout}

    def shard(self, index: int) -> store.Shard:
        """Return one of the run's shards."""
        ids = self.shards[index]
        grads = store.gradient_layout(self.projected, len(ids), self.settings.store_dtype)
        factors = store.factor_layout(self.projected, self.squares_only)
        return store.Shard(self.folder / "gradients", index, ids, {"gradients": grads, "factors": factors})

    def open_shard(self, index: int, kind: str = "gradients") -> store.TensorFile:
        """Open a shard's gradients or factors.

        Raises:
            ValueError: The shard is missing or was altered.
        """
        try:
            return self.shard(index).open(kind)
        except ValueError as error:
            raise ValueError(
                f"expected {len(self.shards)} whole shards, but {error}; "
                f"run extract_log.py --log_dir {self.folder} again"
            ) from error

    def read(self, name: str, shards: Iterable[int], kind: str = "gradients") -> Iterator[Tensor]:
        """Yield a tensor, shard by shard: a layer's gradients [n, r_out * r_in], or one of the factor sums."""
        for index in shards:
            with self.open_shard(index, kind) as file:
                yield file.read(name)


def is_layer(sizes: Any) -> bool:
    """Say whether a value is [d_out, d_in, r_out, r_in]."""
    return has_shape(sizes, [is_positive]) and len(sizes) == 4 and sizes[2] <= sizes[0] and sizes[3] <= sizes[1]


# What run.json has to hold (see files.has_shape): it may come from someone else, and be wrong on purpose.
PART_JSON = {
    "settings": {part.name: partial(is_setting, part) for part in fields(DataSettings)},
    "source": str | None,
    "fingerprint": str,
    "files": dict,
    "examples": is_positive,
    "shard_examples": is_positive,
} | dict.fromkeys(("documents", "rows", "tokens"), is_count)
RUN_JSON = {
    "settings": {part.name: partial(is_setting, part) for part in fields(RunSettings)},
    "arguments": {"hessian": lambda kind: kind in (None, *hessian.KINDS)},
    "versions": dict,
    "model": {"class": str, "fingerprint": str},
    "tokenizer": str,
    "layers": lambda layers: isinstance(layers, dict) and layers and has_shape([*layers.values()], [is_layer]),
}
