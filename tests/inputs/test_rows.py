"""Prompts and responses, and chats: which tokens count."""

import json
import re
from pathlib import Path

import pytest
import reference
import torch
from conftest import make_tokenizer, run_cli, write_jsonl
from helpers import influence, refused, relative, stored_gradients
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from logra.inputs import rows
from logra.inputs.row_forms import Row, RowError
from logra.models.model import load_model
from logra.run_dir import RunDir

DATE = "2024-07-26"
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
    ids, counted = rows.encode_row(tokenizer, Row(messages=tuple(chat)), DATE)
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
    changing.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}. {% endfor %}"
    ids, counted = rows.encode_row(changing, Row(messages=tuple(chat)), DATE)
    assert changing.decode([i for i, c in zip(ids, counted, strict=True) if c]) == "the river. birds. "
    changing.chat_template = (
        "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(RowError, match="a turn 1 that is not in the text of the chat template"):
        rows.encode_row(changing, Row(messages=tuple(chat)), DATE)
    with pytest.raises(ValueError, match="chat template"):
        rows.encode_row(make_tokenizer(chat=False), Row(messages=tuple(chat)), DATE)


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


# ---- tokenizers as models have them: what they put at the ends of a text
ENDS = {
    "gpt2": "$A",
    "llama": "<s> $A",
    "t5": "$A </s>",
    "bert": "<s> $A </s>",
    "two": "<pad> <s> $A",
}


def with_ends(name: str, chat: bool = True) -> PreTrainedTokenizerFast:
    """Return the byte-level tokenizer with a template of special tokens."""
    tokenizer = make_tokenizer(chat)
    ids = [("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    template = processors.TemplateProcessing(single=ENDS[name], special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), template]
    )
    return tokenizer


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words begin with the space before them, as Llama-2's."""
    words = [("<unk>", 0), ("<s>", 0), ("</s>", 0), ("▁", -3), ("▁river", -1), ("▁the", -1), ("ing", -1)]
    words += [(letter, -4) for letter in "abcdefghijklmnopqrstuvwxyzé"]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=0))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Words(PreTrainedTokenizer):
    """A tokenizer without offsets: a word and the spaces before it are a token."""

    vocab_size = 100

    def __init__(self):
        self.words: dict[str, int] = {}
        super().__init__(bos_token="<s>")

    def get_vocab(self):
        return self.words

    def _tokenize(self, text, **_):
        return re.findall(r" *[^ ]+| +$", text)

    def _convert_token_to_id(self, token):
        return self.words.setdefault(token, len(self.words) + 10)

    def build_inputs_with_special_tokens(self, ids, pair=None):
        return [1, *ids]


def counted_text(tokenizer, encoded: rows.Encoded) -> tuple[list[str], list[str]]:
    """Return the tokens that do not count, and those that do."""
    tokens = tokenizer.convert_ids_to_tokens(encoded[0])
    return tuple([t for t, c in zip(tokens, encoded[1], strict=True) if c is flag] for flag in (False, True))


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize(("prompt", "response"), [*PAIRS, ("the river", "s ran"), ("the", " "), ("e", "\u0301 é")])
def test_prompt_and_response_are_one_text(name, prompt, response):
    """The tokens are those of the joined text; from the first one that reaches into the response on, all count."""
    tokenizer = with_ends(name)
    ids, counted = rows.encode_row(tokenizer, Row((prompt, response)), DATE)
    assert ids == tokenizer(prompt + response)["input_ids"]
    first = counted.index(True)
    assert counted == [i >= first for i in range(len(ids))]
    head, with_first = (tokenizer.decode(ids[:n], skip_special_tokens=True) for n in (first, first + 1))
    assert prompt.startswith(head) and len(with_first) > len(prompt)


@pytest.mark.parametrize("name", ENDS)
def test_special_tokens_stand_once(name):
    """A text, prompt or response that has them at its ends in writing does not get them again; others stay."""
    tokenizer, text = with_ends(name), "the river ran"
    whole = tokenizer(text)["input_ids"]
    front, back = ENDS[name].replace(" ", "").split("$A")
    for written in (text, front + text, text + back, front + text + back):
        (encoded,) = rows.encode_texts(tokenizer, [written])
        assert encoded == (whole, [True] * len(whole)), written
        ids, counted = rows.encode_row(tokenizer, Row((written[:8], written[8:])), DATE)
        assert ids == whole and any(counted)
    if front:
        ((ids, _),) = rows.encode_texts(tokenizer, [front + front + text])
        assert tokenizer.decode(ids).startswith(front + front + "the")
    inside = rows.encode_texts(tokenizer, ["a</s>b<s>", text])
    assert inside[0][0].count(2) == 1 + (name in ("t5", "bert")) and inside[1][0] == whole
    assert rows.encode_texts(with_ends("gpt2"), ["<s><s>a</s></s>"])[0][0][:2] == [1, 1]


