"""Stage 2/4. Reads a model and training text. Writes logs/<run>/: projected per-example gradients and their Hessian.

    python extract_log.py --lora random --hessian ekfac --mlp_only --data_name pydoc --data_config short

The long step; on several GPUs: accelerate launch --num_processes 8 --num_machines 1 --multi_gpu extract_log.py ...
A run that was stopped goes on where it was, on any number of processes.
"""

import argparse
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from torch import nn

from logra import data, disk, estimate, hessian, model, progress, run, store, verify
from logra.extraction import HostGradients
from logra.hooks import GradientCapture
from logra.log import Log
from logra.prepare import find_folder, find_log, load, make_extractor, make_projections, prepare_data, with_data_flags
from logra.quantise import ScoreError


def build_parser() -> run.Parser:
    """Return the command line's parser."""
    parser = run.Parser(description=__doc__)
    run.add_run_flags(parser)
    group = run.add_model_flags(parser)
    group.add_argument(
        "--num_proc", type=run.positive_int, help="processes that tokenise (1, with the tokenizer's threads)"
    )
    group.add_argument("--dry_run", action="store_true", help="print what the run will need, and do nothing")
    group.add_argument(
        "--trial", type=run.number(float, 1, "1 to 86400 seconds", 86400), nargs="?", const=30, metavar="SECONDS",
        help="as --dry_run, and hours, from extracting for 30 seconds",
    )  # fmt: skip
    group.add_argument(
        "--verify", type=run.positive_int, nargs="?", const=4, metavar="EXAMPLES",
        help="compare gradients, Hessians and scores of 4 examples with plain autograd, and do nothing else",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="delete the run's folder first")
    group.add_argument("--extend", action="store_true", help="add the documents of --data_name to the run in --log_dir")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make what the run still lacks: run.json, train/, projections, shards, Hessian."""
    if args.extend and not (args.log_dir and args.data_name and not args.overwrite):
        raise ValueError(
            "expected --extend with --log_dir and --data_name, and not --overwrite; give the run and the data"
        )
    if args.dry_run or args.trial or args.verify:
        (verify if args.verify else estimate).show(args)
        return
    accelerator = run.start_processes()
    folder = find_folder(args, must_exist=args.extend)
    lock = disk.locked(folder.with_name(f"{folder.name}.lock"), str(folder))
    with lock if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        settings, log = find_log(folder, args, args.extend, args.overwrite, args.extend)
        accelerator.wait_for_everyone()  # all have looked before rank 0 writes
        if log:
            log.say_what_is_kept(args, run.say)
        complete_run(args, folder, settings, log, accelerator)
        accelerator.wait_for_everyone()


def complete_run(args, folder: Path, settings: dict, log: Log | None, accelerator: run.Accelerator) -> None:
    """Find out what is missing, and make it."""
    kind = args.hessian or (log.content["arguments"]["hessian"] if log else None) or "raw"
    hessian.check_kind(kind, settings, log.content["arguments"]["hessian"] if log else kind)
    further = with_data_flags(settings, args) if args.extend else None
    extend = bool(further and not log.is_part(further))
    pending, tokens = unfinished_shards(log, accelerator) if log and not extend else None, 0
    if pending != []:
        lm, log = set_up(args, folder, settings, log, accelerator, further if extend else None)
        if accelerator.is_main_process:
            log.check_disk()
            log.check_memory(kind)
        pending = unfinished_shards(log, accelerator) if pending is None else pending
        tokens = extract(args, lm, log, pending, accelerator)
        del lm
    progress.keep_log(folder)
    write_hessian(kind, log, accelerator)
    documents = sum(part["documents"] for part in log.parts)
    run.say(f"{log.examples} examples of {documents} documents, Hessian {kind}, in {log.folder}")
    progress.summary("compute_influence.py with the same flags", tokens)


def unfinished_shards(log: Log, accelerator: run.Accelerator) -> list[int]:
    """Return the shards that are missing or altered, on every rank; each rank checks its share."""
    shards = log.shards
    if "projections" not in log.content:
        return list(range(len(shards)))
    problems = {index: log.shard(index).problem() for index in run.share(len(shards), accelerator)}
    for problem in filter(None, problems.values()):
        if not problem.endswith("is missing"):
            print(f"{problem}; computing it again", flush=True)
    return sorted(run.gather_list([index for index, problem in problems.items() if problem], accelerator))


def set_up(
    args, folder: Path, settings: dict, log: Log | None, accelerator: run.Accelerator, further: dict | None
) -> tuple[nn.Module, Log]:
    """Load the model; write run.json, train/ (or an extension) and projections.safetensors where they are missing."""
    name, hub = settings["model_name"], model.hub_options(settings, args.trust_remote_code)
    with accelerator.main_process_first():  # the embedded model is converted once
        config = model.load_config(name, **hub)
    model.complete(settings, config, accelerator.device, run.say)
    lm, tokenizer, described = load(settings, args, accelerator.device, run.say)
    if log:
        log.check_model(described)
    if accelerator.is_main_process and log:
        log.check_source()
    if accelerator.is_main_process and (further or not log):
        begun = log or Log(folder, {"settings": settings, "arguments": vars(args)} | described)
        prepare_data(args, begun, tokenizer, further)
    accelerator.wait_for_everyone()
    log = Log.load(folder)
    accelerator.wait_for_everyone()  # all have read before rank 0 writes on
    if "projections" not in log.content:
        make_projections(args, lm, log, accelerator)
    accelerator.wait_for_everyone()
    return lm, Log.load(folder)


def extract(args, lm: nn.Module, log: Log, pending: list[int], accelerator: run.Accelerator) -> int:
    """Compute and write this rank's part of the pending shards; a thread writes one while the next is computed.

    Returns:
        The tokens of all ranks.
    """
    examples, projections, dtype = log.train(), log.projections(), log.settings["store_dtype"]
    mine = [pending[i] for i in run.share(len(pending), accelerator)]
    counts, shards, sizes = data.token_counts(examples), log.shards, []
    bar = progress.bar(
        total=sum(int(counts[list(shards[index])].sum()) for index in mine), unit="tok", unit_scale=True,
        desc=f"extracting (1 of {accelerator.num_processes})",
    )  # fmt: skip

    def write(index: int, result: HostGradients) -> None:
        about = {"relative_score_error": round(result.error.result(), 4)} if result.error else {}
        shard = log.shard(index)
        shard.folder.mkdir(exist_ok=True)  # and not the run's folder, which may have been removed
        sizes.append(shard.write(*result.wait(), **about))
        bar.set_postfix_str(f"{sum(sizes) / 1e9:.3g} GB written")

    capturing = GradientCapture(lm, projections, factors=True, squares_only=log.squares_only)
    with capturing as capture, bar, ThreadPoolExecutor(1) as writer:
        extractor, written = make_extractor(args, lm, capture, log), Future()
        written.set_result(None)
        for index in mine:
            ids = shards[index]
            rows = examples[ids.start : ids.stop]
            error = ScoreError(projections, dtype, hessian.default_damping("ekfac", dtype)) if log.bits else None
            result = extractor.gradients(rows["input_ids"], rows.get("counted"), ids.start, dtype, bar.update, error)
            written.result()
            written = writer.submit(write, index, result)
        extractor.finish()
        written.result()
    return sum(int(counts[list(shards[index])].sum()) for index in pending)


def write_hessian(kind: str, log: Log, accelerator: run.Accelerator) -> None:
    """Sum the Hessian's statistics over all shards, and write them with their checksum."""
    accelerator.wait_for_everyone()
    if kind == "none" or log.hessian_problem(kind) is None:
        return
    run.say(f"Hessian {kind}: at most {log.check_memory(kind) / 1e6:,.0f} MB of memory a process")
    path, rotated, layout = log.hessian_path(kind), log.settings["basis"] == "eigen", log.hessian_layout(kind)
    mine = run.share(len(log.shards), accelerator)
    total = partial(run.sum_over_ranks, accelerator=accelerator)
    tensors = progress.bar(
        hessian.statistics(kind, log, mine, total, rotated, accelerator.device),
        total=len(layout), desc=f"Hessian {kind}", unit="tensor",
    )  # fmt: skip
    if not accelerator.is_main_process:
        for _ in tensors:
            pass
        return
    with disk.atomic(path) as temporary:
        checksums = store.write_tensors(temporary, layout, tensors)
    disk.write_json(path.with_suffix(".json"), {"examples": log.examples, "checksums": checksums})


if __name__ == "__main__":
    run.guarded(main, build_parser())
