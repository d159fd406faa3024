"""Linear datamodelling score (LDS; Park et al., arXiv 2303.14186): do scores predict the effect of training on less?

    python evaluation/lds.py testbeds/gpt2 --architecture gpt2                 # trains; continues after a stop
    python evaluation/lds.py testbeds/gpt2 logs/lds/*/scores/queries-*         # LDS of these scores
    python evaluation/lds.py testbeds/gpt2 logs/half/*/scores/queries-* --half # against the losses at half of training

Notation: N train texts, Q queries, M subsets. A subset is a random half of the texts, and a model is trained on each.
The LDS of a query is Spearman's correlation over the subsets between the sum of the scores of a subset's texts and
minus the query's loss under the subset's model. Intervals resample the queries and the subsets. To judge a small
difference between two methods, give one of them first: does the other's ratio to it differ from 1? The testbed's folder
holds

    testbed.json                           its settings; later commands must agree with them
    model/, train.jsonl, queries.jsonl     the model trained on all N texts, and the texts, for the pipeline
    checkpoints/0.05/ ...                  the same model after each of these shares of its training
    subsets.npy [M, N] bool, losses/00000.npy [Q] float32 in nats, one file for each subset
    losses_half/                           the same after half of the training
    losses_again/                          of a third of the subsets, trained again on their texts in another order

No scores know the order of the texts. So their LDS is at most about the ceiling: the square root of the correlation of
the losses with those of the models that were trained again.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored
import testbed

from logra.models.model import load_tokenizer
from logra.runtime import files
from logra.runtime.flag_types import positive_int, seed_int
from logra.runtime.flags import Parser, run_script
from logra.scoring.rank import scored_runs
from logra.scoring.reranked import ranks

SETTINGS = (
    "architecture", "texts", "num_texts", "num_queries", "num_subsets", "num_layers", "width", "vocabulary",
    "epochs", "seed",
)  # fmt: skip


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("testbed", type=Path, help="its folder")
    parser.add_argument("scores", nargs="*", type=Path, help="folders under logs/<run>/scores/, of its queries")
    parser.add_argument("--json", type=Path, help="also write the table's numbers to this file")
    parser.add_argument(
        "--half", action="store_true", help="take the losses after half of the training; for scores of that checkpoint"
    )
    group = parser.add_argument_group("a new testbed")
    group.add_argument("--architecture", choices=testbed.ARCHITECTURES, default="gpt2", help="(gpt2)")
    group.add_argument("--texts", nargs="+", default=["pydoc"], help="docstrings, or as for --data_name (pydoc)")
    group.add_argument("--num_texts", type=positive_int, default=2000, help="train texts at most (2000)")
    group.add_argument(
        "--num_queries", type=positive_int, default=100, help="texts that are not like a train text (100)"
    )
    group.add_argument("--num_subsets", type=positive_int, default=60, help="models trained on half of them (60)")
    testbed.add_size_flags(group)
    group.add_argument("--epochs", type=positive_int, default=10, help="(10)")
    group.add_argument("--seed", type=seed_int, default=0, help="of texts, subsets and training (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make what the testbed lacks, then print the LDS of each folder of scores."""
    settings, path = {name: getattr(args, name) for name in SETTINGS}, args.testbed / "testbed.json"
    if path.exists():
        settings = scored.made_with(path, settings, build_parser())
    texts, queries = make_texts(args.testbed, settings)
    subsets = train_subsets(args.testbed, settings, texts, queries)
    losses = load_losses(args.testbed / ("losses_half" if args.half else "losses"))
    highest = ceiling(load_losses(args.testbed / "losses"), load_losses(args.testbed / "losses_again"))
    print(f"ceiling {highest:.3f}: what no scores that are blind to the order of the training texts can exceed")
    rows: list[dict[str, Any]] = []
    samples: list[np.ndarray] = []
    for folder in dict.fromkeys(args.scores):
        scores = load_scores(folder, args.testbed, len(queries), len(texts))
        size = sum(gradient_bytes(run, len(texts)) for run in runs_of(folder))
        rows.append({"scores": str(folder), "bytes": size})
        rows[-1]["lds"] = lds(scores, subsets, losses).tolist()
        samples.append(bootstrap_means(scores, subsets, losses))
    for row, sample in zip(rows, samples, strict=True):
        row |= describe(row["lds"], sample, rows[0]["lds"], samples[0])
        print(
            f"{row['mean']:.4f}  [{row['low']:.4f}, {row['high']:.4f}]  x{row['ratio']:.3f} "
            f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]  {row['bytes']:9,.0f} bytes  {row['scores']}"
        )
    if args.json:
        files.write_json(args.json, {"rows": rows, "ceiling": highest})


