"""Which layers are tracked, adapters, and models that are spread over memory and disk."""

import json
import re
from pathlib import Path

import pytest
import reference
import torch
from conftest import LLAMA, make_model, make_texts, make_tokenizer
from helpers import influence, relative, stored_gradients
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CONFIG_MAPPING,
    BartConfig,
    BertConfig,
    DeepseekV32Config,
    Gemma3Config,
    LlamaConfig,
    MambaConfig,
    Qwen2MoeConfig,
)
from transformers import AutoModelForCausalLM as Auto

from logra.hooks import GradientCapture
from logra.loss import hidden_states
from logra.models.layers import MLP_PATTERN, choose_layers, say_coverage
from logra.models.model import (
    blocks,
    checkpoint_blocks,
    context_length,
    empty_model,
    fingerprint,
    load_model,
    load_tokenizer,
)
from logra.projection import identity
from logra.run_dir import RunDir
from logra.stages.gradients import Extractor

EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
BERT_SIZES = {
    "vocab_size": 320, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
}  # fmt: skip
BART_SIZES = {"d_model": 24, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 40}


def build(config) -> nn.Module:
    """Return a model with random weights."""
    torch.manual_seed(0)
    return Auto.from_config(config, dtype=torch.float32).eval()


def kinds(names) -> set[str]:
    """Return layer names without what stands before the last number."""
    return {re.sub(r"^.*\.\d+\.", "", name) for name in names}


def said(capsys, model, *flags) -> str:
    """Return what say_coverage prints."""
    capsys.readouterr()
    say_coverage(model, choose_layers(model, *flags), *flags)
    return capsys.readouterr().out


def test_layer_choice(model):
    """MLP only, a pattern, no match; neither embedding nor head."""
    every, mlp = choose_layers(model, False, None), choose_layers(model, True, None)
    assert set(mlp) < set(every) and not any("head" in n or "embed" in n or "wte" in n for n in every)
    assert len(mlp) == 2 * (3 if model.config.model_type == "llama" else 2)
    assert choose_layers(model, False, r"\.1\.") == {n: s for n, s in every.items() if ".1." in n}
    with pytest.raises(ValueError, match="'nothing_like_it', got none; give --layers PATTERN"):
        choose_layers(model, False, "nothing_like_it")


@pytest.mark.parametrize("name", ["roberta", "camembert", "data2vec-text", "xlm-roberta-xl", "xmod", "bert"])
def test_the_context_can_be_used(name):
    """A text as long as the context runs; a longer one has no positions. RoBERTa's begin after padding's."""
    config = CONFIG_MAPPING[name](**LLAMA | {"pad_token_id": 3, "is_decoder": True, "default_language": "en_XX"})
    model, length = Auto.from_config(config).eval(), context_length(config)
    assert hidden_states(model, torch.full((1, length), 9)).shape[1] == length
    with pytest.raises((IndexError, RuntimeError)):
        hidden_states(model, torch.full((1, length + 1), 9))
    assert context_length(CONFIG_MAPPING["xlnet"]()) is None


MLP = """
    mlp.down_proj mlp.gate_proj mlp.gate_up_proj mlp.c_fc mlp.dense_h_to_4h mlp.Wi mlp_block.up_proj
    shared_mlp.input_linear
    mlp.shared_expert.up_proj mlp.shared_experts.gate_proj mlp.experts.gate_up_proj block_sparse_moe.experts.3.w1
    feed_forward.w1 feed_forward.key feed_forward.gate_proj feed_forward_in.gate_up_proj ffn.0 ffn.proj_up ff.layer_1
    fc1 fc_in intermediate.dense output.dense mixer.up_proj mixer.shared_experts.down_proj mixer.experts.down_proj
""".split()
OTHERS = """
    self_attn.q_proj attn.c_proj self_attn.gate_proj attention.output.dense attention.output self_attention.dense
    mlp.gate mlp.gate.down_proj mlp.router mlp.router.gate feed_forward.router block_sparse_moe.gate
    mlp.shared_expert_gate
    self_attention.experts.router.layer mixer.in_proj mamba.out_proj linear_attn.in_proj_qkv temporal_block.linear_x
    per_layer_projection laurel.linear_left mlstm_layer.out_proj
""".split()


def test_names_of_mlps():
    """--mlp_only takes MLPs, experts and shared experts; not attention, routers, gates of experts or state spaces."""
    found = [name for name in MLP + OTHERS if re.search(MLP_PATTERN, f"model.layers.10.{name}", re.IGNORECASE)]
    assert found == MLP


