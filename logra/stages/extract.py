"""Stage 2, step by step: train examples, gradient shards, Hessian. extract_log.py calls the steps in order."""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from datasets import load_from_disk
from torch import nn
from transformers import PreTrainedTokenizerBase

from logra import hessian
from logra.hooks import GradientCapture
from logra.inputs.documents import load_documents, source_fingerprint
from logra.inputs.examples import token_counts, write_examples
from logra.inputs.rows import row_form
from logra.quantise import ScoreErrorEstimate
from logra.run_dir import RunDir, TrainPart
from logra.runtime import files, processes, progress
from logra.runtime.settings import DataSettings, Execution
from logra.stages.calibrate import check_memory
from logra.stages.gradients import HostGradients, make_extractor


@contextmanager
def locked(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other commands out of a run's folder: rank 0 holds a lock beside it while all ranks are inside.

    Raises:
        ValueError: Another command is at work there.
    """
    lock = files.locked(folder.with_name(f"{folder.name}.lock"), str(folder))
    with lock if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        yield
        accelerator.wait_for_everyone()


def has_documents(run: RunDir, documents: DataSettings) -> bool:
    """Say whether the run holds these documents already (--extend).

    Raises:
        ValueError: It holds documents of the same name with other content or limits.
    """
    for part in run.parts:
        before = part.settings
        if files.same_name(before.data_name, documents.data_name) and (before.data_config, before.data_split) == (
            documents.data_config, documents.data_split,
        ):  # fmt: skip
            same = replace(before, data_name=documents.data_name) == documents
            if same and part.source in (None, source_fingerprint(documents.data_name)):
                return True
            raise ValueError(
                f"expected further documents for {run.folder}, got {documents.data_name}, which it was extracted from "
                "with other content or limits; put the further ones into a file of their own"
            )
    return False


def check_source(run: RunDir) -> None:
    """Raise a ValueError where the local data files of a run have changed."""
    for part in run.parts:
        name = part.settings.data_name
        if part.source and source_fingerprint(name) not in (part.source, None):  # None: moved away, and not needed
            raise ValueError(
                f"expected {name} as it was when {run.folder} was begun, got other files; use another --log_dir"
            )


def check_disk(run: RunDir) -> None:
    """Raise a ValueError where a run's gradients don't fit on the disk."""
    sizes = run.shard_sizes(run.examples)
    need = run.examples * sizes["bytes_per_example"] + len(run.shards) * sizes["factor_bytes_per_shard"]
    need -= sum(file.stat().st_size for file in (run.folder / "gradients").glob("*") if file.suffix != ".tmp")
    free = shutil.disk_usage(run.folder).free
    if need > free:
        raise ValueError(
            f"expected {need / 1e9:.3g} GB of free disk for the gradients, got {free / 1e9:.3g}; use a lower "
            "--rank, --store_dtype int1 (or none) or another --log_dir"
        )


def check_hessian_memory(run: RunDir, kind: str) -> int:
    """Return an upper bound of the bytes that a process needs for a Hessian, or raise a ValueError."""
    return check_memory(hessian.memory_bytes(kind, run.projected, run.examples), f"the Hessian {kind} of a layer")


def write_train(
    run: RunDir,
    tokenizer: PreTrainedTokenizerBase,
    further: DataSettings | None,
    cache_dir: str | None,
    num_proc: int | None,
) -> None:
    """Write run.json, tokenise into train/, then enter the counts in run.json; on one rank.

    Args:
        run: A new run; with `further`, one that is there.
        further: Documents to add to it (--extend), in a folder of their own.
        cache_dir, num_proc: See load_documents, build_examples.

    Raises:
        ValueError: Documents that can't be read, or that the run has already. Nothing of them is left on the disk.
    """
    settings = run.settings.with_data(further) if further else run.settings
    documents = load_documents(settings.data_name, settings.data_config, settings.data_split, cache_dir)
    row_form(documents.column_names, settings.text_column, settings.train_loss == "response")
    first_row = sum(part.rows for part in run.parts) if further else 0
    folder = run.train_folder(len(run.parts) if further else 0)
    made = folder if further else run.folder
    files.remove(made)
    try:
        if not further:
            run.save()
        counts = write_examples(folder, documents, tokenizer, settings, num_proc, first_row)
        if further:
            _check_new_documents(run, folder)
    except BaseException:
        files.remove(made)
        raise
    counts |= run.shard_sizes(counts["examples"])
    part = TrainPart(settings.data, source_fingerprint(settings.data_name), **counts)
    run.save(parts=(*run.parts, part) if further else (part,))
    if part.dropped_rows:
        progress.say(f"dropped {part.dropped_rows} rows without text")


def _check_new_documents(run: RunDir, folder: Path) -> None:
    if double := set(run.train()["document_id"][:]) & set(load_from_disk(folder)["document_id"][:]):
        raise ValueError(
            f"expected further documents, got {len(double)} that {run.folder} has already, e.g. "
            f"{min(double)}; leave them out, or give them other ids"
        )


def unfinished_shards(run: RunDir, accelerator: Accelerator) -> list[int]:
    """Return the shards that are missing or altered, on every rank; each rank checks its share."""
    if run.record.projections is None:
        return list(range(len(run.shards)))
    problems = {index: run.shard(index).problem() for index in processes.share(len(run.shards), accelerator)}
    for problem in filter(None, problems.values()):
        if not problem.endswith("is missing"):
            print(f"{problem}; computing it again", flush=True)
    return sorted(processes.gather_list([index for index, problem in problems.items() if problem], accelerator))


def write_shards(lm: nn.Module, run: RunDir, pending: list[int], execution: Execution, accelerator: Accelerator) -> int:
    """Compute and write this rank's share of the pending shards; a thread writes one while the next is computed.

    Returns:
        The tokens of all ranks.
    """
    examples, projections, dtype = run.train(), run.projections(), run.settings.store_dtype
    mine = [pending[i] for i in processes.share(len(pending), accelerator)]
    counts, bytes_written = token_counts(examples), []
    eigenvalues = {layer: (p.values_in, p.values_out) for layer, p in projections.items()}
    damping = hessian.default_damping("ekfac", dtype)
    bar = progress.bar(
        total=sum(int(counts[list(run.shards[index])].sum()) for index in mine), unit="tok", unit_scale=True,
        desc=f"extracting (1 of {accelerator.num_processes})",
    )  # fmt: skip

    def write(index: int, result: HostGradients) -> None:
        error = {"relative_score_error": round(result.error.result(), 4)} if result.error else {}
        shard = run.shard(index)
        shard.folder.mkdir(exist_ok=True)  # not its parents: the run's folder may have been removed
        grads, factors = result.wait()
        bytes_written.append(shard.write(grads, factors, **error))
        bar.set_postfix_str(f"{sum(bytes_written) / 1e9:.3g} GB written")

    capturing = GradientCapture(lm, projections, factors=True, squares_only=run.squares_only)
    with capturing as capture, bar, ThreadPoolExecutor(1) as writer:
        extractor = make_extractor(lm, capture, execution, run.settings.block_size, max(map(len, run.shards)))
        written: Future = Future()
        written.set_result(None)
        for index in mine:
            ids = run.shards[index]
            rows = examples[ids.start : ids.stop]
            error = ScoreErrorEstimate(eigenvalues, dtype, damping) if run.settings.bits else None
            result = extractor.gradients(rows["input_ids"], rows.get("counted"), ids.start, dtype, bar.update, error)
            written.result()
            written = writer.submit(write, index, result)
        extractor.finish()
        written.result()
    return sum(int(counts[list(run.shards[index])].sum()) for index in pending)


def write_hessian(kind: str, run: RunDir, accelerator: Accelerator) -> None:
    """Sum the Hessian's statistics over all shards, and write them, unless that has been done."""
    accelerator.wait_for_everyone()
    if kind == "none" or run.hessian_problem(kind) is None:
        return
    progress.say(f"Hessian {kind}: at most {check_hessian_memory(run, kind) / 1e6:,.0f} MB of memory a process")
    mine = processes.share(len(run.shards), accelerator)
    total = partial(processes.sum_over_ranks, accelerator=accelerator)
    tensors = progress.bar(
        hessian.statistics(kind, run, mine, total, run.settings.basis == "eigen", accelerator.device),
        total=len(run.hessian_layout(kind)), desc=f"Hessian {kind}", unit="tensor",
    )  # fmt: skip
    if accelerator.is_main_process:
        run.save_hessian(kind, tensors)
    else:
        for _ in tensors:
            pass
