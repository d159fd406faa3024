"""Turn a row of data into token ids, and mark the tokens that count in the loss; turn token ids into text.

A row has one of three forms: `text`; `prompt` and `response`; or `messages`, a list of {role, content}.

A row's tokens are those of its whole text. A tokenizer's special tokens stand at the ends of that text only; a chat has
those of its template alone. See docs/inputs.md.

A token's text depends on what stands before it, so parts of a text are decoded together: SentencePiece-like decoders
remove the space before the first token, and a character may be several tokens.
"""

import math
import string
from collections.abc import Sequence
from itertools import pairwise, product

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from logra.runtime.files import has_shape

ROW_COLUMNS: dict[str, tuple[str, ...]] = {"prompt": ("prompt", "response"), "messages": ("messages",)}
MAX_TOKENS_PER_CHARACTER = 4  # bytes of a UTF-8 character
INCOMPLETE = "\ufffd"  # what decoders return for a part of a character
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


def special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text; `text` is any that it can encode.

    Raises:
        ValueError: It changes the tokens between them.
    """
    probe = string.ascii_letters + text[:100]
    ids, whole = tokenizer(probe, add_special_tokens=False)["input_ids"], tokenizer(probe)["input_ids"]
    for start in range(len(whole) - len(ids) + 1 if ids else 0):
        if whole[start : start + len(ids)] == ids:
            return whole[:start], whole[start + len(ids) :]
    raise ValueError(
        f"expected a tokenizer that puts special tokens at the ends of a text only, got {whole[:8]} with and {ids[:8]} "
        f"without them for {probe!r}; use another tokenizer"
    )


def _overlap(left: list[int], right: list[int]) -> int:
    """Return how many of the last tokens of `left` are the first ones of `right`."""
    return next(n for n in range(min(len(left), len(right)), -1, -1) if left[len(left) - n :] == right[:n])


def _add_ends(ids: list[int], ends: tuple[list[int], list[int]]) -> tuple[list[int], int]:
    """Add special tokens at the ends, unless the text has them there; return the ids and how many came in front."""
    before, after = ends
    before = before[: len(before) - _overlap(before, ids)]
    return before + ids + after[_overlap(ids, after) :], len(before)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of a prompt that is to be continued: nothing follows the prompt's own tokens.

    Raises:
        ValueError: There are none.
    """
    before, _ = special_tokens(tokenizer, prompt)
    ids, _ = _add_ends(tokenizer(prompt, add_special_tokens=False)["input_ids"], (before, []))
    if not ids:
        raise ValueError(f"expected a prompt of at least one token, got {prompt!r}; change it")
    return ids


def _offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, borders: list[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return a text's token ids, without special tokens, and the (start, end) of each token in the text.

    Where the tokenizer gives no offsets, those returned are the borders around each token.

    Raises:
        ValueError: The tokenizer gives no offsets, and a token may span a border.
    """
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        starts = [start for start, _ in [*offsets, (len(text), 0)]][1:]  # of the token after each
        # what a normalizer composed or removed belongs to the token before it: offsets omit it
        ends = [n if text[end:n].strip() else end for (_, end), n in zip(offsets, starts, strict=True)]
        return encoded["input_ids"], [(start, end) for (start, _), end in zip(offsets, ends, strict=True)]
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    offsets = []
    for start, end in pairwise([0, *borders, len(text)]):
        part = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
        if ids[: len(part)] != part:
            raise ValueError(
                f"expected a tokenizer with offsets, or tokens that end where the prompt ends, got neither at "
                f"{text[max(0, end - 10) : end + 10]!r}; move spaces to the response, or use a tokenizer.json"
            )
        offsets += [(start, end)] * (len(part) - len(offsets))
    return ids, offsets


def _encode_spans(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, float]]) -> Encoded:
    """Tokenise a text without special tokens. The tokens count that have a character in a span (start, end)."""
    borders = [int(place) for span in spans for place in span if place < len(text)]
    ids, offsets = _offsets(tokenizer, text, borders)
    return ids, [any(end > first and start < last for first, last in spans) for start, end in offsets]


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict], prompt: bool, tokenize: bool):
    """Return a chat in the tokenizer's template, as text or as token ids.

    Raises:
        ValueError: There is no template, or it refuses these turns.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "expected a tokenizer with a chat template, got none; use generate.py, or rows of prompt and response"
        )
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=tokenize, return_dict=False)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"expected turns that fit the model's chat template, got: {error}; change them") from error


