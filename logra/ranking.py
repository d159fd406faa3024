"""What stage 3 wrote, ranked: the best and the worst examples, or documents, of each query.

Notation: Q queries, N train examples.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from logra import store
from logra.influence import top_k


class Ranking(NamedTuple):
    """Examples [n] in order, their scores [n], and of how many examples each score is, [n].

    Of documents: the score is the document's, the example its best one.
    """

    examples: np.ndarray
    scores: np.ndarray
    counts: np.ndarray


class Scores:
    """The scores of a folder: all of them, or with --top_k_only the ends.

    Raises:
        ValueError: They are missing, altered, or not of Q queries and N examples.
    """

    def __init__(self, folder: Path, queries: int, examples: int):
        self.ends: dict[bool, dict[str, torch.Tensor]] = {}
        try:
            if (folder / "top.json").exists():
                for largest, name in ((True, "top"), (False, "bottom")):
                    entry = store.read_json(folder / f"{name}.json", "")
                    self.ends[largest] = store.load_tensors(folder / f"{name}.safetensors", entry)
                return
            self.matrix = np.load(folder / "scores.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"expected scores in {folder}, got {error}; run compute_influence.py again") from error
        if self.matrix.shape != (queries, examples) or self.matrix.dtype != np.float32:
            raise ValueError(
                f"expected float32 {[queries, examples]} in {folder / 'scores.npy'}, got {list(self.matrix.shape)}; "
                "run compute_influence.py again"
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
