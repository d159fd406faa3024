"""Per-example loss with the head and the cross-entropy fused: [B, T, vocab] never exists.

Notation: B batch, T tokens, d hidden size, V vocabulary. The loss of an example is the SUM of the next-token
negative log-likelihoods of its counted tokens, so it does not depend on what else is in the batch.
"""

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_LOGITS = 2**25  # logits held at one time, in elements
IGNORE = -100  # a target that does not count


class _FusedLoss(torch.autograd.Function):
    """Losses [B] from hidden states [B, T, d]; the gradient of the hidden states comes from chunks of logits."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, counted, scale, softcap):
        flat, grad = hidden.reshape(-1, hidden.shape[-1]), torch.zeros_like(hidden)
        losses = hidden.new_zeros(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows in counted.split(max(16, CHUNK_LOGITS // len(weight))):
            target = targets.flatten()[rows, None]
            z = F.linear(flat[rows], weight, bias).to(losses.dtype).mul_(scale)
            if softcap:
                z = softcap * torch.tanh(z / softcap)
                slope = 1 - (z / softcap) ** 2
            peak, chosen = z.amax(dim=1, keepdim=True), z.gather(1, target)
            z = z.sub_(peak).exp_()
            norm = z.sum(dim=1, keepdim=True)
            losses.index_add_(0, rows // targets.shape[1], (peak + norm.log() - chosen).squeeze(1))
            z.div_(norm).scatter_add_(1, target, -torch.ones_like(norm))  # d loss / d logits
            if softcap:
                z.mul_(slope)
            grad.view_as(flat)[rows] = z.mul_(scale).to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx, d_losses):
        (grad,) = ctx.saved_tensors
        return grad * d_losses[:, None, None].to(grad.dtype), None, None, None, None, None, None


def logit_transform(model: nn.Module) -> tuple[float, float | None]:
    """Return (scale, softcap) of the model's logits = softcap * tanh(scale * head(h) / softcap)."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return float(scale), getattr(config, "final_logit_softcapping", None)  # Gemma


def input_device(model: nn.Module) -> torch.device:
    """Return where a model's inputs go: to its first weights that are in memory (the others are offloaded)."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def hidden_states(model: nn.Module, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return the last hidden states [B, T, d] that the model's head is applied to."""
    return model.base_model(input_ids=input_ids, use_cache=False, **inputs)[0]


def example_losses(
    model: nn.Module, input_ids: Tensor, targets: Tensor, rows: Tensor | None = None, **inputs: Tensor
) -> Tensor:
    """Return each example's summed next-token loss, [B], float32 or wider.

    Args:
        model: A causal LM of transformers with a linear head.
        input_ids: [B, T]. Right padding needs no attention_mask: causal attention never looks there.
        targets: [B, T], the token that position t should predict; IGNORE where nothing counts.
        rows: Flat positions of the targets that count. To find them here makes the CPU wait for a GPU.
        inputs: Passed on to the model, e.g. attention_mask and position_ids for left padding.
    """
    head = model.get_output_embeddings()
    rows = (targets.flatten() != IGNORE).nonzero().squeeze(1) if rows is None else rows
    hidden = hidden_states(model, input_ids, **inputs)
    with align_module_device(head):  # brings offloaded weights back
        hidden, targets, rows = (t.to(head.weight.device) for t in (hidden, targets, rows))
        return _FusedLoss.apply(hidden, head.weight, head.bias, targets, rows, *logit_transform(model))


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the fused loss's logits with the model's own on a few tokens.

    Raises:
        ValueError: The model has no linear head, its logits are NaN or infinite, or it does something to them that is
            not reproduced here.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"expected a linear language-model head, got {type(head).__name__}; use a causal LM")
    ids = torch.arange(8, device=input_device(model))[None] % len(model.get_input_embeddings().weight)
    scale, softcap = logit_transform(model)
    ours = head(hidden_states(model, ids)).float() * scale
    ours = softcap * torch.tanh(ours / softcap) if softcap else ours
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    if not theirs.isfinite().all():
        raise ValueError(
            "expected finite logits, got NaN or infinity; use --dtype float32, or a model whose weights are finite"
        )
    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
    if not error < (1e-4 if head.weight.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"expected {type(model).__name__}'s logits to be its head applied to its last hidden states, got a "
            f"relative difference of {error:.1e}; this architecture is not supported yet"
        )
