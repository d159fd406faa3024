"""Stage 4 with checkpoints: the parts of combined scores (see combine.py), each factor times a checkpoint's own score.

Notation: C checkpoints, Q queries, N train examples, of which n.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from logra.run_dir import RunDir
from logra.scoring.rank import StoredScores, examples_of_score, load_matrix, part_of_score, read_record
from logra.scoring.reranked import Reranked, ScoredModel
from logra.scoring.score_files import AGAIN, ScoreRecord
from logra.stages.fine_run import FineRun, at_checkpoint

TOLERANCE = 1e-5  # of a score, relative to the sum of its absolute parts


def read_factors(folder: Path, record: ScoreRecord) -> np.ndarray:
    """Return what the scores of each run are multiplied by, [C, Q] float64; of a run without checkpoints, ones [1, Q].

    Raises:
        ValueError: The file is missing or damaged.
    """
    if record.checkpoints is None:
        return np.ones((1, record.num_queries))
    return load_matrix(folder / "factors.npy", (len(record.checkpoints), record.num_queries), "float64")


class CheckpointParts:
    """The parts of the combined scores in a folder.

    Args:
        folder: The folder.
        record: Of the scores.
        runs: Of the C checkpoints.
        scores: The combined scores.

    Raises:
        ValueError: A checkpoint's own scores are missing or were altered. With --top_k_only they are not needed.
    """

    def __init__(self, folder: Path, record: ScoreRecord, runs: Sequence[RunDir], scores: StoredScores):
        self.folder, self.scores, self.factors = folder, scores, read_factors(folder, record)
        self.matrices: list[np.ndarray] = []
        for run, checkpoint in zip(runs, record.checkpoints, strict=True) if scores.matrix is not None else ():
            own = run.folder / "scores" / f"{checkpoint['scores']}-{record.applied_damping.label}"
            read_record(own, run)
            self.matrices.append(load_matrix(own / "scores.npy", scores.matrix.shape))

    def of_scores(self, query: int, largest: bool, ids: np.ndarray) -> np.ndarray:
        """Return the parts of a query's scores of some examples, [C, n] float64.

        Args:
            query: The query's number.
            largest: The examples are among those with the highest scores; else among those with the lowest.
            ids: Of the examples, [n].

        Raises:
            ValueError: The parts do not add up to the scores.
        """
        if self.scores.matrix is not None:
            scores = self.scores.matrix[query, ids]
            parts = self.factors[:, [query]] * np.stack([matrix[query, ids] for matrix in self.matrices])
        else:
            kept = {name: tensor.numpy() for name, tensor in self.scores.extremes[largest].items()}
            places = [kept["ids"][query].tolist().index(example) for example in ids]
            scores, parts = kept["scores"][query, places], kept["parts"][:, query, places].astype(np.float64)
        if not np.all(np.abs(parts.sum(axis=0) - scores) <= TOLERANCE * np.abs(parts).sum(axis=0) + 1e-30):
            raise ValueError(
                f"expected scores in {self.folder} that are the sum of the checkpoints' parts, got others; {AGAIN}"
            )
        return parts


def add_checkpoints(
    queries: list[dict], folder: Path, record: ScoreRecord, runs: Sequence[RunDir], scores: StoredScores | Reranked,
    owners: np.ndarray,
) -> None:  # fmt: skip
    """Add to all rows of combined scores `checkpoints`: {folder of the run, or checkpoint: part of the row's score}.

    Args:
        queries: `number` and `rows` of each ({"top": rows, "bottom": rows}, see ranked_rows).
        folder, record, runs: See CheckpointParts.
        scores: The scores that are ranked.
        owners: Number of each example's document or group, [N].
    """
    names = [run.folder.name for run in runs] if record.checkpoints else []
    parts: CheckpointParts | Reranked
    if isinstance(scores, Reranked):
        parts, names = scores, scores.names if len(scores.names) > 1 else []
    elif names:
        parts = CheckpointParts(folder, record, runs, scores)
    for query in queries if names else ():
        for side, rows in query["rows"].items():
            for row in rows:
                found = parts.of_scores(query["number"], side == "top", examples_of_score(row, owners))
                row["checkpoints"] = dict(zip(names, part_of_score(row, found).tolist(), strict=True))


def scored_models(
    folder: Path, record: ScoreRecord, runs: Sequence[RunDir], fine: Reranked | None
) -> Iterator[ScoredModel]:
    """Yield the models of the scores in a folder (of the re-ranked ones if there are any); arguments as above."""
    if fine is None:
        for run, factors in zip(runs, read_factors(folder, record), strict=True):
            yield ScoredModel(run, record, factors)
        return
    record = replace(record, hessian="ekfac", damping=fine.record.damping, damping_absolute=None, query_rank=None)
    of_folder = {run.folder.name: run for run in runs}
    for number, entry in enumerate(fine.record.models):
        run = at_checkpoint(of_folder[entry["run"]], entry["model_name"], entry["revision"], entry["model"])
        own = None
        if record.mode != "dot":
            values = fine.tensors["self_influence"][number]
            own = dict(zip(fine.tensors["ids"].tolist(), values.tolist(), strict=True))
        run = FineRun(run, fine.record.rank, entry["name"])
        yield ScoredModel(run, record, fine.tensors["factors"][number], own)
