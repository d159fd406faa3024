"""Prompts and responses, chats, adapters, and models that are spread over memory and disk."""

import json
from pathlib import Path

import pytest
import reference
import torch
from conftest import make_model, make_texts, make_tokenizer, write_jsonl
from test_gradients import relative
from test_pipeline import influence, stored_gradients

from logra.hooks import GradientCapture
from logra.inputs import rows
from logra.inputs.model import blocks, checkpoint_blocks, choose_layers, fingerprint, load_model, load_tokenizer
from logra.projection import identity
from logra.run_dir import RunDir
from logra.stages.gradients import Extractor

PAIRS = [("the old mill", " and the river ran past"), ("water", " birds"), ("a dog", " barked at the cold children")]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_the_response_counts(cli, tiny, workspace, tokenizer):
    """--train_loss response: the gradients of the response's tokens only, as the reference has them."""
    write_jsonl(Path("sft.jsonl"), [{"prompt": prompt, "response": response} for prompt, response in PAIRS])
    flags = ("--model_name", tiny / "llama", "--data_name", "sft.jsonl", "--rank", 4, "--mlp_only")
    assert cli("extract_log", *flags, "--log_dir", "log", "--train_loss", "response")[0] == 0
    assert cli("extract_log", *flags, "--log_dir", "all")[0] == 0
    log, every = RunDir.load(Path("log")), RunDir.load(Path("all"))
    model, projections = load_model(str(tiny / "llama"), torch.float32), log.projections()
    grads, whole = stored_gradients(log), stored_gradients(every)
    for row, (prompt, response) in enumerate(PAIRS):
        ids, start = tokenizer(prompt + response)["input_ids"], len(tokenizer(prompt)["input_ids"])
        assert log.train()[row]["input_ids"] == ids and log.train()[row]["counted"].index(True) == start
        for first, stored in ((start, grads), (1, whole)):
            for layer, g in reference.full_gradient(model, log.shapes, ids, first).items():
                assert relative(stored[layer][row], reference.project(g, *projections[layer][:2])) < 1e-5
    scores, _ = influence(cli)
    assert scores.shape == (3, 3)


@pytest.mark.parametrize("pack", [False, True])
def test_counted_tokens_stay_with_their_tokens(cli, tiny, workspace, pack):
    """In blocks, and in packed ones: every token of a response counts once."""
    write_jsonl(Path("sft.jsonl"), [{"prompt": prompt, "response": response} for prompt, response in PAIRS])
    flags = ("--model_name", tiny / "llama", "--data_name", "sft.jsonl", "--rank", 4, "--block_size", 6)
    assert (
        cli("extract_log", *flags, "--train_loss", "response", *(["--pack"] if pack else []), "--log_dir", "log")[0]
        == 0
    )
    examples = RunDir.load(Path("log")).train()
    tokenizer, expected = make_tokenizer(), []
    for pair in PAIRS:
        expected += [(i, part == 1) for part, text in enumerate(pair) for i in tokenizer(text)["input_ids"]]
    found = [pair for row in examples for pair in zip(row["input_ids"], row["counted"], strict=True)]
    assert found == expected and max(len(row["input_ids"]) for row in examples) == 6


def test_chats(cli, tiny, workspace, tokenizer):
    """messages: every assistant's turn counts, its end included, and nothing else; as queries too."""
    chat = [
        {"role": "user", "content": "the old mill"},
        {"role": "assistant", "content": "the river"},
        {"role": "user", "content": "water"},
        {"role": "assistant", "content": "birds"},
    ]
    ids, counted = rows.encode_messages(tokenizer, chat)
    assert ids == tokenizer.apply_chat_template(chat, return_dict=False)
    text = tokenizer.decode([i for i, c in zip(ids, counted, strict=True) if c])
    assert text.replace("<s>", "") == "the river<|eot_id|>birds<|eot_id|>"
    write_jsonl(Path("chats.jsonl"), [{"messages": chat}, {"messages": chat[:2]}])
    flags = ("--model_name", tiny / "llama", "--data_name", "chats.jsonl", "--rank", 4, "--log_dir", "log")
    assert cli("extract_log", *flags, "--train_loss", "response")[0] == 0
    status, _, err = cli("compute_influence", "--log_dir", "log", "--split", "chats.jsonl")
    assert status == 0, err
    assert cli("analysis", "--log_dir", "log")[0] == 0
    changing = make_tokenizer()
    changing.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="earlier turns"):
        rows.encode_messages(changing, chat)
    with pytest.raises(ValueError, match="chat template"):
        rows.encode_messages(make_tokenizer(chat=False), chat)


def test_bad_responses(cli, tiny, workspace):
    """Rows without a response, and data without the columns, are refused in one line."""
    flags = ("--model_name", tiny / "llama", "--rank", 4, "--log_dir", "log", "--train_loss", "response")
    status, _, err = cli("extract_log", *flags, "--data_name", "docs.jsonl")
    assert status == 2 and "prompt and response" in err and not Path("log").exists()
    write_jsonl(Path("sft.jsonl"), [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}])
    status, _, err = cli("extract_log", *flags, "--data_name", "sft.jsonl")
    assert status == 2 and "1 (empty)" in err
    write_jsonl(Path("chats.jsonl"), [{"messages": [{"role": "user", "content": "a"}]}])
    status, _, err = cli("extract_log", *flags, "--data_name", "chats.jsonl")
    assert status == 2 and "no assistant" in err


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
