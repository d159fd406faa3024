"""Find the run that a command line means, resolve its settings, and load its model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from logra.inputs import model
from logra.quantise import FLOAT_DTYPES, INTEGER_BITS
from logra.run_dir import RunDir
from logra.runtime.files import same_name, short_name
from logra.runtime.flags import RunFlags
from logra.runtime.progress import say
from logra.runtime.settings import DATA_FIELDS, RUN_FIELDS, Execution, RunSettings


def run_name(settings: RunSettings) -> str:
    """Return the folder name of a run: model, data, projection and layers."""
    rank = "" if settings.lora == "none" else f"{settings.rank_out}x{settings.rank_in}"
    rank = f"{settings.bytes_per_example}B" if settings.bytes_per_example else rank
    parts = [short_name(settings.model_name), short_name(settings.data_name)]
    parts += [short_name(settings.data_config)] if settings.data_config else []
    parts += [settings.lora + rank] + (["eigen"] if settings.basis == "eigen" else [])
    parts += ["mlp" if settings.mlp_only else "all"]
    parts += [settings.store_dtype] if settings.store_dtype in INTEGER_BITS else []
    parts += [f"layers-{xxhash.xxh32_hexdigest(settings.layers.encode())}"] if settings.layers else []
    return "_".join(parts)


def find_folder(flags: RunFlags, must_exist: bool) -> Path:
    """Return the run's folder: --log_dir, or the name that the flags make."""
    if flags.log_dir:
        return Path(flags.log_dir)
    settings = RunSettings.from_user_flags(flags.user_flags, flags.hessian or "raw")
    folder = Path("logs") / run_name(settings)
    if must_exist and "basis" not in flags.user_flags and not (folder / "run.json").exists():
        other_basis = "projected" if settings.basis == "eigen" else "eigen"  # it was started with another Hessian
        other = Path("logs") / run_name(replace(settings, basis=other_basis))
        folder = other if (other / "run.json").exists() else folder
    return folder


def find_run(folder: Path, flags: RunFlags, must_exist: bool) -> RunDir | None:
    """Return the run in a folder, or None where it has to be made, or made anew.

    With --extend the flags of the data are about further documents, and may differ from run.json's.

    Raises:
        ValueError: A flag differs from run.json; or there is no such run although there must be one.
    """
    if not (folder / "run.json").exists():
        if must_exist:
            known = ", ".join(sorted(str(path.parent) for path in Path("logs").glob("*/run.json"))) or "none"
            raise ValueError(
                f"expected a run in {folder}, got none (runs here: {known}); run extract_log.py with the same flags "
                "first, or give --log_dir"
            )
        if folder.exists() and any(path.suffix != ".tmp" for path in folder.iterdir()):
            raise ValueError(f"expected a new folder or a run in {folder}, got other files; give another --log_dir")
        return None
    run = RunDir.load(folder)
    if flags.overwrite:
        return None
    if not run.parts:  # it was stopped before it had examples
        if must_exist:
            raise ValueError(f"expected a finished run in {folder}, got one without examples; run extract_log.py again")
        return None
    for name, value in flags.user_flags.items():
        saved = getattr(run.settings, name)
        if saved == value or (flags.extend and name in DATA_FIELDS):
            continue
        if not (name in ("model_name", "data_name") and same_name(saved, value)):
            raise ValueError(
                f"expected --{name} {saved} (from {folder / 'run.json'}), got {value}; give the "
                "run's value or another --log_dir, or begin anew with extract_log.py --overwrite"
            )
    return run


def say_kept_settings(run: RunDir, flags: RunFlags) -> None:
    """Name the settings that the run was started with and that this command line leaves out."""
    given = {*flags.user_flags} | ({"rank"} if {"rank_in", "rank_out"} <= {*flags.user_flags} else set())
    names = {*RUN_FIELDS, "rank"} - given - set(DATA_FIELDS if flags.extend else ())
    kept = [f"--{n} {v}" for n, v in run.record.arguments.items() if n in names and v is not None]
    if kept:
        say(f"As in {run.folder / 'run.json'}: {', '.join(kept)}")


def reload(folder: Path, accelerator: Accelerator) -> RunDir:
    """Return the run after rank 0 has written run.json; it does not write again before all ranks have read."""
    accelerator.wait_for_everyone()
    run = RunDir.load(folder)
    accelerator.wait_for_everyone()
    return run


def usable_hessian(run: RunDir, hessian: str | None) -> str:
    """Return the kind of Hessian to score with: the one that the user gave, or the run's.

    Raises:
        ValueError: The run is not finished, or has no whole Hessian of that kind.
    """
    kind = hessian or run.first_hessian
    run.settings.check_hessian(kind, run.first_hessian)
    if run.record.projections is None:
        raise ValueError(
            f"expected a finished run in {run.folder}, got one without projections; run extract_log.py again"
        )
    if kind != "none" and (problem := run.hessian_problem(kind)):
        raise ValueError(
            f"expected the Hessian {kind}, but {problem}; run extract_log.py --log_dir {run.folder} --hessian {kind}"
        )
    return kind


def new_settings(flags: RunFlags, execution: Execution, accelerator: Accelerator) -> RunSettings:
    """Return the settings of a new run, complete: its model's configuration gives block_size, the device dtype.

    Raises:
        ValueError: Flags that exclude one another, or a block_size above the model's context.
    """
    settings = RunSettings.from_user_flags(flags.user_flags, flags.hessian or "raw")
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    with accelerator.main_process_first():  # the embedded model is converted once
        context = model.context_length(model.load_config(settings.model_name, **hub))
    completed = settings.completed(context, model.default_dtype(accelerator.device))
    if settings.block_size is None and completed.block_size < 512:
        say(f"--block_size is {completed.block_size}, the model's context")
    return completed


def load_model(
    settings: RunSettings, execution: Execution, device: torch.device, say: Callable[[str], object] = lambda text: None
) -> tuple[nn.Module, PreTrainedTokenizerBase, dict[str, Any]]:
    """Return a run's model, its tokenizer, and what run.json says of the two (see inputs.model.describe)."""
    name, dtype = settings.model_name, FLOAT_DTYPES[settings.dtype]
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    if execution.fsdp and (execution.device_map or settings.quantize):
        raise ValueError("expected --fsdp without --device_map and --quantize, got both; leave one out")
    tokenizer = model.load_tokenizer(name, **hub)
    if execution.fsdp:
        lm, print_of_model = model.load_sharded_model(name, dtype, device, **hub)
    else:
        lm = model.load_model(name, dtype, device, settings.quantize, execution.device_map, **hub)
        print_of_model = model.fingerprint(lm)
    if execution.gradient_checkpointing or execution.device_map:  # else the backward pass holds all offloaded weights
        model.checkpoint_blocks(lm)
    return lm, tokenizer, model.describe(lm, print_of_model, tokenizer, settings, say)
