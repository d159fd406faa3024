"""Every kind of data source."""

import datetime
import gzip
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from conftest import make_tokenizer, write_jsonl
from datasets import Dataset
from pyarrow import parquet

from logra.inputs import documents, file_rows
from logra.inputs.documents import load_documents
from logra.inputs.examples import build_examples
from logra.inputs.file_rows import values_of
from logra.runtime import progress
from logra.runtime.settings import DataSettings, RunSettings


def test_every_kind_of_source(tmp_path, monkeypatch):
    """One file of each kind, folders of files, folders saved by datasets, pydoc; a local path wins over a Hub name."""
    monkeypatch.chdir(tmp_path)
    texts = ["the river", "the mill"]
    table = Dataset.from_dict({"text": texts})
    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    (tmp_path / "a.json").write_text('[{"text": "the river"}, {"text": "the mill"}]')
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved_dict")
    for split in ("train", "test"):
        write_jsonl(tmp_path / "openwebtext" / f"{split}.jsonl", [{"text": t} for t in texts])
        (tmp_path / "wikitext").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "wikitext" / f"{split}.parquet")
    for name in ("a.jsonl", "a.json", "a.txt", "a.parquet", "saved", "saved_dict", "openwebtext", "wikitext"):
        assert load_documents(DataSettings(name, None, "train"), str(tmp_path / "cache"))["text"][:] == texts, name
    for name in ("saved_dict", "openwebtext"):
        assert len(load_documents(DataSettings(name, None, "test"), str(tmp_path / "cache"))) == 2
    for name, split in (("saved", "test"), ("openwebtext", "validation"), ("a.jsonl", "test"), ("pydoc", "test")):
        with pytest.raises(ValueError, match=name):
            load_documents(DataSettings(name, None, split), str(tmp_path / "cache"))
    for name in ("no/such-data", "missing.jsonl"):
        with pytest.raises(ValueError, match="can't be loaded"):
            load_documents(DataSettings(name, None, "train"), str(tmp_path / "cache"))
    whole, short = (load_documents(DataSettings("pydoc", config, "train")) for config in (None, "short"))
    assert {"with", "try"} <= set(short["id"]) < set(whole["id"])


def load(path, split="train", config=None, cache="cache"):
    """Return (id, text) of each row of a local path, as the examples would have them."""
    rows = load_documents(DataSettings(str(path), config, split), cache)
    ids = rows["id"][:] if "id" in rows.column_names else [None] * len(rows)
    return list(zip(map(str, ids), (text for (text,) in values_of(rows, ("text",))), strict=True))


@pytest.mark.parametrize(
    ("names", "read", "left_out"),
    [
        (("web.jsonl", "train_times.jsonl", "notes.txt", "README.md"), "train_times.jsonl web.jsonl", "README.md, not"),
        (("b.jsonl", "a.jsonl", "sub/c.jsonl"), "a.jsonl b.jsonl sub/c.jsonl", None),
        (("a.jsonl", ".b.jsonl", ".cache/x.metadata", "__c.jsonl"), "__c.jsonl a.jsonl", ".b.jsonl\n"),
        (("b.txt", "a.txt", "image.png"), "a.txt b.txt", "image.png"),
        (("train.jsonl", "more.jsonl", "old.jsonl.bz2"), "more.jsonl train.jsonl", "old.jsonl.bz2"),
        (("val_losses.jsonl", "test_cases.jsonl"), "test_cases.jsonl val_losses.jsonl", None),
        (("train.jsonl", "test.jsonl", "validation.jsonl"), "train.jsonl", None),
        (("train/b.jsonl", "train/a.jsonl", "test/c.jsonl"), "train/a.jsonl train/b.jsonl", None),
        (("train-1.jsonl", "train-0.jsonl", "dev.jsonl"), "train-0.jsonl train-1.jsonl", None),
        (
            ("data/train-00000-of-00001.jsonl", "data/extra-00000-of-00001.jsonl"),
            "data/train-00000-of-00001.jsonl",
            None,
        ),
    ],
)
def test_every_data_file_of_a_folder(tmp_path, monkeypatch, capsys, names, read, left_out):
    """All files are read, in the order of their names, unless all have the name of a split; others are named."""
    monkeypatch.chdir(tmp_path)
    progress.begin(quiet=False)
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n" if name.endswith("txt") else json.dumps({"text": name}) + "\n")
    assert [text for _, text in load("folder")] == read.split()
    out = capsys.readouterr().out
    assert f"left out of folder, as no data files: {left_out}" in out if left_out else "left out" not in out


