"""Read scores, and rank train examples, documents or groups of examples for each query.

Notation: Q queries, N train examples, n ranked ones. The highest scores are the top, the lowest the bottom.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from logra import store
from logra.influence import top_k
from logra.inputs.groups import kept_values, label
from logra.run_dir import RunDir
from logra.runtime import files
from logra.scoring.score_files import AGAIN, ScoreRecord, are_checkpoints, extremes_layout

MAX_NAME = 200  # characters of a group's name in a line
WHOLE = ("sum", "mean")  # scores of documents or groups that are formed from all of their examples


class Ranking(NamedTuple):
    """Examples, documents or groups of examples in the order of their scores.

    Attributes:
        examples: Example ids [n]; for a document or group, the id of its first example in the ranking.
        scores: [n].
        counts: Number of examples of the run that each score stands for, [n].
        combine: None for examples; else how the scores were formed (see by_document).
        stored: Of re-ranked scores: the stored ones [n], and the ranks that these have on this side.
    """

    examples: np.ndarray
    scores: np.ndarray
    counts: np.ndarray
    combine: str | None = None
    stored: tuple[np.ndarray, np.ndarray] | None = None

    def without(self, others: np.ndarray, same: np.ndarray) -> "Ranking":
        """Leave out the examples `others`, and those that count as the same: `same` has a number for each, [N]."""
        return self.take(~np.isin(same[self.examples], same[others]))

    def first_of(self, same: np.ndarray) -> "Ranking":
        """Keep the first of those that count as the same (see `without`)."""
        return self.take(np.sort(np.unique(same[self.examples], return_index=True)[1]))

    def take(self, rows: np.ndarray | slice) -> "Ranking":
        """Return some rows of the ranking."""
        stored = self.stored and (self.stored[0][rows], self.stored[1][rows])
        return Ranking(self.examples[rows], self.scores[rows], self.counts[rows], self.combine, stored)

    def with_stored(self, ranking: "Ranking", owners: np.ndarray) -> "Ranking":
        """Add the stored scores, and their ranks, from a ranking of them. What is not in it gets NaN and rank 0."""
        units = owners if self.combine else np.arange(len(owners))
        known = np.full(len(owners), -1)
        known[units[ranking.examples]] = np.arange(len(ranking.examples))
        places = known[units[self.examples]]
        return self._replace(stored=(np.where(places < 0, np.nan, ranking.scores[places]), places + 1))


def load_matrix(path: Path, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Return a memory-mapped matrix.

    Raises:
        ValueError: It is missing or damaged, or has another dtype or shape.
    """
    expected = f"{dtype} {list(shape)}"
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
        actual = f"{matrix.dtype} {list(matrix.shape)}"
    except (OSError, ValueError, EOFError) as error:
        actual = str(error)
    if actual != expected:
        raise ValueError(f"expected {expected} in {path}, got {actual}; {AGAIN}")
    return matrix


def newest_scores(log_dir: Path | None, split: str | None) -> Path:
    """Return the folder of the newest scores: only of the run log_dir and of the query set split, where they are given.

    Raises:
        ValueError: There are no such scores.
    """
    root = Path("logs") if log_dir is None else log_dir
    pattern = "*/scores/*/run.json" if log_dir is None else "scores/*/run.json"
    for path in sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True):
        content = files.read_json(path, AGAIN)
        if path.parent.suffix != ".tmp" and split in (None, content.get("split")):
            return path.parent
    of_split = f" of --split {split}" if split else ""
    raise ValueError(f"expected scores{of_split} under {root}, got none; run compute_influence.py first")


def scored_runs(folder: Path) -> list[RunDir]:
    """Return the run that a folder of scores is of; of combined scores the runs of all checkpoints, in order.

    The last run is the one whose examples and settings count.

    Raises:
        ValueError: run.json is missing or damaged, there or in a run; or the runs have other examples or layers.
    """
    checkpoints = files.read_json(folder / "run.json", AGAIN).get("checkpoints")
    if checkpoints is None:
        return [RunDir.load(folder.parents[1])]
    if not are_checkpoints(checkpoints):
        raise ValueError(f"expected checkpoints in {folder / 'run.json'}, got other entries; {AGAIN}")
    *others, last = (RunDir.load(folder.parents[1] / checkpoint["run"]) for checkpoint in checkpoints)
    for run in others:
        if (run.fingerprints, run.layers) != (last.fingerprints, last.layers):
            raise ValueError(f"expected the examples and layers of {last.folder} in {run.folder}, got others; {AGAIN}")
    return [*others, last]


