"""Stage 3/4. Reads logs/<run>/ and queries. Writes logs/<run>/scores/<queries>-.../: scores.npy [Q, N], run.json.

    python compute_influence.py --hessian ekfac --mlp_only --data_name pydoc --data_config short --mode cosine

A positive score means that training on the example lowers the query's loss. Q queries, N train examples, S dampings.
With several processes (accelerate launch) each one reads its share of the shards.
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from logra.runtime import flags, progress
from logra.runtime.settings import Damping, Execution, QuerySettings, RerankSettings, ScoreSettings


def build_parser() -> flags.Parser:
    """Return the parser of the command line."""
    parser = flags.Parser(description=__doc__)
    flags.add_run_flags(parser)
    flags.add_execution_flags(parser)
    flags.add_settings(parser.add_argument_group("queries"), QuerySettings())
    flags.add_settings(parser.add_argument_group("scores"), ScoreSettings())
    flags.add_settings(parser.add_argument_group("re-ranking"), RerankSettings())
    return parser


if __name__ == "__main__":  # --help and wrong flags do not wait for the slow imports below
    PARSER = build_parser()
    ARGS = PARSER.parse_args()

from logra.inputs.queries import group_queries, merge_group
from logra.runtime import processes
from logra.runtime.memory import release_memory
from logra.scoring import rerank
from logra.scoring.combine import combine, kept_scores
from logra.scoring.score import ScoreTask, block_name, describe_scores, score_run
from logra.scoring.score_files import ScoredCheckpoint, ScoreRecord, score_folders
from logra.stages import checkpoints, open_run
from logra.stages.fine_run import FineRun


def main(args: argparse.Namespace) -> None:
    """Score every train example for every query; with checkpoints at each of them, and combine these scores."""
    run_flags, execution = flags.read_run_flags(args), flags.read_execution(args)
    query_settings, score_settings = flags.read_settings(QuerySettings, args), flags.read_settings(ScoreSettings, args)
    rerank_settings = flags.read_settings(RerankSettings, args)
    processes.start()

    # Open the run, or those of the checkpoints
    parent, members = checkpoints.find(run_flags, must_exist=True)
    weights = checkpoints.weights(score_settings.checkpoint_weights, len(members) if parent else 0)
    runs = [open_run.find_run(member.folder, member.flags, must_exist=True) for member in members]
    rerank.check(rerank_settings, runs[-1], score_settings.top_k_only)
    views = checkpoints.rerank_views(rerank_settings, runs, execution)
    if parent:
        checkpoints.check_runs(runs, score_settings.top_k_only)
    for run in runs:
        kind = open_run.usable_hessian(run, args.hessian)
        open_run.check_model_files(run)
    progress.keep_log(parent or run.folder)
    dampings = score_settings.dampings(kind, run.settings.store_dtype)
    layers = run.matching_layers(score_settings.score_layers)
    blocks = {layer: block_name(layer) if score_settings.layerwise else "" for layer in layers}

    # Read the queries: with checkpoints, those of the last one
    name, queries = open_run.read_queries(query_settings, run.settings, execution, args.cache_dir)
    groups = group_queries(queries, query_settings.group_by)
    queries = [merge_group(group) for group in groups] if query_settings.group_by else queries

    # Score with each model, and write a folder for each damping
    scored, lm = list[ScoredCheckpoint](), None
    keeps_queries = parent and score_settings.top_k_only
    with processes.temporary_folder("queries-", parent) if keeps_queries else nullcontext() as temporary:
        for run in runs:
            record = describe_scores(run, kind, layers, queries, query_settings, score_settings)
            task = ScoreTask(run, kind, blocks, dampings, score_settings.query_rank)
            base = run.folder / "scores" / record.label(name)
            found = kept_scores(run, base, record, dampings, score_settings.self_influence) if parent else None
            if found is None:
                lm, _, described = open_run.load_model(run.settings, execution)
                run.check_model(described)
                keep = temporary / run.folder.name if temporary else None
                found = score_run(task, lm, execution, score_settings, base, record, groups, queries, keep)
                if parent or rerank_settings.rerank_checkpoints:
                    lm = None
                    release_memory()
            scored.append(found)
            say_scores(record, base, dampings)
        if parent:
            record = replace(
                record,
                checkpoints=[
                    {"run": run.folder.name, "scores": record.label(name), "weight": weight}
                    for run, weight in zip(runs, weights, strict=True)
                ],
            )
            base = parent / "scores" / record.label(name)
            combine(base, record, scored, dampings, queries, score_settings.self_influence)
            say_scores(record, base, dampings)
    if views:
        models = fine_models(views, [] if rerank_settings.rerank_checkpoints else weights, lm, execution)
        rerank.rerank(score_folders(base, dampings), run, record, models, groups, rerank_settings, execution)
    progress.summary("analysis.py")


def fine_models(
    views: list[FineRun], weights: list[float], lm: open_run.nn.Module | None, execution: Execution
) -> Iterator[tuple[FineRun, open_run.nn.Module, float]]:
    """Yield the views that re-rank, their models and weights. First compute the statistics that are missing.

    Args:
        views: Of the scored run, or of checkpoints.
        weights: Of the checkpoints; none: equal ones.
        lm: The scored run's model; None with checkpoints, where one model is in memory at a time.
        execution: How to run the models.
    """
    for view, weight in zip(views, weights or [1.0] * len(views), strict=True):
        ready, model = checkpoints.with_statistics(view, lm, execution)
        yield ready, model, weight
        del model
        release_memory()


def say_scores(record: ScoreRecord, base: Path, dampings: list[Damping]) -> None:
    """Print where the scores are."""
    for damping in dampings:
        progress.say(f"{record.num_queries} queries x {record.num_examples} examples in {base}-{damping.label}")


if __name__ == "__main__":
    flags.run_script(main, PARSER, ARGS)
