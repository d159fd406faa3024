"""What the lists, the report and the printed table show for each query."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from logra.analysis.units import Units
from logra.scoring import rank
from logra.scoring.reranked import Reranked

SIDES = ("top", "bottom")
TABLE_ROWS = 3  # documents or groups per query in the printed table
HISTOGRAM_BINS = 60
SHARED_BY = {  # mode -> why queries may share their first example
    "dot": "its gradient may be far larger than the others'",
    "cosine": "it may be close to what all queries have in common",
    "l2": "its gradient may be far smaller than the others', since l2 subtracts half of the self-influence",
}
MIN_SHARED = 3  # queries with the same highest example, from which on a line says so


def rank_queries(
    top_k: int,
    query_rows: list[dict],
    scores: rank.StoredScores,
    fine: Reranked | None,
    examples: Dataset,
    units: Units,
) -> list[dict[str, Any]]:
    """Return for each query: query_text, `rows` and `notes` of both sides, `histograms`, and the `table` to print.

    Args:
        top_k: Rows on each side at most.
        query_rows: The queries.
        scores: All stored scores, or the ends of each ranking.
        fine: The re-ranked scores, if there are any.
        examples: The run's train examples.
        units: What is ranked.
    """
    queries = []
    for number, query in enumerate(query_rows):
        rankings, values = _rankings(number, scores, fine, units)
        table = rankings["top"]
        if not units.combine:
            table = rank.by_document(table, units.owners, True, "max")
        if units.copies:
            table = table.first_of(units.copies.numbers)
            rankings = {side: ranking.first_of(units.copies.numbers) for side, ranking in rankings.items()}
        rankings["bottom"] = rankings["bottom"].without(rankings["top"].examples[:top_k], units.same)
        rows, notes, kept = {}, {}, fine.record.kept if fine else None
        for side, ranking in rankings.items():
            found = rank.ranked_rows(query, side, ranking, top_k, examples, values.get(side))
            rows[side] = [units.describe(row) for row in found]
            on_top = len(rows["top"]) if side == "bottom" else 0
            notes[side] = rank.shortage(len(found), top_k, units.total, on_top, units.name, kept)
        shown = {"number": number, "rows": rows, "notes": notes}
        shown["histograms"] = histograms(values, units.combine, units.name)
        first = rank.ranked_rows(query, "top", table, TABLE_ROWS, examples, None)
        queries.append(rank.query_text(query) | shown | {"table": [units.describe(row) for row in first]})
    return queries


def _rankings(
    number: int, scores: rank.StoredScores, fine: Reranked | None, units: Units
) -> tuple[dict[str, rank.Ranking], dict[str, np.ndarray]]:
    """Return a query's rankings, and its stored scores by side, highest first; none if they were not all kept."""
    rankings = {side: scores.ranking(number, side == "top") for side in SIDES}
    if units.combine:
        for side, ranking in rankings.items():
            rankings[side] = rank.by_document(ranking, units.owners, side == "top", units.combine)
    values: dict[str, np.ndarray] = {}
    if scores.matrix is not None:
        values = {"top": rankings["top"].scores, "bottom": rankings["bottom"].scores[::-1]}
    for side, stored in rankings.items() if fine else ():
        candidates = fine.candidates(number)
        rankings[side] = rank.rank_again(*candidates, stored, side == "top", fine.record.kept, units.owners)
    return rankings, values


def histogram(values: np.ndarray, of: str, sides: Sequence[str]) -> dict:
    """Return what the page draws for some scores of a query; positions and lengths are from 0 to 100.

    Args:
        values: The scores.
        of: What they are, for the caption.
        sides: Which rows (top, bottom) are marked; their scores are among the values.

    Returns:
        bars (x, width, height, count), low and high score, the edges left and right of the picture, and count. A bar's
        height is the square root of its count, so that a single score is visible beside a thousand.
    """
    counts, edges = np.histogram(values.astype(np.float64), bins=HISTOGRAM_BINS)
    heights = 100 * np.sqrt(counts / max(counts.max(), 1))
    width = 100 / HISTOGRAM_BINS
    bars = [(i * width, width, h, int(n)) for i, (h, n) in enumerate(zip(heights, counts, strict=True)) if n]
    shown = {"of": of, "sides": sides, "bars": bars, "count": len(values)}
    shown |= {"left": float(edges[0]), "right": float(edges[-1])}
    return shown | {"low": float(values.min()), "high": float(values.max())}


def histograms(values: dict[str, np.ndarray], combine: str | None, units: str) -> list[dict]:
    """Return a query's histograms: of all its scores {side: [N]}, or for the best and worst of `units` one each."""
    if combine == "max":
        names = {"top": "highest", "bottom": "lowest"}
        return [histogram(v, f"{units}' {names[side]} scores", [side]) for side, v in values.items()]
    of = f"{units}' scores" if combine else "scores"
    return [histogram(values["top"], of, ["top", "bottom"])] if values else []


def shared_first(queries: list[dict], units: Units, mode: str) -> str:
    """Return a line if more than half of the queries, at least MIN_SHARED, have the same highest example or document.

    Args:
        queries: Of rank_queries.
        units: What is ranked. A group may well be the first one of all queries.
        mode: Of the scores.
    """
    firsts = Counter(_unit_name(query["rows"]["top"][0], units) for query in queries if query["rows"]["top"])
    name, count = firsts.most_common(1)[0] if firsts else ("", 0)
    if units.values is not None or count < MIN_SHARED or 2 * count <= len(queries):
        return ""
    advice = "" if mode == "cosine" else ", and score with compute_influence.py --mode cosine"
    found = f"{count} of {len(queries)} queries have the same highest {units.by}, {name}"
    return f"{found}: {SHARED_BY[mode]}. Look at its text{advice}"


def _unit_name(row: dict[str, Any], units: Units) -> str:
    return row["document"] if units.combine else f"{row['example']} ({row['document']})"
