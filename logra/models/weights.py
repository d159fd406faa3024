"""A model's weights are loaded whole, or refused: kinds of files, the keys in them, and adapters (peft)."""

import re
import warnings
from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from logra.runtime.progress import say

# Masks, rotary frequencies and version numbers that older libraries saved. Models now compute or ignore them.
OLD_BUFFERS = r"\.(attn|attention)\.(masked_bias|bias|causal_mask)$|\.inv_freq$|\bdecoder\.version$"
DEQUANTIZED = ("fp8", "mxfp4", "mxfp8")  # by transformers, on any device
LANGUAGE_MODEL = ("language_model", "model", "text_model")  # its keys in the files of a larger model begin so
CONFIGS = ("config.json", "adapter_config.json")
WEIGHTS = (".gguf", ".safetensors", ".bin")
PROBE_TOKENS = 32
logging.get_logger("transformers.quantizers").setLevel(logging.ERROR)  # "will dequantize": DEQUANTIZED, to any dtype
logging.get_logger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


class IncompleteError(ValueError):
    """Weights are missing, left over or of another shape."""


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a model consists of, or None. The name is that of the file or of its folder."""
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if not files or any(weights for kind in ("*.safetensors", "*.bin") for weights in path.glob(kind)):
        return None
    if len(files) > 1:
        raise ValueError(
            f"expected one GGUF file in {name}, got {len(files)}; give the path of one, such as {files[0]}"
        )
    return files[0]


def check_place(name: str, what: str = "a model", remedy: str = "give the path of a model, or a Hub id") -> None:
    """Refuse a path at which there is no model, and say which one to give.

    Args:
        name: Local folder, GGUF file or Hub id of a model or adapter.
        what, remedy: For the message.

    Raises:
        ValueError: It is another file, a folder without a model, or neither a path nor a Hub id.
    """
    path = Path(name)
    if gguf_file(name) or any((path / config).is_file() for config in CONFIGS):
        return
    found = "no such file or folder"
    if path.is_dir():
        kinds = [depth + kind for depth in ("*/", "*/*/", "*/*/*/") for kind in (*CONFIGS, "*.gguf")]
        inside = sorted({str(file.parent) for kind in kinds for file in path.glob(kind)})
        found, remedy = "none there", f"give a folder in it: {', '.join(inside[:3])}" if inside else remedy
    elif path.is_file():
        found, remedy = "another file", f"give its folder, {path.parent}"
    elif path.suffix not in WEIGHTS and _is_hub_id(name):
        return
    raise ValueError(
        f"expected {what} at {name}: a folder with {' or '.join(CONFIGS)}, or a GGUF file, got {found}; {remedy}"
    )


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_config(name: str, config: Any) -> None:
    """Refuse what can't be loaded as a language model's floating-point weights; let weights be dequantised.

    Args:
        name: Of the model.
        config: Of the model. Its quantization_config is changed.

    Raises:
        ValueError: There is more than one language model, or a quantisation that transformers can't undo.
    """
    try:
        found = quantization(config)
    except ValueError as error:
        raise ValueError(
            f"expected a model with one language model, got {name!r} of type {config.model_type}, which has several "
            "text configurations; give a causal language model"
        ) from error
    if not found or found.get("quant_method") == "bitsandbytes" or any("load_in_" in key for key in found):
        return
    if found.get("quant_method") not in DEQUANTIZED:
        raise ValueError(
            f"expected weights that are floating-point numbers, or quantised with {', '.join(DEQUANTIZED)} or "
            f"bitsandbytes, got {name!r}, quantised with {found.get('quant_method')}; give a dequantised copy"
        )
    found["dequantize"] = True


def quantization(config: Any) -> dict[str, Any]:
    """Return how the weights in a model's files are quantised: an entry of its configuration, or of its text part's."""
    text = config.get_text_config()
    return getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None) or {}


def check_loaded(name: str, config: Any, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Check a model that transformers has loaded, and finish dequantising it.

    Args:
        name: Of the model.
        config: Of the model, as check_config has left it.
        model: The language model in it. It may be changed.
        info: See check_keys.

    Raises:
        ValueError: It is not whole (see check_keys), or it can't be dequantised.
    """
    is_part = config.get_text_config() is not config
    check_keys(name, info, [module for module, _ in model.named_children()] if is_part else None)
    if quantization(config).get("dequantize"):
        _finish_dequantizing(model)


