"""Stage 4/4. Reads logs/<run>/scores/<queries>-.../. Writes report.html and top_k.* there, and prints a short table.

    python analysis.py --top_k 5 --tokens

With no arguments: the newest scores under logs/. --tokens runs the model on the examples shown, for their shading.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from logra import disk, progress, report, run
from logra.diagnose import diagnose
from logra.log import Log
from logra.ranking import Ranking, Scores, by_document, check_scores, load_matrix, read_queries

SHOWN = 3  # documents a query in the printed table
FORMATS = ("html", "jsonl", "csv", "txt")
COLUMNS = ("query", "side", "rank", "score", "percentile", "z", "document", "example", "examples", "block", "text")


def build_parser() -> run.Parser:
    """Return the command line's parser."""
    parser = run.Parser(description=__doc__)
    parser.add_argument("--log_dir", type=Path, help="the run's folder (the one with the newest scores under logs/)")
    parser.add_argument("--split", help="scores of this query set only, as it was given to compute_influence.py")
    parser.add_argument("--top_k", type=run.positive_int, default=20, help="examples a query (20)")
    parser.add_argument("--bottom", action="store_true", help="also the lowest scores in top_k.* (the report has them)")
    parser.add_argument("--by", choices=["example", "document"], default="example", help="what is ranked (example)")
    parser.add_argument("--combine", choices=["sum", "max"], default="sum", help="a document's examples' scores (sum)")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=FORMATS, help="files to write (all)")
    parser.add_argument("--diagnose", action="store_true", help="also show Hessian, odd examples and duplicates")
    run.add_common(parser)
    parser.add_argument("--tokens", action="store_true", help="run the model: each token's share of the scores shown")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the best examples, or documents, of each query."""
    if args.tokens and "html" not in args.format:
        raise ValueError(f"expected html in --format with --tokens, got {' '.join(args.format)}; add it")
    folder, about = newest_scores(args.log_dir, args.split)
    log = Log.load(folder.parents[1])
    check_scores(folder, about, log)
    progress.keep_log(log.folder)
    examples = log.train()
    encoded = examples.data["document_id"].dictionary_encode()  # one dictionary for all chunks
    documents, owners = encoded.chunk(0).dictionary, np.concatenate([chunk.indices for chunk in encoded.chunks])
    queries = read_queries(folder / "queries.jsonl")
    scores = Scores(folder, len(queries), log.examples, about["top_k_only"])
    if args.by == "document" and (log.settings["pack"] or (scores.ends and args.combine == "sum")):
        raise ValueError(
            "expected all scores, and examples of one document each, for --by document, got --top_k_only or --pack; "
            "leave --by out, or (--top_k_only) give --combine max"
        )
    views, table = [], []
    for number, query in enumerate(queries):
        ranked = {side: scores.ranking(number, side == "top") for side in ("top", "bottom")}
        first = by_document(ranked["top"], owners, True, "max")
        table.append(
            [(documents[owners[i]].as_py(), s) for i, s in zip(first.examples[:SHOWN], first.scores, strict=False)]
        )
        if args.by == "document":
            ranked = {side: by_document(part, owners, side == "top", args.combine) for side, part in ranked.items()}
        if len(ranked["top"].scores) < min(args.top_k, len(documents)):
            run.say(f"query {query['id']}: {len(ranked['top'].scores)} of {args.top_k}: --top_k_only kept no more")
        values = None if scores.ends else ranked["top"].scores
        cards = {side: describe(query, side, part, args.top_k, examples, values) for side, part in ranked.items()}
        marks = {side: [row["score"] for row in rows] for side, rows in cards.items()}
        histogram = None if values is None else report.histogram(values, marks)
        views.append(report.asked(query) | {"number": number, "cards": cards, "histogram": histogram})
    write_lists(folder, args, views)
    diagnosis = diagnose(log, about, scores, queries, examples) if args.diagnose else ""
    if "html" in args.format:
        add_layers(views, folder, about, log.examples)
        if args.tokens:
            add_shares(views, log, about, examples, args.trust_remote_code)
        add_word_matches(views, examples["text"], args.top_k)
        with disk.atomic(folder / "report.html") as path:
            path.write_text(
                report.render(report.header(log, about, args.tokens) | {"diagnosis": diagnosis}, views, args.top_k),
                "utf-8",
            )
    print_table(views, table)
    if diagnosis:
        run.say(diagnosis)
    for kind in args.format:
        run.say(str(folder / ("report.html" if kind == "html" else f"top_k.{kind}")))


def newest_scores(log_dir: Path | None, split: str | None) -> tuple[Path, dict]:
    """Return the folder of the newest scores (of a run, of a query set) and its run.json."""
    pattern = "*/scores/*/run.json" if log_dir is None else "scores/*/run.json"
    root = Path("logs") if log_dir is None else log_dir
    for path in sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True):
        about = disk.read_json(path, "run compute_influence.py again")
        if path.parent.suffix != ".tmp" and split in (None, about.get("split")):
            return path.parent, about
    wanted = f" of --split {split}" if split else ""
    raise ValueError(f"expected scores{wanted} under {root}, got none; run compute_influence.py first")


def describe(query: dict, side: str, ranking: Ranking, count: int, examples, values: np.ndarray | None) -> list[dict]:
    """Return the first rows of a query's ranking, for top_k.* and the report."""
    ids, scores, counts = (part[:count] for part in ranking)
    shown, places = examples[ids.tolist()], report.standings(scores, values)
    rows = []
    for n, (i, score, of) in enumerate(zip(ids.tolist(), scores.tolist(), counts.tolist(), strict=True)):
        row = {name: column[n] for name, column in shown.items()}
        entry = {"query": query["id"], "side": side, "rank": n + 1, "score": score, "example": i, "examples": of}
        entry |= places[n] | {"document": row["document_id"], "block": row.get("block")}
        entry |= {"documents": row["document_ids"]} if "document_ids" in row else {}
        rows.append(entry | {"text": row["text"]})
    return rows


