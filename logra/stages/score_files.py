"""Files of scores, and of the train examples' self-influence.

Notation: Q queries, N train examples, S dampings, L blocks of layers, K scores kept at each end of a ranking.

scores/<label>/run.json                            ScoreRecord
               queries.jsonl                       the queries
               scores.npy                          [Q, N] float32
               layer_scores.npy                    [L, Q, N] float32, dots of each block of layers (--layerwise)
               top.safetensors, bottom.safetensors scores [Q, K] float32 and ids [Q, K] int64, best first; instead of
                                                   scores.npy (--top_k_only)
               self_influence.npy                  [N] float32 (--self_influence)
self_influence/<label>.safetensors                 values [N] float32; reused, since no query changes them
"""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from logra import store
from logra.hessian import KINDS, Damping
from logra.influence import MODES, RunningTopK
from logra.run_dir import RunDir, RunRecord
from logra.runtime import files, processes


def extremes_layout(queries: int, kept: int) -> store.Layout:
    """Return the layout of top.safetensors and bottom.safetensors."""
    return {"scores": (torch.float32, [queries, kept]), "ids": (torch.int64, [queries, kept])}


@dataclass(frozen=True)
class ScoreRecord:
    """The content of run.json in a folder of scores.

    Attributes:
        queries: Hash of the queries.
        log: Record of the scored run.
        blocks: Names of the L blocks of layers (--layerwise).
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
    log: RunRecord
    damping: float | None
    damping_absolute: float | None
    blocks: list[str] | None = None
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
        if not log.parts or not files.has_shape(content.get("blocks", []), [str]):
            raise ValueError("missing or impossible entries")
        return cls(**content | {"log": log})

    def to_json(self) -> dict[str, Any]:
        """Return the content of run.json."""
        content = vars(self) | {"log": self.log.to_json()}
        return {name: value for name, value in content.items() if name != "blocks" or value is not None}

    @property
    def applied_damping(self) -> Damping:
        """The damping of the scores."""
        return Damping(self.damping, self.damping_absolute)


SCORES_JSON = {
    "log": dict,
    "mode": lambda mode: mode in MODES,
    "hessian": lambda kind: kind in KINDS,
    "layers": lambda names: names and files.has_shape(names, [str]),
    "num_queries": files.is_count,
    "num_examples": files.is_count,
    "files": dict,
    "top_k_only": lambda k: k is None or files.is_positive(k),
    "group_by": str | None,
    "damping": float | None,
    "damping_absolute": float | None,
} | dict.fromkeys(("split", "query_loss", "queries"), str)


class ScoreFile:
    """The scores of one damping. All ranks write to it, each the columns of its shards.

    Args:
        folder: The folder to write to.
        record: Of the scores. It says Q, N, and what is kept: all scores or the top k, dots of the blocks or none.
    """

    def __init__(self, folder: Path, record: ScoreRecord):
        self.folder, self.record, self.top_k_only = folder, record, record.top_k_only
        shape = (record.num_queries, record.num_examples)
        self.shapes: dict[str, tuple[int, ...]] = {"scores.npy": shape} if record.top_k_only is None else {}
        if record.blocks:
            self.shapes["layer_scores.npy"] = (len(record.blocks), *shape)
        self.matrices: dict[str, np.memmap] = {}
        self.extremes: dict[tuple[int, str], RunningTopK] = {}  # by a batch's first query, and top or bottom

    def create(self) -> None:
        """Create empty matrices, on one rank, before any rank writes.

        Raises:
            OSError: The disk is too small. Without this check a memory-mapped write would crash.
        """
        for name, shape in self.shapes.items():
            path = self.folder / name
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def put(self, first_query: int, ids: range, scores: Tensor, block_dots: list[Tensor]) -> None:
        """Store the scores of a batch of queries and of the examples `ids`.

        Args:
            first_query: Number of the batch's first query.
            ids: Of n examples.
            scores: [queries, n].
            block_dots: Dots of each block, L times [queries, n].
        """
        if self.top_k_only is not None:
            for end in ("top", "bottom"):
                running = RunningTopK(len(scores), self.top_k_only, end == "top")
                self.extremes.setdefault((first_query, end), running).add(scores, torch.arange(ids.start, ids.stop))
        for name in self.shapes:
            if name not in self.matrices:
                self.matrices[name] = np.load(self.folder / name, mmap_mode="r+")
            values = scores if name == "scores.npy" else torch.stack(block_dots)
            self.matrices[name][..., first_query : first_query + len(scores), ids.start : ids.stop] = values.numpy()

    def close(self) -> None:
        """Flush this rank's scores. With top_k_only, merge the ranks' top k and write them."""
        for matrix in self.matrices.values():
            matrix.flush()
        if self.top_k_only is None:
            return
        merged: dict[tuple[int, str], RunningTopK] = {}
        for key, part in processes.gather_list(list(self.extremes.items())):
            empty = RunningTopK(len(part.scores), part.k, part.largest)
            merged.setdefault(key, empty).add(part.scores, part.ids)
        for end in ("top", "bottom") if processes.state().is_main_process else ():
            batches = [merged[key] for key in sorted(merged) if key[1] == end]
            tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("scores", "ids")}
            path, layout = self.folder / f"{end}.safetensors", extremes_layout(*tensors["scores"].shape)
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
def score_files(base: Path, record: ScoreRecord, dampings: list[Damping]) -> Iterator[list[ScoreFile]]:
    """Yield a ScoreFile for each damping. The folders get their final names when the block ends without an error.

    Args:
        base: scores/<label>; a folder is named <base>-<damping>.
        record: Of the scores, without a damping.
        dampings: One for each file.

    Raises:
        ValueError: Another command writes the same scores.
    """
    folders = [base.with_name(f"{base.name}-{damping.label}") for damping in dampings]
    records = [replace(record, damping=d.relative, damping_absolute=d.absolute) for d in dampings]
    with ExitStack() as stack:
        if processes.state().is_main_process:
            stack.enter_context(files.locked(base.with_name(f"{base.name}.lock"), str(base)))
            for path in folders:
                stack.enter_context(files.atomic(path)).mkdir()
        yield [ScoreFile(files.temporary_path(path), entry) for path, entry in zip(folders, records, strict=True)]


class SelfInfluence:
    """z^T (C + lambda I)^-1 z of all train examples, for S dampings. It is stored in the run's folder, and reused.

    Attributes:
        values: [S, N]; sums of this rank's parts until `complete`.
        complete: The values are known for all examples.
    """

    def __init__(self, run: RunDir, kind: str, layers: list[str], dampings: list[Damping]):
        hessian_entry = run.hessian_path(kind).with_suffix(".json").read_text() if kind != "none" else ""
        hessian_hash = xxhash.xxh3_64_hexdigest(hessian_entry.encode())
        self.key = {"hessian": hessian_hash, "examples": run.examples, "fingerprints": run.fingerprints}
        layers_hash = xxhash.xxh3_64_hexdigest(json.dumps(layers).encode())[:8]
        names = [f"{kind}-{damping.label}-{layers_hash}.safetensors" for damping in dampings]
        self.paths = [run.folder / "self_influence" / name for name in names]
        self.layout: store.Layout = {"values": (torch.float32, [run.examples])}
        stored = [self._load(path) for path in self.paths]
        # another command may be writing them, so all ranks must have found them
        self.complete = all(processes.gather_list([all(values is not None for values in stored)]))
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
