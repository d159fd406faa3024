"""Small language models that can be trained again many times: texts, tokenizer, shapes, training, losses.

Notation: N train texts, Q queries. A model is GPT-2's or Llama's architecture from a config, with random weights.
"""

import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from logra.inputs.documents import load_documents

ARCHITECTURES = ("gpt2", "llama")
WORDS = (8, 32)  # in a passage, at least and at most
TOKENS = 64  # in a passage at most
BATCH = 32  # texts
RATE = 2e-3  # AdamW's learning rate at the beginning; it falls linearly to 0


def passages(source: str) -> list[str]:
    """Cut a data set's documents into passages of at most 32 words; those of fewer than 8 are left out.

    Args:
        source: As --data_name of the pipeline; in a .txt file, lines of a single % separate documents, if it has any.
    """
    if source.endswith(".txt") and "\n%\n" in (text := Path(source).read_text("utf-8")):
        documents = text.split("\n%\n")
    else:
        documents = load_documents(source, None, "train")["text"]
    found: dict[str, None] = {}
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            words = paragraph.split()
            for start in range(0, len(words), WORDS[1]):
                if len(part := words[start : start + WORDS[1]]) >= WORDS[0]:
                    found[" ".join(part)] = None
    return list(found)


def shorten(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Leave out the last words until the text has at most 64 tokens."""
    while len(tokenizer(text)["input_ids"]) > TOKENS:
        text = text.rsplit(" ", 1)[0] if " " in text else text[: len(text) // 2]
    return text


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>")


def make_config(architecture: str, layers: int, width: int, vocabulary: int, context: int) -> PretrainedConfig:
    """Return the config of a small model without dropout, with 4 heads (Llama: 2 groups of them)."""
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=4, n_positions=context,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def _pad(token_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids [B, T] and labels, -100 in the padding."""
    rows = [torch.tensor(ids) for ids in token_ids]
    return pad_sequence(rows, batch_first=True), pad_sequence(rows, batch_first=True, padding_value=-100)


def train(
    config: PretrainedConfig, token_ids: list[list[int]], epochs: int, order_seed: int, init_seed: int = 0
) -> torch.nn.Module:
    """Train a model from its config on texts (AdamW, batches of 32 texts, mean loss a token) and return it."""
    torch.manual_seed(init_seed)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01, fused=True)
    order, steps = np.random.default_rng(order_seed), epochs * -(-len(token_ids) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    for _ in range(epochs):
        shuffled = order.permutation(len(token_ids)).tolist()
        for first in range(0, len(shuffled), BATCH):
            inputs, labels = _pad([token_ids[i] for i in shuffled[first : first + BATCH]])
            model(input_ids=inputs, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def losses(model: torch.nn.Module, token_ids: list[list[int]]) -> np.ndarray:
    """Return each text's summed next-token loss in nats, [len(token_ids)] float32."""
    found = []
    for first in range(0, len(token_ids), 128):
        inputs, labels = _pad(token_ids[first : first + 128])
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        found.append(torch.nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none").sum(dim=1))
    return torch.cat(found).numpy()