def chat_tokens(tokenizer: PreTrainedTokenizerBase, turns: list[dict]) -> list[int]:
    """Return the token ids of a chat in the tokenizer's template, up to what opens the assistant's next turn.

    Args:
        tokenizer: Of a chat model.
        turns: {role, content} of each turn.

    Raises:
        ValueError: As _render.
    """
    return _render(tokenizer, turns, prompt=True, tokenize=True)


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Encoded:
    """Tokenise a chat with the tokenizer's template. The assistant's turns count, end-of-turn tokens included.

    Raises:
        ValueError: As _render. Or the template changes earlier turns, so that a turn's tokens can't be found.
    """
    text, spans = _render(tokenizer, messages, prompt=False, tokenize=False), []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], prompt=True, tokenize=False) if i else ""
        after = _render(tokenizer, messages[: i + 1], prompt=False, tokenize=False)
        if not text.startswith(after) or not after.startswith(before):
            raise ValueError(
                f"expected a chat template that keeps earlier turns as they are, got one that changes turn {i}; "
                "give rows of prompt and response"
            )
        spans.append((len(before), len(after) if after != text else math.inf))
    return _encode_spans(tokenizer, text, spans)


def encode_rows(form: str, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple]) -> list[Encoded]:
    """Tokenise rows, given as the values of the form's columns.

    Raises:
        ValueError: As special_tokens, _offsets and encode_messages.
    """
    if form == "messages":
        return [encode_messages(tokenizer, messages) for (messages,) in rows]
    texts = ["".join(row) for row in rows]
    ends = special_tokens(tokenizer, texts[0])
    if form == "text":
        parts = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        whole = [_add_ends(ids, ends)[0] for ids in parts]
        return [(ids, [True] * len(ids)) for ids in whole]
    encoded = []
    for text, (prompt, _) in zip(texts, rows, strict=True):
        part, counted = _encode_spans(tokenizer, text, [(len(prompt), math.inf)])
        ids, front = _add_ends(part, ends)
        encoded.append((ids, [False] * front + counted + [True] * (len(ids) - front - len(part))))
    return encoded


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool = True) -> str:
    """Return the text of token ids, with the spaces that they stand for."""
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def split_text(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], cuts: list[int], skip_special_tokens: bool = True
) -> list[str]:
    """Decode token ids as one text, and cut it at positions of tokens. The parts join to that text.

    A character of several tokens belongs to the part with its last token. A part's text is what it adds to the decoded
    text of the part before it; the parts before that do not matter.

    Args:
        cuts: Numbers of tokens before each cut, in rising order.

    Returns:
        len(cuts) + 1 parts.
    """
    whole = decode(tokenizer, ids, skip_special_tokens)
    borders, places = [(0, 0), (0, 0)], [0]  # (tokens, characters) before a cut that splits no character
    for cut in cuts:
        tokens, characters = borders[-1]
        starts = [borders[-2][0]] + [0] * (cut - tokens >= MAX_TOKENS_PER_CHARACTER)
        for start, end in product(starts, range(cut, max(tokens, cut - MAX_TOKENS_PER_CHARACTER), -1)):
            before = decode(tokenizer, ids[start:tokens], skip_special_tokens) if start else whole[:characters]
            text = decode(tokenizer, ids[start:end], skip_special_tokens)
            if text.startswith(before) and whole.startswith(text[len(before) :], characters):
                borders.append((end, characters + len(text) - len(before)))
                break
        places.append(borders[-1][1])
    return [whole[begin:end] for begin, end in pairwise([*places, len(whole)])]
