"""A row of text, of prompt and response, or of chat messages, as token ids, and which of them count in the loss.

A row is in one of three forms: `text`; `prompt` and `response`; `messages`, a list of {role, content}.
"""

from collections.abc import Callable, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

ROW_COLUMNS = {"prompt": ("prompt", "response"), "messages": ("messages",)}
Encoded = tuple[list[int], list[bool]]  # token ids, and whether each counts in the response's loss


def row_form(columns: Sequence[str], text_column: str, response: bool) -> str:
    """Return the form of a data set's rows: text, prompt or messages.

    Args:
        columns: What the rows have.
        text_column: The column that holds a text.
        response: The response's tokens only are to count, so a text does not do.

    Raises:
        ValueError: The columns are of none of the forms.
    """
    forms = {} if response else {"text": (text_column,)}
    for form, needed in (forms | ROW_COLUMNS).items():
        if set(needed) <= set(columns):
            return form
    if response:
        wanted, remedy = "columns prompt and response, or messages", "leave --train_loss response out"
    else:
        wanted, remedy = f"a text column {text_column!r}", "give --text_column"
    raise ValueError(f"expected {wanted}, got {', '.join(columns)}; {remedy}")


def row_problem(form: str, row: tuple) -> str | None:
    """Say what is wrong with the values of a row's columns; None where they hold text."""
    if form == "messages":
        (turns,) = row
        whole = isinstance(turns, list) and all(
            isinstance(t, dict) and isinstance(t.get("content"), str) and isinstance(t.get("role"), str) for t in turns
        )
        return None if whole and any(t["role"] == "assistant" for t in turns) else "no assistant's turn"
    for value in row:
        if not isinstance(value, str):
            return type(value).__name__
        if not value.strip():
            return "empty"
    return None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Encoded:
    """Return prompt and response joined, as the tokenizer turns each into tokens; the response's count."""
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    return before + after, [False] * len(before) + [True] * len(after)


def chat_tokens(tokenizer: PreTrainedTokenizerBase, turns: list[dict], prompt: bool = False) -> list[int]:
    """Return a chat in the tokenizer's template; with `prompt`, up to where the assistant's next turn begins.

    Raises:
        ValueError: There is no template, or it refuses these turns.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "expected a tokenizer with a chat template, got none; use generate.py, or rows of prompt and response"
        )
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"expected turns that the model's chat template takes, got: {error}; change them") from error


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Encoded:
    """Return a chat in the tokenizer's template; the tokens of the assistant's turns count, the ends of turn included.

    Raises:
        ValueError: As chat_tokens; or the template changes earlier turns, so that a turn's tokens are not known.
    """
    ids = chat_tokens(tokenizer, messages)
    counted = [False] * len(ids)
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = chat_tokens(tokenizer, messages[:i], True) if i else []
        after = chat_tokens(tokenizer, messages[: i + 1])
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise ValueError(
                f"expected a chat template that keeps earlier turns as they are, got one that changes turn {i}; "
                "give rows of prompt and response"
            )
        counted[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, counted


def make_encoder(form: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[tuple]], list[Encoded]]:
    """Return a function from rows (the values of the form's columns) to token ids and what counts in them."""

    def encode(rows: list[tuple]) -> list[Encoded]:
        if form == "prompt":
            return [encode_prompt(tokenizer, *row) for row in rows]
        if form == "messages":
            return [encode_messages(tokenizer, *row) for row in rows]
        encoded = tokenizer([row[0] for row in rows], return_attention_mask=False)["input_ids"]
        return [(ids, [True] * len(ids)) for ids in encoded]

    return encode
