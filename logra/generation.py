"""Stage 1: prompts to queries.jsonl, for plain and for chat models.

A row of queries.jsonl: id, prompt, response, prompt_ids, response_ids (the exact tokens, the end token included),
model, settings, seed.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from logra.disk import atomic, read_lines, read_row, short_name
from logra.model import context_length, default_dtype, hub_options, load_model, load_tokenizer
from logra.progress import bar
from logra.run import RUN_FLAGS, add_common, non_negative, number, positive_int, seed_int
from logra.store import DTYPES

END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")  # ends of a turn, beside the EOS token


def add_generation_flags(parser: argparse.ArgumentParser, model: str, prompts: Path, **defaults: float) -> None:
    """Add the flags that both generation scripts take."""
    group = parser.add_argument_group("model and files")
    group.add_argument("--model_name", default=model, help="local folder or Hub id (%(default)s)")
    group.add_argument("--prompts", type=Path, default=prompts, help=".txt, a prompt a line; or .jsonl with id, prompt")
    group.add_argument("--output", type=Path, help="(data/generated/<model>/queries.jsonl)")
    group.add_argument("--dtype", choices=list(DTYPES), help="float32 on a CPU, bfloat16 on a GPU")
    group.add_argument("--revision", help=RUN_FLAGS["revision"][1]["help"])
    add_common(parser)
    group = parser.add_argument_group("sampling")
    group.add_argument("--max_new_tokens", type=positive_int, default=defaults["max_new_tokens"], help="(%(default)s)")
    group.add_argument(
        "--temperature", type=non_negative, default=defaults["temperature"], help="0 is greedy (%(default)s)"
    )
    group.add_argument("--top_p", type=non_negative, default=defaults["top_p"], help="(%(default)s)")
    few = number(int, 1, "a whole number from 1 to 1000", 1000)
    group.add_argument("--num_return_sequences", type=few, default=1, help="responses a prompt (1)")
    group.add_argument("--seed", type=seed_int, default=0, help="(0)")
    group.add_argument("--batch_size", type=positive_int, default=8, help="prompts at a time (8)")


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
    model: PreTrainedModel, prompt_ids: list[list[int]], ends: list[int], args: argparse.Namespace
) -> list[list[list[int]]]:
    """Return the response token ids of each prompt, [prompts][num_return_sequences], cut after the first end token.

    Prompts are batched with left padding; greedy output does not depend on the batch size.
    """
    limit, longest = context_length(model.config), max(map(len, prompt_ids))
    if limit is not None and longest + args.max_new_tokens > limit:
        raise ValueError(
            f"expected prompt and response within the model's context of {limit} tokens, got {longest} + "
            f"{args.max_new_tokens}; shorten the prompts or --max_new_tokens"
        )
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    options = (
        sampling if args.temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    if args.temperature == 0 and args.num_return_sequences > 1:
        raise ValueError("expected --num_return_sequences 1 with --temperature 0, which has one response; raise either")
    vocabulary, highest = model.get_input_embeddings().weight.shape[0], max(map(max, prompt_ids))
    if highest >= vocabulary:
        raise ValueError(
            f"expected token ids below {vocabulary}, the model's vocabulary, got {highest} in a prompt; "
            "use the model's own tokenizer"
        )
    pad, responses = ends[0] if ends else 0, []
    set_seed(args.seed)
    for start in bar(range(0, len(prompt_ids), args.batch_size), desc="generating", unit="batch"):
        batch = prompt_ids[start : start + args.batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=args.max_new_tokens,
            num_return_sequences=args.num_return_sequences,
            eos_token_id=ends or None,
            pad_token_id=pad,
            **options,
        )
        rows = [_until_end(row, set(ends)) for row in output[:, width:].tolist()]
        responses += [rows[i : i + args.num_return_sequences] for i in range(0, len(rows), args.num_return_sequences)]
    return responses


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def run_generation(args: argparse.Namespace, encode) -> Path:
    """Read prompts, generate, write queries.jsonl; return its path.

    Args:
        args: The flags of add_generation_flags.
        encode: (tokenizer, prompt) -> token ids that the model reads.
    """
    if not 0 < args.top_p <= 1:
        raise ValueError(f"expected --top_p above 0 and at most 1, got {args.top_p}")
    if 0 < args.temperature < 1e-3:
        raise ValueError(f"expected --temperature 0 (greedy) or at least 0.001, got {args.temperature}; give 0")
    output = args.output or Path("data/generated") / short_name(args.model_name) / "queries.jsonl"
    if output.is_dir():
        raise ValueError(f"expected a file for --output, got the folder {output}; add a file name")
    hub = hub_options(vars(args), args.trust_remote_code)
    prompts, tokenizer = read_prompts(args.prompts), load_tokenizer(args.model_name, **hub)
    prompt_ids = [encode(tokenizer, prompt) for _, prompt in prompts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype or default_dtype(device)
    model = load_model(args.model_name, DTYPES[dtype], device, **hub)
    responses = generate(model, prompt_ids, end_token_ids(tokenizer, model), args)
    names = ("max_new_tokens", "temperature", "top_p", "num_return_sequences", "batch_size")
    common = {
        "model": args.model_name,
        "settings": {n: getattr(args, n) for n in names} | {"dtype": dtype} | hub,
        "seed": args.seed,
    }
    with atomic(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for (name, prompt), ids, rows in zip(prompts, prompt_ids, responses, strict=True):
            for i, response in enumerate(rows):
                row = {"id": name if len(rows) == 1 else f"{name}-{i}", "prompt": prompt}
                row |= {"response": tokenizer.decode(response, skip_special_tokens=True)}
                row |= {"prompt_ids": ids, "response_ids": response} | common
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return output
