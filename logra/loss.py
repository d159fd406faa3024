"""Per-example loss, with the language-model head and the cross-entropy fused: no tensor [B, T, V] is ever formed.

Notation: B batch, T tokens, d hidden size, V vocabulary size. The loss of an example is the SUM of the next-token
negative log-likelihoods of its counted tokens. So it does not depend on the other examples in the batch.
"""

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_LOGITS = 2**25  # logits in memory at one time
IGNORE = -100  # target of a token that does not count


class _FusedLoss(torch.autograd.Function):
    """Losses [B] of hidden states [B, T, d]; computes the hidden states' gradient in the forward pass, in chunks."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, counted, scale, softcap):
        flat, grad = hidden.reshape(-1, hidden.shape[-1]), torch.zeros_like(hidden)
        losses = hidden.new_zeros(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows in counted.split(max(16, CHUNK_LOGITS // len(weight))):
            target = targets.flatten()[rows, None]
            logits = F.linear(flat[rows], weight, bias).to(losses.dtype).mul_(scale)
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
                slope = 1 - (logits / softcap) ** 2
            peak, target_logit = logits.amax(dim=1, keepdim=True), logits.gather(1, target)
            exp = logits.sub_(peak).exp_()  # exp and d_logits reuse the memory of the logits
            normalizer = exp.sum(dim=1, keepdim=True)
            losses.index_add_(0, rows // targets.shape[1], (peak + normalizer.log() - target_logit).squeeze(1))
            d_logits = exp.div_(normalizer).scatter_add_(1, target, -torch.ones_like(normalizer))
            if softcap:
                d_logits.mul_(slope)
            grad.view_as(flat)[rows] = d_logits.mul_(scale).to(weight.dtype) @ weight
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
    """Return the device of the model's first weights in memory, where its inputs go (other weights are offloaded)."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def hidden_states(model: nn.Module, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return the last hidden states [B, T, d], the input of the model's head."""
    return model.base_model(input_ids=input_ids, use_cache=False, **inputs)[0]


def example_losses(
    model: nn.Module, input_ids: Tensor, targets: Tensor, rows: Tensor | None = None, **inputs: Tensor
) -> Tensor:
    """Return each example's summed next-token loss, [B], float32 or wider.

    Args:
        model: A causal LM of transformers with a linear head.
        input_ids: [B, T]. Right padding needs no attention_mask: causal attention never looks there.
        targets: [B, T], the token that position t should predict; IGNORE where nothing counts.
        rows: Flat positions [n] of the targets that count. Without it they are found here; the CPU then waits for
            the GPU.
        inputs: Further inputs of the model, e.g. attention_mask and position_ids for left padding.
    """
    head = model.get_output_embeddings()
    rows = (targets.flatten() != IGNORE).nonzero().squeeze(1) if rows is None else rows
    hidden = hidden_states(model, input_ids, **inputs)
    with align_module_device(head):  # loads offloaded weights
        hidden, targets, rows = (t.to(head.weight.device) for t in (hidden, targets, rows))
        return _FusedLoss.apply(hidden, head.weight, head.bias, targets, rows, *logit_transform(model))


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the logits of the fused loss with the model's own on a few tokens.

    Raises:
        ValueError: The model has no linear head, its logits are NaN or infinite, or it transforms them in a way that
            logit_transform does not know.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"expected a linear language-model head, got {type(head).__name__}; use a causal LM")
    ids = torch.arange(8, device=input_device(model))[None] % len(model.get_input_embeddings().weight)
    scale, softcap = logit_transform(model)
    fused = head(hidden_states(model, ids)).float() * scale
    fused = softcap * torch.tanh(fused / softcap) if softcap else fused
    logits = model(input_ids=ids, use_cache=False).logits.float()
    if not logits.isfinite().all():
        raise ValueError(
            "expected finite logits, got NaN or infinity; use --dtype float32, or a model whose weights are finite"
        )
    error = (fused - logits).norm() / logits.norm().clamp_min(1e-30)
    if not error < (1e-4 if head.weight.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"expected {type(model).__name__}'s logits to be its head applied to its last hidden states, got a "
            f"relative difference of {error:.1e}; this architecture is not supported yet"
        )