QWEN = Qwen2MoeConfig(**LLAMA, **EXPERTS, shared_expert_intermediate_size=16)
QWEN_MLP = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
QWEN_MLP |= {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
BERT = BertConfig(**BERT_SIZES, is_decoder=True)


@pytest.mark.parametrize(
    ("config", "expected"), [(QWEN, QWEN_MLP), (BERT, {"intermediate.dense", "output.dense"})], ids=["experts", "bert"]
)
def test_mlp_only(config, expected):
    """What --mlp_only finds where names differ: the MLPs of all layers, and nothing else."""
    found = choose_layers(build(config), True, None)
    assert kinds(found) == expected and len(found) == 2 * len(expected)


def test_router(capsys):
    """A router that is a bare parameter is said to be left out; one that is an nn.Linear is tracked with all layers."""
    model = build(QWEN)
    assert "mlp.shared_expert_gate" in kinds(choose_layers(model, False, None))
    assert "mlp.gate 0." in said(capsys, model, False, None)
    assert "mlp.gate 0." in (out := said(capsys, model, True, None)) and "mlp.shared_expert_gate 0." in out


def test_coverage_counts(capsys):
    """The share is that of the tracked weights; kinds are sorted by size, and add up to the rest."""
    model = make_model("llama")
    shapes, total = choose_layers(model, True, None), sum(p.numel() for p in model.parameters())
    out = said(capsys, model, True, None)
    share = 100 * sum(a * b for a, b in shapes.values()) / total
    assert f"tracked {share:.1f}% of {total:,} parameters; left out: embedding and head " in out
    parts = [float(x) for x in re.findall(r"([\d.]+)%", out)]
    assert sum(parts) == pytest.approx(100, abs=0.3) and parts[1:] == sorted(parts[1:], reverse=True)
    assert [name in out for name in ("attention", "norms and biases", "WARNING")] == [True, True, False]


def test_little_tracked(capsys):
    """A small share is no silent success; with --layers it is the user's choice."""
    model = build(LlamaConfig(**LLAMA | {"intermediate_size": 4}))
    assert "WARNING: less than a quarter" in said(capsys, model, True, None)
    assert "WARNING" not in said(capsys, model, True, r"\.0\.mlp\.up_proj")


def test_no_mlp(capsys):
    """A state-space model has no MLP: one line says what to give instead, and without --mlp_only it is tracked."""
    model = build(MambaConfig(vocab_size=320, hidden_size=24, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match=r"--mlp_only, got none; leave out --mlp_only, or give --layers") as error:
        choose_layers(model, True, None)
    (example,) = re.findall(r"e\.g\. (\S+),", str(error.value))
    assert kinds(choose_layers(model, False, example)) == {"mixer.in_proj"}
    out = said(capsys, model, False, None)
    assert "mixer.A_log" in out
    assert "mixer.dt_proj (no gradient per token)" in out  # the model reads dt_proj.weight itself


def test_towers(capsys):
    """Layers of a vision tower get no gradient from text: left out and said, in the choice of all layers too."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(
        text_config=LLAMA, vision_config=vision | {"image_size": 28, "patch_size": 14}, image_token_index=300,
        boi_token_index=301, eoi_token_index=302, mm_tokens_per_image=4,
    )  # fmt: skip
    model = build(config)
    found = choose_layers(model, False, None)
    assert len(found) == 2 * 7 and all("language_model" in name for name in found)
    assert "vision_tower (no gradient per token)" in said(capsys, model, False, None)
    with pytest.raises(ValueError, match="expected layers that get one gradient per token"):
        choose_layers(model, False, "vision_tower")
    with FakeTensorMode():
        assert choose_layers(empty_model(config, torch.float32, False), False, None) == found


def test_layers_without_gradient(capsys):
    """Cross attention without an encoder does not run, an indexer only chooses positions: left out, and said."""
    model = build(BartConfig(**BART_SIZES, is_decoder=True, is_encoder_decoder=False))
    assert not [name for name in choose_layers(model, False, None) if "encoder_attn" in name]
    assert "encoder_attn (no gradient per token)" in said(capsys, model, False, None)
    model = build(
        DeepseekV32Config(
            **BERT_SIZES | LLAMA | EXPERTS | {"num_key_value_heads": 4}, kv_lora_rank=8, q_lora_rank=12,
            qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=4, index_topk=2, index_head_dim=8, index_n_heads=2,
            n_group=1, topk_group=1, first_k_dense_replace=1, n_routed_experts=2,
        )
    )  # fmt: skip
    assert not [name for name in choose_layers(model, False, None) if "indexer" in name]
    assert "self_attn.indexer (no gradient per token)" in said(capsys, model, False, None)


def test_layers_that_run_on_parts_of_a_vector(capsys):
    """As DeepSeek-V4's grouped output projection. It has several inputs per token: left out, and said."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(12, 20)

        def forward(self, x):
            return self.part(x.unflatten(-1, (2, 12))).flatten(-2)

    model = build(LlamaConfig(**LLAMA))
    model.model.layers[1].mlp.up_proj = Halves()
    assert len(choose_layers(model, False, None)) == 13
    assert "mlp.up_proj (no gradient per token)" in said(capsys, model, False, None)


def test_experts_in_modules_of_their_own():
    """Experts that a router chooses among modules are refused, also those that the first tokens do not choose."""

    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(24, 24)) for _ in range(16))

        def forward(self, x):
            return self.experts[0](x)

    model = make_model("llama")
    model.model.layers[1].mlp = Sparse()
    with pytest.raises(ValueError, match=r"experts\.\d+\.0, an expert that a router chooses"):
        choose_layers(model, True, None)
    assert len(choose_layers(model, False, "self_attn")) == 8


