"""Stage 3/4. Reads logs/<run>/ and queries. Writes logs/<run>/scores/<queries>-.../: scores.npy [Q, N], run.json.

    python compute_influence.py --hessian ekfac --mlp_only --data_name pydoc --data_config short --mode cosine

A positive score means that training on the example lowers the query's loss. Q queries, N train examples, S dampings.
With several processes (accelerate launch) each one reads its share of the shards.
"""

import argparse
import json

import xxhash

from logra import influence
from logra.inputs import model
from logra.inputs.queries import Query, group_queries, load_queries, merge_group, query_hash, query_rows
from logra.run_dir import RunDir
from logra.runtime import flags, processes, progress
from logra.runtime.settings import QuerySettings, ScoreSettings
from logra.stages import open_run
from logra.stages.score import Scorer, ScoreTask, block_name
from logra.stages.score_files import ScoreFile, ScoreRecord, SelfInfluence, score_files


def build_parser() -> flags.Parser:
    """Return the parser of the command line."""
    parser = flags.Parser(description=__doc__)
    flags.add_run_flags(parser)
    flags.add_execution_flags(parser)
    flags.add_settings(parser.add_argument_group("queries"), QuerySettings())
    flags.add_settings(parser.add_argument_group("scores"), ScoreSettings())
    return parser


def main(args: argparse.Namespace) -> None:
    """Score every train example for every query."""
    run_flags, execution = flags.read_run_flags(args), flags.read_execution(args)
    query_settings, score_settings = flags.read_settings(QuerySettings, args), flags.read_settings(ScoreSettings, args)
    accelerator = processes.start()

    # Open the run, its model and the queries
    run = open_run.find_run(open_run.find_folder(run_flags, must_exist=True), run_flags, must_exist=True)
    if accelerator.is_main_process:
        open_run.check_model_files(run)
    progress.keep_log(run.folder)
    kind = open_run.usable_hessian(run, args.hessian)
    dampings = score_settings.dampings(kind, run.settings.store_dtype)
    layers = run.matching_layers(score_settings.score_layers)
    lm, tokenizer, described = open_run.load_model(run.settings, execution, accelerator)
    run.check_model(described)
    context = model.context_length(lm.config)
    name, queries = load_queries(query_settings, run.settings, tokenizer, context, args.cache_dir)
    groups = group_queries(queries, query_settings.group_by)
    if query_settings.group_by:
        queries = [merge_group(group) for group in groups]

    # Score, and write a folder for each damping
    record = describe_scores(run, kind, layers, queries, query_settings, score_settings)
    label = f"{name}-{settings_hash(record, score_settings)}-{score_settings.mode}-{kind}"
    base, shape = run.folder / "scores" / label, (len(queries), run.examples)
    needs_self_influence = score_settings.mode != "dot" or score_settings.self_influence
    self_influence = SelfInfluence(run, kind, layers, dampings) if needs_self_influence else None
    blocks = {layer: block_name(layer) if score_settings.layerwise else "" for layer in layers}
    task = ScoreTask(run, kind, blocks, dampings, score_settings.query_rank)
    num_blocks = len(record.blocks or ())
    with score_files(base, dampings, shape, score_settings.top_k_only, num_blocks, accelerator) as files:
        scorer = Scorer(task, lm, execution, self_influence, accelerator)
        write_scores(scorer, groups, files, score_settings.mode, accelerator)
        for s, file in enumerate(files) if accelerator.is_main_process else ():
            values = self_influence.values[s] if score_settings.self_influence else None
            file.describe(query_rows(queries), record, dampings[s], values)
    accelerator.wait_for_everyone()
    for damping in dampings:
        progress.say(f"{len(queries)} queries x {run.examples} examples in {base}-{damping.label}")
    progress.summary("analysis.py")


def write_scores(
    scorer: Scorer, groups: list[list[Query]], files: list[ScoreFile], mode: str, accelerator: processes.Accelerator
) -> None:
    """Score the groups of queries and fill the files. A pass over all train examples scores what fits in memory."""
    self_influence = scorer.self_influence
    if self_influence:
        self_influence.agree(accelerator)
    for file in files if accelerator.is_main_process else ():
        file.create()
    accelerator.wait_for_everyone()
    for first in range(0, len(groups), scorer.queries_per_pass):
        batch = groups[first : first + scorer.queries_per_pass]
        scores = progress.bar(scorer.score(batch), total=len(scorer.own_shards), desc="scoring", unit="shard")
        for shard, dots, self_influence_parts in scores:
            ids = scorer.run.shards[shard]
            if self_influence_parts:
                self_influence.add(ids, self_influence_parts)
            for s, file in enumerate(files):
                rows = slice(s * len(batch), (s + 1) * len(batch))
                block_dots = [dots[block].T[rows].cpu() for block in dict.fromkeys(scorer.task.blocks.values())]
                values = self_influence.values[s, ids.start : ids.stop] if self_influence else None
                file.put(first, ids, influence.scores_of_mode(sum(block_dots), values, mode), block_dots)
        if self_influence and not self_influence.complete:
            self_influence.save(accelerator)
    for file in files:
        file.close(accelerator)
    accelerator.wait_for_everyone()


def describe_scores(
    run: RunDir, kind: str, layers: list[str], queries: list[Query], query_settings: QuerySettings,
    score_settings: ScoreSettings,
) -> ScoreRecord:  # fmt: skip
    """Return the content of the scores' run.json; each folder adds its damping and checksums."""
    blocks = list(dict.fromkeys(map(block_name, layers))) if score_settings.layerwise else None
    return ScoreRecord(
        query_loss=query_settings.query_loss, layers=layers, queries=query_hash(queries), split=query_settings.split,
        mode=score_settings.mode, hessian=kind, num_queries=len(queries), num_examples=run.examples,
        top_k_only=score_settings.top_k_only, group_by=query_settings.group_by, log=run.record, damping=None,
        damping_absolute=None, blocks=blocks,
    )  # fmt: skip


def settings_hash(record: ScoreRecord, score_settings: ScoreSettings) -> str:
    """Return a hash of the settings that the folder's name does not show."""
    settings = {name: getattr(record, name) for name in ("query_loss", "layers", "queries")}
    optional = {
        "top_k_only": record.top_k_only, "group_by": record.group_by, "query_rank": score_settings.query_rank,
        "layerwise": score_settings.layerwise,
    }  # fmt: skip
    settings |= {name: value for name, value in optional.items() if value}
    return xxhash.xxh3_64_hexdigest(json.dumps(settings).encode())[:8]


if __name__ == "__main__":
    flags.run_script(main, build_parser())
