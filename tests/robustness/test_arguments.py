"""Arguments: whatever a flag is given, a script ends with results and status 0, or with one line and status 2.

The flags come from the parsers themselves, so a new one is tried too. Values are drawn by hypothesis, the same ones at
each run.
"""

import importlib
import resource
import signal
import string
from pathlib import Path

import pytest
from conftest import run_cli, write_jsonl
from helpers import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCRIPTS = ("generate", "generate_llama3", "extract_log", "compute_influence", "analysis")

ENDS_WITH = dict.fromkeys(("generate", "generate_llama3"), "Next: extract_log.py")

ENDS_WITH |= {"extract_log": "Next: compute_influence.py", "compute_influence": "Next: analysis.py", "analysis": "log/"}

NO_RESULTS = {"--dry_run", "--trial", "--verify", "--quiet"}  # flags that change what is printed

HUGE = ["1" + "0" * power for power in (9, 12, 18, 30, 5000)]

WORDS = [
    "",
    " ",
    "\n",
    "x",
    "-",
    "-1",
    "--",
    "0",
    "1",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "1e-300",
    "1e300",
    "1e5",
    "1_0",
    "%s",
]

WORDS += ["(", "\u0663", "\u00fcn\u00ef \U0001f389", "a" * 5000, "../x", ".", "\udcff", "\x1b[31m", "int1", *HUGE]

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), max_size=9)

VALUES = st.sampled_from(WORDS) | TEXTS | st.integers().map(str) | st.floats().map(str)


def actions(script: str) -> dict:
    """Return flag -> argparse's action, of all flags but --help."""
    parser = importlib.import_module(script).build_parser()
    return {a.option_strings[-1]: a for a in parser._actions if a.dest != "help"}


def usual(script: str, model: Path) -> dict:
    """Return the flags of a small run that goes well."""
    if script == "analysis":
        return {"--log_dir": "log"}
    if script == "compute_influence":
        return {"--log_dir": "log", "--split": "queries.jsonl"}
    if script == "extract_log":
        return {
            "--model_name": model,
            "--data_name": "docs.jsonl",
            "--log_dir": "new",
            "--max_examples": 4,
            "--rank": 2,
        }
    return {
        "--model_name": model,
        "--prompts": "p.txt",
        "--max_new_tokens": 2,
        "--output": "o.jsonl",
        "--batch_size": 1,
    }


@st.composite
def given_flags(draw, script: str, most: int) -> dict:
    """Draw one to `most` flags with values that may be anything."""
    known, found = actions(script), {}
    for flag in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=most, unique=True)):
        action = known[flag]
        choices = st.sampled_from([str(choice) for choice in action.choices]) if action.choices else st.nothing()
        few = st.sampled_from(["1", "x", "-1", "1e9"]) if flag == "--trial" else VALUES  # it takes as long as it says
        found[flag] = None if action.nargs == 0 else draw(choices | few)
    return found


def check(cli, script: str, model: Path, flags: dict) -> None:
    """Run the script; a traceback, a hang, or a run out of memory fails."""
    merged = usual(script, model) | flags
    argv = [item for pair in merged.items() for item in pair if item is not None]
    argv += ["--overwrite"] if script == "extract_log" and "--extend" not in flags else []
    signal.alarm(120)
    try:
        result = cli(script, *argv)
    finally:
        signal.alarm(0)
    if result[0] == 0:
        assert ENDS_WITH[script] in result[1] or NO_RESULTS & set(flags) or script == "analysis", flags
    else:
        refused(result)


@pytest.fixture
def small(tiny, workspace):
    """A finished run in log/; address space for what a small run needs, and a limit of time."""
    write_jsonl(Path("queries.jsonl"), [{"text": "the river ran"}])
    Path("p.txt").write_text("the river\n")
    for script, *flags in (
        ("extract_log", "--model_name", tiny / "llama", "--data_name", "docs.jsonl", "--rank", 2, "--max_examples", 4),
        ("compute_influence", "--split", "queries.jsonl", "--mode", "cosine"),
    ):
        assert run_cli(script, "--log_dir", "log", *flags) == 0

    def stop(*_):
        raise AssertionError("it hangs")

    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30, limits[1]))
    yield tiny / "llama"
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)


