"""Models are loaded whole or refused in one line, in each way in which a model is loaded; so are adapters."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.distributed as dist
from conftest import edit_json, make_model, make_tokenizer
from gguf import GGUFWriter
from helpers import DATA, extract, relative
from safetensors.torch import load_file, save_file
from torch import nn

from logra.models import model as models
from logra.models.layers import choose_layers
from logra.models.model import fingerprint, load_model, load_sharded_model
from logra.runtime.settings import DEFAULT_MODEL

HUB = {"revision": None, "trust_remote_code": False}


def rewrite(source: Path, folder: Path, change, parts: int = 1, suffix: str = "safetensors") -> Path:
    """Copy a model; write the weights that `change` makes of its own into one or more files."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names = [f"{stem}-{i + 1:05d}-of-{parts:05d}.{suffix}" if parts > 1 else f"{stem}.{suffix}" for i in range(parts)]
    places = {key: names[i % parts] for i, key in enumerate(weights)}
    for name in names:
        part = {key: tensor for key, tensor in weights.items() if places[key] == name}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, {"format": "pt"})
    if parts > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def without(pattern: str):
    return lambda weights: {key: tensor for key, tensor in weights.items() if not re.search(pattern, key)}


def with_prefix(prefix: str):
    return lambda weights: {prefix + key: tensor for key, tensor in weights.items()}


FAULTS = {  # what was done to the weights -> what the message says
    "no head": (without("lm_head"), r"1 missing \(lm_head\.weight\)"),
    "no layer": (without(r"layers\.1\."), r"9 missing \(model\.layers\.1\.input_layernorm\.weight"),
    "torch.compile": (with_prefix("_orig_mod."), r"left over \(_orig_mod\.\S+weight.*remove the prefix '_orig_mod\.'"),
    "DDP": (with_prefix("module."), r"left over \(module\.\S+weight.*remove the prefix 'module\.'"),
    "left over": (lambda w: w | {"v_head.summary.weight": torch.ones(2)}, r"1 left over \(v_head\.summary\.weight\)"),
    "a shape": (
        lambda w: w | {"model.layers.0.mlp.up_proj.weight": torch.ones(40, 23)},
        r"1 of another shape \(model\.layers\.0\.mlp\.up_proj\.weight \[40, 23\] for \[40, 24\]\)",
    ),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_in_parts_is_refused(tiny, tmp_path, caplog, fault, parts, suffix):
    """Missing, left-over and misshapen weights are named; transformers' own report is not printed."""
    change, message = FAULTS[fault]
    folder = rewrite(tiny / "llama", tmp_path / "m", change, parts, suffix)
    for options in ({}, {"device_map": {"": "cpu"}}):
        with pytest.raises(ValueError, match=message) as refusal:
            load_model(str(folder), torch.float32, **options)
        assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)
    assert "LOAD REPORT" not in caplog.text
    rewrite(tiny / "llama", tmp_path / "whole", lambda weights: weights, parts, suffix)
    assert fingerprint(load_model(str(tmp_path / "whole"), torch.float32)) == fingerprint(make_model("llama"))


