"""Linear datamodelling score (LDS; Park et al., arXiv 2303.14186): do scores foretell what training on less data does?

    python evaluation/lds.py testbeds/gpt2 --architecture gpt2                 # trains; goes on where it was stopped
    python evaluation/lds.py testbeds/gpt2 logs/lds/*/scores/queries-*         # LDS of these scores

Notation: N train texts, Q queries, M subsets of half of the texts, on each of which a model is trained. The LDS of a
query is Spearman's correlation, over the M subsets, of the sum of the scores of a subset's texts with minus the loss
of the query under the subset's model. The testbed's folder holds

    testbed.json                  its settings, checked on each use
    model/, train.jsonl, queries.jsonl    the model of all N texts, and the texts, for the pipeline
    subsets.npy [M, N] bool, losses/00000.npy [Q] float32 in nats, one file a subset
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored
import testbed

from logra.runtime import files
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import positive_int, seed_int

RESAMPLES = 2000


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("testbed", type=Path, help="its folder")
    parser.add_argument("scores", nargs="*", type=Path, help="folders under logs/<run>/scores/, of its queries")
    parser.add_argument("--json", type=Path, help="also write the table's numbers to this file")
    group = parser.add_argument_group("a new testbed")
    group.add_argument("--architecture", choices=testbed.ARCHITECTURES, default="gpt2", help="(gpt2)")
    group.add_argument("--texts", default="pydoc", help="pydoc, or a data set as for --data_name (pydoc)")
    group.add_argument("--num_texts", type=positive_int, default=2000, help="train texts at most (2000)")
    group.add_argument("--num_queries", type=positive_int, default=100, help="held-out texts (100)")
    group.add_argument("--num_subsets", type=positive_int, default=60, help="models trained on half of them (60)")
    group.add_argument("--num_layers", type=positive_int, default=3, help="of the model (3)")
    group.add_argument("--width", type=positive_int, default=128, help="of the model, a multiple of 8 (128)")
    group.add_argument("--vocabulary", type=positive_int, default=1024, help="tokens (1024)")
    group.add_argument("--epochs", type=positive_int, default=10, help="(10)")
    group.add_argument("--seed", type=seed_int, default=0, help="of texts, subsets and training (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make what the testbed lacks, then print the LDS of each folder of scores."""
    texts, queries = make_texts(args)
    subsets, truth = train_subsets(args, texts, queries)
    rows = []
    for folder in dict.fromkeys(args.scores):
        scores = load_scores(folder, args.testbed, len(queries), len(texts))
        rows.append({"scores": str(folder), "bytes": gradient_bytes(folder.parents[1], len(texts))})
        rows[-1]["lds"] = lds(scores, subsets, truth).tolist()
    for row in rows:
        row |= describe(row["lds"], rows[0]["lds"])
        print(
            f"{row['mean']:.4f}  [{row['low']:.4f}, {row['high']:.4f}]  x{row['ratio']:.3f} "
            f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]  {row['bytes']:9,.0f} bytes  {row['scores']}"
        )
    if args.json:
        files.write_json(args.json, {"rows": rows})


