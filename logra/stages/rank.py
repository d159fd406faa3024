"""What stage 3 wrote, ranked: the best and the worst examples, or documents, of each query.

Notation: Q queries, N train examples.
"""

import csv
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from logra import store
from logra.influence import top_k
from logra.run_dir import RunDir
from logra.runtime import files
from logra.runtime.progress import printable
from logra.stages.score_files import ScoreRecord, extremes_layout

CSV_COLUMNS = (
    "query", "side", "rank", "score", "percentile", "z", "document", "example", "examples", "block", "text",
)  # fmt: skip


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


def newest_scores(log_dir: Path | None, split: str | None) -> Path:
    """Return the folder of the newest scores (of a run, of a query set).

    Raises:
        ValueError: There are none.
    """
    root = Path("logs") if log_dir is None else log_dir
    pattern = "*/scores/*/run.json" if log_dir is None else "scores/*/run.json"
    for path in sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True):
        content = files.read_json(path, "run compute_influence.py again")
        if path.parent.suffix != ".tmp" and split in (None, content.get("split")):
            return path.parent
    wanted = f" of --split {split}" if split else ""
    raise ValueError(f"expected scores{wanted} under {root}, got none; run compute_influence.py first")


def read_record(folder: Path, run: RunDir) -> ScoreRecord:
    """Return run.json of a folder of scores, after checking the folder.

    Raises:
        ValueError: It is not as it was written, or not of the run's examples.
    """
    content = files.read_json(folder / "run.json", "run compute_influence.py again")
    try:
        record = ScoreRecord.from_json(content, run.layers)
        same_examples = RunDir(folder, record.log).fingerprints == run.fingerprints
    except (ValueError, TypeError):
        same_examples = False
    if not same_examples:
        raise ValueError(
            f"expected scores of {run.folder}'s examples in {folder}, got others; run compute_influence.py again"
        )
    if files.file_checksums(folder, record.files) != record.files:
        raise ValueError(f"expected {folder} as it was written, got other files; run compute_influence.py again")
    return record


def read_queries(path: Path) -> list[dict]:
    """Return the rows of the queries.jsonl of scores.

    Raises:
        ValueError: It is missing or damaged.
    """
    try:
        rows = [files.parse_json(line) for line in files.read_lines(path)]
    except (OSError, ValueError) as error:
        raise ValueError(f"expected queries in {path}, got {error}; run compute_influence.py again") from error
    if not files.has_shape(rows, [{"id": str}]):
        raise ValueError(f"expected an id in each row of {path}, got other rows; run compute_influence.py again")
    return rows


class StoredScores:
    """The scores of a folder: all of them, or with --top_k_only (k) the ends.

    Raises:
        ValueError: They are missing, altered, or not of Q queries and N examples.
    """

    def __init__(self, folder: Path, queries: int, examples: int, k: int | None):
        self.extremes: dict[bool, dict[str, torch.Tensor]] = {}
        if k is None:
            self.matrix = load_matrix(folder / "scores.npy", (queries, examples))
            return
        layout = extremes_layout(queries, min(k, examples))
        for largest, name in ((True, "top"), (False, "bottom")):
            path = folder / f"{name}.safetensors"
            try:
                self.extremes[largest] = store.load_tensors(
                    path, files.read_json(path.with_suffix(".json"), ""), layout
                )
            except ValueError as error:
                raise ValueError(f"expected scores in {folder}, got {error}; run compute_influence.py again") from error
            ids = self.extremes[largest]["ids"]
            if ids.numel() and not 0 <= ids.min() <= ids.max() < examples:
                raise ValueError(
                    f"expected ids of {examples} examples in {path}, got others; run compute_influence.py again"
                )

    def ranking(self, query: int, largest: bool) -> Ranking:
        """Return the examples of a query, best (or worst) first, as far as they are known."""
        if self.extremes:
            ids, scores = (self.extremes[largest][key][query].numpy() for key in ("ids", "scores"))
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


