"""Which examples and documents are equal."""

import numpy as np
from datasets import Dataset, concatenate_datasets

from logra.inputs.groups import document_numbers, equal_documents, equal_examples


def test_equal_examples_and_documents():
    """Those with the same tokens, of which the same ones count; over batches and parts of a run, in any order."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, 2, random.integers(0, 4)).tolist() for _ in range(2600)]
    counted = [(random.random(len(row)) < 0.5).tolist() for row in ids]
    names = [f"doc{n // 2}" for n in range(2600)]
    whole = Dataset.from_dict({"input_ids": ids, "counted": counted, "document_id": names})
    parts = [whole.select(range(start, min(start + 1101, 2600))) for start in range(0, 2600, 1101)]
    for examples, keys in (
        (concatenate_datasets(parts), [(*row, *marks) for row, marks in zip(ids, counted, strict=True)]),
        (whole.remove_columns("counted"), [(*row,) for row in ids]),
    ):
        copies = equal_examples(examples)
        assert len({*zip(keys, copies.numbers.tolist(), strict=True)}) == len({*keys}) == len(copies.counts)
        assert copies.counts[copies.numbers].tolist() == [keys.count(key) for key in keys]
        documents = equal_documents(examples, document_numbers(examples, False))
        pairs = [(keys[n], keys[n + 1]) for n in range(0, 2600, 2)]
        assert documents.counts[documents.numbers[::2]].tolist() == [pairs.count(pair) for pair in pairs]
        assert (documents.numbers[::2] == documents.numbers[1::2]).all()