def test_folders_that_are_refused(tmp_path, monkeypatch):
    """A folder where only some files have the name of a split, without data files, or with other columns in one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    write_jsonl(folder / "test.jsonl", [{"text": "a"}])
    write_jsonl(folder / "web.jsonl", [{"text": "b", "id": "x"}])
    with pytest.raises(ValueError, match=r"test\.jsonl has the name of a split and web\.jsonl has not"):
        load(folder)
    (folder / "test.jsonl").rename(folder / "a.jsonl")
    with pytest.raises(
        ValueError, match=r"rows of a\.jsonl are text and no id, and those of web\.jsonl text and an id"
    ):
        load(folder)
    for name in ("a.jsonl", "web.jsonl"):
        (folder / name).rename(folder / f"{name}.xml")
    with pytest.raises(ValueError, match="no file that ends with one of"):
        load(folder)


def test_kinds_in_one_folder(tmp_path, monkeypatch):
    """Files of rows of several kinds are read together, through links too; one may be empty."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "folder/b.jsonl", [{"id": "007", "text": "b"}])
    Dataset.from_dict({"text": ["a"], "id": [2**63 - 1], "n": [1]}).to_parquet("folder/a.parquet")
    (tmp_path / "folder/c.json").write_text('[{"id": 1.50, "text": "c"}]')
    (tmp_path / "folder/d.jsonl").touch()
    write_jsonl(tmp_path / "elsewhere/e.jsonl", [{"id": "e", "text": "e"}])
    (tmp_path / "folder/link").symlink_to("../elsewhere")
    (tmp_path / "folder/link/loop").symlink_to("../folder")
    rows = [("9223372036854775807", "a"), ("007", "b"), ("1.50", "c"), ("e", "e")]
    assert load("folder") == rows


CARD = "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: web*.jsonl\n---\n"


@pytest.mark.parametrize("name", ["d[1]", "a*b", "x::y", "a b", "h#1", "p%20", "é長", "a?b", "file:"])
def test_paths_are_literal(tmp_path, monkeypatch, name):
    """Of files, folders, folders whose README.md names the files, and folders that datasets saved."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / name / f"{name}.jsonl", [{"text": "the river"}])
    write_jsonl(tmp_path / "d1/d1.jsonl", [{"text": "another"}])  # d[1] as a pattern
    write_jsonl(tmp_path / name / "hub" / "web1.jsonl", [{"text": "the mill"}])
    (tmp_path / name / "hub/README.md").write_text(CARD)
    write_jsonl(tmp_path / name / "hub/other.jsonl", [{"text": "another"}])
    assert load(f"{name}/{name}.jsonl") == load(tmp_path / name / f"{name}.jsonl") == [("None", "the river")]
    assert load(f"{name}/hub") == load(f"{name}/hub", config="one") == [("None", "the mill")]
    Dataset.from_dict({"text": ["a dog"]}).save_to_disk("saved")
    shutil.move("saved", f"{name}/saved")
    assert load(f"{name}/saved") == [("None", "a dog")]
    shutil.rmtree(f"{name}/hub")
    shutil.rmtree(f"{name}/saved")
    assert load(name) == [("None", "the river")]


IDS = ["18446744073709551615", "18446744073709551614", "1.0", "1e5", "0.10", '"007"', '"1"', '"2020-01-01"', '"1e3"']


@pytest.mark.parametrize("name", ["ids.jsonl", "ids.json"])
@pytest.mark.parametrize("ids", [IDS, IDS[:2], IDS[5:6], IDS[7:8], IDS[2:5]], ids=" ".join)
def test_ids_are_text(tmp_path, monkeypatch, name, ids):
    """As the file has them, whatever types they or the others look like."""
    monkeypatch.chdir(tmp_path)
    rows = [f'{{"id": {value}, "text": "t"}}' for value in ids]
    (tmp_path / name).write_text("\n".join(rows) if name.endswith("l") else f"[{', '.join(rows)}]")
    assert load(name) == [(value.strip('"'), "t") for value in ids]


@pytest.mark.parametrize(
    "ids",
    [[1.5, 2.0], [datetime.date(2020, 1, 1)], [True], [b"x"], [[1]], [datetime.datetime(2020, 1, 1)]],
    ids=lambda ids: type(ids[0]).__name__,
)
@pytest.mark.parametrize("saved", [False, True])
def test_ids_that_are_refused(tmp_path, monkeypatch, ids, saved):
    """Whatever has no exact text, in a .parquet file or a folder that datasets saved."""
    monkeypatch.chdir(tmp_path)
    table = Dataset.from_dict({"id": ids, "text": ["t"] * len(ids)})
    table.save_to_disk("data") if saved else table.to_parquet("data.parquet")
    with pytest.raises(ValueError, match=r"ids? (of the|have the) type"):
        load("data" if saved else "data.parquet")


def test_ids_of_a_csv(tmp_path, monkeypatch):
    """The Hub's CSV files are read by datasets, which takes 007 for 7."""
    Path(tmp_path, "ids.csv").write_text("id,text\n007,a\n")
    csv = Dataset.from_csv(str(tmp_path / "ids.csv"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: csv)
    with pytest.raises(ValueError, match="ids have the type int64"):
        load("someone/ids")


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """Is refused, and no copy of it stays."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the river"}])

    def write_late(*arguments, write=file_rows._write):
        write(*arguments)
        write_jsonl(tmp_path / "a.jsonl", [{"text": "the mill"}])

    monkeypatch.setattr(file_rows, "_write", write_late)
    with pytest.raises(ValueError, match="changed while it was read"):
        load("a.jsonl")
    assert not list(tmp_path.rglob("*.arrow*"))


def test_a_parquet_file_of_whole_numbers(tmp_path, monkeypatch):
    """Up to 64 bits without a sign."""
    monkeypatch.chdir(tmp_path)
    table = pa.table({"id": pa.array([2**64 - 1, 2**64 - 2], pa.uint64()), "text": ["a", "b"]})
    parquet.write_table(table, "ids.parquet")
    assert load("ids.parquet") == [(str(2**64 - 1), "a"), (str(2**64 - 2), "b")]


def test_other_content_of_the_same_name_size_and_time(tmp_path, monkeypatch):
    """It is read; rows of the content before are not used. In files and in folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "folder/train.jsonl"):
        path = write_jsonl(tmp_path / name, [{"text": "the river"}])
        modified = path.stat().st_mtime_ns
        assert load(name.split("/")[0]) == [("None", "the river")]
        write_jsonl(path, [{"text": "the miller"[:9]}])
        os.utime(path, ns=(modified, modified))
        assert load(name.split("/")[0]) == [("None", "the mille")]


