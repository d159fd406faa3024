"""Baselines for lds.py's table, from a run's own examples: BM25, embedding cosine, and TRAK-like scores.

    python evaluation/baselines.py logs/lds/raw64 --split testbeds/gpt2/queries.jsonl --output testbeds/gpt2/baselines

Writes <output>/{bm25,embedding,trak}/scores.npy [Q, N] float32 of Q queries and N train examples.
    bm25       Okapi BM25 (package bm25s), words in lower case
    embedding  cosine of the mean last hidden states
    trak       q (G^T G + lambda I)^-1 z (1 - p): TRAK (arXiv 2303.14186) with one model, all layers' stored gradients
               as one vector, p the geometric mean of the example's token probabilities, lambda 0.01 mean eigenvalues
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra.hooks import GradientCapture
from logra.inputs import model
from logra.inputs.batches import length_batches, make_batch
from logra.inputs.queries import load_queries
from logra.loss import example_losses, hidden_states
from logra.run_dir import RunDir
from logra.runtime import files
from logra.runtime.flags import Parser, run_script
from logra.stages.gradients import Extractor
from logra.tools.report import bm25_scores

NAMES = ("bm25", "embedding", "trak")
DAMPING = 0.01  # of trak, in units of the mean eigenvalue


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run with stored float gradients (for trak)")
    parser.add_argument("--split", required=True, help="the queries, as for compute_influence.py")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets a folder a baseline")
    parser.add_argument("--baselines", nargs="+", choices=NAMES, default=list(NAMES), help="(all)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Score, and write a folder for each baseline."""
    log = RunDir.load(args.run)
    if log.bits is not None and "trak" in args.baselines:
        raise ValueError(
            f"expected float gradients in {args.run} for trak, got {log.settings['store_dtype']}; leave it out"
        )
    name, hub = log.settings["model_name"], model.hub_options(log.settings, trust=False)
    tokenizer, lm = model.load_tokenizer(name, **hub), model.load_model(name, torch.float32, **hub)
    _, queries = load_queries(args.split, log.settings, tokenizer)
    asked, train = [query.token_ids for query in queries], list(log.train()["input_ids"])
    scores = {
        "bm25": lambda: list(bm25_scores(tokenizer.batch_decode(train), tokenizer.batch_decode(asked))),
        "embedding": lambda: embeddings(lm, asked) @ embeddings(lm, train).T,
        "trak": lambda: trak(log, lm, asked, [query.counted for query in queries], train),
    }
    for baseline in args.baselines:
        with files.atomic(args.output / baseline / "scores.npy") as path, open(path, "wb") as file:
            np.save(file, np.asarray(scores[baseline](), dtype=np.float32))
        print(args.output / baseline)


@torch.no_grad()
def embeddings(lm: torch.nn.Module, token_ids: list[list[int]]) -> torch.Tensor:
    """Return the mean last hidden state of each text, of length 1, [texts, d]."""
    found = torch.zeros(len(token_ids), lm.config.hidden_size)
    for rows in length_batches([len(ids) for ids in token_ids], 2048):
        batch = make_batch([token_ids[i] for i in rows])
        hidden = hidden_states(lm, batch.input_ids)
        real = torch.tensor([[t < len(token_ids[i]) for t in range(hidden.shape[1])] for i in rows])[..., None]
        found[rows] = (hidden * real).sum(dim=1) / real.sum(dim=1)
    return torch.nn.functional.normalize(found)


@torch.no_grad()
def probabilities(lm: torch.nn.Module, token_ids: list[list[int]]) -> torch.Tensor:
    """Return the geometric mean of each text's token probabilities, [texts]."""
    found = torch.ones(len(token_ids))
    for rows in length_batches([len(ids) for ids in token_ids], 2048):
        batch = make_batch([token_ids[i] for i in rows])
        losses = example_losses(lm, batch.input_ids, batch.targets, batch.rows)
        found[rows] = torch.exp(-losses / batch.positions.sum(dim=1).clamp_min(1))
    return found


def trak(log: RunDir, lm, queries: list[list[int]], counted: list[list[bool]], train: list[list[int]]) -> torch.Tensor:
    """Return TRAK-like scores [Q, N], through the N x N Gram matrix of all layers' stored gradients."""
    with GradientCapture(lm, log.projections()) as capture:
        grads, _ = Extractor(lm, capture, 1024).gradients(queries, counted).wait()
    gram = torch.zeros(log.examples, log.examples, dtype=torch.float64)
    dots = torch.zeros(len(queries), log.examples, dtype=torch.float64)
    for layer in tqdm(log.layers, desc="trak", unit="layer"):
        z = torch.cat(list(log.read(layer, range(len(log.shards))))).float()
        gram += z @ z.T
        dots += grads[layer] @ z.T
    size = sum(r_out * r_in for r_out, r_in in log.projected.values())
    shift = DAMPING * gram.trace() / size * torch.eye(log.examples, dtype=torch.float64)
    return torch.linalg.solve(gram + shift, dots.T).T * (1 - probabilities(lm, train))


if __name__ == "__main__":
    run_script(main, build_parser())
