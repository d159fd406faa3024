"""Rankings of documents, percentiles and z-scores."""

import numpy as np
import pytest

from logra.scoring.rank import Ranking, by_document, percentile_and_z_score, query_text


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("combine", ["sum", "max"])
def test_documents_are_ranked_by_sum_or_best(largest, combine):
    """A document's score is the sum, or the best (worst), of its examples' scores."""
    scores, owners = np.random.default_rng(0).normal(size=50).astype(np.float32), np.arange(50) % 7
    order = np.argsort(-scores if largest else scores)
    found = by_document(Ranking(order, scores[order], np.ones(50)), owners, largest, combine)
    assert found.combine == combine
    pick = {"sum": np.sum, "max": np.max if largest else np.min}[combine]
    expected = {d: pick(scores[owners == d]) for d in range(7)}
    assert [owners[i] for i in found.examples] == sorted(expected, key=expected.get, reverse=largest)
    assert np.allclose(sorted(found.scores), sorted(expected.values()), atol=1e-5)
    extreme = np.argmax if largest else np.argmin
    for i, count in zip(found.examples, found.counts, strict=True):
        of = np.flatnonzero(owners == owners[i])
        assert count == len(of) and i == of[extreme(scores[of])]


def test_a_document_is_counted_with_the_examples_that_were_not_kept():
    """Of two kept examples of a document of 11, the first is the highest of 11, not of 2."""
    owners = np.repeat([0, 1], [11, 3])
    found = by_document(Ranking(np.array([4, 12, 7]), np.array([3.0, 2, 1]), np.ones(3)), owners, True, "max")
    assert found.examples.tolist() == [4, 12] and found.counts.tolist() == [11, 3]


def test_a_group_is_the_texts_of_its_queries():
    """Prompt and response are joined as they are; names of roles and of queries are shown, but are no words of it."""
    members = [
        {"id": "q1", "prompt": "the old mi", "response": "ll ran"},
        {"id": "q2", "messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]},
    ]
    found = query_text({"id": "g", "queries": members, "tokens": 4})
    assert found["words"] == "the old mill ran\nwhy\nso" and found["group"] == "mean gradient of 2 queries: q1, q2"
    assert found["prompt"] == "the old mill ran\nuser: why\nassistant: so" and found["response"] == ""


def test_standings():
    """The percentile is the share of scores below, the z-score in standard deviations from the mean; ties agree."""
    values = np.random.default_rng(0).integers(0, 30, 100).astype(np.float32)
    found = percentile_and_z_score(values[:20], np.sort(values)[::-1])
    for score, place in zip(values[:20], found, strict=True):
        assert place["percentile"] == pytest.approx(100 * (values < score).mean())
        assert place["z"] == pytest.approx((score - values.mean()) / values.std(), rel=1e-5)
    assert percentile_and_z_score(np.ones(1), np.ones(4, np.float32)) == [{"percentile": 0, "z": 0}]
