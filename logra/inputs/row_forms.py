"""The forms in which rows hold texts, prompts with answers, and chats: found by their columns, made into one Row.

docs/inputs.md has the table of forms.
"""

import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

ROLES = {  # of ShareGPT's rows and its relatives -> of a chat template
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
ALPACA = "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request."
ALPACA_INPUT = ", paired with an input that provides further context"


class RowError(ValueError):
    """Says what is wrong with one row."""


class Row(NamedTuple):
    """What is tokenised of a row: texts or a chat. Of a row that has both, the chat if the model has a chat template.

    Attributes:
        texts: (text,), or (prompt, response), or none.
        messages: The turns of a chat, as a chat template takes them; or none.
        tools: The tools that the chat template describes, or None.
        first: Number of the first turn that may count in the loss.
    """

    texts: tuple[str, ...] = ()
    messages: tuple[dict, ...] = ()
    tools: list | None = None
    first: int = 0


class Form(NamedTuple):
    """A form of rows.

    Attributes:
        needed: Columns by which it is found.
        optional: Further columns that it uses.
        to_row: Makes the Row from the columns' values; raises a RowError that says what is wrong with them.
        name: How messages call it.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    to_row: Callable[..., Row]
    name: str


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(type(value).__name__)
    if not value.strip():
        raise RowError("empty")
    return value


def _without_none(value: Any) -> Any:
    """Leave out the keys whose value is None: Arrow gives the objects of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _turn(number: int, turn: Any) -> dict:
    """Return a turn with its content as text (None next to tool calls). The parts of a content are joined."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise RowError(f"turn {number} without a role")
    content = turn.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RowError(f"a part of type {kind} in turn {number}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise RowError(f"turn {number} without content")
    return _without_none(turn) | {"content": content}


def _turns(messages: Any) -> list[dict]:
    if not isinstance(messages, list):
        raise RowError("no list of turns")
    return [_turn(number, turn) for number, turn in enumerate(messages)]


def _tools(tools: Any) -> list | None:
    """Return a list of tools, which may be written as JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise RowError("tools that are not JSON") from error
    if tools is not None and not isinstance(tools, list):
        raise RowError("tools that are no list")
    return _without_none(tools) or None


def _chat(turns: list[dict], tools: Any, first: int = 0) -> Row:
    if not any(turn["role"] == "assistant" and (turn["content"] or turn.get("tool_calls")) for turn in turns[first:]):
        raise RowError("no assistant's turn")
    return Row(messages=tuple(turns), tools=_tools(tools), first=first)


def _messages(messages: Any, tools: Any = None) -> Row:
    return _chat(_turns(messages), tools)


def _answered(prompt: Any, answer: Any, tools: Any = None) -> Row:
    """Return a prompt with its answer: two texts, or the turns of a chat, of which those of the answer count."""
    if not isinstance(prompt, list) and not isinstance(answer, list):
        return Row((_text(prompt), _text(answer)))
    before = [{"role": "user", "content": _text(prompt)}] if isinstance(prompt, str) else _turns(prompt)
    after = [{"role": "assistant", "content": _text(answer)}] if isinstance(answer, str) else _turns(answer)
    return _chat(before + after, tools, len(before))


def contrast(chosen: Any, rejected: Any, prompt: Any = None, tools: Any = None) -> tuple[Row, Row]:
    """Return two rows that begin alike: with the preferred answer and with the other one.

    Without a prompt, and where the answers begin with a user's or system's turn, both are whole chats. What is equal at
    their beginning is then the prompt.

    Raises:
        RowError: What is wrong with the values.
    """
    first_turn = _turns(chosen)[:1] if isinstance(chosen, list) else []
    if prompt is not None and not any(turn["role"] in ("system", "user") for turn in first_turn):
        return _answered(prompt, chosen, tools), _answered(prompt, rejected, tools)
    one, two = _turns(chosen), _turns(rejected)
    pairs = zip(one, two, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))
    return _chat(one, tools, first), _chat(two, tools, first)


def _chosen(*values: Any) -> Row:
    return contrast(*values)[0]


