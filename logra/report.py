"""report.html: what a person sees of a query set's scores. One file, without a network, at most 5 MB.

Texts come from data and are escaped by Jinja2 (autoescape); report.html.j2 holds the page, its styles and its script.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import bm25s
import jinja2
import numpy as np

from logra.disk import fits
from logra.log import Log

MOST_BYTES = 5_000_000
LEAST_BYTES = 2_000  # of a query
FEW_CARDS = 5
MOST_TEXTS = 100_000  # for BM25, whose index is in memory
BINS = 60  # of the histogram
LEVELS = 4  # of a token's shade, on each side of none


class Shaded(NamedTuple):
    """A run of tokens of equal shade: -LEVELS (lowers the score) to LEVELS, its text, and the sum of its shares."""

    level: int
    text: str
    share: float


def asked(query: dict) -> dict[str, str]:
    """Return the id, prompt and response that are shown of a row of queries.jsonl."""
    text, prompt, response = (str(query.get(key) or "") for key in ("text", "prompt", "response"))
    if not (text or prompt) and fits(query.get("messages"), [{"role": str, "content": str}]):
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in query["messages"])
    return {"id": str(query["id"]), "prompt": prompt or text, "response": response}


def header(log: Log, about: dict, shaded: bool) -> dict:
    """Return what the page says of all queries together: the run's and the scores' settings."""
    damping = about["damping"] if about["damping"] is not None else f"{about['damping_absolute']} (absolute)"
    settings = {"run": str(log.folder), "queries": about["split"], "query_loss": about["query_loss"]}
    settings |= {name: value for name, value in log.settings.items() if value not in (None, False)}
    settings |= {"layers": f"{len(about['layers'])} of {len(log.layers)}", "model": log.content["model"]["class"]}
    settings |= {"model fingerprint": log.content["model"]["fingerprint"]}
    settings |= {"data fingerprint": ", ".join(log.fingerprints), "versions": log.content["versions"]}
    return {
        "title": log.folder.name, "examples": log.examples, "mode": about["mode"], "hessian": about["hessian"],
        "damping": damping, "settings": settings, "shaded": shaded,
        "rounded": log.settings["store_dtype"] if log.bits else None,
    }  # fmt: skip


def shade(pieces: list[tuple[str, float]]) -> list[Shaded]:
    """Return a text's pieces with their shades, in units of the largest share, equal neighbours joined."""
    largest = max((abs(share) for _, share in pieces), default=0.0) or 1.0
    found: list[Shaded] = []
    for text, share in pieces:
        level = round(LEVELS * share / largest)
        if found and found[-1].level == level:
            found[-1] = Shaded(level, found[-1].text + text, found[-1].share + share)
        else:
            found.append(Shaded(level, text, share))
    return found


def histogram(values: np.ndarray, marked: dict[str, list[float]]) -> dict:
    """Return bars (x, width, height, count), marks (side, x) and the ends of a query's scores; lengths from 0 to 100.

    A bar's height is the root of its count, so that a single score is seen beside a thousand.
    """
    counts, edges = np.histogram(values, bins=BINS)
    low, high = float(edges[0]), float(edges[-1])
    heights = 100 * np.sqrt(counts / max(counts.max(), 1))
    width = 100 / BINS
    bars = [(i * width, width, h, int(n)) for i, (h, n) in enumerate(zip(heights, counts, strict=True)) if n]
    marks = [(side, 100 * (v - low) / (high - low)) for side, scores in marked.items() for v in scores]
    zero = 100 * -low / (high - low) if low < 0 < high else None
    return {"bars": bars, "marks": marks, "low": low, "high": high, "zero": zero, "count": len(values)}


def standings(scores: np.ndarray, values: np.ndarray | None) -> list[dict[str, float | None]]:
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


def word_scores(texts: list[str], asked: list[str]) -> Iterator[np.ndarray]:
    """Yield the BM25 scores of all texts, [N], for each query (Lucene's, lower case, no stemming)."""
    options = {"stopwords": None, "return_ids": False, "show_progress": False}
    index, words = bm25s.BM25(), bm25s.tokenize(texts, **options)
    if any(words):  # of two letters at least; bm25s needs one, of a query too
        index.index(words, show_progress=False)
    for query in bm25s.tokenize(asked, **options):
        yield index.get_scores(query) if query and any(words) else np.zeros(len(texts), np.float32)


def word_matches(texts: list[str], asked: list[str], k: int) -> list[list[int]] | None:
    """Return the ids of BM25's k best texts for each query, best first; None where there are too many texts."""
    if len(texts) > MOST_TEXTS:
        return None
    found = []
    for scores in word_scores(texts, asked):
        best = np.argsort(-scores, kind="stable")[:k]
        found.append([int(i) for i in best if scores[i] > 0])
    return found


def bars(values: dict[str, float]) -> list[dict]:
    """Return a bar a block of layers: its name, value, and length from -100 to 100."""
    largest = max(map(abs, values.values()), default=0.0) or 1.0
    return [{"name": name, "value": value, "length": 100 * value / largest} for name, value in values.items()]


def render(content: dict, queries: list[dict], asked: int) -> str:
    """Return the page with as many cards a query and side (a few at least), then as many queries, as fit in MOST_BYTES.

    Args:
        content: What the template shows of all queries together.
        queries: What it shows of each; `cards` are {"top": rows, "bottom": rows}.
        asked: Cards on a side.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    template = environment.get_template("report.html.j2")
    cards, count = asked, min(len(queries), MOST_BYTES // LEAST_BYTES)
    while True:
        shown = [q | {"cards": {side: rows[:cards] for side, rows in q["cards"].items()}} for q in queries[:count]]
        page = template.render(content, queries=shown, cards=cards, asked=asked, total=len(queries))
        if len(page.encode()) <= MOST_BYTES or cards == count == 1:
            return page
        if cards > FEW_CARDS or count == 1:
            cards //= 2
        else:
            count //= 2
