"""Check the pipeline on the user's own model and data, against a plain loop of torch.autograd in float64.

Notation: n train examples, k = r_out * r_in, G full weight gradients, x_t and d_t inputs and output gradients, A, B, C
and lambda as in hessian. Sides are projected to rank 64 at most, so that C [k, k] can be built and inverted.
"""

import copy
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from logra import hessian, influence, projection, store
from logra.hooks import GradientCapture
from logra.inputs import model
from logra.inputs.documents import load_documents
from logra.inputs.examples import build_examples
from logra.loss import IGNORE
from logra.runtime.flags import RunFlags
from logra.runtime.memory import available_memory
from logra.runtime.progress import bar, say
from logra.runtime.settings import Execution, RunSettings
from logra.stages.gradients import Extractor
from logra.stages.open_run import load_model, new_settings

RANK = 64
CHECKED_LAYERS = 3  # layers whose C is built: the first, the middle and the last one
DAMPING = 0.1
GRADIENT_TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 0.1,
    "float16": 0.05,
}  # of gradients and factors, by the model's dtype
VERDICT = {True: "pass", False: "FAIL"}
HESSIAN_TOLERANCE = 1e-3  # of the Hessian's products and of scores, from the same gradients


def relative(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, 0 where both are 0."""
    found, expected = (t.double().cpu() for t in (found, expected))
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def autograd_gradients(
    lm: nn.Module, layers: list[str], token_ids: list[int], counted: list[bool]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield (G [d_out, d_in], x [T, d_in], d [T, d_out]) of each layer for one example, by autograd."""
    inputs, outputs, handles = {}, {}, []
    for name in layers:

        def hook(module, arguments, output, name=name):
            inputs[name], outputs[name] = arguments[0].detach(), output

        handles.append(lm.get_submodule(name).register_forward_hook(hook))
    modules = [lm.get_submodule(name) for name in layers]
    modules = [getattr(module, "base_layer", module) for module in modules]  # peft's adapters are added up outside
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
    """A few examples' gradients and factor sums, as hessian.statistics takes them (see hessian.GradientSource)."""

    def __init__(self, projected: projection.Shapes, grads: dict[str, Tensor], sums: dict[str, Tensor]):
        self.projected, self.grads, self.sums = projected, grads, sums
        self.examples = len(next(iter(grads.values())))
        self.shards = [range(self.examples)]

    def read(self, name: str, shards: Iterable[int], kind: str = "gradients") -> Iterator[Tensor]:
        """Yield a layer's gradients [n, k], or a factor sum."""
        yield from ((self.grads if kind == "gradients" else self.sums)[name] for _ in shards)

    def preconditioner(self, kind: str, layer: str) -> hessian.Preconditioner:
        """Return the pipeline's (C + lambda I)^-1 of a layer."""
        one = FewExamples({layer: self.projected[layer]}, self.grads, self.sums)
        layout = store.hessian_layout(kind, one.projected, self.examples, False)
        found = hessian.statistics(kind, one, range(1), lambda tensor: tensor, False, "cpu")
        stats = {key.removeprefix(f"{layer}."): tensor for key, tensor in zip(layout, found, strict=True)}
        return hessian.preconditioner(kind, stats, DAMPING, None, self.grads[layer] if "gram" in stats else None)

    def dense(self, kind: str, layer: str) -> Tensor:
        """Return C [k, k] in float64, by its definition."""
        g = self.grads[layer].double()
        if kind == "raw":
            return g.T @ g / len(g)
        a, b = self.sums[f"{layer}.A"].double(), self.sums[f"{layer}.B"].double()
        tokens = max(self.sums["tokens"].item(), 1)
        if kind == "kfac":
            return torch.kron(b, a) / (tokens * len(g))
        u = torch.kron(torch.linalg.eigh(b)[1], torch.linalg.eigh(a)[1])
        return (u * (g @ u).square().mean(dim=0)) @ u.T


def check_hessian(few: FewExamples, kind: str, layers: list[str]) -> tuple[float, float]:
    """Return the largest relative errors of (C + lambda I)^-1 g and of the cosine scores of the layers, n by n."""
    worst, found, expected, selves = 0.0, 0.0, 0.0, [0.0, 0.0]
    for layer in layers:
        g, solver, c = few.grads[layer], few.preconditioner(kind, layer), few.dense(kind, layer)
        lam = max(DAMPING * c.trace().item() / len(c), 1e-300)  # C may be 0
        exact = torch.linalg.solve(c + lam * torch.eye(len(c)).double(), g.double().T).T
        solved = solver.solve(g)
        worst = max(worst, relative(solved, exact))
        found, expected = found + solved @ g.T, expected + exact @ g.double().T
        selves = [selves[0] + solver.quadratic(g), selves[1] + (exact * g.double()).sum(dim=1)]
    scores = (
        influence.scores_of_mode(dots, own, "cosine") for dots, own in zip((found, expected), selves, strict=True)
    )
    return worst, relative(*scores)


def plain_sums(
    lm: nn.Module, projections: dict[str, projection.Projection], token_ids: list[list[int]], counted: list[list[bool]]
) -> dict[str, Tensor]:
    """Return what GradientCapture computes, <layer> [n, k], <layer>.A and <layer>.B, by the plain loop, in float64."""
    found: dict[str, list[Tensor]] = {}
    for ids, counts in zip(bar(token_ids, desc="plain loop", unit="example"), counted, strict=True):
        last = max((t for t, counts_ in enumerate(counts) if counts_), default=0)  # from here on there is no gradient
        for layer, (grad, x, d) in zip(
            projections, autograd_gradients(lm, list(projections), ids, counts), strict=True
        ):
            p_in, p_out = (None if p is None else p.to(grad) for p in projections[layer][:2])
            grad = grad if p_in is None else grad @ p_in.T
            grad = grad if p_out is None else p_out @ grad
            x, d = (side[:last] if p is None else side[:last] @ p.T for side, p in ((x, p_in), (d, p_out)))
            for key, part in ((layer, grad.flatten()), (f"{layer}.A", x.T @ x), (f"{layer}.B", d.T @ d)):
                found.setdefault(key, []).append(part.double())
    return {key: torch.stack(parts) if key in projections else sum(parts) for key, parts in found.items()}


def verify(
    flags: RunFlags, execution: Execution, examples: int, cache_dir: str | None, accelerator: Accelerator
) -> None:
    """Print how far the pipeline is from the plain loop, on some examples of a command line of extract_log.py.

    Raises:
        ValueError: It is farther than rounding explains.
    """
    settings = new_settings(flags, execution, accelerator)
    lm, tokenizer, _ = load_model(settings, execution, accelerator.device)
    shapes = model.choose_layers(lm, settings.mlp_only, settings.layers)
    ranks = (min(rank or RANK, RANK) for rank in (settings.rank_in, settings.rank_out))
    projected = projection.projected_shapes(shapes, *ranks)
    projections = projection.draw(shapes, projected, settings.seed)
    others = [name for name, m in lm.named_modules() if isinstance(m, nn.Linear | Conv1D) and name not in shapes]
    kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in others)
    say(f"{len(shapes)} layers are tracked, {len(others)} are not: {', '.join(kinds)}")
    token_ids, counted = first_examples(settings, tokenizer, examples, cache_dir)
    with GradientCapture(lm, projections, factors=True) as capture:
        grads, sums = Extractor(lm, capture, sum(map(len, token_ids))).gradients(token_ids, counted).wait()
    size = sum(p.numel() for p in lm.parameters())
    wide = torch.float64 if 24 * size < available_memory() else torch.float32
    expected = plain_sums(copy.deepcopy(lm).to("cpu", wide).requires_grad_(), projections, token_ids, counted)
    errors = {key: relative((grads | sums)[key], value) for key, value in expected.items()}
    few, chosen = (
        FewExamples(projected, grads, sums),
        list(shapes)[:: max(1, (len(shapes) - 1) // (CHECKED_LAYERS - 1))],
    )
    dense = {kind: check_hessian(few, kind, chosen) for kind in hessian.KINDS[:3]}
    say(f"{len(token_ids)} examples, model in {settings.dtype}, reference in {str(wide)[6:]}; relative errors:")
    report(errors, list(shapes), GRADIENT_TOLERANCE[settings.dtype], dense, len(chosen))


def first_examples(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, examples: int, cache_dir: str | None
) -> tuple[list[list[int]], list[list[bool]]]:
    """Return token ids, and which of them count, of the first examples of a run's data."""
    documents = load_documents(settings.data_name, settings.data_config, settings.data_split, cache_dir)
    with tempfile.TemporaryDirectory() as work:
        few = replace(settings, max_examples=examples)
        rows = build_examples(documents, tokenizer, few, None, Path(work))[0][:]
    return rows["input_ids"], rows.get("counted") or [[True] * len(ids) for ids in rows["input_ids"]]


def report(errors: dict[str, float], layers: list[str], limit: float, dense: dict, chosen: int) -> None:
    """Print the errors, and raise a ValueError where one is too large."""
    failed = [name for name, error in errors.items() if not error < limit]
    factors = [key for key in errors if key not in layers]
    for what, names in (("gradients", layers), ("factor sums", factors)):
        worst = max(names, key=errors.get)
        say(f"  {VERDICT[errors[worst] < limit]}  {len(names)} {what}: {errors[worst]:.1e} at most, in {worst}")
    for kind, found in dense.items():
        failed += [] if max(found) < HESSIAN_TOLERANCE else [f"the Hessian {kind}"]
        text = f"Hessian {kind} of {chosen} layers: products {found[0]:.1e}, scores {found[1]:.1e}"
        say(f"  {VERDICT[max(found) < HESSIAN_TOLERANCE]}  {text}")
    if failed:
        raise ValueError(
            f"expected relative errors below {limit} (gradients, factors) and {HESSIAN_TOLERANCE} (Hessian), got more in "
            f"{len(failed)}: {', '.join(failed[:3])}; leave these layers out with --layers, and tell us of the model"
        )
