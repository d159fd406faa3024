"""report.html: what a person sees of a query set's scores. One file, without a network, at most 5 MB.

Texts come from data and are escaped by Jinja2 (autoescape); report.html.j2 holds the page, its styles and its script.
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
MIN_QUERY_BYTES = 2_000  # of a query
MIN_CARDS = 5
MAX_BM25_TEXTS = 100_000  # for BM25, whose index is in memory
HISTOGRAM_BINS = 60  # of the histogram
SHADE_LEVELS = 4  # of a token's shade, on each side of none


class Shaded(NamedTuple):
    """Tokens of equal shade, -SHADE_LEVELS (lower the score) to SHADE_LEVELS: their text and summed share."""

    level: int
    text: str
    share: float


def header(run: RunDir, scores: ScoreRecord, shaded: bool) -> dict:
    """Return what the page says of all queries together: the run's and the scores' settings."""
    damping = scores.damping if scores.damping is not None else f"{scores.damping_absolute} (absolute)"
    settings: dict = {"run": str(run.folder), "queries": scores.split, "query_loss": scores.query_loss}
    settings |= {name: value for name, value in asdict(run.settings).items() if value not in (None, False)}
    settings |= {"layers": f"{len(scores.layers)} of {len(run.layers)}", "model": run.record.model["class"]}
    settings |= {"model fingerprint": run.record.model["fingerprint"]}
    settings |= {"data fingerprint": ", ".join(run.fingerprints), "versions": run.record.versions}
    return {
        "title": run.folder.name, "examples": run.examples, "mode": scores.mode, "hessian": scores.hessian,
        "damping": damping, "settings": settings, "shaded": shaded,
        "rounded": run.settings.store_dtype if run.settings.bits else None,
    }  # fmt: skip


def shade(pieces: list[tuple[str, float]]) -> list[Shaded]:
    """Return a text's pieces with their shades, in units of the largest share, equal neighbours joined."""
    largest = max((abs(share) for _, share in pieces), default=0.0) or 1.0
    found: list[Shaded] = []
    for text, share in pieces:
        level = round(SHADE_LEVELS * share / largest)
        if found and found[-1].level == level:
            found[-1] = Shaded(level, found[-1].text + text, found[-1].share + share)
        else:
            found.append(Shaded(level, text, share))
    return found


def histogram(values: np.ndarray, marked: dict[str, list[float]]) -> dict:
    """Return bars (x, width, height, count), marks (side, x) and the ends of a query's scores; lengths from 0 to 100.

    A bar's height is the root of its count, so that a single score is seen beside a thousand.
    """
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS)
    low, high = float(edges[0]), float(edges[-1])
    heights = 100 * np.sqrt(counts / max(counts.max(), 1))
    width = 100 / HISTOGRAM_BINS
    bars = [(i * width, width, h, int(n)) for i, (h, n) in enumerate(zip(heights, counts, strict=True)) if n]
    marks = [(side, 100 * (v - low) / (high - low)) for side, scores in marked.items() for v in scores]
    zero = 100 * -low / (high - low) if low < 0 < high else None
    return {"bars": bars, "marks": marks, "low": low, "high": high, "zero": zero, "count": len(values)}


def bm25_scores(texts: list[str], query_texts: list[str]) -> Iterator[np.ndarray]:
    """Yield the BM25 scores of all texts, [N], for each query (Lucene's, lower case, no stemming)."""
    options = {"stopwords": None, "return_ids": False, "show_progress": False}
    index, words = bm25s.BM25(), bm25s.tokenize(texts, **options)
    if any(words):  # of two letters at least; bm25s needs one, of a query too
        index.index(words, show_progress=False)
    for query in bm25s.tokenize(query_texts, **options):
        yield index.get_scores(query) if query and any(words) else np.zeros(len(texts), np.float32)


def word_matches(texts: list[str], query_texts: list[str], k: int) -> list[list[int]] | None:
    """Return the ids of BM25's k best texts for each query, best first; None where there are too many texts."""
    if len(texts) > MAX_BM25_TEXTS:
        return None
    found = []
    for scores in bm25_scores(texts, query_texts):
        best = np.argsort(-scores, kind="stable")[:k]
        found.append([int(i) for i in best if scores[i] > 0])
    return found


def bars(values: dict[str, float]) -> list[dict]:
    """Return a bar a block of layers: its name, value, and length from -100 to 100."""
    largest = max(map(abs, values.values()), default=0.0) or 1.0
    return [{"name": name, "value": value, "length": 100 * value / largest} for name, value in values.items()]


def render(content: dict, queries: list[dict], top_k: int) -> str:
    """Return the page with as many cards per query and side (a few at least), then as many queries, as fit.

    Args:
        content: What the template shows of all queries together.
        queries: What it shows of each; `rows` are {"top": rows, "bottom": rows}.
        top_k: Cards on a side.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    template = environment.get_template("report.html.j2")
    cards, count = top_k, min(len(queries), MAX_REPORT_BYTES // MIN_QUERY_BYTES)
    while True:
        shown = [q | {"rows": {side: rows[:cards] for side, rows in q["rows"].items()}} for q in queries[:count]]
        page = template.render(content, queries=shown, cards=cards, top_k=top_k, total=len(queries))
        if len(page.encode()) <= MAX_REPORT_BYTES or cards == count == 1:
            return page
        if cards > MIN_CARDS or count == 1:
            cards //= 2
        else:
            count //= 2


def add_layers(queries: list[dict], folder: Path, record: ScoreRecord) -> None:
    """Add the mean dots of the blocks of layers, where stage 3 wrote them (--layerwise)."""
    if record.blocks is None:
        return
    shape = (len(record.blocks), len(queries), record.num_examples)
    layers = load_matrix(folder / "layer_scores.npy", shape)  # [L, Q, N]
    for number, query in enumerate(queries):
        shown = [row["example"] for row in query["rows"]["top"]]
        means = layers[:, number, shown].mean(axis=1).tolist()
        query["layers"] = bars(dict(zip(record.blocks, means, strict=True)))


def add_word_matches(queries: list[dict], texts: list[str], k: int) -> None:
    """Add the ranks that the examples shown have among BM25's k best."""
    found = word_matches(texts, [query["prompt"] + query["response"] for query in queries], k)
    for query, best in zip(queries, found or [], strict=False):
        query["word_matches"] = True
        for row in (row for rows in query["rows"].values() for row in rows):
            row["word_rank"] = best.index(row["example"]) + 1 if row["example"] in best else None
