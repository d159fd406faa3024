"""Stage 1: prompts to queries.jsonl, for plain and for chat models.

A row of queries.jsonl holds id, prompt, response, prompt_ids, response_ids (the exact tokens, end token included), cut
(whether the response was cut at --max_new_tokens, so has no end token), model, settings and seed. `settings` has what
chose the tokens, and under model_settings_not_used what did not.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from logra.inputs.rows import split_text
from logra.models.model import (
    check_token_ids,
    context_length,
    default_dtype,
    hub_options,
    keep_extra_tokens,
    load_model,
    load_tokenizer,
    rope_boundaries,
)
from logra.quantise import FLOAT_DTYPES
from logra.runtime.files import atomic, has_shape, read_lines, read_row, row_id, short_name
from logra.runtime.progress import bar, say
from logra.runtime.settings import Sampling

END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")  # they end a chat turn, beside the EOS token
# entries of generation_config.json that choose no token, beside the end tokens, which are used
NO_CHOICE = ("eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "transformers_version", "_from_model_config")


class ModelSource(NamedTuple):
    """Which model to load, and how.

    Attributes:
        name, revision, trust_remote_code: See models.model.load_model.
        dtype: None is float32 on a CPU and bfloat16 on a GPU.
    """

    name: str
    dtype: str | None
    revision: str | None
    trust_remote_code: bool


def write_queries(
    prompts_file: Path,
    output: Path | None,
    source: ModelSource,
    encode: Callable[[PreTrainedTokenizerBase, str], list[int]],
    sampling: Sampling,
) -> Path:
    """Read prompts, generate responses, write queries.jsonl, and return its path.

    Args:
        prompts_file: See read_prompts.
        output: The file to write; data/generated/<model>/queries.jsonl by default.
        source: Which model to use.
        encode: (tokenizer, prompt) -> token ids of the model's input.
        sampling: How to generate responses.
    """
    output = output or Path("data/generated") / short_name(source.name) / "queries.jsonl"
    if output.is_dir():
        raise ValueError(f"expected a file for --output, got the folder {output}; add a file name")
    hub = hub_options(source.revision, source.trust_remote_code)
    prompts, tokenizer = read_prompts(prompts_file), load_tokenizer(source.name, **hub)
    prompt_ids = [encode(tokenizer, prompt) for _, prompt in prompts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = source.dtype or default_dtype(device)
    model = load_model(source.name, FLOAT_DTYPES[dtype], device, **hub)
    keep_extra_tokens(model, tokenizer)
    end_ids = end_token_ids(tokenizer, model)
    not_used = settings_not_used(model, sampling)
    if not_used:
        words = ", ".join(f"{key} {json.dumps(value)[:40]}" for key, value in not_used.items())
        say(f"Not used from the model's generation_config.json, since the flags choose the tokens: {words}")
    responses = generate(model, prompt_ids, end_ids, sampling)

    settings = asdict(sampling) | {"dtype": dtype} | hub
    settings |= {"end_ids": end_ids, "model_settings_not_used": not_used}
    seed = settings.pop("seed")
    constants = {"model": source.name, "settings": settings, "seed": seed}
    with atomic(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for (prompt_id, prompt), ids, response_list in zip(prompts, prompt_ids, responses, strict=True):
            for i, response in enumerate(response_list):
                row = {
                    "id": prompt_id if len(response_list) == 1 else f"{prompt_id}-{i}", "prompt": prompt,
                    "response": split_text(tokenizer, ids + response, [len(ids)])[1],
                    "prompt_ids": ids, "response_ids": response, "cut": response[-1] not in end_ids,
                }  # fmt: skip
                file.write(json.dumps(row | constants, ensure_ascii=False) + "\n")
    return output


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Return (id, prompt) of each prompt. A prompt without an id gets its line number, from 0.

    Raises:
        ValueError: The file is missing or empty, a row has no `prompt`, or two rows have the same id.
    """
    if not path.is_file():
        raise ValueError(f"expected a file of prompts in {path}, got none; give --prompts FILE")
    prompts = []
    for number, line in enumerate(read_lines(path)):
        row, prompt_id = {"prompt": line}, str(number)
        if path.suffix == ".jsonl":
            try:
                row = read_row(line)
                prompt_id = row_id(row, number)
            except ValueError:
                row = {}
        if not has_shape(row, {"prompt": lambda value: isinstance(value, str) and value.strip()}):
            raise ValueError(
                "expected an object with a text `prompt`, and no id but a text or a number, in row "
                f"{number + 1} of {path}, got {line[:60]!r}; change it"
            )
        prompts.append((prompt_id, row["prompt"]))
    if not prompts:
        raise ValueError(f"expected prompts in {path}, got none; write one per line")
    if len(dict(prompts)) < len(prompts):
        raise ValueError(f"expected a different id for each prompt of {path}, got the same id twice; change one")
    return prompts


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Return the ids of tokens that end a response: EOS of the tokenizer and of the model, and the end of a turn."""
    configured = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    vocabulary = tokenizer.get_vocab()
    return sorted((ids | {vocabulary.get(token) for token in END_TOKENS}) - {None})


def generation_config(sampling: Sampling, end_ids: list[int]) -> GenerationConfig:
    """Return transformers' settings, made of the flags alone: greedy, or sampled from the most likely tokens."""
    options: dict = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, num_return_sequences=sampling.num_return_sequences,
        eos_token_id=end_ids or None, pad_token_id=end_ids[0] if end_ids else 0, **options,
    )  # fmt: skip