def make_texts(folder: Path, settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the train texts and the queries of a testbed; in a new one make them and the tokenizer.

    Raises:
        ValueError: The data set has too few passages, or too few that are not like a train text.
    """
    if not (folder / "testbed.json").exists():
        passages, num_queries = testbed.passages(*settings["texts"]), settings["num_queries"]
        if len(passages) < 2 * num_queries:
            raise ValueError(
                f"expected at least {2 * num_queries} passages in {' '.join(settings['texts'])}, got {len(passages)}; "
                "lower --num_queries"
            )
        np.random.default_rng(settings["seed"]).shuffle(passages)
        spare = num_queries // 5  # for queries that are not held out
        end = min(num_queries + settings["num_texts"], len(passages) - spare)
        train, others = passages[num_queries:end], passages[:num_queries] + passages[end:]
        tokenizer = testbed.make_tokenizer(train, settings["vocabulary"])
        tokenizer.save_pretrained(folder / "model")
        train, others = (
            list(dict.fromkeys(testbed.shorten(text, tokenizer) for text in part)) for part in (train, others)
        )
        queries = testbed.held_out(others, train)[:num_queries]
        if len(queries) < num_queries:
            raise ValueError(
                f"expected {num_queries} passages that share less than half of their 5-grams with each train text, "
                f"got {len(queries)}; lower --num_queries or --num_texts"
            )
        rows = [{"id": str(i), "text": text} for i, text in enumerate(queries + train)]
        scored.write_rows(folder / "queries.jsonl", rows[:num_queries])
        scored.write_rows(folder / "train.jsonl", rows[num_queries:])
        files.write_json(folder / "testbed.json", settings)
    texts, queries = (
        [row["text"] for row in scored.read_rows(folder / f"{name}.jsonl")] for name in ("train", "queries")
    )
    return texts, queries


def train_one(
    folder: Path, settings: dict[str, Any], train: list[list[int]], queries: list[list[int]], subsets: np.ndarray,
    job: tuple[str, int],
) -> None:  # fmt: skip
    """Train a model of a testbed and write what is kept of it.

    Args:
        folder, settings: Of the testbed.
        train, queries: Token ids of the texts.
        subsets: [M, N].
        job: A folder, and the number of a subset. `model`: train on all texts (no number) and keep the checkpoints.
            `losses`, `losses_again`: train on a subset, and keep the losses of the queries.
    """
    name, number = job
    ids = train if name == "model" else [train[i] for i in np.flatnonzero(subsets[number])]
    order_seed = settings["seed"] + 1 + number + (len(subsets) if name == "losses_again" else 0)

    def write_losses(part: str, model: torch.nn.Module) -> None:
        with files.atomic(folder / part / f"{number:05d}.npy") as path, open(path, "wb") as file:
            np.save(file, testbed.losses(model, queries))

    def at_share(share: float, model: torch.nn.Module) -> None:
        if name == "model":
            model.save_pretrained(folder / "checkpoints" / str(share))
        elif name == "losses" and share == 0.5:
            write_losses("losses_half", model)

    model = testbed.train_with_settings(settings, ids, order_seed, at_share)
    if name == "model":
        model.save_pretrained(folder / "model")
    else:
        write_losses(name, model)


def train_subsets(folder: Path, settings: dict[str, Any], texts: list[str], queries: list[str]) -> np.ndarray:
    """Train the models that are missing; return the subsets [M, N] bool."""
    path = folder / "subsets.npy"
    if not path.exists():
        random = np.random.default_rng(settings["seed"])
        halves = [random.permutation(len(texts)) < len(texts) // 2 for _ in range(settings["num_subsets"])]
        with files.atomic(path) as made, open(made, "wb") as file:
            np.save(file, np.array(halves))
    subsets = np.load(path)
    jobs = [("model", -1)] if not (folder / "model/model.safetensors").exists() else []
    for name, count in ("losses", len(subsets)), ("losses_again", -(-len(subsets) // 3)):
        jobs += [(name, number) for number in range(count) if not (folder / name / f"{number:05d}.npy").exists()]
    if jobs:
        tokenizer = load_tokenizer(str(folder / "model"))
        for share in testbed.SHARES:
            tokenizer.save_pretrained(folder / "checkpoints" / str(share))
        train_ids, query_ids = (tokenizer(rows)["input_ids"] for rows in (texts, queries))
        testbed.train_in_parallel(partial(train_one, folder, settings, train_ids, query_ids, subsets), jobs)
    return subsets


def load_losses(folder: Path) -> np.ndarray:
    """Return the losses in a folder of a testbed, [files, Q]."""
    return np.stack([np.load(path) for path in sorted(folder.glob("*.npy"))])


def ceiling(losses: np.ndarray, again: np.ndarray) -> float:
    """Return the LDS that no scores exceed but by chance: the root of the losses' reliability.

    Args:
        losses: [M, Q].
        again: Of the first m subsets' models, trained again on their texts in another order, [m, Q].

    Returns:
        The square root of the mean over queries of Spearman's correlation over the m subsets; 0 if that is negative.
    """
    reliability = (ranks(losses[: len(again)].T) * ranks(again.T)).sum(axis=1).mean()
    return float(np.sqrt(max(reliability, 0.0)))


def load_scores(folder: Path, testbed_folder: Path, queries: int, examples: int) -> np.ndarray:
    """Return scores [Q, N] of the testbed's queries and texts: the pipeline's (checked), or just a scores.npy.

    Raises:
        ValueError: They have another shape, or as scored.load.
    """
    scores = scored.load(folder).scores if (folder / "run.json").exists() else np.load(folder / "scores.npy")
    if scores.shape != (queries, examples):
        raise ValueError(
            f"expected scores {(queries, examples)} in {folder}, got {scores.shape}; score {testbed_folder}"
        )
    return scores


def runs_of(folder: Path) -> list[Path]:
    """Return the runs whose stored gradients the scores in a folder, of the pipeline or a baseline, came from."""
    if (folder / "run.json").exists():
        return [run.folder for run in scored_runs(folder.absolute())]
    path = folder / "gradients.json"
    return [Path(files.read_json(path, "run baselines.py again")["run"])] if path.exists() else []


def gradient_bytes(run: Path, examples: int) -> float:
    """Return the stored bytes per example: of the files under gradients/, without the factor files."""
    paths = [path for path in (run / "gradients").glob("*") if ".factors" not in path.name]
    return sum(path.stat().st_size for path in paths) / examples


def lds(scores: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return each query's Spearman correlation, [Q], from scores [Q, N], subsets [M, N] and losses [M, Q]."""
    predicted = scores.astype(np.float64) @ subsets.T  # [Q, M]
    return (ranks(predicted) * ranks(-losses.T.astype(np.float64))).sum(axis=1)


def bootstrap_means(scores: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the mean LDS of each bootstrap sample, [BOOTSTRAP_SAMPLES]: subsets and queries drawn with replacement.

    Both are samples: other subsets, with their models, would give other values for all queries at once. The noise of
    single losses is drawn twice, so that intervals are rather too wide than too narrow. The draws depend only on the
    sizes, so that two methods are compared on the same samples. Arguments as for lds.
    """
    subset_counts, query_counts = (scored.bootstrap_counts(size, seed) for seed, size in enumerate(losses.shape))
    predicted = scores.astype(np.float64) @ subsets.T  # [Q, M]
    means = np.zeros(len(subset_counts))
    for query, (x, y) in enumerate(zip(predicted, -losses.T, strict=True)):
        a, b = (_centred_ranks(subset_counts, values) for values in (x, y))
        product, of_a, of_b = ((subset_counts * part).sum(axis=1) for part in (a * b, a * a, b * b))
        means += query_counts[:, query] * product / np.maximum(np.sqrt(of_a * of_b), 1e-30)
    return means / losses.shape[1]


def _centred_ranks(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the ranks of values [M] in samples that hold each counts [B, M] times, [B, M]; equal values share one."""
    below = (values[:, None] < values) + 0.5 * (values[:, None] == values)
    return counts @ below - len(values) / 2  # the mean of a sample's ranks, counted from 0


def describe(values: list[float], sample: np.ndarray, first: list[float], first_sample: np.ndarray) -> dict[str, float]:
    """Return the mean LDS and its ratio to the first method's, with 95% intervals over subsets and queries.

    Args:
        values: LDS of each query, [Q].
        sample: Its bootstrap_means.
        first, first_sample: The same of the first method.
    """
    mean = np.mean(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, ratios = mean / np.mean(first), sample / first_sample
    (low, high), (ratio_low, ratio_high) = (np.nanpercentile(part, (2.5, 97.5)) for part in (sample, ratios))
    named = {"mean": mean, "low": low, "high": high, "ratio": ratio}
    return {key: float(value) for key, value in (named | {"ratio_low": ratio_low, "ratio_high": ratio_high}).items()}


if __name__ == "__main__":
    run_script(main, build_parser())