def test_a_choice_leaves_the_model_as_it_was():
    """Gradients, modes and trainable parameters."""
    model = make_model("llama")
    assert choose_layers(model, False, None)
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_an_adapter(cli, tiny, workspace):
    """A LoRA-tuned model: base layers are tracked, under their own names, with the adapter in the forward pass."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(load_model(str(tiny / "llama"), torch.float32), config).eval()
    tuned.save_pretrained("adapter")
    assert json.load(open("adapter/adapter_config.json"))["base_model_name_or_path"] == str(tiny / "llama")
    loaded = load_model("adapter", torch.float32)
    assert fingerprint(loaded) != fingerprint(load_model(str(tiny / "llama"), torch.float32))
    assert choose_layers(loaded, False, None) == choose_layers(make_model("llama"), False, None)
    status, _, err = cli(
        "extract_log", "--model_name", "adapter", "--data_name", "docs.jsonl", "--rank", 4, "--log_dir", "log"
    )
    assert status == 0, err
    log, merged = RunDir.load(Path("log")), tuned.merge_and_unload().requires_grad_(True)
    grads, examples = stored_gradients(log), log.train()
    for row in range(3):  # d and x of a layer are those of the merged weights
        for layer, g in reference.full_gradient(merged, log.shapes, examples[row]["input_ids"]).items():
            assert relative(grads[layer][row], reference.project(g, *log.projections()[layer][:2])) < 1e-4
    assert influence(cli)[0].shape[0] == 3
    assert len(load_tokenizer("adapter")) == len(make_tokenizer()), "the base model's"


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_offloaded_weights(tiny, name):
    """--device_map with weights on the disk gives what the whole model in memory gives; the fingerprint too."""
    model = load_model(str(tiny / name), torch.float32)
    places = {f"{model.base_model_prefix}.{child}": "cpu" for child, _ in model.base_model.named_children()}
    places[next(child for child in places if model.get_submodule(child) is blocks(model))] = "disk"
    places["lm_head"] = "disk" if name == "llama" else "cpu"
    offloaded = load_model(str(tiny / name), torch.float32, device_map=places)
    assert any(p.is_meta for p in offloaded.parameters()), "some weights are not in memory"
    assert fingerprint(offloaded) == fingerprint(model)
    checkpoint_blocks(offloaded)
    tokenizer = make_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in make_texts(4)]
    results = []
    for lm in (model, offloaded):
        shapes = choose_layers(lm, False, None)
        with GradientCapture(lm, identity(shapes)) as capture:
            results.append(Extractor(lm, capture, 1000).gradients(ids).wait()[0])
    assert all(relative(results[1][layer], grad) < 1e-5 for layer, grad in results[0].items())


def test_device_map_from_the_command_line(cli, tiny, workspace):
    """--device_map auto, stages 2 and 3: the same gradients; --quantize without a GPU is refused."""
    flags = ("--model_name", tiny / "llama", "--data_name", "docs.jsonl", "--rank", 4)
    assert cli("extract_log", *flags, "--log_dir", "ref")[0] == 0
    status, _, err = cli("extract_log", *flags, "--log_dir", "log", "--device_map", "auto")
    assert status == 0, err
    one, two = (stored_gradients(RunDir.load(Path(name))) for name in ("ref", "log"))
    assert all(relative(two[layer], grads) < 1e-5 for layer, grads in one.items())
    assert cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", "--device_map", "auto")[0] == 0
    status, _, err = cli("extract_log", *flags, "--log_dir", "other", "--fsdp", "--device_map", "auto")
    assert status == 2 and "--fsdp" in err
    if not torch.cuda.is_available():
        status, _, err = cli("extract_log", *flags, "--log_dir", "other", "--quantize", "4bit")
        assert status == 2 and "GPU" in err
