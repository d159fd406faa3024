"""Small language models that can be trained many times: texts, tokenizer, configuration, training, losses.

A model has the architecture of GPT-2, Llama or OLMoE (a mixture of experts) and starts from random weights.
"""

import argparse
import ast
import multiprocessing
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from logra.inputs.documents import load_documents
from logra.inputs.file_rows import values_of
from logra.runtime.flag_types import positive_int
from logra.runtime.settings import DataSettings
from logra.stages.batches import make_batch

ARCHITECTURES = ("gpt2", "llama", "olmoe")
MIN_PASSAGE_WORDS, MAX_PASSAGE_WORDS = 8, 32
MAX_PASSAGE_TOKENS = 64
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)  # of the training's steps, after which checkpoints are kept
BATCH_TEXTS, FINE_TUNING_BATCH_TEXTS = 32, 16
LEARNING_RATE = 2e-3  # after the warm-up; it falls linearly to 0
WARM_UP_STEPS = 20
IGNORED_LABEL = -100  # of transformers
AtShare = Callable[[float, torch.nn.Module], object]


def add_size_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a small model's size."""
    group.add_argument("--num_layers", type=positive_int, default=3, help="of the model (3)")
    group.add_argument("--width", type=positive_int, default=128, help="of the model, a multiple of 8 (128)")
    group.add_argument("--vocabulary", type=positive_int, default=1024, help="tokens (1024)")


