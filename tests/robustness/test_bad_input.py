"""Bad input: one line that says what was expected, what came and what to do; status 2; nothing that looks complete."""

import json
import resource
import shutil
from pathlib import Path

import psutil
import pytest
from conftest import VOCAB, edit_json, make_tokenizer, write_jsonl
from helpers import poison_model, refused
from transformers import AutoModelForCausalLM, JetMoeConfig

from logra.runtime.settings import RUN_FIELDS
from logra.stages import gradients


@pytest.fixture
def base(tiny, workspace):
    """Flags of a small run."""
    return ("--model_name", tiny / "llama", "--data_name", "docs.jsonl", "--log_dir", "log", "--rank", 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model_name", "no/model"), ("no/model", "network")),
        (("--data_name", "no/data"), ("no/data", "network")),
        (("--data_name", "notes.md"), ("notes.md", ".jsonl")),
        (("--data_name", "broken.jsonl"), ("broken.jsonl",)),
        (("--data_name", "pydoc", "--data_config", "french"), ("french", "short")),
        (("--data_split", "test"), ("test",)),
        (("--text_column", "body"), ("body", "id, text", "--text_column")),
        (("--rank", 0), ("--rank", "'0'")),
        (("--rank", -3), ("--rank",)),
        (("--rank_in", "many"), ("--rank_in", "many")),
        (("--lora", "none"), ("no rank",)),
        (("--layers", "nothing"), ("nothing", r"model.layers.\d+.")),
        (("--layers", "("), ("regular expression",)),
        (("--block_size", 65), ("64", "65")),
        (("--block_size", 0), ("--block_size",)),
        (("--max_tokens", 0), ("--max_tokens",)),
        (("--max_tokens", 2), ("--max_tokens",)),
        (("--hessian", "gauss"), ("gauss", "kfac")),
        (("--no_such_flag",), ("--no_such_flag",)),
        (("--hess", "raw"), ("--hess",)),
    ],
)
def test_extract_log_refuses(cli, base, flags, words):
    """Each in one line, and no run.json stays."""
    Path("notes.md").write_text("text")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    merged = dict(zip(base[::2], base[1::2], strict=True))
    extra = list(flags)
    if flags[0] == "--lora":
        pass
    elif len(flags) % 2 == 0:
        merged.update(zip(flags[::2], flags[1::2], strict=True))
        extra = []
    refused(cli("extract_log", *(item for pair in merged.items() for item in pair), *extra), *words)
    assert not Path("log/run.json").exists()


