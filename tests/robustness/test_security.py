"""Models, data and runs from someone else: no code of theirs runs unless it is asked for, and no file of theirs ends
in a traceback, a hang, or a write outside of the run's folder."""

import ast
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROOT, edit_json, save_model, vouch, write_jsonl
from helpers import refused

from logra.models.model import fingerprint, load_model
from logra.runtime import files
from logra.runtime.files import short_name
from logra.runtime.settings import RUN_FIELDS, RunSettings
from logra.stages.open_run import run_name

SCRIPTS = ("generate", "generate_llama3", "extract_log", "compute_influence", "analysis")

QUERY = ("--log_dir", "log", "--split", "queries.jsonl")


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file, nested ones by a__b, as someone would who knows the format."""

    def change(content: dict) -> None:
        for key, value in changes.items():
            place, *names = [content, *key.split("__")]
            for name in names[:-1]:
                place = place[name]
            place[names[-1]] = value

    edit_json(path, change)


def edit_header(path: Path, change) -> None:
    """Change the header of a file of tensors."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text = len(text).to_bytes(8, "little") + text
    path.write_bytes(text + data[8 + size :])


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A folder with a run, its scores (--layerwise) and what they are made of."""
    from conftest import make_texts, run_cli

    root, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(root)
    try:
        write_jsonl(Path("docs.jsonl"), [{"id": f"doc{i}", "text": text} for i, text in enumerate(make_texts(6))])
        write_jsonl(Path("queries.jsonl"), [{"id": "a", "text": "the river ran"}, {"id": "b", "text": "the old mill"}])
        flags = ("--model_name", tiny / "llama", "--data_name", "docs.jsonl", "--log_dir", "log", "--rank", 4)
        assert run_cli("extract_log", *flags, "--hessian", "ekfac", "--shard_examples", 3) == 0
        assert run_cli("compute_influence", *QUERY, "--layerwise", "--mode", "cosine") == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the finished run, in the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("log")


def refused_by(cli, *scripts: str) -> None:
    """Assert that each script says in one line what is wrong."""
    flags = {"compute_influence": QUERY, "analysis": ("--log_dir", "log"), "extract_log": ("--log_dir", "log")}
    for script in scripts:
        refused(cli(script, *flags[script]), "expected")


CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A model's folder that holds code, as on the Hub, and the file that the code writes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder, marker = save_model(tmp_path / "mine", "llama"), tmp_path / "code-ran"
    classes = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit(folder / "config.json", model_type="mine", auto_map=classes, architectures=["MineForCausalLM"])
    (folder / "modeling_mine.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def test_code_of_a_model_runs_only_when_asked_for(cli, workspace, own_code):
    """Each stage that loads the model refuses it in one line; with the flag all work. A run can't ask for it."""
    folder, marker = own_code
    Path("p.txt").write_text("the river\n")
    model = ("--model_name", folder)
    extract = ("extract_log", *model, "--data_name", "docs.jsonl", "--log_dir", "log", "--rank", 4)
    stages = [
        ("generate", *model, "--prompts", "p.txt", "--max_new_tokens", 2),
        (*extract, "--dry_run"),
        (*extract, "--verify", 1),
        extract,
        ("compute_influence", *QUERY),
        ("analysis", "--log_dir", "log", "--tokens"),
    ]
    for stage in stages:
        refused(cli(*stage), "--trust_remote_code", "mine")
        assert not marker.exists(), stage[0]
        status, _, err = cli(*stage, "--trust_remote_code")
        assert status == 0, err
        marker.unlink(missing_ok=True)
        forget_code()
    assert json.loads(Path("log/run.json").read_text())["arguments"]["trust_remote_code"] is True
    assert "trust_remote_code" not in RUN_FIELDS


def forget_code() -> None:
    """Let code that was imported be imported again."""
    import sys

    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_pickled_weights_run_nothing(tiny, tmp_path, kind):
    """A .bin that holds more than tensors is refused; one of tensors alone is read (of a model; adapters have none)."""
    folder, marker = tmp_path / "m", tmp_path / "code-ran"
    if kind == "model":
        shutil.copytree(tiny / "llama", folder)
        weights = folder / "pytorch_model.bin"
        torch.save(load_model(str(folder), torch.float32).state_dict(), weights)
        next(folder.glob("*.safetensors")).unlink()
    else:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        tuned = peft.get_peft_model(load_model(str(tiny / "llama"), torch.float32), config)
        tuned.save_pretrained(folder, safe_serialization=False)
        weights = folder / "adapter_model.bin"
    if kind == "model":
        assert fingerprint(load_model(str(folder), torch.float32)) == fingerprint(
            load_model(str(tiny / "llama"), torch.float32)
        )
    torch.save(torch.load(weights) | {"evil": Evil(marker)}, weights)
    with pytest.raises(ValueError, match="can't be loaded"):
        load_model(str(folder), torch.float32)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists(), "the trap works"


