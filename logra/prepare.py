"""Find a command line's run, load its model, and make what stands in the run before its first shard."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from logra import data, disk, model, progress, projection, run, store
from logra.extraction import CPU_TOKENS, Extractor, calibration_batches, factor_sums
from logra.fsdp import load_sharded
from logra.hooks import GradientCapture
from logra.log import Log


def find_folder(args: argparse.Namespace, must_exist: bool) -> Path:
    """Return the run's folder for the flags of a command line."""
    given = run.given_settings(args)
    defaults = run.with_defaults(given, args.hessian or "raw")
    folder = Path(args.log_dir) if args.log_dir else Path("logs") / run.run_name(defaults)
    if must_exist and not args.log_dir and "basis" not in given and not (folder / "run.json").exists():
        other = "projected" if defaults["basis"] == "eigen" else "eigen"
        candidate = Path("logs") / run.run_name(defaults | {"basis": other})
        folder = candidate if (candidate / "run.json").exists() else folder
    return folder


def find_log(
    folder: Path, args: argparse.Namespace, must_exist: bool, overwrite: bool = False, extend: bool = False
) -> tuple[dict, Log | None]:
    """Return (settings, log or None where it has to be made) of a folder, for the flags of a command line.

    With `extend` the flags of the data are about further documents, and may differ from run.json's.

    Raises:
        ValueError: A given flag differs from run.json; or no such run although there must be one.
    """
    given = run.given_settings(args)
    defaults = run.with_defaults(given, args.hessian or "raw")
    if not (folder / "run.json").exists():
        if must_exist:
            known = ", ".join(sorted(str(path.parent) for path in Path("logs").glob("*/run.json"))) or "none"
            raise ValueError(
                f"expected a run in {folder}, got none (runs here: {known}); run extract_log.py with the same flags "
                "first, or give --log_dir"
            )
        if folder.exists() and any(path.suffix != ".tmp" for path in folder.iterdir()):
            raise ValueError(f"expected a new folder or a run in {folder}, got other files; give another --log_dir")
        return defaults, None
    log = Log.load(folder)
    if overwrite:
        return defaults, None
    if "data" not in log.content:  # stopped before it had examples
        if must_exist:
            raise ValueError(f"expected a finished run in {folder}, got one without examples; run extract_log.py again")
        return defaults, None
    for name, value in given.items():
        saved = log.settings.get(name)
        if saved == value or (extend and name in run.DATA_FLAGS):
            continue
        if not (name in ("model_name", "data_name") and disk.same_name(saved, value)):
            raise ValueError(
                f"expected --{name} {saved} (from {folder / 'run.json'}), got {value}; give the "
                "run's value or another --log_dir, or begin anew with extract_log.py --overwrite"
            )
    return log.settings, log


def with_data_flags(settings: dict, args: argparse.Namespace) -> dict:
    """Return a run's settings with the flags of the data as they were given, or their defaults."""
    given = {name: getattr(args, name) for name in run.DATA_FLAGS}
    return settings | {name: run.RUN_FLAGS[name][0] if value is None else value for name, value in given.items()}


def prepare_data(args: argparse.Namespace, log: Log, tokenizer, further: dict | None) -> None:
    """Write run.json, tokenise into train/ (or an extension), then enter the data's counts and fingerprints."""
    settings = further or log.settings
    name, config, split = (settings[key] for key in ("data_name", "data_config", "data_split"))
    documents = data.load_documents(name, config, split, args.cache_dir)
    first_row = sum(part["rows"] for part in log.parts) if further else 0
    choice = data.choice(settings, first_row=first_row)
    data.row_form(documents.column_names, choice.text_column, choice.response)
    part = log.train_folder(len(log.parts) if further else 0)
    disk.remove(part if further else log.folder)
    try:
        if not further:
            log.save()
        counts = data.write_examples(part, documents, tokenizer, choice, args.num_proc)
        if further:
            log.check_new_documents(part)
    except BaseException:
        disk.remove(part if further else log.folder)  # nothing of it is there yet
        raise
    counts |= log.shard_size(counts["examples"]) | {"source": data.source_fingerprint(name)}
    counts |= {"settings": {flag: settings[flag] for flag in run.DATA_FLAGS}}
    log.save(**({"extensions": [*log.parts[1:], counts]} if further else {"data": counts}))
    if counts["dropped_rows"]:
        run.say(f"dropped {counts['dropped_rows']} rows without text")


