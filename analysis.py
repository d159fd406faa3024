"""Stage 4/4. Reads logs/<run>/scores/<queries>-.../. Writes report.html and top_k.* there, and prints a short table.

    python analysis.py --top_k 5 --tokens

Without --log_dir: the newest scores under logs/. --tokens runs the model on the examples shown, to shade their tokens.
"""

import argparse
from collections import Counter
from pathlib import Path

from logra.runtime import flags, progress
from logra.runtime.flag_types import positive_int
from logra.runtime.settings import SelectionSettings

FORMATS = ("html", "jsonl", "csv", "txt", "parquet")
TABLE_QUERIES = 10  # in the printed table


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
    by = "what to rank: example, document, or groups with the same value in a kept column, such as source (example)"
    parser.add_argument("--by", default="example", metavar="WHAT", help=by)
    combine = "how the scores of examples form that of a document or group (sum; of a group of --by, mean)"
    parser.add_argument("--combine", choices=["sum", "mean", "max"], help=combine)
    parser.add_argument("--unique", action="store_true", help="show equal examples or documents once, with their count")
    default = FORMATS[:-1]
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=default, help=f"files ({' '.join(default)})")
    parser.add_argument("--diagnose", action="store_true", help="also show spectra, unusual examples and duplicates")
    parser.add_argument("--tokens", action="store_true", help="show each token's share of the scores; runs the model")
    flags.add_common_flags(parser)
    flags.add_settings(parser.add_argument_group("selection"), SelectionSettings())
    return parser


if __name__ == "__main__":  # --help and wrong flags do not wait for the slow imports below
    PARSER = build_parser()
    ARGS = PARSER.parse_args()

from logra.analysis import report
from logra.analysis.diagnose import diagnose
from logra.analysis.lists import write_lists, write_text
from logra.analysis.ranked import rank_queries, shared_first
from logra.analysis.units import choose
from logra.runtime import processes
from logra.scoring import parts, rank
from logra.scoring.reranked import Reranked


def main(args: argparse.Namespace) -> None:
    """Rank the examples, documents or groups of each query; write the lists, the report and the selection."""
    selecting = flags.read_settings(SelectionSettings, args)
    if args.tokens and "html" not in args.format:
        raise ValueError(f"expected html in --format with --tokens, got {' '.join(args.format)}; add html")
    if args.combine and args.by == "example" and not selecting.select:
        raise ValueError("expected --by document, --by COLUMN or --select with --combine, got none; add one")

    # Open the scores and their run
    folder = rank.newest_scores(args.log_dir, args.split)
    runs = rank.scored_runs(folder)
    run = runs[-1]
    record = rank.read_record(folder, run)
    progress.keep_log(folder.parents[1])
    examples, query_rows = run.train(), rank.read_queries(folder / "queries.jsonl")
    scores = rank.StoredScores(folder, len(query_rows), run.examples, record.top_k_only, len(record.checkpoints or ()))
    sides = ("top", "bottom") if args.bottom else ("top",)

    # Rank and select, and write the lists
    packed, all_scores = run.settings.pack, record.top_k_only is None
    units = choose(args.by, args.combine, args.unique, examples, packed, all_scores)
    fine = Reranked.load(folder, record, units.combine, units.values is not None)
    queries = rank_queries(args.top_k, query_rows, scores, fine, examples, units)
    if selecting.select:
        from logra.analysis import selection  # not at the top, for the reason below

        selected = selection.select(selecting, args.combine, examples, scores, packed)
        selection.write_selected(folder, run, examples, selected, selecting.drop)
    parts.add_checkpoints(queries, folder, record, runs, fine or scores, units.owners)
    write_lists(folder, queries, sides, args.format)
    diagnosis = diagnose(run, record, scores, query_rows, examples) if args.diagnose else ""
    warning = shared_first(queries, units, record.mode)

    # Write the report
    if "html" in args.format:
        report.add_layers(queries, folder, record, scores.matrix, fine, units.owners)
        if args.tokens:
            from logra.analysis import tokens  # not at the top: transformers' models take three seconds to import

            processes.start()
            models = parts.scored_models(folder, record, runs, fine)
            tokens.add_shares(queries, models, examples, args.trust_remote_code)
        report.add_word_matches(queries, examples["text"], args.top_k, units)
        content = report.header(run, record, fine, args.tokens) | {"diagnosis": diagnosis, "units": units}
        content |= {"top_k": args.top_k, "lists": [f"top_k.{n}" for n in args.format if n != "html"], "listed": sides}
        write_text(folder / "report.html", report.render(content | {"warning": warning}, queries))

    print_table(queries, units.heading if units.combine or not packed else "Packed examples")
    for note, count in Counter(note for query in queries for side in sides for note in query["notes"][side]).items():
        progress.say(f"{note} ({count} of {len(queries)} queries)")
    for text in filter(None, (warning, diagnosis)):
        progress.say(text)
    for name in args.format:
        progress.say(str(folder / ("report.html" if name == "html" else f"top_k.{name}")))


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
    flags.run_script(main, PARSER, ARGS)
