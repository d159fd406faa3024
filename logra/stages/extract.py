"""Stage 2: write train examples, gradient shards and the Hessian. extract_log.py calls these steps in order."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import xxhash
from datasets import load_from_disk
from torch import nn
from transformers import PreTrainedTokenizerBase

from logra import hessian
from logra.hooks import GradientCapture
from logra.inputs.documents import load_documents, source_contents
from logra.inputs.examples import say_form, token_counts, write_examples
from logra.quantise import ScoreErrorEstimate
from logra.run_dir import RunDir, TrainPart
from logra.runtime import files, processes, progress
from logra.runtime.settings import DataSettings, Execution, default_damping
from logra.stages.gradients import HostGradients, make_extractor
from logra.store import Shard


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of a run's folder. Rank 0 holds a lock file beside it while any rank is in the block.

    Raises:
        ValueError: Another command works on this run.
    """
    lock = files.locked(folder.with_name(f"{folder.name}.lock"), str(folder))
    with lock if processes.state().is_main_process else nullcontext():
        processes.state().wait_for_everyone()
        yield
        processes.state().wait_for_everyone()


@processes.on_rank_0
def has_documents(run: RunDir, documents: DataSettings) -> bool:
    """Return whether the run already holds these documents (--extend).

    Raises:
        ValueError: It holds documents of the same name with other content or limits, or a file with the same content.
    """
    name, place = documents.data_name, (documents.data_config, documents.data_split)
    found = source_contents(documents)
    for part in run.parts:
        known, change = part.settings, _change(part, name, found)
        same_place = files.same_name(known.data_name, name) and (known.data_config, known.data_split) == place
        same_content = isinstance(part.source, dict) and change is None
        if not same_place and not same_content:
            continue
        if not same_place and Path(known.data_name).exists():
            change = f"it is a copy of {known.data_name}"
        elif replace(known, data_name=name) != documents:
            change = "with other limits"
        if change is None:
            return True
        raise ValueError(
            f"expected further documents for {run.folder}, got {name}, which it already holds ({change}); "
            "put further documents into a file of their own"
        )
    return False


def _change(part: TrainPart, name: str, found: dict[str, str] | None) -> str | None:
    """Return which file under a data set's name has other content than the run's documents; None if all are the same.

    Args:
        part: Documents of a run.
        name: A data set's.
        found: The contents of its files.
    """
    if part.source is None:
        return None
    if isinstance(part.source, dict):
        return files.changed_file(part.source, found or {})
    checksums = files.file_checksums(Path(name))  # an older version's run
    same = xxhash.xxh3_64_hexdigest(json.dumps(checksums).encode()) == part.source
    return None if same else "some file has other content"


@processes.on_rank_0
def check_data_files(run: RunDir) -> None:
    """Raise a ValueError if the local data files of a run have changed. Files that are gone are not needed again."""
    for part in run.parts:
        known = part.settings
        found = source_contents(known) if part.source else None
        if found and (change := _change(part, known.data_name, found)):
            raise ValueError(
                f"expected the data {known.data_name} as it was when {run.folder} was started, got other files "
                f"({change}); restore them, use another --log_dir, or start again with --overwrite"
            )


def check_disk(run: RunDir) -> None:
    """Raise a ValueError if the disk is too small for the run's gradients."""
    sizes = run.shard_sizes(run.examples)
    total = run.examples * sizes["bytes_per_example"] + len(run.shards) * sizes["factor_bytes_per_shard"]
    written = sum(file.stat().st_size for file in (run.folder / "gradients").glob("*") if file.suffix != ".tmp")
    free = shutil.disk_usage(run.folder).free
    if total - written > free:
        raise ValueError(
            f"expected {(total - written) / 1e9:.3g} GB of free disk for the gradients, got {free / 1e9:.3g}; use a "
            "lower --rank, --store_dtype int1 (or none) or another --log_dir"
        )


def check_hessian_memory(run: RunDir, kind: str) -> int:
    """Return an upper bound of the bytes that a process needs for a Hessian.

    Raises:
        ValueError: This machine lacks them.
    """
    needed = hessian.memory_bytes(kind, run.projected, run.examples)
    processes.check_memory(needed, f"the Hessian {kind} of a layer")
    return needed


def write_train(
    run: RunDir,
    tokenizer: PreTrainedTokenizerBase,
    further: DataSettings | None,
    cache_dir: str | None,
    num_proc: int | None,
) -> None:
    """Write run.json, tokenise documents into train/, and add their counts to run.json. Runs on one rank.

    Args:
        run: A new run; with `further`, an existing one.
        tokenizer: Of the run's model.
        further: Documents to add to the run (--extend); they get a folder of their own.
        cache_dir, num_proc: See load_documents and build_examples.

    Raises:
        ValueError: Documents can't be read, or the run already holds them. Nothing is left on the disk.
    """
    settings = run.settings.with_data(further) if further else run.settings
    source = source_contents(settings)  # first: a file that changes from now on is refused the next time
    documents = load_documents(settings, cache_dir)
    say_form(documents.column_names, settings)
    train_folder = run.train_folder(len(run.parts))
    created = train_folder if further else run.folder
    files.remove(created)
    try:
        if not further:
            run.save()
        first_row = sum(part.rows for part in run.parts)
        counts = write_examples(train_folder, documents, tokenizer, settings, num_proc, first_row)
        if further:
            _check_new_documents(run, train_folder)
    except BaseException:
        files.remove(created)
        raise
    counts |= run.shard_sizes(counts["examples"])
    part = TrainPart(settings.data, source, **counts)
    run.save(parts=(*run.parts, part))
    if part.dropped_rows:
        progress.say(f"dropped {part.dropped_rows} rows without text")