def drawn(examples: int) -> settings:
    """Return hypothesis's settings: the same draws at each run, no limit of its own to a draw's time."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_hostile_arguments(cli, small, script):
    """One or two flags with any value: a few dozen draws."""

    @drawn(40)
    @given(given_flags(script, 2))
    def attempt(flags):
        check(cli, script, small, flags)

    attempt()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_more_hostile_arguments(cli, small, script):
    """Each flag with a third of the hostile words, then up to five flags at a time."""
    for number, (flag, action) in enumerate(actions(script).items()):
        words = [None] if action.nargs == 0 else [*(action.choices or ()), *WORDS[number % 3 :: 3]]
        for word in ["1", "x", "-1", "1e9"] if flag == "--trial" else words:
            check(cli, script, small, {flag: word})

    @drawn(120)
    @given(given_flags(script, 5))
    def attempt(flags):
        check(cli, script, small, flags)

    attempt()


CONTRADICTIONS = {
    "extract_log": [
        ("--extend",), ("--extend", "--log_dir", "log", "--overwrite", "--data_name", "docs.jsonl"),
        ("--fsdp",), ("--fsdp", "--device_map", "auto"), ("--verify", 2, "--quantize", "4bit"),
        ("--lora", "none", "--rank", 4), ("--lora", "none", "--rank_in", 4),
        ("--lora", "none", "--bytes_per_example", 10**6), ("--bytes_per_example", 10**6, "--rank", 4),
        ("--bytes_per_example", 1), ("--store_dtype", "int8", "--basis", "projected"),
        ("--store_dtype", "int1", "--hessian", "raw"), ("--train_loss", "response"), ("--block_size", 10**12),
        ("--store_dtype", "none", "--hessian", "ekfac", "--basis", "projected"), ("--mlp_only", "--layers", "attn"),
    ],
    "compute_influence": [
        ("--damping", 1, "--damping_absolute", 1), ("--layerwise", "--top_k_only", 3), ("--query_rank", 2),
        ("--hessian", "ekfac"), ("--rank", 4), ("--preset", "best"), ("--lora", "pca"), ("--score_layers", "nothing"),
    ],
    "generate": [("--temperature", 0, "--num_return_sequences", 2), ("--max_new_tokens", 10**9), ("--top_p", 2)],
}  # fmt: skip


@pytest.mark.parametrize("script", CONTRADICTIONS)
def test_contradictions(cli, small, script):
    """Flags that exclude each other, or the run: none of the two wins in silence."""
    for flags in CONTRADICTIONS[script]:
        base = usual(script, small)
        base = {key: value for key, value in base.items() if key not in flags and key != "--rank"}
        refused(cli(script, *(item for pair in base.items() for item in pair), *flags), "expected ")


def test_dampings_that_are_close_are_two(cli, small):
    """A folder and a self-influence of its own for each, however little they differ; a repeated one is one."""
    flags = (
        "--log_dir",
        "log",
        "--split",
        "queries.jsonl",
        "--mode",
        "cosine",
        "--damping",
        "0.1",
        "0.10000001",
        "0.1",
    )
    assert cli("compute_influence", *flags)[0] == 0
    assert {path.name.rpartition("-")[2] for path in Path("log/scores").glob("*/")} == {"0.1", "0.10000001"}


def test_every_flag_has_one_spelling():
    """So that the tests above try them all: no positional argument, no short or second name."""
    for script in SCRIPTS:
        assert all(action.option_strings == [flag] for flag, action in actions(script).items()), script
        assert set("".join(actions(script))) <= {*string.ascii_letters, "_", "-"}
