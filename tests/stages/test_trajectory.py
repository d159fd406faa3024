"""--checkpoints in stages 2 and 3: what is computed once, resumed, moved, extended and refused."""

import json
import math
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAJECTORY, edit_json, make_texts, make_tokenizer, save_model, write_jsonl
from helpers import close, hessian_tensors, refused, start, stored_gradients
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, trainer

from logra.models.model import changed_file, load_model, load_tokenizer, source_contents
from logra.run_dir import RunDir
from logra.runtime import files
from logra.runtime.flags import RunFlags
from logra.runtime.settings import DEFAULT_MODEL
from logra.stages import checkpoints, extract, open_run
from logra.stages.checkpoints import read_models

NAMES = ["checkpoint-5", "checkpoint-10", "checkpoint-15"]
SIGNS = (*TRAJECTORY, "--store_dtype", "int1")


@pytest.fixture
def place(trajectory, tmp_path, monkeypatch) -> Path:
    """A working directory with copies of what `trajectory` holds, parent/ as log/; the checkpoints are in out/."""
    for name in ("out", "docs.jsonl", "queries.jsonl"):
        (tmp_path / name).symlink_to(trajectory / name)
    shutil.copytree(trajectory / "parent", tmp_path / "log", ignore=shutil.ignore_patterns("scores", "self_influence"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(cli):
    """Return a function that runs stage 2 of checkpoints, by default all into log/."""

    def run(*flags, checkpoints=("out/*",), log="log", data="docs.jsonl"):
        return cli("extract_log", "--checkpoints", *checkpoints, "--data_name", data, "--log_dir", log, *flags)

    return run


@pytest.fixture
def score(cli):
    """Return a function that runs stage 3, by default of log/."""
    return lambda *flags, log="log": cli("compute_influence", "--log_dir", log, "--split", "queries.jsonl", *flags)


def done(result: tuple[int, str, str]) -> str:
    """Assert that a stage succeeded; return what it printed."""
    status, out, err = result
    assert status == 0, err
    return out


def combined(folder: Path = Path("log"), name: str = "scores.npy") -> np.ndarray:
    """Return the combined scores of the one folder of them."""
    return np.load(next((folder / "scores").glob(f"*/{name}")))


def same_signs(folder: Path, other: Path) -> None:
    """Assert that two whole runs have the same examples, signs (but for a few near 0) and Hessian."""
    one, two = RunDir.load(folder), RunDir.load(other)
    assert one.fingerprints == two.fingerprints and one.settings.seed == two.settings.seed
    assert not any(one.shard(i).problem() for i in range(len(one.shards)))
    expected, sums = stored_gradients(two), hessian_tensors(two, "ekfac")
    for layer, signs in stored_gradients(one).items():
        assert (signs != expected[layer]).float().mean() < 0.01
    for key, tensor in hessian_tensors(one, "ekfac").items():
        assert (tensor - sums[key]).double().norm() <= 1e-4 * sums[key].double().norm()


def scores_in(folder: Path) -> dict[str, str]:
    """Return the checksums of the combined scores and of each checkpoint's, without run.json."""
    found = files.file_checksums(folder)
    return {name: checksum for name, checksum in found.items() if "scores/" in name and not name.endswith("run.json")}


def times(folder: Path) -> dict[Path, int]:
    """Return when the shards and train examples of a run were written."""
    return {path: path.stat().st_mtime_ns for path in [*folder.glob("gradients/*"), *folder.glob("train*/*")]}


# ---- what the runs are
def test_runs_of_one_folder(trajectory):
    """In the training's order, with one setting and one copy of the examples, and projections of their own."""
    parent = trajectory / "parent"
    assert [*read_models(parent)] == NAMES
    runs = [RunDir.load(parent / name) for name in NAMES]
    assert len({run.settings.seed for run in runs}) == 3
    assert len({run.record.model["fingerprint"] for run in runs}) == 3
    assert {run.settings.store_dtype for run in runs} == {"int1"} and {run.examples for run in runs} == {24}
    tables = [next((parent / name / "train").glob("*.arrow")) for name in NAMES]
    assert all(table.samefile(tables[0]) for table in tables)


@pytest.mark.slow
def test_each_run_stands_alone(trajectory, place, cli, score):
    """A checkpoint's run is what one makes without --checkpoints; it can be resumed, scored and checked by itself."""
    log = Path("log/checkpoint-10")
    seed = RunDir.load(log).settings.seed
    flags = ("--model_name", "out/checkpoint-10", "--data_name", "docs.jsonl", *SIGNS, "--seed", seed)
    done(cli("extract_log", *flags, "--log_dir", "alone"))
    same_signs(log, Path("alone"))
    before = times(log)
    next(log.glob("gradients/00001.safetensors")).unlink()
    done(cli("extract_log", "--log_dir", log))
    assert sum(path.stat().st_mtime_ns != time for path, time in before.items()) <= 3
    done(score(log=log))
    done(score(log="alone"))
    done(score())
    own = next(Path("log/scores").glob("*/run.json"))
    part = json.loads(own.read_text())["checkpoints"][1]
    assert part["run"] == "checkpoint-10"
    scores = [
        np.load(next((folder / "scores").glob(f"{part['scores']}-*/scores.npy"))) for folder in (log, Path("alone"))
    ]
    assert close(*scores)
    assert "pass" in done(cli("extract_log", *flags, "--verify"))


# ---- two processes
QUERY = ("--log_dir", "two", "--split", "queries.jsonl")
# All stages in the same processes, which start once
ALL = """
import importlib, json, sys
from logra.runtime import processes
processes.start()
processes.start = lambda: None
for script, *flags in json.loads(sys.argv[1]):
    stage = importlib.import_module(script)
    stage.main(stage.build_parser().parse_args(flags))
processes.finish()
"""


def test_two_processes_give_what_one_gives(trajectory, place, score):
    """Stages 2 and 3, all scores, the top alone, and re-ranking (with a sharded model)."""
    stages = [
        ("extract_log", "--checkpoints", "out/*", "--data_name", "docs.jsonl", "--log_dir", "two", *map(str, SIGNS)),
        ("compute_influence", *QUERY, "--mode", "cosine", "--self_influence"),
        ("compute_influence", *QUERY, "--mode", "cosine", "--top_k_only", "5", "--rerank", "5", "--fsdp"),
    ]
    (place / "all.py").write_text(ALL)
    launch = "accelerate launch --num_processes 2 --num_machines 1 --multi_gpu all.py"
    ended = start(f"PYTHONPATH={ROOT} {launch} '{json.dumps(stages)}'", place)
    assert ended.returncode == 0, ended.stderr
    for name in NAMES:
        same_signs(Path("two", name), Path("log", name))
    done(score("--mode", "cosine", "--self_influence"))
    assert close(combined(Path("two")), combined())
    assert close(combined(Path("two"), "self_influence.npy"), combined(name="self_influence.npy"))
    full, kept = combined(Path("two")), load_file(next(Path("two/scores").glob("*/top.safetensors")))
    best = np.sort(full, axis=1)[:, ::-1][:, :5]
    assert np.allclose(kept["scores"], best, rtol=1e-4, atol=1e-5)
    assert np.allclose(kept["parts"].sum(0), kept["scores"], rtol=1e-4, atol=1e-5)
    done(score("--mode", "cosine", "--top_k_only", "5", "--rerank", "5"))
    again = [load_file(next(Path(log, "scores").glob("*/reranked.safetensors"))) for log in ("two", "log")]
    assert again[0].keys() == again[1].keys()
    assert all(np.allclose(again[0][name], again[1][name], rtol=1e-3, atol=1e-5) for name in again[0])
    assert not [*place.glob("two/**/*.tmp")], "nothing is left over"


# ---- killed
KILL = """
import importlib, os, signal, sys
from logra.runtime.flags import run_script
script, module, owner, name, count = sys.argv[1:6]
owner = importlib.import_module(module) if owner == "-" else getattr(importlib.import_module(module), owner)
original, calls = getattr(owner, name), []
def killed(*values, **options):
    calls.append(1)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*values, **options)
setattr(owner, name, killed)
sys.argv = [script, *sys.argv[6:]]
stage = importlib.import_module(script)
run_script(stage.main, stage.build_parser())
"""
KILLS = {  # when -> the stage, and which call is not reached
    "the first one is tokenised": ("extract_log", "logra.run_dir RunDir save 2", 0),
    "the second one gets its examples": ("extract_log", "logra.runtime.files - link_files 1", 1),
    "the second one is extracted": ("extract_log", "logra.store Shard write 7", 1),
    "the second one is scored": ("compute_influence", "logra.scoring.score_files ScoreFile close 2", 3),
    "scores are combined": ("compute_influence", "logra.scoring.combine - _check 1", 3),
}


@pytest.mark.parametrize(
    "when", [pytest.param(when, marks=() if "second one is extracted" in when else pytest.mark.slow) for when in KILLS]
)
def test_killed(trajectory, place, make, score, when):
    """After kill -9 the same command ends as an undisturbed one, and computes no finished run again."""
    stage, where, finished = KILLS[when]
    flags = ["--checkpoints", "out/*", "--data_name", "docs.jsonl", "--log_dir", "new", *map(str, SIGNS)]
    if stage == "compute_influence":
        shutil.copytree("log", "new")
        flags = ["--log_dir", "new", "--split", "queries.jsonl", *(["--top_k_only", "5"] if "close" in where else [])]
    arguments = " ".join(f"'{word}'" for word in (KILL, stage, *where.split(), *flags))
    ended = start(f"PYTHONPATH={ROOT} python -c {arguments}", place)
    assert ended.returncode in (-9, 137), ended.stderr
    before = [times(Path("new", name)) for name in NAMES[:finished]]
    assert len(before) == finished and all(before)
    if stage == "extract_log":
        done(make(*SIGNS, log="new"))
    else:
        done(score(*flags[4:], log="new"))
        done(score(*flags[4:]))
        found, expected = (scores_in(Path(name)) for name in ("new", "log"))
        assert found and found == expected, "the same bytes"
    for name, old in zip(NAMES, before, strict=False):
        assert times(Path("new", name)) == old
    for name in NAMES:
        same_signs(Path("new", name), Path("log", name))
    assert [*read_models(Path("new"))] == NAMES


# ---- what is computed again
@pytest.fixture
def tokenised(monkeypatch) -> list[Path]:
    """The folders whose examples are tokenised."""
    found: list[Path] = []
    write = extract.write_examples
    monkeypatch.setattr(
        extract, "write_examples", lambda folder, *values: (found.append(folder), write(folder, *values))[1]
    )
    return found


def forget(name: str) -> None:
    """Make log/ as it was before a checkpoint was added."""
    shutil.rmtree(Path("log", name))
    edit_json(Path("log/checkpoints.json"), lambda about: about["checkpoints"].pop(name))


@pytest.mark.parametrize(
    ("name", "added", "flags"),
    [
        ("checkpoint-15", ("out/*",), ("--data_name", "docs.jsonl", *SIGNS)),
        ("checkpoint-5", ("out/checkpoint-5",), ()),
    ],
)
def test_a_checkpoint_that_is_added_costs_only_itself(trajectory, place, cli, score, tokenised, name, added, flags):
    """All are named or the new one alone, with the other flags or without: it gets the settings of the others."""
    forget(name)
    before = [times(Path("log", other)) for other in NAMES if other != name]
    done(cli("extract_log", "--log_dir", "log", "--checkpoints", *added, *flags))
    assert not tokenised
    assert [times(Path("log", other)) for other in NAMES if other != name] == before
    same_signs(Path("log", name), trajectory / "parent" / name)
    assert {*read_models(Path("log"))} == {*NAMES}
    assert ([*read_models(Path("log"))] == NAMES) == ("out/*" in added), "the order of a command line that names all"
    run = RunDir.load(Path("log", name))
    next(run.folder.glob("gradients/00002.json")).unlink()
    done(score("--checkpoints", *(f"out/{other}" for other in NAMES if other != name), *flags))
    refused(score(), "intact shards", name)


def test_further_documents(place, make, cli, score, tokenised):
    """--extend of all tokenises once; of some, they first get what others have, so that all can become equal again."""
    for number, name in enumerate(("more", "third", "fourth")):
        texts = make_texts(4, seed=5 + number)
        write_jsonl(Path(f"{name}.jsonl"), [{"id": f"{name}{i}", "text": text} for i, text in enumerate(texts)])
    before = [times(Path("log", name)) for name in NAMES]
    extend = ("--extend", "--log_dir", "log")
    done(cli("extract_log", *extend, "--checkpoints", "out/*", "--data_name", "more.jsonl"))
    assert [str(path) for path in tokenised] == ["log/checkpoint-5/train-00001"]
    for name, old in zip(NAMES, before, strict=True):
        now = times(Path("log", name))
        assert len(now) > len(old) and {path: now[path] for path in old} == old
    assert "28 examples" in done(score())
    done(cli("extract_log", *extend, "--data_name", "more.jsonl"))  # the folder stands for all its runs
    assert len(tokenised) == 1
    done(cli("extract_log", *extend, "--checkpoints", "out/checkpoint-10", "--data_name", "third.jsonl"))
    refused(score(), "train examples", "checkpoint-10")
    done(cli("extract_log", *extend, "--checkpoints", "out/checkpoint-15", "--data_name", "fourth.jsonl"))
    documents = [part.settings.data_name for part in RunDir.load(Path("log/checkpoint-15")).parts]
    assert documents[1:] == ["more.jsonl", "third.jsonl", "fourth.jsonl"]
    for name in ("third.jsonl", "fourth.jsonl"):
        done(cli("extract_log", *extend, "--data_name", name))
    assert len(tokenised) == 3 and "x 3" in done(score())
    for name, last in (("checkpoint-10", "cold water"), ("checkpoint-15", "old stones")):
        write_jsonl(Path(f"{name}.jsonl"), [{"id": "last", "text": last}])
        done(cli("extract_log", "--extend", "--log_dir", f"log/{name}", "--data_name", f"{name}.jsonl"))
    write_jsonl(Path("new.jsonl"), [{"id": "new", "text": "past"}])
    refused(cli("extract_log", *extend, "--data_name", "new.jsonl"), "expected the documents of", "checkpoint-15")
    assert len(RunDir.load(Path("log/checkpoint-5")).parts) == 4, "found before the first one is changed"


@pytest.mark.slow
def test_overwrite(place, make, score, tokenised):
    """All runs are made anew, tokenised once; the combined scores go. Some alone must keep the others' settings."""
    done(score())
    before = [times(Path("log", name)) for name in NAMES]
    refused(make("--rank", 3, "--overwrite", checkpoints=("out/checkpoint-10",)), "--rank_in 4", "checkpoint-5")
    assert [times(Path("log", name)) for name in NAMES] == before and Path("log/scores").exists()
    done(make(*SIGNS, "--overwrite", checkpoints=("out/checkpoint-10",)))
    assert not tokenised and times(Path("log/checkpoint-5")) == before[0]
    assert times(Path("log/checkpoint-10")) != before[1] and not Path("log/scores").exists()
    done(make(*SIGNS, "--rank", 3, "--overwrite"))
    assert [str(path) for path in tokenised] == ["log/checkpoint-5/train"]
    assert {RunDir.load(Path("log", name)).settings.rank_in for name in NAMES} == {3}
    done(score())


# ---- moved
def test_moved_folders(trajectory, place, make, score):
    """The parent folder and the checkpoints may move; another checkpoint under the old name is refused."""
    shutil.copytree("out", "own")
    done(make(*SIGNS, checkpoints=("own/checkpoint-5", "own/checkpoint-10"), log="mine"))
    before = times(Path("mine/checkpoint-10"))
    Path("own").rename("elsewhere")
    Path("mine").rename("yours")
    before = {Path("yours", *path.parts[1:]): time for path, time in before.items()}
    there = ("elsewhere/checkpoint-5", "elsewhere/checkpoint-10")
    refused(score(log="yours"), "own/checkpoint-10")
    done(score("--checkpoints", *there, log="yours"))
    assert "the same files as own/checkpoint-5" in done(make(checkpoints=there, log="yours"))
    assert times(Path("yours/checkpoint-10")) == before
    done(score(log="yours"))
    assert read_models(Path("yours"))["checkpoint-5"]["model_name"] == "elsewhere/checkpoint-5"
    shutil.copy(trajectory / "out/checkpoint-15/model.safetensors", "elsewhere/checkpoint-5")
    refused(score(log="yours"), "--model_name own/checkpoint-5", "got elsewhere/checkpoint-5")
    Path("elsewhere").rename("again")
    refused(score("--checkpoints", "again/checkpoint-5", log="yours"), "--model_name", "again/checkpoint-5")


def test_commands_at_once(place, make, score):
    """A second command on a checkpoint's run, on checkpoints.json or on the combined scores waits for the first."""
    done(score("--checkpoints", "out/checkpoint-5"))
    label = next(Path("log/scores").glob("queries*")).name.removesuffix("-0.2")
    for lock, command in (
        ("checkpoint-10.lock", make), ("checkpoints.json.lock", make),
        (f"scores/{label}.lock", lambda: score("--checkpoints", "out/checkpoint-5")),
    ):  # fmt: skip
        with files.locked(Path("log", lock), "this test"):
            refused(command(), "at work there", lock)
    done(make())


# ---- names
def names_of(*given: str, known: dict | None = None, **flags) -> list[str]:
    """Return the folders of checkpoints, with those that checkpoints.json has."""
    shutil.rmtree("named", ignore_errors=True)
    if known:
        files.write_json(Path("named/checkpoints.json"), {"checkpoints": known})
    found = checkpoints.find(RunFlags(flags, None, "named", False, False, given), must_exist=False)[1]
    return [member.folder.name for member in found]


def test_names_of_the_folders(place, monkeypatch):
    """The checkpoint's name; after its parent's where that is taken; the same one for another spelling of its path."""
    for name in ("a/final", "b/final", "c/b/final", "a/scores", "steps/x-9", "steps/x-10", "steps/x-100"):
        Path(name).mkdir(parents=True)
    assert names_of("a/final", "b/final") == ["final", "b-final"]
    assert names_of("b/final", "a/final") == ["final", "a-final"]
    assert names_of("steps/*") == ["x-9", "x-10", "x-100"], "500 comes before 1000"
    assert names_of("steps/x-10/", "steps/x-9") == ["x-10", "x-9"]
    assert names_of("a/scores") == ["a-scores"], "scores/ holds scores"
    local = {"model_name": "b/final", "revision": None}
    assert names_of("a/final", f"{place}/b/final", known={"final": local}) == ["a-final", "final"]
    for other in ("./a/final", str(place / "a/final"), "a/../a/final"):
        with pytest.raises(ValueError, match="each checkpoint once"):
            names_of("a/final", other)
    Path("link").symlink_to("a/final")
    with pytest.raises(ValueError, match="each checkpoint once"):
        names_of("a/final", "link")
    with pytest.raises(ValueError, match="different names"):
        names_of("a/final", "b/final", "c/b/final")
    monkeypatch.chdir("a/final")
    assert names_of("../../b/final", ".") == ["final", "a-final"]
    assert names_of("..") == ["a"]


def test_names_of_revisions(place):
    """A revision is a folder's name; a slash in it does not make folders; one of another model gets that one's name."""
    assert names_of("step1", "refs/pr/1", model_name="org/name") == ["step1", "refs-pr-1"]
    assert names_of("a/final", "b/final", model_name="org/name") == ["a-final", "b-final"]
    known = {"step1": {"model_name": "org/other", "revision": "step1"}}
    assert names_of("step1", model_name="org/name", known=known) == ["name-step1"]
    with pytest.raises(ValueError, match="each checkpoint once"):
        names_of("step1", "step1", model_name="org/name")


def test_revisions_of_a_model_on_the_hub(trajectory, place, cli, score, monkeypatch):
    """Two revisions of one repository are two checkpoints, in stage 3 too; a third one is added by its name alone."""
    root = place / "hub/models--org--name"
    (root / "refs").mkdir(parents=True)
    for step, letter in zip(NAMES, "abc", strict=True):
        shutil.copytree(trajectory / "out" / step, root / "snapshots" / (letter * 40))
        (root / "refs" / step).write_text(letter * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    flags = ("--model_name", "org/name", "--data_name", "docs.jsonl", "--log_dir", "two", *SIGNS)
    done(cli("extract_log", *flags, "--checkpoints", *NAMES[:2]))
    done(score(log="two"))
    done(score("--model_name", "org/name", "--checkpoints", *NAMES[:2], log="two"))
    runs = [RunDir.load(Path("two", name)) for name in NAMES[:2]]
    assert [(run.settings.model_name, run.settings.revision) for run in runs] == [("org/name", n) for n in NAMES[:2]]
    expected = [RunDir.load(trajectory / "parent" / name).record.model for name in NAMES]
    assert [run.record.model for run in runs] == expected[:2]
    done(cli("extract_log", "--model_name", "org/name", "--log_dir", "two", "--checkpoints", NAMES[2]))
    assert RunDir.load(Path("two", NAMES[2])).record.model == expected[2]
    missing = cli("extract_log", *flags, "--checkpoints", *NAMES, "step9")
    refused(missing, "org/name")
    assert [*read_models(Path("two"))] == NAMES
    refused(score("--model_name", "org/other", log="two"), "org/other", "--checkpoints")
    refused(score("--revision", NAMES[0], log="two"), "without --revision")


# ---- refused
def other_tokenizer(folder: Path, like: Path) -> None:
    shutil.copytree(like, folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)


def other_layers(folder: Path, like: Path) -> None:
    save_model(folder, "gpt2")


def other_shapes(folder: Path, like: Path) -> None:
    shutil.copytree(like, folder)
    config = AutoModelForCausalLM.from_pretrained(like).config
    config.update({"intermediate_size": 44})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def no_tokenizer(folder: Path, like: Path) -> None:
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("tokenizer*"))


def short_context(folder: Path, like: Path) -> None:
    shutil.copytree(like, folder)
    edit = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 16}
    (folder / "config.json").write_text(json.dumps(edit))


def no_model(folder: Path, like: Path) -> None:
    folder.mkdir(parents=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_tokenizer, ("another tokenizer in odd/last", "checkpoint-5", "leave it out")),
        (other_layers, ("another layers", "odd/last")),
        (other_shapes, ("another layers", "odd/last")),
        (no_tokenizer, ("expected a tokenizer", "odd/last", "copy the tokenizer's files of the base model")),
        (short_context, ("--block_size of at most 16",)),
        (no_model, ("expected a model at odd/last", "none there")),
    ],
)
def test_checkpoints_that_do_not_fit(trajectory, place, make, spoil, words):
    """They are refused before the first checkpoint is computed, and nothing is left; one that is added, likewise."""
    spoil(place / "odd/last", trajectory / "out/checkpoint-15")
    refused(make(*SIGNS, checkpoints=("out/*", "odd/last"), log="new"), *words)
    assert not Path("new").exists()
    refused(make(checkpoints=("odd/last",)), *words)
    refused(make("--overwrite", checkpoints=("out/*", "odd/last")), *words)
    assert [*read_models(Path("log"))] == NAMES and not Path("log/last").exists()
    assert all(RunDir.load(Path("log", name)).parts for name in NAMES)