def _alpaca(instruction: Any, output: Any, further: Any = None, system: Any = None) -> Row:
    """Return a turn of the user and one of the assistant, and the same in the prompt of Stanford's Alpaca."""
    parts = {"Instruction": _text(instruction)} | ({"Input": _text(further)} if further else {})
    text = _text(system) if system else ALPACA.format(ALPACA_INPUT if further else "")
    text += "".join(f"\n\n### {name}:\n{part}" for name, part in parts.items()) + "\n\n### Response:\n"
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": "\n\n".join(parts.values())}, {"role": "assistant", "content": _text(output)}]
    return Row((text, output), tuple(turns))


def _sharegpt(conversations: Any, system: Any = None, tools: Any = None) -> Row:
    if not isinstance(conversations, list):
        raise RowError("no list of turns")
    turns: list[dict] = [{"role": "system", "content": _text(system)}] if system else []
    for number, turn in enumerate(conversations):
        turn = turn if isinstance(turn, dict) else {}
        role, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role == "function_call":
            calls = _tools(value if str(value).lstrip().startswith("[") else f"[{value}]")
            turns.append(
                {"role": "assistant", "content": None}
                | {"tool_calls": [{"type": "function", "function": call} for call in calls or ()]}
            )
        elif role in ROLES:
            turns.append({"role": ROLES[role], "content": value})
        else:
            raise RowError(f"turn {number} from {role!r}")
    return _chat(_turns(turns), tools)


def _only_text(text: Any) -> Row:
    return Row((_text(text),))


FORMS = {
    "text": Form(("text",), (), _only_text, "text"),
    "prompt_response": Form(("prompt", "response"), (), _answered, "a prompt and a response"),
    "messages": Form(("messages",), ("tools",), _messages, "chats (messages)"),
    "prompt_completion": Form(("prompt", "completion"), ("tools",), _answered, "TRL's prompt and completion"),
    "preference": Form(("chosen", "rejected"), ("prompt", "tools"), _chosen, "TRL's preferences: the chosen answer"),
    "alpaca": Form(("instruction", "output"), ("input", "system"), _alpaca, "Alpaca's instruction and output"),
    "sharegpt": Form(("conversations",), ("system", "tools"), _sharegpt, "ShareGPT's conversations"),
}
COLUMNS = tuple(dict.fromkeys(c for form in FORMS.values() for c in (*form.needed, *form.optional)))


def with_columns(form: str, text_column: str) -> Form:
    """Return a form; that of texts with the user's text column."""
    return FORMS[form] if form != "text" else FORMS[form]._replace(needed=(text_column,))


def detect(columns: Collection[str], text_column: str, response: bool = False) -> list[str]:
    """Return all forms whose columns are there, the one that is used first. `response`: texts alone are not enough."""
    names = [name for name in FORMS if not (response and name == "text")]
    return [name for name in names if set(with_columns(name, text_column).needed) <= set(columns)]


def choose(columns: Collection[str], text_column: str, row_form: str | None, response: bool) -> str:
    """Return the form of a data set's rows.

    Args:
        columns: Of the data set.
        text_column: The column that holds a text.
        row_form: The user's choice.
        response: Only the tokens of answers count, so rows of text are not enough.

    Raises:
        ValueError: The columns fit none of the forms, or not that of the user's choice.
    """
    found = detect(columns, text_column, response)
    if row_form in found or (row_form is None and found):
        return row_form or found[0]
    wanted = with_columns(row_form, text_column).needed if row_form else (text_column,)
    expected = f"the column{'s' * (len(wanted) > 1)} {' and '.join(wanted)}"
    remedy = "give --text_column, or the columns of another form"
    if row_form:
        remedy = "leave --row_form out"
    if response and row_form in (None, "text"):
        answers = [" and ".join(form.needed) for name, form in FORMS.items() if name != "text"]
        expected = f"columns with answers ({', '.join(answers)})"
        remedy = "leave --train_loss response out"
    raise ValueError(f"expected {expected}, got {', '.join(columns)}; {remedy}")


def make_row(form: str, values: dict[str, Any], text_column: str = "text") -> Row:
    """Return the Row of the values of a row's columns.

    Raises:
        RowError: What is wrong with them.
    """
    chosen = with_columns(form, text_column)
    return chosen.to_row(*(values.get(column) for column in (*chosen.needed, *chosen.optional)))
