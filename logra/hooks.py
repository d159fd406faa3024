"""Projected per-example gradients through hooks, with no weight gradient and no frozen part of the graph.

Notation: B batch, T tokens, x_t layer inputs, d_t output gradients, G~ = sum_t (P_out d_t)(P_in x_t)^T.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from logra.projection import Projection


class _Tap(torch.autograd.Function):
    """Pass a layer's output through; in the backward pass hand its gradient to `sink`. The anchor starts the graph."""

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, anchor: Tensor, sink: Callable[[Tensor, Tensor], None]):
        ctx.save_for_backward(x)
        ctx.sink = sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx, d: Tensor):
        ctx.sink(ctx.saved_tensors[0], d)
        return d, None, None, None


class _Side:
    """One side's projection of a layer, in the dtype and on the device of what it is applied to."""

    def __init__(self, p: Tensor | None):
        self.p = p

    def __call__(self, x: Tensor) -> Tensor:
        if self.p is not None:
            self.p = self.p.to(x)  # at the first call
            x = x @ self.p.T
        return x.to(torch.promote_types(x.dtype, torch.float32))


class GradientCapture:
    """Context manager that yields projected per-example gradients (arXiv 2405.13954, sec. 3) and factor sums.

        with GradientCapture(model, projections) as capture:
            losses = example_losses(model, input_ids, targets)
            grads = capture.backward(losses, positions)     # {layer: [B, r_out * r_in]}

    Inside, the model is in eval mode with its parameters frozen; on leaving, all is as before. A layer that runs
    several times in one forward pass gets the sum over its calls.

    Args:
        model: Module that holds the layers (nn.Linear, or GPT-2's Conv1D).
        projections: Layer name -> Projection; just these layers are tracked.
        grads: Form G~.
        factors: Add up A = sum x~ x~^T, B = sum d~ d~^T and, with grads, the squares of G~ (see take_factors).
        squares_only: Of the factors, leave out A and B.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: dict[str, Projection],
        grads: bool = True,
        factors: bool = False,
        squares_only: bool = False,
    ):
        self.model, self.projections = model, projections
        self.want_grads, self.want_factors, self.squares_only = grads, factors, squares_only
        self._grads: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}  # sums of the last batch, until they are committed

    def __enter__(self) -> Self:
        self._training = {m: m.training for m in self.model.modules()}
        self._trainable = {p: p.requires_grad for p in self.model.parameters()}
        self.model.eval().requires_grad_(False)
        self._handles = []
        for name, projection in self.projections.items():
            hook = self._hook(name, _Side(projection.p_in), _Side(projection.p_out))
            self._handles.append(self.model.get_submodule(name).register_forward_hook(hook))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        for module, training in self._training.items():
            module.training = training
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)
        self._grads, self._sums, self._last = {}, {}, {}

    def _hook(self, name: str, p_in: _Side, p_out: _Side):
        def hook(layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
            anchor = torch.empty(0, device=output.device, requires_grad=True)
            x = p_in(arguments[0].detach())
            return _Tap.apply(output, x, anchor, lambda x, d: self._sink(name, x, p_out(d)))

        return hook

    def _sink(self, name: str, x: Tensor, d: Tensor) -> None:
        """Take x~ [B, T, r_in] and d~ [B, T, r_out], or [B * T, ...], of one call of one layer."""
        if x.shape[:-1].numel() != self._positions.numel():
            raise ValueError(
                f"expected an input for each of {list(self._positions.shape)} tokens in layer {name}, got "
                f"{list(x.shape[:-1])}, as in a mixture of experts; leave it out with --layers"
            )
        x, d = (t.reshape(*self._positions.shape, -1) for t in (x, d))
        if self.want_grads:
            grad = self._reduce(name, x, d)
            self._grads[name] = self._grads[name] + grad if name in self._grads else grad
        if self.want_factors and not self.squares_only:
            real = self._positions.to(x.device, x.dtype)[..., None]  # padding and the last token have x but no d
            x, d = (x * real).flatten(0, 1), d.flatten(0, 1)
            self._add(self._last, {f"{name}.A": x.T @ x, f"{name}.B": d.T @ d})

    def _reduce(self, name: str, x: Tensor, d: Tensor) -> Tensor:
        """Return what is kept of x~ [B, T, r_in] and d~ [B, T, r_out]: the gradients [B, r_out * r_in]."""
        return torch.bmm(d.mT, x).flatten(1)

    def _add(self, sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            sums[key] = sums[key].add_(value) if key in sums else value

    def backward(self, losses: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Run the backward pass of losses [B] and return {layer: [B, r_out * r_in]}, float32 or wider.

        Args:
            losses: One loss an example, not yet summed.
            positions: [B, T] bool, the positions that can carry a gradient: real tokens before the last counted one.
        """
        self.commit()
        self._positions, self._grads = positions, {}
        losses.sum().backward()
        grads, self._grads = self._grads, {}
        missing = set(self.projections) - set(grads) if self.want_grads else set()
        if missing:
            raise ValueError(
                f"expected every tracked layer to take part in the loss, got no gradient for {sorted(missing)[0]} "
                f"({len(missing)} such layers); leave them out with --layers"
            )
        if self.want_factors:
            counts = {"examples": torch.tensor(len(losses)), "tokens": positions.sum()}
            self._last |= {f"{name}.square": grad.square().sum(dim=0) for name, grad in grads.items()} | counts
        return grads

    def commit(self) -> None:
        """Count the last batch in the factor sums for good; the next one, and take_factors, do so too."""
        self._add(self._sums, self._last)
        self._last = {}

    def rollback(self) -> None:
        """Leave the batch since the last commit, finished or not, out of the factor sums."""
        self._last, self._grads = {}, {}

    def take_factors(self) -> dict[str, Tensor]:
        """Return the sums since the last call, on the device, and start anew.

        <layer>.A [r_in, r_in], <layer>.B [r_out, r_out], <layer>.square [r_out * r_in] (with grads), and the counts
        `examples` and `tokens` (int64).
        """
        self.commit()
        factors, self._sums = self._sums, {}
        return factors


