"""The file of re-ranked scores beside the stored ones (compute_influence.py --rerank).

scores/<label>/reranked.safetensors    of Q queries with T candidates together:
                   first [Q + 1]       where each query's candidates begin
                   ids [T]             example ids, for each query ascending
                   scores, stored [T]  computed again, and as stored
                   parts [C, T]        what each of C models adds to `scores`
                   factors [C, Q]      what the scores of each model are multiplied by
                   self_influence [C, T]    not for dot
                   blocks [L, T]       parts of `scores` by block of layers (--layerwise)
               reranked.json           RerankRecord
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from logra import store
from logra.run_dir import RunDir
from logra.runtime import files
from logra.scoring.score_files import AGAIN, ScoreRecord

FILE = "reranked.safetensors"
SHOWN = 10  # the highest scores that quality_lines is about
LATE = 0.8  # of the candidates


@dataclass(frozen=True)
class RerankRecord:
    """The content of reranked.json.

    Attributes:
        scores: Checksum of the stored scores' run.json.
        candidates: T.
        kept: K.
        by: example or document: what K counts.
        rank: Of the gradients; None: not projected.
        damping: Relative.
        models: Of each model: model_name, revision, class and fingerprint (`model`), the folder of its run, the name of
            its statistics, and its weight.
        quality: What the new scores say of the stored ones (see rerank.py).
        checksums: Of the tensors.
    """

    scores: str
    candidates: int
    kept: int
    by: str
    rank: int | None
    damping: float
    models: list[dict[str, Any]]
    quality: dict[str, Any]
    checksums: dict[str, str] | None = None


class ScoredModel(NamedTuple):
    """A model whose scores are shown, or are parts of those shown.

    Attributes:
        run: Its run, or the view of it that re-ranked.
        record: Of the scores, with the Hessian and the damping that they have at this model.
        factors: What its scores are multiplied by, [Q].
        self_influence: Of the re-ranked examples, by id; None: as stored in the run.
    """

    run: RunDir
    record: ScoreRecord
    factors: np.ndarray
    self_influence: dict[int, float] | None = None


RECORD_JSON = {
    "scores": str,
    "candidates": files.is_positive,
    "kept": files.is_positive,
    "by": str,
    "rank": lambda rank: rank is None or files.is_positive(rank),
    "damping": float,
    "models": [{"model_name": str, "revision": str | None, "model": dict, "run": str, "name": str, "weight": float}],
    "quality": dict,
    "checksums": dict,
}


def layout(record: RerankRecord, scores: ScoreRecord) -> store.Layout:
    """Return the layout of the file."""
    count, checkpoints, queries = record.candidates, len(record.models), scores.num_queries
    long, single = torch.int64, torch.float32
    tensors: store.Layout = {"first": (long, [queries + 1]), "ids": (long, [count])}
    tensors |= {"scores": (single, [count]), "stored": (single, [count])}
    tensors |= {"parts": (single, [checkpoints, count]), "factors": (torch.float64, [checkpoints, queries])}
    if scores.mode != "dot":
        tensors["self_influence"] = (single, [checkpoints, count])
    if scores.blocks:
        tensors["blocks"] = (single, [len(scores.blocks), count])
    return tensors


class Reranked:
    """The re-ranked scores in a folder.

    Attributes:
        record: How they were computed.
        tensors: The file's content, as arrays.
    """

    def __init__(self, record: RerankRecord, tensors: dict[str, np.ndarray]):
        self.record, self.tensors = record, tensors

    @classmethod
    def load(cls, folder: Path, scores: ScoreRecord, combine: str | None, grouped: bool = False) -> Self | None:
        """Read the file; None if the scores were not re-ranked.

        Args:
            folder: Of the scores.
            scores: Their record.
            combine: What is ranked: None for examples, else how documents' scores are formed (see rank.by_document).
            grouped: Groups of examples are ranked and not documents.

        Raises:
            ValueError: It is damaged, or of other scores; or other candidates are needed.
        """
        path = folder / FILE
        if not path.with_suffix(".json").exists():
            return None
        if combine == "mean" or (grouped and combine == "sum"):
            raise ValueError(
                f"expected new scores of all examples for a {combine}, got those of the candidates in {path}; rank "
                "examples or documents, or give --combine max"
            )
        content = files.read_json(path.with_suffix(".json"), AGAIN)
        if not files.has_shape(content, RECORD_JSON) or content["scores"] != files.file_content(folder / "run.json"):
            raise ValueError(f"expected re-ranked scores of {folder} in {path}, got others; {AGAIN}")
        record = RerankRecord(**content)
        needed = "document" if combine == "sum" else "example"
        if record.by != needed:
            raise ValueError(
                f"expected scores re-ranked by {needed} (--rerank_by) in {folder}, got by {record.by}; run "
                f"compute_influence.py --rerank_by {needed} again, or rank "
                + ("documents (--by document)" if record.by == "document" else "examples")
            )
        try:
            tensors = store.load_tensors(path, record.checksums, layout(record, scores))
        except ValueError as error:
            raise ValueError(f"expected re-ranked scores in {folder}, got {error}; {AGAIN}") from error
        first, ids = tensors["first"], tensors["ids"]
        whole = first[0] == 0 and first[-1] == len(ids) and bool((first.diff() > 0).all())
        if not whole or not 0 <= ids.min() <= ids.max() < scores.num_examples:
            raise ValueError(f"expected candidates of each query in {path}, got others; {AGAIN}")
        return cls(record, {name: tensor.numpy() for name, tensor in tensors.items()})

    def of(self, query: int, name: str) -> np.ndarray:
        """Return a query's part of a tensor: its last dimension is the query's candidates."""
        first, end = self.tensors["first"][query : query + 2]
        return self.tensors[name][..., first:end]

    def candidates(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a query's candidates, ascending, and their scores, both [n]."""
        return self.of(query, "ids"), self.of(query, "scores")

    @property
    def names(self) -> list[str]:
        """A name of each model: of the checkpoint, or of its run's folder."""
        return [entry["name"] or entry["run"] for entry in self.record.models]

    def of_scores(self, query: int, largest: bool, ids: np.ndarray, name: str = "parts") -> np.ndarray:
        """Return the parts of a query's scores of some candidates, [C, n], or their part of another tensor."""
        return self.of(query, name)[..., np.searchsorted(self.of(query, "ids"), ids)]


