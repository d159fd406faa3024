"""Baselines for the table of lds.py, from a run's own examples: BM25, embedding cosine, and TRAK-like scores.

    python evaluation/baselines.py logs/lds/raw64 --split testbeds/gpt2/queries.jsonl --output testbeds/gpt2/baselines

Writes <output>/{bm25,embedding,trak}/scores.npy [Q, N] float32 of Q queries and N train examples, and for trak, which
reads the run's stored gradients, gradients.json with the run's folder.
    bm25       Okapi BM25 (Lucene's variant) of lower-case words
    embedding  cosine of the mean last hidden states
    trak       q (G^T G + lambda I)^-1 z (1 - p): TRAK (arXiv 2303.14186) with one model. The stored gradients of all
               layers are one vector, p is the geometric mean of the example's token probabilities, and lambda is 0.01
               mean eigenvalues
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logra.analysis.report import bm25_scores
from logra.hooks import GradientCapture
from logra.inputs.queries import load_queries
from logra.inputs.rows import decode
from logra.loss import example_losses, hidden_states
from logra.models import model
from logra.run_dir import RunDir
from logra.runtime import files
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import CPU_BATCH_TOKENS, QuerySettings
from logra.stages.batches import length_batches, make_batch
from logra.stages.gradients import Extractor

NAMES = ("bm25", "embedding", "trak")
TRAK_DAMPING = 0.01  # in units of the mean eigenvalue
FORWARD_BATCH_TOKENS = 2048  # of the passes that need no gradient


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run; trak needs stored floating-point gradients")
    parser.add_argument("--split", required=True, help="the queries, as for compute_influence.py")
    parser.add_argument("--output", type=Path, required=True, help="parent of the folders to write, one per baseline")
    parser.add_argument("--baselines", nargs="+", choices=NAMES, default=list(NAMES), help="(all)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Score, and write a folder for each baseline."""
    run = RunDir.load(args.run)
    settings = run.settings
    if settings.bits is not None and "trak" in args.baselines:
        raise ValueError(
            f"expected floating-point gradients in {args.run} for trak, got {settings.store_dtype}; leave trak out of "
            "--baselines"
        )
    name, hub = settings.model_name, model.hub_options(settings.revision, trust_remote_code=False)
    tokenizer, lm = model.load_tokenizer(name, **hub), model.load_model(name, torch.float32, **hub)
    _, queries = load_queries(QuerySettings(split=args.split), settings, tokenizer)
    query_ids, train_ids = [query.token_ids for query in queries], list(run.train()["input_ids"])
    scores = {
        "bm25": lambda: list(bm25_scores(run.train()["text"], [decode(tokenizer, ids) for ids in query_ids])),
        "embedding": lambda: embeddings(lm, query_ids) @ embeddings(lm, train_ids).T,
        "trak": lambda: trak(run, lm, query_ids, [query.counted for query in queries], train_ids),
    }
    for baseline in args.baselines:
        with files.atomic(args.output / baseline / "scores.npy") as path, open(path, "wb") as file:
            np.save(file, np.asarray(scores[baseline](), dtype=np.float32))
        if baseline == "trak":  # its bytes, in the table of lds.py, are those of the gradients that it reads
            files.write_json(args.output / baseline / "gradients.json", {"run": str(args.run)})
        print(args.output / baseline)


@torch.no_grad()
def embeddings(lm: torch.nn.Module, token_ids: list[list[int]]) -> torch.Tensor:
    """Return the mean last hidden state of each text, of length 1, [texts, d]."""
    found = torch.zeros(len(token_ids), lm.config.hidden_size)
    for rows in length_batches([len(ids) for ids in token_ids], FORWARD_BATCH_TOKENS):
        batch = make_batch([token_ids[i] for i in rows])
        hidden = hidden_states(lm, batch.input_ids)
        real = torch.tensor([[t < len(token_ids[i]) for t in range(hidden.shape[1])] for i in rows])[..., None]
        found[rows] = (hidden * real).sum(dim=1) / real.sum(dim=1)
    return torch.nn.functional.normalize(found)


@torch.no_grad()
def probabilities(lm: torch.nn.Module, token_ids: list[list[int]]) -> torch.Tensor:
    """Return the geometric mean of each text's token probabilities, [texts]."""
    found = torch.ones(len(token_ids))
    for rows in length_batches([len(ids) for ids in token_ids], FORWARD_BATCH_TOKENS):
        batch = make_batch([token_ids[i] for i in rows])
        losses = example_losses(lm, batch.input_ids, batch.targets, batch.rows)
        found[rows] = torch.exp(-losses / batch.positions.sum(dim=1).clamp_min(1))
    return found


def trak(
    run: RunDir, lm: torch.nn.Module, query_ids: list[list[int]], counted: list[list[bool]], train_ids: list[list[int]]
) -> torch.Tensor:
    """Return TRAK-like scores [Q, N], through the N x N Gram matrix of all layers' stored gradients."""
    with GradientCapture(lm, run.projections()) as capture:
        grads, _ = Extractor(lm, capture, CPU_BATCH_TOKENS).gradients(query_ids, counted).wait()
    gram = torch.zeros(run.examples, run.examples, dtype=torch.float64)
    dots = torch.zeros(len(query_ids), run.examples, dtype=torch.float64)
    for layer in tqdm(run.layers, desc="trak", unit="layer"):
        z = torch.cat(list(run.read(layer, range(len(run.shards))))).float()
        gram += z @ z.T
        dots += grads[layer] @ z.T
    size = sum(r_out * r_in for r_out, r_in in run.projected.values())
    shift = TRAK_DAMPING * gram.trace() / size * torch.eye(run.examples, dtype=torch.float64)
    return torch.linalg.solve(gram + shift, dots.T).T * (1 - probabilities(lm, train_ids))


if __name__ == "__main__":
    run_script(main, build_parser())
