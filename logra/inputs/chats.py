"""Chats in a tokenizer's chat template, and the parts of their text that the assistant wrote."""

import json
import math
import re
from collections.abc import Sequence
from datetime import date as Date
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from logra.inputs.row_forms import RowError

Spans = list[tuple[int, float]]  # (start, end) in a text
TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # in a template: around what the assistant wrote
MARK = "\ue000"  # a character of private use: no text begins or ends with it


class ChatTemplate:
    """Renders chats. Templates that ask for today's date get a fixed one, so that a chat has the same tokens each day.

    Args:
        tokenizer: Of a chat model.
        date: The date, YYYY-MM-DD.
        tools: For the template, or None.

    Raises:
        ValueError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str, tools: list | None = None):
        if not tokenizer.chat_template:
            raise ValueError(
                "expected a tokenizer with a chat template, got none; use generate.py, or rows of prompt and response"
            )
        day = Date.fromisoformat(date)
        template = tokenizer.get_chat_template(None, tools)
        template = TODAY.sub(lambda call: json.dumps(day.strftime(call[2])), template)
        if "strftime_now(" in template:
            raise ValueError("expected a chat template with plain formats of dates, got another; give its text as rows")
        self.tokenizer, self.template, self.tools = tokenizer, template, tools

    def render(self, turns: Sequence[dict], prompt: bool = False, tokenize: bool = False, **changed: Any) -> Any:
        """Return the text of a chat, or its token ids.

        Args:
            turns: {role, content ...} of each turn.
            prompt: Add what opens the assistant's next turn.
            tokenize: Return token ids.
            changed: Other values for the template.

        Raises:
            RowError: The template refuses these turns.
        """
        options: dict[str, Any] = {"add_generation_prompt": prompt, "tokenize": tokenize, "return_dict": False}
        options |= {"chat_template": self.template, "tools": self.tools}
        try:
            return self.tokenizer.apply_chat_template(list(turns), **options | changed)
        except (TemplateError, TypeError) as error:
            raise RowError(f"turns that do not fit the model's chat template: {error}") from error

    def assistant_spans(self, turns: Sequence[dict], text: str) -> Spans:
        """Return where the assistant's turns stand in the text of a chat, end-of-turn tokens included.

        Raises:
            RowError: A turn can't be found, or the template leaves out a tool call.
        """
        self._check_tool_calls(turns, text)
        if MARKERS.search(self.template):
            options = {"chat_template": self.template, "tools": self.tools} | self.tokenizer.special_tokens_map
            _, (spans,) = render_jinja_template([list(turns)], return_assistant_tokens_mask=True, **options)
            return list(spans)
        return [self._span(turns, i, text) for i, turn in enumerate(turns) if turn["role"] == "assistant"]

    def ignores_tools(self, turns: Sequence[dict]) -> bool:
        """Return whether the text of a chat is the same without the tools."""
        return self.tools is not None and self.render(turns, tools=None) == self.render(turns)

    def _check_tool_calls(self, turns: Sequence[dict], text: str) -> None:
        for number, turn in enumerate(turns):
            if turn.get("tool_calls"):
                plain = {key: turn[key] or "" for key in turn if key != "tool_calls"}
                if self.render([*turns[:number], plain, *turns[number + 1 :]]) == text:
                    raise RowError(f"tool calls in turn {number}, which the model's chat template leaves out")

    def _span(self, turns: Sequence[dict], number: int, text: str) -> tuple[int, float]:
        """Return where a turn stands in the text of a chat."""
        before = self.render(turns[:number], prompt=True) if number else ""
        after = self.render(turns[: number + 1])
        if text.startswith(after) and after.startswith(before):
            return len(before), len(after) if after != text else math.inf
        return self._span_inside(turns, number, text)

    def _marked(self, turns: Sequence[dict], number: int) -> str:
        """Return the text of a chat with a mark as the content of one of its turns."""
        return self.render([*turns[:number], {"role": turns[number]["role"], "content": MARK}, *turns[number + 1 :]])

    def _span_inside(self, turns: Sequence[dict], number: int, text: str) -> tuple[int, float]:
        """Find a turn by the text around it: the template changes it later, or its prompt opens a thought."""
        marked, alone = self._marked(turns, number), self._marked(turns[: number + 1], number)
        start = len(_common_prefix(marked, text))
        rest = marked[start:].removeprefix(MARK)
        end = len(text) - len(rest)
        if marked.count(MARK) != 1 or len(rest) == len(marked[start:]) or end < start or text[end:] != rest:
            raise RowError(f"a turn {number} that is not in the text of the chat template; give prompt and response")
        end_of_turn = _common_prefix(alone.partition(MARK)[2], rest)
        return start, end + len(end_of_turn)


def _common_prefix(one: str, two: str) -> str:
    end = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return one[:end]
