"""Mixtures of experts: the experts of a layer together are one wide, sparse linear layer.

Notation: T tokens, E experts, K experts of a token, S = T * K pairs of a token and one of its experts, ordered by
expert; d hidden size, d_up outputs of an expert's first matrix, d_ff inputs of its second; w routing weights.
`up` is a linear layer from d to E * d_up, and `down` one from E * d_ff to d. The experts that a token does not use have
no gradient in up, and no input in down. So, with P_out[:, e] and P_in[:, e] the columns of expert e:
    up:    x~_t = P_in x_t                                   d~_t = sum over t's experts of P_out[:, e] d_(t,e)
    down:  x~_t = sum over t's experts of w_(t,e) P_in[:, e] a_(t,e)      d~_t = P_out d_t
The projected gradients of a wide layer take the bytes of a dense one, whatever the number of experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from logra.projection import Shapes, wide

IMPLEMENTATION = "logra"  # its name in transformers
DOWN = "down_proj"
ALIGNED_BYTES = 16  # rows of the operands of torch's grouped product


class Pairs:
    """The S pairs of a token and one of its experts, ordered by expert.

    Args:
        experts: [T, K], the experts of each token.
        count: E.
    """

    def __init__(self, experts: Tensor, count: int):
        self.tokens, self.per_token = experts.shape
        self.expert, self.order = experts.flatten().sort(stable=True)
        numbers = torch.arange(count, device=experts.device)
        self.ends = torch.searchsorted(self.expert, numbers, right=True, out_int32=True)  # of each expert's pairs

    def multiply(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Return the product of each row of x [S, i] with the block of its expert, of blocks [E, i, o]: [S, o]."""
        if isinstance(x, FakeTensor):
            return x @ blocks[0]  # only shapes count (tools.estimate), and torch's rule for them refuses float32
        if x.dtype != torch.float64 and all(size * x.element_size() % ALIGNED_BYTES == 0 for size in blocks.shape[1:]):
            return F.grouped_mm(x, blocks, offs=self.ends)
        return torch.ops.transformers.grouped_mm_fallback(x, blocks, self.ends)  # a loop over experts

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the experts of each token, of values [S, r]: [T, r]."""
        of_tokens = torch.empty_like(values).index_copy(0, self.order, values)
        return of_tokens.view(self.tokens, self.per_token, -1).sum(dim=1)

    def spread(self, values: Tensor) -> Tensor:
        """Return values [S, i] at the places of their experts in rows of the wide layer: [T, E * i]."""
        wide = values.new_zeros(self.tokens, len(self.ends), values.shape[1])
        return wide.index_put((self.order // self.per_token, self.expert), values, accumulate=True).flatten(1)


class WideSide:
    """Projects the wide side of a layer of experts, expert by expert. Returns float32 or wider.

    Args:
        p: P [r, E * i], or None: not projected.
        shard: Keeps a tensor, and returns a function that returns it again (runtime.fsdp.shard_rows).
    """

    def __init__(self, p: Tensor | None, shard: Callable[[Tensor], Callable[[], Tensor]] | None = None):
        self.p, self.shard = p, shard
        self.kind: tuple[torch.dtype, torch.device] | None = None

    def __call__(self, x: Tensor, pairs: Pairs) -> Tensor:
        """Return the sum over each token's experts of P[:, e] x, [T, r], of x [S, i]; without P the wide rows."""
        if self.p is None:
            return pairs.spread(wide(x))
        if self.kind != (x.dtype, x.device):
            columns = self.p.to(x).T.view(len(pairs.ends), x.shape[1], -1)
            blocks = F.pad(columns, (0, -columns.shape[2] % 8)).contiguous()  # for Pairs.multiply
            self.blocks = self.shard(blocks) if self.shard else lambda: blocks
            self.kind = x.dtype, x.device
        return pairs.sum(wide(pairs.multiply(x, self.blocks())[:, : len(self.p)]))


def is_experts(module: nn.Module) -> bool:
    """Return whether this is a module of experts of transformers (transformers.integrations.moe)."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_post_expert_norm")


def matrices(name: str, module: nn.Module) -> Shapes:
    """Return the wide layers of an experts module: name -> (d_out, d_in); none, if `module` is none.

    A layer bears the name of its parameter. Down is none where a norm follows each expert: there a token's experts have
    different gradients.
    """
    if not is_experts(module):
        return {}
    shapes = {}
    for key in (up_key(module), DOWN)[: 1 if module.has_post_expert_norm else 2]:
        experts, d_out, d_in = getattr(module, key).shape
        d_out, d_in = (d_in, d_out) if module.is_transposed else (d_out, d_in)
        shapes[f"{name}.{key}"] = (d_out, experts * d_in) if key == DOWN else (experts * d_out, d_in)
    return shapes


def up_key(module: nn.Module) -> str:
    """Return the name of the parameter of an experts module's first matrices."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def wide_sides(model: nn.Module) -> dict[str, int]:
    """Return <layer>.in or <layer>.out -> number of experts, of the wide sides of a model's layers."""
    return {
        f"{layer}.{'in' if layer.endswith(DOWN) else 'out'}": module.num_experts
        for name, module in model.named_modules()
        for layer in matrices(name, module)
    }


class WideLayer(NamedTuple):
    """How to track one wide layer: the projections of its two sides, and a function that taps its output.

    tap(output, x~, project) returns the output to go on with; project(d) returns d~ of the output's gradient.
    """

    project_in: Callable[[Tensor, Pairs], Tensor]
    project_out: Callable[[Tensor, Pairs], Tensor]
    tap: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


def forward(module: nn.Module, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Return what an experts module of transformers returns, [T, d], and tap its wide layers (see track).

    Args:
        module: An experts module (transformers.integrations.moe).
        hidden: [T, d].
        experts: [T, K], the experts of each token.
        weights: [T, K], their routing weights.
    """
    pairs = Pairs(experts, module.num_experts)
    inputs = hidden[:, None].expand(-1, pairs.per_token, -1).flatten(0, 1)[pairs.order]
    weight = weights.flatten()[pairs.order, None]

    def linear(key: str, x: Tensor) -> Tensor:
        blocks = getattr(module, key)
        output = pairs.multiply(x, blocks if module.is_transposed else blocks.mT)
        return output + getattr(module, f"{key}_bias")[pairs.expert] if module.has_bias else output

    up, down = module.wide_layers.values()
    output = linear(up_key(module), inputs)
    if up:
        output = up.tap(output, up.project_in(hidden.detach(), pairs), lambda d: up.project_out(d, pairs))
    activation = module._apply_gate(output) if module.has_gate else module.act_fn(output)
    output = linear(DOWN, activation)
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    output = pairs.sum(output * weight).to(hidden.dtype)
    if down:
        x = (activation * weight).detach().to(activation.dtype)
        output = down.tap(output, down.project_in(x, pairs), lambda d: down.project_out(d, pairs))
    return output


@contextmanager
def track(model: nn.Module, layers: dict[str, WideLayer]) -> Iterator[None]:
    """Let the model's experts modules run `forward`, with these wide layers by name, inside a `with` block."""
    modules = {m: name for name, m in model.named_modules() if is_experts(m)}
    configs = {id(module.config): module.config for module in modules}.values()
    before = [config._experts_implementation for config in configs]
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    try:
        for module, name in modules.items():
            module.wide_layers = {key: layers.get(f"{name}.{key}") for key in (up_key(module), DOWN)}
        for config in configs:
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation
        for module in modules:
            del module.wide_layers