def test_a_model_that_cannot_run_without_its_weights(trajectory, place, make, monkeypatch):
    """It is compared when it is loaded; the runs before it are kept."""

    def fails(*_):
        raise RuntimeError("of FakeTensorMode")

    other_tokenizer(place / "odd/last", trajectory / "out/checkpoint-15")
    monkeypatch.setattr(open_run.FakeTensorMode, "__enter__", fails)
    result = make(*SIGNS, checkpoints=("out/checkpoint-5", "odd/last"), log="new")
    refused(result, "another tokenizer in odd/last", "new/checkpoint-5")
    same_signs(Path("new/checkpoint-5"), Path("log/checkpoint-5"))


@pytest.mark.parametrize(
    ("checkpoints", "flags", "words"),
    [
        (("out/checkpoint-5", "./out/checkpoint-5"), (), ("each checkpoint once", "./out/checkpoint-5")),
        (("out/checkpoint-5", "out/none"), (), ("local folders, or revisions", "out/none")),
        (("out/none-*",), (), ("local folders, or revisions", "out/none-*")),
        (("step1",), ("--model_name", "out/checkpoint-5"), ("local folders, or revisions", "step1")),
        (("out/*",), ("--revision", "main"), ("--revision",)),
        (("out/*",), ("--extend",), ("expected a run in new",)),
        (("out/*",), ("--block_size", 65), ("--block_size",)),
        (("out/*",), ("--store_dtype", "int1", "--hessian", "raw"), ("--hessian ekfac",)),
    ],
)
def test_command_lines_that_are_refused(place, make, checkpoints, flags, words):
    """In one line, before anything is written."""
    refused(make(*flags, checkpoints=checkpoints, log="new"), *words)
    assert not Path("new").exists()


