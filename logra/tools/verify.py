"""Compare the pipeline with a plain loop of torch.autograd in float64, on the user's own model and data.

Notation: n train examples, k = r_out * r_in, G full weight gradients, x_t and d_t inputs and output gradients, A, B, C
and lambda as in hessian. Sides are projected to rank 64 at most, so that C [k, k] can be built and solved.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from logra import hessian, influence, projection, store
from logra.hooks import GradientCapture
from logra.inputs import model
from logra.inputs.documents import load_documents
from logra.inputs.examples import examples_in_memory
from logra.loss import IGNORE
from logra.projection import Projection
from logra.quantise import FLOAT_DTYPES
from logra.runtime.memory import available_memory
from logra.runtime.progress import bar, say
from logra.runtime.settings import Execution, RunSettings
from logra.stages.gradients import Extractor
from logra.stages.open_run import load_model

MAX_RANK = 64
SHORT_TEXT = 8  # tokens
CHECKED_LAYERS = 3  # layers whose C is built: the first, the middle and the last one
DAMPING = 0.1
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}  # by the model's dtype; factor sums too
HESSIAN_TOLERANCE = 1e-3  # of (C + lambda I)^-1 g and of scores, from the same gradients
COPY_BYTES = 24  # bytes per parameter that a float64 copy of the model and its gradients need


def verify(settings: RunSettings, execution: Execution, examples: int, cache_dir: str | None) -> None:
    """Print how far the pipeline is from the plain loop, on the first examples of a command line of extract_log.py.

    Raises:
        ValueError: The difference is larger than rounding explains.
    """
    if settings.quantize:
        raise ValueError(
            "expected --verify without --quantize, got both, and quantised weights have no gradient; leave one out"
        )
    lm, tokenizer, _ = load_model(settings, execution)
    shapes = model.choose_layers(lm, settings.mlp_only, settings.layers)
    rank_in, rank_out = (min(rank or MAX_RANK, MAX_RANK) for rank in (settings.rank_in, settings.rank_out))
    projected = projection.projected_shapes(shapes, rank_in, rank_out)
    projections = projection.draw(shapes, projected, settings.seed)
    say_untracked(lm, shapes)

    documents = load_documents(
        settings.data_name, settings.data_config, settings.data_split, cache_dir, settings.text_column
    )
    rows = examples_in_memory(documents, tokenizer, replace(settings, max_examples=examples))[:]
    token_ids = rows["input_ids"]
    counted = rows.get("counted") or [[True] * len(ids) for ids in token_ids]
    with GradientCapture(lm, projections, factors=True) as capture:
        grads, sums = Extractor(lm, capture, sum(map(len, token_ids))).gradients(token_ids, counted).wait()
    fits = COPY_BYTES * sum(p.numel() for p in lm.parameters()) < available_memory()
    dtype = torch.float64 if fits else torch.float32
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    reference = model.load_model(settings.model_name, FLOAT_DTYPES[settings.dtype], "cpu", **hub)  # the same rounding
    expected = plain_loop(reference.to(dtype).requires_grad_(), projections, token_ids, counted)
    errors = {key: relative_error((grads | sums)[key], value) for key, value in expected.items()}
    length_errors = together_and_alone(lm, projections, [id for ids in token_ids for id in ids], settings.block_size)

    checked_layers = list(shapes)[:: max(1, (len(shapes) - 1) // (CHECKED_LAYERS - 1))]
    source = FewExamples(projected, grads, sums)
    hessian_errors = {kind: check_hessian(source, kind, checked_layers) for kind in ("raw", "kfac", "ekfac")}
    say(f"{len(token_ids)} examples, model in {settings.dtype}, reference in {str(dtype)[6:]}; relative errors:")
    report(errors, length_errors, list(shapes), GRADIENT_TOLERANCE[settings.dtype], hessian_errors, len(checked_layers))


def say_untracked(lm: nn.Module, shapes: projection.Shapes) -> None:
    """Print how many layers are tracked, and which kinds are not."""
    untracked = [name for name in model.linear_layers(lm) if name not in shapes]
    kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in untracked)
    say(f"{len(shapes)} layers are tracked, {len(untracked)} are not: {', '.join(kinds)}")


def together_and_alone(
    lm: nn.Module, projections: dict[str, Projection], tokens: list[int], block_size: int
) -> dict[str, float]:
    """Return the relative difference of each layer's gradients between texts of very different lengths in one batch,
    and each of them alone.

    Args:
        lm, projections: The model, and its layers.
        tokens: What the texts are made of.
        block_size: Tokens of the longest text. One text is just above each boundary below (model.rope_boundaries).
    """
    boundaries = [length + 1 for length in model.rope_boundaries(lm.config) if length < block_size]
    texts = [(tokens * length)[:length] for length in {min(SHORT_TEXT, block_size), block_size, *boundaries}]
    with GradientCapture(lm, projections) as capture:
        together, alone = (
            Extractor(lm, capture, len(texts) * block_size, size).gradients(texts).wait()[0] for size in (None, 1)
        )
    return {layer: relative_error(together[layer], alone[layer]) for layer in projections}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|; 0 if both are 0."""
    actual, expected = (tensor.double().cpu() for tensor in (actual, expected))
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def plain_loop(
    lm: nn.Module, projections: dict[str, Projection], token_ids: list[list[int]], counted: list[list[bool]]
) -> dict[str, Tensor]:
    """Return what GradientCapture computes, <layer> [n, k], <layer>.A and <layer>.B, one example at a time, float64."""
    results: dict[str, list[Tensor]] = {}
    for ids, counts in zip(bar(token_ids, desc="plain loop", unit="example"), counted, strict=True):
        last = max((t for t, counts_here in enumerate(counts) if counts_here), default=0)  # no gradient from here on
        per_layer = autograd_gradients(lm, list(projections), ids, counts)
        for (layer, projected), (grad, x, d) in zip(projections.items(), per_layer, strict=True):
            p_in, p_out = (None if p is None else p.to(grad) for p in (projected.p_in, projected.p_out))
            grad = grad if p_in is None else grad @ p_in.T
            grad = grad if p_out is None else p_out @ grad
            x, d = (side[:last] if p is None else side[:last] @ p.T for side, p in ((x, p_in), (d, p_out)))
            for key, value in ((layer, grad.flatten()), (f"{layer}.A", x.T @ x), (f"{layer}.B", d.T @ d)):
                results.setdefault(key, []).append(value.double())
    return {key: torch.stack(values) if key in projections else sum(values) for key, values in results.items()}


