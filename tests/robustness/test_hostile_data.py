"""Hostile data: whatever a file of texts holds, a stage ends well or says in one line what is wrong with it."""

import csv
import io
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import edit_json, make_texts, make_tokenizer, write_jsonl
from helpers import refused
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedTokenizerFast

from logra.run_dir import RunDir
from logra.runtime import progress

OK = "the river ran past the old mill"


def chain(cli, model, data, *flags, queries="queries.jsonl", log="log", mode="cosine") -> np.ndarray:
    """Run stages 2 to 4; each ends well. Return the scores."""
    for script, *stage in (
        ("extract_log", "--model_name", model, "--data_name", data, "--rank", 4, *flags),
        ("compute_influence", "--split", queries, "--mode", mode),
        ("analysis", "--diagnose"),
    ):
        status, _, err = cli(script, "--log_dir", log, *stage)
        assert status == 0, err
    scores = np.load(next(Path(log).glob(f"scores/*-{mode}-*/scores.npy")))
    assert np.isfinite(scores).all()
    return scores


def as_file(name: str, texts: list[str]) -> str:
    """Write documents as .jsonl, .json or .txt."""
    text = "\n".join(texts) if name.endswith(".txt") else "".join(json.dumps({"text": t}) + "\n" for t in texts)
    text = json.dumps([{"text": t} for t in texts]) if name.endswith(".json") else text
    Path(name).write_text(text, encoding="utf-8")
    return name


def set_tokenizer(tiny: Path, edit) -> str:
    """Return a copy of the tiny Llama with the tokenizer that edit(tokenizer.json as a dict) makes of its own."""
    shutil.copytree(tiny / "llama", "model", dirs_exist_ok=True)
    content = json.loads(make_tokenizer().backend_tokenizer.to_str())
    edit(content)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content))).save_pretrained("model")
    return "model"


STRANGE = {
    "one token": "a",
    "NUL": "nul \0 inside\0",
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "emoji": "👩\u200d👩\u200d👧 🎉 e\u0301",
    "BOM": "\ufeffa mark",
    "control characters": "\x1b]0;x\x07 \x9b31m",
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt"])
@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_strange_texts_are_texts(cli, tiny, workspace, text, suffix):
    """All stages take them; every document is there; one token has no loss and score 0."""
    scores = chain(cli, tiny / "llama", as_file(f"strange.{suffix}", [text, OK]))
    examples = RunDir.load(Path("log")).train()
    assert examples["document_id"] == ["0", "1"] and scores.shape == (3, 2)
    assert (scores[:, 0] == 0).all() == (len(examples[0]["input_ids"]) == 1)
    assert examples["text"][0] == (text.lstrip("\ufeff") if suffix == "txt" else text)  # there it marks UTF-8


@pytest.mark.parametrize("kind", ["raw", "kfac", "ekfac"])
def test_documents_without_a_loss(cli, tiny, workspace, kind):
    """Where every document is one token, gradients, Hessian and scores are 0."""
    assert not chain(cli, tiny / "llama", as_file("one.jsonl", ["a", "b"]), "--hessian", kind).any()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", ("empty.jsonl", "nothing")),
        ("empty.json", b"[]", ("empty.json", "nothing")),
        ("empty.txt", b"", ("empty.txt",)),
        ("bytes.jsonl", b'{"text": "the \xff\xfe river"}\n', ("UTF-8", "the \\xff")),
        ("bytes.txt", b"the \xff\xfe river\n", ("bytes.txt", "byte 4", "\\xff")),
        ("bytes.json", b'[{"text": "the \xff\xfe river"}]', ("bytes.json", "UTF-8")),
        ("nul.jsonl", b'{"text": "the \0 river"}\n', ("nul.jsonl", "JSON")),
        ("half.jsonl", b'{"text": "the \\ud800 river"}\n', ("half.jsonl", "surrogate")),
        ("half.json", b'[{"text": "the \\ud800 river"}]\n', ("half.json", "surrogate")),
        ("half.jsonl", b'{"id": "\\udc00", "text": "the river"}\n', ("half.jsonl", "surrogate")),
        ("numbers.jsonl", b"1\n2\n", ("numbers.jsonl",)),
        (
            "roles.jsonl",
            b'{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}\n',
            ("0 (turn 0 without a role)",),
        ),
    ],
)
def test_what_is_no_text_is_refused(cli, tiny, workspace, name, content, words):
    """Documents that are not UTF-8 or not JSON, or that aren't there; no run stays."""
    Path(name).write_bytes(content)
    refused(cli("extract_log", "--model_name", tiny / "llama", "--data_name", name, "--log_dir", "log"), *words)
    assert not Path("log").exists()


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a small run."""
    from conftest import run_cli

    folder = tmp_path_factory.mktemp("finished")
    write_jsonl(folder / "docs.jsonl", [{"text": text} for text in make_texts(8)])
    flags = ("--model_name", tiny / "llama", "--data_name", folder / "docs.jsonl", "--rank", 4)
    assert run_cli("extract_log", *flags, "--log_dir", folder / "log") == 0
    return folder / "log"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "the \\ud800 river"}\n', ("row 1", "surrogates")),
        (b'{"text": "a b", "id": "\\ud800"}\n', ("row 1", "surrogates")),
        (b'{"text": "the \xff river"}\n', ("q.jsonl", "UTF-8")),
        (b"[" * 100_000, ("line 1", "nested")),
        (b'{"prompt_ids": [1' + b"0" * 5000 + b"]}\n", ("line 1", "4300")),
        (b'{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}\n', ("row 1", "turn 0")),
    ],
    ids=["half a pair", "half a pair in an id", "bytes", "brackets", "digits", "no role"],
)
def test_hostile_queries_are_refused(cli, finished, workspace, content, words):
    """Named by file or row; no scores folder stays."""
    Path("q.jsonl").write_bytes(content)
    refused(cli("compute_influence", "--log_dir", finished, "--split", "q.jsonl"), *words)
    assert not list(finished.glob("scores/q-*"))


@pytest.mark.parametrize(
    "content",
    [
        '\ufeff{"text": "the river"}',
        '{"prompt_ids": [40], "response_ids": [41], "prompt": 5, "response": null, "model": "MODEL"}',
        '{"text": "the river", "messages": 5}',
        '{"id": null, "text": "the river", "tokens": "x", "counted": {}}',
    ],
    ids=["BOM", "texts that are none", "other keys", "odd id"],
)
def test_odd_queries_go_through(cli, tiny, finished, workspace, content):
    """Stages 3 and 4 take what the query needs, and do not stumble over what it does not."""
    Path("odd.jsonl").write_text(content.replace("MODEL", str(tiny / "llama")), encoding="utf-8")
    for script, *flags in (("compute_influence", "--split", "odd.jsonl"), ("analysis",)):
        status, _, err = cli(script, "--log_dir", finished, *flags)
        assert status == 0, err


@pytest.mark.parametrize("script", ["generate", "generate_llama3"])
def test_hostile_prompts(cli, tiny, workspace, script):
    """Prompts that are no text are refused, NUL and BOM are taken; so is a template's own complaint."""
    flags = (script, "--model_name", tiny / "llama", "--max_new_tokens", 2, "--output", "o.jsonl", "--prompts")
    Path("p.jsonl").write_bytes(b'{"prompt": "the \\ud800"}\n')
    refused(cli(*flags, "p.jsonl"), "row 1")
    Path("p.txt").write_bytes(b"the \xff river")
    refused(cli(*flags, "p.txt"), "UTF-8", "p.txt")
    Path("p.txt").write_bytes(b"\xef\xbb\xbfthe \0 river")
    assert cli(*flags, "p.txt")[0] == 0 and json.loads(Path("o.jsonl").read_text())["prompt"] == "the \0 river"
    shutil.copytree(tiny / "llama", "strict")
    Path("strict/chat_template.jinja").write_text("{{ raise_exception('a system turn first') }}")
    if script == "generate_llama3":
        refused(cli(script, "--model_name", "strict", *flags[3:], "p.txt"), "a system turn first")


