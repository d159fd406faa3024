"""The reference of --verify: the method's definitions in float64, in plain code of its own.

It imports nothing of logra. It reads the files of a run as data. Formulas and symbols are those of docs/method.md:
n examples, Q queries, k = r_out * r_in, G full weight gradients, g projected ones, x and d inputs and output gradients.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

DAMPING = {"raw": 0.1, "kfac": 0.01, "ekfac": 0.01}  # docs/method.md, "Damping"
SIGN_DAMPING = 0.2  # with int1, for kfac and ekfac
CODES = {"int8": (8, 0.05), "int4": (4, 0.3), "int1": (1, 0.0)}  # bits, scale / root mean square; int1: mean |g|
SAME_MATRIX = 32  # columns of P^T P that are compared
FEWEST_COLUMNS = 12  # of fewer columns P^T P is alike by chance: two in a million pairs correlate above 0.9 at 8
Sides = dict[str, tuple[Tensor | None, Tensor | None]]  # layer -> (P_in, P_out); None: not projected


class Text(NamedTuple):
    """Token ids, and which of them count in the loss."""

    token_ids: list[int]
    counted: list[bool]


def experts_modules(lm: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of experts, by name."""
    return {
        name: m for name, m in lm.named_modules() if hasattr(m, "_apply_gate") and hasattr(m, "has_post_expert_norm")
    }


def linear_layers(lm: nn.Module) -> list[str]:
    """Return the names of all linear layers but the head. Experts together are one up and one down layer.

    Of layers that share a weight, the first one counts.
    """
    head, experts, names = lm.get_output_embeddings(), experts_modules(lm), []
    parameters = {name for name, _ in lm.named_parameters()}
    for name, module in lm.named_modules():
        if name in experts:
            up = "gate_up_proj" if module.has_gate else "up_proj"
            names += [f"{name}.{key}" for key in ((up,) if module.has_post_expert_norm else (up, "down_proj"))]
        elif isinstance(module, nn.Linear | Conv1D) and module is not head and f"{name}.weight" in parameters:
            names.append(name)
    return names


def weight_of(lm: nn.Module, layer: str) -> nn.Parameter:
    """Return a layer's weight."""
    parent, _, key = layer.rpartition(".")
    return getattr(lm.get_submodule(parent), key) if parent in experts_modules(lm) else lm.get_submodule(layer).weight


def as_matrix(lm: nn.Module, layer: str, weight: Tensor) -> Tensor:
    """Return a layer's weight, or its gradient, in a view that reshapes to [d_out, d_in].

    That of experts is [E, d_up, d], or [d, E, d_ff] for the down layer.
    """
    parent, _, key = layer.rpartition(".")
    experts = experts_modules(lm).get(parent)
    if experts is None:
        return weight.T if isinstance(lm.get_submodule(layer), Conv1D) else weight
    weight = weight.mT if experts.is_transposed else weight
    return weight.transpose(0, 1) if key == "down_proj" else weight


def run_experts(lm: nn.Module, implementation: str) -> None:
    """Let the modules of experts run `all_experts` ("reference"), or the model's own code ("eager")."""
    ALL_EXPERTS_FUNCTIONS.register("reference", all_experts)
    for module in experts_modules(lm).values():
        module.config._experts_implementation = implementation


