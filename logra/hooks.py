"""Projected per-example gradients from hooks, without forming any weight gradient (arXiv 2405.13954, sec. 3).

Notation: B batch, T tokens, x_t [d_in] layer inputs, d_t [d_out] output gradients, x~_t = P_in x_t, d~_t = P_out d_t.
The projected gradient of one example is G~ = sum_t d~_t x~_t^T, [r_out, r_in], stored row by row as k = r_out * r_in
coordinates. The parameters are frozen, so the autograd graph starts at the first tracked layer.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from logra.experts import DOWN, Pairs, WideLayer, WideSide, track
from logra.projection import Projection, product, wide


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward pass calls sink(x, d) with the output's gradient d.

    The anchor requires a gradient, which starts the graph here: no parameter does.
    """

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, anchor: Tensor, sink: Callable[[Tensor, Tensor], None]):
        ctx.save_for_backward(x)
        ctx.sink = sink
        return output.detach()  # shares memory, and is no view of autograd's: the model may modify it in place

    @staticmethod
    def backward(ctx, d: Tensor):
        ctx.sink(ctx.saved_tensors[0], d)
        return d, None, None, None


@contextmanager
def _exact_sums() -> Iterator[None]:
    """Let a GPU sum 16-bit products in float32 only; by default it may sum parts of long sums in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


class _SideProjection:
    """Projects one side of a layer, or the narrow side of a wide layer; returns the type of its input."""

    def __init__(self, p: Tensor | None):
        self.p = p

    def __call__(self, x: Tensor, pairs: Pairs | None = None) -> Tensor:
        if self.p is not None:
            self.p = self.p.to(x)  # copies at the first call only
            x = x @ self.p.T
        return x


class GradientCapture:
    """Context manager that computes projected per-example gradients (arXiv 2405.13954, sec. 3) and factor sums.

        with GradientCapture(model, projections) as capture:
            losses = example_losses(model, input_ids, targets)
            grads = capture.backward(losses, positions)     # {layer: [B, r_out * r_in]}

    Inside the block the model is in eval mode and its parameters are frozen. On exit both are restored.
    A layer that runs several times in one forward pass gets the sum over its calls.

    Args:
        model: Module that holds the layers (nn.Linear, GPT-2's Conv1D, or wide layers of experts; see experts).
        projections: Layer name -> Projection. Only these layers are tracked.
        grads: Compute G~.
        factors: Sum A = sum x~ x~^T, B = sum d~ d~^T and, with grads, the squares of G~ (see take_factors).
        squares_only: Leave A and B out of the factor sums.
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
        self._factor_sums: dict[str, Tensor] = {}
        self._batch_sums: dict[str, Tensor] = {}  # of the last batch, not committed yet
        names = {name for name, _ in model.named_modules()}
        self._sides = {name: self._project_sides(name, name not in names) for name in projections}

    def _project_sides(self, name: str, is_wide: bool) -> tuple[Callable, Callable]:
        """Return what projects the inputs and the output gradients of a layer; they keep P on the layer's device."""
        p_in, p_out, *_ = self.projections[name]
        if not is_wide:
            return _SideProjection(p_in), _SideProjection(p_out)
        shard = getattr(self.model, "shard_rows", None)
        if name.endswith(DOWN):
            return WideSide(p_in, shard), _SideProjection(p_out)
        return _SideProjection(p_in), WideSide(p_out, shard)

    def __enter__(self) -> Self:
        self._training = {m: m.training for m in self.model.modules()}
        self._trainable = {p: p.requires_grad for p in self.model.parameters()}
        self.model.eval().requires_grad_(False)
        self._exit, modules, wide = ExitStack(), dict(self.model.named_modules()), {}
        self._exit.enter_context(_exact_sums())
        sharing: dict[int, list[nn.Module]] = {}  # a weight may belong to several modules; the layer is named by one
        for module in modules.values():
            sharing.setdefault(id(getattr(module, "weight", None)), []).append(module)
        for name, sides in self._sides.items():
            if name in modules:
                hook = partial(self._hook, name, *sides)
                for module in sharing[id(modules[name].weight)]:
                    self._exit.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            else:  # a wide layer, which bears the name of a parameter
                wide[name] = WideLayer(*sides, partial(self._tap, name))
        self._exit.enter_context(track(self.model, wide))
        return self

    def __exit__(self, *_) -> None:
        self._exit.close()
        for module, training in self._training.items():
            module.training = training
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)
        self._grads, self._factor_sums, self._batch_sums = {}, {}, {}

    def _hook(
        self, name: str, project_in: Callable[[Tensor], Tensor], project_out: Callable[[Tensor], Tensor], layer, inputs,
        keywords, output: Tensor,
    ) -> Tensor:  # fmt: skip
        if not torch.is_grad_enabled():  # some models run their first passes so
            return output
        tensors = (*inputs, *keywords.values(), output)
        if len(tensors) != 2 or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ValueError(
                f"expected one tensor as input and one as output of layer {name}, got "
                f"{', '.join(type(tensor).__name__ for tensor in tensors)}; leave it out with --layers"
            )
        return self._tap(name, output, project_in(tensors[0].detach()), project_out)

    def _tap(self, name: str, output: Tensor, x: Tensor, project_out: Callable[[Tensor], Tensor]) -> Tensor:
        anchor = torch.empty(0, device=output.device, requires_grad=True)
        return _Tap.apply(output, x, anchor, lambda x, d: self._collect(name, x, project_out(d)))

    def _collect(self, name: str, x: Tensor, d: Tensor) -> None:
        """Add one call of one layer: x~ [B, T, r_in] and d~ [B, T, r_out], or [B * T, ...] or [B, 1, T, ...]."""
        examples, tokens = self._positions.shape
        if x.shape[:-1] not in ((examples, tokens), (examples * tokens,), (examples, 1, tokens)):
            raise ValueError(
                f"expected one input per token, {[examples, tokens]}, in layer {name}, got {list(x.shape[:-1])}: "
                "its inputs are some of the tokens, or more; leave the layer out with --layers"
            )
        self._calls[name] += 1
        x, d = (tensor.reshape(*self._positions.shape, -1) for tensor in (x, d))
        if self.want_grads:
            self._add(self._grads, {name: self._reduce(name, x, d)})
        if self.want_factors and not self.squares_only:
            mask = self._positions.to(x.device, x.dtype)[..., None]  # padding and the last token have x but no d
            x, d = (x * mask).flatten(0, 1), d.flatten(0, 1)
            self._add(self._batch_sums, {f"{name}.A": product(x.T, x), f"{name}.B": product(d.T, d)})

    def _reduce(self, name: str, x: Tensor, d: Tensor) -> Tensor:
        """Return the per-example gradients [B, r_out * r_in] of x~ [B, T, r_in] and d~ [B, T, r_out]."""
        return product(d.mT, x).flatten(1)

    def _add(self, sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            sums[key] = sums[key].add_(value) if key in sums else value

    def backward(self, losses: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Run the backward pass of losses [B] and return {layer: [B, r_out * r_in]}, float32 or wider.

        Args:
            losses: One loss per example.
            positions: [B, T] bool, the positions that can carry a gradient: real tokens before the last counted one.

        Raises:
            ValueError: A tracked layer does not take part in the loss, or does not see every token.
        """
        self.commit()
        self._positions, self._grads, self._calls = positions, {}, Counter[str]()
        if losses.requires_grad:
            losses.sum().backward()
        grads, self._grads = self._grads, {}
        missing = [name for name in self.projections if name not in self._calls]
        if missing:
            raise ValueError(
                f"expected every tracked layer to take part in the loss of every batch, got no gradient for "
                f"{missing[0]} ({len(missing)} such layers): the model does not call it for these texts, or cuts its "
                "gradient; leave such layers out with --layers"
            )
        for key, total in self._batch_sums.items():  # <layer>.A and <layer>.B
            if self._calls[key[:-2]] > 1:
                total /= self._calls[key[:-2]] ** 0.5
        if self.want_factors:
            counts = {"examples": torch.tensor(len(losses)), "tokens": positions.sum()}
            self._batch_sums |= {f"{name}.square": grad.square().sum(dim=0) for name, grad in grads.items()} | counts
        return grads

    def commit(self) -> None:
        """Add the last batch to the factor sums. The next backward and take_factors do so too."""
        self._add(self._factor_sums, self._batch_sums)
        self._batch_sums = {}

    def rollback(self) -> None:
        """Discard the batch since the last commit, finished or not."""
        self._batch_sums, self._grads = {}, {}

    def take_factors(self) -> dict[str, Tensor]:
        """Return the factor sums since the last call, on the device, and reset them.

        <layer>.A [r_in, r_in], <layer>.B [r_out, r_out], <layer>.square [r_out * r_in] (with grads), and the counts
        `examples` and `tokens` (int64). A and B of a layer that runs M times in a forward pass are divided by sqrt(M):
        they are sums over M * tokens positions, and B (x) A / tokens then is the K-FAC of all of them (hessian).
        """
        self.commit()
        factors, self._factor_sums = self._factor_sums, {}
        return factors


class ScoreCapture(GradientCapture):
    """Scores examples against queries in the backward pass, layer by layer, and keeps no gradient.

    backward returns {layer: [B, rows + S]}: the dot with each row of the queries, then S self-influences.

    Args:
        model, projections: See GradientCapture.
        queries: Layer -> preconditioned queries [rows, r_out * r_in]; or their low-rank factors (left [rows, R, r_out],
            right [rows, R, r_in]), where a query is the sum of R outer products.
        quadratic_forms: Layer -> S functions z [B, k] -> z^T (C + lambda I)^-1 z, [B].
    """

    def __init__(
        self,
        model: nn.Module,
        projections: dict[str, Projection],
        queries: dict[str, Tensor | tuple[Tensor, Tensor]],
        quadratic_forms: dict[str, list[Callable[[Tensor], Tensor]]],
    ):
        super().__init__(model, projections)
        self.queries, self.quadratic_forms = dict(queries), quadratic_forms

    def _reduce(self, name: str, x: Tensor, d: Tensor) -> Tensor:
        query, forms = self.queries[name], self.quadratic_forms[name]
        if forms and name in self._grads:
            raise ValueError(
                f"expected each layer to run once, got two runs of {name}; use --mode dot, or store the gradients"
            )
        grads = super()._reduce(name, x, d) if forms or not isinstance(query, tuple) else None
        if isinstance(query, tuple):
            x, d = wide(x), wide(d)
            self.queries[name] = query = tuple(factor.to(x) for factor in query)  # copies at the first call only
            left, right = (factor.flatten(0, 1) for factor in query)  # [rows * R, r]
            dots = ((d @ left.T) * (x @ right.T)).sum(dim=1).view(len(x), *query[0].shape[:2]).sum(dim=2)
        else:
            self.queries[name] = query = query.to(grads)
            dots = grads @ query.T
        return torch.cat([dots, *(form(grads)[:, None] for form in forms)], dim=1)


class SquareCapture(GradientCapture):
    """Sums the squares of the gradients over examples, layer by layer, and keeps no gradient.

    take_factors returns <layer>.square [r_out * r_in] and the counts `examples` and `tokens`.
    """

    def _reduce(self, name: str, x: Tensor, d: Tensor) -> Tensor:
        if name in self._grads:
            raise ValueError(f"expected each layer to run once, got two runs of {name}; leave --rerank out")
        return super()._reduce(name, x, d).square().sum(dim=0)

    def backward(self, losses: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Run the backward pass (see GradientCapture.backward) and return nothing."""
        squares = super().backward(losses, positions)
        counts = {"examples": torch.tensor(len(losses)), "tokens": positions.sum()}
        self._batch_sums |= {f"{name}.square": total for name, total in squares.items()} | counts
        return {}


class TokenCapture(GradientCapture):
    """Splits the dots of examples with matrices M by token: d~_t^T M x~_t, in the backward pass.

    `matrices` is layer -> M [P, r_out, r_in], preconditioned queries. backward returns {layer: [B, P, T]}.
    """

    matrices: dict[str, Tensor]

    def _reduce(self, name: str, x: Tensor, d: Tensor) -> Tensor:
        d = wide(d)
        return torch.einsum("bto,poi,bti->bpt", d, self.matrices[name].to(d), wide(x))


class GradientPositions(GradientCapture):
    """Shows which positions have a gradient: backward returns {layer: [B, T]}, the largest |d~_t| of each."""

    def _reduce(self, name: str, x: Tensor, d: Tensor) -> Tensor:
        return d.abs().amax(dim=2)