def test_flags_that_differ(place, make, cli, score):
    """One setting and one data set for all; a folder that holds something else is left alone."""
    write_jsonl(Path("other.jsonl"), [{"text": "the dog"}])
    forget("checkpoint-15")
    refused(make(*SIGNS, data="other.jsonl"), "--data_name", "other.jsonl")
    refused(make(*SIGNS, "--rank", 5), "--rank_in 4", "got 5")
    refused(cli("extract_log", "--log_dir", "log"), "expected --checkpoints with log")
    refused(cli("extract_log", "--log_dir", "log", "--model_name", "out/checkpoint-5"), "--log_dir", "leave it out")
    refused(score("--model_name", "out/checkpoint-5"), "out/checkpoint-5", "leave it out")
    refused(make(log="log/checkpoint-5"), "log/checkpoint-5, got a run")
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    refused(make(log="full"), "full, got other files")
    assert [path.name for path in Path("full").iterdir()] == ["notes.txt"]
    refused(score(log="none"), "expected a run in none")
    refused(score("--checkpoints", "out/*", log="none"), "expected a run in none")
    refused(score("--checkpoints", "out/*"), "expected a run in log/checkpoint-15")
    done(cli("extract_log", "--model_name", "out/checkpoint-15", "--data_name", "docs.jsonl", *SIGNS, "--rank", 5,
             "--log_dir", "log/checkpoint-15"))  # fmt: skip
    refused(score("--checkpoints", "out/*"), "another layers", "checkpoint-15")
    shutil.rmtree("log/checkpoint-15")
    done(cli("extract_log", "--model_name", "out/checkpoint-15", "--data_name", "docs.jsonl", *SIGNS, "--hessian",
             "kfac", "--calibration_examples", 23, "--log_dir", "log/checkpoint-15"))  # fmt: skip
    refused(score("--checkpoints", "out/*"), "one setting of --calibration_examples, --hessian", "checkpoint-15")


