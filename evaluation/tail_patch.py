"""Tail-patch (Chang et al., arXiv 2410.17413): does a step of training on the top examples help the query?

    python evaluation/tail_patch.py logs/quickstart/scores/topics-* --k 10

For each query, one step is taken from the run's model (float32, no dropout) on the k examples with the highest scores,
on k random ones and on the k with the lowest; what is reported is the change of the query's log-probability, in nats,
summed over its tokens that count. Then the weights are put back. The step is plain gradient descent on the mean loss
of the k examples' tokens, but of a fixed length:

    w <- w - learning_rate |w| g / |g|        w all weights, g the gradient, || the norm over all of them

so that a set does not win by a larger gradient (few, odd or long texts have one), only by its direction, and one
learning_rate fits models of all sizes.

Each query's changes are kept in the scores' folder as they come, in tail_patch-<k>-<learning_rate>-<seed>.json, so
that a stopped start goes on there. Intervals are over queries.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored

from logra.inputs.batches import make_batch
from logra.inputs.model import fingerprint, hub_options, load_model, load_tokenizer
from logra.inputs.queries import load_queries, query_hash
from logra.loss import IGNORE
from logra.runtime import files
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import positive, positive_int, seed_int

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("scores", nargs="+", type=Path, help="folders under logs/<run>/scores/")
    parser.add_argument("--k", type=positive_int, default=10, help="examples in a step (10)")
    parser.add_argument(
        "--learning_rate", type=positive, default=1e-5, help="step, in units of the weights' norm (1e-5)"
    )
    parser.add_argument("--max_queries", type=positive_int, help="the first ones")
    parser.add_argument("--seed", type=seed_int, default=0, help="of the random examples (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure each folder, then print the table."""
    rows = []
    for folder in args.scores:
        top, random, bottom = measure(folder, args).T
        rows.append([str(folder), str(len(top)), top, random, bottom, top - random, top > random])
    sets = [f"{name} {args.k}" for name in ("top", "random", "bottom")]
    scored.print_table(["scores", "queries", *sets, "top - random", "top above random"], rows)


def measure(folder: Path, args: argparse.Namespace) -> np.ndarray:
    """Return each query's changes [Q, 3] by its top, random and bottom examples; measure what is not kept yet."""
    run = scored.load(folder)
    settings, about, total = run.log.settings, run.about, len(run.documents)
    if args.k > total:
        raise ValueError(f"expected --k of at most {total}, the examples of {folder}, got {args.k}; lower it")
    path = folder / f"tail_patch-{args.k}-{args.learning_rate:g}-{args.seed}.json"
    changes = files.read_json(path, "delete it")["changes"] if path.exists() else []
    count = min(args.max_queries or len(run.queries), len(run.queries))
    if len(changes) >= count:
        return np.array(changes[:count])
    name, hub = settings["model_name"], hub_options(settings, trust=False)
    tokenizer = load_tokenizer(name, **hub)
    queries = load_queries(about["split"], settings, tokenizer, about["query_loss"], about["num_queries"])[1]
    if query_hash(queries) != about["queries"]:
        raise ValueError(
            f"expected the queries of {folder} in {about['split']}, got others; restore it, or score again"
        )
    model = load_model(name, torch.float32, DEVICE, **hub)
    run.log.check_model({"model": {"class": type(model).__name__, "fingerprint": fingerprint(model)}})
    patch, examples = Patch(model, args.learning_rate), run.log.train()
    for number in tqdm(range(len(changes), count), desc=folder.name, unit="query"):
        order = np.argsort(-run.scores[number], kind="stable")
        random = np.random.default_rng([args.seed, number]).choice(total, args.k, replace=False)
        parts = [examples[ids.tolist()] for ids in (order[: args.k], random, order[-args.k :])]
        sets = [list(zip(p["input_ids"], p.get("counted", [None] * args.k), strict=True)) for p in parts]
        changes.append([patch.change(rows, queries[number][1:3]) for rows in sets])
        files.write_json(path, {"changes": changes})
    return np.array(changes)


class Patch:
    """Takes steps from a model's weights and puts them back."""

    def __init__(self, model: torch.nn.Module, learning_rate: float):
        self.model, self.weights = model, [p.detach().clone() for p in model.requires_grad_().parameters()]
        self.length = learning_rate * torch.nn.utils.get_total_norm(self.weights)

    def loss(self, token_ids: list[int], counted: list[bool] | None) -> torch.Tensor:
        """Return a text's loss, in nats, summed over its tokens that count. logra.loss has no gradient of the head."""
        batch = make_batch([token_ids], counted and [counted], DEVICE)
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits[0]
        return cross_entropy(logits, batch.targets[0], ignore_index=IGNORE, reduction="sum")

    def change(self, examples: list[tuple], query: tuple) -> float:
        """Return the change of the query's log-probability by a step on (token ids, what counts) of examples."""
        with torch.no_grad():
            before = self.loss(*query)
        for example in examples:  # one at a time, for the memory; the sum of their losses has the mean's direction
            self.loss(*example).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        step = self.length / torch.nn.utils.get_total_norm(gradients).clamp_min(1e-30)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(step * parameter.grad)
            after = self.loss(*query)
            for parameter, weight in zip(self.model.parameters(), self.weights, strict=True):
                parameter.copy_(weight)
        self.model.zero_grad()
        return float(before - after)


if __name__ == "__main__":
    run_script(main, build_parser())
