"""Stage 4/4. Reads logs/<run>/scores/<queries>-.../. Writes report.html and top_k.* there, and prints a short table.

    python analysis.py --top_k 5 --tokens

With no arguments: the newest scores under logs/. --tokens runs the model on the examples shown, for their shading.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from logra.run_dir import RunDir
from logra.runtime import files, flags, processes, progress
from logra.runtime.settings import positive_int
from logra.stages import rank
from logra.stages.score_files import ScoreRecord
from logra.tools import report
from logra.tools.diagnose import diagnose

PRINTED = 3  # documents per query in the printed table
FORMATS = ("html", "jsonl", "csv", "txt")


def build_parser() -> flags.Parser:
    """Return the command line's parser."""
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--log_dir", type=Path, help="the run's folder (the one with the newest scores under logs/)")
    parser.add_argument("--split", help="scores of this query set only, as it was given to compute_influence.py")
    parser.add_argument("--top_k", type=positive_int, default=20, help="examples per query (20)")
    parser.add_argument("--bottom", action="store_true", help="also the lowest scores in top_k.* (the report has them)")
    parser.add_argument("--by", choices=["example", "document"], default="example", help="what is ranked (example)")
    parser.add_argument("--combine", choices=["sum", "max"], default="sum", help="a document's examples' scores (sum)")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=FORMATS, help="files to write (all)")
    parser.add_argument("--diagnose", action="store_true", help="also show Hessian, odd examples and duplicates")
    parser.add_argument("--tokens", action="store_true", help="run the model: each token's share of the scores shown")
    flags.add_common_flags(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Rank the examples, or documents, of each query; write the lists and the report."""
    if args.tokens and "html" not in args.format:
        raise ValueError(f"expected html in --format with --tokens, got {' '.join(args.format)}; add it")
    folder = rank.newest_scores(args.log_dir, args.split)
    run = RunDir.load(folder.parents[1])
    record = rank.read_record(folder, run)
    progress.keep_log(run.folder)
    examples, rows = run.train(), rank.read_queries(folder / "queries.jsonl")
    scores = rank.StoredScores(folder, len(rows), run.examples, record.top_k_only)
    if args.by == "document" and (run.settings.pack or (scores.extremes and args.combine == "sum")):
        raise ValueError(
            "expected all scores, and examples of one document each, for --by document, got --top_k_only or --pack; "
            "leave --by out, or (--top_k_only) give --combine max"
        )
    queries, table = rank_queries(rows, scores, examples, args.top_k, args.by, args.combine)
    rank.write_lists(folder, queries, ("top", "bottom") if args.bottom else ("top",), args.format)
    diagnosis = diagnose(run, record, scores, rows, examples) if args.diagnose else ""
    if "html" in args.format:
        report.add_layers(queries, folder, record)
        if args.tokens:
            add_token_shares(queries, run, record, examples, args.trust_remote_code)
        report.add_word_matches(queries, examples["text"], args.top_k)
        content = report.header(run, record, args.tokens) | {"diagnosis": diagnosis}
        with files.atomic(folder / "report.html") as path:
            path.write_text(report.render(content, queries, args.top_k), "utf-8")
    print_table(queries, table)
    if diagnosis:
        progress.say(diagnosis)
    for kind in args.format:
        progress.say(str(folder / ("report.html" if kind == "html" else f"top_k.{kind}")))


def rank_queries(
    rows: list[dict], scores: rank.StoredScores, examples: rank.Dataset, top_k: int, by: str, combine: str
) -> tuple[list[dict[str, Any]], list[list[tuple[str, float]]]]:
    """Return what the lists and the report show of each query, and the documents of the printed table."""
    encoded = examples.data["document_id"].dictionary_encode()  # one dictionary for all chunks
    documents, owners = encoded.chunk(0).dictionary, np.concatenate([chunk.indices for chunk in encoded.chunks])
    queries, table = [], []
    for number, query in enumerate(rows):
        ranked = {side: scores.ranking(number, side == "top") for side in ("top", "bottom")}
        first = rank.by_document(ranked["top"], owners, True, "max")
        best = zip(first.examples[:PRINTED], first.scores, strict=False)
        table.append([(documents[owners[i]].as_py(), score) for i, score in best])
        if by == "document":
            ranked = {side: rank.by_document(part, owners, side == "top", combine) for side, part in ranked.items()}
        known = len(ranked["top"].scores)
        if known < min(top_k, len(documents)):
            progress.say(f"query {query['id']}: {known} of {top_k}: --top_k_only kept no more")
        values = None if scores.extremes else ranked["top"].scores
        shown = {side: rank.ranked_rows(query, side, part, top_k, examples, values) for side, part in ranked.items()}
        marks = {side: [row["score"] for row in part] for side, part in shown.items()}
        histogram = None if values is None else report.histogram(values, marks)
        queries.append(rank.query_text(query) | {"number": number, "rows": shown, "histogram": histogram})
    return queries, table


def add_token_shares(
    queries: list[dict], run: RunDir, record: ScoreRecord, examples: rank.Dataset, trust_remote_code: bool
) -> None:
    """Run the model on the examples shown, and add each token's share of the score."""
    from logra.tools import tokens  # here, because the models of transformers take three seconds to import

    splitter = tokens.TokenSplitter(run, record, trust_remote_code, processes.start())
    tokens.add_shares(queries, splitter, examples)


def print_table(queries: list[dict], table: list[list[tuple[str, float]]]) -> None:
    """Print the first documents of each query."""
    for query, best in zip(queries, table, strict=True):
        progress.say(f"\n{' '.join(query['id'].split())}: {' '.join(query['prompt'].split())[:90]}")
        for number, (document, score) in enumerate(best, 1):
            progress.say(f"  {number}. {score:+.4g}  {' '.join(document.split())}")
    progress.say("")


if __name__ == "__main__":
    flags.run_script(main, build_parser())