def test_flags_of_stage_3(place, cli, score):
    """A weight for each; weights need checkpoints; the top alone needs stored gradients, also of one checkpoint."""
    refused(score("--checkpoint_weights", 1, 2), "each of 3 checkpoints", "got 2")
    refused(score("--checkpoint_weights", 1, 2, log="log/checkpoint-5"), "each of 0 checkpoints", "leave the flag out")
    flags = ("--data_name", "docs.jsonl", *TRAJECTORY, "--store_dtype", "none")
    done(cli("extract_log", "--checkpoints", "out/checkpoint-5", *flags, "--log_dir", "one"))
    refused(score("--top_k_only", 3, log="one"), "--top_k_only", "--store_dtype none")
    done(score(log="one"))
    assert combined(Path("one")).shape == (3, 24)


ENTRY = {"model_name": "out/checkpoint-5", "revision": None}


@pytest.mark.parametrize(
    "entries",
    [
        {"../out": ENTRY}, {"": ENTRY}, {"a/b": ENTRY}, {"..": ENTRY}, {}, [ENTRY], {"a": {"model_name": "x"}},
        {"a": ENTRY | {"revision": 1}}, {"a": ENTRY | {"trust_remote_code": True}}, {"a": ENTRY | {"rank_in": 2}},
    ],
)  # fmt: skip
def test_a_strange_checkpoints_json(place, make, score, entries):
    """Names that lead out of the folder, and entries that are not a model's, are refused."""
    edit_json(Path("log/checkpoints.json"), lambda about: about.update(checkpoints=entries))
    for result in (score(), make()):
        refused(result, "log/checkpoints.json")