def read_record(folder: Path, run: RunDir) -> ScoreRecord:
    """Return run.json of a folder of scores after checking the folder's files.

    Raises:
        ValueError: The files were altered, or the scores are not of the run's examples.
    """
    content = files.read_json(folder / "run.json", AGAIN)
    try:
        record = ScoreRecord.from_json(content, run.layers)
        scored_examples = (RunDir(folder, record.log).fingerprints, record.num_examples)
        same_examples = scored_examples == (run.fingerprints, run.examples)
    except (ValueError, TypeError):
        same_examples = False
    if not same_examples:
        raise ValueError(f"expected scores of {run.folder}'s examples in {folder}, got others; {AGAIN}")
    if files.file_checksums(folder, record.files) != record.files:
        raise ValueError(f"expected {folder} as it was written, got other files; {AGAIN}")
    return record


def read_queries(path: Path) -> list[dict]:
    """Return the rows of a queries.jsonl in a folder of scores.

    Raises:
        ValueError: The file is missing or damaged.
    """
    try:
        rows = [files.parse_json(line) for line in files.read_lines(path)]
    except (OSError, ValueError) as error:
        raise ValueError(f"expected queries in {path}, got {error}; {AGAIN}") from error
    if not files.has_shape(rows, [{"id": str}]):
        raise ValueError(f"expected an id in each row of {path}, got other rows; {AGAIN}")
    return rows


class StoredScores:
    """The scores in a folder: all of them, or the two ends of each ranking (--top_k_only).

    Attributes:
        matrix: [Q, N], or None with --top_k_only.
        extremes: With --top_k_only, largest or not -> scores and ids [Q, K].

    Raises:
        ValueError: The files are missing or altered, or do not fit Q queries and N examples.
    """

    def __init__(self, folder: Path, queries: int, examples: int, top_k_only: int | None, checkpoints: int = 0):
        self.matrix: np.ndarray | None = None
        self.extremes: dict[bool, dict[str, torch.Tensor]] = {}
        if top_k_only is None:
            self.matrix = load_matrix(folder / "scores.npy", (queries, examples))
            return
        layout = extremes_layout(queries, min(top_k_only, examples), checkpoints)
        for largest, name in ((True, "top"), (False, "bottom")):
            path = folder / f"{name}.safetensors"
            try:
                tensors = store.load_tensors(path, files.read_json(path.with_suffix(".json"), ""), layout)
            except ValueError as error:
                raise ValueError(f"expected scores in {folder}, got {error}; {AGAIN}") from error
            ids = tensors["ids"]
            if ids.numel() and not 0 <= ids.min() <= ids.max() < examples:
                raise ValueError(f"expected ids of {examples} examples in {path}, got others; {AGAIN}")
            self.extremes[largest] = tensors

    def ranking(self, query: int, largest: bool) -> Ranking:
        """Rank the examples whose scores are stored for a query, highest (or lowest) score first."""
        if self.matrix is None:
            ids, scores = (self.extremes[largest][key][query].numpy() for key in ("ids", "scores"))
        else:
            return rank_scores(np.arange(self.matrix.shape[1]), np.array(self.matrix[query]), largest)
        return Ranking(ids, scores, np.ones(len(ids), np.int64))


def rank_scores(ids: np.ndarray, scores: np.ndarray, largest: bool) -> Ranking:
    """Rank examples, whose ids [n] ascend, by scores [n], highest (or lowest) first."""
    order = top_k(torch.from_numpy(scores), len(scores), largest).numpy()
    return Ranking(ids[order], scores[order], np.ones(len(ids), np.int64))


