"""Projected per-example gradients against the slow reference, and what must not happen to the model."""

import copy
import re

import pytest
import reference
import torch
from conftest import make_model
from helpers import compute_gradients, draw_projections, random_ids, relative
from torch import nn

from logra import loss, projection
from logra.hooks import GradientCapture
from logra.models.layers import choose_layers
from logra.models.model import blocks, checkpoint_blocks
from logra.stages.batches import make_batch
from logra.stages.gradients import Extractor, check_layers, run_batch
from logra.tools import verify_reference


@pytest.mark.parametrize("lengths", [[7], [9, 2, 17, 5, 17]])
def test_projected_gradients_are_the_projection_of_autograds(model, lengths):
    """P_out G P_in^T of the full gradient, to 1e-5, with several lengths in one batch."""
    shapes, projections = draw_projections(model)
    ids = random_ids(lengths)
    with GradientCapture(model, projections) as capture:
        grads = compute_gradients(model, capture, ids, 10**6, None)
    for row, example in enumerate(ids):
        full = reference.full_gradient(model, shapes, example)
        for layer, g in full.items():
            assert relative(grads[layer][row], reference.project(g, *projections[layer][:2])) < 1e-5, layer


def test_no_projection_gives_the_full_gradient(model):
    """A rank at or above the width leaves a side alone."""
    shapes, projections = draw_projections(model, 1000, 1000)
    assert all(p == projection.Projection(None, None) for p in projections.values())
    ids = random_ids([11])
    with GradientCapture(model, projections) as capture:
        grads = run_batch(model, capture, ids)
    for layer, g in reference.full_gradient(model, shapes, ids[0]).items():
        assert relative(grads[layer][0], g.flatten()) < 1e-5


def test_a_gradient_does_not_depend_on_the_padding_side(model):
    """Left padding with a mask gives what right padding without one gives."""
    _, projections = draw_projections(model)
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


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("ranks", [(5, 4), (8, 8), (1000, 1000)])
def test_experts_are_one_wide_layer(name, ranks):
    """Gate, biases, transposed weights, none of them; a wide side of rank 4 or 5, or all of it; batched and alone."""
    model = make_model(name)
    shapes, projections = draw_projections(model, *ranks, "expert")
    before, ids = model.config._experts_implementation, random_ids([9, 2, 17, 5])
    with GradientCapture(model, projections) as capture:
        grads = compute_gradients(model, capture, ids, 10**6, None)
        alone = compute_gradients(model, capture, ids, 1, None)
    assert model.config._experts_implementation == before and len(shapes) == 4
    for row, example in enumerate(ids):
        for layer, g in reference.full_gradient(model, shapes, example).items():
            expected = reference.project(g, *projections[layer][:2])
            assert g.shape == shapes[layer] and relative(grads[layer][row], expected) < 1e-5, layer
            assert relative(alone[layer][row], expected) < 1e-5, layer


def test_experts_that_are_not_tracked():
    """The model's logits are those of its own code, to rounding, and it runs its own code again afterwards."""
    model, ids = make_model("mixtral"), torch.tensor(random_ids([12]))
    expected = model(input_ids=ids).logits
    _, projections = draw_projections(model, pattern="self_attn")
    with GradientCapture(model, projections):
        assert relative(model(input_ids=ids).logits, expected) < 1e-6
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert not any(hasattr(module, "wide_layers") for module in model.modules())


def test_response_only(model):
    """With a start, only the tokens from there on count."""
    shapes, projections = draw_projections(model)
    ids = random_ids([14, 10])
    with GradientCapture(model, projections) as capture:
        counted = [[i >= start for i in range(len(row))] for row, start in zip(ids, [6, 9], strict=True)]
        grads = run_batch(model, capture, ids, counted)
    for row, start in enumerate([6, 9]):
        for layer, g in reference.full_gradient(model, shapes, ids[row], start).items():
            assert relative(grads[layer][row], reference.project(g, *projections[layer][:2])) < 1e-5


def test_bfloat16(model_name):
    """bfloat16 weights: within 10% of the same rounded weights in float64."""
    model = make_model(model_name, torch.bfloat16)
    shapes, projections = draw_projections(model)
    ids = random_ids([12, 7])
    with GradientCapture(model, projections) as capture:
        grads = run_batch(model, capture, ids)
    for row, example in enumerate(ids):
        full = reference.full_gradient(model, shapes, example)
        expected = torch.cat([reference.project(full[n], *projections[n][:2]) for n in shapes])
        assert relative(torch.cat([grads[n][row] for n in shapes]), expected) < 0.1


