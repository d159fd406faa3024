"""Write report.html: the scores of a query set for a reader, in one file of at most 5 MB that needs no network.

report.html.j2 is the page's template. Jinja2 escapes all texts (autoescape).
"""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from logra.analysis.units import Units
from logra.inputs.groups import label
from logra.run_dir import RunDir
from logra.scoring.rank import examples_of_score, load_matrix, move, name_and_count, scored_examples
from logra.scoring.reranked import Reranked
from logra.scoring.score_files import ScoreRecord

MAX_REPORT_BYTES = 5_000_000
MIN_QUERY_BYTES = 2_000  # a query takes at least this many
MIN_CARDS = 5  # examples shown on each side of a query
MAX_BM25_TEXTS = 100_000  # the index is in memory
L2_PART = "- half of the self-influence"
SHADE_LEVELS = 4  # for shares above 0, and as many for shares below


class CheckpointBar(NamedTuple):
    """A checkpoint's part of a score, and its bar in a picture of height 100: y of 0 and of the upper end, height."""

    name: str
    part: float
    zero: float
    y: float
    height: float


class Shaded(NamedTuple):
    """Neighbouring tokens of one shade: level -SHADE_LEVELS to SHADE_LEVELS, text, and summed share of the score."""

    level: int
    text: str
    share: float


def header(run: RunDir, scores: ScoreRecord, fine: Reranked | None, shaded: bool) -> dict:
    """Return what the page shows for all queries together: run, scores, and the settings of both.

    Of combined scores the folder shown is that of all checkpoints; `run` and its settings are the last checkpoint's.
    """
    folder = run.folder.parent if scores.checkpoints else run.folder
    settings: dict = {"run": str(folder), "queries": scores.split}
    settings |= {name: getattr(scores, name) for name in ("query_loss", "group_by", "query_rank", "top_k_only")}
    settings |= asdict(run.settings) | {"layers": f"{len(scores.layers)} of {len(run.layers)}"}
    settings = {name: value for name, value in settings.items() if value is not None and value is not False}
    weights = {checkpoint["run"]: checkpoint["weight"] for checkpoint in scores.checkpoints or ()}
    if fine:
        weights = {name: entry["weight"] for name, entry in zip(fine.names, fine.record.models, strict=True)}
        settings |= {"rerank": fine.record.kept, "rerank_rank": fine.record.rank or "none"}
        settings |= {"rerank_by": fine.record.by, "rerank_damping": fine.record.damping}
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items() if not fine or len(weights) > 1}
    content = {"run": run, "name": folder.name, "scores": scores, "settings": settings, "shaded": shaded}
    return content | {"checkpoints": shares, "fine": fine and fine.record}


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


def bm25_scores(texts: list[str], query_texts: list[str]) -> Iterator[np.ndarray]:
    """Yield the BM25 scores of all texts, [N], for each query (Lucene's variant, lower case, no stemming)."""
    import bm25s  # not at the head: it imports numba

    options = {"stopwords": None, "return_ids": False, "show_progress": False}
    index, words = bm25s.BM25(), bm25s.tokenize(texts, **options)
    if any(words):  # bm25s fails without a word, which has at least two letters
        index.index(words, show_progress=False)
    for query in bm25s.tokenize(query_texts, **options):
        yield index.get_scores(query) if query and any(words) else np.zeros(len(texts), np.float32)


def checkpoint_bars(parts: dict[str, float]) -> list[CheckpointBar]:
    """Return the bars of a score's parts. They stand on one line; those of negative parts hang from it."""
    top, bottom = max(0.0, *parts.values()), min(0.0, *parts.values())
    unit = 100 / ((top - bottom) or 1.0)
    return [
        CheckpointBar(name, part, unit * top, unit * (top - max(part, 0)), unit * abs(part))
        for name, part in parts.items()
    ]


def is_web_address(value: object) -> bool:
    """Return whether a kept column's value may become a link: an http(s) address without spaces or invisible signs."""
    return isinstance(value, str) and value.isprintable() and bool(re.fullmatch(r"https?://[^\s\"'<>\\]+", value))


def mean_layers(rows: list[dict]) -> dict[str, float]:
    """Return the mean parts of the rows' scores by block of layers; nothing if they are not known."""
    layers = [row["layers"] for row in rows if "layers" in row]
    return {name: sum(parts[name] for parts in layers) / len(layers) for name in layers[0]} if layers else {}