def share_train(run: RunDir, source: RunDir) -> RunDir:
    """Give a run the examples that it lacks and another checkpoint's run has: the same files. Runs on one rank.

    Returns:
        The run with them.
    """
    first, missing = len(run.parts), source.parts[len(run.parts) :]
    if not missing:
        return run
    if first == 0:
        files.remove(run.folder)
        run.save()
    else:
        progress.say(f"{run.folder} gets the further documents of {source.folder}")
    for number in range(first, len(source.parts)):
        files.link_files(source.train_folder(number), run.train_folder(number))
    run.save(parts=(*run.parts, *missing))
    return RunDir.load(run.folder)


def _check_new_documents(run: RunDir, further: Path) -> None:
    """Raise a ValueError if the examples in a folder are of documents that the run holds."""
    if known := set(run.train()["document_id"][:]) & set(load_from_disk(further)["document_id"][:]):
        raise ValueError(
            f"expected further documents, got {len(known)} that {run.folder} already holds, e.g. {min(known)}; "
            "leave them out, or give them other ids"
        )


def unfinished_shards(run: RunDir) -> list[int]:
    """Return the shards that are missing or altered, on every rank. Each rank checks its share of the shards."""
    if run.record.projections is None:
        return list(range(len(run.shards)))
    problems = {index: run.shard(index).problem() for index in processes.share(len(run.shards))}
    for problem in filter(None, problems.values()):
        if not problem.endswith("is missing"):
            print(f"{problem}; computing it again", flush=True)
    return sorted(processes.gather_list([index for index, problem in problems.items() if problem]))


def write_shards(lm: nn.Module, run: RunDir, pending: list[int], execution: Execution) -> int:
    """Compute and write this rank's share of the pending shards. A thread writes one while the next is computed.

    Returns:
        The number of tokens in all pending shards.
    """
    examples, projections, store_dtype = run.train(), run.projections(), run.settings.store_dtype
    own_shards = [pending[i] for i in processes.share(len(pending))]
    lengths = token_counts(examples)
    tokens = {index: int(lengths[list(run.shards[index])].sum()) for index in pending}
    eigenvalues = {layer: (p.values_in, p.values_out) for layer, p in projections.items()}
    damping = default_damping("ekfac", store_dtype)
    own_tokens = sum(tokens[index] for index in own_shards)
    description = f"extracting (1 of {processes.state().num_processes})"
    bar = progress.bar(total=own_tokens, unit="tok", unit_scale=True, desc=description)
    capturing = GradientCapture(lm, projections, factors=True, squares_only=run.squares_only)
    with capturing as capture, bar, ThreadPoolExecutor(1) as writer:
        extractor = make_extractor(lm, capture, execution, run)
        bytes_written: Future[int] = Future()  # by all shards so far; the result comes when the last one is written
        bytes_written.set_result(0)
        for index in own_shards:
            ids = run.shards[index]
            rows = examples[ids.start : ids.stop]
            score_error = ScoreErrorEstimate(eigenvalues, store_dtype, damping) if run.settings.bits else None
            gradients = extractor.gradients(
                rows["input_ids"], rows.get("counted"), ids.start, store_dtype, bar.update, score_error
            )
            bytes_written = writer.submit(_write_shard, run.shard(index), gradients, bytes_written.result(), bar)
        extractor.finish()
        bytes_written.result()
    return sum(tokens.values())


def _write_shard(shard: Shard, gradients: HostGradients, bytes_before: int, bar: progress.tqdm) -> int:
    """Write one shard; show on the bar, and return, the bytes of this and all earlier shards."""
    grads, factors = gradients.wait()
    error = gradients.score_error
    entries = {"relative_score_error": round(error.result(), 4)} if error else {}
    bytes_written = bytes_before + shard.write(grads, factors, **entries)
    bar.set_postfix_str(f"{bytes_written / 1e9:.3g} GB written")
    return bytes_written


def write_hessian(kind: str, run: RunDir) -> None:
    """Sum the Hessian's statistics over all shards and write them, unless a whole Hessian of this kind exists."""
    processes.state().wait_for_everyone()
    if kind == "none" or processes.on_rank_0(run.hessian_problem)(kind) is None:
        return
    progress.say(f"Hessian {kind}: at most {check_hessian_memory(run, kind) / 1e6:,.0f} MB of memory per process")
    own_shards, device = processes.share(len(run.shards)), processes.state().device
    in_eigenbasis = run.settings.basis == "eigen"
    sums = hessian.statistics(kind, run, own_shards, processes.sum_over_ranks, in_eigenbasis, device)
    tensors = progress.bar(sums, total=len(run.hessian_layout(kind)), desc=f"Hessian {kind}", unit="tensor")
    if processes.state().is_main_process:
        run.save_hessian(kind, tensors)
    else:
        for _ in tensors:  # takes part in the sums
            pass


def say_finished(run: RunDir, kind: str) -> None:
    """Print what a run holds."""
    documents = sum(part.documents for part in run.parts)
    progress.say(f"{run.examples} examples of {documents} documents, Hessian {kind}, in {run.folder}")
