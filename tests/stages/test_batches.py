"""Batches of like length."""

from logra.stages.batches import length_batches


def test_length_batches():
    """Every position once, within the budget, of like length."""
    lengths = [5, 90, 3, 40, 41, 7, 0, 200]
    batches = length_batches(lengths, 100)
    assert sorted(sum(batches, [])) == list(range(8))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)
    assert max(len(b) for b in length_batches(lengths, 10**6, 3)) == 3
    assert len(length_batches([1] * 10, 10**6)) == 1


def test_a_batch_crosses_no_boundary():
    """Lengths at or below a boundary, and lengths above it, are in batches of their own."""
    lengths = [30, 5, 12, 13, 29, 11, 4, 12]
    batches = length_batches(lengths, 10**6, None, [12, 4])
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    groups = [{(lengths[i] > 4) + (lengths[i] > 12) for i in batch} for batch in batches]
    assert groups == [{2}, {1}, {0}]
