"""Files of scores, and of the train examples' self-influence.

Notation: Q queries, N train examples, S dampings, L blocks of layers, K scores kept at each end of a ranking.

scores/<label>/run.json                            ScoreRecord
               queries.jsonl                       the queries
               scores.npy                          [Q, N] float32
               layer_scores.npy                    [L, Q, N] float32, dots of each block of layers (--layerwise)
               top.safetensors, bottom.safetensors scores [Q, K] float32 and ids [Q, K] int64, best first; instead of
                                                   scores.npy (--top_k_only); of combined scores also the
                                                   checkpoints' parts [C, Q, K]
               factors.npy                         [C, Q], see combine.py
               self_influence.npy                  [N] float32 (--self_influence)
self_influence/<label>.safetensors                 values [N] float32; reused, since no query changes them
"""

import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from logra import store
from logra.influence import RunningTopK
from logra.run_dir import RunDir, RunRecord
from logra.runtime import files, processes
from logra.runtime.settings import HESSIANS, MODES, Damping
from logra.scoring.matrix_files import create_matrix

AGAIN = "run compute_influence.py again"
ROUNDING = 1e-12  # of a variance, relative to the mean square: scores are float32


def extremes_layout(queries: int, kept: int, checkpoints: int) -> store.Layout:
    """Return the layout of top.safetensors and bottom.safetensors."""
    layout: store.Layout = {"scores": (torch.float32, [queries, kept]), "ids": (torch.int64, [queries, kept])}
    return layout | ({"parts": (torch.float32, [checkpoints, queries, kept])} if checkpoints else {})