def test_token_ids_beyond_the_vocabulary(cli, tiny, workspace):
    """A tokenizer with more tokens than the model: stages 1 and 2 refuse it."""

    def widen(content: dict) -> None:
        token = {"id": 320, "content": "river", "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append(token | {"normalized": False, "special": False})

    model = set_tokenizer(tiny, widen)
    Path("p.txt").write_text("the river\n")
    refused(cli("generate", "--model_name", model, "--prompts", "p.txt", "--max_new_tokens", 2), "below 320")
    flags = ("--model_name", model, "--data_name", "docs.jsonl", "--log_dir", "log")
    refused(cli("extract_log", *flags), "below 320", "got 320")


def test_a_tokenizer_without_special_tokens(cli, tiny, workspace):
    """No pad and no EOS token, in model or tokenizer: padding and the end are ours; all stages work."""
    model = set_tokenizer(tiny, lambda content: None)
    config = AutoConfig.from_pretrained(model)
    config.pad_token_id = config.eos_token_id = config.bos_token_id = None
    config.save_pretrained(model)
    Path(model, "generation_config.json").unlink()
    Path("p.txt").write_text("the river\nthe old mill and the dog\n")
    assert cli("generate", "--model_name", model, "--prompts", "p.txt", "--max_new_tokens", 3)[0] == 0
    rows = [json.loads(line) for line in Path("data/generated/model/queries.jsonl").read_text().splitlines()]
    assert all(len(row["response_ids"]) == 3 for row in rows)
    assert chain(cli, model, "docs.jsonl", queries="generated").any()


def test_another_tokenizer_is_refused(cli, tiny, workspace):
    """The same vocabulary, but other merges: the run's examples and the queries would not be tokenised alike."""
    model = set_tokenizer(tiny, lambda content: None)
    flags = ("--model_name", model, "--data_name", "docs.jsonl", "--log_dir", "log", "--rank", 4)
    assert cli("extract_log", *flags, "--shard_examples", 2)[0] == 0
    set_tokenizer(tiny, lambda content: content["model"].update(merges=content["model"]["merges"][:10]))
    refused(
        cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl"), "tokenizer.json has other content"
    )
    Path("log/gradients/00001.json").unlink()
    refused(cli("extract_log", *flags), "tokenizer.json has other content")
    edit_json(
        Path("log/run.json"), lambda content: content.pop("model_files")
    )  # as a run of an older version, or a Hub model's
    refused(cli("extract_log", *flags), "tokenizer", "run.json")


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]