def autograd_gradients(
    lm: nn.Module, layers: list[str], token_ids: list[int], counted: list[bool]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (G [d_out, d_in], x [T, d_in], d [T, d_out]) of each layer for one example, by autograd."""
    inputs, outputs, handles = {}, {}, []
    for name in layers:

        def hook(module, arguments, output, name=name):
            inputs[name], outputs[name] = arguments[0].detach(), output

        handles.append(lm.get_submodule(name).register_forward_hook(hook))
    modules = [lm.get_submodule(name) for name in layers]
    weights = [module.weight for module in modules]
    ids = torch.tensor([token_ids], device=weights[0].device)
    targets = ids[0, 1:].masked_fill(~torch.tensor(counted[1:], dtype=torch.bool, device=ids.device), IGNORE)
    logits = lm(input_ids=ids, use_cache=False).logits[0, :-1]
    total = cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    grads = torch.autograd.grad(total, [*weights, *(outputs[name] for name in layers)])
    for handle in handles:
        handle.remove()
    for name, module, grad, d in zip(layers, modules, grads, grads[len(layers) :], strict=False):
        yield grad.T if isinstance(module, Conv1D) else grad, inputs[name].flatten(0, -2), d.flatten(0, -2)


class FewExamples:
    """The gradients and factor sums of a few examples, as one shard in memory (see hessian.GradientSource)."""

    def __init__(self, projected: projection.Shapes, grads: dict[str, Tensor], sums: dict[str, Tensor]):
        self.projected, self.grads, self.sums = projected, grads, sums
        self.examples = len(next(iter(grads.values())))
        self.shards = [range(self.examples)]

    def read(self, name: str, shards: Iterable[int], kind: str = "gradients") -> Iterator[Tensor]:
        """Yield a layer's gradients [n, k], or a factor sum."""
        yield from ((self.grads if kind == "gradients" else self.sums)[name] for _ in shards)

    def preconditioner(self, kind: str, layer: str) -> hessian.Preconditioner:
        """Return the pipeline's (C + lambda I)^-1 of a layer."""
        one_layer = FewExamples({layer: self.projected[layer]}, self.grads, self.sums)
        layout = store.hessian_layout(kind, one_layer.projected, self.examples, False)
        tensors = hessian.statistics(kind, one_layer, range(1), lambda tensor: tensor, False, "cpu")
        stats = {key.removeprefix(f"{layer}."): tensor for key, tensor in zip(layout, tensors, strict=True)}
        return hessian.preconditioner(kind, stats, DAMPING, None, self.grads[layer] if "gram" in stats else None)

    def dense(self, kind: str, layer: str) -> Tensor:
        """Return C [k, k] in float64, by its definition."""
        g = self.grads[layer].double()
        if kind == "raw":
            return g.T @ g / len(g)
        a, b = self.sums[f"{layer}.A"].double(), self.sums[f"{layer}.B"].double()
        if kind == "kfac":
            return torch.kron(b, a) / (max(self.sums["tokens"].item(), 1) * len(g))
        u = torch.kron(torch.linalg.eigh(b)[1], torch.linalg.eigh(a)[1])
        return (u * (g @ u).square().mean(dim=0)) @ u.T


def check_hessian(source: FewExamples, kind: str, layers: list[str]) -> tuple[float, float]:
    """Return the largest relative errors of (C + lambda I)^-1 g, and that of the cosine scores [n, n] of all layers."""
    largest_error = 0.0
    dots, expected_dots, self_influence, expected_self_influence = 0.0, 0.0, 0.0, 0.0
    for layer in layers:
        g, solver, c = source.grads[layer], source.preconditioner(kind, layer), source.dense(kind, layer)
        lam = max(DAMPING * c.trace().item() / len(c), 1e-300)  # C may be 0
        expected = torch.linalg.solve(c + lam * torch.eye(len(c)).double(), g.double().T).T
        solved = solver.solve(g)
        largest_error = max(largest_error, relative_error(solved, expected))
        dots, expected_dots = dots + solved @ g.T, expected_dots + expected @ g.double().T
        self_influence = self_influence + solver.quadratic(g)
        expected_self_influence = expected_self_influence + (expected * g.double()).sum(dim=1)
    scores = influence.scores_of_mode(dots, self_influence, "cosine")
    return largest_error, relative_error(
        scores, influence.scores_of_mode(expected_dots, expected_self_influence, "cosine")
    )


def report(
    errors: dict[str, float], length_errors: dict[str, float], layers: list[str], tolerance: float,
    hessian_errors: dict, checked_layers: int,
) -> None:  # fmt: skip
    """Print the errors, and raise a ValueError if one is too large. NaN is too large."""
    gradient_errors = {layer: errors[layer] for layer in layers}
    factor_errors = {key: error for key, error in errors.items() if key not in gradient_errors}
    failed = []
    for what, group in (
        ("gradients", gradient_errors), ("factor sums", factor_errors),
        ("gradients of texts of very different lengths, together against alone", length_errors),
    ):  # fmt: skip
        failed += [name for name, error in group.items() if not error < tolerance]
        worst = max(group, key=group.get)
        verdict = "pass" if group[worst] < tolerance else "FAIL"
        say(f"  {verdict}  {len(group)} {what}: {group[worst]:.1e} at most, in {worst}")
    for kind, (solution_error, score_error) in hessian_errors.items():
        passed = solution_error < HESSIAN_TOLERANCE and score_error < HESSIAN_TOLERANCE
        failed += [] if passed else [f"the Hessian {kind}"]
        numbers = f"products {solution_error:.1e}, scores {score_error:.1e}"
        say(f"  {'pass' if passed else 'FAIL'}  Hessian {kind} of {checked_layers} layers: {numbers}")
    if failed:
        raise ValueError(
            f"expected relative errors below {tolerance} (gradients, factors) and {HESSIAN_TOLERANCE} (Hessian), got "
            f"more in {len(failed)}: {', '.join(failed[:3])}; leave these layers out with --layers, and report them"
        )
