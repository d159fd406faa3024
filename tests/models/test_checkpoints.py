"""Kinds of checkpoints: each loads as the model that it holds, or is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, VOCAB, edit_json, make_model, make_texts, make_tokenizer, save_model
from gguf import GGUFWriter, TokenType
from helpers import DATA, QUERIES, extract, refused, relative
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DeepseekV3Config,
    Emu3Config,
    GptOssConfig,
    MixtralConfig,
    MllamaConfig,
    MusicgenConfig,
)

from logra.models.layers import choose_layers
from logra.models.model import fingerprint, load_config, load_model, load_tokenizer, source_contents
from logra.run_dir import RunDir

IDS = torch.tensor([[0, 319, *range(3, 200, 11)]])
MOE = LLAMA | {
    "hidden_size": 32,
    "intermediate_size": 32,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def build(config, folder: Path, auto=AutoModelForCausalLM):
    """Return a tiny random model that is saved in a folder."""
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


def assert_same(folder: Path, expected, dtype: torch.dtype = torch.float32) -> None:
    """The model in a folder has the weights of a model, in this dtype."""
    loaded, expected = load_model(str(folder), dtype), expected.to(dtype)
    assert fingerprint(loaded) == fingerprint(expected)
    assert {p.dtype for p in loaded.parameters()} == {dtype} and all(p.requires_grad for p in loaded.parameters())
    weights = dict(expected.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.named_parameters())


# ---- dtypes and files


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_weights_saved_in_half_precision(tmp_path, saved, name):
    """One file or many, the head tied or not: the weights are those saved, in the dtype asked for."""
    model = make_model(name, saved)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len([*(tmp_path / "many").glob("model-*.safetensors")]) > 2
    for folder in ("one", "many"):
        assert_same(tmp_path / folder, make_model(name, saved))
        assert_same(tmp_path / folder, make_model(name, saved), torch.bfloat16)


# ---- GGUF


def rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a matrix in llama.cpp's order: the two halves of a head's rows are interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, name: str = "llama") -> None:
    """Write a tiny Llama and its tokenizer as llama.cpp does."""
    model, tokenizer, writer = make_model(name), make_tokenizer(), GGUFWriter(path, "llama")
    writer.add_context_length(64), writer.add_embedding_length(24), writer.add_block_count(2)
    writer.add_feed_forward_length(40), writer.add_head_count(4), writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps), writer.add_rope_dimension_count(6)
    writer.add_vocab_size(VOCAB), writer.add_rope_freq_base(10000.0)
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(len(tokens), VOCAB)]
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_token_types([TokenType.CONTROL if i < 4 else TokenType.NORMAL for i in range(len(tokens))])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_pad_token_id(0)
    names = {
        "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for key, weight in model.named_parameters():
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        weight = rotary_halves(weight, heads) if heads else weight
        writer.add_tensor(key.removeprefix("model."), weight.detach().numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def test_gguf_files(cli, workspace):
    """--model_name path/model.gguf and a folder with that file: all stages; model and tokenizer are those in it."""
    Path("m").mkdir()
    write_gguf(Path("m/tiny.gguf"))
    for name in ("m", "m/tiny.gguf"):
        model, expected = load_model(name, torch.float32), make_model("llama")
        weights = dict(expected.named_parameters())
        assert all(relative(p, weights[key]) < 1e-6 for key, p in model.named_parameters())
        assert relative(model(IDS).logits, expected(IDS).logits) < 1e-5
        assert {p.dtype for p in load_model(name, torch.bfloat16).parameters()} == {torch.bfloat16}
        tokenizer = load_tokenizer(name)
        assert [tokenizer(text)["input_ids"] for text in make_texts(9)] == [
            make_tokenizer()(text)["input_ids"] for text in make_texts(9)
        ]
        assert [*source_contents(name)] == ["tiny.gguf"]
    for flags in (("--dry_run",), ("--verify", 2), ()):
        status, out, err = cli("extract_log", "--model_name", "m/tiny.gguf", *DATA, "--rank", 4, *flags)
        assert status == 0 and "FAIL" not in out, err
    assert cli("compute_influence", *QUERIES)[0] == 0
    refused(cli("extract_log", "--model_name", "m", *DATA, "--rank", 8), "rank")
    shutil.copy("m/tiny.gguf", "m/other.gguf")
    refused(cli("extract_log", "--model_name", "m", "--data_name", "docs.jsonl"), "expected one GGUF file in m, got 2")
    write_gguf(Path("m/tiny.gguf"), "llama_tied")
    refused(cli("compute_influence", *QUERIES), "tiny.gguf has other content")


def test_a_gguf_file_that_is_none(cli, workspace):
    """A damaged file and a missing one: one line."""
    Path("x.gguf").write_bytes(b"GGUF and no more")
    for name, words in (("x.gguf", "can't be loaded"), ("y.gguf", "no such file or folder")):
        refused(cli("extract_log", "--model_name", name, *DATA), name, words)


# ---- quantised checkpoints
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp8(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a matrix in e4m3 with a scale for each block of rows and columns, the scales, and its values."""
    scales = torch.stack([
        torch.stack([part.abs().amax() / 448 for part in rows.split(block, 1)]) for rows in weight.split(block)
    ])  # fmt: skip
    every = scales.repeat_interleave(block, 0)[: len(weight)].repeat_interleave(block, 1)[:, : weight.shape[1]]
    numbers = (weight / every).to(torch.float8_e4m3fn)
    return numbers, scales, numbers.float() * every


