"""Stage 2/4. Reads a model and training text. Writes logs/<run>/: projected per-example gradients and their Hessian.

    python extract_log.py --lora random --hessian ekfac --mlp_only --data_name pydoc --data_config short

The long step; on several GPUs: accelerate launch --num_processes 8 --num_machines 1 --multi_gpu extract_log.py ...
A run that was stopped goes on where it was, on any number of processes.
"""

import argparse
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from tqdm import tqdm

from logra import data, hessian, model, projection, run, store
from logra.extraction import factor_sums, gradients
from logra.hooks import GradientCapture
from logra.log import Log, find_log

CALIBRATION = 256  # examples that the eigenbasis is measured on; 50 gave as good a basis as 2000
SHARD_BYTES = 2**28


def build_parser() -> run.Parser:
    """Return the command line's parser."""
    parser = run.Parser(description=__doc__)
    run.add_run_flags(parser)
    group = parser.add_argument_group("execution (the results do not depend on these)")
    group.add_argument(
        "--num_proc", type=run.positive_int, help="processes that tokenise (1, with the tokenizer's threads)"
    )
    group.add_argument(
        "--batch_tokens", type=run.positive_int, help="tokens in a batch, with padding (2048; GPU: 16384)"
    )
    group.add_argument("--batch_size", type=run.positive_int, help="examples in a batch at most (no limit)")
    group.add_argument("--overwrite", action="store_true", help="delete the run's folder first")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make what the run still lacks: run.json, train/, projections, shards, Hessian."""
    accelerator = run.start_processes()
    folder, settings, log = find_log(args, must_exist=False, overwrite=args.overwrite)
    accelerator.wait_for_everyone()  # all have looked before rank 0 writes
    kind = args.hessian or (log.content["arguments"]["hessian"] if log else None) or "raw"
    pending = unfinished_shards(log, accelerator) if log else None
    if pending != []:
        lm, log = set_up(args, folder, settings, log, accelerator)
        check_room(log, kind)
        pending = unfinished_shards(log, accelerator) if pending is None else pending
        extract(args, lm, log, pending, accelerator)
    write_hessian(kind, log, accelerator)
    run.say(f"{log.examples} examples of {log.content['data']['documents']} documents, Hessian {kind}, in {log.folder}")
    run.say("Next: compute_influence.py with the same flags")


def unfinished_shards(log: Log, accelerator: Accelerator) -> list[int]:
    """Return the shards that are missing or altered, on every rank; each rank checks its share."""
    if "projections" not in log.content:
        return list(range(len(log.shards)))
    mine = range(accelerator.process_index, len(log.shards), accelerator.num_processes)
    problems = {index: store.shard_problem(log.gradients, index, log.shards[index]) for index in mine}
    for problem in filter(None, problems.values()):
        if not problem.endswith("is missing"):
            print(f"{problem}; computing it again", flush=True)
    return sorted(run.gather_list([index for index, problem in problems.items() if problem], accelerator))


def set_up(
    args, folder: Path, settings: dict, log: Log | None, accelerator: Accelerator
) -> tuple[torch.nn.Module, Log]:
    """Load the model; write run.json, train/ and projections.safetensors where they are missing."""
    name = settings["model_name"]
    with accelerator.main_process_first():  # the embedded model is converted once
        config, tokenizer = model.load_config(name), model.load_tokenizer(name)
    if settings["block_size"] is None and (model.context_length(config) or 512) < 512:
        run.say(f"--block_size is {model.context_length(config)}, the model's context")
    settings["block_size"] = model.block_size(config, settings["block_size"])
    settings["dtype"] = settings["dtype"] or model.default_dtype(accelerator.device)
    lm = model.load_model(name, store.DTYPES[settings["dtype"]], accelerator.device)
    shapes = model.choose_layers(lm, settings["mlp_only"], settings["layers"])
    projected = projection.projected_shapes(shapes, settings["rank_in"], settings["rank_out"])
    described = {
        "model": {"class": type(lm).__name__, "fingerprint": model.fingerprint(lm)},
        "layers": {layer: [*shapes[layer], *projected[layer]] for layer in shapes},
    }
    narrow = sum(r == d for layer in shapes for r, d in zip(projected[layer], shapes[layer], strict=True))
    if narrow and settings["lora"] != "none":
        run.say(
            f"{narrow} of {2 * len(shapes)} sides of layers are no wider than the rank and not projected: exact there"
        )
    if log:
        log.check_model(described)
        log.check_source()
    elif accelerator.is_main_process:
        store.remove(folder)
        arguments = {key: value for key, value in vars(args).items()}
        log = Log(folder, {"settings": settings, "arguments": arguments, **described})
        prepare_data(args, log, tokenizer)
    accelerator.wait_for_everyone()
    log = Log.load(folder)
    if "projections" not in log.content:
        make_projections(args, lm, log, accelerator)
        accelerator.wait_for_everyone()
    return lm, Log.load(folder)


def prepare_data(args: argparse.Namespace, log: Log, tokenizer) -> None:
    """Write run.json, tokenise into train/, then enter the data's counts and fingerprints in run.json."""
    settings = log.settings
    documents = data.load_documents(
        settings["data_name"], settings["data_config"], settings["data_split"], args.cache_dir
    )
    source = data.source_fingerprint(settings["data_name"])
    log.save()
    work = log.folder / "work"
    try:
        work.mkdir()
        choice = data.choice(settings, settings["max_examples"])
        examples, counts = data.build_examples(documents, tokenizer, choice, args.num_proc, work)
        with store.atomic(log.folder / "train") as train:
            examples.save_to_disk(train)
    except BaseException:
        store.remove(log.folder)  # nothing of a run is there yet
        raise
    finally:
        store.remove(work)
    size = sum(r_out * r_in for r_out, r_in in log.projected.values()) * store.DTYPES[settings["store_dtype"]].itemsize
    shard_examples = max(1, min(SHARD_BYTES // size, math.ceil(len(examples) / 8)))
    counts |= {"examples": len(examples), "tokens": int(data.token_counts(examples).sum()), "source": source}
    counts |= {"shard_examples": settings["shard_examples"] or shard_examples, "bytes_per_example": size}
    log.save(data=counts | {"fingerprint": data.examples_fingerprint(examples)})
    if counts["dropped_rows"]:
        run.say(f"dropped {counts['dropped_rows']} rows without text")


def make_projections(args, lm: torch.nn.Module, log: Log, accelerator: Accelerator) -> None:
    """Draw the projections, rotate them into the eigenbasis of a sample where that is asked for, and save them.

    The sample's batches do not depend on the number of processes, so that the basis doesn't either.
    """
    settings = log.settings
    projections, sizes = projection.identity(log.shapes), log.shapes
    if settings["lora"] == "random":
        projections, sizes = projection.draw(log.shapes, log.projected, settings["seed"]), log.projected
    if settings["basis"] == "eigen" or settings["lora"] == "pca":
        examples = log.train()
        count = min(len(examples), CALIBRATION, max(32, len(examples) // 8))
        chosen = np.random.default_rng(settings["seed"]).choice(len(examples), count, replace=False)
        rows = examples.select(np.sort(chosen))["input_ids"]
        batches = [[rows[i] for i in batch] for batch in data.length_batches([len(r) for r in rows], *limits(args, lm))]
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        with tqdm(total=len(mine), desc="calibrating", unit="batch", disable=not accelerator.is_main_process) as bar:
            sums = factor_sums(lm, projections, sizes, mine, bar.update)
        sums = {key: run.sum_over_ranks(total, accelerator) for key, total in sums.items()}
        for layer, p in projections.items() if accelerator.is_main_process else ():
            projections[layer] = projection.rotate(p, sums[f"{layer}.A"], sums[f"{layer}.B"], log.projected[layer])
    if accelerator.is_main_process:
        path = log.folder / "projections.safetensors"
        log.save(projections=store.save_tensors(path, projection.to_tensors(projections)))


def limits(args: argparse.Namespace, lm: torch.nn.Module) -> tuple[int, int | None]:
    """Return the most tokens and examples in a batch."""
    return args.batch_tokens or (16384 if lm.device.type == "cuda" else 2048), args.batch_size


def extract(args, lm: torch.nn.Module, log: Log, pending: list[int], accelerator: Accelerator) -> None:
    """Compute and write this rank's part of the pending shards."""
    examples, dtype = log.train(), store.DTYPES[log.settings["store_dtype"]]
    mine = pending[accelerator.process_index :: accelerator.num_processes]
    counts = data.token_counts(examples)
    bar = tqdm(
        total=sum(int(counts[list(log.shards[index])].sum()) for index in mine), unit="tok", unit_scale=True,
        desc=f"extracting (1 of {accelerator.num_processes})", disable=not accelerator.is_main_process,
    )  # fmt: skip
    with GradientCapture(lm, log.projections(), factors=True) as capture, bar:
        for index in mine:
            ids = log.shards[index]
            rows = examples[ids.start : ids.stop]["input_ids"]
            grads = gradients(lm, capture, rows, ids.start, limits(args, lm), dtype, done=bar.update)
            store.write_shard(log.gradients, index, ids, grads, capture.take_factors())


def check_room(log: Log, kind: str) -> None:
    """Refuse a run whose gradients don't fit on the disk, or whose Hessian doesn't fit in memory."""
    need, free = log.examples * log.content["data"]["bytes_per_example"], shutil.disk_usage(log.folder).free
    written = sum(file.stat().st_size for file in log.gradients.glob("*")) if log.gradients.exists() else 0
    if need - written > free:
        raise ValueError(f"expected {need / 1e9:.1f} GB of disk for the gradients, got {free / 1e9:.1f}; lower --rank")
    need, free = hessian.memory_bytes(kind, log.projected, log.examples), psutil.virtual_memory().available
    if need > free:
        raise ValueError(
            f"expected {need / 1e9:.1f} GB of memory for the Hessian {kind} of the widest layer, got {free / 1e9:.1f}; "
            "use --hessian ekfac, or a lower --rank"
        )


def write_hessian(kind: str, log: Log, accelerator: Accelerator) -> None:
    """Sum the Hessian's statistics over all shards, and write them with their checksum."""
    accelerator.wait_for_everyone()
    if kind == "none" or log.hessian_problem(kind) is None:
        return
    path, rotated = log.hessian_path(kind), log.settings["basis"] == "eigen"
    layout = hessian.layout(kind, log.projected, log.examples, rotated)
    mine = range(accelerator.process_index, len(log.shards), accelerator.num_processes)
    total = partial(run.sum_over_ranks, accelerator=accelerator)
    tensors = tqdm(
        hessian.statistics(kind, log, mine, total, rotated),
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
