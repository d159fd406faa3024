"""Projected per-example gradients against the slow reference, and what must not happen to the model."""

import copy

import pytest
import reference
import torch
from conftest import OTHERS, VOCAB, make_model

from logra import loss, projection
from logra.hooks import GradientCapture
from logra.inputs.batches import make_batch
from logra.inputs.model import blocks, checkpoint_blocks, choose_layers
from logra.stages import gradients
from logra.stages.gradients import Extractor, run_batch


def random_ids(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(3, VOCAB, (n,)).tolist() for n in lengths]


def compute_gradients(model, capture, ids, first_id, limits):
    return Extractor(model, capture, *limits).gradients(ids, first_id=first_id).wait()[0]


def setup(model, rank_in=5, rank_out=4, mlp_only=False):
    shapes = choose_layers(model, mlp_only, None)
    sizes = projection.projected_shapes(shapes, rank_in, rank_out)
    return shapes, projection.draw(shapes, sizes, seed=torch.randint(1000, ()).item())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1.0)).item()


@pytest.mark.parametrize("lengths", [[7], [9, 2, 17, 5, 17]])
def test_projected_gradients_are_the_projection_of_autograds(model, lengths):
    """P_out G P_in^T of the full gradient, to 1e-5, with several lengths in one batch."""
    shapes, projections = setup(model)
    ids = random_ids(lengths)
    with GradientCapture(model, projections) as capture:
        grads = compute_gradients(model, capture, ids, 0, (10**6, None))
    for row, example in enumerate(ids):
        full = reference.full_gradient(model, shapes, example)
        for layer, g in full.items():
            assert relative(grads[layer][row], reference.project(g, *projections[layer][:2])) < 1e-5, layer


def test_no_projection_gives_the_full_gradient(model):
    """A rank at or above the width leaves a side alone."""
    shapes, projections = setup(model, 1000, 1000)
    assert all(p == projection.Projection(None, None) for p in projections.values())
    ids = random_ids([11])
    with GradientCapture(model, projections) as capture:
        grads = run_batch(model, capture, ids)
    for layer, g in reference.full_gradient(model, shapes, ids[0]).items():
        assert relative(grads[layer][0], g.flatten()) < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "opt"])
def test_other_heads(name):
    """Soft-capped and scaled logits, and OPT's layers, are exact too."""
    model = make_model(name)
    loss.check_head(model)
    shapes, projections = setup(model)
    ids = random_ids([8, 13])
    with GradientCapture(model, projections) as capture:
        grads = run_batch(model, capture, ids)
    for row, example in enumerate(ids):
        for layer, g in reference.full_gradient(model, shapes, example).items():
            assert relative(grads[layer][row], reference.project(g, *projections[layer][:2])) < 2e-5, layer


def test_a_gradient_does_not_depend_on_the_batch(model):
    """Alone, among others, in batches of any size: the same to 1e-5."""
    _, projections = setup(model)
    ids = random_ids([12, 3, 20, 1, 9, 20])
    with GradientCapture(model, projections) as capture:
        together = compute_gradients(model, capture, ids, 0, (10**6, None))
        alone = compute_gradients(model, capture, ids, 0, (10**6, 1))
        some = compute_gradients(model, capture, ids, 0, (40, None))
    for layer in together:
        assert relative(together[layer], alone[layer]) < 1e-5
        assert relative(some[layer], alone[layer]) < 1e-5
        assert not together[layer][3].any(), "a document of one token has no loss"


