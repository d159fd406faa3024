"""Files of scores: scores.npy, or with --top_k_only the ends of it; and the train examples' self-influence.

scores/<label>/scores.npy                          [Q, N] float32, with --layerwise also
               layer_scores.npy                    [L, Q, N] float32: dots of L blocks of layers; or
               top.safetensors, bottom.safetensors  scores [Q, K] float32 and ids [Q, K] int64, best first
self_influence/<label>.safetensors                 values [N] float32; kept, since it does not depend on the queries
"""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from torch import Tensor

from logra import store
from logra.hessian import KINDS, Damping
from logra.influence import MODES, RunningTopK
from logra.inputs.queries import Query
from logra.run_dir import RunDir, RunRecord
from logra.runtime import files
from logra.runtime.files import has_shape, is_count, is_positive
from logra.runtime.processes import gather_list, sum_over_ranks


def extremes_layout(queries: int, kept: int) -> store.Layout:
    """Return the tensors of top.safetensors and bottom.safetensors."""
    return {"scores": (torch.float32, [queries, kept]), "ids": (torch.int64, [queries, kept])}


@dataclass(frozen=True)
class ScoreRecord:
    """The content of run.json in a folder of scores.

    `queries` is the hash of the queries, `log` the record of the scored run, `blocks` the names of the L blocks of
    layers (--layerwise), `files` the checksums of the other files in the folder.
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
        """Return the record that parsed JSON holds, which may come from anyone.

        Raises:
            ValueError: Entries are missing or impossible, or of other layers than the run's.
        """
        if not has_shape(content, SCORES_JSON) or not set(content["layers"]) <= set(run_layers):
            raise ValueError("missing or impossible entries")
        log = RunRecord.from_json(content["log"])
        if not log.parts or not has_shape(content.get("blocks", []), [str]):
            raise ValueError("missing or impossible entries")
        return cls(**content | {"log": log})

    def to_json(self) -> dict[str, Any]:
        """Return the content of run.json."""
        content = asdict(self) | {"log": self.log.to_json()}
        return {name: value for name, value in content.items() if name != "blocks" or value is not None}

    @property
    def applied_damping(self) -> Damping:
        """The damping of the scores."""
        return Damping(self.damping, self.damping_absolute)


SCORES_JSON = {
    "log": dict,
    "mode": lambda mode: mode in MODES,
    "hessian": lambda kind: kind in KINDS,
    "layers": lambda names: names and has_shape(names, [str]),
    "num_queries": is_count,
    "num_examples": is_count,
    "files": dict,
    "top_k_only": lambda k: k is None or is_positive(k),
    "group_by": str | None,
    "damping": float | None,
    "damping_absolute": float | None,
} | dict.fromkeys(("split", "query_loss", "queries"), str)


class ScoreFile:
    """The scores of one damping, written by all ranks, each its shards' columns.

    Args:
        folder: Where to.
        queries, examples: Q and N.
        top_k_only: Keep this many of the highest and of the lowest scores of each query only.
        blocks: L, where the blocks' dots are kept apart too, or 0.
    """

    def __init__(self, folder: Path, queries: int, examples: int, top_k_only: int | None, blocks: int = 0):
        self.folder, self.k = folder, top_k_only
        self.shapes = {"scores.npy": (queries, examples)} | (
            {"layer_scores.npy": (blocks, queries, examples)} if blocks else {}
        )
        self.matrices: dict[str, np.memmap] = {}
        self.extremes: dict[int, dict[str, RunningTopK]] = {}  # by the number of a group's first query

    def create(self) -> None:
        """Make an empty scores.npy; on one rank, before the others write. A full disk is an OSError here."""
        for name, shape in self.shapes.items() if self.k is None else ():
            path = self.folder / name
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk would be a crash in a memory-mapped write
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def put(self, first: int, ids: range, scores: Tensor, of_blocks: list[Tensor]) -> None:
        """Take scores [queries of the group, n], and each block's dots, of queries from number `first` on."""
        if self.k is not None:
            if first not in self.extremes:
                self.extremes[first] = {
                    end: RunningTopK(len(scores), self.k, end == "top") for end in ("top", "bottom")
                }
            for end in self.extremes[first].values():
                end.add(scores, torch.arange(ids.start, ids.stop))
            return
        for name in self.shapes:
            if name not in self.matrices:
                self.matrices[name] = np.load(self.folder / name, mmap_mode="r+")
            values = scores if name == "scores.npy" else torch.stack(of_blocks)
            self.matrices[name][..., first : first + len(scores), ids.start : ids.stop] = values.numpy()

    def close(self, accelerator: Accelerator) -> None:
        """Flush what this rank has; merge the ranks' top k, on every rank."""
        for matrix in self.matrices.values():
            matrix.flush()
        if self.k is None:
            return
        mine = [(first, name, end) for first, ends in self.extremes.items() for name, end in ends.items()]
        found = gather_list([(first, name, end.scores, end.ids) for first, name, end in mine], accelerator)
        for name in ("top", "bottom"):
            groups: dict[int, RunningTopK] = {}
            for first, _, scores, ids in (entry for entry in found if entry[1] == name):
                groups.setdefault(first, RunningTopK(len(scores), self.k, name == "top")).add(scores, ids)
            ordered = [groups[first] for first in sorted(groups)]
            tensors = {key: torch.cat([getattr(end, key) for end in ordered]) for key in ("scores", "ids")}
            if accelerator.is_main_process:
                path, layout = self.folder / f"{name}.safetensors", extremes_layout(*tensors["scores"].shape)
                files.write_json(path.with_suffix(".json"), store.save_tensors(path, layout, tensors))

    def describe(
        self, queries: list[Query], record: ScoreRecord, damping: Damping, self_influence: Tensor | None
    ) -> None:
        """Write queries.jsonl, self_influence.npy where it is given, and run.json with the checksums of all files."""
        rows = [{"id": q.id, **q.row, "tokens": len(q.token_ids), "counted": sum(q.counted)} for q in queries]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.folder / "queries.jsonl").write_text(text, "utf-8")
        if self_influence is not None:
            np.save(self.folder / "self_influence.npy", self_influence.numpy())
        record = replace(record, damping=damping.relative, damping_absolute=damping.absolute)
        record = replace(record, files=files.file_checksums(self.folder))
        files.write_json(self.folder / "run.json", record.to_json())


