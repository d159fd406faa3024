"""Layers to track, adapters, and models that are spread over memory and disk."""

import json
from pathlib import Path

import pytest
import reference
import torch
from conftest import LLAMA, OTHERS, make_model, make_texts, make_tokenizer
from helpers import influence, relative, stored_gradients
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from logra.hooks import GradientCapture
from logra.inputs.model import (
    blocks,
    checkpoint_blocks,
    choose_layers,
    context_length,
    fingerprint,
    load_model,
    load_tokenizer,
)
from logra.loss import hidden_states
from logra.projection import identity
from logra.run_dir import RunDir
from logra.stages.gradients import Extractor


def test_fused_experts_are_refused_by_name():
    """A mixture-of-experts model's fused weights are named; --layers goes on with the others."""
    model = make_model("mixtral")
    with pytest.raises(ValueError, match=r"experts.*--layers"):
        choose_layers(model, False, None)
    assert set(OTHERS) and len(choose_layers(model, False, r"self_attn")) == 8


def test_layer_choice(model):
    """MLP only, a pattern, no match; neither embedding nor head."""
    every, mlp = choose_layers(model, False, None), choose_layers(model, True, None)
    assert set(mlp) < set(every) and not any("head" in n or "embed" in n or "wte" in n for n in every)
    assert len(mlp) == 2 * (3 if model.config.model_type == "llama" else 2)
    assert choose_layers(model, False, r"\.1\.") == {n: s for n, s in every.items() if ".1." in n}
    with pytest.raises(ValueError, match="none"):
        choose_layers(model, False, "nothing_like_it")


@pytest.mark.parametrize("name", ["roberta", "camembert", "data2vec-text", "xlm-roberta-xl", "xmod", "bert"])
def test_the_context_can_be_used(name):
    """A text as long as the context runs; a longer one has no positions. RoBERTa's begin after padding's."""
    config = CONFIG_MAPPING[name](**LLAMA | {"pad_token_id": 3, "is_decoder": True, "default_language": "en_XX"})
    model, length = AutoModelForCausalLM.from_config(config).eval(), context_length(config)
    assert hidden_states(model, torch.full((1, length), 9)).shape[1] == length
    with pytest.raises((IndexError, RuntimeError)):
        hidden_states(model, torch.full((1, length + 1), 9))
    assert context_length(CONFIG_MAPPING["xlnet"]()) is None


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
