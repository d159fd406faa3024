"""What stage 3 wrote, ranked: the best and the worst examples, or documents, of each query.

Notation: Q queries, N train examples.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from logra import disk, store
from logra.checks import are_scores
from logra.influence import top_k
from logra.log import Log
from logra.scores import ends_layout


class Ranking(NamedTuple):
    """Examples [n] in order, their scores [n], and of how many examples each score is, [n].

    Of documents: the score is the document's, the example its best one.
    """

    examples: np.ndarray
    scores: np.ndarray
    counts: np.ndarray


def load_matrix(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return a matrix of float32, mapped into memory.

    Raises:
        ValueError: It is missing, damaged or of another shape.
    """
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"{matrix.dtype} {list(matrix.shape)}"
    except (OSError, ValueError, EOFError) as error:
        found = str(error)
    if found != f"float32 {list(shape)}":
        raise ValueError(f"expected float32 {list(shape)} in {path}, got {found}; run compute_influence.py again")
    return matrix


def check_scores(folder: Path, about: dict, log: Log) -> None:
    """Check a folder of scores, whose run.json holds `about`.

    Raises:
        ValueError: It is not as it was written, or not of the run's examples.
    """
    if not are_scores(about, log.layers) or Log(folder, about["log"]).fingerprints != log.fingerprints:
        raise ValueError(
            f"expected scores of {log.folder}'s examples in {folder}, got others; run compute_influence.py again"
        )
    if disk.file_sums(folder, about["files"]) != about["files"]:
        raise ValueError(f"expected {folder} as it was written, got other files; run compute_influence.py again")


def read_queries(path: Path) -> list[dict]:
    """Return the rows of the queries.jsonl of scores.

    Raises:
        ValueError: It is missing or damaged.
    """
    try:
        rows = [disk.parse_json(line) for line in disk.read_lines(path)]
    except (OSError, ValueError) as error:
        raise ValueError(f"expected queries in {path}, got {error}; run compute_influence.py again") from error
    if not disk.fits(rows, [{"id": str}]):
        raise ValueError(f"expected an id in each row of {path}, got other rows; run compute_influence.py again")
    return rows


class Scores:
    """The scores of a folder: all of them, or with --top_k_only (k) the ends.

    Raises:
        ValueError: They are missing, altered, or not of Q queries and N examples.
    """

    def __init__(self, folder: Path, queries: int, examples: int, k: int | None):
        self.ends: dict[bool, dict[str, torch.Tensor]] = {}
        if k is None:
            self.matrix = load_matrix(folder / "scores.npy", (queries, examples))
            return
        layout = ends_layout(queries, min(k, examples))
        for largest, name in ((True, "top"), (False, "bottom")):
            path = folder / f"{name}.safetensors"
            try:
                self.ends[largest] = store.load_tensors(path, disk.read_json(path.with_suffix(".json"), ""), layout)
            except ValueError as error:
                raise ValueError(f"expected scores in {folder}, got {error}; run compute_influence.py again") from error
            ids = self.ends[largest]["ids"]
            if ids.numel() and not 0 <= ids.min() <= ids.max() < examples:
                raise ValueError(
                    f"expected ids of {examples} examples in {path}, got others; run compute_influence.py again"
                )

    def ranking(self, query: int, largest: bool) -> Ranking:
        """Return the examples of a query, best (or worst) first, as far as they are known."""
        if self.ends:
            ids, scores = (self.ends[largest][key][query].numpy() for key in ("ids", "scores"))
        else:
            row = torch.from_numpy(np.array(self.matrix[query]))
            order = top_k(row, len(row), largest)
            ids, scores = order.numpy(), row[order].numpy()
        return Ranking(ids, scores, np.ones(len(ids), np.int64))


def by_document(ranking: Ranking, owners: np.ndarray, largest: bool, combine: str) -> Ranking:
    """Return documents, best (or worst) first, each by its best (or worst) example.

    Args:
        ranking: Of examples.
        owners: The number of each example's document, [N].
        largest: As ranking's.
        combine: sum, of the document's examples; or max, the best (or worst) example's score alone.
    """
    _, first, inverse, counts = np.unique(
        owners[ranking.examples], return_index=True, return_inverse=True, return_counts=True
    )
    scores = ranking.scores[first]
    if combine == "sum":
        scores = np.bincount(inverse, weights=ranking.scores).astype(np.float32)
    order = np.lexsort((ranking.examples[first], -scores if largest else scores))
    return Ranking(ranking.examples[first][order], scores[order], counts[order])
