"""Batches: a gradient depends neither on the batch nor on memory that runs out."""

import pytest
import torch
from helpers import compute_gradients, draw_projections, random_ids, relative

from logra.hooks import GradientCapture
from logra.stages import gradients
from logra.stages.gradients import Extractor


def test_a_gradient_does_not_depend_on_the_batch(model):
    """Alone, among others, in batches of any size: the same to 1e-5."""
    _, projections = draw_projections(model)
    ids = random_ids([12, 3, 20, 1, 9, 20])
    with GradientCapture(model, projections) as capture:
        together = compute_gradients(model, capture, ids, 10**6, None)
        alone = compute_gradients(model, capture, ids, 10**6, 1)
        some = compute_gradients(model, capture, ids, 40, None)
    for layer in together:
        assert relative(together[layer], alone[layer]) < 1e-5
        assert relative(some[layer], alone[layer]) < 1e-5
        assert not together[layer][3].any(), "a document of one token has no loss"


def test_batches_give_way_to_memory(model, monkeypatch):
    """Where memory runs out for a batch it is halved, and later ones are smaller; rows and sums stay exact."""
    _, projections = draw_projections(model)
    ids, said = random_ids([12, 3, 20, 1, 9, 20, 20, 18]), []
    with GradientCapture(model, projections, factors=True) as capture:
        expected, sums = Extractor(model, capture, 10**6).gradients(ids).wait()
        original, sizes = gradients.run_batch, []

        def short(model, capture, token_ids, counted=None):
            sizes.append(len(token_ids) * max(map(len, token_ids)))
            grads = original(model, capture, token_ids, counted)
            if sizes[-1] > 45:
                raise torch.OutOfMemoryError("simulated")
            return grads

        monkeypatch.setattr(gradients, "run_batch", short)
        monkeypatch.setattr(gradients, "say", said.append)
        extractor = Extractor(model, capture, 10**6)
        got, factors = extractor.gradients(ids).wait()
        assert said[0] == "out of memory with 160 tokens in a batch; going on with 80" and len(said) == 2
        assert all(relative(got[layer], expected[layer]) < 1e-5 for layer in expected)
        assert all(relative(factors[key], total) < 1e-5 for key, total in sums.items())
        sizes.clear()
        extractor.gradients(ids).wait()
        assert max(sizes) <= 45, "what was found out is kept"
        assert extractor.find_batch_tokens(10, 100) in (10, 20, 40) and max(sizes) <= 80
        with pytest.raises(ValueError, match=r"memory for an example of 46 tokens.*--gradient_checkpointing"):
            extractor.gradients(random_ids([46]))


def test_an_example_without_tokens(model):
    """A document that a tokenizer turns into nothing stays, with zero gradient, beside others."""
    _, projections = draw_projections(model)
    with GradientCapture(model, projections) as capture:
        grads = compute_gradients(model, capture, [*random_ids([6]), []], 10**6, None)
    assert all(g[0].any() and not g[1].any() for g in grads.values())