def make_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return (train texts, queries) of the testbed; make them, the tokenizer and the full model where they lack.

    Raises:
        ValueError: The testbed there has other settings, or the data are too few.
    """
    names = (
        "architecture", "texts", "num_texts", "num_queries", "num_subsets", "num_layers", "width", "vocabulary",
        "epochs", "seed",
    )  # fmt: skip
    settings, path = {name: getattr(args, name) for name in names}, args.testbed / "testbed.json"
    if path.exists():
        known = files.read_json(path, "delete the testbed")
        defaults = vars(build_parser().parse_args([str(args.testbed)]))
        for name in names:
            if settings[name] not in (known[name], defaults[name]):
                raise ValueError(
                    f"expected --{name} {known[name]} (from {path}), got {settings[name]}; use another folder"
                )
            setattr(args, name, known[name])
    else:
        every = testbed.passages(args.texts)
        if len(every) < 2 * args.num_queries:
            raise ValueError(f"expected at least {2 * args.num_queries} passages in {args.texts}, got {len(every)}")
        np.random.default_rng(args.seed).shuffle(every)
        every = every[: args.num_queries + args.num_texts]
        tokenizer = testbed.make_tokenizer(every[args.num_queries :], args.vocabulary)
        tokenizer.save_pretrained(args.testbed / "model")
        rows = [{"id": str(i), "text": testbed.shorten(text, tokenizer)} for i, text in enumerate(every)]
        for name, part in (("queries", rows[: args.num_queries]), ("train", rows[args.num_queries :])):
            with files.atomic(args.testbed / f"{name}.jsonl") as made:
                made.write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
        files.write_json(path, settings)
    texts, queries = (
        [json.loads(line)["text"] for line in files.read_lines(args.testbed / f"{name}.jsonl")]
        for name in ("train", "queries")
    )
    return texts, queries


def _one_thread() -> None:
    torch.set_num_threads(1)


def _train_one(args: argparse.Namespace, train: list[list[int]], queries: list[list[int]], job: tuple) -> None:
    """Train the model of one subset, and write its losses; or, without a subset, write the model of all texts."""
    number, chosen = job
    config = testbed.make_config(args.architecture, args.num_layers, args.width, args.vocabulary, 2 * testbed.TOKENS)
    ids = train if chosen is None else [train[i] for i in np.flatnonzero(chosen)]
    model = testbed.train(config, ids, args.epochs, order_seed=args.seed + 1 + number, init_seed=args.seed)
    if chosen is None:
        model.save_pretrained(args.testbed / "model")
        return
    with files.atomic(args.testbed / "losses" / f"{number:05d}.npy") as path, open(path, "wb") as file:
        np.save(file, testbed.losses(model, queries))


def train_subsets(args: argparse.Namespace, texts: list[str], queries: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Train the models that are missing, one a core at a time; return (subsets [M, N] bool, losses [M, Q])."""
    path = args.testbed / "subsets.npy"
    if not path.exists():
        random = np.random.default_rng(args.seed)
        halves = [random.permutation(len(texts)) < len(texts) // 2 for _ in range(args.num_subsets)]
        with files.atomic(path) as made, open(made, "wb") as file:
            np.save(file, np.array(halves))
    subsets = np.load(path)
    files = [args.testbed / "losses" / f"{number:05d}.npy" for number in range(len(subsets))]
    jobs: list[tuple] = [(number, subsets[number]) for number, file in enumerate(files) if not file.exists()]
    if not (args.testbed / "model" / "model.safetensors").exists():
        jobs.insert(0, (-1, None))
    if jobs:
        tokenizer = load_tokenizer(args.testbed)
        train, asked = (tokenizer(part)["input_ids"] for part in (texts, queries))
        with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _one_thread) as pool:
            done = pool.imap_unordered(partial(_train_one, args, train, asked), jobs)
            for _ in tqdm(done, total=len(jobs), desc="training", unit="model"):
                pass
    return subsets, np.stack([np.load(file) for file in files])


def load_tokenizer(folder: Path):
    """Load the testbed's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


def load_scores(folder: Path, testbed_folder: Path, queries: int, examples: int) -> np.ndarray:
    """Return scores [Q, N] of the testbed's queries and texts, or raise a ValueError."""
    scores = scored.load(folder).scores if (folder / "run.json").exists() else np.load(folder / "scores.npy")
    if scores.shape != (queries, examples):
        raise ValueError(
            f"expected scores {(queries, examples)} in {folder}, got {scores.shape}; score {testbed_folder}"
        )
    return scores


def gradient_bytes(run: Path, examples: int) -> float:
    """Return the bytes an example of everything under gradients/ but the factor files."""
    files = [path for path in (run / "gradients").glob("*") if ".factors" not in path.name]
    return sum(path.stat().st_size for path in files) / examples


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks along the last axis, equal values sharing their mean rank, centred and of length 1."""
    order = np.sort(values, axis=-1)
    found = np.stack(
        [np.searchsorted(o, v, "left") + np.searchsorted(o, v, "right") for o, v in zip(order, values, strict=True)]
    )
    centred = found - found.mean(axis=-1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-30)


def lds(scores: np.ndarray, subsets: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return each query's Spearman correlation, [Q], from scores [Q, N], subsets [M, N] and losses [M, Q]."""
    foretold = scores.astype(np.float64) @ subsets.T  # [Q, M]
    return (ranks(foretold) * ranks(-truth.T.astype(np.float64))).sum(axis=1)


def describe(values: list[float], first: list[float]) -> dict[str, float]:
    """Return the mean and its ratio to the mean of `first`, with 95% bootstrap intervals over the queries."""
    values, first = np.array(values), np.array(first)
    chosen = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    means = values[chosen].mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, ratios = values.mean() / first.mean(), means / first[chosen].mean(axis=1)
    (low, high), (ratio_low, ratio_high) = (np.nanpercentile(part, (2.5, 97.5)) for part in (means, ratios))
    named = {"mean": values.mean(), "low": low, "high": high, "ratio": ratio}
    return {key: float(value) for key, value in (named | {"ratio_low": ratio_low, "ratio_high": ratio_high}).items()}


if __name__ == "__main__":
    run_script(main, build_parser())
