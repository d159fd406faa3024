"""Find the run of a command line, complete its settings, and load its model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import is_initialized
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logra.inputs.documents import source_contents
from logra.inputs.queries import Query, load_queries
from logra.models import layers, model
from logra.quantise import FLOAT_DTYPES, INTEGER_BITS
from logra.run_dir import RunDir
from logra.runtime import files, processes
from logra.runtime.flags import RunFlags
from logra.runtime.progress import say
from logra.runtime.settings import DATA_FIELDS, RUN_FIELDS, Execution, QuerySettings, RunSettings
from logra.stages.gradients import check_layers

RUN_FILES = ("run.json", "checkpoints.json")  # of a run, and of a folder with the runs of checkpoints
OWN_SETTINGS = ("model_name", "revision", "seed")  # of each checkpoint of a training; all other settings are shared


def run_name(settings: RunSettings) -> str:
    """Return the folder name of a run: model, data, projection, basis, layers and store type."""
    projection = settings.lora
    if settings.bytes_per_example:
        projection += f"{settings.bytes_per_example}B"
    elif settings.lora != "none":
        projection += f"{settings.rank_out}x{settings.rank_in}"
    sources = (settings.model_name, settings.data_name, settings.data_config)
    parts = [files.short_name(source) for source in sources if source] + [projection]
    parts += ["eigen"] if settings.basis == "eigen" else []
    parts += ["mlp" if settings.mlp_only else "all"]
    parts += [settings.store_dtype] if settings.store_dtype in INTEGER_BITS else []
    parts += [f"layers-{xxhash.xxh32_hexdigest(settings.layers.encode())}"] if settings.layers else []
    return files.fitting("_".join(parts))


@processes.on_rank_0
def find_folder(flags: RunFlags, must_exist: bool) -> Path:
    """Return the run's folder, or the parent folder of checkpoints: --log_dir, or logs/ and a name made from the flags.

    If it must exist and does not, the run may have been started with a Hessian that has the other basis.
    """
    settings = RunSettings.from_user_flags(flags.user_flags, flags.hessian or "raw")  # refuses contradictions
    if "::" in (flags.log_dir or ""):  # datasets writes train/, and takes it for an address
        raise ValueError(f"expected --log_dir without '::', got {flags.log_dir}; choose another name")
    if flags.log_dir:
        return Path(flags.log_dir)
    name, suffix = settings.model_name, ""
    if flags.checkpoints:
        in_folder = Path(flags.checkpoints[0]).absolute().parent.name
        name, suffix = flags.user_flags.get("model_name", in_folder), "_checkpoints"
    other_basis = "projected" if settings.basis == "eigen" else "eigen"
    folder, other = (
        Path("logs") / f"{run_name(replace(settings, model_name=name, basis=basis))}{suffix}"
        for basis in (settings.basis, other_basis)
    )
    if must_exist and "basis" not in flags.user_flags and not _has_runs(folder) and _has_runs(other):
        return other
    return folder


def _has_runs(folder: Path) -> bool:
    """Return whether a folder is a run or holds runs of checkpoints."""
    return any((folder / name).exists() for name in RUN_FILES)


@processes.on_rank_0
def find_run(folder: Path, flags: RunFlags, must_exist: bool) -> RunDir | None:
    """Return the run in a folder, or None if it is to be made, or made anew.

    With --extend the flags of the data describe further documents, which may differ from run.json's.

    Raises:
        ValueError: A flag differs from run.json. Or the run must exist, and does not.
    """
    if not (folder / "run.json").exists():
        check_new_folder(folder, must_exist)
        return None
    run = RunDir.load(folder)
    if flags.overwrite:
        return None
    if not run.parts:  # it was stopped before it had examples
        if must_exist:
            raise ValueError(f"expected a finished run in {folder}, got one without examples; run extract_log.py again")
        return None
    return check_flags(run, flags)


def check_flags(run: RunDir, flags: RunFlags) -> RunDir:
    """Compare the flags that the user gave with a run's settings.

    Returns:
        The run, with the flags' names of its model and data if these were moved.

    Raises:
        ValueError: A flag differs from run.json.
    """
    for name, value in flags.user_flags.items():
        saved = getattr(run.settings, name)
        is_source = name in ("model_name", "data_name")
        if saved == value or (is_source and files.same_name(saved, value)) or (flags.extend and name in DATA_FIELDS):
            continue
        if is_source and _same_content(run, name, value):
            run = _renamed(run, name, value)
        else:
            raise ValueError(
                f"expected --{name} {saved} (from {run.folder / 'run.json'}), got {value}; give the "
                "run's value or another --log_dir, or start again with extract_log.py --overwrite"
            )
    return run


def _same_content(run: RunDir, name: str, value: str) -> bool:
    """Return whether a model or data set under another name has the files of the run's, and say so."""
    settings = run.settings
    if name == "model_name":
        known, found, compare = run.record.model_files, model.source_contents(value), model.changed_file
    else:
        known, compare = run.parts[0].source, files.changed_file
        found = source_contents(replace(settings.data, data_name=value))
    same = isinstance(known, dict) and found is not None and compare(known, found) is None
    if same:
        say(f"--{name} {value}: the same files as {getattr(settings, name)}")
    return same


