"""Several checkpoints of one training (--checkpoints): an ordinary run of each, in one parent folder.

parent/checkpoints.json    {"checkpoints": {folder of a run: {"model_name", "revision"}}}, in the order of the training
       <checkpoint>/       the runs; their files in train/ are the same ones (hard links)
       scores/<label>/     combined scores (see scoring/combine.py)
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from torch import nn

from logra.run_dir import RunDir, RunRecord
from logra.runtime import files, processes, progress
from logra.runtime.flags import RunFlags
from logra.runtime.settings import DATA_FIELDS, Execution, RerankSettings, RunSettings
from logra.stages import open_run
from logra.stages.calibrate import make_fine_statistics
from logra.stages.fine_run import FineRun, at_checkpoint, choose_rank

REMEDY = "restore it, or extract to another --log_dir"


class Member(NamedTuple):
    """The run of one checkpoint: its folder, and the flags that select it."""

    folder: Path
    flags: RunFlags

    @property
    def model(self) -> dict[str, Any]:
        """The entry of checkpoints.json."""
        return {name: self.flags.user_flags[name] for name in ("model_name", "revision")}

    def settings(self, first: RunSettings) -> RunSettings:
        """Return the settings of the run. All but the model and the seed are those of the first checkpoint's run."""
        return open_run.with_own_settings(first, self.flags)


@processes.on_rank_0
def find(flags: RunFlags, must_exist: bool) -> tuple[Path | None, list[Member]]:
    """Return the parent folder and the runs that a command line names; without checkpoints no parent, and one run.

    Args:
        flags: Of the command line. Without --checkpoints a finished parent folder (--log_dir) stands for all its runs.
        must_exist: The runs must exist.

    Raises:
        ValueError: A checkpoint is neither a folder nor a revision, or comes twice; or --log_dir holds something else.
    """
    folder = open_run.find_folder(flags, must_exist)
    known = read_models(folder)
    if not flags.checkpoints and not known:
        return None, [Member(folder, flags)]
    if (folder / "run.json").exists():
        raise ValueError(f"expected a folder for checkpoints in {folder}, got a run; give another --log_dir")
    if not known:
        open_run.check_new_folder(folder, must_exist)
    _check_model_flags(flags, folder, known)
    if not flags.checkpoints and not must_exist:
        raise ValueError(
            f"expected --checkpoints with {folder}, which holds runs of several, got none; name them, or give the "
            "folder of one of the runs as --log_dir"
        )
    hub_name = flags.user_flags.get("model_name")
    asked = list(_models(flags.checkpoints, hub_name)) if flags.checkpoints else list(known.values())
    members: dict[str, Member] = {}
    for entry in asked:
        name = _folder_name(entry, known | {name: member.model for name, member in members.items()})
        if name in members:
            raise ValueError(f"expected each checkpoint once, got {entry['model_name']} twice; leave one out")
        members[name] = Member(folder / name, _flags_of(flags, entry, folder / name))
    return folder, list(members.values())


