"""What the scripts tell their user: rank 0 alone, nothing with --quiet, everything in log.txt."""

import re
from pathlib import Path

from conftest import run_cli
from helpers import DATA, QUERIES, extract

from logra.runtime.progress import duration


def test_a_stage_ends_with_a_summary_and_a_log(cli, tiny, workspace):
    """Tokens, time, memory and what comes next are printed, and stand in the run's log.txt with all other lines."""
    status, out, _ = cli("extract_log", "--model_name", tiny / "gpt2", *DATA, "--rank", 4)
    assert status == 0
    assert re.search(
        r"^\d+ tokens in \d+ s \([\d,]+/s\), at most [\d.]+ GB of memory; see log/log.txt$", out, re.MULTILINE
    )
    assert "Next: compute_influence.py" in out
    assert cli("compute_influence", *QUERIES)[0] == 0 and cli("analysis", "--log_dir", "log")[0] == 0
    log = Path("log/log.txt").read_text()
    assert all(line in log for line in out.splitlines()) and log.count("Next: analysis.py") == 1
    assert len(re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .*\.py", log, re.MULTILINE)) == 3


def test_quiet_prints_nothing_but_errors(cli, tiny, workspace, capsys):
    """--quiet: no line and no bar; log.txt has the lines all the same; an error is still one line."""
    extract(cli, tiny / "gpt2", "--rank", 4, "--quiet")
    for script, flags in (("extract_log", ()), ("compute_influence", QUERIES[2:]), ("analysis", ("--top_k", 2))):
        capsys.readouterr()
        assert run_cli(script, "--log_dir", "log", *flags, "--quiet") == 0
        assert tuple(capsys.readouterr()) == ("", "")
    assert Path("log/log.txt").read_text().count("Next:") == 3
    status, out, err = cli("compute_influence", "--log_dir", "elsewhere", "--quiet")
    assert status == 2 and len(err.splitlines()) == 1 and out == ""


def test_durations():
    """Seconds as a person says them."""
    assert [duration(s) for s in (0.4, 59.4, 60, 200, 3600, 7500)] == [
        "0 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 5 min",
    ]  # fmt: skip
