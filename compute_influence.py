"""Stage 3/4. Reads logs/<run>/ and queries. Writes logs/<run>/scores/<queries>-.../: scores.npy [Q, N], run.json.

    python compute_influence.py --hessian ekfac --mlp_only --data_name pydoc --data_config short --mode cosine

A positive score says that training on the example lowers the query's loss. Q queries, N train examples, S dampings.
On several processes (accelerate launch) each reads its share of the shards.
"""

import argparse
import json

import xxhash
from accelerate import Accelerator

from logra import influence
from logra.inputs import model
from logra.inputs.queries import Query, group_queries, load_queries, merge_group, query_hash
from logra.run_dir import RunDir
from logra.runtime import flags, processes, progress
from logra.runtime.settings import QuerySettings, ScoreSettings
from logra.stages import open_run
from logra.stages.score import Scorer, block_name
from logra.stages.score_files import ScoreFile, ScoreRecord, SelfInfluence, score_files


def build_parser() -> flags.Parser:
    """Return the command line's parser."""
    parser = flags.Parser(description=__doc__)
    flags.add_run_flags(parser)
    flags.add_execution_flags(parser)
    flags.add_settings(parser.add_argument_group("queries"), QuerySettings())
    flags.add_settings(parser.add_argument_group("scores"), ScoreSettings())
    return parser


def main(args: argparse.Namespace) -> None:
    """Score every train example for every query."""
    run_flags, execution = flags.read_run_flags(args), flags.read_execution(args)
    query_settings, options = flags.read_settings(QuerySettings, args), flags.read_settings(ScoreSettings, args)
    accelerator = processes.start()

    run = open_run.find_run(open_run.find_folder(run_flags, must_exist=True), run_flags, must_exist=True)
    progress.keep_log(run.folder)
    kind = open_run.usable_hessian(run, args.hessian)
    dampings = options.dampings(kind, run.settings.store_dtype)
    layers = run.matching_layers(options.score_layers)
    lm, tokenizer, described = open_run.load_model(run.settings, execution, accelerator.device)
    run.check_model(described)

    context = model.context_length(lm.config)
    name, queries = load_queries(query_settings, run.settings, tokenizer, context, args.cache_dir)
    groups = group_queries(queries, query_settings.group_by)
    queries = [merge_group(group) for group in groups] if query_settings.group_by else queries

    blocks = {layer: block_name(layer) if options.layerwise else "" for layer in layers}
    record = describe_scores(run, kind, layers, queries, query_settings, options)
    label = f"{name}-{settings_hash(record, options)}-{options.mode}-{kind}"
    needs_self_influence = options.mode != "dot" or options.self_influence
    shape, base = (len(queries), run.examples), run.folder / "scores" / label
    with score_files(base, dampings, shape, options.top_k_only, len(record.blocks or ()), accelerator) as files:
        own = SelfInfluence(run, kind, layers, dampings) if needs_self_influence else None
        scorer = Scorer(run, kind, blocks, lm, dampings, own, options.query_rank, execution, accelerator)
        score(scorer, groups, files, options.mode, accelerator)
        for s, file in enumerate(files):
            if accelerator.is_main_process:
                file.describe(queries, record, dampings[s], own.values[s] if options.self_influence else None)
    accelerator.wait_for_everyone()
    for damping in dampings:
        progress.say(f"{len(queries)} queries x {run.examples} examples in {base}-{damping.label}")
    progress.summary("analysis.py")


def describe_scores(
    run: RunDir, kind: str, layers: list[str], queries: list[Query], query_settings: QuerySettings,
    options: ScoreSettings,
) -> ScoreRecord:  # fmt: skip
    """Return run.json of the scores; the damping is filled in for each folder."""
    blocks = list(dict.fromkeys(map(block_name, layers))) if options.layerwise else None
    return ScoreRecord(
        query_loss=query_settings.query_loss, layers=layers, queries=query_hash(queries), split=query_settings.split,
        mode=options.mode, hessian=kind, num_queries=len(queries), num_examples=run.examples,
        top_k_only=options.top_k_only, group_by=query_settings.group_by, log=run.record, damping=None,
        damping_absolute=None, blocks=blocks,
    )  # fmt: skip


def settings_hash(record: ScoreRecord, options: ScoreSettings) -> str:
    """Return a hash of what else distinguishes scores of a query file, for the folder's name."""
    settings = {name: getattr(record, name) for name in ("query_loss", "layers", "queries")}
    changes = {"top_k_only": options.top_k_only, "group_by": record.group_by}
    changes |= {"query_rank": options.query_rank, "layerwise": options.layerwise}
    settings |= {name: value for name, value in changes.items() if value}
    return xxhash.xxh3_64_hexdigest(json.dumps(settings).encode())[:8]


def score(
    scorer: Scorer, groups: list[list[Query]], files: list[ScoreFile], mode: str, accelerator: Accelerator
) -> None:
    """Fill the score files: as many queries as fit in memory, then the others, each past all train examples once."""
    own = scorer.own
    if own:
        own.agree(accelerator)
    if accelerator.is_main_process:
        for file in files:
            file.create()
    accelerator.wait_for_everyone()
    for first in range(0, len(groups), scorer.queries_per_pass):
        part = groups[first : first + scorer.queries_per_pass]
        found = scorer.score(part)
        for shard, dots, selves in progress.bar(found, total=len(scorer.mine), desc="scoring", unit="shard"):
            ids = scorer.run.shards[shard]
            if selves:
                own.put(ids, selves)
            for s, file in enumerate(files):
                rows = slice(s * len(part), (s + 1) * len(part))
                of_blocks = [dots[block].T[rows].cpu() for block in dict.fromkeys(scorer.blocks.values())]
                self_influence = own.values[s, ids.start : ids.stop] if own else None
                file.put(first, ids, influence.scores_of_mode(sum(of_blocks), self_influence, mode), of_blocks)
        if own and not own.whole:
            own.save(accelerator)
    for file in files:
        file.close(accelerator)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    flags.run_script(main, build_parser())