def docstrings() -> list[tuple[str, str]]:
    """Return (name, docstring) of all docstrings of Python's standard library, without its tests.

    A name is that of the module (email.header), and of the class or function in it (email.header.append).
    """
    library, found = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if not {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & {*parts}:
            nodes = ast.walk(ast.parse(path.read_bytes()))
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            for node in (node for node in nodes if isinstance(node, documented)):
                name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                found.append((name, ast.get_docstring(node) or ""))
    return found


def passages(*sources: str) -> list[str]:
    """Return the passages of data sets (see cut).

    Args:
        sources: As --data_name of the pipeline, or `docstrings`, those of Python's standard library. In a .txt file,
            lines with a single % separate documents, if there are such lines.
    """
    documents: list[str] = []
    for source in sources:
        if source.endswith(".txt") and "\n%\n" in (text := Path(source).read_text("utf-8")):
            documents += text.split("\n%\n")
        elif source == "docstrings":
            documents += [text for _, text in docstrings()]
        else:
            documents += [text for (text,) in values_of(load_documents(DataSettings(source)), ("text",))]
    return cut(documents)


def cut(documents: Iterable[str]) -> list[str]:
    """Cut documents into passages of at most 32 words, each once; leave out passages of fewer than 8 words."""
    found: dict[str, None] = {}
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            words = paragraph.split()
            for start in range(0, len(words), MAX_PASSAGE_WORDS):
                if len(part := words[start : start + MAX_PASSAGE_WORDS]) >= MIN_PASSAGE_WORDS:
                    found[" ".join(part)] = None
    return list(found)


def shorten(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Remove words from the end until the text has at most 64 tokens."""
    while len(tokenizer(text)["input_ids"]) > MAX_PASSAGE_TOKENS:
        text = text.rsplit(" ", 1)[0] if " " in text else text[: len(text) // 2]
    return text


def five_grams(text: str) -> set[tuple[str, ...]]:
    """Return all runs of five words; of a shorter text, all its words."""
    words = text.lower().split()
    return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}


def held_out(texts: Sequence[str], train: Sequence[str]) -> list[str]:
    """Return the texts that share less than half of their 5-grams with each train text."""
    holders: dict[tuple[str, ...], list[int]] = {}
    for number, text in enumerate(train):
        for gram in five_grams(text):
            holders.setdefault(gram, []).append(number)
    found = []
    for text in texts:
        grams = five_grams(text)
        shared = Counter(number for gram in grams for number in holders.get(gram, ()))
        if 2 * max(shared.values(), default=0) < len(grams):
            found.append(text)
    return found


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
    """Return the configuration of a small model without dropout and with 4 attention heads (but GPT-2: in 2 groups).

    OLMoE has 8 experts in each layer, of which a token takes 2. An expert's width is 3/4 of the model's.
    """
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=4, n_positions=context,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    shared: dict[str, Any] = dict(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    if architecture == "llama":
        return LlamaConfig(intermediate_size=8 * width // 3, **shared)
    return OlmoeConfig(intermediate_size=3 * width // 4, num_experts=8, num_experts_per_tok=2, **shared)


def _pad(token_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids [B, T] and labels [B, T], IGNORED_LABEL in the padding."""
    rows = [torch.tensor(ids) for ids in token_ids]
    return pad_sequence(rows, batch_first=True), pad_sequence(rows, batch_first=True, padding_value=IGNORED_LABEL)


def train(
    config: PretrainedConfig, token_ids: list[list[int]], epochs: int, order_seed: int, init_seed: int = 0,
    at_share: AtShare | None = None,
) -> torch.nn.Module:  # fmt: skip
    """Return a model that is trained on texts: AdamW, batches of 32 texts, mean loss per token.

    The loss of a mixture of experts includes the family's own loss for the balance of the experts.

    Args:
        config: See make_config.
        token_ids: Of each text.
        epochs: Passes over the texts.
        order_seed: Of the order of the texts.
        init_seed: Of the initial weights.
        at_share: It is called with each of SHARES and the model after this share of the steps (rounded down).
    """
    torch.manual_seed(init_seed)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01, fused=True)
    order, steps = np.random.default_rng(order_seed), epochs * -(-len(token_ids) // BATCH_TEXTS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP_STEPS) * (1 - step / steps)
    )
    has_router, done = hasattr(config, "output_router_logits"), 0
    for _ in range(epochs):
        shuffled = order.permutation(len(token_ids)).tolist()
        for first in range(0, len(shuffled), BATCH_TEXTS):
            for share in SHARES if at_share else ():
                if int(share * steps) == done:
                    at_share(share, model)
            inputs, labels = _pad([token_ids[i] for i in shuffled[first : first + BATCH_TEXTS]])
            # the balance of the experts is that over tokens, without the padding
            balance = {"output_router_logits": True, "attention_mask": labels.ne(IGNORED_LABEL)} if has_router else {}
            model(input_ids=inputs, labels=labels, use_cache=False, **balance).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
    return model.eval()


def fine_tune(
    model: torch.nn.Module, token_ids: list[list[int]], epochs: int, seed: int, learning_rate: float = 1e-4,
    counted: list[list[bool]] | None = None,
) -> None:  # fmt: skip
    """Train a model on texts: AdamW, batches of 16 texts, mean loss per token, no dropout.

    Args:
        model: In evaluation mode.
        token_ids: Of each text.
        epochs: Passes over the texts.
        seed: Of the order of the texts.
        learning_rate: It falls linearly to 0.
        counted: Which tokens count in the loss; all, but the first of a text, without it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    order = np.random.default_rng(seed)
    shuffled = [order.permutation(len(token_ids)) for _ in range(epochs)]
    batches = [
        rows[i : i + FINE_TUNING_BATCH_TEXTS] for rows in shuffled for i in range(0, len(rows), FINE_TUNING_BATCH_TEXTS)
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for rows in tqdm(batches, desc="fine-tuning", unit="batch"):
        marks = counted and [counted[i] for i in rows]
        batch = make_batch([token_ids[i] for i in rows], marks, model.device)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def train_with_settings(
    settings: dict[str, Any], token_ids: list[list[int]], order_seed: int, at_share: AtShare | None = None
) -> torch.nn.Module:
    """Return a model that is trained on texts with the settings of a testbed (testbed.json of lds.py); see train."""
    sizes = settings["num_layers"], settings["width"], settings["vocabulary"]
    config = make_config(settings["architecture"], *sizes, context=2 * MAX_PASSAGE_TOKENS)
    return train(config, token_ids, settings["epochs"], order_seed, settings["seed"], at_share)


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def train_in_parallel(train_one: Callable[[Any], object], jobs: Sequence[Any]) -> None:
    """Call train_one(job) for each job, in as many processes as there are cores, each with one thread."""
    processes = min(os.cpu_count() or 1, len(jobs))
    with multiprocessing.get_context("spawn").Pool(processes, _use_one_thread) as pool:
        for _ in tqdm(pool.imap_unordered(train_one, jobs), total=len(jobs), desc="training", unit="model"):
            pass


@torch.no_grad()
def losses(model: torch.nn.Module, token_ids: list[list[int]]) -> np.ndarray:
    """Return each text's summed next-token loss in nats, [len(token_ids)] float32."""
    found = []
    for first in range(0, len(token_ids), 128):
        inputs, labels = _pad(token_ids[first : first + 128])
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        found.append(cross_entropy(logits.mT, labels[:, 1:], reduction="none").sum(dim=1))
    return torch.cat(found).numpy()
