"""Stage 4/4. Reads logs/<run>/scores/<queries>-.../. Writes report.html and top_k.* there, and prints a short table.

    python analysis.py --top_k 5 --tokens

Without --log_dir: the newest scores under logs/. --tokens runs the model on the examples shown, to shade their tokens.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from logra.runtime import files, flags, processes, progress
from logra.runtime.settings import positive_int
from logra.scoring import parts, rank
from logra.scoring.reranked import Reranked
from logra.tools import report
from logra.tools.diagnose import diagnose

TABLE_ROWS, TABLE_QUERIES = 3, 10  # documents per query, and queries, in the printed table
FORMATS = ("html", "jsonl", "csv", "txt")


def build_parser() -> flags.Parser:
    """Return the parser of the command line."""
    parser = flags.Parser(description=__doc__)
    parser.add_argument(
        "--log_dir", type=Path, help="folder of the run or of its checkpoints (that with the newest scores under logs/)"
    )
    parser.add_argument("--split", help="only scores of this query set, as given to compute_influence.py (any)")
    parser.add_argument("--top_k", type=positive_int, default=20, help="examples per query (20)")
    parser.add_argument(
        "--bottom", action="store_true", help="also list the lowest scores in top_k.* (the report always has them)"
    )
    parser.add_argument("--by", choices=["example", "document"], default="example", help="what to rank (example)")
    parser.add_argument(
        "--combine", choices=["sum", "max"], help="with --by document: its score from its examples' scores (sum)"
    )
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=FORMATS, help="files to write (all)")
    parser.add_argument("--diagnose", action="store_true", help="also show spectra, unusual examples and duplicates")
    parser.add_argument("--tokens", action="store_true", help="show each token's share of the scores; runs the model")
    flags.add_common_flags(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Rank the examples, or documents, of each query; write the lists and the report."""
    if args.tokens and "html" not in args.format:
        raise ValueError(f"expected html in --format with --tokens, got {' '.join(args.format)}; add html")
    if args.combine and args.by != "document":
        raise ValueError("expected --by document with --combine, got --by example; add --by document")
    combine = (args.combine or "sum") if args.by == "document" else None
    sides = ("top", "bottom") if args.bottom else ("top",)

    # Open the scores and their run
    folder = rank.newest_scores(args.log_dir, args.split)
    runs = rank.scored_runs(folder)
    run = runs[-1]
    record = rank.read_record(folder, run)
    progress.keep_log(folder.parents[1])
    examples, query_rows = run.train(), rank.read_queries(folder / "queries.jsonl")
    scores = rank.StoredScores(folder, len(query_rows), run.examples, record.top_k_only, len(record.checkpoints or ()))
    if combine and (run.settings.pack or (record.top_k_only and combine == "sum")):
        raise ValueError(
            "expected all scores, and examples of one document each, for --by document, got --top_k_only or --pack; "
            "leave --by out, or (--top_k_only) give --combine max"
        )

    # Rank, and write the lists
    owners = rank.document_numbers(examples, run.settings.pack)
    fine = Reranked.load(folder, record, combine)
    queries = rank_queries(args.top_k, combine, query_rows, scores, fine, examples, owners)
    parts.add_checkpoints(queries, folder, record, runs, fine or scores, owners)
    rank.write_lists(folder, queries, sides, args.format)
    diagnosis = diagnose(run, record, scores, query_rows, examples) if args.diagnose else ""

    # Write the report
    if "html" in args.format:
        report.add_layers(queries, folder, record, scores.matrix, fine, owners)
        if args.tokens:
            from logra.tools import tokens  # not at the top: transformers' models take three seconds to import

            processes.start()
            models = parts.scored_models(folder, record, runs, fine)
            tokens.add_shares(queries, models, examples, args.trust_remote_code)
        report.add_word_matches(queries, examples["text"], args.top_k, owners if combine else np.arange(len(owners)))
        content = report.header(run, record, fine, args.tokens) | {"diagnosis": diagnosis, "combine": combine}
        content |= {"top_k": args.top_k, "lists": [f"top_k.{n}" for n in args.format if n != "html"], "listed": sides}
        with files.atomic(folder / "report.html") as path:
            path.write_text(report.render(content, queries), "utf-8")

    by_sum, by_best = "Documents by the sum of their examples' scores", "Documents by their highest example"
    print_table(queries, by_sum if combine == "sum" else "Packed examples" if run.settings.pack else by_best)
    for note, count in Counter(note for query in queries for side in sides for note in query["notes"][side]).items():
        progress.say(f"{note} ({count} of {len(queries)} queries)")
    if diagnosis:
        progress.say(diagnosis)
    for name in args.format:
        progress.say(str(folder / ("report.html" if name == "html" else f"top_k.{name}")))


def rank_queries(
    top_k: int,
    combine: str | None,
    query_rows: list[dict],
    scores: rank.StoredScores,
    fine: Reranked | None,
    examples: rank.Dataset,
    owners: np.ndarray,
) -> list[dict[str, Any]]:
    """Return what the lists, the report and the printed table (`table`: rows) show for each query."""
    total, queries = owners.max() + 1 if combine else len(owners), []
    for number, query in enumerate(query_rows):
        rankings = {side: scores.ranking(number, side == "top") for side in ("top", "bottom")}
        if combine:
            rankings = {side: rank.by_document(r, owners, side == "top", combine) for side, r in rankings.items()}
        values: dict[str, np.ndarray] = {}  # highest first
        if scores.matrix is not None:
            values = {"top": rankings["top"].scores, "bottom": rankings["bottom"].scores[::-1]}
        for side, stored in rankings.items() if fine else ():
            rankings[side] = rank.rank_again(*fine.candidates(number), stored, side == "top", fine.record.kept, owners)
        table = rankings["top"] if combine else rank.by_document(rankings["top"], owners, True, "max")
        rankings["bottom"] = rankings["bottom"].without(rankings["top"].examples[:top_k], owners)
        rows, notes = {}, {}
        for side, ranking in rankings.items():
            rows[side] = rank.ranked_rows(query, side, ranking, top_k, examples, values.get(side))
            on_top = len(rows["top"]) if side == "bottom" else 0
            unit = "documents" if combine else "examples"
            notes[side] = rank.shortage(len(rows[side]), top_k, total, on_top, unit, fine and fine.record.kept)
        shown = {"number": number, "rows": rows, "notes": notes, "histograms": report.histograms(values, combine)}
        shown["table"] = rank.ranked_rows(query, "top", table, TABLE_ROWS, examples, None)
        queries.append(rank.query_text(query) | shown)
    return queries


def print_table(queries: list[dict], heading: str) -> None:
    """Print the first documents of the first queries."""
    progress.say(f"\n{heading}:")
    for query in queries[:TABLE_QUERIES]:
        progress.say(f"\n{' '.join(query['id'].split())}: {' '.join(query['prompt'].split())[:90]}")
        for row in query["table"]:
            names = " ".join(rank.document_names(row).split())
            progress.say(f"  {row['rank']}. {row['score']:+.4g}  {names}")
    progress.say(f"\nThe files have {len(queries)} queries" if len(queries) > TABLE_QUERIES else "")


if __name__ == "__main__":
    flags.run_script(main, build_parser())