def test_factor_sums(model):
    """A, B, squares and counts over real positions but each example's last, against one example at a time."""
    shapes, projections = draw_projections(model)
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


def test_gradient_checkpointing(model):
    """The same gradients and sums, from blocks that run twice."""
    _, projections = draw_projections(model)
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
    _, projections = draw_projections(model)
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
    _, projections = draw_projections(model)
    model.get_input_embeddings().register_forward_hook(lambda m, a, output: needs.append(output.requires_grad))
    with GradientCapture(model, projections) as capture:
        run_batch(model, capture, random_ids([5]))
    assert needs == [False]


class Turned(nn.Module):
    """A layer that sees [T, B, d], or whose weights are used `calls` times on [B, T, d]."""

    def __init__(self, calls: int = 0):
        super().__init__()
        self.calls, self.layer = calls, nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.calls:
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        for _ in range(self.calls):
            x = self.layer(x).tanh()
        return x


def test_inputs_of_another_layout_are_refused():
    """[T, B, d] holds as many inputs as [B, T, d], but in another order: examples would be mixed."""
    model, x, positions = Turned(), torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool)
    shapes = {"layer": (6, 6)}
    refusal = pytest.raises(ValueError, match=r"one input per token, \[2, 3\], in layer layer, got \[3, 2\]")
    with GradientCapture(model, projection.identity(shapes)) as capture, refusal:
        capture.backward(model(x).square().sum(dim=(1, 2)), positions)


def test_kfac_of_a_layer_that_runs_several_times():
    """C ~ (M tokens / n) * (B / (M tokens)) (x) (A / (M tokens)): M times as many positions as tokens."""
    model, x, positions, seen = Turned(3), torch.randn(4, 5, 6), torch.ones(4, 5, dtype=torch.bool), []

    def keep(module, inputs, output):
        output.retain_grad()
        seen.append((inputs[0].detach(), output))

    with GradientCapture(model, projection.identity({"layer": (6, 6)}), factors=True) as capture:
        model.layer.register_forward_hook(keep)
        capture.backward(model(x).square().sum(dim=(1, 2)), positions)
        sums = capture.take_factors()
    a = sum(inputs.flatten(0, 1).double().T @ inputs.flatten(0, 1).double() for inputs, _ in seen)
    b = sum(output.grad.flatten(0, 1).double().T @ output.grad.flatten(0, 1).double() for _, output in seen)
    expected = torch.kron(b / 60, a / 60) * (60 / 4)
    found = torch.kron(sums["layer.B"].double() / 20, sums["layer.A"].double() / 20) * (20 / 4)
    assert len(seen) == 3 and sums["tokens"] == 20 and relative(found, expected) < 1e-5


class Wrapped(nn.Module):
    """A module that another function calls: forward(module, x)."""

    def __init__(self, module: nn.Module, forward):
        super().__init__()
        self.module, self.call = module, forward

    def forward(self, *inputs, **keywords):
        return self.call(self.module, *inputs, **keywords)


def wrapped_llama(forward, layer: str = "mlp.up_proj"):
    """Return a model with one layer called by forward(layer, x), and all its linear layers but the head."""
    model = make_model("llama")
    parent, _, name = f"model.layers.1.{layer}".rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, name, Wrapped(getattr(parent, name), forward))
    linear = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    return model, {f"model.{name}": (m.out_features, m.in_features) for name, m in linear.items()}


def add_in_place(layer, x):
    y = layer(x)
    y += 0.5  # as Falcon adds its residual
    return y.mul_(2)


EQUAL_TO_AUTOGRAD = {
    "changes the output in place": add_in_place,
    "keyword input": lambda layer, x: layer(input=x),
    "flat input": lambda layer, x: layer(x.flatten(0, 1)).view(*x.shape[:2], -1),
    "an axis of size 1": lambda layer, x: layer(x[:, None])[:, 0],
    "runs twice": lambda layer, x: layer(x) + layer(2 * x).tanh(),
    "runs without gradient too": lambda layer, x: layer(x) + torch.no_grad()(layer)(3 * x),
    "a run that is detached": lambda layer, x: layer(x) + layer(3 * x).detach(),
}


