"""Turn a row of data into token ids, and mark the tokens that count in the loss.

A row has one of three forms: `text`; `prompt` and `response`; or `messages`, a list of {role, content}.
"""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from logra.runtime.files import has_shape

ROW_COLUMNS: dict[str, tuple[str, ...]] = {"prompt": ("prompt", "response"), "messages": ("messages",)}
Encoded = tuple[list[int], list[bool]]  # token ids, and whether each one counts in the response's loss


def row_form(column_names: Sequence[str], text_column: str, response: bool) -> tuple[str, tuple[str, ...]]:
    """Return the form of a data set's rows (text, prompt or messages), and the columns that hold it.

    Args:
        column_names: Columns of the data set.
        text_column: The column that holds a text.
        response: Only the tokens of a response count, so rows of text are not enough.

    Raises:
        ValueError: The columns fit none of the forms.
    """
    forms = ROW_COLUMNS if response else {"text": (text_column,)} | ROW_COLUMNS
    for form, needed in forms.items():
        if set(needed) <= set(column_names):
            return form, needed
    expected = "columns prompt and response, or messages" if response else f"a text column {text_column!r}"
    remedy = "leave --train_loss response out" if response else "give --text_column"
    raise ValueError(f"expected {expected}, got {', '.join(column_names)}; {remedy}")


def row_problem(form: str, row: tuple) -> str | None:
    """Return what is wrong with the values of a row's columns; None if they hold text."""
    if form == "messages":
        (messages,) = row
        valid = has_shape(messages, [{"role": str, "content": str}])
        return None if valid and any(turn["role"] == "assistant" for turn in messages) else "no assistant's turn"
    for value in row:
        if not isinstance(value, str):
            return type(value).__name__
        if not value.strip():
            return "empty"
    return None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Encoded:
    """Tokenise prompt and response separately and join them. The response's tokens count."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)


def chat_tokens(tokenizer: PreTrainedTokenizerBase, turns: list[dict], prompt: bool = False) -> list[int]:
    """Return the token ids of a chat in the tokenizer's template.

    Args:
        tokenizer: Of a chat model.
        turns: {role, content} of each turn.
        prompt: End with what opens the assistant's next turn.

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
        raise ValueError(f"expected turns that fit the model's chat template, got: {error}; change them") from error


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Encoded:
    """Tokenise a chat with the tokenizer's template. The assistant's turns count, end-of-turn tokens included.

    Raises:
        ValueError: As chat_tokens. Or the template changes earlier turns, so that a turn's tokens can't be found.
    """
    ids = chat_tokens(tokenizer, messages)
    counted = [False] * len(ids)
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = chat_tokens(tokenizer, messages[:i], prompt=True) if i else []
        after = chat_tokens(tokenizer, messages[: i + 1])
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise ValueError(
                f"expected a chat template that keeps earlier turns as they are, got one that changes turn {i}; "
                "give rows of prompt and response"
            )
        counted[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, counted


def encode_rows(form: str, tokenizer: PreTrainedTokenizerBase, rows: list[tuple]) -> list[Encoded]:
    """Tokenise rows, given as the values of the form's columns."""
    if form == "text":
        encoded = tokenizer([text for (text,) in rows], return_attention_mask=False)["input_ids"]
        return [(ids, [True] * len(ids)) for ids in encoded]
    encode = encode_prompt if form == "prompt" else encode_messages
    return [encode(tokenizer, *row) for row in rows]