def test_a_gradient_does_not_depend_on_the_padding_side(model):
    """Left padding with a mask gives what right padding without one gives."""
    _, projections = setup(model)
    ids = random_ids([6, 11])
    right = make_batch(ids)
    pad = [11 - len(row) for row in ids]
    mask = torch.tensor([[0] * n + [1] * (11 - n) for n in pad])
    left = [torch.stack([t[row].roll(n) for row, n in enumerate(pad)]) for t in right[:3]]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with GradientCapture(model, projections, factors=True) as capture:
        expected = capture.backward(loss.example_losses(model, *right[:2]), right.positions)
        sums = capture.take_factors()
        losses = loss.example_losses(model, *left[:2], attention_mask=mask, position_ids=positions)
        got = capture.backward(losses, left[2])
        sums_left = capture.take_factors()
    for layer in expected:
        assert relative(got[layer], expected[layer]) < 1e-5
    for key, total in sums.items():
        assert relative(sums_left[key], total) < 1e-5, key


def test_response_only(model):
    """With a start, only the tokens from there on count."""
    shapes, projections = setup(model)
    ids = random_ids([14, 10])
    with GradientCapture(model, projections) as capture:
        counted = [[i >= start for i in range(len(row))] for row, start in zip(ids, [6, 9], strict=True)]
        grads = run_batch(model, capture, ids, counted)
    for row, start in enumerate([6, 9]):
        for layer, g in reference.full_gradient(model, shapes, ids[row], start).items():
            assert relative(grads[layer][row], reference.project(g, *projections[layer][:2])) < 1e-5


def test_losses(model):
    """The fused loss is the plain one, to 1e-5, whatever the chunk."""
    ids = random_ids([14, 10, 2])
    expected = torch.tensor([reference.example_loss(model, row) for row in ids])
    batch = make_batch(ids)
    for chunk in (2**25, 16 * VOCAB):
        loss.CHUNK_LOGITS, before = chunk, loss.CHUNK_LOGITS
        assert relative(loss.example_losses(model, batch.input_ids, batch.targets).detach(), expected) < 1e-5
        loss.CHUNK_LOGITS = before


def test_bfloat16(model_name):
    """bfloat16 weights: within 10% of the same rounded weights in float64."""
    model = make_model(model_name, torch.bfloat16)
    shapes, projections = setup(model)
    ids = random_ids([12, 7])
    with GradientCapture(model, projections) as capture:
        grads = run_batch(model, capture, ids)
    for row, example in enumerate(ids):
        full = reference.full_gradient(model, shapes, example)
        expected = torch.cat([reference.project(full[n], *projections[n][:2]) for n in shapes])
        assert relative(torch.cat([grads[n][row] for n in shapes]), expected) < 0.1


def test_factor_sums(model):
    """A, B, squares and counts over real positions but each example's last, against one example at a time."""
    shapes, projections = setup(model)
    ids = random_ids([9, 4, 1, 12])
    with GradientCapture(model, projections, factors=True) as capture:
        grads, sums = Extractor(model, capture, 30).gradients(ids).wait()
    assert sums["examples"] == 4 and sums["tokens"] == 8 + 3 + 0 + 11
    expected_a, expected_b = dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0)
    for row in ids:
        for layer, (x, d) in reference.layer_io(model, shapes, row).items() if len(row) > 1 else ():
            p_in, p_out = (p.double() for p in projections[layer][:2])
            x, d = x[:-1] @ p_in.T, d @ p_out.T
            expected_a[layer] = expected_a[layer] + x.T @ x
            expected_b[layer] = expected_b[layer] + d.T @ d
    for layer in shapes:
        assert relative(sums[f"{layer}.A"], expected_a[layer]) < 1e-5
        assert relative(sums[f"{layer}.B"], expected_b[layer]) < 1e-5
        assert relative(sums[f"{layer}.square"], grads[layer].square().sum(0)) < 1e-5


def test_batches_give_way_to_memory(model, monkeypatch):
    """Where memory runs out for a batch it is halved, and later ones are smaller; rows and sums stay exact."""
    _, projections = setup(model)
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
        extractor = Extractor(model, capture, 10**6, say=said.append)
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


