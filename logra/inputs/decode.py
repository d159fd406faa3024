"""Token ids to text. A token's text depends on what stands before it, so parts of a text are decoded together.

SentencePiece-like decoders remove the space before the first token, and a character may be several tokens.
"""

from itertools import pairwise, product

from transformers import PreTrainedTokenizerBase

MAX_TOKENS_PER_CHARACTER = 4  # bytes of a UTF-8 character
INCOMPLETE = "\ufffd"  # what decoders return for a part of a character


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