def test_data_run_nothing(cli, tiny, workspace):
    """A loading script beside the data, and pickled data, are not run."""
    marker = Path("code-ran").absolute()
    Path("set").mkdir()
    Path("set/set.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    Path("set/train.pkl").write_bytes(pickle.dumps(Evil(marker)))
    flags = ("--model_name", tiny / "llama", "--log_dir", "log", "--data_name")
    for name in ("set", "set/train.pkl", "set/set.py"):
        refused(cli("extract_log", *flags, name), name)
    assert not marker.exists()


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch) -> list[str]:
    """A cache of the Hub, as huggingface_hub lays it out, with two commits of org/name; main is the first."""
    commits = ["a" * 40, "b" * 40]
    root = tmp_path / "hub/models--org--name"
    for commit, name in zip(commits, ("llama", "llama_tied"), strict=True):
        shutil.copytree(tiny / name, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(commits[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return commits


def test_a_revision_is_pinned(cli, tiny, workspace, hub):
    """--revision chooses the commit, is kept in run.json, holds for later stages, and can't be another one there."""
    flags = ("--model_name", "org/name", "--data_name", "docs.jsonl", "--rank", 4, "--log_dir")
    prints = [fingerprint(load_model(str(tiny / name), torch.float32)) for name in ("llama", "llama_tied")]
    for folder, given, expected in (("newest", (), 0), ("log", ("--revision", hub[1]), 1)):
        assert cli("extract_log", *flags, folder, *given)[0] == 0
        content = json.loads(Path(folder, "run.json").read_text())
        assert content["model"]["fingerprint"] == prints[expected]
        assert content["settings"]["revision"] == (given or (None, None))[1]
    for given in ((), ("--revision", hub[1])):
        assert cli("compute_influence", *QUERY, *given)[0] == 0
    refused(cli("compute_influence", *QUERY, "--revision", hub[0]), "--revision", hub[1], "run.json")
    assert cli("analysis", "--log_dir", "log", "--tokens")[0] == 0
    refused(cli("extract_log", *flags, "other", "--revision", "c" * 40), "org/name")
    Path("p.txt").write_text("the river\n")
    generate = ("generate", "--model_name", "org/name", "--prompts", "p.txt", "--max_new_tokens", 2)
    assert cli(*generate, "--revision", hub[1])[0] == 0
    row = json.loads(Path("data/generated/name/queries.jsonl").read_text())
    assert row["settings"]["revision"] == hub[1] and row["settings"]["trust_remote_code"] is False


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": []},
        {"settings": {}},
        {"settings__dtype": None},
        {"settings__dtype": "float8"},
        {"settings__block_size": -5},
        {"settings__block_size": "64"},
        {"settings__mlp_only": "yes"},
        {"settings__layers": "("},
        {"settings__model_name": 5},
        {"settings__max_tokens": 1e400},
        {"arguments": None},
        {"arguments__hessian": "../../x"},
        {"model": "llama"},
        {"versions": []},
        {"layers": {}},
        {"layers": {"model.layers.0.mlp.up_proj": [40, 24, 4]}},
        {"layers": {"model.layers.0.mlp.up_proj": [40, 24, -4, 4]}},
        {"layers": {"model.layers.0.mlp.up_proj": [2**70, 24, 4, 4]}},
        {"layers": {"no.such.layer": [40, 24, 4, 4]}},
        {"layers": {"model.layers.0.mlp.up_proj": [2**40, 2**40, 2**40, 2**40]}},
        {"data": []},
        {"data__examples": -6},
        {"data__examples": 2**60},
        {"data__examples": 2**40},
        {"data__examples": 5},
        {"data__examples": 6.0},
        {"data__shard_examples": 0},
        {"data__fingerprint": None},
        {"extensions": 3},
        {"extensions": [{}]},
        {"projections": ["many", 3]},
        {"format": [3]},
    ],
    ids=str,
)
def test_run_json_of_someone_else(cli, run, changes):
    """Wrong types, sizes, counts and names in run.json."""
    edit(run / "run.json", **changes)
    refused_by(cli, "compute_influence")
    if changes.keys() & {"data", "settings", "model", "format"}:
        refused_by(cli, "analysis", "extract_log")


@pytest.mark.parametrize("text", [DEEP, '{"a":' + DEEP + "}", "9" * 5000, "\xff", "[]", "", "\0"], ids=lambda t: t[:6])
@pytest.mark.parametrize("name", ["run.json", "hessian/ekfac.json", "gradients/00000.json"])
def test_json_that_is_none(cli, run, name, text):
    """Nested without end, huge numbers, other encodings, nothing."""
    (run / name).write_text(text, encoding="latin-1")
    refused_by(cli, "compute_influence")
    if name == "run.json":
        shutil.copy(run / name, next(run.glob("scores/*/run.json")))
        refused_by(cli, "analysis")


def grow(header: dict) -> None:
    next(iter(header.values()))["shape"] = [2**47, 2**47, 2**47]


def past_the_end(header: dict) -> None:
    tensor = next(iter(header.values()))
    tensor["data_offsets"] = [offset + 2**40 for offset in tensor["data_offsets"]]


def negative(header: dict) -> None:
    tensor = next(iter(header.values()))
    tensor["shape"], tensor["data_offsets"] = [-side for side in tensor["shape"]], [-64, 0]


def other_type(header: dict) -> None:
    next(iter(header.values()))["dtype"] = "OBJ"


def other_names(header: dict) -> None:
    header["../../x"] = header.pop(next(iter(header)))


def turned(header: dict) -> None:
    tensor = next(tensor for tensor in header.values() if len(tensor["shape"]) > 0)
    tensor["shape"] = [*tensor["shape"], 1]


def no_object(header: dict) -> None:
    header[next(iter(header))] = 7


@pytest.mark.parametrize("change", [grow, past_the_end, negative, other_type, other_names, turned, no_object])
@pytest.mark.parametrize("kind", ["gradients", "factors", "hessian", "projections"])
def test_tensors_of_someone_else(cli, run, kind, change):
    """Headers whose offsets, shapes, types or names are wrong."""
    path = {
        "gradients": "gradients/00000.safetensors",
        "factors": "gradients/00000.factors.safetensors",
        "hessian": "hessian/ekfac.safetensors",
        "projections": "projections.safetensors",
    }[kind]
    edit_header(run / path, change)
    if kind != "factors":
        refused_by(cli, "compute_influence")
        return
    status, out, err = cli("extract_log", "--log_dir", "log", "--hessian", "kfac")
    assert status == 0 and "00000.factors.safetensors was altered" in out, err


def test_a_header_that_is_larger_than_the_file(cli, run):
    """Its length is refused before it is read, in a sparse file too."""
    path = run / "projections.safetensors"
    with open(path, "r+b") as file:
        file.write((2**63).to_bytes(8, "little"))
    refused_by(cli, "compute_influence")
    with open(path, "r+b") as file:
        file.write((2**39).to_bytes(8, "little"))
        file.truncate(2**40)
    refused_by(cli, "compute_influence")


@pytest.mark.parametrize(
    "name", ["log.txt", "run.json", "gradients/00000.safetensors", "train/state.json", "scores/x", "hessian/raw.json"]
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_no_links_and_no_pipes(cli, run, name, kind):
    """A link would lead writing or reading out of the folder; a pipe would be waited for."""
    outside, path = Path("outside"), run / name
    outside.write_text("important")
    path.unlink(missing_ok=True)
    path.symlink_to(outside.absolute()) if kind == "link" else os.mkfifo(path)
    refused_by(cli, "compute_influence", "analysis")
    assert outside.read_text() == "important"


def test_a_run_behind_a_link(cli, run):
    """logs/, or the run's folder itself, may be a link."""
    Path("disk").mkdir()
    run.rename("disk/log")
    Path("log").symlink_to("disk/log")
    Path("logs").symlink_to("disk")
    for folder in ("log", "logs/log"):
        assert cli("compute_influence", "--log_dir", folder, "--split", "queries.jsonl")[0] == 0
    assert cli("analysis")[0] == 0 and Path("log").is_symlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"log": {}},
        {"log__settings": 1},
        {"mode": "<b>"},
        {"hessian": "../raw"},
        {"layers": []},
        {"layers": ["no.such.layer"]},
        {"num_queries": -1},
        {"num_examples": 3},
        {"group_by": 3},
        {"damping": "0.1"},
        {"top_k_only": 0},
        {"top_k_only": 2},
        {"blocks": 4},
        {"blocks": ["a", "b", "c"]},
        {"split": None},
    ],
    ids=str,
)
def test_scores_of_someone_else(cli, run, changes):
    """Wrong types, sizes and names in the run.json of scores; --tokens reads the most of it."""
    edit(next(run.glob("scores/*/run.json")), **changes)
    refused(cli("analysis", "--log_dir", "log", "--tokens", "--diagnose"), "expected", "log")


