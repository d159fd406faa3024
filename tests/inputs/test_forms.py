"""Each form of rows becomes the tokens that it stands for, and the right ones count; bad rows are named."""

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer, write_jsonl
from helpers import refused
from transformers import PreTrainedTokenizerFast

from logra.inputs import row_forms
from logra.inputs.row_forms import RowError, detect, make_row
from logra.inputs.rows import encode_row
from logra.run_dir import RunDir
from logra.runtime.settings import ROW_FORMS

DATE = "2024-07-26"
CHATML = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
THINKING = (  # as Qwen3's: reasoning of earlier turns is left out, and the last turn has a thought, empty or not
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER, ASSISTANT = {"role": "user", "content": "the old mill"}, {"role": "assistant", "content": "the river"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "the mill"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a place"}}]


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    made = make_tokenizer(chat=False)
    made.chat_template = template
    return made


def counted_text(of, row: row_forms.Row) -> tuple[str, str]:
    """Return the text of a row's tokens, and of those that count."""
    ids, counted = encode_row(of, row, DATE)
    return of.decode(ids), of.decode([i for i, counts in zip(ids, counted, strict=True) if counts])


FORMS = {  # the values of a row, its form, the end of its text, and what counts of it
    "text": ({"text": "the river"}, "the river", "the river"),
    "prompt_response": ({"prompt": "the old", "response": " river"}, "the old river", " river"),
    "messages": ({"messages": [USER, ASSISTANT]}, "assistant\nthe river<|im_end|>\n", "the river<|im_end|>\n"),
    "prompt_completion": ({"prompt": "the old", "completion": " river"}, "the old river", " river"),
    "preference": (
        {"prompt": "the old", "chosen": " river", "rejected": " mill"}, "the old river", " river",
    ),
    "alpaca": (
        {"instruction": "the old", "input": "mill", "output": "the river"},
        "user\nthe old\n\nmill<|im_end|>\n<|im_start|>assistant\nthe river<|im_end|>\n", "the river<|im_end|>\n",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "the mill"}, {"from": "gpt", "value": "the river"}]},
        "user\nthe mill<|im_end|>\n<|im_start|>assistant\nthe river<|im_end|>\n", "the river<|im_end|>\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    """Each is found by its columns, the first one for each; only what the assistant wrote counts."""
    values, end, counts = FORMS[form]
    assert detect(values, "text")[0] == form and tuple(FORMS) == tuple(row_forms.FORMS) == ROW_FORMS
    text, counted = counted_text(tokenizer(), make_row(form, values))
    assert text.endswith(end) and counted == counts


def test_conversational_forms():
    """TRL's prompt, completion, chosen and rejected may be turns; turns of the prompt do not count."""
    before = [USER, ASSISTANT, {"role": "user", "content": "water"}]
    for values in (
        {"prompt": before, "completion": [{"role": "assistant", "content": "birds"}]},
        {"prompt": before, "chosen": [{"role": "assistant", "content": "birds"}], "rejected": [ASSISTANT]},
        {"chosen": [*before, {"role": "assistant", "content": "birds"}], "rejected": [*before, ASSISTANT]},
        {"prompt": "the mill", "completion": [{"role": "assistant", "content": "birds"}]},
        {"prompt": "water", "chosen": [*before, ASSISTANT | {"content": "birds"}], "rejected": [*before, ASSISTANT]},
    ):
        row = make_row(detect(values, "text")[0], values)
        text, counted = counted_text(tokenizer(), row)
        assert counted == "birds<|im_end|>\n" and text.count("water") == ("water" in str(values))


def test_alpaca_without_a_chat_template():
    """The prompt is Stanford Alpaca's, with its line for an input."""
    values, *_ = FORMS["alpaca"]
    text, counted = counted_text(tokenizer(None), make_row("alpaca", values))
    assert "paired with an input" in text and text.endswith("### Input:\nmill\n\n### Response:\nthe river")
    assert counted == "the river"
    text, _ = counted_text(tokenizer(None), make_row("alpaca", values | {"input": ""}))
    assert "paired" not in text and "### Input" not in text


def test_parts_and_tools():
    """Parts of a content are joined; tool calls count, turns of tools do not; tools go to the template."""
    parts = [{"type": "text", "text": "the old", "image": None}, {"type": "text", "text": " mill"}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "name": "weather"},
        ASSISTANT,
    ]
    for tools in (TOOLS, json.dumps(TOOLS)):
        text, counted = counted_text(tokenizer(), make_row("messages", {"messages": turns, "tools": tools}))
        assert "of a place" in text and "user\nthe old mill<|im_end|>" in text and "tool\nrain" in text
        assert counted.count("<|im_end|>\n") == 2 and '"weather"' in counted and "rain" not in counted
    shared = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(CALL["function"])}]
    text, counted = counted_text(tokenizer(), make_row("sharegpt", {"conversations": shared}))
    assert "the mill" in counted
    with pytest.raises(RowError, match="tool calls in turn 1, which the model's chat template leaves out"):
        encode_row(tokenizer(PLAIN), make_row("messages", {"messages": turns}), DATE)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ASSISTANT]},
            "type image in turn 0",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "turn 0 without content"),
        ({"messages": [{"content": "a"}]}, "turn 0 without a role"),
        ({"messages": "the river"}, "no list of turns"),
        ({"messages": [USER]}, "no assistant's turn"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "tools that are not JSON"),
        ({"conversations": [{"from": "moderator", "value": "a"}]}, "turn 0 from 'moderator'"),
        ({"prompt": [USER], "completion": [USER]}, "no assistant's turn"),
        ({"prompt": "a", "response": 3}, "int"),
        ({"instruction": "", "output": "a"}, "empty"),
        ({"instruction": "a", "input": 3, "output": "a"}, "int"),
    ],
)
def test_bad_rows(values, problem):
    """What is wrong is said."""
    with pytest.raises(RowError, match=problem):
        make_row(detect(values, "text")[0], values)