PLACES = {  # --model_name -> what the line says
    "empty": ("got none there", "give the path of a model"),
    "high": ("got none there", "give a folder in it: high/run/model"),
    "high/run/model/model.safetensors": ("got another file", "give its folder, high/run/model"),
    "high/run/model/config.json": ("got another file", "give its folder, high/run/model"),
    "./gone/model": ("no such file or folder",),
    "/gone/model": ("no such file or folder",),
    "gone.gguf": ("no such file or folder",),
    "adapter": ("the base model of the adapter adapter at /gone/base", "correct base_model_name_or_path in adapter/"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_path_without_a_model(cli, base, name):
    """Stages 1, 2 and 3 say which path to give, and do not take it for a Hub id."""
    pytest.importorskip("peft")
    shutil.copytree(base[1], "high/run/model")
    Path("empty").mkdir()
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base", "peft_type": "LORA"}')
    Path("p.txt").write_text("the river\n")
    refused(cli("generate", "--model_name", name, "--prompts", "p.txt"), name, *PLACES[name])
    refused(cli("extract_log", "--model_name", name, *base[2:]), name, *PLACES[name])
    assert cli("extract_log", "--model_name", "high/run/model", *base[2:])[0] == 0
    edit_json(Path("log/run.json"), lambda content: content["settings"].update(model_name=name))
    edit_json(Path("log/run.json"), lambda content: content.update(model_files=None))
    refused(cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl"), name, *PLACES[name])


def test_a_tokenizer_that_is_longer_than_the_embedding(cli, base):
    """The tokens without an embedding are named, in a prompt, a document and a query; others do no harm."""
    shutil.copytree(base[1], "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained("model")
    first = len(tokenizer) - 2
    write_jsonl(Path("l.jsonl"), [{"text": "the river"}, {"text": "the <two> and <one>"}])
    Path("p.txt").write_text("the <two>\n")
    flags = ("--model_name", "model", *base[2:])
    assert cli("extract_log", *flags)[0] == 0
    words = (f"got {first} (<one>), {first + 1} (<two>) in example 1",)
    refused(cli("compute_influence", "--log_dir", "log", "--split", "l.jsonl"), *words)
    for options in ((), ("--hessian", "ekfac")):
        refused(
            cli("extract_log", *flags, "--data_name", "l.jsonl", "--log_dir", "other", "--overwrite", *options), *words
        )
    refused(
        cli("generate", *flags[:2], "--prompts", "p.txt", "--max_new_tokens", 2), f"{first + 1} (<two>) in prompt 0"
    )


def test_bad_rows_are_named(cli, base):
    """Empty rows are counted and named; with --skip_bad_rows the same command goes on."""
    rows = [{"id": "a", "text": "the river"}, {"id": "b", "text": ""}, {"id": "c", "text": None}]
    write_jsonl(Path("docs.jsonl"), rows)
    refused(cli("extract_log", *base), "2 empty", "b (empty)", "c (NoneType)", "--skip_bad_rows")
    assert not Path("log").exists()
    status, out, _ = cli("extract_log", *base, "--skip_bad_rows")
    assert status == 0 and "dropped 2 rows" in out


def test_experts_with_code_of_their_own(cli, base):
    """JetMoE's do not use the common interface of transformers. The rest of the model is tracked if asked for."""
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "kv_channels": 6,
        "num_local_experts": 4,
    }
    config = JetMoeConfig(vocab_size=VOCAB, intermediate_size=16, max_position_embeddings=64, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained("moe")
    make_tokenizer().save_pretrained("moe")
    flags = ("--model_name", "moe", *base[2:])
    refused(cli("extract_log", *flags), "layers.0.mlp.input_linear (JetMoeParallelExperts)", "--layers")
    assert cli("extract_log", *flags, "--layers", "kv_proj")[0] == 0


def test_a_run_is_not_mixed_with_another(cli, base, tiny):
    """Another setting, model, or changed data under the same name is refused; so is a folder of other files."""
    assert cli("extract_log", *base)[0] == 0
    before = Path("log/run.json").read_bytes()
    for flag, value in (
        ("--rank", 5),
        ("--block_size", 8),
        ("--seed", 1),
        ("--store_dtype", "float16"),
        ("--lora", "pca"),
    ):
        name = "--rank_in" if flag == "--rank" else flag
        refused(cli("extract_log", *base[: 8 if flag == "--rank" else None][:6], flag, value), name, "run.json")
        refused(cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", flag, value), name, "run.json")
    refused(cli("extract_log", "--model_name", tiny / "gpt2", *base[2:]), "--model_name")
    assert Path("log/run.json").read_bytes() == before
    shutil.copytree("log", "copy")
    next(Path("copy/gradients").glob("*.json")).unlink()
    write_jsonl(Path("docs.jsonl"), [{"text": "other"}])
    refused(cli("extract_log", *base[:5], "copy"), "docs.jsonl", "other content", "--overwrite")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("important")
    refused(cli("extract_log", *base[:5], "mine"), "mine")
    refused(cli("extract_log", *base[:5], "mine", "--overwrite"), "mine")
    assert Path("mine/thesis.txt").exists()


def test_a_changed_model_is_refused(cli, base, tiny):
    """Other weights under the same name."""
    shutil.copytree(tiny / "llama", "model")
    flags = ("--model_name", "model", *base[2:])
    assert cli("extract_log", *flags)[0] == 0
    poison_model(tiny / "llama", Path("model"), "q")
    refused(
        cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl"), "model.safetensors has other content"
    )


def test_missing_stages_name_the_command(cli, base):
    """Each stage says which one to run first."""
    refused(cli("analysis"), "compute_influence.py")
    refused(cli("compute_influence", *base), "extract_log.py")
    assert cli("extract_log", *base)[0] == 0
    refused(cli("compute_influence", *base), "generate.py")
    refused(cli("analysis", "--log_dir", "log"), "compute_influence.py")
    edit_json(Path("log/run.json"), lambda content: content.pop("projections"))
    refused(cli("compute_influence", *base, "--split", "queries.jsonl"), "extract_log.py")
    Path("log/run.json").write_text("{")
    refused(cli("compute_influence", *base, "--split", "queries.jsonl"), "run.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("none",)),
        ("{}\n", ("row 1", "text")),
        ("not json\n", ("line 1",)),
        ('{"text": "a"}\n', ("query 0", "none")),
        ('{"id": "x", "prompt": "the river", "response": ""}\n', ("row 1", "empty")),
        ('{"text": "%s"}\n' % ("river " * 90), ("64 tokens",)),
        ('{"text": 5}\n', ("row 1",)),
        ('{"id": "1", "text": "the river"}\n{"id": "1", "text": "the mill"}\n', ("'1'", "twice")),
        ('{"prompt_ids": [1, 5], "response_ids": [6], "model": "other"}\n', ("other",)),
        ('{"prompt_ids": [1, 5], "response_ids": [999], "model": "%s"}\n', ("vocabulary", "999")),
    ],
)
def test_bad_queries(cli, base, content, words):
    """Empty, too long, of another model, or no query at all; no scores folder stays."""
    assert cli("extract_log", *base)[0] == 0
    Path("bad.jsonl").write_text(content % base[1] if "%s" in content else content)
    refused(cli("compute_influence", "--log_dir", "log", "--split", "bad.jsonl"), *words)
    assert not list(Path("log").glob("scores/*"))


def test_other_bad_flags(cli, base):
    """Damping, patterns and splits of stage 3; counts of stage 4; sampling of stage 1."""
    assert cli("extract_log", *base)[0] == 0
    query = ("--log_dir", "log", "--split", "queries.jsonl")
    for value in ("0", "-1", "nan", "inf", "x"):
        refused(cli("compute_influence", *query, "--damping", value), "--damping")
        refused(cli("compute_influence", *query, "--damping_absolute", value), "--damping_absolute")
    refused(cli("compute_influence", *query, "--score_layers", "nothing"), "nothing")
    refused(cli("compute_influence", *query[:2], "--split", "dev"), "dev", ".jsonl")
    refused(cli("compute_influence", *query[:2], "--split", "gone.jsonl"), "gone.jsonl")
    refused(cli("analysis", "--top_k", 0), "--top_k")
    model = ("--model_name", base[1])
    refused(cli("generate", *model, "--prompts", "gone.txt"), "gone.txt")
    Path("empty.txt").write_text("\n")
    refused(cli("generate", *model, "--prompts", "empty.txt"), "empty.txt")
    Path("p.jsonl").write_text('{"prompt": 3}\n')
    refused(cli("generate", *model, "--prompts", "p.jsonl"), "row 1")
    Path("p.txt").write_text("the river\n")
    refused(cli("generate", *model, "--prompts", "p.txt"), "64 tokens", "--max_new_tokens")
    refused(cli("generate", *model, "--prompts", "p.txt", "--top_p", 0), "--top_p")
    assert not Path("data").exists()


@pytest.mark.parametrize("kind", ["raw", "ekfac"])
def test_nan_names_the_example(cli, tiny, workspace, kind):
    """A NaN gradient stops the shard, which is not written; the calibration names its batch."""
    write_jsonl(Path("docs.jsonl"), [{"text": t} for t in ("the river", "the mill", "a zebra", "the dog")])
    poison_model(tiny / "llama", Path("broken"), "z")
    flags = ("--model_name", "broken", "--data_name", "docs.jsonl", "--log_dir", "log", "--shard_examples", 2)
    if kind == "ekfac":
        refused(cli("extract_log", *flags, "--hessian", kind), "2", "NaN")
        assert not Path("log/gradients").exists()
        return
    refused(cli("extract_log", *flags), "example 2", "NaN")
    assert [p.name for p in sorted(Path("log/gradients").glob("*.json"))] == ["00000.json"]


def test_float16_overflow_is_noticed(cli, base, monkeypatch):
    """A gradient that float16 can't hold is refused, not stored as infinity."""
    original = gradients.run_batch
    monkeypatch.setattr(gradients, "run_batch", lambda *a: {k: g * 1e6 for k, g in original(*a).items()})
    refused(cli("extract_log", *base, "--store_dtype", "float16"), "--store_dtype")


def test_a_raw_hessian_that_does_not_fit(cli, base, monkeypatch):
    """--lora none --hessian raw on wide layers: said before extraction, with what to use instead."""
    memory = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    refused(cli("extract_log", *base[:6], "--lora", "none", "--hessian", "raw"), "memory", "ekfac")
    assert not Path("log/gradients").exists()


def test_a_full_disk(cli, base, monkeypatch):
    """Too little room is said before extraction; a write that fails leaves no shard that looks whole."""
    usage = shutil.disk_usage(".")._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        refused(cli("extract_log", *base), "disk", "--rank")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert cli("extract_log", *base, "--shard_examples", 20, "--max_examples", 1, "--overwrite")[0] == 0
    shutil.rmtree("log/gradients")
    for flags in ((), ("--overwrite",)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (7000, limits[1]))
        try:
            refused(cli("extract_log", *base[:6], *flags), "File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(Path("log").rglob("0*.json")) and not list(Path("log").rglob("*.tmp"))


def test_every_flag_of_a_run_is_in_run_json(cli, base):
    """All settings and all arguments are recorded."""
    assert cli("extract_log", *base)[0] == 0
    content = json.loads(Path("log/run.json").read_text())
    assert set(content["settings"]) == set(RUN_FIELDS)
    assert {"num_proc", "batch_tokens", "batch_size", "hessian", "cache_dir", "overwrite"} <= set(content["arguments"])
    assert all(content["settings"][name] is not None for name in ("block_size", "dtype", "basis", "rank_in"))


def test_overwrite_keeps_the_old_run_until_the_new_one_can_begin(cli, base):
    """A typo in the data's name or column destroys nothing; leftovers of a killed start are no obstacle."""
    assert cli("extract_log", *base)[0] == 0
    before = Path("log/run.json").read_bytes()
    refused(cli("extract_log", *base[:2], "--data_name", "gone.jsonl", *base[4:], "--overwrite"), "gone.jsonl")
    refused(cli("extract_log", *base, "--overwrite", "--text_column", "body"), "--text_column")
    assert Path("log/run.json").read_bytes() == before
    Path("fresh").mkdir()
    Path("fresh/run.json.tmp").write_text("{")
    assert cli("extract_log", *base[:5], "fresh")[0] == 0
    Path("odd").mkdir()
    Path("odd/run.json").write_text('{"name": "of another program"}')
    refused(cli("extract_log", *base[:5], "odd", "--overwrite"), "odd")
    assert Path("odd/run.json").exists()


def test_other_spellings_of_a_path_are_the_same_model(cli, base):
    """models/X, ./models/X, models/X/ and the absolute path."""
    shutil.copytree(base[1], "models/x")
    assert cli("extract_log", "--model_name", "models/x", *base[2:])[0] == 0
    for name in ("./models/x", "models/x/", Path("models/x").absolute()):
        assert cli("compute_influence", "--log_dir", "log", "--model_name", name, "--split", "queries.jsonl")[0] == 0


def test_a_folder_is_not_replaced_by_a_file(cli, base):
    """--output of stage 1 names a file."""
    Path("results").mkdir()
    Path("results/thesis.txt").write_text("important")
    Path("p.txt").write_text("the river\n")
    flags = ("--model_name", base[1], "--prompts", "p.txt", "--max_new_tokens", 2)
    refused(cli("generate", *flags, "--output", "results"), "results")
    assert Path("results/thesis.txt").exists()


def test_line_separators_inside_texts(cli, base):
    """U+2028, which ends a line for str.splitlines, is text like any other from stage 2 to 4."""
    write_jsonl(Path("docs.jsonl"), [{"text": "the river\u2028the mill"}, {"text": "the dog"}])
    Path("q.jsonl").write_text('{"id": "a\u2028b", "text": "the river\u2028ran"}\n', encoding="utf-8")
    assert cli("extract_log", *base)[0] == 0
    assert cli("compute_influence", "--log_dir", "log", "--split", "q.jsonl")[0] == 0
    assert cli("analysis", "--log_dir", "log")[0] == 0