def test_nested_arguments_of_someone_else(cli, run):
    """Python's recursion ends earlier than the JSON reader's: what a run was started with is copied, not walked."""
    nested: list = []
    for _ in range(600):
        nested = [nested]
    edit(run / "run.json", arguments__nested=nested)
    assert cli("compute_influence", *QUERY)[0] == 0


@pytest.mark.parametrize("name", ["scores.npy", "layer_scores.npy"])
def test_matrices_of_someone_else(cli, run, name):
    """A pickled object is not loaded; neither is a matrix of another size or type, or a file of another kind."""
    path, marker = next(run.glob("scores/*")) / name, Path("code-ran").absolute()
    shape = np.load(path).shape
    for content in (np.array([Evil(marker)], dtype=object), np.zeros((1, *shape), np.float32), np.zeros(shape)):
        np.save(path, content, allow_pickle=True)
        vouch(path.parent)
        refused_by(cli, "analysis")
    for content in (b"", b"\x93NUMPY\x01\x00\xff\xff{", pickle.dumps(Evil(marker))):
        path.write_bytes(content)
        vouch(path.parent)
        refused_by(cli, "analysis")
    assert not marker.exists()


@pytest.mark.parametrize("line", ['{"id": 5}', "7", DEEP, '{"id": "a", "text": 1', "{}"], ids=lambda line: line[:8])
def test_queries_of_someone_else(cli, run, line):
    """Rows that are none, in the scores' folder and in a file of queries."""
    path = next(run.glob("scores/*/queries.jsonl"))
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], line]))
    vouch(path.parent)
    refused_by(cli, "analysis")
    Path("queries.jsonl").write_text(line)
    refused(cli("compute_influence", *QUERY), "queries.jsonl")
    Path("p.jsonl").write_text(line)
    refused(cli("generate", "--prompts", "p.jsonl"), "p.jsonl")


