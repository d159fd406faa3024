"""Turn a row of data into token ids, and mark the tokens that count in the loss; turn token ids into text.

A row's tokens are those of its whole text. A tokenizer's special tokens stand at the ends of that text only; a chat has
those of its template alone. See docs/inputs.md.

A token's text depends on what stands before it, so parts of a text are decoded together: SentencePiece-like decoders
remove the space before the first token, and a character may be several tokens.
"""

import math
import string
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from logra.inputs.chats import ChatTemplate
from logra.inputs.row_forms import Row, RowError

MAX_TOKENS_PER_CHARACTER = 4  # bytes of a UTF-8 character
INCOMPLETE = "\ufffd"  # what decoders return for a part of a character
Encoded = tuple[list[int], list[bool]]  # token ids, and whether each one counts in the response's loss


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
            raise RowError(
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


def chat_tokens(tokenizer: PreTrainedTokenizerBase, turns: list[dict], date: str) -> list[int]:
    """Return the token ids of a chat in the tokenizer's template, up to what opens the assistant's next turn.

    Args:
        tokenizer: Of a chat model.
        turns: {role, content} of each turn.
        date: See chats.ChatTemplate.

    Raises:
        ValueError: There is no template, or it refuses the turns.
    """
    return ChatTemplate(tokenizer, date).render(turns, prompt=True, tokenize=True)


def _encode_chat(tokenizer: PreTrainedTokenizerBase, row: Row, date: str) -> Encoded:
    """Tokenise a chat with the tokenizer's template. The assistant's turns count, end-of-turn tokens included."""
    template = ChatTemplate(tokenizer, date, row.tools)
    text = template.render(row.messages)
    turns = sum(turn["role"] == "assistant" for turn in row.messages[row.first :])
    return _encode_spans(tokenizer, text, template.assistant_spans(row.messages, text)[-turns:])


def encode_row(
    tokenizer: PreTrainedTokenizerBase, row: Row, date: str, ends: tuple[list[int], list[int]] | None = None
) -> Encoded:
    """Tokenise a row.

    Args:
        tokenizer: Of the model.
        row: A text, a prompt and a response, or a chat; see Row.
        date: See chats.ChatTemplate.
        ends: Of special_tokens, if they are known.

    Raises:
        RowError: Its tokens can't be told apart; or as ChatTemplate.
        ValueError: As special_tokens, or there is no chat template.
    """
    if row.messages and (tokenizer.chat_template or not row.texts):
        return _encode_chat(tokenizer, row, date)
    if len(row.texts) == 1:
        return encode_texts(tokenizer, row.texts)[0]
    text = "".join(row.texts)
    part, counted = _encode_spans(tokenizer, text, [(len(row.texts[0]), math.inf)])
    ids, front = _add_ends(part, ends or special_tokens(tokenizer, text))
    return ids, [False] * front + counted + [True] * (len(ids) - front - len(part))


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Tokenise texts, of which all tokens count.

    Raises:
        ValueError: As special_tokens.
    """
    ends = special_tokens(tokenizer, texts[0])
    parts = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    whole = [_add_ends(ids, ends)[0] for ids in parts]
    return [(ids, [True] * len(ids)) for ids in whole]


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


def pack(documents: Dataset, block_size: int) -> Iterator[dict]:
    """Join documents end to end and yield full blocks; the last one may be shorter.

    Each block names its documents and the positions where they start.
    """
    columns = [name for name in ("input_ids", "counted") if name in documents.column_names]
    block, ids, starts = {name: [] for name in columns}, [], []
    for row in documents:
        used = 0
        while used < len(row["input_ids"]):
            start = len(block["input_ids"])
            end = used + block_size - start
            block = {name: block[name] + row[name][used:end] for name in columns}
            ids, starts, used = [*ids, row["document_id"]], [*starts, start], end
            if len(block["input_ids"]) == block_size:
                yield block | {"document_id": ids[0], "document_ids": ids, "document_starts": starts}
                block, ids, starts = {name: [] for name in columns}, [], []
    if ids:
        yield block | {"document_id": ids[0], "document_ids": ids, "document_starts": starts}


def add_text(
    ids: list[list[int]], rows: list[int], examples: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[str]]:
    """Decode a batch of examples, for Dataset.map. The texts of a document's blocks join to its text.

    Args:
        ids: Token ids of consecutive examples.
        rows: Their numbers.
        examples: All examples.
        tokenizer: Of the model.
    """
    first = max(0, rows[0] - 1)
    near = examples[first : rows[-1] + 2]  # and their neighbours
    documents = near.get("document_ids") or [[document_id] for document_id in near["document_id"]]
    texts = []
    for i, block in enumerate(ids, rows[0] - first):
        continues = i > 0 and documents[i - 1][-1] == documents[i][0]
        continued = i + 1 < len(documents) and documents[i][-1] == documents[i + 1][0]
        before, after = near["input_ids"][i - 1] if continues else [], near["input_ids"][i + 1] if continued else []
        texts.append(_block_text(tokenizer, before, block, after))
    return {"text": texts}


def _block_text(tokenizer: PreTrainedTokenizerBase, before: list[int], block: list[int], after: list[int]) -> str:
    """Decode a block between its neighbours in the document; a character belongs to the block with its last token."""
    some = range(MAX_TOKENS_PER_CHARACTER)
    contexts = [(before[n:], after[:m]) for n, m in product(some, some)]
    for left, right in contexts:  # the first one that neither begins nor ends inside a character
        text = decode(tokenizer, left + block + right)
        if text == text.strip(INCOMPLETE):
            break
    else:
        left, right = before, []
    cuts = [len(left), len(left) + len(block)] if right else [len(left)]
    return split_text(tokenizer, left + block + right, cuts)[1]
