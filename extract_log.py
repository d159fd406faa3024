"""Stage 2/4. Reads a model and training text. Writes logs/<run>/: projected per-example gradients and their Hessian.

    python extract_log.py --lora random --hessian ekfac --mlp_only --data_name pydoc --data_config short

The long step; on several GPUs: accelerate launch --num_processes 8 --num_machines 1 --multi_gpu extract_log.py ...
A run that was stopped goes on where it was, on any number of processes.
"""

import argparse
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from logra import data, hessian, model, projection, run, store
from logra.extraction import calibration_batches, factor_sums, gradients
from logra.hooks import GradientCapture
from logra.log import Log, find_log


def build_parser() -> run.Parser:
    """Return the command line's parser."""
    parser = run.Parser(description=__doc__)
    run.add_run_flags(parser)
    group = parser.add_argument_group("execution (results depend on these by rounding only)")
    group.add_argument(
        "--num_proc", type=run.positive_int, help="processes that tokenise (1, with the tokenizer's threads)"
    )
    group.add_argument(
        "--batch_tokens", type=run.positive_int, help="tokens in a batch, with padding (1024; GPU: 16384)"
    )
    group.add_argument("--batch_size", type=run.positive_int, help="examples in a batch at most (no limit)")
    group.add_argument("--overwrite", action="store_true", help="delete the run's folder first")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make what the run still lacks: run.json, train/, projections, shards, Hessian."""
    accelerator = run.start_processes()
    folder, settings, log = find_log(args, must_exist=False, overwrite=args.overwrite)
    accelerator.wait_for_everyone()  # all have looked before rank 0 writes
    if log:
        log.say_what_is_kept(args, run.say)
    kind = args.hessian or (log.content["arguments"]["hessian"] if log else None) or "raw"
    pending = unfinished_shards(log, accelerator) if log else None
    if pending != []:
        lm, log = set_up(args, folder, settings, log, accelerator)
        if accelerator.is_main_process:
            log.check_disk()
            log.check_memory(kind)
        pending = unfinished_shards(log, accelerator) if pending is None else pending
        extract(args, lm, log, pending, accelerator)
        del lm
    write_hessian(kind, log, accelerator)
    run.say(f"{log.examples} examples of {log.content['data']['documents']} documents, Hessian {kind}, in {log.folder}")
    run.say("Next: compute_influence.py with the same flags")


def unfinished_shards(log: Log, accelerator: Accelerator) -> list[int]:
    """Return the shards that are missing or altered, on every rank; each rank checks its share."""
    shards = log.shards
    if "projections" not in log.content:
        return list(range(len(shards)))
    mine = range(accelerator.process_index, len(shards), accelerator.num_processes)
    problems = {index: store.shard_problem(log.gradients, index, shards[index]) for index in mine}
    for problem in filter(None, problems.values()):
        if not problem.endswith("is missing"):
            print(f"{problem}; computing it again", flush=True)
    return sorted(run.gather_list([index for index, problem in problems.items() if problem], accelerator))


def set_up(args, folder: Path, settings: dict, log: Log | None, accelerator: Accelerator) -> tuple[nn.Module, Log]:
    """Load the model; write run.json, train/ and projections.safetensors where they are missing."""
    name = settings["model_name"]
    with accelerator.main_process_first():  # the embedded model is converted once
        config, tokenizer = model.load_config(name), model.load_tokenizer(name)
    settings["block_size"] = model.block_size(config, settings["block_size"], run.say)
    settings["dtype"] = settings["dtype"] or model.default_dtype(accelerator.device)
    lm = model.load_model(name, store.DTYPES[settings["dtype"]], accelerator.device)
    described = model.describe(lm, settings, run.say)
    if log:
        log.check_model(described)
        if accelerator.is_main_process:
            log.check_source()
    elif accelerator.is_main_process:
        prepare_data(args, Log(folder, {"settings": settings, "arguments": vars(args)} | described), tokenizer)
    accelerator.wait_for_everyone()
    log = Log.load(folder)
    accelerator.wait_for_everyone()  # all have read before rank 0 writes on
    if "projections" not in log.content:
        make_projections(args, lm, log, accelerator)
    accelerator.wait_for_everyone()
    return lm, Log.load(folder)


def prepare_data(args: argparse.Namespace, log: Log, tokenizer) -> None:
    """Write run.json, tokenise into train/, then enter the data's counts and fingerprints in run.json."""
    name, config, split = (log.settings[key] for key in ("data_name", "data_config", "data_split"))
    documents = data.load_documents(name, config, split, args.cache_dir)
    choice = data.choice(log.settings, log.settings["max_examples"])
    data.check_column(documents, choice.text_column)
    store.remove(log.folder)
    try:
        log.save()
        counts = data.write_examples(log.folder, documents, tokenizer, choice, args.num_proc)
    except BaseException:
        store.remove(log.folder)  # nothing of a run is there yet
        raise
    log.save(data=counts | log.shard_size(counts["examples"]) | {"source": data.source_fingerprint(name)})
    if counts["dropped_rows"]:
        run.say(f"dropped {counts['dropped_rows']} rows without text")


