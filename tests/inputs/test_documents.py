"""Every kind of data source."""

import datasets
import pytest
from conftest import WORDS, write_jsonl
from datasets import Dataset

from logra.inputs.documents import load_documents, source_fingerprint


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
        assert load_documents(name, None, "train", str(tmp_path / "cache"))["text"][:] == texts, name
    for name in ("saved_dict", "openwebtext"):
        assert len(load_documents(name, None, "test", str(tmp_path / "cache"))) == 2
    for name, split in (("saved", "test"), ("openwebtext", "validation"), ("a.jsonl", "test"), ("pydoc", "test")):
        with pytest.raises(ValueError, match=name):
            load_documents(name, None, split, str(tmp_path / "cache"))
    for name in ("no/such-data", "missing.jsonl"):
        with pytest.raises(ValueError, match="can't be loaded"):
            load_documents(name, None, "train", str(tmp_path / "cache"))
    whole, short = (load_documents("pydoc", config, "train") for config in (None, "short"))
    assert {"with", "try"} <= set(short["id"]) < set(whole["id"])


def test_source_fingerprint(tmp_path):
    """It changes with a file's content, and is None for a Hub name."""
    path = tmp_path / "a.txt"
    path.write_text(" ".join(WORDS))
    one = source_fingerprint(str(path))
    path.write_text(" ".join(WORDS[::-1]))
    assert one != source_fingerprint(str(path)) and source_fingerprint("pydoc") is None
