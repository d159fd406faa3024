"""Stage 4/4. Reads logs/<run>/scores/<queries>-.../. Writes top_k.jsonl and top_k.txt there, and prints a short table.

    python analysis.py --top_k 5 --unique_documents

With no arguments: the newest scores under logs/.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from logra import run, store
from logra.influence import top_k
from logra.log import Log

SHOWN = 3  # documents a query in the printed table


def build_parser() -> run.Parser:
    """Return the command line's parser."""
    parser = run.Parser(description=__doc__)
    parser.add_argument("--log_dir", type=Path, help="the run's folder (the one with the newest scores under logs/)")
    parser.add_argument("--split", help="scores of this query set only, as it was given to compute_influence.py")
    parser.add_argument("--top_k", type=run.positive_int, default=20, help="examples a query (20)")
    parser.add_argument("--bottom", action="store_true", help="also the examples with the lowest scores")
    parser.add_argument("--unique_documents", action="store_true", help="the best example of each document only")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the best examples of each query."""
    folder, about = newest_scores(args.log_dir, args.split)
    log = Log.load(folder.parents[1])
    if Log(folder, about["log"]).fingerprints != log.fingerprints:
        raise ValueError(
            f"expected scores of {log.folder}'s examples in {folder}, got others; run compute_influence.py again"
        )
    examples = log.train()
    documents = examples["document_id"]
    queries = [json.loads(line) for line in store.read_lines(folder / "queries.jsonl")]
    scores = Scores(folder, len(queries), log.examples)
    rows = []
    for number, query in enumerate(queries):
        for largest in [True, False] if args.bottom else [True]:
            chosen = best_examples(scores, number, documents, args.top_k, largest, args.unique_documents)
            for rank, (i, score) in enumerate(chosen, 1):
                rows.append(describe(query, rank, score, i, examples[i], largest))
    with store.atomic(folder / "top_k.jsonl") as path:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    with store.atomic(folder / "top_k.txt") as path:
        path.write_text("\n".join(readable(queries, rows)), "utf-8")
    print_table(queries, scores, documents)
    print(f"{folder / 'top_k.txt'}\n{folder / 'top_k.jsonl'}")


def newest_scores(log_dir: Path | None, split: str | None) -> tuple[Path, dict]:
    """Return the folder of the newest scores (of a run, of a query set) and its run.json."""
    pattern = "*/scores/*/run.json" if log_dir is None else "scores/*/run.json"
    root = Path("logs") if log_dir is None else log_dir
    for path in sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True):
        about = store.read_json(path, "run compute_influence.py again")
        if path.parent.suffix != ".tmp" and split in (None, about.get("split")):
            return path.parent, about
    wanted = f" of --split {split}" if split else ""
    raise ValueError(f"expected scores{wanted} under {root}, got none; run compute_influence.py first")


class Scores:
    """The scores of a folder: all of them, or with --top_k_only the ends."""

    def __init__(self, folder: Path, queries: int, examples: int):
        self.ends: dict[bool, dict[str, torch.Tensor]] = {}
        try:
            if (folder / "top.json").exists():
                for largest, name in ((True, "top"), (False, "bottom")):
                    entry = store.read_json(folder / f"{name}.json", "")
                    self.ends[largest] = store.load_tensors(folder / f"{name}.safetensors", entry)
                return
            self.matrix = np.load(folder / "scores.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"expected scores in {folder}, got {error}; run compute_influence.py again") from error
        if self.matrix.shape != (queries, examples) or self.matrix.dtype != np.float32:
            raise ValueError(
                f"expected float32 {[queries, examples]} in {folder / 'scores.npy'}, got {list(self.matrix.shape)}; "
                "run compute_influence.py again"
            )

    def ranking(self, query: int, largest: bool, count: int | None) -> tuple[list[int], list[float]]:
        """Return the example ids and scores of a query, best (or worst) first, `count` of them, as far as known."""
        if self.ends:
            return tuple(self.ends[largest][key][query][:count].tolist() for key in ("ids", "scores"))
        row = torch.from_numpy(np.array(self.matrix[query]))
        order = top_k(row, len(row) if count is None else count, largest)
        return order.tolist(), row[order].tolist()


def best_examples(
    scores: Scores, query: int, documents: list[str], count: int, largest: bool, unique: bool
) -> list[tuple[int, float]]:
    """Return (example id, score), best first, at most `count`; with `unique` the best of each document only."""
    seen, kept = set(), []
    for i, score in zip(*scores.ranking(query, largest, None if unique else count), strict=True):
        if unique and documents[i] in seen:
            continue
        kept.append((i, score))
        seen.add(documents[i])
        if len(kept) == count:
            return kept
    if scores.ends and len(seen) < len(set(documents)) and len(kept) < len(documents):
        print(f"query {query}: {len(kept)} of {count} examples, since the scores were kept with --top_k_only")
    return kept


def describe(query: dict, rank: int, score: float, example: int, row: dict, largest: bool) -> dict:
    """Return a row of top_k.jsonl."""
    entry = {
        "query": query["id"],
        "side": "top" if largest else "bottom",
        "rank": rank,
        "score": score,
        "example": example,
    }
    entry |= {"document": row["document_id"], "block": row.get("block")}
    return entry | ({"documents": row["document_ids"]} if "document_ids" in row else {}) | {"text": row["text"]}


def readable(queries: list[dict], rows: list[dict]) -> list[str]:
    """Return the lines of top_k.txt."""
    lines, found = [], defaultdict(list)
    for row in rows:
        found[row["query"]].append(row)
    for query in queries:
        asked = query.get("prompt") or query.get("text", "")
        lines += ["=" * 100, f"Query {query['id']}: {asked}", query.get("response", ""), ""]
        for row in found[query["id"]]:
            place = f"{row['document']}  (example {row['example']})"
            lines += [f"--- {row['side']} {row['rank']}: {row['score']:+.4g}  {place}", row["text"].strip(), ""]
    return lines


def print_table(queries: list[dict], scores: Scores, documents: list[str]) -> None:
    """Print the first documents of each query."""
    for number, query in enumerate(queries):
        asked = " ".join((query.get("prompt") or query.get("text", "")).split())
        print(f"\n{query['id']}: {asked[:90]}")
        for rank, (i, score) in enumerate(best_examples(scores, number, documents, SHOWN, True, True), 1):
            print(f"  {rank}. {score:+.4g}  {documents[i]}")
    print()


if __name__ == "__main__":
    run.guarded(main, build_parser())