def query_text(query: dict) -> dict[str, str]:
    """Return the id, prompt and response that are shown of a row of queries.jsonl."""
    text, prompt, response = (str(query.get(key) or "") for key in ("text", "prompt", "response"))
    if not (text or prompt) and files.has_shape(query.get("messages"), [{"role": str, "content": str}]):
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in query["messages"])
    return {"id": str(query["id"]), "prompt": prompt or text, "response": response}


def percentile_and_z_score(scores: np.ndarray, values: np.ndarray | None) -> list[dict[str, float | None]]:
    """Return the percentile (share of scores below, 0 to 100) and the z-score of each of `scores` among all.

    Args:
        scores: Some of a query's scores, [n].
        values: All of them, highest first, [N]; None where they are not known.
    """
    if values is None:
        return [{"percentile": None, "z": None}] * len(scores)
    mean, spread = (float(of(values, dtype=np.float64)) for of in (np.mean, np.std))
    below = np.searchsorted(values[::-1], scores) / len(values)
    zs = (scores.astype(np.float64) - mean) / spread if spread > 0 else np.zeros(len(scores))
    return [{"percentile": 100 * p, "z": z} for p, z in np.stack([below, zs], axis=1).tolist()]


def ranked_rows(
    query: dict[str, Any], side: str, ranking: Ranking, count: int, examples: Dataset, values: np.ndarray | None
) -> list[dict[str, Any]]:
    """Return the first `count` rows of a query's ranking, for top_k.* and the report.

    Args:
        query: Its row of queries.jsonl.
        side: top or bottom.
        ranking: Of examples or documents.
        count: Rows at most.
        examples: The run's train examples.
        values: All scores of the query (see percentile_and_z_score).
    """
    ids, scores, counts = (part[:count] for part in ranking)
    shown, places = examples[ids.tolist()], percentile_and_z_score(scores, values)
    rows = []
    for n, (i, score, of) in enumerate(zip(ids.tolist(), scores.tolist(), counts.tolist(), strict=True)):
        example = {name: column[n] for name, column in shown.items()}
        row = {"query": query["id"], "side": side, "rank": n + 1, "score": score, "example": i, "examples": of}
        row |= places[n] | {"document": example["document_id"], "block": example.get("block")}
        row |= {"documents": example["document_ids"]} if "document_ids" in example else {}
        rows.append(row | {"text": example["text"]})
    return rows


def write_lists(
    folder: Path, queries: Sequence[dict[str, Any]], sides: Sequence[str], formats: Collection[str]
) -> None:
    """Write top_k.jsonl, top_k.csv and top_k.txt, as far as `formats` names them.

    Args:
        folder: Where to.
        queries: id, prompt, response, and rows ({"top": ranked_rows, "bottom": ranked_rows}) of each query.
        sides: Which rows.
        formats: Of jsonl, csv and txt.
    """
    rows = [row for query in queries for side in sides for row in query["rows"][side]]
    if "jsonl" in formats:
        with files.atomic(folder / "top_k.jsonl") as path:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    if "csv" in formats:
        with files.atomic(folder / "top_k.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows({key: no_formula(value) for key, value in row.items()} for row in rows)
    if "txt" in formats:
        with files.atomic(folder / "top_k.txt") as path:
            path.write_text(printable("\n".join(text_lines(queries, sides))), "utf-8")


def no_formula(value: Any) -> Any:
    """Return a cell of top_k.csv: a text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value


def text_lines(queries: Sequence[dict[str, Any]], sides: Sequence[str]) -> list[str]:
    """Return the lines of top_k.txt; see write_lists."""
    lines = []
    for query in queries:
        lines += ["=" * 100, f"Query {query['id']}: {query['prompt']}", query["response"], ""]
        for row in (row for side in sides for row in query["rows"][side]):
            place = f"{row['document']}  (example {row['example']})"
            lines += [f"--- {row['side']} {row['rank']}: {row['score']:+.4g}  {place}", row["text"].strip(), ""]
    return lines