def settings_not_used(model: PreTrainedModel, sampling: Sampling) -> dict[str, object]:
    """Return the entries of the model's generation_config.json that generate() does not use, with their values."""
    own = json.loads(model.generation_config.to_json_string(use_diff=True))
    used = generation_config(sampling, []).to_dict()
    return {k: v for k, v in own.items() if k not in NO_CHOICE and v is not False and v != used.get(k)}


def generate(
    model: PreTrainedModel, prompt_ids: list[list[int]], end_ids: list[int], sampling: Sampling
) -> list[list[list[int]]]:
    """Return token ids of responses, [prompts][num_return_sequences][tokens], each cut after its first end token.

    Prompts are batched with left padding, or taken one by one where the longest text of a batch may change the others
    (see rope_boundaries). Greedy output does not depend on the batch size. The model's own settings of generation are
    removed from it.

    Raises:
        ValueError: A prompt is too long for the model, or has a token id that is not in its vocabulary.
    """
    _check_prompts(model, prompt_ids, sampling.max_new_tokens)
    config = generation_config(sampling, end_ids)
    model.generation_config = GenerationConfig()  # transformers takes from it what `config` leaves open
    per_prompt, pad, responses = sampling.num_return_sequences, config.pad_token_id, []
    longest = max(map(len, prompt_ids)) + sampling.max_new_tokens
    alone = any(longest > boundary for boundary in rope_boundaries(model.config))
    batch_size = 1 if alone else sampling.batch_size
    set_seed(sampling.seed)
    for start in bar(range(0, len(prompt_ids), batch_size), desc="generating", unit="batch"):
        batch = prompt_ids[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        # of the class: a folder's custom_generate/ replaces the instance's
        output = type(model).generate(model, ids, attention_mask=mask, generation_config=config)
        rows = [_until_end(row, set(end_ids)) for row in output[:, width:].tolist()]
        responses += [rows[i : i + per_prompt] for i in range(0, len(rows), per_prompt)]
    return responses


def _check_prompts(model: PreTrainedModel, prompt_ids: list[list[int]], max_new_tokens: int) -> None:
    context, longest = context_length(model.config), max(map(len, prompt_ids))
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"expected prompt and response within the model's context of {context} tokens, got {longest} + "
            f"{max_new_tokens}; shorten the prompts or --max_new_tokens"
        )
    for number, ids in enumerate(prompt_ids):
        check_token_ids(model, ids, f"prompt {number}")


def _until_end(ids: list[int], end_ids: set[int]) -> list[int]:
    """Return the ids up to the first end token, which is included."""
    stop = next((i + 1 for i, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[:stop]