@dataclass(frozen=True)
class ScoreRecord:
    """The content of run.json in a folder of scores.

    Attributes:
        queries: Hash of the queries.
        log: Record of the scored run.
        blocks: Names of the L blocks of layers (--layerwise).
        checkpoints: Of combined scores: the folder of each checkpoint's run, the label of its scores there, its weight.
        files: Checksums of the other files in the folder.
    """

    query_loss: str
    layers: list[str]
    queries: str
    split: str
    mode: str
    hessian: str
    num_queries: int
    num_examples: int
    top_k_only: int | None
    group_by: str | None
    query_rank: int | None
    log: RunRecord
    damping: float | None
    damping_absolute: float | None
    blocks: list[str] | None = None
    checkpoints: list[dict[str, Any]] | None = None
    files: dict[str, str] | None = None

    @classmethod
    def from_json(cls, content: Any, run_layers: Collection[str]) -> Self:
        """Return the record that parsed JSON holds. The JSON is not trusted.

        Raises:
            ValueError: Entries are missing or impossible, or name layers that the run does not have.
        """
        if not files.has_shape(content, SCORES_JSON) or not set(content["layers"]) <= set(run_layers):
            raise ValueError("missing or impossible entries")
        log = RunRecord.from_json(content["log"])
        entries = {"blocks": [str], "checkpoints": are_checkpoints}
        present = {name: shape for name, shape in entries.items() if name in content}
        if not log.parts or not files.has_shape(content, present):
            raise ValueError("missing or impossible entries")
        return cls(**content | {"log": log})

    def to_json(self) -> dict[str, Any]:
        """Return the content of run.json."""
        content = vars(self) | {"log": self.log.to_json()}
        optional = ("blocks", "checkpoints")
        return {name: value for name, value in content.items() if name not in optional or value is not None}

    def label(self, query_set: str) -> str:
        """Return the start of the folder's name, which the damping ends: query set, mode, Hessian, hash of the rest."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in ("query_loss", "layers", "queries")}
        further = {name: getattr(self, name) for name in ("top_k_only", "group_by", "query_rank")}
        further |= {"layerwise": self.blocks is not None, "checkpoints": self.checkpoints}
        settings |= {name: value for name, value in further.items() if value}
        settings_hash = xxhash.xxh3_64_hexdigest(json.dumps(settings).encode())[:8]
        return f"{files.fitting(query_set)}-{settings_hash}-{self.mode}-{self.hessian}"

    @property
    def applied_damping(self) -> Damping:
        """The damping of the scores."""
        return Damping(self.damping, self.damping_absolute)


def _is_folder_name(name: Any) -> bool:
    return isinstance(name, str) and files.short_name(name) == name


def are_checkpoints(value: Any) -> bool:
    """Return whether parsed JSON is the entry `checkpoints` of a record: at least one, each of another run."""
    return files.has_shape(value, [CHECKPOINT_JSON]) and 0 < len({entry["run"] for entry in value}) == len(value)


def _is_weight(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


CHECKPOINT_JSON = {"run": _is_folder_name, "scores": _is_folder_name, "weight": _is_weight}
SCORES_JSON = {
    "log": dict,
    "mode": lambda mode: mode in MODES,
    "hessian": lambda kind: kind in HESSIANS,
    "layers": lambda names: names and files.has_shape(names, [str]),
    "num_queries": files.is_count,
    "num_examples": files.is_count,
    "files": dict,
    "top_k_only": lambda k: k is None or files.is_positive(k),
    "group_by": str | None,
    "query_rank": lambda rank: rank is None or files.is_positive(rank),
    "damping": float | None,
    "damping_absolute": float | None,
} | dict.fromkeys(("split", "query_loss", "queries"), str)


def deviation(mean: Tensor, mean_square: Tensor) -> Tensor:
    """Return standard deviations from means and mean squares, float64; 0 where it is a rounding error."""
    variance = mean_square - mean.square()
    return torch.where(variance > ROUNDING * mean_square, variance.clamp_min(0).sqrt(), 0)


def score_folders(base: Path, dampings: list[Damping]) -> list[Path]:
    """Return the folder of the scores of each damping, <base>-<damping>."""
    return [base.with_name(f"{base.name}-{damping.label}") for damping in dampings]


class ScoreFile:
    """The scores of one damping. Each rank writes files of its own, the columns of its shards; rank 0 joins them.

    Several machines must not write to one file: over a network file system each of them writes whole pages back, with
    old values in the columns of the others.

    Args:
        folder: The folder to write to.
        record: Of the scores. It says Q, N, and what is kept: all scores or the top k, dots of the blocks or none.
        shards: The example ids of each shard.
    """

    def __init__(self, folder: Path, record: ScoreRecord, shards: list[range]):
        self.folder, self.record, self.shards, self.top_k_only = folder, record, shards, record.top_k_only
        queries, rank = record.num_queries, processes.state().process_index
        self.rows: dict[str, tuple[int, ...]] = {"scores.npy": (queries,)} if record.top_k_only is None else {}
        if record.blocks:
            self.rows["layer_scores.npy"] = (len(record.blocks), queries)
        self.columns, width = self._columns(rank)
        self.matrices = {
            name: create_matrix(self._part(name, rank), (*rows, width)) for name, rows in self.rows.items()
        }
        self.extremes: dict[tuple[int, str], RunningTopK] = {}  # by a batch's first query, and top or bottom
        self.sums = torch.zeros(2, queries, dtype=torch.float64)  # of the scores, and of their squares

    def _part(self, name: str, rank: int) -> Path:
        """Return the file of a rank's columns; a single process writes the final file."""
        return self.folder / (name if processes.state().num_processes == 1 else f"{name}.{rank}")

    def _columns(self, rank: int) -> tuple[dict[range, slice], int]:
        """Return the example ids of each shard of a rank -> its columns in the rank's files, and their number."""
        columns, width = {}, 0
        for index in processes.share(len(self.shards), rank):
            ids = self.shards[index]
            columns[ids], width = slice(width, width + len(ids)), width + len(ids)
        return columns, width

    def put(
        self, first_query: int, ids: range, scores: Tensor, block_dots: list[Tensor], parts: Tensor | None = None
    ) -> None:
        """Store the scores of a batch of queries and of a shard's examples.

        Args:
            first_query: Number of the batch's first query.
            ids: Of the n examples of a shard.
            scores: [queries, n].
            block_dots: Dots of each block, L times [queries, n].
            parts: Of combined scores: the parts of the checkpoints, [C, queries, n].
        """
        totals = scores.sum(dim=1, dtype=torch.float64)
        squares = torch.linalg.vector_norm(scores, dim=1, dtype=torch.float64).square()
        self.sums[:, first_query : first_query + len(scores)] += torch.stack([totals, squares])
        if self.top_k_only is not None:
            for end in ("top", "bottom"):
                running = RunningTopK(len(scores), self.top_k_only, end == "top", 0 if parts is None else len(parts))
                examples = torch.arange(ids.start, ids.stop)
                self.extremes.setdefault((first_query, end), running).add(scores, examples, parts)
        for name, matrix in self.matrices.items():
            values = scores if name == "scores.npy" else torch.stack(block_dots)
            matrix[..., first_query : first_query + len(scores), self.columns[ids]] = values.numpy()

    def forget(self, first_query: int) -> None:
        """Forget the scores of a batch of queries and of all later ones."""
        self.extremes = {key: running for key, running in self.extremes.items() if key[0] < first_query}
        self.sums[:, first_query:] = 0

    def deviations(self) -> Tensor:
        """Return the standard deviation of each query's scores over all examples, [Q] float64."""
        return deviation(*processes.sum_over_ranks(self.sums) / self.record.num_examples)

    def kept_examples(self, first_query: int, query: int, ids: range) -> Sequence[int]:
        """Return the examples `ids`; with top_k_only, this rank's examples with the highest scores for a query."""
        return self.extremes[first_query, "top"].ids[query].tolist() if self.top_k_only else ids

    def read(self, query: int, example: int) -> float | None:
        """Return a score of the closed file; None if top_k_only left it out."""
        if self.top_k_only is None:
            return float(np.load(self.folder / "scores.npy", mmap_mode="r")[query, example])
        with safe_open(self.folder / "top.safetensors", "pt") as file:
            scores = file.get_tensor("scores")[query][file.get_tensor("ids")[query] == example]
        return scores.item() if len(scores) else None

    def close(self) -> None:
        """Flush this rank's scores, and join those of all ranks."""
        for matrix in self.matrices.values():
            matrix.flush()
        self.matrices.clear()
        processes.state().wait_for_everyone()
        if processes.state().is_main_process and processes.state().num_processes > 1:
            for name, rows in self.rows.items():
                self._join(name, rows)
        if self.top_k_only is not None:
            self._join_extremes()

    def _join(self, name: str, rows: tuple[int, ...]) -> None:
        """Copy the columns of all ranks into one matrix, and delete the ranks' files."""
        joined = create_matrix(self.folder / name, (*rows, self.record.num_examples))
        for rank in range(processes.state().num_processes):
            path = self._part(name, rank)
            part = files.retried(partial(np.load, path, mmap_mode="r"))
            for ids, columns in self._columns(rank)[0].items():
                joined[..., ids.start : ids.stop] = part[..., columns]
            path.unlink()
        joined.flush()

    def _join_extremes(self) -> None:
        """Write the highest and lowest scores of all ranks."""
        merged: dict[tuple[int, str], RunningTopK] = {}
        for key, part in processes.gather_list(list(self.extremes.items())):
            empty = RunningTopK(len(part.scores), part.k, part.largest, len(part.parts))
            merged.setdefault(key, empty).add(part.scores, part.ids, part.parts)
        for end in ("top", "bottom") if processes.state().is_main_process else ():
            batches = [merged[key] for key in sorted(merged) if key[1] == end]
            tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("scores", "ids")}
            if checkpoints := len(self.record.checkpoints or ()):
                tensors["parts"] = torch.cat([batch.parts for batch in batches], dim=1)
            path = self.folder / f"{end}.safetensors"
            queries, kept = tensors["scores"].shape
            layout = extremes_layout(queries, kept, checkpoints)
            files.write_json(path.with_suffix(".json"), store.save_tensors(path, layout, tensors))

    def describe(self, query_rows: list[dict], self_influence: Tensor | None) -> None:
        """Write queries.jsonl, self_influence.npy if it is given, and run.json with the checksums of all files."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in query_rows)
        (self.folder / "queries.jsonl").write_text(text, "utf-8")
        if self_influence is not None:
            np.save(self.folder / "self_influence.npy", self_influence.numpy())
        record = replace(self.record, files=files.file_checksums(self.folder))
        files.write_json(self.folder / "run.json", record.to_json())


@contextmanager
def score_files(
    base: Path, record: ScoreRecord, dampings: list[Damping], shards: list[range]
) -> Iterator[list[ScoreFile]]:
    """Yield a ScoreFile for each damping. The folders get their final names when the block ends without an error.

    Args:
        base: scores/<label>; a folder is named <base>-<damping>.
        record: Of the scores, without a damping.
        dampings: One for each file.
        shards: The example ids of each shard.

    Raises:
        ValueError: Another command writes the same scores.
    """
    folders = score_folders(base, dampings)
    records = [replace(record, damping=d.relative, damping_absolute=d.absolute) for d in dampings]
    with ExitStack() as stack:
        if processes.state().is_main_process:
            stack.enter_context(files.locked(base.with_name(f"{base.name}.lock"), str(base)))
            for path in folders:
                stack.enter_context(files.atomic(path)).mkdir()
        processes.state().wait_for_everyone()
        temporary = [files.temporary_path(path) for path in folders]
        yield [ScoreFile(path, entry, shards) for path, entry in zip(temporary, records, strict=True)]


class SelfInfluence:
    """z^T (C + lambda I)^-1 z of all train examples, for S dampings. It is stored in the run's folder, and reused.

    Attributes:
        values: [S, N]; sums of this rank's parts until `complete`.
        complete: The values are known for all examples.
    """

    def __init__(self, run: RunDir, kind: str, layers: list[str], dampings: list[Damping]):
        manifest = run.hessian_path(kind).with_suffix(".json")
        hessian_entry = files.retried(manifest.read_text) if kind != "none" else ""
        hessian_hash = xxhash.xxh3_64_hexdigest(hessian_entry.encode())
        self.key = {"hessian": hessian_hash, "examples": run.examples, "fingerprints": run.fingerprints}
        layers_hash = xxhash.xxh3_64_hexdigest(json.dumps(layers).encode())[:8]
        names = [f"{kind}-{damping.label}-{layers_hash}.safetensors" for damping in dampings]
        self.paths = [run.folder / "self_influence" / name for name in names]
        self.layout: store.Layout = {"values": (torch.float32, [run.examples])}
        stored = processes.on_rank_0(lambda: [self._load(path) for path in self.paths])()
        self.complete = all(values is not None for values in stored)
        self.values = torch.stack(stored) if self.complete else torch.zeros(len(dampings), run.examples)

    def _load(self, path: Path) -> Tensor | None:
        """Return the stored values if they are whole, and of the same Hessian and examples."""
        try:
            entry = files.read_json(path.with_suffix(".json"), "")
            values = store.load_tensors(path, entry.get("checksums"), self.layout)["values"]
        except ValueError:
            return None
        return values if all(entry.get(key) == value for key, value in self.key.items()) else None

    def add(self, ids: range, parts: list[Tensor]) -> None:
        """Add one or more layers' parts, S times [n], of the examples `ids`."""
        self.values[:, ids.start : ids.stop] += torch.stack(parts).cpu()

    def save(self) -> None:
        """Sum the ranks' parts, and store the values."""
        self.values, self.complete = processes.sum_over_ranks(self.values), True
        for path, values in zip(self.paths, self.values, strict=True) if processes.state().is_main_process else ():
            tag = f".{os.getpid()}"  # commands for other queries may run at the same time
            checksums = store.save_tensors(path, self.layout, {"values": values}, tag)
            files.write_json(path.with_suffix(".json"), self.key | {"checksums": checksums}, tag)


class ScoredCheckpoint(NamedTuple):
    """What is left of scoring a checkpoint's run.

    Attributes:
        run: The run.
        folders: Of its scores, one for each damping.
        deviations: Standard deviation of each query's scores over all examples, [S, Q] float64; None without `queries`.
        self_influence: [S, N]; None if the mode does not need it.
        queries: Layer -> file of preconditioned queries [S, Q, k]; None if all scores are kept.
        queries_per_pass: How many of these fit in memory.
    """

    run: RunDir
    folders: list[Path]
    deviations: Tensor | None
    self_influence: Tensor | None
    queries: dict[str, Path] | None
    queries_per_pass: int


def needed_self_influence(
    run: RunDir, record: ScoreRecord, dampings: list[Damping], wanted: bool
) -> SelfInfluence | None:
    """Return the self-influences that the mode of the scores or --self_influence (`wanted`) needs, or None."""
    needed = record.mode != "dot" or wanted
    return SelfInfluence(run, record.hessian, record.layers, dampings) if needed else None
