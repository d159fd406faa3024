"""Stage 3/4. Reads logs/<run>/ and queries. Writes logs/<run>/scores/<queries>-.../: scores.npy [Q, N], run.json.

    python compute_influence.py --hessian ekfac --mlp_only --data_name pydoc --data_config short --mode cosine

A positive score says that training on the example lowers the query's loss. Q queries, N train examples, S dampings.
On several processes (accelerate launch) each reads its share of the shards.
"""

import argparse
import json
from contextlib import ExitStack

import psutil
import torch
import xxhash
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from logra import hessian, influence, model, run, store
from logra.extraction import Extractor, load
from logra.hooks import GradientCapture
from logra.log import Log, find_folder, find_log
from logra.prepare import make_extractor
from logra.queries import Query, load_queries, query_hash
from logra.scores import ScoreFile, SelfInfluence

Dampings = dict[str, tuple[float | None, float | None]]  # label -> (relative, absolute), one of which is given


def build_parser() -> run.Parser:
    """Return the command line's parser."""
    parser = run.Parser(description=__doc__)
    run.add_run_flags(parser)
    run.add_model_flags(parser)
    group = parser.add_argument_group("queries")
    group.add_argument(
        "--split", default="generated", help="generated, train, validation, test or a .jsonl (generated)"
    )
    group.add_argument(
        "--query_loss", choices=["response", "all"], default="response", help="tokens that count (response)"
    )
    group.add_argument("--max_queries", type=run.positive_int, help="the first ones")
    group = parser.add_argument_group("scores")
    group.add_argument("--mode", choices=influence.MODES, default="dot", help="(dot)")
    group.add_argument(
        "--damping", type=run.positive, nargs="+", default=[0.1], help="in units of the mean eigenvalue (0.1)"
    )
    group.add_argument("--damping_absolute", type=run.positive, nargs="+", help="added to the eigenvalues, instead")
    group.add_argument("--score_layers", type=run.pattern, metavar="PATTERN", help="scores from matching layers only")
    group.add_argument("--self_influence", action="store_true", help="also write self_influence.npy [N]")
    group.add_argument(
        "--top_k_only", type=run.positive_int, metavar="K", help="keep the K highest and lowest scores, not all"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Score every train example for every query."""
    accelerator = run.start_processes()
    folder = find_folder(args, must_exist=True)
    settings, log = find_log(folder, args, must_exist=True)
    kind = log.usable_hessian(args.hessian)
    layers = log.matching_layers(args.score_layers)
    lm, print_of_model = load(settings, args, accelerator.device)
    log.check_model({"model": {"class": type(lm).__name__, "fingerprint": print_of_model}})
    tokenizer, context = model.load_tokenizer(settings["model_name"]), model.context_length(lm.config)
    name, queries = load_queries(
        args.split, settings, tokenizer, args.query_loss, args.max_queries, context, args.cache_dir
    )
    about = {"query_loss": args.query_loss, "layers": layers, "queries": query_hash(queries)}
    hashed = about | ({"top_k_only": args.top_k_only} if args.top_k_only else {})
    label = f"{name}-{xxhash.xxh3_64_hexdigest(json.dumps(hashed).encode())[:8]}-{args.mode}-{kind}"
    dampings: Dampings = {f"{value:g}": (value, None) for value in args.damping}
    if args.damping_absolute:
        dampings = {f"abs{value:g}": (None, value) for value in args.damping_absolute}
    folders = [folder / "scores" / f"{label}-{damping}" for damping in dampings]
    about |= {"split": args.split, "mode": args.mode, "hessian": kind, "num_queries": len(queries)}
    about |= {"num_examples": log.examples, "top_k_only": args.top_k_only}
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(run.locked(folder / "scores" / f"{label}.lock", f"{folder}/scores/{label}"))
            for path in folders:
                stack.enter_context(store.atomic(path)).mkdir()
        files = [ScoreFile(store.temporary(path), len(queries), log.examples, args.top_k_only) for path in folders]
        wanted = args.mode != "dot" or args.self_influence
        own = SelfInfluence(log, kind, layers, list(dampings)) if wanted else None
        score(args, log, kind, layers, lm, queries, dampings, files, own, accelerator)
        for s, (file, damping) in enumerate(zip(files, dampings.values(), strict=True)):
            about |= dict(zip(("damping", "damping_absolute"), damping, strict=True))
            if accelerator.is_main_process:
                file.describe(queries, about | {"log": log.content}, own.values[s] if args.self_influence else None)
    accelerator.wait_for_everyone()
    for path in folders:
        run.say(f"{len(queries)} queries x {log.examples} examples in {path}")
    run.say("Next: analysis.py")


def score(
    args, log: Log, kind: str, layers: list[str], lm, queries: list[Query], dampings: Dampings, files: list[ScoreFile],
    own: SelfInfluence | None, accelerator: Accelerator,
) -> None:  # fmt: skip
    """Fill the score files: groups of queries that fit in memory, each past all shards once."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    size = 4 * sum(o * i for o, i in log.projected.values()) * (1 + len(files))
    group = max(1, int(psutil.virtual_memory().available / 4 / run.processes_here()) // size)
    group = min(run.gather_list([group], accelerator))  # the ranks take the same steps
    if own:
        own.agree(run.gather_list, accelerator)
    if accelerator.is_main_process:
        for file in files:
            file.create()
    accelerator.wait_for_everyone()
    with GradientCapture(lm, log.projections()) as capture:
        extractor = make_extractor(args, lm, capture, log)
        for first in range(0, len(queries), group):
            part = queries[first : first + group]
            grads = query_gradients(extractor, log, part, accelerator)
            solved, solvers = precondition(
                log, kind, {layer: grads[layer] for layer in layers}, dampings, own, accelerator
            )
            padded = influence.pad_queries(solved, accelerator.device)
            mine = range(rank, len(log.shards), ranks)
            found = influence.score_shards(log.open_shard, mine, padded, solvers)
            for shard, dots, selves in tqdm(found, total=len(mine), desc="scoring", unit="shard", disable=rank > 0):
                ids = log.shards[shard]
                if selves:
                    own.put(ids, selves)
                for s, file in enumerate(files):
                    rows = dots.T[s * len(part) : (s + 1) * len(part)].cpu()
                    selves = own.values[s, ids.start : ids.stop] if own else None
                    file.put(first, ids, influence.finish(rows, selves, args.mode))
            if own and not own.whole:
                own.save(run.sum_over_ranks, accelerator)
    for file in files:
        file.close(run.gather_list, accelerator)
    accelerator.wait_for_everyone()


def query_gradients(
    extractor: Extractor, log: Log, queries: list[Query], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Return the queries' projected gradients, {layer: [Q, k]} float32, on every rank; each computes its share."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    token_ids, counted = [q.token_ids for q in queries[rank::ranks]], [q.counted for q in queries[rank::ranks]]
    with tqdm(total=sum(map(len, token_ids)), desc="query gradients", unit="tok", disable=rank > 0) as bar:
        mine, _ = extractor.gradients(token_ids, counted, done=bar.update).wait()
        extractor.finish()
    grads = {}
    for layer, (r_out, r_in) in log.projected.items():
        grads[layer] = torch.zeros(len(queries), r_out * r_in)
        if mine:
            grads[layer][rank::ranks] = mine[layer]
        grads[layer] = run.sum_over_ranks(grads[layer], accelerator)
    return grads


def precondition(
    log: Log,
    kind: str,
    grads: dict[str, Tensor],
    dampings: Dampings,
    own: SelfInfluence | None,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], dict[str, list[influence.Solver]]]:
    """Return (C + lambda I)^-1 q, {layer: [S * Q, k]}, and what computes self-influence while the shards stream by.

    A layer is one rank's work. raw's self-influence is added here, layer by layer: its factors don't fit in memory.
    """
    statistics, every = log.statistics(kind), range(len(log.shards))
    solved, solvers, device = {}, {layer: [] for layer in grads}, accelerator.device
    bar = tqdm(grads.items(), desc=f"Hessian {kind}", unit="layer", disable=not accelerator.is_main_process)
    for number, (layer, q) in enumerate(bar):
        mine = number % accelerator.num_processes == accelerator.process_index
        solved[layer] = torch.zeros(len(dampings) * len(q), q.shape[1])
        streamed = own and not own.whole and kind != "raw"
        if mine or streamed:
            stats = {key: tensor.to(device) for key, tensor in statistics(layer).items()}
            blocks = [block.to(device).float() for block in log.blocks(layer, every)] if "gram" in stats else None
            train = torch.cat(blocks) if blocks else None
            found = [hessian.preconditioner(kind, stats, *damping, train) for damping in dampings.values()]
        if mine:
            solved[layer] = torch.cat([solver.solve(q.to(device)) for solver in found]).cpu()
        if streamed:
            solvers[layer] = [solver.quadratic for solver in found]
        elif own and not own.whole and mine:
            for ids, block in zip(log.shards, log.blocks(layer, every), strict=True):
                own.put(ids, [solver.quadratic(block.to(device).float()) for solver in found])
        if accelerator.num_processes > 1:
            solved[layer] = run.sum_over_ranks(solved[layer], accelerator)
    if own and not own.whole and kind == "raw":
        own.save(run.sum_over_ranks, accelerator)
    return solved, solvers


if __name__ == "__main__":
    run.guarded(main, build_parser())
