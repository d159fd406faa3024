"""Presets, and what is no argument."""

import json
import re
from pathlib import Path

import pytest
from helpers import DATA, SCRIPTS, refused


def test_presets_are_printed_and_give_way_to_flags(cli, tiny, workspace):
    """--preset best is its flags, word for word; a flag that is given goes before the preset's."""
    base = ("--model_name", tiny / "gpt2", *DATA)
    status, out, err = cli("extract_log", *base, "--preset", "best", "--rank", 8)
    assert status == 0, err
    flags = re.search(r"--preset best: (.*)", out)[1].split()
    status, _, err = cli("extract_log", "--model_name", tiny / "gpt2", *DATA[:2], "--log_dir", "other", *flags)
    assert status == 0, err
    one, two = (json.loads(Path(name, "run.json").read_text())["settings"] for name in ("log", "other"))
    assert one == two and one["store_dtype"] == "int1" and one["rank_in"] == 8
    status, _, err = cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", "--preset", "best")
    assert status == 2 and "--rank_in 8" in err
    status, _, err = cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl")
    assert status == 0, err
    assert next(Path("log/scores").glob("*")).name.endswith("dot-ekfac-0.2")


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_no_argument(cli, workspace, script):
    """Missing values, unknown and abbreviated flags, and loose words are refused in one line."""
    for argv in (["--seed"], ["x"], ["--no_such"], ["--see", "1"], ["-x"], ["--quiet=1"], ["\n"], ["--\udcff"], [""]):
        refused(cli(script, *argv), script)