def write_lists(folder: Path, args: argparse.Namespace, views: list[dict]) -> None:
    """Write top_k.jsonl, top_k.csv and top_k.txt, as far as they are wanted."""
    sides = ("top", "bottom") if args.bottom else ("top",)
    rows = [row for view in views for side in sides for row in view["cards"][side]]
    if "jsonl" in args.format:
        with disk.atomic(folder / "top_k.jsonl") as path:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    if "csv" in args.format:
        with disk.atomic(folder / "top_k.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows({key: plain(value) for key, value in row.items()} for row in rows)
    if "txt" in args.format:
        with disk.atomic(folder / "top_k.txt") as path:
            path.write_text(progress.printable("\n".join(readable(views, sides))), "utf-8")


def plain(value):
    """Return a cell of top_k.csv: a text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value


def readable(views: list[dict], sides: tuple[str, ...]) -> list[str]:
    """Return the lines of top_k.txt."""
    lines = []
    for view in views:
        lines += ["=" * 100, f"Query {view['id']}: {view['prompt']}", view["response"], ""]
        for row in (row for side in sides for row in view["cards"][side]):
            place = f"{row['document']}  (example {row['example']})"
            lines += [f"--- {row['side']} {row['rank']}: {row['score']:+.4g}  {place}", row["text"].strip(), ""]
    return lines


def add_layers(views: list[dict], folder: Path, about: dict, examples: int) -> None:
    """Add the mean dots of the blocks of layers, where stage 3 wrote them (--layerwise)."""
    if "blocks" not in about:
        return
    layers = load_matrix(folder / "layer_scores.npy", (len(about["blocks"]), len(views), examples))  # [L, Q, N]
    for view in views:
        shown = [row["example"] for row in view["cards"]["top"]]
        means = layers[:, view["number"], shown].mean(axis=1).tolist()
        view["layers"] = report.bars(dict(zip(about["blocks"], means, strict=True)))


def add_shares(views: list[dict], log: Log, about: dict, examples, trust_remote_code: bool) -> None:
    """Add what each token, and each block of layers, adds to the scores shown."""
    from logra.tokens import Splitter, pieces  # and the models of transformers, which take three seconds

    splitter = Splitter(log, about, trust_remote_code, run.start_processes())
    top, bottom = ([[row["example"] for row in view["cards"][side]] for view in views] for side in ("top", "bottom"))
    pairs, of_queries = splitter.split(examples, [[*a, *b] for a, b in zip(top, bottom, strict=True)], top)
    for view, best in zip(views, top, strict=True):
        number = view["number"]
        for row in (row for rows in view["cards"].values() for row in rows):
            ids, shares = examples[row["example"]]["input_ids"], pairs[number, row["example"]].tokens
            row["shaded"] = report.shade(pieces(splitter.tokenizer, ids, shares))
        if of_queries:
            ids = splitter.groups[number][0].token_ids
            view["shaded"] = report.shade(pieces(splitter.tokenizer, ids, of_queries[number]))
        blocks = [pairs[number, i].blocks for i in best]
        view["layers"] = report.bars({name: sum(b[name] for b in blocks) / len(blocks) for name in blocks[0]})


def add_word_matches(views: list[dict], texts: list[str], k: int) -> None:
    """Add the ranks that the examples shown have among BM25's k best."""
    found = report.word_matches(texts, [view["prompt"] + view["response"] for view in views], k)
    for view, best in zip(views, found or [], strict=False):
        view["word_matches"] = True
        for row in (row for rows in view["cards"].values() for row in rows):
            row["word_rank"] = best.index(row["example"]) + 1 if row["example"] in best else None


def print_table(views: list[dict], table: list[list[tuple[str, float]]]) -> None:
    """Print the first documents of each query."""
    for view, best in zip(views, table, strict=True):
        run.say(f"\n{' '.join(view['id'].split())}: {' '.join(view['prompt'].split())[:90]}")
        for rank, (document, score) in enumerate(best, 1):
            run.say(f"  {rank}. {score:+.4g}  {' '.join(document.split())}")
    run.say("")


if __name__ == "__main__":
    run.guarded(main, build_parser())
