"""Stage 3/4. Reads logs/<run>/ and queries. Writes logs/<run>/scores/<queries>-.../: scores.npy [Q, N], run.json.

    python compute_influence.py --hessian ekfac --mlp_only --data_name pydoc --data_config short --mode cosine

A positive score says that training on the example lowers the query's loss. Q queries, N train examples, S dampings.
On several processes (accelerate launch) each reads its share of the shards.
"""

import argparse
import json
from contextlib import ExitStack
from functools import partial

import xxhash

from logra import disk, hessian, influence, model, progress, run
from logra.log import Log
from logra.prepare import find_folder, find_log, load, make_extractor
from logra.queries import Query, group_queries, load_queries, merged, query_hash
from logra.scores import ScoreFile, SelfInfluence, damping_label
from logra.scoring import Dampings, Scorer, block_name


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
    group.add_argument(
        "--group_by", metavar="COLUMN", help="rows with the same value are one query: their mean gradient"
    )
    group.add_argument(
        "--query_rank", type=run.positive_int, metavar="R",
        help="with --store_dtype none: keep the R largest singular values of each query in a layer (all)",
    )  # fmt: skip
    group = parser.add_argument_group("scores")
    group.add_argument("--mode", choices=influence.MODES, default="dot", help="(dot)")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--damping", type=run.positive, nargs="+",
        help="in units of the mean eigenvalue (0.1 for raw, 0.2 for int1, else 0.01)",
    )  # fmt: skip
    one.add_argument("--damping_absolute", type=run.positive, nargs="+", help="added to the eigenvalues, instead")
    group.add_argument("--score_layers", type=run.pattern, metavar="PATTERN", help="scores from matching layers only")
    group.add_argument("--layerwise", action="store_true", help="also write the dots of each block of layers apart")
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
    progress.keep_log(folder)
    kind = log.usable_hessian(args.hessian)
    layers = log.matching_layers(args.score_layers)
    lm, tokenizer, described = load(settings, args, accelerator.device)
    log.check_model(described)
    limits = args.max_queries, model.context_length(lm.config)
    name, queries = load_queries(args.split, settings, tokenizer, args.query_loss, *limits, args.cache_dir)
    groups = group_queries(queries, args.group_by)
    queries = [merged(group) for group in groups] if args.group_by else queries
    about = {"query_loss": args.query_loss, "layers": layers, "queries": query_hash(queries)}
    changed = ("top_k_only", "group_by", "query_rank", "layerwise")
    hashed = about | {name: getattr(args, name) for name in changed if getattr(args, name)}
    label = f"{name}-{xxhash.xxh3_64_hexdigest(json.dumps(hashed).encode())[:8]}-{args.mode}-{kind}"
    relative = args.damping or [hessian.default_damping(kind, settings["store_dtype"])]
    pairs = [(None, value) for value in args.damping_absolute or ()] or [(value, None) for value in relative]
    dampings: Dampings = {damping_label(*pair): pair for pair in pairs}
    folders = [folder / "scores" / f"{label}-{damping}" for damping in dampings]
    about |= {"split": args.split, "mode": args.mode, "hessian": kind, "num_queries": len(queries)}
    about |= {"num_examples": log.examples, "top_k_only": args.top_k_only, "group_by": args.group_by}
    blocks = {layer: block_name(layer) if args.layerwise else "" for layer in layers}
    about |= {"blocks": list(dict.fromkeys(blocks.values()))} if args.layerwise else {}
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(disk.locked(folder / "scores" / f"{label}.lock", f"{folder}/scores/{label}"))
            for path in folders:
                stack.enter_context(disk.atomic(path)).mkdir()
        files = [
            ScoreFile(disk.temporary(path), len(queries), log.examples, args.top_k_only, len(about.get("blocks", ())))
            for path in folders
        ]
        wanted = args.mode != "dot" or args.self_influence
        own = SelfInfluence(log, kind, layers, list(dampings)) if wanted else None
        score(args, log, kind, blocks, lm, groups, dampings, files, own, accelerator)
        for s, (file, damping) in enumerate(zip(files, dampings.values(), strict=True)):
            about |= dict(zip(("damping", "damping_absolute"), damping, strict=True))
            if accelerator.is_main_process:
                file.describe(queries, about | {"log": log.content}, own.values[s] if args.self_influence else None)
    accelerator.wait_for_everyone()
    for path in folders:
        run.say(f"{len(queries)} queries x {log.examples} examples in {path}")
    progress.summary("analysis.py")


def score(
    args, log: Log, kind: str, blocks: dict[str, str], lm, groups: list[list[Query]], dampings: Dampings,
    files: list[ScoreFile], own: SelfInfluence | None, accelerator: run.Accelerator,
) -> None:  # fmt: skip
    """Fill the score files: as many queries as fit in memory, then the others, each past all train examples once."""
    if own:
        own.agree(accelerator)
    if accelerator.is_main_process:
        for file in files:
            file.create()
    accelerator.wait_for_everyone()
    prepare = partial(make_extractor, args, lm, log=log)
    scorer = Scorer(log, kind, blocks, lm, dampings, own, args.query_rank, prepare, accelerator)
    for first in range(0, len(groups), scorer.at_once):
        part = groups[first : first + scorer.at_once]
        found = scorer.score(part)
        bar = progress.bar(found, total=len(scorer.mine), desc="scoring", unit="shard")
        for shard, dots, selves in bar:
            ids = log.shards[shard]
            if selves:
                own.put(ids, selves)
            for s, file in enumerate(files):
                rows = slice(s * len(part), (s + 1) * len(part))
                of_blocks = [dots[block].T[rows].cpu() for block in dict.fromkeys(blocks.values())]
                self_influence = own.values[s, ids.start : ids.stop] if own else None
                file.put(first, ids, influence.finish(sum(of_blocks), self_influence, args.mode), of_blocks)
        if own and not own.whole:
            own.save(accelerator)
    for file in files:
        file.close(accelerator)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run.guarded(main, build_parser())