def check_blocks(name: str, config: Any, model: PreTrainedModel) -> None:
    """Compare the sizes of FP8 weights with those of the blocks that share a scale.

    Args:
        name: Of the model.
        config: Of the model.
        model: It, on the meta device.

    Raises:
        ValueError: A matrix ends with a part of a block. transformers divides a matrix evenly by the number of its
            scales, so it would fail, or give rows the scales of others.
    """
    quantized = quantization(config)
    kept = quantized.get("modules_to_not_convert") or ()
    for key, parameter in model.named_parameters():
        module = model.get_submodule(key.rpartition(".")[0])
        is_linear = isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
        if not (is_linear or parameter.dim() == 3) or any(f".{part}." in f".{key}" for part in kept):
            continue
        sizes = list(parameter.shape[-2:])
        sizes[0] //= 2 if parameter.dim() == 3 and "gate_up" in key else 1  # the files have gate and up apart
        if any(n > b and n % b for n, b in zip(sizes, quantized["weight_block_size"], strict=False)):  # a bias: rows
            raise ValueError(
                f"expected FP8 weights in whole blocks of {quantized['weight_block_size']}, got {key} "
                f"{list(parameter.shape)} in {name!r}; give a dequantised copy"
            )


def _finish_dequantizing(model: PreTrainedModel) -> None:
    """Cast the weights that were not quantised: transformers leaves them in the dtype of their files."""
    kept = model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"expected memory for all quantised weights, got none for {name}; give a dequantised copy")
        wanted = torch.float32 if any(key in name for key in kept) else model.config.dtype
        parameter.data = parameter.data.to(wanted)


def check_keys(name: str, info: dict[str, Any], modules: Collection[str] | None = None) -> None:
    """Compare a model's weights with those in its files.

    Args:
        name: Of the model or adapter.
        info: missing_keys, unexpected_keys and mismatched_keys (key, saved shape, expected shape), as transformers
            reports them: without tied weights and without buffers that the model's class declares as not saved.
        modules: Names of the top-level modules of a language model whose files hold a larger model. What belongs to
            other modules, such as a vision tower, is left out, and this is said.

    Raises:
        IncompleteError: A weight is missing, left over or has another shape.
    """
    missing = sorted(info["missing_keys"])
    left_over = sorted(key for key in info["unexpected_keys"] if not re.search(OLD_BUFFERS, key))
    shapes = [f"{key} {[*saved]} for {[*expected]}" for key, saved, expected in sorted(info["mismatched_keys"])]
    if modules is not None and not missing:
        others = {key.split(".")[0] for key in left_over} - {*modules, *LANGUAGE_MODEL}
        left_over = [key for key in left_over if key.split(".")[0] not in others]
        if others:
            say(f"left out of {name}: {', '.join(sorted(others))}; text does not reach them")
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
    """Return what all left-over keys of a module begin with (as _orig_mod. or module.), if it hides missing keys."""
    for keys in (list(group) for _, group in groupby(left_over, lambda key: key.split(".")[0])):
        parts = keys[0].split(".")
        for count in range(1, len(parts)):
            prefix = ".".join(parts[:count]) + "."
            hidden = "." + keys[0].removeprefix(prefix)
            if all(key.startswith(prefix) for key in keys) and any(f".{key}".endswith(hidden) for key in missing):
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

    weights = peft.load_peft_weights(name, device="cpu", revision=revision)
    resized = _resize_vocabulary(base, name, weights)
    vocabulary = rf"\.({_of_vocabulary(base)})\."
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    probe = torch.linspace(0, embedding.num_embeddings - 1, PROBE_TOKENS).long()[None]
    config = peft.PeftConfig.from_pretrained(name, revision=revision)
    config.inference_mode = False  # requires_grad then marks what was trained
    tuned = peft.get_peft_model(base, config).eval()
    if not hasattr(tuned, "merge_and_unload"):
        raise ValueError("it does not change weights")
    result = peft.set_peft_model_state_dict(tuned, weights)
    _check_adapter_keys(name, tuned, result, weights, vocabulary)
    expected = tuned(input_ids=probe, use_cache=False).logits
    wrapped = (base.get_input_embeddings(), base.get_output_embeddings()) != (embedding, head)
    if wrapped and head.weight is embedding.weight:  # else the merge of one would change both
        head.weight = nn.Parameter(head.weight.clone())
    merged = tuned.merge_and_unload().requires_grad_(True)
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    merged.config.tie_word_embeddings = head.weight is embedding.weight
    if resized and (embedding.weight.isnan().any() or head.weight.isnan().any()):
        raise IncompleteError(
            f"expected embedding and head of all {embedding.num_embeddings} tokens in the adapter {name!r}, whose "
            "vocabulary was resized, got one of them; give a model into which it was merged where it was trained"
        )
    error = _relative_error(merged(input_ids=probe, use_cache=False).logits, expected)
    if not error < torch.finfo(expected.dtype).eps ** 0.5:
        raise ValueError(f"the merged model's logits differ by {error:.1e} from those of peft's own model")
    return merged