@pytest.mark.parametrize("name", ENDS)
def test_a_prompt_to_be_continued_is_not_ended(cli, tiny, workspace, name):
    """generate.py: no EOS at the end; BOS once; and prompt_ids are those that the model saw."""
    tokenizer = with_ends(name)
    tokenizer.save_pretrained("m")
    for file in (tiny / "llama").glob("*"):
        if "token" not in file.name and "chat" not in file.name:
            Path("m", file.name).symlink_to(file)
    front = ENDS[name].replace(" ", "").split("$A")[0]
    Path("p.txt").write_text(f"the river\n{front}the river\n")
    flags = ("--model_name", "m", "--prompts", "p.txt", "--max_new_tokens", 4, "--temperature", 0)
    assert cli("generate", *flags)[0] == 0
    one, two = (json.loads(line) for line in open("data/generated/m/queries.jsonl"))
    assert (
        one["prompt_ids"] == two["prompt_ids"] == tokenizer(front + "the river", add_special_tokens=False)["input_ids"]
    )
    model = load_model("m", torch.float32)
    logits = model(torch.tensor([one["prompt_ids"] + one["response_ids"]])).logits[0]
    start = len(one["prompt_ids"])
    assert logits.argmax(dim=-1)[start - 1 : -1].tolist() == one["response_ids"] == two["response_ids"]


def test_a_space_that_merges(tokenizer):
    """A token that spans the border counts as the response's."""
    metaspace = sentencepiece_like()
    encoded = rows.encode_row(metaspace, Row(("the ", "river")), DATE)
    assert counted_text(metaspace, encoded) == (["<s>", "▁the"], ["▁river"])
    encoded = rows.encode_row(metaspace, Row(("the river go", "ing the")), DATE)
    assert counted_text(metaspace, encoded)[1] == ["ing", "▁the"]
    encoded = rows.encode_row(metaspace, Row(("the e", "\u0301t")), DATE)
    assert counted_text(metaspace, encoded)[1] == ["é", "t"]
    assert rows.prompt_tokens(metaspace, "<s>the ")[0] == 1 and 1 not in rows.prompt_tokens(metaspace, "<s>the ")[1:]
    turn = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}assistant: {% endif %}"
    chat = [{"role": role, "content": "water"} for role in ("user", "assistant", "user", "assistant")]
    ids, counted = rows.encode_row(tokenizer, Row(messages=tuple(chat)), DATE)
    assert ids == tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    assert tokenizer.decode([i for i, c in zip(ids, counted, strict=True) if c]) == " water\n water\n"


def test_chats_have_the_tokens_of_their_template_alone():
    """A template that has BOS gives one; the tokenizer adds none, nor EOS at the end; the prompt is open."""
    tokenizer = with_ends("bert")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    chat = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "ran"}]
    ids, counted = rows.encode_row(tokenizer, Row(messages=tuple(chat)), DATE)
    assert ids.count(1) == 1 and ids[0] == 1 and ids[-1] == 3 and 2 not in ids
    assert tokenizer.decode([i for i, c in zip(ids, counted, strict=True) if c]) == "ran<|eot_id|>"
    assert rows.chat_tokens(tokenizer, chat[:1], DATE) == ids[: counted.index(True)]


def test_tokenizers_without_offsets():
    """Where the prompt's tokens begin the joined text's, the border is certain; else the row is refused."""
    bytes_ = ByT5Tokenizer()
    ids, counted = rows.encode_row(bytes_, Row(("the é", "é river")), DATE)
    assert not bytes_.is_fast and ids == bytes_("the éé river")["input_ids"] and ids[-1] == bytes_.eos_token_id
    assert counted.index(True) == len("the é".encode()) and all(counted[counted.index(True) :])
    assert rows.prompt_tokens(bytes_, "the") == bytes_("the")["input_ids"][:-1]
    words = Words()
    ids, counted = rows.encode_row(words, Row(("the old", " river")), DATE)
    assert ids == words("the old river")["input_ids"] and counted == [False, False, False, True]
    for pair in (("the ", "river"), ("the riv", "er")):
        with pytest.raises(ValueError, match="tokenizer with offsets"):
            rows.encode_row(words, Row(pair), DATE)
    words.chat_template = "{% for m in messages %}{{ m['content'] }}. {% endfor %}"
    chat = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "ran"}]
    with pytest.raises(ValueError, match="tokenizer with offsets"):
        rows.encode_row(words, Row(messages=tuple(chat)), DATE)
    words.chat_template = "{% for m in messages %} {{ m['content'] }}.{% endfor %}"
    assert rows.encode_row(words, Row(messages=tuple(chat)), DATE)[1] == [False, False, True]


def test_exact_tokens_are_never_read_from_the_text(cli, tiny, workspace):
    """Token ids that are no ids, or only half of them, are refused, though the row has texts too."""
    texts = {"prompt": "the", "response": " river", "model": str(tiny / "llama")}
    flags = ("--model_name", tiny / "llama", "--data_name", "docs.jsonl", "--rank", 4, "--log_dir", "log")
    assert run_cli("extract_log", *flags) == 0
    for ids in ({"prompt_ids": [40.0], "response_ids": [41]}, {"response_ids": [41]}, {"prompt_ids": "40"}):
        write_jsonl(Path("q.jsonl"), [texts | ids])
        refused(cli("compute_influence", "--log_dir", "log", "--split", "q.jsonl"), "row 1", "response_ids")