def test_answers_that_begin_with_a_newline():
    """A token that spans the border of ChatML's header and the answer belongs to the answer."""
    of = tokenizer()
    for answer in ("\nthe river", "\n\nthe river", " the river", "<b>", ""):
        text, counted = counted_text(
            of, make_row("messages", {"messages": [USER, ASSISTANT | {"content": answer}, ASSISTANT]})
        )
        assert counted.lstrip("\n").startswith(answer.lstrip("\n")) and "user" not in counted, answer


def test_thoughts():
    """What a template leaves out of earlier turns does not count; the last turn's thought does."""
    think = ASSISTANT | {"reasoning_content": "birds sing"}
    of, turns = tokenizer(THINKING), [USER, think, {"role": "user", "content": "water"}, think]
    text, counted = counted_text(of, make_row("messages", {"messages": turns}))
    assert text.count("birds sing") == 1
    assert counted == "the river<|im_end|>\n<think>\nbirds sing\n</think>\n\nthe river<|im_end|>\n"
    of.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    text, counted = counted_text(of, make_row("messages", {"messages": [USER, ASSISTANT]}))
    assert counted.endswith("\n</think>\n\nthe river<|im_end|>\n")
    of.chat_template = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"
    for answer in ("the river", "<b>"):
        text, counted = counted_text(of, make_row("messages", {"messages": [USER, ASSISTANT | {"content": answer}]}))
        assert counted == f"{answer}<|im_end|>\n"