def test_a_key_that_stands_twice(tmp_path, monkeypatch):
    """Is refused: which of the values is meant?"""
    monkeypatch.chdir(tmp_path)
    Path("twice.jsonl").write_text('{"text": "a"}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"line 2 of twice\.jsonl.*key twice"):
        load("twice.jsonl")


def test_large_files_are_read_in_parts(tmp_path, monkeypatch):
    """No more than a thousand rows are in memory at once, of whatever kind of file; the copy is in parts too."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": str(i), "text": f"text {i}"} for i in range(2500)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    Dataset.from_list(rows).to_parquet("rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        documents = load_documents(DataSettings(name, None, "train"), "cache")
        assert documents.data.num_rows == 2500 and documents.data["text"].num_chunks == 3
        assert load(name) == [(row["id"], row["text"]) for row in rows]


def compressed(path: Path, text: str) -> None:
    """Write a text file, compressed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)) as file:
        file.write(text.encode())


ROWS = [{"id": "b", "text": 'a "river",\nran', "n": 1}, {"id": "007", "text": "長い", "n": 2}]


def in_kind(kind: str) -> str:
    """Return ROWS in a kind of file."""
    if kind == ".csv":
        return 'id,text,n\nb,"a ""river"",\nran",1\n\n007,長い,2\n'
    return json.dumps(ROWS) if kind == ".json" else "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_kinds_of_files(tmp_path, monkeypatch, kind, end):
    """The same rows, compressed or not, as a file, in a folder with splits, and by a pattern."""
    monkeypatch.chdir(tmp_path)
    compressed(Path(f"folder/train{kind}{end}"), in_kind(kind))
    compressed(Path(f"folder/test{kind}{end}"), in_kind(kind))
    rows = [(row["id"], row["text"]) for row in ROWS]
    for name in (f"folder/train{kind}{end}", "folder", f"folder/tr*{kind}{end}", "**/train*"):
        assert load(name) == rows, name
    assert load("folder", split="test") == rows and len(load("folder/*")) == 4
    compressed(Path(f"a.txt{end}"), "the river\n長い\n")
    assert [text for _, text in load(f"a.txt{end}")] == ["the river", "長い"]
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        load("folder/x*")


