"""Rankings of documents, percentiles and z-scores."""

import numpy as np
import pytest

from logra.stages.rank import Ranking, by_document, percentile_and_z_score


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("combine", ["sum", "max"])
def test_documents_are_ranked_by_sum_or_best(largest, combine):
    """A document's score is the sum, or the best (worst), of its examples' scores."""
    scores, owners = np.random.default_rng(0).normal(size=50).astype(np.float32), np.arange(50) % 7
    order = np.argsort(-scores if largest else scores)
    found = by_document(Ranking(order, scores[order], np.ones(50)), owners, largest, combine)
    pick = {"sum": np.sum, "max": np.max if largest else np.min}[combine]
    expected = {d: pick(scores[owners == d]) for d in range(7)}
    assert [owners[i] for i in found.examples] == sorted(expected, key=expected.get, reverse=largest)
    assert np.allclose(sorted(found.scores), sorted(expected.values()), atol=1e-5)
    extreme = np.argmax if largest else np.argmin
    for i, count in zip(found.examples, found.counts, strict=True):
        of = np.flatnonzero(owners == owners[i])
        assert count == len(of) and i == of[extreme(scores[of])]


def test_standings():
    """The percentile is the share of scores below, the z-score in standard deviations from the mean; ties agree."""
    values = np.random.default_rng(0).integers(0, 30, 100).astype(np.float32)
    found = percentile_and_z_score(values[:20], np.sort(values)[::-1])
    for score, place in zip(values[:20], found, strict=True):
        assert place["percentile"] == pytest.approx(100 * (values < score).mean())
        assert place["z"] == pytest.approx((score - values.mean()) / values.std(), rel=1e-5)
    assert percentile_and_z_score(np.ones(1), np.ones(4, np.float32)) == [{"percentile": 0, "z": 0}]