def make_projections(args, lm: nn.Module, log: Log, accelerator: Accelerator) -> None:
    """Draw the projections, rotate them into the eigenbasis of a sample where that is asked for, and save them."""
    settings = log.settings
    projections, sizes = projection.identity(log.shapes), log.shapes
    if settings["lora"] == "random":
        projections, sizes = projection.draw(log.shapes, log.projected, settings["seed"]), log.projected
    if settings["basis"] == "eigen" or settings["lora"] == "pca":
        examples = log.train()
        log.check_memory("", sizes)
        batches = calibration_batches(data.token_counts(examples), settings["seed"], limits(args, lm))
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        with tqdm(total=len(mine), desc="calibrating", unit="batch", disable=not accelerator.is_main_process) as bar:
            sums = factor_sums(lm, projections, sizes, examples, mine, bar.update)
        sums = {key: run.sum_over_ranks(total, accelerator) for key, total in sums.items()}
        for layer, p in projections.items() if accelerator.is_main_process else ():
            projections[layer] = projection.rotate(p, sums[f"{layer}.A"], sums[f"{layer}.B"], log.projected[layer])
    if accelerator.is_main_process:
        path = log.folder / "projections.safetensors"
        log.save(projections=store.save_tensors(path, projection.to_tensors(projections)))


def limits(args: argparse.Namespace, lm: nn.Module) -> tuple[int, int | None]:
    """Return the most tokens and examples in a batch."""
    return args.batch_tokens or (16384 if lm.device.type == "cuda" else 1024), args.batch_size


def extract(args, lm: nn.Module, log: Log, pending: list[int], accelerator: Accelerator) -> None:
    """Compute and write this rank's part of the pending shards."""
    examples, dtype = log.train(), store.DTYPES[log.settings["store_dtype"]]
    mine = pending[accelerator.process_index :: accelerator.num_processes]
    counts, shards = data.token_counts(examples), log.shards
    bar = tqdm(
        total=sum(int(counts[list(shards[index])].sum()) for index in mine), unit="tok", unit_scale=True,
        desc=f"extracting (1 of {accelerator.num_processes})", disable=not accelerator.is_main_process,
    )  # fmt: skip
    with GradientCapture(lm, log.projections(), factors=True) as capture, bar:
        for index in mine:
            ids = shards[index]
            rows = examples[ids.start : ids.stop]["input_ids"]
            grads = gradients(lm, capture, rows, ids.start, limits(args, lm), dtype, done=bar.update)
            store.write_shard(log.gradients, index, ids, grads, capture.take_factors())


def write_hessian(kind: str, log: Log, accelerator: Accelerator) -> None:
    """Sum the Hessian's statistics over all shards, and write them with their checksum."""
    accelerator.wait_for_everyone()
    if kind == "none" or log.hessian_problem(kind) is None:
        return
    log.check_memory(kind)
    path, rotated = log.hessian_path(kind), log.settings["basis"] == "eigen"
    layout = hessian.layout(kind, log.projected, log.examples, rotated)
    mine = range(accelerator.process_index, len(log.shards), accelerator.num_processes)
    total = partial(run.sum_over_ranks, accelerator=accelerator)
    tensors = tqdm(
        hessian.statistics(kind, log, mine, total, rotated, accelerator.device),
        total=len(layout), desc=f"Hessian {kind}", unit="tensor", disable=not accelerator.is_main_process,
    )  # fmt: skip
    if not accelerator.is_main_process:
        for _ in tensors:
            pass
        return
    with store.atomic(path) as temporary:
        entry = store.write_tensors(temporary, layout, tensors)
    store.write_json(path.with_suffix(".json"), entry | {"examples": log.examples})


if __name__ == "__main__":
    run.guarded(main, build_parser())
