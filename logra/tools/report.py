"""Write report.html: the scores of a query set for a reader, in one file of at most 5 MB that needs no network.

report.html.j2 is the page's template. Jinja2 escapes all texts (autoescape).
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import bm25s
import jinja2
import numpy as np

from logra.run_dir import RunDir
from logra.stages.rank import load_matrix
from logra.stages.score_files import ScoreRecord

MAX_REPORT_BYTES = 5_000_000
MIN_QUERY_BYTES = 2_000  # a query takes at least this many
MIN_CARDS = 5  # examples shown on each side of a query
MAX_BM25_TEXTS = 100_000  # the index is in memory
HISTOGRAM_BINS = 60
SHADE_LEVELS = 4  # for shares above 0, and as many for shares below


class Shaded(NamedTuple):
    """Neighbouring tokens of one shade: level -SHADE_LEVELS to SHADE_LEVELS, text, and summed share of the score."""

    level: int
    text: str
    share: float


def header(run: RunDir, scores: ScoreRecord, shaded: bool) -> dict:
    """Return what the page shows for all queries together: run, scores, and the settings of both."""
    settings: dict = {"run": str(run.folder), "queries": scores.split, "query_loss": scores.query_loss}
    settings |= {name: value for name, value in asdict(run.settings).items() if value not in (None, False)}
    settings |= {"layers": f"{len(scores.layers)} of {len(run.layers)}"}
    return {"run": run, "scores": scores, "settings": settings, "shaded": shaded}


def shade(pieces: list[tuple[str, float]]) -> list[Shaded]:
    """Return a text's pieces (text, share) with shades relative to the largest share. Equal neighbours are joined."""
    largest = max((abs(share) for _, share in pieces), default=0.0) or 1.0
    shaded: list[Shaded] = []
    for text, share in pieces:
        level = round(SHADE_LEVELS * share / largest)
        if shaded and shaded[-1].level == level:
            shaded[-1] = Shaded(level, shaded[-1].text + text, shaded[-1].share + share)
        else:
            shaded.append(Shaded(level, text, share))
    return shaded


def histogram(values: np.ndarray) -> dict:
    """Return what the page draws for all scores of a query; positions and lengths are from 0 to 100.

    Returns:
        bars (x, width, height, count), low and high score, and count. A bar's height is the square root of its count,
        so that a single score is visible beside a thousand.
    """
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS)
    heights = 100 * np.sqrt(counts / max(counts.max(), 1))
    width = 100 / HISTOGRAM_BINS
    bars = [(i * width, width, h, int(n)) for i, (h, n) in enumerate(zip(heights, counts, strict=True)) if n]
    return {"bars": bars, "low": float(edges[0]), "high": float(edges[-1]), "count": len(values)}


def bm25_scores(texts: list[str], query_texts: list[str]) -> Iterator[np.ndarray]:
    """Yield the BM25 scores of all texts, [N], for each query (Lucene's variant, lower case, no stemming)."""
    options = {"stopwords": None, "return_ids": False, "show_progress": False}
    index, words = bm25s.BM25(), bm25s.tokenize(texts, **options)
    if any(words):  # bm25s fails without a word, which has at least two letters
        index.index(words, show_progress=False)
    for query in bm25s.tokenize(query_texts, **options):
        yield index.get_scores(query) if query and any(words) else np.zeros(len(texts), np.float32)


def render(content: dict, queries: list[dict], top_k: int) -> str:
    """Return the page. If it is too large, show fewer cards per query and side, then fewer queries.

    Args:
        content: What the page shows for all queries together (see header).
        queries: What it shows for each query; `rows` is {"top": rows, "bottom": rows}, a card for each row.
        top_k: Cards on each side.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shade"] = shade
    template = environment.get_template("report.html.j2")
    cards, count = top_k, min(len(queries), MAX_REPORT_BYTES // MIN_QUERY_BYTES)
    while True:
        page = template.render(content, queries=queries[:count], cards=cards, top_k=top_k, total=len(queries))
        if len(page.encode()) <= MAX_REPORT_BYTES or cards == count == 1:
            return page
        if cards > MIN_CARDS or count == 1:
            cards //= 2
        else:
            count //= 2


def add_layers(queries: list[dict], folder: Path, record: ScoreRecord) -> None:
    """Add the mean dots of each block of layers to the queries, if stage 3 wrote them (--layerwise)."""
    if record.blocks is None:
        return
    shape = (len(record.blocks), len(queries), record.num_examples)
    dots = load_matrix(folder / "layer_scores.npy", shape)  # [L, Q, N]
    for number, query in enumerate(queries):
        proponents = [row["example"] for row in query["rows"]["top"]]
        means = dots[:, number, proponents].mean(axis=1).tolist()
        query["layers"] = dict(zip(record.blocks, means, strict=True))


def add_word_matches(queries: list[dict], texts: list[str], k: int) -> None:
    """Add the BM25 ranks of the examples shown, if these are among the k best. Nothing if there are too many texts."""
    if len(texts) > MAX_BM25_TEXTS:
        return
    query_texts = [query["prompt"] + query["response"] for query in queries]
    for query, scores in zip(queries, bm25_scores(texts, query_texts), strict=True):
        best = np.argsort(-scores, kind="stable")[:k].tolist()
        ranks = {example: rank for rank, example in enumerate(best, 1) if scores[example] > 0}
        query["word_matches"] = True
        for row in [*query["rows"]["top"], *query["rows"]["bottom"]]:
            row["word_rank"] = ranks.get(row["example"])
