"""What the evaluations share: a folder of the pipeline's scores, checked, and bootstrap intervals over queries.

Notation: Q queries, N train examples.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from logra.run_dir import RunDir
from logra.runtime import files
from logra.stages.rank import check_scores, load_matrix, read_queries

RESAMPLES = 2000


class Scored(NamedTuple):
    """Scores [Q, N] float32, the ids of the queries [Q] and of the documents [N], the run, the scores' run.json."""

    scores: np.ndarray
    queries: list[str]
    documents: list[str]
    log: RunDir
    about: dict


def load(folder: Path) -> Scored:
    """Read a folder under logs/<run>/scores/.

    Raises:
        ValueError: It is none, holds the ends of the scores only (--top_k_only), was altered, or its run has other
            examples now.
    """
    about = files.read_json(folder / "run.json", "give a folder under logs/<run>/scores/")
    if "top_k_only" not in about:
        raise ValueError(f"expected scores in {folder}, got something else; give a folder under logs/<run>/scores/")
    if about["top_k_only"]:
        raise ValueError(f"expected all scores in {folder}, got their ends; score without --top_k_only")
    log = RunDir.load(folder.absolute().parents[1])
    check_scores(folder, about, log)
    scores = load_matrix(folder / "scores.npy", (about["num_queries"], log.examples))
    queries = read_queries(folder / "queries.jsonl")
    return Scored(scores, [row["id"] for row in queries], log.train()["document_id"][:], log, about)


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a .jsonl file."""
    return [json.loads(line) for line in files.read_lines(path)]


def interval(values: np.ndarray) -> str:
    """Return `mean [low, high]` of a value a query, with the 95% bootstrap interval over the queries."""
    chosen = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), (2.5, 97.5))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def print_table(head: list[str], rows: list[list]) -> None:
    """Print a table in Markdown; an array in it holds a value a query (see interval)."""
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(interval(cell) if isinstance(cell, np.ndarray) else str(cell) for cell in row)} |")