@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
def test_a_prefix_is_found(tiny, tmp_path, name):
    """Also before keys without `transformer.`, and where a tied head was saved."""
    head = {"lm_head.weight": torch.ones(320, 24)}
    folder = rewrite(
        tiny / name,
        tmp_path / "m",
        lambda w: {f"module.{key.removeprefix('transformer.')}": tensor for key, tensor in (head | w).items()},
    )
    with pytest.raises(ValueError, match=r"remove the prefix 'module\.' from the keys of its files"):
        load_model(str(folder), torch.float32)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_script_refuses(cli, tiny, workspace, fault):
    """Stages 1, 2 and 3, --verify, --trial, --tokens and an adapter on such a model: one line, exit status 2."""
    pytest.importorskip("peft")
    change, message = FAULTS[fault]
    model, flags = workspace / "m", ("--model_name", workspace / "m", *DATA, "--rank", 4)
    shutil.copytree(tiny / "llama", model)
    extract(cli, model, "--rank", 4)
    save_adapter("LORA", model, workspace / "adapter")
    Path("prompts.txt").write_text("the old mill\n")
    queries = ("--log_dir", "log", "--split", "queries.jsonl")
    assert cli("compute_influence", *queries)[0] == 0
    rewrite(tiny / "llama", model, change)
    for script, *rest in (
        ("generate", "--model_name", model, "--prompts", "prompts.txt"),
        ("generate_llama3", "--model_name", model, "--prompts", "prompts.txt"),
        ("extract_log", *flags, "--overwrite"),
        ("extract_log", *flags, "--verify"),
        ("extract_log", *flags, "--trial"),
        ("compute_influence", *queries),
        ("analysis", "--log_dir", "log", "--tokens"),
        ("extract_log", "--model_name", "adapter", "--data_name", "docs.jsonl", "--log_dir", "new"),
    ):
        changed = rest == [*queries] or script == "analysis"  # their run names the file that is not as it was
        expected = "got other files \\(model.safetensors has other content\\)" if changed else message
        status, _, err = cli(script, *rest)
        assert status == 2 and re.search(expected, err) and len(err.splitlines()) == 1, (script, err)


def test_a_sharded_model_in_parts_is_refused(tiny, tmp_path):
    """--fsdp: the same line. A whole model and a merged adapter are sharded as they are."""
    pytest.importorskip("peft")
    broken = rewrite(tiny / "llama", tmp_path / "m", FAULTS["no head"][0])
    save_adapter("LORA", tiny / "llama", tmp_path / "adapter")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=FAULTS["no head"][1]):
            load_sharded_model(str(broken), torch.float32, torch.device("cpu"), **HUB)
        sharded, found = load_sharded_model(str(tmp_path / "adapter"), torch.float32, torch.device("cpu"), **HUB)
        merged = load_model(str(tmp_path / "adapter"), torch.float32)
        assert found == fingerprint(merged)
        ids = torch.arange(9)[None]
        assert relative(sharded(ids).logits, merged(ids).logits) < 1e-6
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("whole", [True, False])
def test_a_gguf_file_in_parts_is_refused(tmp_path, monkeypatch, whole):
    """The conversion of a GGUF file: missing weights are named, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    writer, width = GGUFWriter("tiny.gguf", "llama"), 32
    writer.add_context_length(64), writer.add_embedding_length(width), writer.add_block_count(1)
    writer.add_feed_forward_length(width), writer.add_head_count(2), writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_dimension_count(16), writer.add_vocab_size(width)
    matrices = [
        "token_embd",
        *(f"blk.0.{name}" for name in "attn_q attn_k attn_v attn_output ffn_gate ffn_down".split()),
    ]
    for name in [*matrices, *(["blk.0.ffn_up"] if whole else [])]:
        writer.add_tensor(f"{name}.weight", torch.randn(width, width).numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(width).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    make_model("llama")  # transformers looks for packages when it first needs the class
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(models, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: make_tokenizer()))
    if whole:
        models._convert_default()
        assert load_model(DEFAULT_MODEL, torch.float32).config.num_hidden_layers == 1
    else:
        with pytest.raises(ValueError, match=r"1 missing \(model\.layers\.0\.mlp\.up_proj\.weight\)"):
            models._convert_default()
        assert not Path(DEFAULT_MODEL).exists()


OLD_KEYS = {
    "gpt2": {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.0.attn.masked_bias": ()},
    "neox": {
        "gpt_neox.layers.0.attention.bias": (1, 1, 64, 64),
        "gpt_neox.layers.0.attention.masked_bias": (),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (6,),
    },
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": (3,)},
    "llama_tied": {"lm_head.weight": None},
}


@pytest.mark.parametrize("name", OLD_KEYS)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_old_buffers_and_tied_heads_are_no_fault(tiny, tmp_path, name, suffix):
    """Checkpoints of older versions hold masks and frequencies; GPT-2's on the Hub has keys without `transformer.`."""
    weights = load_file(tiny / name / "model.safetensors")
    old = {k: torch.ones(shape) if shape is not None else weights["model.embed_tokens.weight"].clone()
           for k, shape in OLD_KEYS[name].items()}  # fmt: skip
    prefix = "transformer." if name == "gpt2" else ""
    folder = rewrite(
        tiny / name, tmp_path / "m", lambda w: {key.removeprefix(prefix): t for key, t in (w | old).items()}, 1, suffix
    )
    assert fingerprint(load_model(str(folder), torch.float32)) == fingerprint(
        load_model(str(tiny / name), torch.float32)
    )