def test_generation_markers():
    """Templates that mark what the assistant wrote are believed, as TRL does."""
    of = tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}!{% endgeneration %}\n{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    turns = [USER, ASSISTANT, USER, {"role": "assistant", "content": "birds"}]
    assert counted_text(of, make_row("messages", {"messages": turns}))[1] == "the river!birds!"
    row = make_row("prompt_completion", {"prompt": turns[:3], "completion": turns[3:]})
    assert counted_text(of, row)[1] == "birds!"


def test_the_date_is_fixed():
    """A template that asks for today's date gets that of --chat_date; one whose format is not plain is refused."""
    of = tokenizer("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}.{% endfor %}")
    text, _ = counted_text(of, make_row("messages", {"messages": [USER, ASSISTANT]}))
    assert text.startswith("26 Jul 2024")
    of.chat_template = "{% set format = '%Y' %}{{ strftime_now(format) }}{{ messages[1].content }}"
    with pytest.raises(ValueError, match="plain formats of dates"):
        counted_text(of, make_row("messages", {"messages": [USER, ASSISTANT]}))


def test_rows_in_files(cli, tiny, workspace, capsys):
    """The form is printed, rows that can't be tokenised are named or dropped and counted, and a form can be chosen."""
    rows = [
        {"messages": [USER, ASSISTANT], "text": "a b"},
        {"messages": [{"role": "user", "content": 1}], "text": "c d"},
    ]
    rows.append({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "text": "e f"})
    rows[0]["tools"] = TOOLS
    write_jsonl(Path("chats.jsonl"), rows)
    flags = ("--model_name", tiny / "llama", "--data_name", "chats.jsonl", "--rank", 4, "--train_loss", "response")
    refused(cli("extract_log", *flags, "--log_dir", "log"), "1 (turn 0 without content)")
    status, out, err = cli("extract_log", *flags, "--log_dir", "log", "--skip_bad_rows")
    assert status == 0, err
    assert "rows are chats (messages)" in out and "dropped 2 rows" in out and "ignores the rows' tools" in out
    assert RunDir.load(Path("log")).parts[0].dropped_rows == 2
    flags = ("--model_name", tiny / "llama", "--data_name", "chats.jsonl", "--rank", 4)
    status, out, err = cli("extract_log", *flags, "--log_dir", "texts")
    assert status == 0 and "rows are text; --row_form could be messages" in out, err
    assert cli("extract_log", *flags, "--log_dir", "chats", "--row_form", "messages", "--skip_bad_rows")[0] == 0
    assert RunDir.load(Path("chats")).parts[0].dropped_rows == 2
    refused(
        cli("extract_log", *flags, "--log_dir", "x", "--row_form", "alpaca"), "instruction and output", "--row_form"
    )


def test_rows_of_one_id(cli, tiny, workspace):
    """They are one document, and a line says so."""
    write_jsonl(Path("docs.jsonl"), [{"id": i, "text": text} for i, text in (("a", "x y"), ("b", "z"), ("a", "v w"))])
    flags = ("--model_name", tiny / "llama", "--data_name", "docs.jsonl", "--rank", 4, "--log_dir", "log")
    status, out, err = cli("extract_log", *flags)
    assert status == 0 and "1 rows have the id of another row" in out, err
    assert RunDir.load(Path("log")).parts[0].documents == 2


def test_kept_columns(cli, tiny, workspace):
    """--keep_columns: every block of a document has the values of its row, whatever their types."""
    rows = [
        {"text": "the river ran past the old mill", "url": "http://a", "meta": {"n": 1}},
        {"text": "a dog", "url": None, "meta": "x"},
    ]
    write_jsonl(Path("docs.jsonl"), rows)
    flags = ("--model_name", tiny / "llama", "--data_name", "docs.jsonl", "--rank", 4, "--log_dir", "log")
    refused(cli("extract_log", *flags, "--keep_columns", "url", "source"), "source of --keep_columns")
    refused(cli("extract_log", *flags, "--keep_columns", "url", "--pack"), "--pack")
    assert cli("extract_log", *flags, "--keep_columns", "url", "meta", "--block_size", 4)[0] == 0
    run = RunDir.load(Path("log"))
    for example in run.train():
        row = rows[int(example["document_id"])]
        assert json.loads(example["kept"]) == {"url": row["url"], "meta": row["meta"]}
    assert run.settings.keep_columns == ["url", "meta"] and len(run.train()) > 2
    assert cli("extract_log", *flags)[0] == 0  # it reads the setting from run.json


def test_a_trainers_file_through_all_stages(cli, tiny, workspace):
    """TRL's chats with tools, parts and further columns: to a report that shows what was kept, and groups by it."""
    rows = [
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "the old mill"}]}, ASSISTANT],
            "tools": TOOLS, "source": "web" if number % 2 else "books", "url": f"https://example.org/{number}",
        }
        for number in range(6)
    ]  # fmt: skip
    write_jsonl(Path("sft.jsonl"), rows)
    flags = ("--model_name", tiny / "llama", "--data_name", "sft.jsonl", "--rank", 4, "--log_dir", "log")
    kept = ("--train_loss", "response", "--keep_columns", "source", "url")
    assert cli("extract_log", *flags, *kept)[0] == 0
    prompts = ("--prompts", "prompts.txt", "--max_new_tokens", 3, "--output", "q.jsonl")
    Path("prompts.txt").write_text("water\n")
    assert cli("generate_llama3", "--model_name", tiny / "llama", *prompts)[0] == 0
    assert cli("compute_influence", "--log_dir", "log", "--split", "q.jsonl")[0] == 0
    status, out, err = cli("analysis", "--log_dir", "log", "--by", "source")
    assert status == 0 and "books" in out and "web" in out, err
    assert cli("analysis", "--log_dir", "log", "--tokens")[0] == 0
    assert 'href="https://example.org/' in next(Path("log/scores").glob("*/report.html")).read_text()
