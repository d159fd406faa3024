"""Stage 4/4. Reads logs/<run>/scores/<queries>-.../. Writes report.html and top_k.* there, and prints a short table.

    python analysis.py --top_k 5 --tokens

Without --log_dir: the newest scores under logs/. --tokens runs the model on the examples shown, to shade their tokens.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from logra.run_dir import RunDir
from logra.runtime import files, flags, processes, progress
from logra.runtime.settings import positive_int
from logra.stages import rank
from logra.tools import report
from logra.tools.diagnose import diagnose

TABLE_ROWS = 3  # documents per query in the printed table
FORMATS = ("html", "jsonl", "csv", "txt")


def build_parser() -> flags.Parser:
    """Return the parser of the command line."""
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--log_dir", type=Path, help="the run's folder (the one with the newest scores under logs/)")
    parser.add_argument("--split", help="only scores of this query set, as given to compute_influence.py (any)")
    parser.add_argument("--top_k", type=positive_int, default=20, help="examples per query (20)")
    parser.add_argument(
        "--bottom", action="store_true", help="also list the lowest scores in top_k.* (the report always has them)"
    )
    parser.add_argument("--by", choices=["example", "document"], default="example", help="what to rank (example)")
    parser.add_argument(
        "--combine", choices=["sum", "max"], default="sum", help="a document's score from its examples' scores (sum)"
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

    # Open the scores and their run
    folder = rank.newest_scores(args.log_dir, args.split)
    run = RunDir.load(folder.parents[1])
    record = rank.read_record(folder, run)
    progress.keep_log(run.folder)
    examples, query_rows = run.train(), rank.read_queries(folder / "queries.jsonl")
    scores = rank.StoredScores(folder, len(query_rows), run.examples, record.top_k_only)
    if args.by == "document" and (run.settings.pack or (record.top_k_only and args.combine == "sum")):
        raise ValueError(
            "expected all scores, and examples of one document each, for --by document, got --top_k_only or --pack; "
            "leave --by out, or (--top_k_only) give --combine max"
        )

    # Rank, and write the lists
    queries = rank_queries(args, query_rows, scores, examples)
    rank.write_lists(folder, queries, ("top", "bottom") if args.bottom else ("top",), args.format)
    diagnosis = diagnose(run, record, scores, query_rows, examples) if args.diagnose else ""

    # Write the report
    if "html" in args.format:
        report.add_layers(queries, folder, record)
        if args.tokens:
            from logra.tools import tokens  # not at the top: transformers' models take three seconds to import

            processes.start()
            splitter = tokens.TokenSplitter(run, record, args.trust_remote_code)
            tokens.add_shares(queries, splitter, examples)
        report.add_word_matches(queries, examples["text"], args.top_k)
        content = report.header(run, record, args.tokens) | {"diagnosis": diagnosis}
        with files.atomic(folder / "report.html") as path:
            path.write_text(report.render(content, queries, args.top_k), "utf-8")

    print_table(queries)
    if diagnosis:
        progress.say(diagnosis)
    for name in args.format:
        progress.say(str(folder / ("report.html" if name == "html" else f"top_k.{name}")))


def rank_queries(
    args: argparse.Namespace, query_rows: list[dict], scores: rank.StoredScores, examples: rank.Dataset
) -> list[dict[str, Any]]:
    """Return what the lists, the report and the printed table (`table`: documents and scores) show for each query."""
    encoded = examples.data["document_id"].dictionary_encode()  # one dictionary for all chunks
    documents, owners = encoded.chunk(0).dictionary, np.concatenate([chunk.indices for chunk in encoded.chunks])
    queries = []
    for number, query in enumerate(query_rows):
        rankings = {side: scores.ranking(number, side == "top") for side in ("top", "bottom")}
        best = rank.by_document(rankings["top"], owners, True, "max")
        best_rows = zip(best.examples[:TABLE_ROWS], best.scores, strict=False)
        table = [(documents[owners[i]].as_py(), score) for i, score in best_rows]
        if args.by == "document":
            rankings = {side: rank.by_document(r, owners, side == "top", args.combine) for side, r in rankings.items()}
        known = len(rankings["top"].scores)
        if known < min(args.top_k, len(documents)):
            progress.say(f"query {query['id']}: {known} of {args.top_k}: --top_k_only kept no more")
        values = None if scores.matrix is None else rankings["top"].scores
        rows = {side: rank.ranked_rows(query, side, r, args.top_k, examples, values) for side, r in rankings.items()}
        histogram = None if values is None else report.histogram(values)
        shown = {"number": number, "rows": rows, "histogram": histogram, "table": table}
        queries.append(rank.query_text(query) | shown)
    return queries


def print_table(queries: list[dict]) -> None:
    """Print the first documents of each query."""
    for query in queries:
        progress.say(f"\n{' '.join(query['id'].split())}: {' '.join(query['prompt'].split())[:90]}")
        for number, (document, score) in enumerate(query["table"], 1):
            progress.say(f"  {number}. {score:+.4g}  {' '.join(document.split())}")
    progress.say("")


if __name__ == "__main__":
    flags.run_script(main, build_parser())