def rank_again(
    ids: np.ndarray, scores: np.ndarray, stored: Ranking, largest: bool, kept: int, owners: np.ndarray
) -> Ranking:
    """Rank a query's candidates [n] by their re-ranked scores [n]; at most `kept` of them, with the stored scores.

    Args:
        ids: Example ids, ascending.
        scores: Of the examples.
        stored: The ranking of the stored scores on the same side: of examples or documents.
        largest: The ranking starts with the highest score.
        kept: K.
        owners: Number of each example's document, [N].
    """
    ranking = rank_scores(ids, scores, largest)
    if stored.combine:
        ranking = by_document(ranking, owners, largest, stored.combine)
    return ranking.take(slice(kept)).with_stored(stored, owners)


def by_document(ranking: Ranking, owners: np.ndarray, largest: bool, combine: str) -> Ranking:
    """Rank documents, or other groups, instead of examples. Each is shown by the first of its examples.

    Args:
        ranking: Of examples.
        owners: Number of each example's document or group, [N].
        largest: The ranking starts with the highest score.
        combine: The `sum` or `mean` of the examples' scores (then `ranking` has all examples of those documents), or
            `max`, the score of the first example.
    """
    documents, first, inverse = np.unique(owners[ranking.examples], return_index=True, return_inverse=True)
    scores, counts = ranking.scores[first], np.bincount(owners)[documents]
    if combine in WHOLE:
        sums = np.bincount(inverse, weights=ranking.scores)
        scores = (sums / counts if combine == "mean" else sums).astype(np.float32)
    order = np.lexsort((ranking.examples[first], -scores if largest else scores))
    return Ranking(ranking.examples[first][order], scores[order], counts[order], combine)


def examples_of_score(row: dict[str, Any], owners: np.ndarray) -> np.ndarray:
    """Return the ids of the examples whose scores add up to that of a row of ranked_rows, or have it as their mean.

    Args:
        row: The row.
        owners: Number of each example's document or group, [N].
    """
    return np.flatnonzero(owners == owners[row["example"]]) if row["combine"] in WHOLE else np.array([row["example"]])


def part_of_score(row: dict[str, Any], parts: np.ndarray) -> np.ndarray:
    """Return the parts of a row's score, [C], from those of the scores of examples_of_score, [C, m]."""
    return parts.mean(axis=1) if row["combine"] == "mean" else parts.sum(axis=1)


def query_text(query: dict) -> dict[str, Any]:
    """Return what to show for a row of queries.jsonl.

    Returns:
        id, prompt, response; rejected, the other answer of a contrast; cut, whether the response was cut; words, the
        text without the names of roles; group, which queries a group consists of.
    """
    text, prompt, response = (str(query.get(key) or "") for key in ("text", "prompt", "response"))
    shown: dict[str, Any] = {"id": str(query["id"]), "prompt": prompt or text, "response": response, "group": ""}
    shown["rejected"] = str(query.get("rejected") or "") if response else ""
    shown["cut"] = query.get("cut") is True
    shown["words"] = shown["prompt"] + response
    if shown["prompt"]:
        return shown
    if files.has_shape(query.get("messages"), [{"role": str, "content": str}]):
        shown["prompt"] = "\n".join(f"{turn['role']}: {turn['content']}" for turn in query["messages"])
        shown["words"] = "\n".join(turn["content"] for turn in query["messages"])
    elif files.has_shape(query.get("queries"), [{"id": str}]):  # see merge_group in logra/inputs/queries.py
        members = [query_text(member | {"queries": None}) for member in query["queries"]]
        count = "1 query" if len(members) == 1 else f"{len(members)} queries"
        shown["group"] = f"mean gradient of {count}: {', '.join(member['id'] for member in members)}"
        shown["prompt"] = "\n".join(member["prompt"] + member["response"] for member in members)
        shown["words"] = "\n".join(member["words"] for member in members)
    return shown


def percentile_and_z_score(scores: np.ndarray, values: np.ndarray | None) -> list[dict[str, float | None]]:
    """Return the percentile (share of lower scores, 0 to 100) and the z-score of each of `scores`.

    Args:
        scores: Some of a query's scores, [n].
        values: All of its scores that were formed like these, highest first, [N]; None if they were not kept.
    """
    if values is None:
        return [{"percentile": None, "z": None}] * len(scores)
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    shares_below = np.searchsorted(values[::-1], scores) / len(values)
    z_scores = (scores.astype(np.float64) - mean) / deviation if deviation > 0 else np.zeros(len(scores))
    return [{"percentile": 100 * p, "z": z} for p, z in np.stack([shares_below, z_scores], axis=1).tolist()]


