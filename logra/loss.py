"""Per-example loss, with the language-model head and the cross-entropy fused: no tensor [B, T, V] is ever formed.

Notation: B batch, T tokens, d hidden size, V vocabulary size. The loss of an example is the SUM of the next-token
negative log-likelihoods of its counted tokens. So it does not depend on the other examples in the batch.
"""

import logging
import math

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

# Padding on the right needs no attention_mask: check_head sees that no token attends to later ones.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "recommend passing in an `attention_mask`" not in record.getMessage()
)
CHUNK_LOGITS = 2**25  # logits in memory at one time
IGNORE = -100  # target of a token that does not count
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
SCALES = {  # where it is not logit_scale (Cohere) / logits_scaling (Granite)
    "falcon_h1": lambda config: config.lm_head_multiplier,
    "hyperclovax": lambda config: config.logits_scaling,
    "minicpm3": lambda config: 1,  # scales the head's input
    "mpt": lambda config: 1,  # does not use its logit_scale
}


class _FusedLoss(torch.autograd.Function):
    """Losses [B] of hidden states [B, T, d]; computes the hidden states' gradient in the forward pass, in chunks."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, counted, scale, softcap):
        flat = hidden.reshape(-1, hidden.shape[-1])
        grad = flat.new_zeros(flat.shape)
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
            grad[rows] = d_logits.mul_(scale).to(weight.dtype) @ weight
        ctx.save_for_backward(grad.view(hidden.shape))
        return losses

    @staticmethod
    def backward(ctx, d_losses):
        (grad,) = ctx.saved_tensors
        return grad * d_losses[:, None, None].to(grad.dtype), None, None, None, None, None, None


def logit_transform(model: nn.Module) -> tuple[float, float | None]:
    """Return (scale, softcap) of the model's logits = softcap * tanh(scale * head(h) / softcap)."""
    config = model.config.get_text_config()
    if config.model_type in SCALES:
        scale = SCALES[config.model_type](config)
    else:
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return float(scale), next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)


def _head_weights(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the head's weight [V, d] and bias [V], without the rows that pad the vocabulary (Inkling)."""
    head, size = model.get_output_embeddings(), getattr(model.config.get_text_config(), "unpadded_vocab_size", None)
    return head.weight[:size], None if head.bias is None else head.bias[:size]


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first weights in memory, where its inputs go (other weights are offloaded)."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


class _HeadReached(Exception):
    """Ends a forward pass at the model's head."""


def hidden_states(model: nn.Module, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return the input [B, T, d] of the model's head. The forward pass ends there, before the logits."""

    def stop(head: nn.Module, arguments: tuple[Tensor]) -> None:
        raise _HeadReached(arguments[0])

    handle = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        model(input_ids=input_ids, use_cache=False, **inputs)
    except _HeadReached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise ValueError(
        f"expected {type(model).__name__} to call its head, got a forward pass without; this architecture is not "
        "supported yet"
    )


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
        return _FusedLoss.apply(hidden, *_head_weights(model), targets, rows, *logit_transform(model))


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the logits of the fused loss with the model's own on a few tokens, and check that the model is causal.

    Raises:
        ValueError: The model has no linear head, needs more inputs than token ids, or is not causal; or its logits are
            NaN or infinite, or it transforms them in a way that logit_transform does not know.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"expected a linear language-model head, got {type(head).__name__}; use a causal LM")
    try:
        logits, hidden, changed = _probe(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the code of the model raises
        raise ValueError(
            f"expected a model that runs on token ids alone, got {name}, which fails: {type(error).__name__}, "
            f"{str(error).strip().partition(chr(10))[0]}; use a causal LM of text, or another --dtype"
        ) from error
    if not logits.isfinite().all():
        raise ValueError(
            "expected finite logits, got NaN or infinity; use --dtype float32, or a model whose weights are finite"
        )
    tolerance = 1e-4 if all(weight.dtype == torch.float32 for weight in model.parameters()) else 5e-2
    scale, softcap = logit_transform(model)
    with align_module_device(head):  # loads offloaded weights
        fused = F.linear(hidden.to(head.weight.device), *_head_weights(model)).float() * scale
    fused = softcap * torch.tanh(fused / softcap) if softcap else fused
    error = _difference(fused, logits)
    if not error < tolerance:
        raise ValueError(
            f"expected {name}'s logits {list(logits.shape)} to be its head applied to its last hidden states, got "
            f"{list(fused.shape)}, a relative difference of {error:.1e}; this architecture is not supported yet"
        )
    error = _difference(changed[0, :4], hidden[0, :4])
    if not error < tolerance:
        raise ValueError(
            f"expected a causal model, got {name}, where other later tokens change an earlier token's hidden state by "
            f"{error:.1e}; use a causal LM (of BERT-like models, one with is_decoder in its config.json)"
        )


def _probe(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and hidden states of two short texts, and the latter with all but the first 4 tokens changed."""
    vocabulary = len(model.get_input_embeddings().weight)  # special tokens are at its ends
    ids = (torch.arange(32, device=input_device(model)) + vocabulary // 2) % vocabulary
    texts, changed = ids[:16].view(2, 8), torch.cat([ids[:4], ids[20:]]).view(2, 8)
    logits = model(input_ids=texts, use_cache=False).logits.float()
    return logits, hidden_states(model, texts), hidden_states(model, changed)


def _difference(tensor: Tensor, expected: Tensor) -> float:
    """Return |tensor - expected| / |expected|; infinity if the shapes differ."""
    if tensor.shape != expected.shape:
        return math.inf
    return ((tensor.to(expected.device) - expected).float().norm() / expected.float().norm().clamp_min(1e-30)).item()