def _renamed(run: RunDir, name: str, value: str) -> RunDir:
    """Return the run with another name of its model or data set."""
    record = run.record
    if name == "model_name":
        return RunDir(run.folder, replace(record, settings=replace(record.settings, model_name=value)))
    first, *others = record.parts
    parts = (replace(first, settings=replace(first.settings, data_name=value)), *others)
    return RunDir(run.folder, replace(record, settings=replace(record.settings, data_name=value), parts=parts))


@processes.on_rank_0
def check_model_files(run: RunDir) -> None:
    """Raise a ValueError if the files of a run's local model have changed. A model that is gone raises elsewhere."""
    name, known = run.settings.model_name, run.record.model_files
    found = model.source_contents(name) if known else None
    if found and (change := model.changed_file(known, found)):
        raise ValueError(
            f"expected the model {name} as it was when {run.folder} was started, got other files ({change}); restore "
            "them, use another --log_dir, or start again with extract_log.py --overwrite"
        )


def check_new_folder(folder: Path, must_exist: bool) -> None:
    """Raise a ValueError if a folder without run.json must hold a run, or holds other files."""
    if must_exist:
        found = (path for name in RUN_FILES for path in Path("logs").glob(f"*/{name}"))
        known = ", ".join(sorted(str(path.parent) for path in found)) or "none"
        raise ValueError(
            f"expected a run in {folder}, got none (runs here: {known}); run extract_log.py with the same flags "
            "first, or give --log_dir"
        )
    if folder.exists() and any(path.suffix not in (".tmp", ".lock") for path in folder.iterdir()):
        raise ValueError(f"expected a new folder or a run in {folder}, got other files; give another --log_dir")


def say_kept_settings(run: RunDir, flags: RunFlags) -> None:
    """Print the flags that the run was started with and that this command line leaves out."""
    names = {*RUN_FIELDS, "rank"} - {*flags.user_flags} - set(DATA_FIELDS if flags.extend else ())
    if {"rank_in", "rank_out"} <= {*flags.user_flags}:
        names.discard("rank")
    kept = [f"--{name} {v}" for name, v in run.record.arguments.items() if name in names and v is not None]
    if kept:
        say(f"As in {run.folder / 'run.json'}: {', '.join(kept)}")


@processes.on_rank_0
def reload(folder: Path) -> RunDir:
    """Read run.json after rank 0 has written it."""
    return RunDir.load(folder)


@processes.on_rank_0
def usable_hessian(run: RunDir, hessian: str | None) -> str:
    """Return the kind of Hessian to score with: `hessian` if given, else the run's first one.

    Raises:
        ValueError: The run is not finished, or has no whole Hessian of this kind.
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


def with_own_settings(settings: RunSettings, flags: RunFlags) -> RunSettings:
    """Return the settings of one checkpoint's run with the model, revision and seed of another checkpoint."""
    own = {name: value for name, value in flags.user_flags.items() if name in OWN_SETTINGS}
    return replace(settings, **own)


