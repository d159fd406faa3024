"""Stage 3/4. Reads logs/<run>/ and queries. Writes logs/<run>/scores/<queries>-.../: scores.npy [Q, N], run.json.

    python compute_influence.py --hessian ekfac --mlp_only --data_name pydoc --data_config short --mode cosine

A positive score means that training on the example lowers the query's loss. Q queries, N train examples, S dampings.
With several processes (accelerate launch) each one reads its share of the shards.
"""

import argparse
import json

import xxhash

from logra.inputs import model
from logra.inputs.queries import Query, group_queries, load_queries, merge_group, query_hash, query_rows
from logra.run_dir import RunDir
from logra.runtime import flags, processes, progress
from logra.runtime.settings import QuerySettings, ScoreSettings
from logra.stages import open_run, self_check
from logra.stages.score import Scorer, ScoreTask, block_name, write_pass
from logra.stages.score_files import ScoreFile, ScoreRecord, SelfInfluence, score_files
from logra.stages.self_check import CheckedPair


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
    processes.start()

    # Open the run, its model and the queries
    run = open_run.find_run(open_run.find_folder(run_flags, must_exist=True), run_flags, must_exist=True)
    open_run.check_model_files(run)
    progress.keep_log(run.folder)
    kind = open_run.usable_hessian(run, args.hessian)
    dampings = score_settings.dampings(kind, run.settings.store_dtype)
    layers = run.matching_layers(score_settings.score_layers)
    lm, tokenizer, described = open_run.load_model(run.settings, execution)
    run.check_model(described)
    context = model.context_length(lm.config)
    name, queries = load_queries(query_settings, run.settings, tokenizer, context, args.cache_dir)
    groups = group_queries(queries, query_settings.group_by)
    if query_settings.group_by:
        queries = [merge_group(group) for group in groups]

    # Score, and write a folder for each damping
    record = describe_scores(run, kind, layers, queries, query_settings, score_settings)
    label = f"{name}-{settings_hash(record, score_settings)}-{score_settings.mode}-{kind}"
    base = run.folder / "scores" / label
    needs_self_influence = score_settings.mode != "dot" or score_settings.self_influence
    self_influence = SelfInfluence(run, kind, layers, dampings) if needs_self_influence else None
    blocks = {layer: block_name(layer) if score_settings.layerwise else "" for layer in layers}
    task = ScoreTask(run, kind, blocks, dampings, score_settings.query_rank)
    with score_files(base, record, dampings, run.shards) as files:
        scorer = Scorer(task, lm, execution, self_influence)
        pairs = write_scores(scorer, groups, files, score_settings.mode)
        self_check.check(pairs, files, score_settings.mode, self_influence and self_influence.values)
        for s, file in enumerate(files) if processes.state().is_main_process else ():
            values = self_influence.values[s] if score_settings.self_influence else None
            file.describe(query_rows(queries), values)
    processes.state().wait_for_everyone()
    for damping in dampings:
        progress.say(f"{len(queries)} queries x {run.examples} examples in {base}-{damping.label}")
    progress.summary("analysis.py")


def write_scores(scorer: Scorer, groups: list[list[Query]], files: list[ScoreFile], mode: str) -> list[CheckedPair]:
    """Score the groups of queries and fill the files. Return a few scores of this rank, computed again.

    A pass over all train examples scores as many queries as fit in memory.
    """
    pairs: list[CheckedPair] = []
    first, self_influence = 0, scorer.self_influence
    while first < len(groups):
        batch = groups[first : first + scorer.queries_per_pass]
        if not all(processes.gather_list([write_pass(scorer, batch, first, files, mode)])):
            scorer.halve_queries(len(batch))
            for file in files:
                file.forget(first)
            continue
        if self_influence and not self_influence.complete:
            self_influence.save()
        pairs += self_check.recomputed(scorer, files, first, len(batch))
        first += len(batch)
    for file in files:
        file.close()
    return pairs


def describe_scores(
    run: RunDir, kind: str, layers: list[str], queries: list[Query], query_settings: QuerySettings,
    score_settings: ScoreSettings,
) -> ScoreRecord:  # fmt: skip
    """Return the content of the scores' run.json; each folder adds its damping and checksums."""
    blocks = list(dict.fromkeys(map(block_name, layers))) if score_settings.layerwise else None
    return ScoreRecord(
        query_loss=query_settings.query_loss, layers=layers, queries=query_hash(queries), split=query_settings.split,
        mode=score_settings.mode, hessian=kind, num_queries=len(queries), num_examples=run.examples,
        top_k_only=score_settings.top_k_only, group_by=query_settings.group_by, query_rank=score_settings.query_rank,
        log=run.record, damping=None, damping_absolute=None, blocks=blocks,
    )  # fmt: skip


def settings_hash(record: ScoreRecord, score_settings: ScoreSettings) -> str:
    """Return a hash of the settings that the folder's name does not show."""
    values = vars(record) | vars(score_settings)
    settings = {name: values[name] for name in ("query_loss", "layers", "queries")}
    settings |= {name: values[name] for name in ("top_k_only", "group_by", "query_rank", "layerwise") if values[name]}
    return xxhash.xxh3_64_hexdigest(json.dumps(settings).encode())[:8]


if __name__ == "__main__":
    flags.run_script(main, build_parser())
