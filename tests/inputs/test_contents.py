"""Data and model are known by their content, not by name and time."""

import json
import os
import shutil
from pathlib import Path

import pytest
import xxhash
from conftest import edit_json, make_texts, write_jsonl
from helpers import refused

from logra.run_dir import RunDir
from logra.runtime.files import changed_file, file_checksums, id_text, read_row


@pytest.fixture
def run(cli, tiny, workspace):
    """A finished run of a folder of data and a model folder, and its flags."""
    shutil.copytree(tiny / "llama", "model")
    for i, text in enumerate(make_texts(6)):
        write_jsonl(Path(f"data/part{i % 2}.jsonl"), [{"id": f"{i}", "text": text}])
    flags = ("--model_name", "model", "--data_name", "data", "--log_dir", "log", "--rank", 4)
    assert cli("extract_log", *flags)[0] == 0
    return flags


def edit_quietly(path: Path, old: bytes, new: bytes) -> None:
    """Change a file but neither its size nor its time."""
    times, content = path.stat(), path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_changed_data(cli, run):
    """Named by file, after the run is finished too; a new file and a missing one as well; --overwrite reads what is
    there now."""
    edit_quietly(Path("data/part1.jsonl"), b"the", b"THE")
    refused(cli("extract_log", *run), "part1.jsonl has other content", "--overwrite")
    assert cli("extract_log", *run, "--overwrite")[0] == 0
    assert any("THE" in text for text in RunDir.load(Path("log")).train()["text"])
    assert cli("extract_log", *run)[0] == 0
    Path("data/part0.jsonl").rename("part0.jsonl")
    refused(cli("extract_log", *run), "part0.jsonl is gone")
    Path("part0.jsonl").rename("data/part0.jsonl")
    write_jsonl(Path("data/part2.jsonl"), [{"id": "x", "text": "the river"}])
    refused(cli("extract_log", *run), "part2.jsonl is new")


def test_changed_models(cli, run):
    """One weight of a layer, or one word of the tokenizer: no sample of values, and no probe, could miss it."""
    path = Path("model/model.safetensors")
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    query = ("--log_dir", "log", "--split", "queries.jsonl")
    for command in (("extract_log", *run), ("compute_influence", *query)):
        refused(cli(*command), "model.safetensors has other content", "--overwrite")
    content[-40] ^= 1
    path.write_bytes(content)
    assert cli("compute_influence", *query)[0] == 0
    Path("model/chat_template.jinja").write_text("another")
    refused(cli("extract_log", *run), "chat_template.jinja")


def test_moved_data_and_models(cli, run):
    """The same files under another name are the same; others are not."""
    Path("elsewhere").mkdir()
    for name in ("model", "data"):
        shutil.move(name, f"elsewhere/{name}1")
    moved = ("--model_name", "elsewhere/model1", "--data_name", "elsewhere/data1", *run[4:])
    next(Path("log/gradients").glob("*.json")).unlink()  # so the model is needed
    status, out, err = cli("extract_log", *moved)
    assert status == 0 and "the same files as model" in out, err
    scores = ("compute_influence", *moved, "--split", "queries.jsonl")
    assert cli(*scores)[0] == 0
    edit_quietly(Path("elsewhere/data1/part1.jsonl"), b"the", b"THE")
    refused(cli("extract_log", *moved), "--data_name", "elsewhere/data1")
    edit_quietly(Path("elsewhere/data1/part1.jsonl"), b"THE", b"the")
    Path("elsewhere/model1/config.json").write_text("{}")
    refused(cli(*scores), "--model_name", "elsewhere/model1")


def test_a_run_of_an_older_version(cli, run):
    """It has one hash of all data files, and none of the model: changed data are refused, without the file's name."""
    source = xxhash.xxh3_64_hexdigest(json.dumps(file_checksums(Path("data"))).encode())
    edit_json(Path("log/run.json"), lambda about: about["data"].update(source=source) or about.pop("model_files"))
    assert cli("extract_log", *run)[0] == 0
    edit_quietly(Path("data/part1.jsonl"), b"the", b"THE")
    refused(cli("extract_log", *run), "some file has other content", "--overwrite")


