"""The run directory: run.json, and what the stages read through it.

run.json holds `settings` (run.RUN_FLAGS), `arguments` (as given), `versions`, `model` (class, fingerprint), `tokenizer`
(fingerprint), `layers` (name -> [d_out, d_in, r_out, r_in]), then `data` (settings, counts, fingerprint and files of
train/), `extensions` (the same of train-00001/ and so on, which extract_log.py --extend added) and `projections`
(checksums) once these are there.
"""

import argparse
import math
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from torch import Tensor

from logra import data, disk, hessian, projection, quantise, store
from logra.checks import is_run
from logra.projection import Shapes
from logra.run import DATA_FLAGS, RUN_FLAGS, processes_here

FORMAT = 5
SHARD_BYTES = 2**28
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "safetensors")


class Log:
    """One run's folder and the content of its run.json."""

    def __init__(self, folder: Path, content: dict):
        self.folder, self.content = folder, content
        self.settings: dict = content["settings"]
        self.layers: dict[str, list[int]] = content["layers"]
        self.shapes = {name: (sizes[0], sizes[1]) for name, sizes in self.layers.items()}
        self.projected = {name: (sizes[2], sizes[3]) for name, sizes in self.layers.items()}

    @classmethod
    def load(cls, folder: Path) -> "Log":
        """Read run.json.

        Raises:
            ValueError: There is none, or it is of another format.
        """
        path, remedy = folder / "run.json", f"restore it, or delete {folder} and run extract_log.py"
        disk.check_folder(folder)
        content = disk.read_json(path, remedy)
        if content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT} in {path}, got {content.get('format')}; {remedy}")
        if not is_run(content):
            raise ValueError(f"expected a whole {path}, got missing entries or impossible ones; {remedy}")
        log = cls(folder, content)
        held = sum(file.stat().st_size for n in range(len(log.parts)) for file in log.train_folder(n).glob("*"))
        if log.examples > held:  # before anything is made for so many
            raise ValueError(f"expected {log.examples} examples in {folder}, got {held} bytes of them; {remedy}")
        return log

    def save(self, **entries: object) -> None:
        """Add entries to run.json."""
        packages = {name: version(name) for name in PACKAGES}
        fixed = {"format": FORMAT, "versions": {"python": platform.python_version()} | packages}
        self.content = fixed | self.content | entries
        self.__dict__.pop("shards", None)
        disk.write_json(self.folder / "run.json", self.content)

    def say_what_is_kept(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        """Name the settings that the run was begun with and that this command line leaves out."""
        of_run = {*RUN_FLAGS, "rank"} - set(DATA_FLAGS if args.extend else ())
        first = {name: value for name, value in self.content["arguments"].items() if name in of_run}
        kept = [f"--{n} {v}" for n, v in first.items() if v is not None and getattr(args, n) is None]
        if kept:
            say(f"As in {self.folder / 'run.json'}: {', '.join(kept)}")

    @property
    def bits(self) -> int | None:
        """Bits of a stored coordinate where it is a whole number, 0 where none is stored; None of floats."""
        return quantise.BITS.get(self.settings["store_dtype"])

    @property
    def rotated(self) -> bool:
        """Say whether the projections hold eigenvectors of a sample's covariances."""
        return self.settings["basis"] == "eigen" or self.settings["lora"] == "pca"

    @property
    def squares_only(self) -> bool:
        """Say whether the shards lack kfac's factors: at full size they would be most of the work."""
        return hessian.squares_only(self.settings, self.content["arguments"]["hessian"])

    @property
    def parts(self) -> list[dict]:
        """What run.json says of train/ and of each extension, in order."""
        return [self.content["data"], *self.content.get("extensions", [])] if "data" in self.content else []

    @property
    def examples(self) -> int:
        """Number of train examples, N."""
        return sum(part["examples"] for part in self.parts)

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprint of each part's examples."""
        return [part["fingerprint"] for part in self.parts]

    @cached_property
    def shards(self) -> list[range]:
        """Example ids of each shard. A shard is of one part."""
        shards: list[range] = []
        for part in self.parts:
            first, size = shards[-1].stop if shards else 0, part["shard_examples"]
            end = first + part["examples"]
            shards += [range(i, min(i + size, end)) for i in range(first, end, size)]
        return shards

    def train_folder(self, part: int) -> Path:
        """Return the folder of a part's examples."""
        return self.folder / (f"train-{part:05d}" if part else "train")

    def train(self) -> Dataset:
        """Load the train examples, and check that they are those of run.json."""
        loaded = []
        for number, part in enumerate(self.parts):
            folder = self.train_folder(number)
            try:
                whole = disk.file_sums(folder) == part["files"]
                loaded.append(load_from_disk(folder))
                loaded[-1].data.table.validate(full=True)  # offsets that lead out of a buffer
                columns = [loaded[-1].data[name] for name in ("document_id", "text")]
                if any(column.type != "string" or column.null_count for column in columns):
                    raise ValueError("other columns")
            except Exception as error:  # Arrow has exceptions of its own
                raise ValueError(
                    f"expected examples in {folder}, got {error}; extract again with --overwrite"
                ) from error
            if not whole or len(loaded[-1]) != part["examples"]:
                raise ValueError(f"expected {folder} as it was written, got other examples; use --overwrite")
        return concatenate_datasets(loaded) if len(loaded) > 1 else loaded[0]

    @property
    def projections_layout(self) -> store.Layout:
        """The tensors of projections.safetensors."""
        return projection.layout(self.shapes, self.projected, self.rotated)

    def projections(self) -> dict[str, projection.Projection]:
        """Load the projections, and check that they are those of run.json."""
        path, checksums = self.folder / "projections.safetensors", self.content.get("projections")
        try:
            return projection.from_tensors(store.load_tensors(path, checksums, self.projections_layout), self.shapes)
        except ValueError as error:
            raise ValueError(f"expected the run's projections, but {error}; extract again with --overwrite") from error

    def shard_size(self, examples: int) -> dict[str, int]:
        """Return {"shard_examples", "bytes_per_example", "factor_bytes_per_shard"}.

        Shards of at most SHARD_BYTES, or of their factors' size where that is more, and of 16,384 examples; and 8 of
        them or more.
        """
        size = sum(quantise.stored_bytes(o * i, self.settings["store_dtype"]) for o, i in self.projected.values())
        factors = store.layout_bytes(hessian.factor_layout(self.projected, self.squares_only))
        chosen = max(1, min(max(SHARD_BYTES, factors) // max(size, 2**14), math.ceil(examples / 8)))
        chosen = self.settings["shard_examples"] or chosen
        return {"shard_examples": chosen, "bytes_per_example": size, "factor_bytes_per_shard": factors}

    def check_disk(self) -> None:
        """Refuse a run whose gradients don't fit on the disk."""
        sizes = self.shard_size(self.examples)
        need = self.examples * sizes["bytes_per_example"] + len(self.shards) * sizes["factor_bytes_per_shard"]
        need -= sum(file.stat().st_size for file in (self.folder / "gradients").glob("*") if file.suffix != ".tmp")
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise ValueError(
                f"expected {need / 1e9:.3g} GB of free disk for the gradients, got {free / 1e9:.3g}; use a lower "
                "--rank, --store_dtype int1 (or none) or another --log_dir"
            )

    def check_memory(self, kind: str, calibrated: Shapes | None = None) -> int:
        """Refuse a Hessian, or a calibration with factors of these sizes, that this machine has no memory for.

        Returns:
            An upper bound of the bytes that one process needs for it.
        """
        if calibrated is None:
            need, what = hessian.memory_bytes(kind, self.projected, self.examples), f"the Hessian {kind} of a layer"
        else:
            need, what = sum(12 * (o * o + i * i) for o, i in calibrated.values()), "all layers' covariances"
        every, free = need * processes_here(), psutil.virtual_memory().available
        if every > free:
            raise ValueError(
                f"expected {every / 1e9:.3g} GB of memory for {what}, got {free / 1e9:.3g}; use --hessian ekfac, "
                "--lora random, a lower --rank or fewer --layers"
            )
        return need

    def check_new_documents(self, folder: Path) -> None:
        """Raise a ValueError where an extension's examples are of a document that the run has already."""
        if double := set(self.train()["document_id"][:]) & set(load_from_disk(folder)["document_id"][:]):
            raise ValueError(
                f"expected further documents, got {len(double)} that {self.folder} has already, e.g. "
                f"{min(double)}; leave them out, or give them other ids"
            )

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

    def check_model(self, described: dict) -> None:
        """Raise a ValueError where model, tokenizer or layers are not those of run.json."""
        for key, value in described.items():
            if self.content[key] != value:
                raise ValueError(
                    f"expected the {key} of {self.folder / 'run.json'}, got another one under the name "
                    f"{self.settings['model_name']}; give another --log_dir"
                )

    def check_source(self) -> None:
        """Raise a ValueError where the local data files have changed."""
        for part in self.parts:
            name, known = part["settings"]["data_name"], part["source"]
            if known and data.source_fingerprint(name) not in (known, None):  # None: moved away, and not needed
                raise ValueError(
                    f"expected {name} as it was when {self.folder} was begun, got other files; use another --log_dir"
                )

    def is_part(self, settings: dict) -> bool:
        """Say whether the documents that these settings name are in the run already (--extend).

        Raises:
            ValueError: Others of the same name are.
        """
        for part in self.parts:
            before = part["settings"]
            if disk.same_name(before["data_name"], settings["data_name"]) and all(
                before[key] == settings[key] for key in ("data_config", "data_split")
            ):
                same = all(before[key] == settings[key] for key in DATA_FLAGS if key != "data_name")
                if same and part["source"] in (None, data.source_fingerprint(settings["data_name"])):
                    return True
                raise ValueError(
                    f"expected further documents for {self.folder}, got {settings['data_name']}, which it was "
                    "extracted from with other content or limits; put the further ones into a file of their own"
                )
        return False

    def hessian_path(self, kind: str) -> Path:
        """Return the file of a kind of Hessian; its size and checksum are beside it, in .json."""
        return self.folder / "hessian" / f"{kind}.safetensors"

    def hessian_entry(self, kind: str) -> dict:
        """Read what was written beside a Hessian file: its tensors' checksums and its number of examples."""
        path = self.hessian_path(kind).with_suffix(".json")
        return disk.read_json(path, "delete it and run extract_log.py again")

    def hessian_layout(self, kind: str) -> store.Layout:
        """Return the tensors of a Hessian file."""
        return hessian.layout(kind, self.projected, self.examples, self.settings["basis"] == "eigen")

    def hessian_problem(self, kind: str) -> str | None:
        """Say what is wrong with a Hessian file: missing, altered or of other examples; None where it is whole."""
        path = self.hessian_path(kind)
        if not path.exists() or not path.with_suffix(".json").exists():
            return f"{path} is missing"
        entry = self.hessian_entry(kind)
        if entry.get("examples") != self.examples:
            return f"{path} is of {entry.get('examples')} examples, not of {self.examples}"
        try:
            store.TensorFile(path, entry.get("checksums"), self.hessian_layout(kind)).check()
        except ValueError as error:
            return str(error)
        return None

    def usable_hessian(self, asked: str | None) -> str:
        """Return the kind of Hessian to score with: the one asked for, or the run's.

        Raises:
            ValueError: The run is not finished, or has no whole Hessian of that kind.
        """
        kind = asked or self.content["arguments"]["hessian"] or "raw"
        hessian.check_kind(kind, self.settings, self.content["arguments"]["hessian"])
        if "projections" not in self.content:
            raise ValueError(
                f"expected a finished run in {self.folder}, got one without projections; run extract_log.py again"
            )
        if kind != "none" and (problem := self.hessian_problem(kind)):
            raise ValueError(
                f"expected the Hessian {kind}, but {problem}; "
                f"run extract_log.py --log_dir {self.folder} --hessian {kind}"
            )
        return kind

    def statistics(self, kind: str) -> Callable[[str], dict[str, Tensor]]:
        """Return a function layer -> its tensors of a Hessian file, for hessian.preconditioner."""
        if kind == "none":
            return lambda layer: {}
        checksums, layout = self.hessian_entry(kind).get("checksums"), self.hessian_layout(kind)
        file = store.TensorFile(self.hessian_path(kind), checksums, layout)
        counts = {"examples": torch.tensor(self.examples), "tokens": file.read("tokens")}
        keys = ("cov", "gram", "A", "B", "square", "basis_in", "basis_out")
        return lambda layer: counts | {k: file.read(f"{layer}.{k}") for k in keys if f"{layer}.{k}" in layout}

    def read(self, name: str, shards: Iterable[int], kind: str = "gradients") -> Iterator[Tensor]:
        """Yield a tensor, shard by shard: a layer's gradients [n, r_out * r_in], or one of the factor sums."""
        for index in shards:
            with self.open_shard(index, kind) as file:
                yield file.read(name)

    def shard(self, index: int) -> store.Shard:
        """Return one of the run's shards."""
        ids = self.shards[index]
        grads = quantise.layout(self.projected, len(ids), self.settings["store_dtype"])
        factors = hessian.factor_layout(self.projected, self.squares_only)
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
