"""Documents to examples: stable ids, blocks, packing, limits, bad rows."""

import pytest
from conftest import make_texts, make_tokenizer, write_jsonl
from datasets import Dataset

from logra.inputs import examples
from logra.inputs.documents import load_documents
from logra.runtime.settings import DataSettings, RunSettings


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def build(documents, tokenizer, tmp_path, num_proc=None, **changes):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return examples.build_examples(documents, tokenizer, RunSettings(**{"block_size": 512} | changes), num_proc, work)


def test_responses_are_read_from_their_own_columns(tokenizer, tmp_path):
    """Also where --text_column names the column that holds the documents' ids later."""
    rows = Dataset.from_list([{"prompt": "the old mill", "response": " ran past"}])
    options = {"train_loss": "response", "text_column": "document_id"}
    found, _ = build(rows, tokenizer, tmp_path, **options)
    assert found["text"][:] == ["the old mill ran past"]


def test_blocks_are_of_one_document(tokenizer, tmp_path):
    """Joined again, the blocks of a document are its tokens; ids follow the data's order."""
    texts = make_texts(15)
    documents = Dataset.from_dict({"text": texts})
    rows, counts = build(documents, tokenizer, tmp_path, block_size=7)
    assert counts == {"documents": len(texts), "dropped_rows": 0, "rows": len(texts)}
    for i, text in enumerate(texts):
        blocks = [row for row in rows if row["document_id"] == str(i)]
        assert [b["block"] for b in blocks] == list(range(len(blocks)))
        assert sum((b["input_ids"] for b in blocks), []) == tokenizer(text)["input_ids"]
        assert "".join(b["text"] for b in blocks) == text
        assert all(len(b["input_ids"]) <= 7 for b in blocks)
    assert [int(i) for i in rows["document_id"]] == sorted(int(i) for i in rows["document_id"])
    assert list(examples.token_counts(rows)) == [len(ids) for ids in rows["input_ids"]]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_pack_joins_documents(tokenizer, tmp_path, num_proc):
    """Every block is full but the last; joined, they are all documents' tokens; each says where a document begins."""
    texts = make_texts(15)
    documents = Dataset.from_dict({"text": texts, "id": [f"d{i}" for i in range(15)]})
    rows, _ = build(documents, tokenizer, tmp_path, num_proc, block_size=16, pack=True)
    stream = sum((tokenizer(text)["input_ids"] for text in texts), [])
    assert sum(rows["input_ids"], []) == stream
    assert all(len(ids) == 16 for ids in rows["input_ids"][:-1])
    origin = [name for i, text in enumerate(texts) for name in [f"d{i}"] * len(tokenizer(text)["input_ids"])]
    for number, row in enumerate(rows):
        bounds = [*row["document_starts"], len(row["input_ids"])]
        for name, start, end in zip(row["document_ids"], bounds, bounds[1:], strict=False):
            assert set(origin[number * 16 + start : number * 16 + end]) == {name}


def test_limits_and_sample(tokenizer, tmp_path, monkeypatch):
    """max_examples and max_tokens keep the first ones; a shuffle seed takes others, the same each time."""
    monkeypatch.setattr(examples, "SLICE_DOCUMENTS", 4)
    documents = Dataset.from_dict({"text": make_texts(30)})
    every, _ = build(documents, tokenizer, tmp_path, block_size=9)
    some, _ = build(documents, tokenizer, tmp_path, block_size=9, max_examples=11)
    assert some["input_ids"][:] == every["input_ids"][:11]
    few, _ = build(documents, tokenizer, tmp_path, block_size=9, max_tokens=100)
    total = examples.token_counts(every).cumsum()
    assert len(few) == (total <= 100).sum() and few["input_ids"][:] == every["input_ids"][: len(few)]
    one, two = (build(documents, tokenizer, tmp_path, block_size=9, shuffle_seed=5)[0] for _ in range(2))
    assert (
        examples.examples_fingerprint(one) == examples.examples_fingerprint(two) != examples.examples_fingerprint(every)
    )
    texts = {str(i): text for i, text in enumerate(documents["text"])}
    assert all(row["text"] in texts[row["document_id"]] for row in one), "a shuffled document keeps its row number"
    assert len(set(one["document_id"])) == 30


def test_bad_rows_are_named_or_dropped(tokenizer, tmp_path):
    """Empty and non-string rows are counted and named; --skip_bad_rows drops them and keeps the others' ids."""
    rows = [{"text": t} for t in ["good", "", None, 5, "fine", "  "]]
    write_jsonl(tmp_path / "bad.jsonl", rows)
    documents = load_documents(DataSettings(str(tmp_path / "bad.jsonl"), None, "train"), str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"got 4 empty or other rows.*1 \(empty\), 2 \(NoneType\), 3 \(int\).*skip_bad_rows"
    ):
        build(documents, tokenizer, tmp_path)
    kept, counts = build(documents, tokenizer, tmp_path, skip_bad_rows=True)
    assert kept["document_id"][:] == ["0", "4"] and counts["dropped_rows"] == 4
    blank = Dataset.from_dict({"text": ["a river", "", "a mill"]})
    assert build(blank, tokenizer, tmp_path, data_name="wikitext")[1]["dropped_rows"] == 1
    with pytest.raises(ValueError, match="text_column"):
        build(blank, tokenizer, tmp_path, text_column="body")
    with pytest.raises(ValueError, match="no other"):
        build(Dataset.from_dict({"text": [""]}), tokenizer, tmp_path, skip_bad_rows=True)


@pytest.mark.parametrize(
    ("limits", "documents"),
    [({}, 40), ({"max_tokens": 10**9}, 40), ({"max_examples": 10}, 12), ({"max_tokens": 300, "shuffle_seed": 1}, None),
     ({"max_examples": 3, "pack": True, "block_size": 100}, None)],
)  # fmt: skip
def test_the_bar_counts_what_is_tokenised(tokenizer, tmp_path, monkeypatch, limits, documents):
    """It counts documents and ends full, far below --max_tokens; after the first slice its total is about right."""
    seen = []

    class Bar(examples.progress.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append((self.n, self.total))

    monkeypatch.setattr(examples.progress, "tqdm", Bar)
    monkeypatch.setattr(examples, "SLICE_DOCUMENTS", 4)
    build(Dataset.from_dict({"text": make_texts(40)}), tokenizer, tmp_path, **limits)
    done, total = seen[-1]
    assert done == total <= 40 and done == (documents or done) and (documents or done < 40)
    assert 0.5 * done <= seen[0][1] <= 2 * done and len(seen) == -(-done // 4)
