"""The fused loss is the model's own; a head that is not reproduced is refused."""

import pytest
import reference
import torch
from conftest import VOCAB, make_model
from helpers import draw_projections, random_ids, relative

from logra import loss
from logra.hooks import GradientCapture
from logra.inputs.batches import make_batch
from logra.stages.gradients import run_batch


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "opt"])
def test_other_heads(name):
    """Soft-capped and scaled logits, and OPT's layers, are exact too."""
    model = make_model(name)
    loss.check_head(model)
    shapes, projections = draw_projections(model)
    ids = random_ids([8, 13])
    with GradientCapture(model, projections) as capture:
        grads = run_batch(model, capture, ids)
    for row, example in enumerate(ids):
        for layer, g in reference.full_gradient(model, shapes, example).items():
            assert relative(grads[layer][row], reference.project(g, *projections[layer][:2])) < 2e-5, layer


def test_losses(model):
    """The fused loss is the plain one, to 1e-5, whatever the chunk."""
    ids = random_ids([14, 10, 2])
    expected = torch.tensor([reference.example_loss(model, row) for row in ids])
    batch = make_batch(ids)
    for chunk in (2**25, 16 * VOCAB):
        loss.CHUNK_LOGITS, before = chunk, loss.CHUNK_LOGITS
        assert relative(loss.example_losses(model, batch.input_ids, batch.targets).detach(), expected) < 1e-5
        loss.CHUNK_LOGITS = before


def test_a_model_that_changes_its_logits_is_refused():
    """check_head notices a transformation that is not reproduced."""
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda m, a, output: output if len(a[0].shape) == 2 else output * 2)
    model.model.register_forward_hook(lambda m, a, output: output)
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = forward
    with pytest.raises(ValueError, match="not supported"):
        loss.check_head(model)