HOSTILE = [*FORMULAS, "../../x", "a\"b'c", "a,b\n9. +9 fake", "\x1b[31m", "\x9b2J", "\u202eabc"]


@pytest.mark.parametrize("by", ["example", "document"])
def test_hostile_ids(cli, tiny, workspace, by):
    """Paths stay where they are; a CSV cell is no formula; nothing that is printed drives the terminal."""
    rows = [{"id": i, "text": i + text} for i, text in zip(HOSTILE, make_texts(len(HOSTILE)), strict=True)]
    write_jsonl(Path("h.jsonl"), rows)
    write_jsonl(Path("hq.jsonl"), [{"id": i, "text": i + " the river"} for i in HOSTILE])
    before = {p for p in Path("..").rglob("*") if "log" not in p.parts}
    chain(cli, tiny / "llama", "h.jsonl", queries="hq.jsonl")
    status, out, _ = cli("analysis", "--log_dir", "log", "--diagnose", "--by", by)
    folder = next(Path("log/scores").glob("hq-*/"))
    assert status == 0 and {p for p in Path("..").rglob("*") if "log" not in p.parts} == before
    for text in (out, (folder / "top_k.txt").read_text(), Path("log/log.txt").read_text()):
        assert not set(text) & set("\x1b\x9b\u202e\r") and "\\x1b[31m" in text
    assert "\n9. +9 fake" not in out.partition("Hessian")[0], "an id does not make a line of the table"
    with open(folder / "top_k.csv", newline="", encoding="utf-8") as file:
        cells = [row[key] for row in csv.DictReader(file) for key in ("query", "document", "text")]
    assert {"'" + i for i in FORMULAS} | {"../../x"} <= set(cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    kept = [json.loads(line)["document"] for line in (folder / "top_k.jsonl").read_text("utf-8").split("\n") if line]
    assert set(kept) == set(HOSTILE), "top_k.jsonl has them as they are"


@pytest.mark.parametrize("kind", ["raw", "kfac", "ekfac"])
def test_a_document_is_its_own_best_match(cli, tiny, workspace, kind):
    """Of unit-length scores (cosine), a query equal to a document has none higher than the document's."""
    texts = make_texts(12, seed=5)
    write_jsonl(Path("same.jsonl"), [{"text": text} for text in texts])
    scores = chain(cli, tiny / "llama", "same.jsonl", "--hessian", kind, queries="same.jsonl")
    assert (scores.argmax(axis=1) == np.arange(12)).all()  # Cauchy-Schwarz in the metric of C + lambda I


def test_a_terminal_that_lacks_a_character(monkeypatch):
    """What its encoding has no place for is printed as an escape; the script goes on."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    progress.begin(False)
    progress.say("caf\u00e9 \x1b[2J \ud800")
    assert raw.getvalue().rstrip() == rb"caf\xe9 \x1b[2J \ud800"


def test_one_token_is_verified(cli, tiny, workspace):
    """--verify takes documents without a loss, alone and among others."""
    flags = ("--model_name", tiny / "llama", "--data_name", as_file("one.jsonl", ["a", "b", OK]), "--verify")
    for count in (2, 3):
        status, out, err = cli("extract_log", *flags, count)
        assert status == 0 and "FAIL" not in out, err


@pytest.mark.slow
def test_a_document_of_a_million_tokens(cli, tiny, workspace):
    """It becomes blocks of one document, each token once, in bounded memory and time."""
    text = " ".join(make_texts(1, longest=30)) + "\n"
    count = 10**6 // len(make_tokenizer()(text)["input_ids"]) + 1
    write_jsonl(Path("long.jsonl"), [{"id": "long", "text": text * count}])
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    scores = chain(cli, tiny / "llama", "long.jsonl", "--store_dtype", "int1", "--hessian", "ekfac")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "less than a GB more, in kB"
    assert time.monotonic() - begun < 600
    log = RunDir.load(Path("log"))
    assert log.parts[0].documents == 1 and log.parts[0].tokens >= 10**6
    assert scores.shape == (3, log.examples) and log.examples == -(-log.parts[0].tokens // 64)


@pytest.mark.slow
def test_a_hundred_thousand_equal_documents(cli, tiny, workspace):
    """They all get the same score, to rounding, and the duplicates are named in one group."""
    write_jsonl(Path("same.jsonl"), [{"text": OK}] * 100_000)
    begun = time.monotonic()
    scores = chain(cli, tiny / "llama", "same.jsonl", "--layers", "down_proj", "--hessian", "ekfac")
    assert scores.shape == (3, 100_000) and (np.ptp(scores, axis=1) < 1e-3 * np.abs(scores).max(axis=1)).all()
    assert "1 groups, 100000 examples" in Path("log/log.txt").read_text() and time.monotonic() - begun < 600
