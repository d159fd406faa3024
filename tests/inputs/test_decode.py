"""Token ids to text: parts of a text keep their spaces and characters, whatever the tokenizer's decoder does."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, run_cli
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from logra.analysis.tokens import pieces
from logra.inputs import examples
from logra.inputs.rows import decode, split_text
from logra.runtime.settings import RunSettings

TEXT = "the river  ran past the old mill, 😀👍🏽 中文字 ünï and\nstones into cold water . do n't"
SPECIAL = ["<unk>", "<s>", "</s>", "<|eot_id|>"]
WORDS = ["▁the", "▁river", "▁ran", "▁past", "▁old", "▁mill", "▁sto", "nes", "▁into", "▁water", "中"]


def byte_fallback(normalizer, pre_tokenizer, decoder) -> Tokenizer:
    """Return a tokenizer of words, letters and bytes, built from its parts as SentencePiece models are."""
    letters = "▁abcdefghijklmnopqrstuvwxyz.,'\n"
    words = [(word, -1.0) for word in WORDS] + [(letter, -3.0) for letter in letters]
    words += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram([(name, 0.0) for name in SPECIAL] + words, 0, True))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    return tokenizer


def make(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind."""
    if kind == "bytes":
        return make_tokenizer()
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False)
        tokenizer.train_from_iterator([TEXT], trainer)
    elif kind == "llama2":
        strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer = byte_fallback(normalizer, None, decoders.Sequence(strip))
    else:
        metaspace = {"replacement": "▁", "prepend_scheme": kind, "split": False}
        steps = [decoders.ByteFallback(), decoders.Metaspace(**{k: metaspace[k] for k in list(metaspace)[:2]})]
        pre_tokenizer = pre_tokenizers.Metaspace(**metaspace)
        tokenizer = byte_fallback(normalizers.NFC(), pre_tokenizer, decoders.Sequence(steps))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS = ("bytes", "always", "first", "never", "llama2", "wordpiece")


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return make(request.param)


def test_pieces_join_to_the_decoded_text(tokenizer):
    """All shares are kept, and each word has its space; also where the text begins or ends inside a character."""
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for ids in ([bos, *whole, eos], *(whole[start : start + 21] for start in range(len(whole))), [], [eos]):
        found = pieces(tokenizer, ids, torch.arange(1, len(ids) + 1))
        assert "".join(text for text, _ in found) == decode(tokenizer, ids, skip_special_tokens=False)
        assert sum(share for _, share in found) == sum(range(len(ids) + 1))
    assert len(pieces(tokenizer, whole, torch.ones(len(whole)))) > 0.4 * len(whole), "a piece is a token or a character"
    ids = tokenizer("the river ran past", add_special_tokens=False)["input_ids"]
    assert "".join(text for text, _ in pieces(tokenizer, ids, torch.ones(len(ids)))) == "the river ran past"


def test_any_tokens_join_to_the_decoded_text(tokenizer):
    """Also tokens that no text has: invalid bytes, special tokens in the middle; at any cuts."""
    choose = random.Random(0)
    for length in (1, 2, 5, 40):
        for _ in range(30):
            ids = choose.choices(range(len(tokenizer)), k=length)
            for skip in (False, True):
                cuts = sorted(choose.sample(range(length + 1), k=min(length, 3)))
                parts = split_text(tokenizer, ids, cuts, skip)
                assert len(parts) == len(cuts) + 1 and "".join(parts) == decode(tokenizer, ids, skip)


def test_invalid_bytes_do_not_hide_what_follows():
    """After a broken run of bytes the pieces are tokens again."""
    tokenizer = make("llama2")
    broken = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in [0xFF, *"中文字中文字".encode()]])
    ids = broken + tokenizer("the river ran past")["input_ids"]
    found = pieces(tokenizer, ids, torch.ones(len(ids)))
    assert [text for text, _ in found][-3:] == [" river", " ran", " past"]


@pytest.mark.parametrize("pack", [False, True])
def test_texts_of_blocks_join_to_the_document(tokenizer, tmp_path, pack):
    """The column `text`: spaces and characters at the borders of blocks are kept; a document has its own start."""
    documents = Dataset.from_dict({"text": [TEXT] * 3})
    for size in (5, 7, 16):
        settings = RunSettings(block_size=size, pack=pack)
        rows, _ = examples.build_examples(documents, tokenizer, settings, None, tmp_path)
        document = decode(tokenizer, tokenizer(TEXT, add_special_tokens=False)["input_ids"])
        joined = "".join(rows["text"][:])
        assert joined.replace(" ", "") == 3 * document.replace(" ", "")
        assert joined.count(" ") in range(3 * document.count(" "), 3 * document.count(" ") + 3)  # packed: one between
        if not pack:
            assert joined == 3 * document


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_is_what_it_adds_to_its_prompt(workspace, kind):
    """Prompt and response join to the decoded tokens; a response cut at --max_new_tokens is marked, another is not."""
    tokenizer, model = make(kind), make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained("m")
    tokenizer.save_pretrained("m")
    Path("m/generation_config.json").write_text(json.dumps({"eos_token_id": list(range(4, len(tokenizer), 9))}))
    Path("p.txt").write_text("the river\nthe old mill\n")
    flags = ("--model_name", "m", "--prompts", "p.txt", "--max_new_tokens", 12, "--num_return_sequences", 4)
    assert run_cli("generate", *flags) == 0
    rows = [json.loads(line) for line in open("data/generated/m/queries.jsonl")]
    assert {row["cut"] for row in rows} == {True, False}
    for row in rows:
        assert row["prompt"] + row["response"] == decode(tokenizer, row["prompt_ids"] + row["response_ids"])
        assert row["cut"] == (row["response_ids"][-1] not in row["settings"]["end_ids"])


def test_long_texts_take_linear_time():
    """Twice the tokens take about twice the time: a piece is decoded with its neighbours, not with the whole text."""
    tokenizer, seconds = make("llama2"), []
    for repeats in (12, 48):
        ids = tokenizer(" ".join([TEXT] * repeats))["input_ids"]
        begin = time.process_time()
        pieces(tokenizer, ids, torch.ones(len(ids)))
        seconds.append(time.process_time() - begin)
    assert len(ids) > 2000 and seconds[1] < 8 * seconds[0]