def ranked_rows(
    query: dict[str, Any], side: str, ranking: Ranking, count: int, examples: Dataset, values: np.ndarray | None
) -> list[dict[str, Any]]:
    """Return the first `count` rows of a ranking, for top_k.* and the report.

    Args:
        query: The query's row of queries.jsonl.
        side: top or bottom.
        ranking: Of examples or documents.
        count: Rows at most.
        examples: The run's train examples.
        values: All stored scores of the query (see percentile_and_z_score).
    """
    ids, scores, counts = (getattr(ranking, name)[:count].tolist() for name in ("examples", "scores", "counts"))
    stored, ranks = ranking.stored or (ranking.scores, None)
    places, columns = percentile_and_z_score(stored[:count], values), examples[ids]
    rows = []
    for n in range(len(ids)):
        example = {name: column[n] for name, column in columns.items()}
        row = {"query": query["id"], "side": side, "rank": n + 1, "score": scores[n], "example": ids[n]}
        row |= {"combine": ranking.combine, "examples": counts[n]} | places[n]
        row |= {"document": example["document_id"], "block": example.get("block")}
        if ranks is not None:
            known = ranks[n] > 0  # else --top_k_only did not keep the score
            row["stored_score"], row["stored_rank"] = (v[n].item() if known else None for v in (stored, ranks))
        row |= {"documents": example["document_ids"]} if "document_ids" in example else {}
        row |= {"kept": kept_values(example)} if "kept" in example else {}
        rows.append(row | {"text": example["text"]})
    return rows


def shortage(found: int, asked: int, total: int, on_top: int, unit: str, reranked: int | None = None) -> list[str]:
    """Return a line that says why a side of a query has fewer rows than were asked for; none if it has not.

    Args:
        found: Rows.
        asked: Rows that were asked for.
        total: Examples, documents or groups (`unit`) of the run.
        on_top: For the bottom: rows of the top, which are not shown twice.
        unit: examples, documents or groups.
        reranked: On each side at most, with --rerank.
    """
    if found >= asked:
        return []
    reason = f"the run has {total} {unit}" + (f", of which {on_top} have the highest scores" if on_top else "")
    if found < min(asked, total - on_top):
        reason = f"--rerank {reranked} computed no more" if reranked else "--top_k_only kept no more"
    return [f"{'Lowest' if on_top else 'Highest'} scores: {found} instead of {asked}, since {reason}"]


def name_and_count(row: dict[str, Any]) -> tuple[str, str]:
    """Return the name of what a row of ranked_rows is of (--pack: all its documents), and how many that is, or ""."""
    copies = f" x{row['copies']}" if row.get("copies", 1) > 1 else ""
    if "by" in row:
        name = label(row["group"])
        name = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
        return name, f" ({row['examples']} example{'s' if row['examples'] > 1 else ''})"
    return ", ".join(row.get("documents") or [row["document"]]), copies


def document_names(row: dict[str, Any]) -> str:
    """Return what to call what a row of ranked_rows is of: documents, or a group, with their number."""
    return "".join(name_and_count(row))


def move(row: dict[str, Any]) -> str:
    """Return where a row of re-ranked scores stood by its stored score, if that was elsewhere; else nothing."""
    before = row.get("stored_rank", row["rank"])
    return "" if before == row["rank"] else f"stored rank {before}" if before else "stored rank not kept"


def scored_examples(row: dict[str, Any]) -> str:
    """Return what the score of a row of ranked_rows is of, and which example its text is of."""
    example, extreme = f"example {row['example']}", "highest" if row["side"] == "top" else "lowest"
    example += f" of {row['document']}" if "by" in row else ""
    if row["combine"] is None or row["examples"] == 1:
        return example
    if row["combine"] == "max":
        return f"{example}, the {extreme} of {row['examples']}"
    return f"{row['combine']} of {row['examples']} examples; text of {example}, the {extreme}"