@pytest.mark.parametrize("name", EQUAL_TO_AUTOGRAD)
def test_ways_to_call_a_layer(name):
    """Gradients and factor sums are autograd's, by the reference of --verify."""
    model, shapes = wrapped_llama(EQUAL_TO_AUTOGRAD[name])
    check_layers(model, shapes)
    ids = random_ids([9, 9, 5])
    projections = projection.draw(shapes, projection.projected_shapes(shapes, 5, 4), seed=0)
    with GradientCapture(model, projections, factors=True) as capture:
        grads, sums = Extractor(model, capture, 30).gradients(ids).wait()
    for row, example in enumerate(ids):
        for layer, g in reference.full_gradient(model, shapes, example).items():
            assert relative(grads[layer][row], reference.project(g, *projections[layer][:2])) < 1e-5, layer
    texts = [verify_reference.Text(example, [True] * len(example)) for example in ids]
    sides = {layer: pair[:2] for layer, pair in projections.items()}
    expected = verify_reference.projected_sums(copy.deepcopy(model).double(), sides, texts)
    assert max(relative(total, expected[key]) for key, total in sums.items()) < 1e-5


def test_modules_that_share_a_weight_are_one_layer():
    """As in Zamba. Its gradient is that of all its uses."""
    model = make_model("llama")
    first, second = (block.mlp for block in blocks(model))
    second.up_proj.weight = first.up_proj.weight
    shapes = choose_layers(model, False, None)
    assert "model.layers.0.mlp.up_proj" in shapes and "model.layers.1.mlp.up_proj" not in shapes
    assert list(shapes) == verify_reference.linear_layers(model)
    ids = random_ids([9])
    with GradientCapture(model, projection.identity(shapes)) as capture:
        grads = run_batch(model, capture, ids)
    for layer, g in reference.full_gradient(model, shapes, ids[0]).items():
        assert relative(grads[layer][0], g.flatten()) < 1e-5, layer


def experts(layer, x):
    """Give each expert some of the tokens."""
    chosen = x[..., :1] > x[..., :1].mean()
    y = x.new_zeros(*x.shape[:2], layer.out_features)
    y[chosen[..., 0]] = layer(x[chosen[..., 0]])
    return y


REFUSED = {
    "[T, B, d]": (lambda layer, x: layer(x.mT.mT.transpose(0, 1)).transpose(0, 1), "one input per token, [2, 8]"),
    "[T * B, d]": (
        lambda layer, x: layer(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], x.shape[0], -1).transpose(0, 1),
        "got others in layer model.layers.1.mlp.up_proj.module",
    ),
    "mixes texts": (lambda layer, x: layer(x) + layer(x).mean(dim=0), "got others in layer"),
    "not causal": (lambda layer, x: layer(x) + layer(x).mean(dim=1, keepdim=True), "got others in layer"),
    "some of the tokens": (experts, "one input per token, [2, 8]"),
    "never called": (lambda layer, x: x.repeat(1, 1, 2)[..., : layer.out_features], "no gradient for"),
    "detached": (lambda layer, x: layer(x).detach(), "no gradient for model.layers.1.mlp.up_proj.module (1 such"),
    "weight only": (lambda layer, x: x @ layer.weight.T, "no gradient for model.layers.1.mlp.up_proj.module (1 such"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_would_give_wrong_gradients_are_refused(name):
    """Before the long step, whatever the number of texts and tokens in its batches."""
    forward, message = REFUSED[name]
    model, shapes = wrapped_llama(forward)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_layers(model, shapes)


def test_a_loss_without_any_tracked_layer_is_refused():
    """The graph has no start then."""
    model, shapes = wrapped_llama(lambda layer, x: layer(x))
    model.model.norm.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(ValueError, match=r"no gradient for model\.layers\.0.* \(14 such"):
        check_layers(model, shapes)


def test_an_output_of_several_tensors_is_refused():
    """As of a router."""
    model = make_model("llama")
    layer = blocks(model)[1].mlp.up_proj
    layer.forward = lambda x: (x, nn.Linear.forward(layer, x))
    with pytest.raises(ValueError, match="got Tensor, tuple; leave it out"):
        check_layers(model, ["model.layers.1.mlp.up_proj"])