@contextmanager
def score_files(
    base: Path, dampings: list[Damping], shape: tuple[int, int], top_k_only: int | None, blocks: int,
    accelerator: Accelerator,
) -> Iterator[list[ScoreFile]]:  # fmt: skip
    """Yield a ScoreFile for each damping; the folders take their names when the block ends well.

    Args:
        base: scores/<label>; a folder is <base>-<damping>.
        dampings: One for each file.
        shape: (Q, N).
        top_k_only, blocks: See ScoreFile.

    Raises:
        ValueError: Another command writes the same scores.
    """
    folders = [base.with_name(f"{base.name}-{damping.label}") for damping in dampings]
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(files.locked(base.with_name(f"{base.name}.lock"), str(base)))
            for path in folders:
                stack.enter_context(files.atomic(path)).mkdir()
        yield [ScoreFile(files.temporary_path(path), *shape, top_k_only, blocks) for path in folders]


class SelfInfluence:
    """z^T (C + lambda I)^-1 z of all train examples for S dampings: `values` [S, N], and `whole` once it is known.

    Kept in the run's folder for the next scores with the same Hessian, layers and dampings.
    """

    def __init__(self, run: RunDir, kind: str, layers: list[str], dampings: list[Damping]):
        known = run.hessian_path(kind).with_suffix(".json").read_text() if kind != "none" else ""
        self.key = {"hessian": xxhash.xxh3_64_hexdigest(known.encode()), "examples": run.examples}
        self.key |= {"fingerprints": run.fingerprints}
        chosen = xxhash.xxh3_64_hexdigest(json.dumps(layers).encode())[:8]
        names = [f"{kind}-{damping.label}-{chosen}.safetensors" for damping in dampings]
        self.paths = [run.folder / "self_influence" / name for name in names]
        self.values = torch.zeros(len(dampings), run.examples)
        self.layout: store.Layout = {"values": (torch.float32, [run.examples])}
        stored = [self._load(path) for path in self.paths]
        self.whole = all(values is not None for values in stored)
        if self.whole:
            self.values = torch.stack(stored)

    def _load(self, path: Path) -> Tensor | None:
        """Return what is stored, if it is whole and of the same Hessian and examples."""
        try:
            entry = files.read_json(path.with_suffix(".json"), "")
            values = store.load_tensors(path, entry.get("checksums"), self.layout)["values"]
        except ValueError:
            return None
        return values if all(entry.get(key) == value for key, value in self.key.items()) else None

    def agree(self, accelerator: Accelerator) -> None:
        """Compute it again where not every rank has found it, as when it is being written."""
        if not all(gather_list([self.whole], accelerator)):
            self.whole = False
            self.values.zero_()

    def put(self, ids: range, parts: list[Tensor]) -> None:
        """Add a layer's (or all layers') share, S times [n], of the examples ids."""
        self.values[:, ids.start : ids.stop] += torch.stack(parts).cpu()

    def save(self, accelerator: Accelerator) -> None:
        """Sum over ranks, and keep it."""
        self.values, self.whole = sum_over_ranks(self.values, accelerator), True
        for path, values in zip(self.paths, self.values, strict=True) if accelerator.is_main_process else ():
            tag = f".{os.getpid()}"  # other queries may be scored at the same time
            checksums = store.save_tensors(path, self.layout, {"values": values}, tag)
            files.write_json(path.with_suffix(".json"), self.key | {"checksums": checksums}, tag)
