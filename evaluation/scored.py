"""What the evaluations share: a folder of the pipeline's scores, checked, and bootstrap intervals over queries.

Notation: Q queries, N train examples.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from logra.run_dir import RunDir
from logra.runtime import files
from logra.runtime.flags import Parser
from logra.scoring.rank import load_matrix, read_queries, read_record, scored_runs
from logra.scoring.reranked import Reranked
from logra.scoring.score_files import ScoreRecord

BOOTSTRAP_SAMPLES = 2000


class Scored(NamedTuple):
    """Scores [Q, N] float32, the ids of the queries [Q] and of the documents [N], the run, the scores' run.json.

    Of combined scores the run is that of the last checkpoint.
    """

    scores: np.ndarray
    queries: list[str]
    documents: list[str]
    run: RunDir
    record: ScoreRecord


def load(folder: Path) -> Scored:
    """Read a folder under logs/<run>/scores/.

    Raises:
        ValueError: It holds no scores, or only the highest and lowest ones (--top_k_only); it was altered; or the run
            has other examples now.
    """
    remedy = "give a folder under logs/<run>/scores/"
    content = files.read_json(folder / "run.json", remedy)
    if "top_k_only" not in content:
        raise ValueError(f"expected scores in {folder}, got something else; {remedy}")
    if content["top_k_only"]:
        raise ValueError(
            f"expected all scores in {folder}, got the highest and lowest ones; score without --top_k_only"
        )
    run = scored_runs(folder.absolute())[-1]
    record = read_record(folder, run)
    scores = load_matrix(folder / "scores.npy", (record.num_queries, run.examples))
    queries = [row["id"] for row in read_queries(folder / "queries.jsonl")]
    return Scored(scores, queries, run.train()["document_id"][:], run, record)


def rankings(folder: Path, found: Scored) -> dict[str, np.ndarray]:
    """Return a folder's scores [Q, N] and, if it has re-ranked ones, what orders the examples as those do, by name.

    The second are minus an example's place, from 0. The K candidates with the highest new scores come first, then what
    is no candidate, by stored score, then the other candidates.
    """
    rows, again = {str(folder): found.scores}, Reranked.load(folder, found.record, None)
    if again is not None:
        places = np.empty(found.scores.shape)
        for query, stored in enumerate(found.scores):
            ids, scores = again.candidates(query)
            ids = ids[np.argsort(-scores, kind="stable")]
            order = np.argsort(-stored, kind="stable")
            first, last = np.split(ids, [again.record.kept])
            order = np.concatenate([first, order[~np.isin(order, ids)], last])
            places[query, order] = np.arange(len(stored))
        rows[f"{folder}, re-ranked"] = -places
    return rows


def by_document(folder: Path, ids: list[str], queries: list[str]) -> dict[str, np.ndarray]:
    """Return a folder's rankings [Q, D] of these documents (of each that of its best example) and queries."""
    found = load(folder)
    if set(found.documents) != set(ids) or found.queries != queries:
        raise ValueError(f"expected scores of corpus.jsonl for queries.jsonl in {folder}, got others; score these")
    place, rows = {name: i for i, name in enumerate(ids)}, {}
    places = [place[document] for document in found.documents]
    for name, scores in rankings(folder, found).items():
        best = np.full((len(ids), len(queries)), -np.inf)
        np.maximum.at(best, places, scores.T)
        rows[name] = best.T
    return rows


def made_with(path: Path, flags: dict[str, Any], parser: Parser) -> dict[str, Any]:
    """Return the settings that a folder was made with. A flag has to be at its default, or to agree with them.

    Raises:
        ValueError: A flag differs from its setting, or the settings were altered.
    """
    settings = files.read_json(path, f"delete {path.parent}")
    for name, value in flags.items():
        if value not in (settings[name], parser.get_default(name)):
            raise ValueError(f"expected --{name} {settings[name]} (from {path}), got {value}; use another folder")
    return settings


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a .jsonl file."""
    return [json.loads(line) for line in files.read_lines(path)]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a .jsonl file."""
    with files.atomic(path) as made:
        made.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def bootstrap_samples(queries: int) -> np.ndarray:
    """Return the numbers of the queries in each bootstrap sample, [BOOTSTRAP_SAMPLES, Q]; the same at each call."""
    return np.random.default_rng(0).integers(0, queries, (BOOTSTRAP_SAMPLES, queries))


def bootstrap_counts(size: int, seed: int) -> np.ndarray:
    """Return how often each bootstrap sample holds each of `size` members, [BOOTSTRAP_SAMPLES, size] float64."""
    random = np.random.default_rng(seed)
    return random.multinomial(size, np.full(size, 1 / size), BOOTSTRAP_SAMPLES).astype(np.float64)


def interval(values: np.ndarray) -> str:
    """Return `mean [low, high]` of one value for each query, with the 95% bootstrap interval over the queries."""
    low, high = np.percentile(values[bootstrap_samples(len(values))].mean(axis=1), (2.5, 97.5))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def print_table(head: list[str], rows: list[list]) -> None:
    """Print a table in Markdown. A cell that is an array holds one value for each query (see interval)."""
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(interval(cell) if isinstance(cell, np.ndarray) else str(cell) for cell in row)} |")