def save(folder: Path, record: RerankRecord, scores: ScoreRecord, tensors: dict[str, Tensor]) -> None:
    """Write the file, then the .json beside it."""
    checksums = store.save_tensors(folder / FILE, layout(record, scores), tensors)
    files.write_json((folder / FILE).with_suffix(".json"), asdict(record) | {"checksums": checksums})


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks along the last axis, centred and scaled to length 1; equal values share their mean rank."""
    order = np.sort(values, axis=-1)
    found = np.stack(
        [np.searchsorted(o, v, "left") + np.searchsorted(o, v, "right") for o, v in zip(order, values, strict=True)]
    )
    centred = found - found.mean(axis=-1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-30)


def quality_lines(record: RerankRecord) -> list[str]:
    """Return what to say of the stored scores, and of K, if that is too small."""
    quality, queries = record.quality, len(record.quality["last"])
    space = "without projection" if record.rank is None else f"at rank {record.rank}"
    lines = [f"Re-ranked the {record.kept} highest and lowest {record.by}s of each query, {space}"]
    if "spearman" in quality:
        correlation = f"{np.mean(quality['spearman']):.2f} over {quality['sample']} random examples"
        lines.append(f"  stored against new scores: Spearman {correlation}")
    found, last = f"{np.mean(quality['found']):.3g}", max(quality["last"])
    lines.append(
        f"  {found} of the {SHOWN} highest were among the {SHOWN} highest stored ones; the lowest was number {last}"
    )
    late = sum(rank > LATE * record.kept for rank in quality["last"])
    if record.by == "example" and late:
        where = f"in the last fifth of the candidates: try --rerank {2 * record.kept}"
        lines.append(f"  for {late} of {queries} queries one of them was {where}")
    return lines
