"""Tail-patch (Chang et al., arXiv 2410.17413): does one training step on the top examples help the query?

    python evaluation/tail_patch.py logs/quickstart/scores/topics-* --k 10

For each query, the run's model (float32, no dropout) takes one training step on the k examples with the highest
scores, then, from the run's weights again, one on k random examples, and one on the k with the lowest scores. The
result is the change of the query's log-probability, in nats, summed over its tokens that count. The step is plain
gradient descent on the mean loss of the k examples' tokens, with a fixed length:

    w <- w - learning_rate |w| g / |g|        w all weights, g the gradient, || the norm over all of them

So a set can win by the direction of its gradient only, not by its size, which is large for few, odd or long texts. And
one learning_rate fits models of all sizes.

Each query's changes are written at once to tail_patch-<k>-<learning_rate>-<seed>.json in the folder of the scores, so
a command continues after a stop. Intervals are over queries.
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

from logra.inputs.queries import Query, load_queries, query_hash
from logra.loss import IGNORE
from logra.models.model import fingerprint, hub_options, load_model, load_tokenizer
from logra.runtime import files
from logra.runtime.flag_types import positive, positive_int, seed_int
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import QuerySettings
from logra.stages.batches import make_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("scores", nargs="+", type=Path, help="folders under logs/<run>/scores/")
    parser.add_argument("--k", type=positive_int, default=10, help="examples in a step (10)")
    parser.add_argument(
        "--learning_rate", type=positive, default=1e-5, help="length of the step, in norms of the weights (1e-5)"
    )
    parser.add_argument("--max_queries", type=positive_int, help="use the first ones only")
    parser.add_argument("--seed", type=seed_int, default=0, help="of the random examples (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure each folder, then print the table."""
    rows = []
    for folder in args.scores:
        top, random, bottom = measure(folder, args).T
        rows.append([str(folder), str(len(top)), top, random, bottom, top - random, top > 0, top > random])
    sets = [f"{name} {args.k}" for name in ("top", "random", "bottom")]
    scored.print_table(["scores", "queries", *sets, "top - random", "top above 0", "top above random"], rows)


def measure(folder: Path, args: argparse.Namespace) -> np.ndarray:
    """Return each query's changes [Q, 3] by its top, random and bottom examples; measure those not on the disk."""
    found = scored.load(folder)
    if args.k > (total := len(found.documents)):
        raise ValueError(f"expected --k of at most {total}, the examples of {folder}, got {args.k}; lower it")
    path = folder / f"tail_patch-{args.k}-{args.learning_rate:g}-{args.seed}.json"
    changes = files.read_json(path, "delete it")["changes"] if path.exists() else []
    count = min(args.max_queries or len(found.queries), len(found.queries))
    if len(changes) >= count:
        return np.array(changes[:count])
    model, queries = load_scored(folder, found)
    patch, examples = Patch(model, args.learning_rate), found.run.train()
    for number in tqdm(range(len(changes), count), desc=folder.name, unit="query"):
        order = np.argsort(-found.scores[number], kind="stable")
        random = np.random.default_rng([args.seed, number]).choice(total, args.k, replace=False)
        parts = [examples[ids.tolist()] for ids in (order[: args.k], random, order[-args.k :])]
        sets = [list(zip(p["input_ids"], p.get("counted", [None] * args.k), strict=True)) for p in parts]
        query = queries[number].token_ids, queries[number].counted
        changes.append([patch.change(rows, query) for rows in sets])
        files.write_json(path, {"changes": changes})
    return np.array(changes)


def load_scored(folder: Path, found: scored.Scored) -> tuple[torch.nn.Module, list[Query]]:
    """Return the model and the queries of a folder of scores.

    Raises:
        ValueError: The queries, or the model, are not those that were scored.
    """
    settings, record = found.run.settings, found.record
    name, hub = settings.model_name, hub_options(settings.revision, trust_remote_code=False)
    wanted = QuerySettings(split=record.split, query_loss=record.query_loss, max_queries=record.num_queries)
    _, queries = load_queries(wanted, settings, load_tokenizer(name, **hub))
    if query_hash(queries) != record.queries:
        raise ValueError(f"expected the queries of {folder} in {record.split}, got others; restore it, or score again")
    model = load_model(name, torch.float32, DEVICE, **hub)
    found.run.check_model({"model": {"class": type(model).__name__, "fingerprint": fingerprint(model)}})
    return model, queries


class Patch:
    """Takes training steps from a model's weights, and restores these."""

    def __init__(self, model: torch.nn.Module, learning_rate: float):
        self.model, self.weights = model, [p.detach().clone() for p in model.requires_grad_().parameters()]
        self.length = learning_rate * torch.nn.utils.get_total_norm(self.weights)

    def loss(self, token_ids: list[int], counted: list[bool] | None) -> torch.Tensor:
        """Return a text's loss, in nats, summed over its tokens that count (logra.loss gives the head no gradient)."""
        batch = make_batch([token_ids], None if counted is None else [counted], DEVICE)
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits[0]
        return cross_entropy(logits, batch.targets[0], ignore_index=IGNORE, reduction="sum")

    def change(self, examples: list[tuple], query: tuple) -> float:
        """Return the change of the query's log-probability by a step on the examples.

        Args:
            examples: Token ids of each, and which of them count.
            query: The same of the query.
        """
        with torch.no_grad():
            before = self.loss(*query)
        for example in examples:  # one at a time, to save memory; the summed loss has the direction of the mean loss
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
