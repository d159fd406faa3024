"""The run directory: run.json as typed records, and access to the files that the stages share.

run.json holds a RunRecord as JSON: `settings` (RunSettings), `arguments` (the first command line), `versions`, `model`
(class, fingerprint), `model_files` (see RunRecord), `tokenizer` (fingerprint) and `layers` (name -> [d_out, d_in,
r_out, r_in]). Later stages add `data` (the examples in train/), `extensions` (those in train-00001/ and so on, from
extract_log.py --extend) and `projections` (checksums of projections.safetensors).
Notation: N train examples, r_in/r_out projected sizes, k = r_out * r_in of a layer.
"""

import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from torch import Tensor

from logra import projection, quantise, store
from logra.runtime import files
from logra.runtime.files import has_shape, is_count, is_positive
from logra.runtime.settings import DATA_FIELDS, HESSIANS, RUN_FIELDS, DataSettings, RunSettings, is_setting

FORMAT = 5  # of the run directory
SHARD_BYTES = 2**28  # of a shard's gradients at most, unless its factor sums are larger
MAX_SHARD_EXAMPLES = 2**14
MIN_SHARDS = 8  # per run, to share among processes
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "safetensors")


@dataclass(frozen=True)
class TrainPart:
    """The entry of run.json for the examples in train/, or for those of one extension.

    `source` is the content of each local data file, by name and in order (in runs of older versions one hash of all
    files), and None for a data set of the Hub. `files` are the checksums of the files in the folder.
    """

    settings: DataSettings
    source: dict[str, str] | str | None
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


def _is_layer(sizes: Any) -> bool:
    """Return whether the value is [d_out, d_in, r_out, r_in]."""
    return has_shape(sizes, [is_positive]) and len(sizes) == 4 and sizes[2] <= sizes[0] and sizes[3] <= sizes[1]


LATER_SETTINGS = {  # older runs lack them
    name: getattr(RunSettings, name) for name in ("streaming", "row_form", "keep_columns", "chat_date")
}
# The shapes of run.json and its parts (see files.has_shape). The file may come from anyone, so nothing is assumed.
PART_JSON = {field.name: is_count for field in fields(TrainPart)} | {
    "settings": {field.name: partial(is_setting, field) for field in fields(DataSettings)},
    "source": dict | str | None,
    "fingerprint": str,
    "files": dict,
    "examples": is_positive,
    "shard_examples": is_positive,
}
RUN_JSON = {
    "settings": {field.name: partial(is_setting, field) for field in fields(RunSettings)},
    "arguments": {"hessian": lambda kind: kind in (None, *HESSIANS)},
    "versions": dict,
    "model": {"class": str, "fingerprint": str},
    "tokenizer": str,
    "layers": lambda layers: isinstance(layers, dict) and layers and has_shape([*layers.values()], [_is_layer]),
}


