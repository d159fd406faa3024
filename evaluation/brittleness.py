"""Brittleness: how much does a query's loss rise when a model is trained again without its top k texts?

    python evaluation/brittleness.py testbeds/gpt2 logs/lds/*/scores/queries-* --k 20

Takes a testbed of evaluation/lds.py and scores of its queries and texts. Each of the first queries has a model of its
own, trained from the same weights without the k texts that have the query's highest scores; so have some draws of k
random texts, which all queries and folders share. The rise is against the model of all texts, in nats, summed over the
query's tokens. Leaving texts out changes the order of the others, which alone changes the loss: the random draws say
by how much, and the difference from them is what counts. Intervals are over queries.

A model's losses are kept in <testbed>/brittleness/<hash of its removed texts and the testbed's settings>.npy [Q], so
that a stopped start goes on there, and further queries, folders and draws train just the models that are missing.
"""

import argparse
import json
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored
import testbed

from logra.inputs.model import load_tokenizer
from logra.runtime import files
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import positive_int, seed_int


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("testbed", type=Path, help="its folder")
    parser.add_argument(
        "scores", nargs="+", type=Path, help="folders under logs/<run>/scores/, of its queries and texts"
    )
    parser.add_argument("--k", type=positive_int, default=20, help="texts to remove (20)")
    parser.add_argument("--num_queries", type=positive_int, default=10, help="the first ones (10)")
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
    draws = np.random.default_rng(args.seed)
    removed = [[]] + [draws.choice(len(texts), args.k, replace=False) for _ in range(args.num_random)]
    for folder in args.scores:
        run = scored.load(folder)
        if run.documents != [row["id"] for row in texts] or run.queries != [row["id"] for row in queries]:
            raise ValueError(
                f"expected scores of {args.testbed}'s queries and texts in {folder}, got others; score these"
            )
        removed += list(np.argsort(-run.scores[: args.num_queries], axis=1, kind="stable")[:, : args.k])
    losses = retrain(args.testbed, settings, texts, queries, [sorted(map(int, ids)) for ids in removed])
    first, number = 1 + args.num_random, np.arange(args.num_queries)
    random = (losses[1:first] - losses[0]).mean(axis=0)[number]
    rows = [[f"{args.k} random texts, mean of {args.num_random} draws", random, "", ""]]
    for folder, part in zip(args.scores, np.split(losses[first:], len(args.scores)), strict=True):
        rise = part[number, number] - losses[0, number]
        rows.append([folder, rise, rise - random, rise > random])
    scored.print_table([f"without the top {args.k} of", "rise of the loss", "minus random", "above random"], rows)


def retrain(
    folder: Path, settings: dict, texts: list[dict], queries: list[dict], removed: list[list[int]]
) -> np.ndarray:
    """Return the losses [len(removed), Q] of models without some texts; train those missing, one a core at a time."""
    hashes = [xxhash.xxh3_64_hexdigest(json.dumps([ids, settings], sort_keys=True).encode()) for ids in removed]
    files = [folder / "brittleness" / f"{name}.npy" for name in hashes]
    if jobs := {file: ids for file, ids in zip(files, removed, strict=True) if not file.exists()}:
        tokenizer = load_tokenizer(str(folder / "model"))
        tokens = [tokenizer([row["text"] for row in rows])["input_ids"] for rows in (texts, queries)]
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(jobs)), one_thread) as pool:
            done = pool.imap_unordered(partial(train_one, settings, *tokens), jobs.items())
            for _ in tqdm(done, total=len(jobs), desc="training", unit="model"):
                pass
    return np.stack([np.load(file) for file in files])


def one_thread() -> None:
    """Leave the other cores to the other processes."""
    torch.set_num_threads(1)


def train_one(settings: dict, train: list[list[int]], queries: list[list[int]], job: tuple[Path, list[int]]) -> None:
    """Train the model without some texts, and write its losses."""
    file, removed = job
    sizes = settings["num_layers"], settings["width"], settings["vocabulary"]
    config = testbed.make_config(settings["architecture"], *sizes, 2 * testbed.TOKENS)
    kept = [ids for i, ids in enumerate(train) if i not in set(removed)]
    model = testbed.train(config, kept, settings["epochs"], order_seed=settings["seed"], init_seed=settings["seed"])
    with files.atomic(file) as made, open(made, "wb") as opened:
        np.save(opened, testbed.losses(model, queries))


if __name__ == "__main__":
    run_script(main, build_parser())