def read_models(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of checkpoints.json, {folder of a run: {"model_name", "revision"}}; {} without the file.

    Raises:
        ValueError: The file was altered.
    """
    path = folder / "checkpoints.json"
    if not path.exists():
        return {}
    content = files.read_json(path, REMEDY).get("checkpoints")
    shape = {"model_name": str, "revision": str | None}
    entries = [*content.values()] if files.has_shape(content, dict) else []
    if not entries or not files.has_shape(entries, [shape]) or any(entry.keys() != shape.keys() for entry in entries):
        raise ValueError(f"expected checkpoints in {path}, got other entries; {REMEDY}")
    if any(files.short_name(name) != name for name in content):
        raise ValueError(f"expected names of folders in {path}, got others; {REMEDY}")
    return content


def _models(checkpoints: Sequence[str], hub_name: str | None) -> Iterator[dict[str, Any]]:
    """Yield the model and the revision of each of --checkpoints. A local path has priority over a revision."""
    for name in checkpoints:
        matches = [name] if Path(name).exists() else sorted(glob.glob(name), key=_natural_order)
        for match in matches:
            yield {"model_name": match, "revision": None}
        if not matches and (glob.has_magic(name) or hub_name is None or Path(hub_name).exists()):
            raise ValueError(
                f"expected checkpoints that are local folders, or revisions of a --model_name on the Hub, got {name}; "
                "correct it"
            )
        if not matches:
            yield {"model_name": hub_name, "revision": name}


def _check_model_flags(flags: RunFlags, folder: Path, known: dict[str, dict[str, Any]]) -> None:
    """Refuse --revision, and a --model_name that is not that of all checkpoints, where these stand for themselves."""
    name = flags.user_flags.get("model_name")
    if "revision" in flags.user_flags:
        raise ValueError("expected checkpoints without --revision, got both; name revisions after --checkpoints")
    if name and not flags.checkpoints and not all(files.same_name(name, known[key]["model_name"]) for key in known):
        raise ValueError(
            f"expected --checkpoints, or no --model_name, with {folder}, which holds runs of several checkpoints, got "
            f"{name}; leave it out, or give the folder of one of the runs as --log_dir"
        )


def _natural_order(path: str) -> list:
    """Sort checkpoint-500 before checkpoint-1000."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _folder_name(entry: dict[str, Any], taken: dict[str, dict[str, Any]]) -> str:
    """Return the name of a checkpoint's folder.

    It is that of the same checkpoint in `taken`; else the checkpoint's name or revision, which also finds one that
    was moved; or with the name of the folder or model that it is in, if that is taken.
    """
    for name, other in taken.items():
        if entry["revision"] == other["revision"] and files.same_name(entry["model_name"], other["model_name"]):
            return name
    path = Path(os.path.abspath(entry["model_name"]))
    own, group = path.name, path.parent.name
    if entry["revision"]:
        own, group = entry["revision"].replace("/", "-"), path.name
    names = [files.fitting(files.short_name(name)) for name in (own, f"{group}-{own}")]
    for name in reversed(names):
        if name in taken and not (entry["revision"] or taken[name]["revision"] or _exists(taken[name])):
            return name  # if this is another checkpoint of that name, open_run.check_flags refuses it
    for name in names:
        if name and name not in {*taken, "scores"}:
            return name
    raise ValueError(
        f"expected checkpoints whose folders have different names, got {own} in {group} and another; rename a folder"
    )


def rerank_views(settings: RerankSettings, runs: Sequence[RunDir], execution: Execution) -> list[FineRun]:
    """Return the views of all models that re-rank: of --rerank_checkpoints, or of the runs; none without --rerank.

    Raises:
        ValueError: A checkpoint is neither a folder nor a revision, comes twice or does not fit the run; or memory or
            disk are too small.
    """
    if not settings.rerank:
        return []
    run, rank = runs[-1], choose_rank(runs[-1].shapes, settings.rerank_rank)
    views = [FineRun(run, rank) for run in runs]
    if settings.rerank_checkpoints:
        named = _named_models(settings.rerank_checkpoints, run)
        views = [FineRun(at_checkpoint(run, **entry, model={}), rank, name) for name, entry in named.items()]
        for view in views:
            if described := processes.on_rank_0(open_run.describe_without_weights)(view.settings, execution):
                check_model(view, view.settings.model_name, described)
    for view in views:
        view.check_room()
    return views


def with_statistics(view: FineRun, lm: nn.Module | None, execution: Execution) -> tuple[FineRun, nn.Module]:
    """Return a view whose statistics of re-ranking exist, and its model, which is loaded and checked if it is None.

    Raises:
        ValueError: The model is another one; or as calibrate.make_fine_statistics.
    """
    if lm is None:
        lm, _, described = open_run.load_model(view.settings, execution)
        view = view if view.record.model else view.of_model(described["model"])
        view.check_model(described)
    make_fine_statistics(lm, view, execution)
    return view, lm


@processes.on_rank_0
def _named_models(names: Sequence[str], run: RunDir) -> dict[str, dict[str, Any]]:
    """Return model_name and revision of --rerank_checkpoints by a name for each; that of the run's own model is ""."""
    own = {"model_name": run.settings.model_name, "revision": run.settings.revision}
    taken, found = {"": own}, {}
    for entry in _models(names, run.settings.model_name):
        name = _folder_name(entry, taken)
        if name in found:
            raise ValueError(f"expected each checkpoint once, got {entry['model_name']} twice; leave one out")
        taken[name] = found[name] = entry
    return found


def _exists(entry: dict[str, Any]) -> bool:
    return Path(entry["model_name"]).exists()


def _flags_of(flags: RunFlags, entry: dict[str, Any], folder: Path) -> RunFlags:
    """Return the flags of one checkpoint's run: with its model, and with a seed of its own.

    Projections of other seeds have independent errors, which a mean over checkpoints reduces. A run that has begun
    keeps its seed.
    """
    begun = not flags.overwrite and (folder / "run.json").exists() and RunDir.load(folder).parts
    own = dict(entry)
    if "seed" in flags.user_flags or not begun:
        own["seed"] = xxhash.xxh32_intdigest(f"{flags.user_flags.get('seed', 0)}-{folder.name}".encode())
    return flags._replace(user_flags=flags.user_flags | own, log_dir=str(folder), checkpoints=())


@processes.on_rank_0
def prepare(folder: Path, members: Sequence[Member], execution: Execution) -> None:
    """Check that the checkpoints of a command line can be combined, and write them into checkpoints.json.

    They keep the order of the command line if it names all that are in the file; else new ones come last. With
    --overwrite the combined scores are deleted.

    Raises:
        ValueError: A checkpoint does not fit the others; this is found here, before the first one takes its hours.
    """
    with progress.silent():
        _check_members(folder, members, execution)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / "checkpoints.json.lock", f"{folder / 'checkpoints.json'}"):
        known, named = read_models(folder), {member.folder.name: member.model for member in members}
        found = named if named.keys() >= known.keys() else known | named
        if list(found.items()) != list(known.items()):
            files.write_json(folder / "checkpoints.json", {"checkpoints": found})
    if members[0].flags.overwrite:
        files.remove(folder / "scores")


