"""Stage 1: prompts to queries.jsonl, for plain and for chat models.

A row of queries.jsonl: id, prompt, response, prompt_ids, response_ids (the exact tokens, the end token included),
model, settings, seed.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from logra.inputs.model import context_length, default_dtype, hub_options, load_model, load_tokenizer
from logra.quantise import FLOAT_DTYPES
from logra.runtime.files import atomic, read_lines, read_row, short_name
from logra.runtime.progress import bar
from logra.runtime.settings import Sampling

END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")  # ends of a turn, beside the EOS token


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Return (id, prompt) of each prompt; ids are line numbers from 0 where the file names none.

    Raises:
        ValueError: No such file, no prompt in it, or a row without `prompt`.
    """
    if not path.is_file():
        raise ValueError(f"expected a file of prompts, got {path}, which is none; give --prompts FILE")
    prompts = []
    for number_, line in enumerate(read_lines(path)):
        row = {"prompt": line}
        if path.suffix == ".jsonl":
            try:
                row = read_row(line)
            except ValueError:
                row = None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(
                f"expected an object with a text `prompt` in row {number_ + 1} of {path}, got {line[:60]!r}"
            )
        prompts.append((str(row.get("id", number_)), row["prompt"]))
    if not prompts:
        raise ValueError(f"expected prompts in {path}, got none; write one a line")
    if len({name for name, _ in prompts}) < len(prompts):
        raise ValueError(f"expected a different id for each prompt of {path}, got a double one")
    return prompts


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Return the ids that end a response: the tokenizer's and the model's EOS, and the end of a chat turn."""
    configured = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    vocabulary = tokenizer.get_vocab()
    return sorted((ids | {vocabulary.get(token) for token in END_TOKENS}) - {None})


def generate(
    model: PreTrainedModel, prompt_ids: list[list[int]], ends: list[int], sampling: Sampling
) -> list[list[list[int]]]:
    """Return the response token ids of each prompt, [prompts][num_return_sequences], cut after the first end token.

    Prompts are batched with left padding; greedy output does not depend on the batch size.
    """
    limit, longest = context_length(model.config), max(map(len, prompt_ids))
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"expected prompt and response within the model's context of {limit} tokens, got {longest} + "
            f"{sampling.max_new_tokens}; shorten the prompts or --max_new_tokens"
        )
    options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if sampling.temperature == 0:
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    vocabulary, highest = model.get_input_embeddings().weight.shape[0], max(map(max, prompt_ids))
    if highest >= vocabulary:
        raise ValueError(
            f"expected token ids below {vocabulary}, the model's vocabulary, got {highest} in a prompt; "
            "use the model's own tokenizer"
        )
    pad, responses = ends[0] if ends else 0, []
    set_seed(sampling.seed)
    for start in bar(range(0, len(prompt_ids), sampling.batch_size), desc="generating", unit="batch"):
        batch = prompt_ids[start : start + sampling.batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.num_return_sequences,
            eos_token_id=ends or None,
            pad_token_id=pad,
            **options,
        )
        rows = [_until_end(row, set(ends)) for row in output[:, width:].tolist()]
        responses += [
            rows[i : i + sampling.num_return_sequences] for i in range(0, len(rows), sampling.num_return_sequences)
        ]
    return responses


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def write_queries(
    prompts_file: Path,
    output: Path | None,
    encode: Callable[[PreTrainedTokenizerBase, str], list[int]],
    sampling: Sampling,
    model_name: str,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Read prompts, generate responses, write queries.jsonl; return its path.

    Args:
        prompts_file: See read_prompts.
        output: Where to; data/generated/<model>/queries.jsonl by default.
        encode: (tokenizer, prompt) -> token ids that the model reads.
        sampling: How responses are generated.
        model_name, revision, trust_remote_code: See inputs.model.load_model.
        dtype: Of the model; float32 on a CPU and bfloat16 on a GPU by default.
    """
    output = output or Path("data/generated") / short_name(model_name) / "queries.jsonl"
    if output.is_dir():
        raise ValueError(f"expected a file for --output, got the folder {output}; add a file name")
    hub = hub_options(revision, trust_remote_code)
    prompts, tokenizer = read_prompts(prompts_file), load_tokenizer(model_name, **hub)
    prompt_ids = [encode(tokenizer, prompt) for _, prompt in prompts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or default_dtype(device)
    model = load_model(model_name, FLOAT_DTYPES[dtype], device, **hub)
    responses = generate(model, prompt_ids, end_token_ids(tokenizer, model), sampling)
    settings = asdict(sampling) | {"dtype": dtype} | hub
    seed = settings.pop("seed")
    common = {"model": model_name, "settings": settings, "seed": seed}
    with atomic(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for (name, prompt), ids, rows in zip(prompts, prompt_ids, responses, strict=True):
            for i, response in enumerate(rows):
                row = {"id": name if len(rows) == 1 else f"{name}-{i}", "prompt": prompt}
                row |= {"response": tokenizer.decode(response, skip_special_tokens=True)}
                row |= {"prompt_ids": ids, "response_ids": response} | common
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return output
