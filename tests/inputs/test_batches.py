"""Batches of like length."""

from logra.inputs.batches import length_batches


def test_length_batches():
    """Every position once, within the budget, of like length."""
    lengths = [5, 90, 3, 40, 41, 7, 0, 200]
    batches = length_batches(lengths, 100)
    assert sorted(sum(batches, [])) == list(range(8))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)
    assert max(len(b) for b in length_batches(lengths, 10**6, 3)) == 3
    assert len(length_batches([1] * 10, 10**6)) == 1