def _check_members(folder: Path, members: Sequence[Member], execution: Execution) -> None:
    """Compare the flags and models of all checkpoints, those of new ones without their weights."""
    first = sibling(folder, members, 0)
    for member in members:
        run = open_run.find_run(member.folder, member.flags, must_exist=member.flags.extend)
        if run is None:
            settings = open_run.new_settings(member.flags, execution, first)
            described = open_run.describe_without_weights(settings, execution)
            if described is None:
                continue  # checked when it is loaded
            run = RunDir(member.folder, RunRecord(settings, {"hessian": member.flags.hessian}, **described))
        first = first or run
        parts = zip(run.fingerprints, first.fingerprints, strict=False)  # one of them may have further documents
        if member.flags.extend and any(own != other for own, other in parts):
            raise ValueError(
                f"expected the documents of {first.folder} in {run.folder}, got others; extract one of them again with "
                "--overwrite, or leave it out"
            )
        check_model(first, run.settings.model_name, vars(run.record))


@processes.on_rank_0
def sibling(parent: Path | None, members: Sequence[Member], number: int) -> RunDir | None:
    """Return a run of another checkpoint, whose settings and examples the run of members[number] shares; None at first.

    It is one that has most documents (--extend). With --overwrite, members that are still to be made anew do not count.
    """
    if parent is None:
        return None
    left_out = members[number:] if members[0].flags.overwrite else members[number : number + 1]
    names = [name for name in read_models(parent) if name not in [member.folder.name for member in left_out]]
    runs = [RunDir.load(parent / name) for name in names if (parent / name / "run.json").exists()]
    return max((run for run in runs if run.parts), key=lambda run: len(run.parts), default=None)


def check_model(first: RunDir, name: str, described: dict[str, Any]) -> None:
    """Refuse the model of a checkpoint whose scores can't be combined with those of another one's run.

    Args:
        first: The other one's run.
        name: Of the checkpoint, for the message.
        described: Its entries in run.json (see models.layers.describe), or just some of them.

    Raises:
        ValueError: It has another tokenizer or other layers.
    """
    for key in ("tokenizer", "layers"):
        if described[key] != getattr(first.record, key):
            raise ValueError(
                f"expected checkpoints of one training, got another {key} in {name} than in {first.folder}; leave it "
                "out, or make it a run of its own (--model_name)"
            )


@processes.on_rank_0
def check_runs(runs: Sequence[RunDir], top_k_only: int | None) -> None:
    """Check that the scores of checkpoints' runs can be combined.

    Raises:
        ValueError: They have other tokenizers, layers, examples or settings; or they store no gradients, and not all
            scores are kept.
    """
    first = runs[0]
    if top_k_only and first.settings.bits == 0:
        raise ValueError(
            "expected stored gradients for --top_k_only with checkpoints, whose shards are scored twice, got "
            "--store_dtype none; leave --top_k_only out"
        )
    for run in runs[1:]:
        check_model(first, str(run.folder), vars(run.record))
        settings = (asdict(first.settings), asdict(run.settings))
        names = [name for name in settings[0] if name not in (*open_run.OWN_SETTINGS, *DATA_FIELDS)]
        differing = [f"--{name}" for name in names if settings[0][name] != settings[1][name]]
        if run.fingerprints != first.fingerprints:
            differing.append("train examples")
        if run.first_hessian != first.first_hessian:
            differing.append("--hessian")
        if differing:
            raise ValueError(
                f"expected one setting of {', '.join(differing)} for all checkpoints, got others in {run.folder} than "
                f"in {first.folder}; extract one of them again with --overwrite, or leave it out"
            )


def weights(given: Sequence[float] | None, checkpoints: int) -> list[float]:
    """Return the weight of each checkpoint (--checkpoint_weights): 1, if none are given.

    Raises:
        ValueError: More or fewer are given.
    """
    if given and len(given) != checkpoints:
        raise ValueError(
            f"expected a weight for each of {checkpoints} checkpoints in --checkpoint_weights, got {len(given)}; give "
            "as many, or leave the flag out"
        )
    return list(given or [1.0] * checkpoints)
