"""Brittleness: how much does a query's loss rise when a model is trained again without its top k texts?

    python evaluation/brittleness.py testbeds/gpt2 logs/lds/*/scores/queries-* --k 20

Takes a testbed of evaluation/lds.py and scores of its queries and texts. For each of the first queries a model is
trained from the same initial weights without the k texts that have the query's highest scores. A few more models are
trained without k random texts; all queries and folders share these. A folder with re-ranked scores (--rerank of
compute_influence.py) has two rows: of its stored scores and of the re-ranked ones.

The rise is the query's loss under such a model minus its loss under the model of all texts, in nats, summed over the
query's tokens. Removing texts also changes the order of the others, which alone changes the loss. The models without
random texts show by how much, so the result is the difference from them. Intervals are over queries. To compare two
kinds of scores, give one of them first: the last column has the differences from its rises, query by query.

The losses of a model are kept in <testbed>/brittleness/<hash of its removed texts and the testbed's settings>.npy [Q].
So a command continues after a stop, and further queries, folders and draws train only the models that are missing.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored
import testbed

from logra.models.model import load_tokenizer
from logra.runtime import files
from logra.runtime.flag_types import positive_int, seed_int
from logra.runtime.flags import Parser, run_script


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("testbed", type=Path, help="its folder")
    parser.add_argument(
        "scores", nargs="+", type=Path, help="folders under logs/<run>/scores/, of its queries and texts"
    )
    parser.add_argument("--k", type=positive_int, default=20, help="number of texts to remove (20)")
    parser.add_argument("--num_queries", type=positive_int, default=10, help="use the first ones only (10)")
    parser.add_argument("--num_random", type=positive_int, default=5, help="draws of random texts (5)")
    parser.add_argument("--seed", type=seed_int, default=0, help="of the draws (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Train the models that are missing, then print the table."""
    settings = files.read_json(args.testbed / "testbed.json", "make the testbed with evaluation/lds.py")
    texts, queries = (scored.read_rows(args.testbed / f"{name}.jsonl") for name in ("train", "queries"))
    for flag, limit in (("k", len(texts) - 1), ("num_queries", len(queries))):
        if getattr(args, flag) > limit:
            raise ValueError(
                f"expected --{flag} of at most {limit} for {args.testbed}, got {getattr(args, flag)}; lower it"
            )
    generator = np.random.default_rng(args.seed)
    removed = [[]] + [generator.choice(len(texts), args.k, replace=False) for _ in range(args.num_random)]
    lists: dict[str, np.ndarray] = {}
    for folder in args.scores:
        found = scored.load(folder)
        if found.documents != [row["id"] for row in texts] or found.queries != [row["id"] for row in queries]:
            raise ValueError(
                f"expected scores of {args.testbed}'s queries and texts in {folder}, got others; score these"
            )
        for name, scores in scored.rankings(folder, found).items():
            lists[name] = np.argsort(-scores[: args.num_queries], axis=1, kind="stable")[:, : args.k]
    removed += [ids for rows in lists.values() for ids in rows]
    losses = retrain(args.testbed, settings, texts, queries, [sorted(map(int, ids)) for ids in removed])
    of_all, of_random, of_lists = np.split(losses, [1, 1 + args.num_random])
    number = np.arange(args.num_queries)
    random = (of_random - of_all).mean(axis=0)[number]
    rows, rises = [[f"{args.k} random texts, mean of {args.num_random} draws", random, "", "", ""]], []
    for name, part in zip(lists, np.split(of_lists, len(lists)), strict=True):
        rises.append(part[number, number] - of_all[0, number])
        minus_first = rises[-1] - rises[0] if len(rises) > 1 else ""
        rows.append([name, rises[-1], rises[-1] - random, rises[-1] > random, minus_first])
    head = [f"without the top {args.k} of", "rise of the loss", "minus random", "above random", "minus the first one's"]
    scored.print_table(head, rows)


def retrain(
    folder: Path, settings: dict[str, Any], texts: list[dict], queries: list[dict], removed: list[list[int]]
) -> np.ndarray:
    """Return the losses [len(removed), Q] of the models without the removed texts; train those that are missing.

    Args:
        folder, settings: The testbed's.
        texts, queries: Its rows.
        removed: The numbers of the texts that each model is trained without, in order.
    """
    hashes = [xxhash.xxh3_64_hexdigest(json.dumps([ids, settings], sort_keys=True).encode()) for ids in removed]
    paths = [folder / "brittleness" / f"{name}.npy" for name in hashes]
    if jobs := {path: ids for path, ids in zip(paths, removed, strict=True) if not path.exists()}:
        tokenizer = load_tokenizer(str(folder / "model"))
        tokens = [tokenizer([row["text"] for row in rows])["input_ids"] for rows in (texts, queries)]
        testbed.train_in_parallel(partial(train_one, settings, *tokens), list(jobs.items()))
    return np.stack([np.load(path) for path in paths])


def train_one(
    settings: dict[str, Any], train: list[list[int]], queries: list[list[int]], job: tuple[Path, list[int]]
) -> None:
    """Train the model without some texts, and write its losses."""
    path, removed = job
    kept = [ids for i, ids in enumerate(train) if i not in set(removed)]
    model = testbed.train_with_settings(settings, kept, order_seed=settings["seed"])
    with files.atomic(path) as made, open(made, "wb") as file:
        np.save(file, testbed.losses(model, queries))


if __name__ == "__main__":
    run_script(main, build_parser())
