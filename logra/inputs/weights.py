"""A model's weights are loaded whole, or refused: the keys of its files, and adapters (peft)."""

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from logra.runtime.progress import say

# Masks, rotary frequencies and version numbers that older libraries saved. Models now compute or ignore them.
OLD_BUFFERS = r"\.(attn|attention)\.(masked_bias|bias|causal_mask)$|\.inv_freq$|\bdecoder\.version$"
# Of a multimodal model of which the class for text is loaded: Llama 4, Llama 3.2 Vision. No text reaches them.
TOWERS = r"^(model\.)?(vision|visual|audio|image|speech|multi_modal|mm_)"
PROBE_TOKENS = 32
logging.get_logger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


class IncompleteError(ValueError):
    """Weights are missing, left over or of another shape."""


def check_keys(name: str, info: dict[str, Any]) -> None:
    """Compare a model's weights with those in its files.

    Args:
        name: Of the model or adapter.
        info: missing_keys, unexpected_keys and mismatched_keys (key, saved shape, expected shape), as transformers
            reports them: without tied weights and without buffers that the model's class declares as not saved.

    Raises:
        IncompleteError: A weight is missing, left over or has another shape.
    """
    missing = sorted(info["missing_keys"])
    left_over = sorted(key for key in info["unexpected_keys"] if not re.search(f"{OLD_BUFFERS}|{TOWERS}", key))
    towers = [key.removeprefix("model.") for key in info["unexpected_keys"] if re.search(TOWERS, key)]
    if towers:
        parts = ", ".join(sorted({key.split(".")[0] for key in towers}))
        say(f"left out: {len(towers)} weights of {parts}, for other inputs than text")
    shapes = [f"{key} {[*saved]} for {[*expected]}" for key, saved, expected in sorted(info["mismatched_keys"])]
    kinds = (("missing", missing), ("left over", left_over), ("of another shape", shapes))
    found = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in kinds if keys]
    if not found:
        return
    prefix = _common_prefix(left_over, missing)
    remedy = f"remove the prefix {prefix!r} from the keys of" if prefix else "write again, with save_pretrained,"
    raise IncompleteError(
        f"expected all weights of the model in the files of {name!r}, and no others, got {', '.join(found)}; "
        f"{remedy} its files"
    )


def _common_prefix(left_over: list[str], missing: list[str]) -> str | None:
    """Return what all left-over keys begin with (as _orig_mod. or module.), if it hides the first missing keys."""
    parts = left_over[0].split(".") if left_over else []
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        hidden = "." + left_over[0].removeprefix(prefix)
        if all(key.startswith(prefix) for key in left_over) and any(f".{key}".endswith(hidden) for key in missing):
            return prefix
    return None


def merge_adapter(base: PreTrainedModel, name: str, kind: str, revision: str | None) -> PreTrainedModel:
    """Return the base model with an adapter merged into its weights by peft. The base model is changed.

    Args:
        base: The adapter's base model.
        name: Local folder or Hub id of the adapter.
        kind: peft's type of it, for messages.
        revision: Of the adapter.

    Raises:
        ValueError: peft can't load or merge the adapter, or the merged model computes other logits than peft does.
    """
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            warnings.filterwarnings("error", "Unexpected keyword arguments")  # settings of a newer peft
            return _merge(base, name, revision)
    except IncompleteError:
        raise
    except Exception as error:  # each type of adapter raises exceptions of its own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"expected an adapter that peft can merge into the model's weights, got {name!r} of type {kind}, "
            f"which can't be loaded or merged ({reason}); give a merged model, or an adapter of another type"
        ) from error


def _merge(base: PreTrainedModel, name: str, revision: str | None) -> PreTrainedModel:
    import peft

    probe = torch.linspace(0, base.get_input_embeddings().num_embeddings - 1, PROBE_TOKENS).long()[None]
    config = peft.PeftConfig.from_pretrained(name, revision=revision)
    config.inference_mode = False  # requires_grad then marks what was trained
    tuned = peft.get_peft_model(base, config).eval()
    if not hasattr(tuned, "merge_and_unload"):
        raise ValueError("it does not change weights")
    result = peft.set_peft_model_state_dict(tuned, peft.load_peft_weights(name, device="cpu", revision=revision))
    _check_adapter_keys(name, tuned, result)
    expected = tuned(input_ids=probe, use_cache=False).logits
    merged = tuned.merge_and_unload().requires_grad_(True)
    error = _relative_error(merged(input_ids=probe, use_cache=False).logits, expected)
    if not error < torch.finfo(expected.dtype).eps ** 0.5:
        raise ValueError(f"the merged model's logits differ by {error:.1e} from those of peft's own model")
    return merged


def _check_adapter_keys(name: str, tuned: nn.Module, result: Any) -> None:
    """Raise an IncompleteError unless a file held all trained parameters of an adapter, and no others."""
    absent = set(result.missing_keys)
    loaded = {p.data_ptr() for key, p in tuned.named_parameters(remove_duplicate=False) if key not in absent}
    constant = re.compile(r"\.ranknum\.")  # of AdaLoRA; not saved
    trained = {key: p for key, p in tuned.named_parameters() if p.requires_grad and not constant.search(key)}
    missing = [key for key, p in trained.items() if p.data_ptr() not in loaded]
    check_keys(name, {"missing_keys": missing, "unexpected_keys": result.unexpected_keys, "mismatched_keys": []})


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
