"""Before the long step: what a run will need (--dry_run, --trial)."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, make_model
from helpers import DATA, extract
from torch._subclasses.fake_tensor import FakeTensorMode

from logra.inputs.model import choose_layers
from logra.runtime import settings
from logra.runtime.flags import read_run_flags
from logra.stages.open_run import find_folder
from logra.tools import estimate


def needed(out: str) -> float:
    """Return the bytes of the whole run that --dry_run printed."""
    number, unit = re.search(r"^ +([\d.]+) ([MG]B) in all", out, re.MULTILINE).groups()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


def test_a_dry_run_prints_the_run_and_leaves_nothing(cli, tiny, workspace):
    """Layers, k, examples, tokens and bytes are those of the run that follows; nothing is written."""
    flags = ("--model_name", tiny / "llama", *DATA, "--rank", 5, "--block_size", 16, "--hessian", "ekfac")
    before = sorted(Path(".").rglob("*"))
    status, out, err = cli("extract_log", *flags, "--dry_run")
    assert status == 0, err
    assert sorted(Path(".").rglob("*")) == before
    log = extract(cli, tiny / "llama", *flags[4:])
    assert f"{log.examples:,} examples of 20 documents" in out
    tokens = sum(map(len, log.train()["input_ids"]))
    assert f"{tokens:,} tokens in" in out
    shard = log.shard(0)
    size = shard.path("gradients").stat().st_size // len(shard.ids)
    shown = int(re.search(r"float32 +([\d,]+) bytes an example", out)[1].replace(",", ""))
    assert shown == sum(4 * o * i for o, i in log.projected.values()) <= size
    for name in ("int1", "none", "bfloat16", "Hessian raw", "Hessian kfac", "weights"):
        assert name in out
    assert "[24, 24]" in out and "[5, 5]" in out and f"{25:12,d}" in out


def test_limits_and_sampling_are_in_the_estimate(cli, tiny, workspace, monkeypatch):
    """max_examples and max_tokens cap the estimate; of many documents a sample stands for all."""
    flags = ("--model_name", tiny / "gpt2", *DATA, "--block_size", 16, "--dry_run")
    assert "7 examples" in cli("extract_log", *flags, "--max_examples", 7)[1]
    tokens = re.search(r"([\d,]+) tokens in", cli("extract_log", *flags, "--max_tokens", 50)[1])[1]
    assert int(tokens) == 50
    whole = int(re.search(r"tokens in ([\d,]+) examples", cli("extract_log", *flags)[1])[1])
    monkeypatch.setattr(estimate, "SAMPLE", 10)
    part = int(re.search(r"tokens in ([\d,]+) examples", cli("extract_log", *flags)[1])[1])
    assert abs(part - whole) < 0.3 * whole


def test_warnings_come_before_anything_runs(cli, tiny, workspace, monkeypatch):
    """Too little disk and too little memory are said."""
    flags = ("--model_name", tiny / "gpt2", *DATA, "--dry_run")
    assert "WARNING" not in cli("extract_log", *flags)[1]
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    out = cli("extract_log", *flags)[1]
    assert out.count("WARNING") == 2 and "of disk are free" in out and "of memory are free" in out


def test_a_trial_extrapolates_to_the_whole_run(cli, tiny, workspace):
    """The hours are tokens (the calibration sample's again) through the measured speed."""
    flags = ("--model_name", tiny / "gpt2", *DATA, "--hessian", "ekfac", "--trial", 1)
    status, out, err = cli("extract_log", *flags)
    assert status == 0, err
    rate = float(re.search(r"trial: ([\d,]+) tokens/s", out)[1].replace(",", ""))
    tokens = int(re.search(r"([\d,]+) tokens in", out)[1].replace(",", ""))
    hours = float(re.search(r"1 process +([\d.e-]+) hours", out)[1])
    assert hours * 3600 > 2 * tokens / rate * 0.95 and hours < 0.05 and not Path("logs").exists()


def test_the_graph_is_what_a_real_batch_keeps():
    """What is added up without weights is, to 15%, what a real batch keeps (there is a mask more)."""
    real = make_model("llama")
    expected = estimate.graph_bytes(real, choose_layers(real, False, None), 64, 16)
    with FakeTensorMode():
        fake = type(real)(real.config)
        assert estimate.graph_bytes(fake, choose_layers(fake, False, None), 64, 16) == pytest.approx(expected, rel=0.15)
    assert expected > 64 * 24 * 4


@pytest.mark.slow
@pytest.mark.parametrize("store", ["float32", "int1"])
def test_the_disk_is_within_a_tenth_on_smollm2(cli, tmp_path, monkeypatch, store):
    """--dry_run's bytes of the whole folder, on SmolLM2-135M and pydoc."""
    monkeypatch.chdir(ROOT)
    flags = ("--mlp_only", "--hessian", "ekfac", "--data_config", "short", "--block_size", 64, "--store_dtype", store)
    flags += ("--max_examples", 24, "--log_dir", tmp_path / "log", "--calibration_examples", 8)
    status, out, err = cli("extract_log", *flags, "--dry_run")
    assert status == 0, err
    assert cli("extract_log", *flags)[0] == 0
    found = sum(path.stat().st_size for path in (tmp_path / "log").rglob("*") if path.is_file())
    assert abs(needed(out) - found) < 0.1 * found


def test_the_folder_of_a_dry_run_is_the_runs(tiny, workspace):
    """--dry_run looks at the disk where the run would be."""
    import extract_log

    args = extract_log.build_parser().parse_args(["--dry_run", "--log_dir", "elsewhere"])
    assert find_folder(read_run_flags(args), must_exist=False) == Path("elsewhere") and settings.positive("30") == 30