@processes.on_rank_0
def new_settings(flags: RunFlags, execution: Execution, sibling: RunDir | None = None) -> RunSettings:
    """Return the complete settings of a new run: block_size from the model's configuration, dtype from the device.

    Args:
        flags: Of the command line.
        execution: How to run the model.
        sibling: A run of another checkpoint. All settings but model, revision and seed are taken from it.

    Raises:
        ValueError: Flags exclude one another or differ from the sibling's, or block_size is above the model's context.
    """
    if sibling:
        shared = {name: value for name, value in flags.user_flags.items() if name not in OWN_SETTINGS}
        check_flags(sibling, flags._replace(user_flags=shared))
        settings = with_own_settings(sibling.settings, flags)
    else:
        settings = RunSettings.from_user_flags(flags.user_flags, flags.hessian or "raw")
        settings.check_hessian(flags.hessian or "raw", flags.hessian or "raw")
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    context = model.context_length(model.load_config(settings.model_name, **hub))
    completed = settings.completed(context, model.default_dtype(processes.state().device))
    if settings.block_size is None and completed.block_size < 512:
        say(f"--block_size is {completed.block_size}, the model's context")
    return completed


def describe_without_weights(settings: RunSettings, execution: Execution) -> dict[str, Any] | None:
    """Return what load_model says of a model, but for its fingerprint, from its configuration and tokenizer alone.

    None if the model's code computes with its weights.
    """
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    config, tokenizer = (load(settings.model_name, **hub) for load in (model.load_config, model.load_tokenizer))
    try:
        with FakeTensorMode():
            empty = model.empty_model(config, FLOAT_DTYPES[settings.dtype], execution.trust_remote_code)
            return layers.describe(empty, "", tokenizer, settings)
    except RuntimeError:  # of FakeTensorMode
        return None


def say_tracked(lm: PreTrainedModel, described: dict[str, Any], settings: RunSettings) -> None:
    """Print which layers are tracked, the rank that --bytes_per_example chose, and how many sides are not projected."""
    layers.say_coverage(lm, described["layers"], settings.mlp_only, settings.layers)
    sizes = described["layers"].values()  # [d_out, d_in, r_out, r_in]
    if settings.bytes_per_example:
        say(f"--bytes_per_example {settings.bytes_per_example}: rank {max(max(ranks) for _, _, *ranks in sizes)}")
    unprojected = sum((d_out == r_out) + (d_in == r_in) for d_out, d_in, r_out, r_in in sizes)
    if unprojected and settings.lora != "none":
        say(f"{unprojected} of {2 * len(sizes)} sides of layers are not projected: they are no wider than the rank")


@processes.on_rank_0
def read_queries(
    query_settings: QuerySettings, settings: RunSettings, execution: Execution, cache_dir: str | None
) -> tuple[str, list[Query]]:
    """Return load_queries (see there) with the tokenizer and the context of a run's model."""
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    context = model.context_length(model.load_config(settings.model_name, **hub))
    tokenizer = model.load_tokenizer(settings.model_name, **hub)
    return load_queries(query_settings, settings, tokenizer, context, cache_dir)


def load_model(settings: RunSettings, execution: Execution) -> tuple[nn.Module, PreTrainedTokenizerBase, dict]:
    """Return a run's model, its tokenizer, and their entries in run.json (see models.layers.describe)."""
    if execution.fsdp and (execution.device_map or settings.quantize):
        raise ValueError("expected --fsdp without --device_map and --quantize, got both; leave one out")
    if execution.fsdp and not is_initialized():
        raise ValueError("expected --fsdp with accelerate launch, got one process; leave it out, or start several")
    name, dtype = settings.model_name, FLOAT_DTYPES[settings.dtype]
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    device = processes.state().device
    with processes.state().main_process_first():  # one rank converts the embedded model
        tokenizer = files.retried(lambda: model.load_tokenizer(name, **hub))
    if execution.fsdp:
        lm, weights_hash = model.load_sharded_model(name, dtype, device, **hub)
    else:
        lm = model.load_model(name, dtype, device, settings.quantize, execution.device_map, **hub)
        weights_hash = model.fingerprint(lm)
    model.keep_extra_tokens(lm, tokenizer)
    if execution.gradient_checkpointing or execution.device_map:  # or the graph would keep all offloaded weights
        model.checkpoint_blocks(lm)
    described = layers.describe(lm, weights_hash, tokenizer, settings)
    check_layers(lm, described["layers"])
    return lm, tokenizer, described