def quantise(source: Path, folder: Path, method: str, block: int = 16) -> None:
    """Write two copies of a model: its quantised weights, and in <folder>_plain their values."""
    weights, values = load_file(source / "model.safetensors"), {}
    for key, weight in list(weights.items()):
        if method == "mxfp4" and weight.dim() == 3:  # an expert's matrix is [d_in, d_out], its blocks [d_out, d_in]
            experts, d_in, d_out = weight.shape
            blocks = torch.randint(256, (experts, d_out, d_in // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 126, blocks.shape[:3], dtype=torch.uint8)
            pairs = torch.stack([FP4[(blocks % 16).long()], FP4[(blocks // 16).long()]], dim=-1).flatten(-2)
            values[key] = (pairs * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).mT.contiguous()
            weights |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            del weights[key]
        elif method == "fp8" and "_proj" in key:
            weights[key], weights[f"{key}_scale_inv"], values[key] = fp8(weight, block)
        else:  # in bfloat16, as checkpoints have what is not quantised
            weights[key] = weight.to(torch.bfloat16)
            values[key] = weights[key].float()
    quantization = {"quant_method": method} | ({"weight_block_size": [block, block]} if method == "fp8" else {})
    for name, tensors in ((folder.name, weights), (f"{folder.name}_plain", values)):
        shutil.copytree(source, folder.parent / name)
        save_file(tensors, folder.parent / name / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=quantization))


QUANTISED = {
    "mxfp4": GptOssConfig(**MOE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "fp8": DeepseekV3Config(
        **LLAMA | {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 4, "head_dim": 4},
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_mixtures_of_experts(cli, workspace, method):
    """gpt-oss in MXFP4 and DeepSeek-V3 in FP8: the weights are the values, in any dtype; --dry_run and --verify."""
    build(QUANTISED[method], workspace / "source")
    make_tokenizer().save_pretrained("source")
    quantise(workspace / "source", workspace / "model", method)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(Path("model"), AutoModelForCausalLM.from_pretrained("model_plain"), dtype)
    flags = ("--model_name", "model", *DATA, "--rank", 4, "--layers", "experts|q_")
    for check in (("--dry_run",), ("--verify", 2)):
        status, out, err = cli("extract_log", *flags, *check)
        assert status == 0 and "FAIL" not in out, err


def test_fp8_on_a_gpu_is_dequantised_too(tmp_path, monkeypatch):
    """There transformers would keep the weights in FP8, and a layer would be none that can be tracked."""
    build(QUANTISED["fp8"], tmp_path / "source")
    quantise(tmp_path / "source", tmp_path / "model", "fp8")
    expected = load_model(str(tmp_path / "model"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    found = load_model(str(tmp_path / "model"), torch.float32)
    monkeypatch.undo()
    assert fingerprint(found) == fingerprint(expected) and choose_layers(found, True, None)


def test_fp8_in_parts_of_blocks(tmp_path):
    """transformers would take rows of 20 for 40 in blocks of 28, and fail for blocks of 16: both are refused before."""
    make_model("llama").save_pretrained(tmp_path / "source")
    for block in (28, 16):
        quantise(tmp_path / "source", tmp_path / f"b{block}", "fp8", block)
        expected = rf"blocks of \[{block}, {block}\], got model.layers.0.self_attn.q_proj.weight \[24, 24\]"
        expected = expected if block == 16 else expected.replace("self_attn.q", "mlp.gate").replace("24, 24", "40, 24")
        with pytest.raises(ValueError, match=expected) as refusal:
            load_model(str(tmp_path / f"b{block}"), torch.float32)
        assert "\n" not in str(refusal.value)
    quantise(tmp_path / "source", tmp_path / "b4", "fp8", 4)
    assert_same(tmp_path / "b4", AutoModelForCausalLM.from_pretrained(tmp_path / "b4_plain"))


def test_other_quantised_checkpoints(cli, tiny, workspace):
    """They are refused before anything else is read; bitsandbytes needs its package."""
    for method in ("gptq", "awq", "compressed-tensors", None):
        shutil.copytree(tiny / "llama", f"m-{method}")
        edit_json(Path(f"m-{method}/config.json"), lambda c: c.update(quantization_config={"quant_method": method}))  # noqa: B023
        for flag in ("--dry_run", "--overwrite"):
            refused(cli("extract_log", "--model_name", f"m-{method}", *DATA, flag), f"quantised with {method}", "copy")


# ---- parts of a larger model
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 48,
    "vision_output_dim": 32, "image_size": 16, "patch_size": 4, "intermediate_layers_indices": [0],
}  # fmt: skip


def test_a_vision_tower_is_left_out(cli, workspace):
    """Llama 3.2 Vision's text model: tower and projector are left out, once; a weight of the language model is not."""
    text = LLAMA | {"hidden_size": 32, "head_dim": 8, "cross_attention_layers": [1]}
    config = MllamaConfig(vision_config=VISION, text_config=text)
    whole = build(config, workspace / "m", AutoModelForImageTextToText)
    make_tokenizer().save_pretrained("m")
    flags = ("--model_name", "m", *DATA, "--rank", 4, "--layers", r"\.0\.mlp")
    status, out, err = cli("extract_log", *flags, "--verify", 2)
    assert status == 0 and "FAIL" not in out, err
    assert out.count("left out of m: multi_modal_projector, vision_model; text does not reach them") == 1
    assert relative(load_model("m", torch.float32)(IDS).logits, whole(IDS).logits) < 1e-6
    weights = load_file("m/model.safetensors")
    first = next(key for key in weights if "up_proj" in key)
    for changed, message in (
        (weights | {first.replace("up_proj", "extra_proj"): torch.ones(2)}, r"got 1 left over \(.*extra_proj"),
        ({key: weight for key, weight in weights.items() if key != first}, r"got 1 missing \(.*up_proj"),
    ):
        save_file(changed, "m/model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_model("m", torch.float32)


def test_a_plain_model_with_a_tower_is_refused(tiny, tmp_path):
    """A model of text alone has no other parts: what is left over stays a fault."""
    shutil.copytree(tiny / "llama", tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors") | {"vision_model.x.weight": torch.ones(2)}
    save_file(weights, tmp_path / "m/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 left over \(vision_model\.x\.weight\)"):
        load_model(str(tmp_path / "m"), torch.float32)


def test_a_prefix_of_the_language_model(cli, workspace):
    """Emu3: transformers looks for the text model's keys without their prefix; the message says so, and it helps."""
    vq = {
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
    }
    text = LLAMA | {"hidden_size": 32, "head_dim": 8}
    config = Emu3Config(
        vq_config=vq, text_config=text, vocabulary_map={"<image>": 200, "<|extra_200|>": 201}, image_token_id=200
    )
    whole = build(config, workspace / "m", AutoModelForImageTextToText)
    make_tokenizer().save_pretrained("m")
    with pytest.raises(ValueError, match=r"missing .*remove the prefix 'text_model\.' from the keys of its files"):
        load_model("m", torch.float32)
    weights = load_file("m/model.safetensors")
    save_file(
        {key.removeprefix("text_model."): w for key, w in weights.items()}, "m/model.safetensors", {"format": "pt"}
    )
    assert relative(load_model("m", torch.float32)(IDS).logits, whole(IDS).logits) < 1e-6
    shutil.move("m", "without")
    status, out, err = cli("extract_log", "--model_name", "without", *DATA, "--rank", 4, "--verify", 2)
    assert status == 0 and "FAIL" not in out and out.count("left out of without: vqmodel; ") == 1, err


def test_models_without_one_language_model(tmp_path):
    """MusicGen has a text encoder and a decoder of sounds: one line of ours."""
    MusicgenConfig(
        text_encoder={"model_type": "t5"}, audio_encoder={"model_type": "encodec"}, decoder={}
    ).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected a model with one language model, .* of type musicgen, which has"
    ) as refusal:
        load_config(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_missing_package_is_named(monkeypatch, tiny):
    """As transformers names it, and what to do about it."""

    def fail(*_, **__):
        raise ImportError("\nA model needs the timm library. You can install it with pip:\n`pip install timm`.\nMore")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(
        ValueError, match=r"\(A model needs .* with pip: `pip install timm`\.\); install what is missing$"
    ):
        load_model(str(tiny / "llama"), torch.float32)


# ---- tokenizers


def test_a_tokenizer_without_special_tokens(cli, workspace):
    """No pad, BOS or EOS: batches, packed blocks, sampled answers and scores are as with them."""
    save_model(Path("m"), "llama")
    shutil.copytree("m", "bare")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if Path("bare", file).exists():
            edit_json(Path("bare", file), lambda c: [c.pop(f"{key}_token", None) for key in ("pad", "bos", "eos")])
    tokenizer = AutoTokenizer.from_pretrained("bare")
    assert tokenizer.pad_token is tokenizer.bos_token is tokenizer.eos_token is None
    Path("p.txt").write_text("the river\nthe old mill and the dog\n")
    runs = []
    for name in ("m", "bare"):
        flags = ("--prompts", "p.txt", "--max_new_tokens", 4, "--temperature", 0, "--output", f"{name}.jsonl")
        assert cli("generate", "--model_name", name, *flags)[0] == 0
        answers = [json.loads(line)["response_ids"] for line in open(f"{name}.jsonl")]
        run = extract(cli, Path(name), "--rank", 4, "--overwrite")
        assert cli("compute_influence", "--log_dir", "log", "--split", f"{name}.jsonl")[0] == 0
        runs.append((answers, list(run.train()["input_ids"])))
        assert (
            cli(
                "extract_log",
                "--model_name",
                name,
                "--data_name",
                "docs.jsonl",
                "--log_dir",
                "p",
                "--pack",
                "--overwrite",
            )[0]
            == 0
        )
    assert runs[0] == runs[1] and RunDir.load(Path("p")).examples > 0


# ---- adapters of mixtures of experts
MIXTRAL = MixtralConfig(**MOE)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CHOICES = {  # what an adapter trains
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "attention and experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_adapters_of_a_mixture_of_experts(cli, workspace, choice):
    """LoRA on the experts' parameters, on attention alone, on the router: merged, with peft's own logits."""
    peft = pytest.importorskip("peft")
    build(MIXTRAL, workspace / "base")
    make_tokenizer().save_pretrained("base")
    plain, config = load_model("base", torch.float32), {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    tuned = peft.get_peft_model(load_model("base", torch.float32), peft.LoraConfig(**config | CHOICES[choice])).eval()
    tuned.save_pretrained("adapter")
    with torch.no_grad():
        own, merged = tuned(input_ids=IDS).logits, load_model("adapter", torch.float32)(IDS).logits
        assert relative(plain(IDS).logits, own) > 1e-3, "the adapter has an effect"
        assert relative(merged, own) < 2e-5
    flags = ("--model_name", "adapter", *DATA, "--rank", 4, "--layers", "experts|q_", "--verify", 2)
    status, out, err = cli("extract_log", *flags)
    assert status == 0 and "FAIL" not in out, err


def test_an_adapter_of_separate_experts(tmp_path):
    """Trained with transformers 4, where an expert was three nn.Linear: W + (alpha / r) B A for each of them."""
    pytest.importorskip("peft")
    base, adapter, rank = build(MIXTRAL, tmp_path / "base"), {}, 2
    with torch.no_grad():
        for layer, block in enumerate(base.model.layers):
            for expert in range(4):
                for name in ("w1", "w3", "w2"):  # gate, up, down
                    a, b = torch.randn(rank, 32), 0.1 * torch.randn(32, rank)
                    key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                    adapter |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                    gate_up, down = block.mlp.experts.gate_up_proj[expert], block.mlp.experts.down_proj[expert]
                    {"w1": gate_up[:32], "w3": gate_up[32:], "w2": down}[name].add_(6 / rank * b @ a)
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter/adapter_model.safetensors", {"format": "pt"})
    content = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    content |= {"r": rank, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(content))
    assert relative(load_model(str(tmp_path / "adapter"), torch.float32)(IDS).logits, base(IDS).logits) < 2e-5