# ---- adapters

TARGETS = ["q_proj", "up_proj"]
VIRTUAL = {"num_virtual_tokens": 2, "target_modules": None}
SETTINGS = {  # what a type needs for a tiny model, beside its defaults
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": VIRTUAL,
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1], "target_modules": None},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LORA": {"init_lora_weights": False},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": VIRTUAL | {"num_tasks": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "P_TUNING": VIRTUAL,
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TINYLORA": {"init_weights": True},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [0, 319]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 20},
}
LORA = {"init_lora_weights": False}
VARIANTS = {  # of LoRA
    "DoRA": LORA | {"use_dora": True},
    "rsLoRA": LORA | {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "a bias of LoRA": LORA | {"lora_bias": True, "target_modules": ["c_attn"]},
    "biases": LORA | {"bias": "all", "target_modules": ["c_attn"]},
    "modules to save": LORA | {"modules_to_save": ["lm_head"]},
    "tokens": LORA | {"trainable_token_indices": [0, 319]},
    "aLoRA": LORA | {"alora_invocation_tokens": [3]},
}
NOT_WEIGHTS = {  # types that do more than change weights
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "P_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "SHADOW", "XLORA",
}  # fmt: skip
NOT_ON_LLAMA = {"BEFT"}  # it trains biases, and Llama has none
WRONG_BACKWARD = {"C3A"}  # peft 0.21.2's backward pass is not the derivative of its forward pass (gradcheck fails)


def save_adapter(kind: str, base: Path, folder: Path, **settings) -> None:
    """Write an adapter of this type, with random weights, for a base model."""
    import peft

    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    torch.manual_seed(0)
    fields = config_class.__dataclass_fields__
    common = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, "init_weights": False}
    chosen = common | SETTINGS.get(kind, {}) | settings
    try:
        tuned = peft.get_peft_model(
            load_model(str(base), torch.float32),
            config_class(**{key: value for key, value in chosen.items() if key in fields}),
        )
    except (ImportError, ValueError):  # XLORA needs other adapters, ADAMSS needs scikit-learn
        folder.mkdir()
        content = {"peft_type": kind, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
        (folder / "adapter_config.json").write_text(json.dumps(content))
        save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
        return
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(folder)


def own_and_merged(base: Path, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return the model as peft loads it, and ours."""
    import peft

    torch.manual_seed(1)
    own = peft.PeftModel.from_pretrained(load_model(str(base), torch.float32), folder).eval()
    torch.manual_seed(2)
    return own, load_model(str(folder), torch.float32)


def assert_equal_to_own(base: Path, folder: Path, gradients: bool = True) -> None:
    """The merged model has peft's logits, and its gradient of every tracked layer."""
    own, merged = own_and_merged(base, folder)
    ids = torch.tensor([0, 319, *range(3, 200, 11)])
    plain = load_model(str(base), torch.float32)
    with torch.no_grad():
        expected = own(input_ids=ids[None]).logits
        assert relative(plain(ids[None]).logits, expected) > 1e-3, "the adapter has an effect"
        assert relative(merged(ids[None]).logits, expected) < 2e-5
    shapes = choose_layers(merged, False, None)
    assert shapes == choose_layers(plain, False, None) and type(merged) is type(plain)
    if not gradients:
        return
    sides = reference.layer_io(own.get_base_model().requires_grad_(True), shapes, ids.tolist())
    for layer, grad in reference.full_gradient(merged, shapes, ids.tolist()).items():
        x, d = sides[layer]
        assert relative(grad, d.T @ x) < 1e-3, layer


def types() -> list[str]:
    """Return all types of the installed peft."""
    peft = pytest.importorskip("peft")
    return [kind.value for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING]


def test_every_type_of_adapter(tiny, tmp_path):
    """Of peft's registry: the merged model is peft's own, or the type is refused by name in one line."""
    refused = set()
    for kind in types():
        save_adapter(kind, tiny / "llama", tmp_path / kind)
        try:
            load_model(str(tmp_path / kind), torch.float32)
        except ValueError as error:
            refused.add(kind)
            assert f"of type {kind}, which can't be" in str(error) and "\n" not in str(error)
            continue
        assert_equal_to_own(tiny / "llama", tmp_path / kind, kind not in WRONG_BACKWARD)
        assert {p.dtype for p in load_model(str(tmp_path / kind), torch.bfloat16).parameters()} == {torch.bfloat16}
    assert refused - {"ADAMSS"} == NOT_WEIGHTS | NOT_ON_LLAMA, "ADAMSS needs scikit-learn"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_lora(tiny, tmp_path, variant):
    """The same for the settings of LoRA that load or merge in a way of their own."""
    pytest.importorskip("peft")
    settings = VARIANTS[variant]
    base, folder = tiny / ("gpt2" if settings.get("target_modules") else "llama"), tmp_path / "adapter"
    save_adapter("LORA", base, folder, **settings)
    if variant == "aLoRA":
        with pytest.raises(ValueError, match=r"of type LORA, which can't be.*aLoRA does not support merging"):
            load_model(str(folder), torch.float32)
    else:
        assert_equal_to_own(base, folder)


def test_a_merged_model_that_is_not_the_own_one(tiny, tmp_path, monkeypatch):
    """A type that merges something else than it computes is found by its logits."""
    peft = pytest.importorskip("peft")
    save_adapter("LORA", tiny / "llama", tmp_path / "adapter")
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda self, **_: None)
    with pytest.raises(ValueError, match=r"of type LORA, .*logits differ by"):
        load_model(str(tmp_path / "adapter"), torch.float32)


@pytest.mark.parametrize("kind", ["LORA", "VBLORA"])
def test_an_adapter_in_parts_is_refused(tiny, tmp_path, kind):
    """Missing, left-over and misshapen weights of an adapter, and settings of a newer peft, are named."""
    pytest.importorskip("peft")
    save_adapter(kind, tiny / "llama", tmp_path / "a")
    weights = load_file(tmp_path / "a/adapter_model.safetensors")
    first = next(key for key in weights if "bank" in key or "lora_B" in key)
    for change, message in (
        (
            lambda w: {key: t for key, t in w.items() if key != first},
            rf"1 missing \({first.split('.')[0]}\S+(lora_B|bank)",
        ),
        (lambda w: w | {"base_model.model.other": torch.ones(1)}, r"1 left over \(base_model\.model\.other"),
        (lambda w: w | {first: torch.ones(7, 7)}, rf"of type {kind}, .*size mismatch for \S+(lora_B|bank)"),
    ):
        save_file(change(weights), tmp_path / "a/adapter_model.safetensors")
        with pytest.raises(ValueError, match=message) as refusal:
            load_model(str(tmp_path / "a"), torch.float32)
        assert "\n" not in str(refusal.value)
    save_file(weights, tmp_path / "a/adapter_model.safetensors")
    load_model(str(tmp_path / "a"), torch.float32)
    edit_json(tmp_path / "a/adapter_config.json", lambda config: config.update(setting_of_2030=True))
    with pytest.raises(ValueError, match="setting_of_2030"):
        load_model(str(tmp_path / "a"), torch.float32)


@pytest.mark.parametrize("settings", [("LORA", {"use_dora": True}), ("IA3", {})], ids=["DoRA", "IA3"])
def test_verify_of_an_adapter(cli, tiny, workspace, settings):
    """--verify passes, on one device and with a device_map."""
    pytest.importorskip("peft")
    kind, options = settings
    save_adapter(kind, tiny / "llama", workspace / "adapter", **options)
    for flags in ((), ("--device_map", "auto")):
        status, out, err = cli("extract_log", "--model_name", "adapter", *DATA, "--verify", 2, *flags)
        assert status == 0 and "FAIL" not in out, err


def test_an_adapter_on_the_disk(tiny, tmp_path):
    """device_map: the merged weights are placed, not those of the base model's files."""
    pytest.importorskip("peft")
    save_adapter("LORA", tiny / "llama", tmp_path / "adapter")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    placed = load_model(str(tmp_path / "adapter"), torch.float32, device_map=places | {"lm_head": "disk"})
    merged, ids = load_model(str(tmp_path / "adapter"), torch.float32), torch.arange(9)[None]
    assert any(p.is_meta for p in placed.parameters()) and fingerprint(placed) == fingerprint(merged)
    assert relative(placed(ids).logits, merged(ids).logits) < 1e-6


def test_what_lies_under_an_adapter(tiny, tmp_path):
    """A folder of a model and an adapter, and an adapter on an adapter, are refused; its base has a revision."""
    pytest.importorskip("peft")
    save_adapter("LORA", tiny / "llama", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    edit_json(tmp_path / "two/adapter_config.json", lambda c: c.update(base_model_name_or_path=str(tmp_path / "one")))
    with pytest.raises(ValueError, match="merge that one first"):
        load_model(str(tmp_path / "two"), torch.float32)
    edit_json(tmp_path / "one/adapter_config.json", lambda c: c.update(revision="base-tag"))
    assert models._base(str(tmp_path / "one"), "adapter-tag").hub["revision"] == "base-tag"
    shutil.copy(tiny / "llama/model.safetensors", tmp_path / "one")
    with pytest.raises(ValueError, match="got both"):
        load_model(str(tmp_path / "one"), torch.float32)


# ---- adapters that change embedding or head, and the vocabulary

OF_VOCABULARY = {
    "LoRA of the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA of both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [0, 319]},
    "neither": {"target_modules": ["q_proj"]},
}


def resized_adapter(base: Path, folder: Path, tokens: int, **settings) -> None:
    """Write an adapter of a model whose vocabulary was extended, with its tokenizer, as peft does."""
    import peft

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(tokens)])
    model = load_model(str(base), torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("base", ["llama", "llama_tied"])
@pytest.mark.parametrize("variant", OF_VOCABULARY)
def test_an_adapter_of_embedding_or_head(tiny, tmp_path, base, variant, tokens):
    """It computes what peft's own model does, with a tied head and with a longer vocabulary too, also if sharded.

    Where the file lacks the embedding or the head of new tokens, this is the reason of the refusal.
    """
    peft = pytest.importorskip("peft")
    resized_adapter(tiny / base, tmp_path / "a", tokens, **OF_VOCABULARY[variant])
    if tokens and (variant, base) == ("LoRA of the head", "llama"):  # peft saves the head alone
        with pytest.raises(ValueError, match="whose vocabulary was resized, got one of them; give a model into which"):
            load_model(str(tmp_path / "a"), torch.float32)
        return
    plain = load_model(str(tiny / base), torch.float32)
    plain.resize_token_embeddings(320 + tokens, mean_resizing=False)
    own, ids = (
        peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval(),
        torch.tensor([[0, 319 + tokens, 7, 319, 9]]),
    )
    expected = own(input_ids=ids).logits
    merged = load_model(str(tmp_path / "a"), torch.float32)
    assert merged.config.vocab_size == len(models.load_tokenizer(str(tmp_path / "a"), **HUB)) == 320 + tokens
    placed = load_model(str(tmp_path / "a"), torch.float32, device_map={"": "cpu"})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded, _ = load_sharded_model(str(tmp_path / "a"), torch.float32, torch.device("cpu"), **HUB)
        for lm in (merged, placed, sharded):
            assert relative(lm(ids).logits, expected) < 2e-5
    finally:
        dist.destroy_process_group()


def test_a_configuration_beside_an_adapter(tiny, tmp_path):
    """A folder with both configurations, and no weights of a model, is the adapter."""
    pytest.importorskip("peft")
    save_adapter("LORA", tiny / "llama", tmp_path / "a")
    expected = fingerprint(load_model(str(tmp_path / "a"), torch.float32))
    shutil.copy(tiny / "gpt2/config.json", tmp_path / "a")
    assert fingerprint(load_model(str(tmp_path / "a"), torch.float32)) == expected
