"""Stage 4 with checkpoints: the parts of combined scores (see combine.py), each factor times a checkpoint's own score.

Notation: C checkpoints, Q queries, N train examples, of which n.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from logra.run_dir import RunDir
from logra.scoring.rank import StoredScores, examples_of_score, load_matrix, read_record
from logra.scoring.score_files import AGAIN, ScoreRecord

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

    def of(self, query: int, largest: bool, ids: np.ndarray) -> np.ndarray:
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
    queries: list[dict], folder: Path, record: ScoreRecord, runs: Sequence[RunDir], scores: StoredScores,
    owners: np.ndarray,
) -> None:  # fmt: skip
    """Add to all rows of combined scores `checkpoints`: {folder of the run: part of the row's score}.

    Args:
        queries: `number` and `rows` of each ({"top": rows, "bottom": rows}, see ranked_rows).
        folder, record, runs, scores: See CheckpointParts.
        owners: Number of each example's document, [N].
    """
    if record.checkpoints is None:
        return
    parts, names = CheckpointParts(folder, record, runs, scores), [run.folder.name for run in runs]
    for query in queries:
        for side, rows in query["rows"].items():
            for row in rows:
                found = parts.of(query["number"], side == "top", examples_of_score(row, owners)).sum(axis=1)
                row["checkpoints"] = dict(zip(names, found.tolist(), strict=True))