def render(content: dict, queries: list[dict]) -> str:
    """Return the page. If it is too large, show fewer cards per query and side, then fewer queries.

    Args:
        content: What the page shows for all queries together (see header).
        queries: What it shows for each query; `rows` is {"top": rows, "bottom": rows}, a card for each row.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(shade=shade, mean_layers=mean_layers, checkpoint_bars=checkpoint_bars)
    environment.filters.update(name_and_count=name_and_count, scored=scored_examples, move=move, label=label)
    environment.tests["web_address"] = is_web_address
    template = environment.get_template("report.html.j2")
    most = max(len(rows) for query in queries for rows in query["rows"].values())
    cards, count = most, min(len(queries), MAX_REPORT_BYTES // MIN_QUERY_BYTES)
    while True:
        page = template.render(content, queries=queries[:count], cards=cards, most=most, total=len(queries))
        if len(page.encode()) <= MAX_REPORT_BYTES or cards == count == 1:
            return page
        if cards > MIN_CARDS or count == 1:
            cards //= 2
        else:
            count //= 2


def split_by_layers(dots: np.ndarray, scores: np.ndarray, blocks: list[str], mode: str) -> dict[str, float]:
    """Split the sum of some scores [m] by blocks of layers, from the blocks' dots [L, m]; l2 has a part of no block."""
    dots, totals = dots.astype(np.float64), dots.sum(axis=0, dtype=np.float64)
    if mode == "cosine":  # divides all blocks by the same number
        dots = dots * np.divide(scores, totals, out=np.zeros_like(totals), where=totals != 0)
    parts = dict(zip(blocks, dots.sum(axis=1).tolist(), strict=True))
    return parts | ({L2_PART: float((scores - totals).sum())} if mode == "l2" else {})


def add_layers(
    queries: list[dict], folder: Path, record: ScoreRecord, scores: np.ndarray, fine: Reranked | None,
    owners: np.ndarray,
) -> None:  # fmt: skip
    """Add the parts of each block of layers to the rows of the top, if stage 3 wrote dots (--layerwise).

    Args:
        queries: See render.
        folder: Of the scores.
        record: Their record.
        scores: [Q, N].
        fine: The re-ranked scores, whose parts these are if there are any.
        owners: Number of each example's document or group, [N].
    """
    if record.blocks is None:
        return
    shape = (len(record.blocks), len(queries), record.num_examples)
    dots = load_matrix(folder / "layer_scores.npy", shape)  # [L, Q, N]
    for number, query in enumerate(queries):
        for row in query["rows"]["top"]:
            ids = examples_of_score(row, owners)
            if fine:
                parts, shown = (fine.of_scores(number, True, ids, name) for name in ("blocks", "scores"))
            else:
                parts, shown = dots[:, number, ids], scores[number, ids]
            sums, count = split_by_layers(parts, shown, record.blocks, record.mode), len(ids)
            row["layers"] = {k: v / count for k, v in sums.items()} if row["combine"] == "mean" else sums


def add_word_matches(queries: list[dict], texts: list[str], k: int, units: Units) -> None:
    """Add the BM25 ranks of what the rows show, if these are among the k best. Nothing for groups or too many texts.

    Args:
        queries: See render.
        texts: Of the examples.
        k: How many of the best matches count.
        units: What is ranked. Documents are matched whole.
    """
    if len(texts) > MAX_BM25_TEXTS or units.values is not None:
        return
    numbers = units.owners if units.combine else np.arange(len(texts))
    parts: list[list[str]] = [[] for _ in range(numbers.max() + 1)]
    for unit, text in zip(numbers, texts, strict=True):
        parts[unit].append(text)
    texts = ["".join(blocks) for blocks in parts]
    for query, scores in zip(queries, bm25_scores(texts, [query["words"] for query in queries]), strict=True):
        best = np.argsort(-scores, kind="stable")[:k].tolist()
        ranks = {unit: rank for rank, unit in enumerate(best, 1) if scores[unit] > 0}
        query["word_matches"] = True
        for row in [*query["rows"]["top"], *query["rows"]["bottom"]]:
            row["word_rank"] = ranks.get(numbers[row["example"]])