def test_changed_file():
    """Names may differ, contents and their order may not."""
    known = {"a": "1", "b": "2"}
    assert changed_file(known, {"x": "1", "y": "2"}) is None
    assert changed_file(known, {"a": "1", "b": "3"}) == "b has other content"
    assert changed_file(known, {"a": "2", "b": "1"}) == "a has other content"
    assert changed_file(known, {"a": "1"}) == "b is gone"


def test_ids_of_queries_and_documents(cli, run):
    """As the files have them, in the folder of the scores and in top_k."""
    ids = ["18446744073709551615", "18446744073709551614", "1.0", "1e5", '"007"']
    lines = [f'{{"id": {value}, "text": "the river {n}"}}\n' for n, value in enumerate(ids)]
    Path("ids.jsonl").write_text("".join(lines))
    assert cli("extract_log", *run[:2], "--data_name", "ids.jsonl", "--log_dir", "ids")[0] == 0
    assert cli("compute_influence", "--log_dir", "ids", "--split", "ids.jsonl")[0] == 0
    assert cli("analysis", "--log_dir", "ids")[0] == 0
    expected = [value.strip('"') for value in ids]
    assert RunDir.load(Path("ids")).train()["document_id"] == expected
    (folder,) = Path("ids/scores").glob("ids-*")
    assert [json.loads(line)["id"] for line in open(folder / "queries.jsonl")] == expected
    rows = [json.loads(line) for line in open(folder / "top_k.jsonl")]
    assert {row["query"] for row in rows} == {row["document"] for row in rows} == set(expected)
    assert all(f"{value}" in (folder / "report.html").read_text() for value in expected)
    Path("bad.jsonl").write_text('{"id": true, "text": "the river"}\n')
    refused(cli("compute_influence", "--log_dir", "ids", "--split", "bad.jsonl"), "an id of the type bool")
    Path("prompts.jsonl").write_text('{"id": true, "prompt": "the river"}\n')
    refused(cli("generate", *run[:2], "--prompts", "prompts.jsonl"), "row 1", "a text or a number")
    assert id_text(read_row('{"id": -1.50E+03}')["id"]) == "-1.50E+03"


@pytest.mark.parametrize("name", ["x::y", "d[1]", "a b", "p%20"])
def test_runs_and_queries_in_odd_folders(cli, tiny, workspace, name):
    """All four stages read and write paths as they are given."""
    model = Path(shutil.copytree(tiny / "llama", f"{name}/model"))
    Path(name, "prompts*.jsonl").write_text('{"id": 1.50, "prompt": "the river"}\n')
    Path(name, "prompts1.jsonl").write_text('{"prompt": "another"}\n')
    queries = f"{name}/q[1].jsonl"
    flags = ("--prompts", f"{name}/prompts*.jsonl", "--max_new_tokens", 2, "--output", queries)
    assert cli("generate", "--model_name", model, *flags)[0] == 0
    shutil.move("docs.jsonl", f"{name}/docs*.jsonl")
    log = "log[1] é%20#*?"
    flags = ("--model_name", model, "--data_name", f"{name}/docs*.jsonl", "--log_dir", log, "--pack")
    status, _, err = cli("extract_log", *flags)
    assert status == 0, err
    refused(cli("extract_log", *flags[:4], "--log_dir", "log::1"), "--log_dir", "log::1")
    assert cli("compute_influence", "--log_dir", log, "--split", queries)[0] == 0
    assert cli("analysis", "--log_dir", log)[0] == 0
    (folder,) = Path(log, "scores").iterdir()
    assert json.loads((folder / "queries.jsonl").read_text())["id"] == "1.50"