def test_examples_of_someone_else(cli, run, tmp_path):
    """train/ with texts outside of their buffer, with other columns or names of files, or without its files."""
    path = next((run / "train").glob("*.arrow"))
    whole, table = path.read_bytes(), datasets.load_from_disk(run / "train").data.table
    offsets = np.frombuffer(table["text"].chunk(0).buffers()[1], np.int32)[: len(table) + 1]
    assert whole.count(offsets.tobytes()) == 1
    path.write_bytes(whole.replace(offsets.tobytes(), (offsets * 2**20).tobytes()))
    refused_by(cli, "analysis")
    numbers, nothing = pa.array(range(len(table))), pa.nulls(len(table), pa.string())
    for name, column in (("text", numbers), ("document_id", nothing)):
        other = table.set_column(table.column_names.index(name), name, column)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, other.schema) as writer:
            writer.write_table(other)
        edit(run / "run.json", data__files=files.file_checksums(run / "train"))
        refused_by(cli, "analysis")
    path.write_bytes(whole)
    for name in ("../../other/data.arrow", str(tmp_path / "no.arrow"), "/dev/null"):
        edit(run / "train/state.json", _data_files=[{"filename": name}])
        edit(run / "run.json", data__files=files.file_checksums(run / "train"))
        refused_by(cli, "analysis")
    shutil.rmtree(run / "train")
    refused_by(cli, "analysis", "compute_influence")


def test_names_of_models_and_data_stay_in_their_folder():
    """Whatever --model_name and --data_name hold, a folder of that name is one below logs/."""
    for name in ("../../etc", "a/../..", "/", "..", "a\0b", "x;rm -rf ~", "$(id)", "<b>", "a\nb", "-x"):
        for found in (short_name(name), run_name(RunSettings(model_name=name, data_name=name, basis="eigen"))):
            assert not set(found) & set("/\\\0\n;$<>() ~") and not found.startswith(".")


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_files_have_the_users_permissions(cli, tiny, workspace, umask):
    """With umask 077 nobody else reads a run; no file is ever writable by all."""
    before = os.umask(umask)
    try:
        flags = ("--model_name", tiny / "llama", "--data_name", "docs.jsonl", "--log_dir", "log", "--rank", 4)
        assert cli("extract_log", *flags)[0] == 0
        assert cli("compute_influence", *QUERY, "--mode", "l2")[0] == 0
        assert cli("compute_influence", *QUERY, "--top_k_only", 2)[0] == 0
        assert cli("analysis", "--log_dir", "log")[0] == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [Path("log"), *Path("log").rglob("*")]}
    assert len(modes) > 20 and not [path for path, mode in modes.items() if mode & umask]


def test_nothing_is_reported():
    """Telemetry is off before a package of the Hub can have read that; the scripts import none of them before logra."""
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"
    for script in SCRIPTS:
        modules = []
        for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        first = next(i for i, module in enumerate(modules) if module.split(".")[0] == "logra")
        before = {module.split(".")[0] for module in modules[:first]}
        assert not before & {"accelerate", "transformers", "datasets", "huggingface_hub", "peft"}
