"""Prompts and responses, and chats: which tokens count."""

from pathlib import Path

import pytest
import reference
import torch
from conftest import make_tokenizer, write_jsonl
from helpers import influence, relative, stored_gradients

from logra.inputs import rows
from logra.inputs.model import load_model
from logra.run_dir import RunDir

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