def test_an_altered_checkpoints_json(place, make, score):
    """Its checksum is checked."""
    path = Path("log/checkpoints.json")
    path.write_text(path.read_text().replace("checkpoint-5", "checkpoint-6"))
    for result in (score(), make()):
        refused(result, "log/checkpoints.json", "other content")


# ---- what a Trainer writes
def test_files_of_a_trainer(trajectory, tmp_path):
    """Those that transformers does not read for the model do not identify it, in older runs either."""
    folder = shutil.copytree(trajectory / "out/checkpoint-5", tmp_path / "m")
    contents = source_contents(str(folder))
    own = [getattr(trainer, name) for name in ("OPTIMIZER_NAME", "OPTIMIZER_NAME_BIN", "SCHEDULER_NAME", "SCALER_NAME")]
    own += [trainer.TRAINING_ARGS_NAME, trainer.TRAINER_STATE_NAME, "rng_state.pth", "rng_state_3.pth"]
    for name in own:
        (folder / name).write_text(name)
    assert source_contents(str(folder)) == contents
    assert changed_file({"optimizer.pt": "1"} | contents, contents) is None
    (folder / "optimizer.py").touch()
    assert changed_file(contents, source_contents(str(folder))) == "optimizer.py is new"


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_a_checkpoint_without_a_tokenizer(tiny, tmp_path, name):
    """Of some models transformers makes an empty tokenizer, which turns each text into nothing; it is refused."""
    shutil.copytree(tiny / name, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match=r"expected a tokenizer .* copy the tokenizer's files of the base model"):
        load_tokenizer(str(tmp_path / "m"))
    make_tokenizer().save_pretrained(tmp_path / "m")
    assert load_tokenizer(str(tmp_path / "m"))("the river")["input_ids"]