def _resize_vocabulary(base: PreTrainedModel, name: str, weights: dict[str, Tensor]) -> bool:
    """Give the base model the vocabulary of an adapter's files, and return whether it is another one.

    New rows are NaN until they are loaded.
    """
    rows = base.get_input_embeddings().num_embeddings
    pattern = re.compile(
        rf"\.({_of_vocabulary(base)})\.((base_layer|original_module|modules_to_save|token_adapter)\.)*weight$"
    )
    sizes = {len(tensor) for key, tensor in weights.items() if pattern.search(key)}
    if len(sizes) != 1 or sizes == {rows}:
        return False  # peft refuses several sizes
    size = sizes.pop()
    say(f"{name}: a vocabulary of {size} tokens; its base model has {rows}")
    base.resize_token_embeddings(size, mean_resizing=False)
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        for parameter in module.parameters():
            parameter[rows:] = torch.nan
    return True


def _of_vocabulary(base: PreTrainedModel) -> str:
    """Return a pattern of the names of embedding and head."""
    modules = {base.get_input_embeddings(), base.get_output_embeddings()}
    return "|".join(re.escape(path) for path, module in base.named_modules() if module in modules)


def _check_adapter_keys(name: str, tuned: nn.Module, result: Any, weights: dict[str, Tensor], vocabulary: str) -> None:
    """Raise an IncompleteError unless a file held all trained parameters of an adapter, and no others.

    peft saves a resized embedding or head under several names.
    """
    absent = set(result.missing_keys)
    loaded = {p.data_ptr() for key, p in tuned.named_parameters(remove_duplicate=False) if key not in absent}
    constant = re.compile(r"\.ranknum\.")  # of AdaLoRA; not saved
    trained = {key: p for key, p in tuned.named_parameters() if p.requires_grad and not constant.search(key)}
    missing = [key for key, p in trained.items() if p.data_ptr() not in loaded]
    used = [weights[key] for key in weights.keys() - {*result.unexpected_keys} if re.search(vocabulary, key)]
    left_over = [
        key
        for key in result.unexpected_keys
        if not re.search(vocabulary, key) or not any(torch.equal(weights[key], tensor) for tensor in used)
    ]
    check_keys(name, {"missing_keys": missing, "unexpected_keys": left_over, "mismatched_keys": []})


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