class ScoreCapture(GradientCapture):
    """Scores of examples against queries, layer by layer in the backward pass, which keeps no gradient.

    backward returns {layer: [B, rows + S]}: the dots with each row of the queries, and S self-influences.

    Args:
        model, projections: As for GradientCapture.
        queries: Layer -> preconditioned queries [rows, r_out * r_in], or their factors (left [rows, R, r_out], right
            [rows, R, r_in]) of which a query is the sum of R outer products.
        own: Layer -> S functions z [B, k] -> z^T (C + lambda I)^-1 z, [B].
    """

    def __init__(
        self,
        model: nn.Module,
        projections: dict[str, Projection],
        queries: dict[str, Tensor | tuple[Tensor, Tensor]],
        own: dict[str, list[Callable[[Tensor], Tensor]]],
    ):
        super().__init__(model, projections)
        self.queries, self.own = queries, own

    def _reduce(self, name: str, x: Tensor, d: Tensor) -> Tensor:
        if self.own[name] and name in self._grads:
            raise ValueError(f"expected layers that run once, got {name} twice; use --mode dot, or store the gradients")
        query, dots, grads = self.queries[name], None, None
        if isinstance(query, tuple):
            left, right = (side.flatten(0, 1).to(x) for side in query)  # [rows * R, r]
            dots = ((d @ left.T) * (x @ right.T)).sum(dim=1).view(len(x), *query[0].shape[:2]).sum(dim=2)
            if self.own[name]:
                grads = super()._reduce(name, x, d)
        else:
            grads = super()._reduce(name, x, d)
            dots = grads @ query.to(grads).T
        return torch.cat([dots, *(solver(grads)[:, None] for solver in self.own[name])], dim=1)


class TokenCapture(GradientCapture):
    """Splits the dots of examples with some matrices by token: d~_t^T M x~_t, in the backward pass.

    `matrices` is layer -> [P, r_out, r_in], of preconditioned queries; backward returns {layer: [B, P, T]}.
    """

    matrices: dict[str, Tensor]

    def _reduce(self, name: str, x: Tensor, d: Tensor) -> Tensor:
        return torch.einsum("bto,poi,bti->bpt", d, self.matrices[name].to(d), x)