def _versions() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json (see the module's docstring). `parts` are `data` and the `extensions`, in order.

    `versions` are those of the command that made the record. They stay when run.json is written again.
    `model_files` is the content of each file of a local model; None for a model of the Hub, and in older runs.
    """

    settings: RunSettings
    arguments: dict[str, Any]
    model: dict[str, str]
    tokenizer: str
    layers: dict[str, list[int]]
    versions: dict[str, str] = field(default_factory=_versions)
    parts: tuple[TrainPart, ...] = ()
    projections: dict[str, str] | None = None
    model_files: dict[str, str] | None = None

    @classmethod
    def from_json(cls, content: dict) -> Self:
        """Return the record of parsed JSON, which is not trusted.

        Raises:
            ValueError: Entries are missing or impossible.
        """
        extensions = content.get("extensions", [])
        for part in (content, content.get("data"), *(extensions if isinstance(extensions, list) else ())):
            if has_shape(part, {"settings": dict}):
                names = RUN_FIELDS if part is content else DATA_FIELDS
                added = {name: value for name, value in LATER_SETTINGS.items() if name in names}
                part["settings"] = added | part["settings"]
        valid = has_shape(content, RUN_JSON) and has_shape(content.get("model_files"), dict | None)
        parts = [content["data"], *content.get("extensions", [])] if valid and "data" in content else []
        if not valid or not has_shape(parts, [PART_JSON]):
            raise ValueError("missing or impossible entries")
        entries = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        entries["settings"] = RunSettings(**content["settings"])
        train_parts = (TrainPart(**part | {"settings": DataSettings(**part["settings"])}) for part in parts)
        return cls(**entries, parts=tuple(train_parts))

    def to_json(self) -> dict[str, Any]:
        """Return the content of run.json."""
        content = {"format": FORMAT} | vars(self) | {"settings": asdict(self.settings)}
        parts = [vars(part) | {"settings": asdict(part.settings)} for part in content.pop("parts")]
        if self.projections is None:
            del content["projections"]
        return content | ({"data": parts[0]} if parts else {}) | ({"extensions": parts[1:]} if parts[1:] else {})


class RunDir:
    """A run's folder and its record.

    Attributes:
        layers: Layer -> [d_out, d_in, r_out, r_in].
        shapes: Layer -> (d_out, d_in).
        projected: Layer -> (r_out, r_in).
        parts: The entries of run.json for train/ and for each extension, in order.
        examples: Number of train examples, N.
        fingerprints: The fingerprint of each part's examples.
        first_hessian: The kind of Hessian that the run was started with.
        rotated: Whether the projections hold eigenvectors of the calibration sample's covariances.
        squares_only: Whether the shards lack the factors A and B; see RunSettings.squares_only.
    """

    def __init__(self, folder: Path, record: RunRecord):
        self.folder, self.record = folder, record
        self.settings, self.layers, self.parts = record.settings, record.layers, record.parts
        self.shapes = {name: (sizes[0], sizes[1]) for name, sizes in self.layers.items()}
        self.projected = {name: (sizes[2], sizes[3]) for name, sizes in self.layers.items()}
        self.examples = sum(part.examples for part in self.parts)
        self.fingerprints = [part.fingerprint for part in self.parts]
        self.first_hessian = record.arguments["hessian"] or "raw"
        self.rotated = self.settings.basis == "eigen" or self.settings.lora == "pca"
        self.squares_only = self.settings.squares_only(self.first_hessian)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read run.json.

        Raises:
            ValueError: run.json is missing, was altered or has another format, or the folder holds links or devices.
        """
        path, remedy = folder / "run.json", f"restore it, or delete {folder} and run extract_log.py"
        files.check_folder(folder)
        content = files.read_json(path, remedy)
        if content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT} in {path}, got {content.get('format')}; {remedy}")
        try:
            run = cls(folder, RunRecord.from_json(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"expected complete entries in {path}, got {error}; {remedy}") from error
        size = sum(file.stat().st_size for n in range(len(run.parts)) for file in run.train_folder(n).glob("*"))
        if run.examples > size:  # a false count would allocate memory
            raise ValueError(f"expected {run.examples} examples in {folder}, got {size} bytes of them; {remedy}")
        return run

    def save(self, **changes: Any) -> None:
        """Write run.json with changes to the record. This object keeps its record; `load` reads the new one."""
        files.write_json(self.folder / "run.json", replace(self.record, **changes).to_json())

    @cached_property
    def shards(self) -> list[range]:
        """The example ids of each shard. No shard crosses from one part to the next."""
        shards: list[range] = []
        for part in self.parts:
            first = shards[-1].stop if shards else 0
            end, size = first + part.examples, part.shard_examples
            shards += [range(i, min(i + size, end)) for i in range(first, end, size)]
        return shards

    def shard_sizes(self, examples: int) -> dict[str, int]:
        """Return {"shard_examples", "bytes_per_example", "factor_bytes_per_shard"} of a part with so many examples.

        The gradients of a shard take at most SHARD_BYTES, or the bytes of its factor sums where these are more.
        """
        dtype = self.settings.store_dtype
        example_bytes = sum(quantise.stored_bytes(r_out * r_in, dtype) for r_out, r_in in self.projected.values())
        factor_bytes = store.layout_bytes(store.factor_layout(self.projected, self.squares_only))
        fitting = max(SHARD_BYTES, factor_bytes) // max(example_bytes, SHARD_BYTES // MAX_SHARD_EXAMPLES)
        count = self.settings.shard_examples or max(1, min(fitting, math.ceil(examples / MIN_SHARDS)))
        return {"shard_examples": count, "bytes_per_example": example_bytes, "factor_bytes_per_shard": factor_bytes}

    def train_folder(self, part: int) -> Path:
        """Return the folder of a part's examples."""
        return self.folder / (f"train-{part:05d}" if part else "train")

    def train(self) -> Dataset:
        """Load the train examples of all parts.

        Raises:
            ValueError: They are not those of run.json.
        """
        datasets = [files.retried(partial(self._load_part, number)) for number in range(len(self.parts))]
        return concatenate_datasets(datasets) if len(datasets) > 1 else datasets[0]

    def _load_part(self, number: int) -> Dataset:
        folder, part = self.train_folder(number), self.parts[number]
        try:
            unchanged = files.file_checksums(folder) == part.files
            examples = load_from_disk(folder)
            examples.data.table.validate(full=True)  # finds offsets beyond the end of a buffer
            columns = [examples.data[name] for name in ("document_id", "text")]
            if any(column.type != "string" or column.null_count for column in columns):
                raise ValueError("columns of other types")
        except Exception as error:  # Arrow raises exceptions of its own
            raise ValueError(f"expected examples in {folder}, got {error}; extract again with --overwrite") from error
        if not unchanged or len(examples) != part.examples:
            raise ValueError(f"expected {folder} as it was written, got other examples; extract again with --overwrite")
        return examples

    @property
    def projection_layout(self) -> store.Layout:
        """The layout of projections.safetensors."""
        return store.projection_layout(self.shapes, self.projected, self.rotated)

    def projections(self) -> dict[str, projection.Projection]:
        """Load the projections.

        Raises:
            ValueError: They are not those of run.json.
        """
        path, checksums = self.folder / "projections.safetensors", self.record.projections
        try:
            tensors = files.retried(lambda: store.load_tensors(path, checksums, self.projection_layout))
        except ValueError as error:
            raise ValueError(f"expected the run's projections, but {error}; extract again with --overwrite") from error
        return store.projections_of_tensors(tensors, self.shapes)

    def save_projections(self, projections: dict[str, projection.Projection]) -> None:
        """Write projections.safetensors, then its checksums into run.json."""
        path, tensors = self.folder / "projections.safetensors", store.projection_tensors(projections)
        self.save(projections=store.save_tensors(path, self.projection_layout, tensors))

    def matching_layers(self, pattern: str | None) -> list[str]:
        """Return the tracked layers whose name matches a regular expression; all of them without one.

        Raises:
            ValueError: No layer matches.
        """
        names = [name for name in self.layers if pattern is None or re.search(pattern, name)]
        if not names:
            raise ValueError(
                f"expected tracked layers that match {pattern!r}, got none of {', '.join(self.layers)[:200]}; "
                "change --score_layers"
            )
        return names

    def check_model(self, described: dict[str, Any]) -> None:
        """Compare a model's description (models.layers.describe) with run.json.

        Raises:
            ValueError: The model, the tokenizer or the layers differ.
        """
        for key, value in described.items():
            if getattr(self.record, key) != value:
                raise ValueError(
                    f"expected the {key} of {self.folder / 'run.json'}, got another one under the name "
                    f"{self.settings.model_name}; give another --log_dir"
                )

    def hessian_path(self, kind: str) -> Path:
        """Return the file of a kind of Hessian. Its checksums and number of examples are in the .json beside it."""
        return self.folder / "hessian" / f"{kind}.safetensors"

    def hessian_layout(self, kind: str) -> store.Layout:
        """Return the layout of a kind's Hessian file."""
        return store.hessian_layout(kind, self.projected, self.examples, self.settings.basis == "eigen")

    def save_hessian(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Write a Hessian file, one tensor at a time, then the .json beside it."""
        path = self.hessian_path(kind)
        with files.atomic(path) as temporary_path:
            checksums = store.write_tensors(temporary_path, self.hessian_layout(kind), tensors)
        files.write_json(path.with_suffix(".json"), {"examples": self.examples, "checksums": checksums})

    def _hessian_file(self, kind: str) -> store.TensorFile:
        path = self.hessian_path(kind)
        manifest = store.read_manifest(path.with_suffix(".json"))
        if manifest.get("examples") != self.examples:
            raise ValueError(f"{path} is of {manifest.get('examples')} examples, not of {self.examples}")
        return store.TensorFile(path, manifest.get("checksums"), self.hessian_layout(kind))

    def hessian_problem(self, kind: str) -> str | None:
        """Return what is wrong with a Hessian file (missing, altered, other examples), or None if it is intact."""
        return store.problem(lambda: self._hessian_file(kind))

    def statistics(self, kind: str) -> Callable[[str], dict[str, Tensor]]:
        """Return a function layer -> its statistics, as hessian.preconditioners takes them.

        Raises:
            ValueError: The Hessian file is missing, was altered, or is of other examples.
        """
        if kind == "none":
            return lambda layer: {}
        file, layout = files.retried(lambda: self._hessian_file(kind)), self.hessian_layout(kind)
        counts = {"examples": torch.tensor(self.examples), "tokens": file.read("tokens")}

        names = [name.rpartition(".") for name in layout]
        return lambda layer: counts | {key: file.read(f"{layer}.{key}") for owner, _, key in names if owner == layer}

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
            return files.retried(lambda: self.shard(index).open(kind))
        except ValueError as error:
            raise ValueError(
                f"expected {len(self.shards)} intact shards, but {error}; "
                f"run extract_log.py --log_dir {self.folder} again"
            ) from error

    def read(self, name: str, shards: Iterable[int], kind: str = "gradients") -> Iterator[Tensor]:
        """Yield one tensor of each shard: a layer's gradients [n, r_out * r_in], or a factor sum (kind "factors")."""
        for index in shards:
            with self.open_shard(index, kind) as file:
                yield file.read(name)
