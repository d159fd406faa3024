"""Stage 3/4. Reads logs/<run>/ and queries. Writes logs/<run>/scores/<queries>-.../: scores.npy [Q, N], run.json.

    python compute_influence.py --hessian ekfac --mlp_only --data_name pydoc --data_config short --mode cosine

A positive score says that training on the example lowers the query's loss. Q queries, N train examples.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from logra import hessian, influence, model, run, store
from logra.extraction import gradients
from logra.hooks import GradientCapture
from logra.log import Log, find_log
from logra.queries import Query, load_queries, query_hash


def build_parser() -> run.Parser:
    """Return the command line's parser."""
    parser = run.Parser(description=__doc__)
    run.add_run_flags(parser)
    group = parser.add_argument_group("queries")
    group.add_argument(
        "--split", default="generated", help="generated, train, validation, test or a .jsonl (generated)"
    )
    group.add_argument(
        "--query_loss", choices=["response", "all"], default="response", help="tokens that count (response)"
    )
    group.add_argument("--max_queries", type=run.positive_int, help="the first ones")
    group.add_argument("--batch_size", type=run.positive_int, default=4, help="queries at a time (4)")
    group = parser.add_argument_group("scores")
    group.add_argument("--mode", choices=influence.MODES, default="dot", help="(dot)")
    group.add_argument("--damping", type=run.positive, default=0.1, help="in units of the mean eigenvalue (0.1)")
    group.add_argument("--damping_absolute", type=run.positive, help="added to the eigenvalues as it is, instead")
    group.add_argument("--score_layers", type=run.pattern, metavar="PATTERN", help="scores from matching layers only")
    group.add_argument("--self_influence", action="store_true", help="also write self_influence.npy [N]")
    return parser


def main(args: argparse.Namespace) -> None:
    """Score every train example for every query."""
    _, settings, log = find_log(args, must_exist=True)
    kind = args.hessian or log.content["arguments"]["hessian"] or "raw"
    if "projections" not in log.content:
        raise ValueError(
            f"expected a finished run in {log.folder}, got one without projections; run extract_log.py again"
        )
    if kind != "none" and (problem := log.hessian_problem(kind)):
        raise ValueError(
            f"expected the Hessian {kind}, but {problem}; run extract_log.py --log_dir {log.folder} --hessian {kind}"
        )
    layers = log.matching_layers(args.score_layers)
    store.check_shards(log.gradients, log.shards)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, tokenizer = load_run_model(log, device)
    context = model.context_length(lm.config)
    name, queries = load_queries(
        args.split, settings, tokenizer, args.query_loss, args.max_queries, context, args.cache_dir
    )
    grads = query_gradients(lm, log, queries, args.batch_size)
    del lm
    grads, self_influence = precondition(args, log, kind, {layer: grads[layer] for layer in layers}, device)
    damping = f"abs{args.damping_absolute:g}" if args.damping_absolute else f"{args.damping:g}"
    about = {"query_loss": args.query_loss, "layers": layers, "queries": query_hash(queries)}
    label = f"{name}-{xxhash.xxh3_64_hexdigest(json.dumps(about).encode())[:8]}-{args.mode}-{kind}-{damping}"
    with store.atomic(log.folder / "scores" / label) as folder:
        folder.mkdir()
        write_scores(folder / "scores.npy", log, grads, self_influence, args.mode, device)
        if args.self_influence:
            np.save(folder / "self_influence.npy", self_influence.numpy())
        rows = [{"id": q.id, **q.row, "tokens": len(q.token_ids), "first_counted": q.start} for q in queries]
        (folder / "queries.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
        about |= {"split": args.split, "mode": args.mode, "hessian": kind, "damping": args.damping}
        about |= {"damping_absolute": args.damping_absolute, "num_queries": len(queries), "num_examples": log.examples}
        store.write_json(folder / "run.json", about | {"log": log.content})
    print(f"{len(queries)} queries x {log.examples} examples in {log.folder / 'scores' / label}\nNext: analysis.py")


def load_run_model(log: Log, device: str):
    """Return the run's model and tokenizer; refuse another model of the same name."""
    name = log.settings["model_name"]
    lm = model.load_model(name, store.DTYPES[log.settings["dtype"]], device)
    log.check_model({"model": {"class": type(lm).__name__, "fingerprint": model.fingerprint(lm)}})
    return lm, model.load_tokenizer(name)


def query_gradients(lm, log: Log, queries: list[Query], batch_size: int) -> dict[str, Tensor]:
    """Return the queries' projected gradients, {layer: [Q, k]} float32."""
    token_ids, starts = [query.token_ids for query in queries], [query.start for query in queries]
    bar = tqdm(total=sum(map(len, token_ids)), desc="query gradients", unit="tok", unit_scale=True)
    with GradientCapture(lm, log.projections()) as capture, bar:
        return gradients(lm, capture, token_ids, 0, (10**12, batch_size), starts=starts, done=bar.update)


def precondition(
    args, log: Log, kind: str, grads: dict[str, Tensor], device: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return (C + lambda I)^-1 q, {layer: [Q, k]}, and z^T (C + lambda I)^-1 z, [N], where it is needed."""
    statistics, every = log.statistics(kind), range(len(log.shards))
    wanted = args.mode != "dot" or args.self_influence
    self_influence = torch.zeros(log.examples) if wanted else None
    solved = {}
    for layer, q in tqdm(grads.items(), desc=f"Hessian {kind}", unit="layer"):
        stats = {key: tensor.to(device) for key, tensor in statistics(layer).items()}
        blocks = [block.to(device).float() for block in log.blocks(layer, every)] if "gram" in stats else None
        train = torch.cat(blocks) if blocks else None
        solver = hessian.preconditioner(kind, stats, args.damping, args.damping_absolute, train)
        solved[layer] = solver.solve(q.to(device))
        for ids, block in zip(log.shards, log.blocks(layer, every), strict=True) if wanted else ():
            self_influence[ids.start : ids.stop] += solver.quadratic(block.to(device).float()).cpu()
    return solved, self_influence


def write_scores(
    path: Path, log: Log, queries: dict[str, Tensor], self_influence: Tensor | None, mode: str, device: str
) -> None:
    """Stream the shards past the preconditioned queries into scores.npy, [Q, N] float32."""
    count = len(next(iter(queries.values())))
    scores = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, log.examples))
    with open(path, "r+b") as file:  # a full disk is an OSError here, and a crash in a memory-mapped write
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    for index, ids in enumerate(tqdm(log.shards, desc="scoring", unit="shard")):
        block = {layer: z.to(device) for layer, z in store.load_shard(log.gradients, index, queries).items()}
        dots = influence.dot_scores(queries, block).cpu()
        part = None if self_influence is None else self_influence[ids.start : ids.stop]
        scores[:, ids.start : ids.stop] = influence.finish(dots, part, mode).numpy()
    scores.flush()


if __name__ == "__main__":
    run.guarded(main, build_parser())