def all_experts(module: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return an experts module's output [T, d]: the sum over all experts, with weights of 0 where they are not chosen.

    Adds inputs and outputs of the two wide layers to `module.runs`.
    """
    w = hidden.new_zeros(len(hidden), module.num_experts).scatter_add(1, chosen, weights.to(hidden))

    def linear(key: str, product: str, x: Tensor) -> Tensor:
        weight = getattr(module, key)
        y = torch.einsum(product, x, weight.mT if module.is_transposed else weight)
        return y + getattr(module, f"{key}_bias") if module.has_bias else y

    up = "gate_up_proj" if module.has_gate else "up_proj"
    outputs = linear(up, "td,eod->teo", hidden)
    a = module._apply_gate(outputs) if module.has_gate else module.act_fn(outputs)
    y = linear("down_proj", "tei,eoi->teo", a)
    y = module.post_expert_norm(y) if module.has_post_expert_norm else y
    output = (y * w[..., None]).sum(dim=1)
    module.runs += [(up, hidden, outputs), ("down_proj", (a * w[..., None]).flatten(1), output)]
    return output.clone()  # the model may change it in place


def loss(lm: nn.Module, text: Text) -> Tensor:
    """Return the sum of the negative log-likelihoods of a text's counted tokens, each given those before it."""
    ids = torch.tensor([text.token_ids or [0]])
    logits = lm(input_ids=ids, use_cache=False).logits[0]
    counted = [t for t in range(1, len(text.token_ids)) if text.counted[t]]
    return cross_entropy(logits[[t - 1 for t in counted]], ids[0, counted], reduction="sum")


def with_gradient(lm: nn.Module, layers: list[str], text: Text) -> list[str]:
    """Return those of the layers whose module runs on a text, and that get a gradient from its loss.

    But not those that run on several parts of each token's vector, or that return several tensors, as some routers do.
    """
    ran, weights = set[int](), {layer: weight_of(lm, layer) for layer in layers}
    held = {id(weight) for weight in weights.values()}

    def hook(module, arguments, output):
        inputs, tokens = arguments[0].shape[:-1].numel() if arguments else 0, max(1, len(text.token_ids))
        if (inputs <= tokens or inputs % tokens) and isinstance(output, Tensor):
            ran.update(map(id, module.parameters(recurse=False)))

    modules = [m for m in lm.modules() if any(id(p) in held for p in m.parameters(recurse=False))]
    handles = [module.register_forward_hook(hook) for module in modules]
    total = loss(lm, text)
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(total, [*weights.values()], allow_unused=True)
    pairs = zip(weights.items(), grads, strict=True)
    return [layer for (layer, weight), grad in pairs if id(weight) in ran and grad is not None]


def gradients(lm: nn.Module, layers: list[str], text: Text) -> Iterator[tuple[str, Tensor, list[tuple]]]:
    """Yield for one text (layer, G [d_out, d_in], [(x [T, d_in], d [T, d_out]) of each run of the layer]), by autograd.

    d is None where a run has no part in the gradient: in torch.no_grad, or before a detach.
    """
    weights, runs, handles = {weight_of(lm, name): name for name in layers}, [], []

    def hook(module, arguments, keywords, output):
        runs.append((weights[module.weight], [*arguments, *keywords.values()][0], output))
        return output.clone()  # the model may change it in place

    for module in lm.modules():
        if getattr(module, "weight", None) in weights:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    for module in experts_modules(lm).values():
        module.runs = []
    run_experts(lm, "reference")
    total = loss(lm, text)
    run_experts(lm, "eager")
    for handle in handles:
        handle.remove()
    for name, module in experts_modules(lm).items():
        runs += [(f"{name}.{key}", *run) for key, *run in module.runs if f"{name}.{key}" in layers]
    outputs = [output for *_, output in runs if output.requires_grad]
    grads = torch.autograd.grad(total, [*weights, *outputs], allow_unused=True)
    of_output = dict(zip(map(id, outputs), grads[len(layers) :], strict=True))
    of_layer = {name: [] for name in layers}
    for name, x, output in runs:
        d, x = of_output.get(id(output)), x.detach().flatten(0, -2)
        of_layer[name].append((x, None if d is None else d.reshape(len(x), -1)))
    for name, grad in zip(layers, grads, strict=False):
        x, _ = of_layer[name][0]
        yield name, as_matrix(lm, name, grad).reshape(-1, x.shape[1]), of_layer[name]


def projections(folder: Path, layers: list[str]) -> Sides:
    """Return a run's projections, from its file."""
    stored = load_file(folder / "projections.safetensors")
    return {layer: (stored.get(f"{layer}.in"), stored.get(f"{layer}.out")) for layer in layers}


def read_shards(folder: Path, shards: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the stored gradients of a run with so many shards, joined, and its factor sums, added in float64."""
    stored, sums = {}, {}
    for number in range(shards):
        for name, tensor in load_file(folder / f"gradients/{number:05d}.safetensors").items():
            stored[name] = torch.cat([stored[name], tensor]) if name in stored else tensor
        for name, tensor in load_file(folder / f"gradients/{number:05d}.factors.safetensors").items():
            sums[name] = sums.get(name, 0) + tensor.double()
    return stored, sums


def project(matrix: Tensor, p: Tensor | None) -> Tensor:
    """Return the rows of a matrix [., d], projected, [., r]."""
    return matrix if p is None else matrix @ p.to(matrix).T


def unprojected(y: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> Tensor:
    """Return P_out^T Y P_in [d_out, d_in] of Y [r_out, r_in]. Its dot with G is that of Y with the projected G."""
    y = y if p_out is None else p_out.to(y).T @ y
    return y if p_in is None else y @ p_in.to(y)


def projected_sums(lm: nn.Module, sides: Sides, texts: list[Text]) -> dict[str, Tensor]:
    """Return g of each text, <layer> [n, k], and the sums over texts <layer>.A, <layer>.B and <layer>.square, float64.

    A and B are sums over the positions before the last counted token. Their number is `tokens`.
    """
    results: dict[str, list[Tensor]] = {}
    for text in texts:
        last = max((t for t, counts in enumerate(text.counted) if counts), default=0)
        sums = {"tokens": torch.tensor(last), "examples": torch.tensor(1)}
        for layer, grad, runs in gradients(lm, list(sides), text):
            p_in, p_out = sides[layer]
            sums[layer] = g = project(project(grad, p_in).T, p_out).T.flatten()
            runs = [(project(x[:last], p_in), project(d[:last], p_out)) for x, d in runs if d is not None]
            a, b = (sum(y.T @ y for y in side) / len(runs) ** 0.5 for side in zip(*runs, strict=True))
            sums |= {f"{layer}.A": a, f"{layer}.B": b, f"{layer}.square": g.square()}
        for key, value in sums.items():
            results.setdefault(key, []).append(value.double())
    return {key: torch.stack(values) if key in sides else sum(values) for key, values in results.items()}


def random_errors(sides: Sides, rotated: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Return for each P [r, d] of a layer's side two errors.

    How many standard errors its moments are from those of N(0, 1/r), and its largest correlation with a P of the same
    size. A rotated P is U P with an orthogonal U, which keeps the sum of squares and P^T P. So P^T P are compared.
    """
    moments: dict[str, float] = {}
    grams: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for layer, pair in sides.items():
        for name, p in zip((f"{layer}.in", f"{layer}.out"), pair, strict=True):
            if p is None or p.shape[0] == p.shape[1]:
                continue
            z, expected = p.double() * len(p) ** 0.5, {2: (1, 2)} if rotated else {1: (0, 1), 2: (1, 2)}
            if not rotated and z.numel() > 1000:  # of fewer numbers its error is not normal
                expected[4] = (3, 96)
            deviations = [abs((z**n).mean() - m) / (v / z.numel()) ** 0.5 for n, (m, v) in expected.items()]
            moments[name], columns = max(deviations).item(), z[:, :SAME_MATRIX]
            if columns.shape[1] >= FEWEST_COLUMNS:
                above = torch.triu_indices(columns.shape[1], columns.shape[1], 1)
                grams.setdefault(tuple(p.shape), {})[name] = (columns.T @ columns)[above.unbind()]
    shared: dict[str, float] = {}
    for same_size in grams.values():
        others = torch.corrcoef(torch.stack([*same_size.values()])).view(len(same_size), -1).abs().fill_diagonal_(0)
        shared |= dict(zip(same_size, others.amax(dim=1).tolist(), strict=True))
    return moments, shared


def eigenbasis_errors(
    stored: dict[str, Tensor], sides: Sides, sums: dict[str, Tensor], orthonormal: bool
) -> dict[str, float]:
    """Return how far the sample's covariances are from diagonal matrices of the stored eigenvalues, largest first.

    Args:
        stored: The file of the projections.
        sides: The projections.
        sums: See projected_sums.
        orthonormal: P has orthonormal rows: it is not random.
    """
    errors = {}
    for layer, pair in sides.items():
        for side, factor, p in zip(("in", "out"), "AB", pair, strict=True):
            cov, values = sums[f"{layer}.{factor}"], stored[f"{layer}.{side}.values"].double()
            expected = torch.diag(values.sort(descending=True).values) * cov.trace() / values.sum().clamp_min(1e-300)
            rise = values.diff().clamp_min(0).sum() / values.amax().clamp_min(1e-300)
            rows = (p.double() @ p.double().T - torch.eye(len(p))).abs().amax().item() if orthonormal else 0
            errors[f"{layer}.{side}"] = max(relative_error(cov, expected), rise.item(), rows)
    return errors


def stored_errors(stored: dict[str, Tensor], grads: dict[str, Tensor], store_dtype: str) -> dict[str, float]:
    """Return how far stored values are from the rounding rule of docs/method.md, "Few bits".

    For whole numbers, in steps beyond half a step, and for a scale, as a relative error. A float is compared with the
    rounded gradient.

    Args:
        stored: The tensors of a shard.
        grads: The same examples' gradients [n, k] before they were rounded.
        store_dtype: The store type.
    """
    errors = {}
    for layer, g in grads.items():
        if store_dtype not in (*CODES, "none"):
            errors[layer] = relative_error(stored[layer], g.to(getattr(torch, store_dtype)))
            continue
        g, scale = g.double(), stored[f"{layer}.scale"].double()
        bits, step = CODES.get(store_dtype, (0, 0))
        rule = step * g.square().mean(dim=1).sqrt() if step else g.abs().mean(dim=1)
        errors[layer] = relative_error(scale, rule)
        if bits:
            level, largest = levels(stored[layer], bits), max(1, 2 ** (bits - 1) - 1)
            padding, level = level[:, g.shape[1] :], level[:, : g.shape[1]]
            exact = (g / rule.clamp_min(1e-300)[:, None]).clamp(-largest, largest)
            beyond = (level - exact).abs() - 0.5 if bits > 1 else -level * exact
            wrong_padding = (padding != (-(2 ** (bits - 1)) if bits > 1 else -1)).any()  # the code 0
            errors[layer] = max(errors[layer], beyond.amax().item(), float(wrong_padding))
    return errors


def levels(packed: Tensor, bits: int) -> Tensor:
    """Return the levels of packed rows [n, bytes], [n, bytes * 8 / bits] float64, padding included."""
    stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little").reshape(len(packed), -1, bits)
    codes = torch.from_numpy((stream * 2 ** np.arange(bits)).sum(axis=2)).double()
    return codes - 2 ** (bits - 1) if bits > 1 else 2 * codes - 1


def restored(stored: dict[str, Tensor], layer: str, k: int, store_dtype: str) -> Tensor:
    """Return the gradients [n, k] float64 that a shard's tensors stand for."""
    if store_dtype not in CODES:
        return stored[layer].double()
    return levels(stored[layer], CODES[store_dtype][0])[:, :k] * stored[f"{layer}.scale"].double()[:, None]


def hessian(kind: str, z: Tensor, sums: dict[str, Tensor], layer: str, rotated: bool) -> Tensor | None:
    """Return C [k, k] of a layer by its definition; None for the Hessian none.

    Args:
        kind: raw, kfac, ekfac or none.
        z: Gradients [n, k].
        sums: <layer>.A, <layer>.B, <layer>.square and tokens, as in projected_sums.
        layer: Its name.
        rotated: The gradients are stored in the eigenbasis.
    """
    if kind == "none":
        return None
    if kind == "raw":
        return z.T @ z / len(z)
    if kind == "ekfac" and rotated:
        return torch.diag(sums[f"{layer}.square"].double() / len(z))
    a, b = sums[f"{layer}.A"].double(), sums[f"{layer}.B"].double()
    if kind == "kfac":
        tokens = max(int(sums["tokens"]), 1)
        return tokens / len(z) * torch.kron(b / tokens, a / tokens)
    u = torch.kron(torch.linalg.eigh(b)[1], torch.linalg.eigh(a)[1])  # columns are eigenvectors
    return (u * (z @ u).square().mean(dim=0)) @ u.T


def preconditioned(kind: str, z: Tensor, c: Tensor | None, store_dtype: str) -> Tensor:
    """Return (C + lambda I)^-1 z of each row of z [n, k], with the default damping; 0 where C is 0."""
    if c is None:
        return z
    damping = SIGN_DAMPING if store_dtype == "int1" and kind != "raw" else DAMPING[kind]
    lam = damping * c.trace().item() / len(c)
    return torch.linalg.solve(c + lam * torch.eye(len(c)).double(), z.T).T if lam > 0 else torch.zeros_like(z)


def scores(queries: dict[str, Tensor], train: dict[str, Tensor], solved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores [Q, n] of each mode, and the self-influence [n].

    Args:
        queries: Layer -> gradients [Q, k].
        train: Layer -> gradients z [n, k].
        solved: Layer -> (C + lambda I)^-1 z.
    """
    dot = sum(queries[layer].double() @ solved[layer].T for layer in solved)
    own = sum((train[layer] * solved[layer]).sum(dim=1) for layer in solved)
    cosine = torch.where(own > 0, dot / own.clamp_min(1e-300).sqrt(), 0)
    return {"dot": dot, "cosine": cosine, "l2": dot - own / 2, "self-influence": own}


@torch.no_grad()
def fall(lm: nn.Module, direction: dict[str, Tensor], text: Text) -> float:
    """Return how fast a text's loss falls along a step W <- W - t * direction, at t = 0, by a central difference.

    Args:
        lm: The model, in float64 (or float32, where memory is short).
        direction: Layer -> [d_out, d_in].
        text: The text.
    """
    weights = {name: as_matrix(lm, name, weight_of(lm, name)) for name in direction}
    length = sum(step.square().sum() for step in direction.values()).sqrt()
    norm = sum(weight.double().square().sum() for weight in weights.values()).sqrt()
    double = next(iter(weights.values())).dtype == torch.float64
    t = ((1e-4 if double else 3e-3) * norm / length).item()
    losses = []
    for move in (-t, 2 * t, -t):  # back, forth, and to the start
        for name, weight in weights.items():
            weight.sub_(move * direction[name].to(weight).reshape(weight.shape))
        losses.append(loss(lm, text).item())
    return (losses[0] - losses[1]) / (2 * t)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|; 0 if both are 0."""
    actual, expected = (tensor.double().cpu() for tensor in (actual, expected))
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