def test_shards_with_other_columns(tmp_path, monkeypatch):
    """Columns that are not used may differ in type and name from shard to shard, and from row to row."""
    monkeypatch.chdir(tmp_path)
    shards = [
        [{"id": 1, "text": "a", "meta": {"x": 1}, "source": None}, {"id": "b", "text": "b", "meta": "y"}],
        [{"id": 2**70, "text": "c", "source": "web", "extra": [1, "z"]}],
        [{"id": 1.5, "text": "d", "meta": [[]], "source": {"a": 1}}],
    ]
    for number, rows in enumerate(shards):
        compressed(Path(f"corpus/{number}.jsonl.zst"), "".join(json.dumps(row) + "\n" for row in rows))
    Path("corpus/3.csv").write_text("text,id,views\ne,5,many\n")
    Path("corpus/4.jsonl").touch()
    assert load("corpus") == [("1", "a"), ("b", "b"), (str(2**70), "c"), ("1.5", "d"), ("5", "e")]
    rows = load_documents(DataSettings("corpus", keep_columns=["source", "meta"]), "cache")
    assert values_of(rows, ("source", "meta"))[2:] == [("web", None), ({"a": 1}, [[]]), (None, None)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text,text\na,b\n", "names a column twice"),
        ("a.csv", b"id,text\n1,a,b\n", "line 2 of a.csv has 3 fields, not 2"),
        ("a.csv", b'text\n"a\n', "line 2 of a.csv is no row of a CSV"),
        ("a.jsonl", '{"text": "é"}\n'.encode("utf-16"), "a.jsonl is in UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n' * 100000 + '{"text": "é"}\n'.encode("latin-1"), "byte 1400010"),
        ("a.txt", "aé".encode()[:-1], "at byte 1, its end"),
        ("a.jsonl", b'["text"]\n', "line 1 of a.jsonl is no row in JSON: it holds a list"),
        ("a.parquet", b"PAR1 cut", "a.parquet is damaged or cut off"),
        ("a.parquet", b"", "a.parquet is damaged or cut off"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "a.jsonl.gz is damaged or cut off"),
        ("a.jsonl.zst", b"not zstd", "a.jsonl.zst is damaged or cut off"),
    ],
    ids="twice fields quote UTF-16 Latin-1 character list parquet empty gz zst".split(),
)
def test_damaged_files(tmp_path, monkeypatch, name, content, words):
    """Named, with what is wrong and where."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)):
        load(name)


def test_a_zstd_file_that_is_cut_off(tmp_path, monkeypatch):
    """It is not taken for a whole one."""
    monkeypatch.chdir(tmp_path)
    compressed(Path("a.jsonl.zst"), "".join(json.dumps({"text": f"{i} {i * 7919 % 1013}"}) + "\n" for i in range(9999)))
    Path("a.jsonl.zst").write_bytes(Path("a.jsonl.zst").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is damaged or cut off"):
        load("a.jsonl.zst")


@pytest.mark.parametrize("name", ["hub", "corpus", "corpus/*.jsonl"])
def test_streams(tmp_path, monkeypatch, name):
    """--streaming reads no more than a run needs, from local files, and through datasets from one of the Hub."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"d{i}", "text": f"the river {i}"} | ({"source": i} if i else {}) for i in range(3000)]
    lines = [json.dumps(row) for row in rows]
    Path("corpus").mkdir()
    Path("corpus/a.jsonl").write_text("\n".join(lines) + "\n")
    Path("corpus/b.jsonl").write_text("this is not JSON\n")
    monkeypatch.setitem(documents.HUB_NAMES, "hub", (str(tmp_path / "corpus"), None))
    monkeypatch.setattr(documents, "SHUFFLE_BUFFER", 100)
    settings = RunSettings(data_name=name, streaming=True, max_examples=50, block_size=8, keep_columns=["source"])
    found, counts = build_examples(load_documents(settings), make_tokenizer(), settings, None, tmp_path)
    assert counts == {"documents": counts["documents"], "dropped_rows": 0, "rows": 1000}
    assert (
        len(found) == 50
        and found["document_id"][0] == "d0"
        and [json.loads(kept)["source"] for kept in found["kept"]][:2] == [None, 1]
    )
    Path("corpus/b.jsonl").rename("b")
    mixed = [
        build_examples(load_documents(s), make_tokenizer(), s, None, tmp_path)[0]["document_id"][:]
        for s in (replace(settings, shuffle_seed=1, max_examples=20) for _ in range(2))
    ]
    assert mixed[0] == mixed[1] != found["document_id"][:20]
    Path("b").rename("corpus/b.jsonl")
    with pytest.raises(ValueError, match="expected more documents after"):
        build_examples(load_documents(settings), make_tokenizer(), replace(settings, max_examples=None), None, tmp_path)


def test_openwebtext_streams_by_default(tmp_path, monkeypatch):
    """If less than a tenth of it is wanted; then the data are not downloaded as a whole."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("corpus/a.jsonl"), [{"text": "the river"}])
    monkeypatch.setitem(documents.HUB_NAMES, "openwebtext", (str(tmp_path / "corpus"), None))
    kinds = [load_documents(DataSettings("openwebtext", max_tokens=tokens), "cache") for tokens in (10**6, 10**9)]
    assert isinstance(kinds[0], file_rows.Stream) and isinstance(kinds[1], Dataset)