# ---- a real model
@pytest.mark.slow
def test_four_stages_of_a_model_that_was_tuned_on_the_manual(tmp_path, monkeypatch, cli):
    """SmolLM2, three checkpoints of a few steps on pydoc: prompts, runs, scores, and lists with each one's part."""
    monkeypatch.chdir(ROOT)  # where the default model is converted once, in a fresh clone
    model, tokenizer = load_model(DEFAULT_MODEL, torch.bfloat16), load_tokenizer(DEFAULT_MODEL)
    monkeypatch.chdir(tmp_path)
    texts = [topics[name] for name in ("with", "lambda", "if", "class", "del", "pass")]
    tuned = [p for name, p in model.requires_grad_(False).named_parameters() if re.search(r"layers\.2[89]\.mlp", name)]
    steps = torch.optim.SGD([p.requires_grad_() for p in tuned], 1e-2)
    for number, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :64]
        model(input_ids=ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()
        if number % 2:
            model.save_pretrained(f"tuned/checkpoint-{number + 1}")
            tokenizer.save_pretrained(f"tuned/checkpoint-{number + 1}")
    Path("prompts.txt").write_text("What does the with statement do?\n")
    last = ("--model_name", "tuned/checkpoint-6", "--prompts", "prompts.txt", "--output", "queries.jsonl")
    done(cli("generate_llama3", *last, "--max_new_tokens", 8))
    flags = ("--preset", "best", "--layers", r"layers\.2[89]\.mlp", "--rank", 16, "--block_size", 64)
    data = ("--data_name", "pydoc", "--data_config", "short", "--max_examples", 32, "--log_dir", "log")
    done(cli("extract_log", "--checkpoints", "tuned/checkpoint-*", *data, *flags))
    done(cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", "--self_influence"))
    assert combined().shape == (1, 32) and np.isfinite(combined()).all() and combined().std() > 0
    names = [f"checkpoint-{step}" for step in (2, 4, 6)]
    assert [*read_models(Path("log"))] == names
    done(cli("analysis", "--log_dir", "log"))
    rows = [json.loads(line) for line in open(next(Path("log/scores").glob("*/top_k.jsonl")))]
    assert all([*row["checkpoints"]] == names for row in rows)
    assert all(math.isclose(sum(row["checkpoints"].values()), row["score"], rel_tol=1e-4) for row in rows)
    assert next(Path("log/scores").glob("*/report.html")).stat().st_size > 10_000