def load(
    settings: dict, args: argparse.Namespace, device: torch.device, say: Callable = lambda text: None
) -> tuple[nn.Module, PreTrainedTokenizerBase, dict]:
    """Return a run's model, placed as the command line says, its tokenizer, and what run.json says of the two."""
    name, dtype = settings["model_name"], store.DTYPES[settings["dtype"]]
    hub = model.hub_options(settings, args.trust_remote_code)
    if args.fsdp and (args.device_map or settings["quantize"]):
        raise ValueError("expected --fsdp without --device_map and --quantize, got both; leave one out")
    tokenizer = model.load_tokenizer(name, **hub)
    if args.fsdp:
        lm, print_of_model = load_sharded(name, dtype, device, **hub)
    else:
        lm = model.load_model(name, dtype, device, settings["quantize"], args.device_map, **hub)
        print_of_model = model.fingerprint(lm)
    if args.gradient_checkpointing or args.device_map:  # without it, the backward pass would hold all offloaded weights
        model.checkpoint_blocks(lm)
    return lm, tokenizer, model.describe(lm, print_of_model, tokenizer, settings, say)


def make_extractor(args: argparse.Namespace, lm: nn.Module, capture: GradientCapture, log: Log) -> Extractor:
    """Return what runs the model, with the size of batch that was asked for or that fits."""
    tokens = args.batch_tokens or ("auto" if torch.cuda.is_available() else CPU_TOKENS)
    extractor = Extractor(lm, capture, tokens if isinstance(tokens, int) else 0, args.batch_size, args.fsdp, run.say)
    if tokens == "auto":
        most = min(args.batch_size or 2**20, max(map(len, log.shards)))
        run.say(f"--batch_tokens {extractor.find_batch_tokens(log.settings['block_size'], most)}")
    return extractor


def make_projections(args, lm: nn.Module, log: Log, accelerator: Accelerator) -> None:
    """Draw the projections, rotate them into the eigenbasis of a sample where that is asked for, and save them."""
    settings = log.settings
    projections, sizes = projection.identity(log.shapes), log.shapes
    if settings["lora"] == "random":
        projections, sizes = projection.draw(log.shapes, log.projected, settings["seed"]), log.projected
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if log.rotated:
        examples = log.train()
        log.check_memory("", sizes)
        with GradientCapture(lm, projections, grads=False, factors=True) as capture:
            extractor = make_extractor(args, lm, capture, log)
            batches = calibration_batches(
                data.token_counts(examples), settings["calibration_examples"], settings["seed"],
                extractor.batch_tokens, args.batch_size,
            )  # fmt: skip
            mine = batches[rank::ranks]
            with progress.bar(total=len(mine), desc="calibrating", unit="batch") as bar:
                sums = factor_sums(extractor, sizes, examples, mine, bar.update)
        rotated = []
        for i, (layer, p) in enumerate(projections.items()):
            a, b = (run.sum_over_ranks(sums.pop(f"{layer}.{side}"), accelerator) for side in "AB")
            if i % ranks == rank:  # the eigenvectors of a layer are one rank's work
                rotated.append((layer, projection.rotate(p, a, b, log.projected[layer])))
        every = dict(run.gather_list(rotated, accelerator))
        projections = {layer: every[layer] for layer in projections}
    if accelerator.is_main_process:
        path, tensors = log.folder / "projections.safetensors", projection.to_tensors(projections)
        log.save(projections=store.save_tensors(path, log.projections_layout, tensors))
