"""The slow truth: float64, one example at a time, torch.autograd's full weight gradients, dense algebra."""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def full_gradient(model, layers: dict, token_ids: list[int], start: int = 1) -> dict[str, Tensor]:
    """Return G [d_out, d_in] of each layer for one example's summed next-token loss, in float64.

    A layer of experts has the name of its parameter [E, ., .]. Side by side, its experts are one wide layer.
    """
    model = copy.deepcopy(model).double().eval()
    parameters = dict(model.named_parameters())
    if experts := [name for name in layers if name in parameters]:
        model.set_experts_implementation("eager")
    weights = {name: parameters[name if name in experts else f"{name}.weight"] for name in layers}
    ids = torch.tensor([token_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    loss = F.cross_entropy(logits[start - 1 : -1].double(), ids[0, start:], reduction="sum")
    grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for name in experts:
        of_experts = [g.T if model.get_submodule(name.rpartition(".")[0]).is_transposed else g for g in grads[name]]
        grads[name] = torch.cat(of_experts, dim=1 if name.endswith("down_proj") else 0)
    transposed = {name for name in layers if name not in experts and isinstance(model.get_submodule(name), Conv1D)}
    return {name: grad.T if name in transposed else grad for name, grad in grads.items()}


def example_loss(model, token_ids: list[int], start: int = 1) -> float:
    """Return one example's summed next-token loss in float64."""
    model = copy.deepcopy(model).double().eval()
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum").item()


def project(grad: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> Tensor:
    """Return (P_out (x) P_in) vec(G) with an explicit Kronecker product, [r_out * r_in]."""
    p_in = torch.eye(grad.shape[1], dtype=torch.float64) if p_in is None else p_in.double()
    p_out = torch.eye(grad.shape[0], dtype=torch.float64) if p_out is None else p_out.double()
    return torch.kron(p_out, p_in) @ grad.flatten()


def layer_io(model, layers: dict, token_ids: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each layer's inputs [T, d_in] and output gradients [T, d_out] of one example, in float64."""
    model, seen, handles = copy.deepcopy(model).double().eval(), {}, []
    for name in layers:

        def hook(module, args, output, name=name):
            output.retain_grad()
            seen[name] = (args[0].detach()[0], output)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    ids = torch.tensor([token_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
    return {name: (x, output.grad[0]) for name, (x, output) in seen.items()}


def eigenvectors(cov: Tensor) -> Tensor:
    """Return eigenvectors as columns, in no particular order or sign."""
    return torch.linalg.eigh(cov.double())[1]


def dense_hessian(kind: str, grads: Tensor, xs: list[Tensor], ds: list[Tensor]) -> Tensor:
    """Return C [k, k] of one layer.

    Args:
        kind: raw, kfac, ekfac.
        grads: [N, k] projected gradients.
        xs, ds: Projected inputs [T, r_in] and output gradients [T, r_out] of each example, at real positions but
            the last.
    """
    if kind == "raw":
        return grads.T @ grads / len(grads)
    tokens = sum(len(x) for x in xs)
    a = sum(x.T @ x for x in xs) / tokens
    b = sum(d.T @ d for d in ds) / tokens
    if kind == "kfac":
        return tokens / len(grads) * torch.kron(b, a)
    u = torch.kron(eigenvectors(b), eigenvectors(a))
    return u @ torch.diag((grads @ u).square().mean(dim=0)) @ u.T


def scores(queries: Tensor, train: Tensor, cov: Tensor, lam: float, mode: str) -> Tensor:
    """Return [Q, N] scores of one layer's dense C by an explicit inverse."""
    inverse = torch.linalg.inv(cov + lam * torch.eye(len(cov), dtype=torch.float64))
    dots = queries @ inverse @ train.T
    own = torch.einsum("nk,kl,nl->n", train, inverse, train)
    return {"dot": dots, "cosine": dots / own.sqrt(), "l2": dots - own / 2}[mode]