def test_gradient_checkpointing(model):
    """The same gradients and sums, from blocks that run twice."""
    _, projections = setup(model)
    ids, results, runs = random_ids([12, 3, 20]), [], []
    blocks(model)[1].register_forward_pre_hook(lambda *_: runs.append(1))
    for again in (False, True):
        if again:
            checkpoint_blocks(model)
            inner = next(blocks(model)[1].children())
            inner.register_forward_pre_hook(lambda *_: runs.append(2))
        with GradientCapture(model, projections, factors=True) as capture:
            results.append(Extractor(model, capture, 10**6).gradients(ids).wait())
    for one, two in zip(*results, strict=True):
        assert all(relative(one[key], two[key]) < 1e-5 for key in one)
    assert runs.count(2) == 2


def test_the_model_is_left_alone(model):
    """No parameter gets a gradient; weights, training mode, requires_grad and hooks are as before."""
    model.train()
    next(model.parameters()).requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    _, projections = setup(model)
    with GradientCapture(model, projections) as capture:
        assert not model.training
        run_batch(model, capture, random_ids([5, 6]))
        assert all(p.grad is None for p in model.parameters())
    assert model.training and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_computed_below_the_first_tracked_layer(model):
    """The graph starts at the first tracked layer: the embedding's output needs no gradient."""
    needs = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, output: needs.append(output.requires_grad))
    _, projections = setup(model)
    with GradientCapture(model, projections) as capture:
        run_batch(model, capture, random_ids([5]))
    assert needs == [False]


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


def test_fused_experts_are_refused_by_name():
    """A mixture-of-experts model's fused weights are named; --layers goes on with the others."""
    model = make_model("mixtral")
    with pytest.raises(ValueError, match=r"experts.*--layers"):
        choose_layers(model, False, None)
    assert set(OTHERS) and len(choose_layers(model, False, r"self_attn")) == 8


def test_layer_choice(model):
    """MLP only, a pattern, no match; neither embedding nor head."""
    every, mlp = choose_layers(model, False, None), choose_layers(model, True, None)
    assert set(mlp) < set(every) and not any("head" in n or "embed" in n or "wte" in n for n in every)
    assert len(mlp) == 2 * (3 if model.config.model_type == "llama" else 2)
    assert choose_layers(model, False, r"\.1\.") == {n: s for n, s in every.items() if ".1." in n}
    with pytest.raises(ValueError, match="none"):
        choose_layers(model, False, "nothing_like_it")


def test_projections_are_stable():
    """The same seed, layer and side give the same numbers whatever else is tracked; E[P^T P] = I."""
    shapes = {"a": (300, 200), "b": (100, 50)}
    sizes = projection.projected_shapes(shapes, 64, 32)
    both, one = projection.draw(shapes, sizes, 3), projection.draw({"b": (100, 50)}, sizes, 3)
    assert torch.equal(both["b"].p_out, one["b"].p_out) and both["b"].p_in is None
    assert not torch.equal(both["a"].p_in, projection.draw(shapes, sizes, 4)["a"].p_in)
    assert abs((both["a"].p_in ** 2).sum(0).mean().item() - 1) < 0.05
    x, y = torch.randn(2, 200)
    mean = sum((p.p_in @ x) @ (p.p_in @ y) for p in (projection.draw(shapes, sizes, s)["a"] for s in range(300))) / 300
    assert abs(mean - x @ y) < 4 * x.norm() * y.norm() / (64 * 300) ** 0.5
    known = projection.random_side(0, "model.layers.0.mlp.up_proj", "in", 2, 4)
    pinned = [-0.603464, -0.389696, 0.640583, 0.100162, 0.567567, -0.631193, -0.144797, 0.129394]
    assert torch.allclose(known.flatten(), torch.tensor(pinned), atol=1e-6), "stored runs would not fit any more"


def test_an_example_without_tokens(model):
    """A document that a tokenizer turns into nothing stays, with zero gradient, beside others."""
    _, projections = setup(model)
    with GradientCapture(model, projections) as capture:
        grads = compute_gradients(model, capture, [*random_ids([6]), []], 0, (10**6, None))
    assert all(g[0].any() and not g[1].any() for g in grads.values())
