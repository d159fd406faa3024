"""Before the long step: what a run will need (--dry_run, --trial)."""

import re
import time
from pathlib import Path

import pytest
from conftest import ROOT, VOCAB, make_model, make_texts, make_tokenizer, write_jsonl
from helpers import DATA, extract, refused
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, XLMConfig

from logra.models.layers import choose_layers
from logra.runtime import settings
from logra.runtime.flags import read_run_flags
from logra.stages import calibrate
from logra.stages import extract as stages_extract
from logra.stages.open_run import find_folder
from logra.tools import estimate, trial


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
    assert f"{log.examples:,} examples; the data have 20 documents" in out
    tokens = sum(map(len, log.train()["input_ids"]))
    assert f"{tokens:,} tokens in" in out
    shard = log.shard(0)
    size = shard.path("gradients").stat().st_size // len(shard.ids)
    shown = int(re.search(r"float32 +([\d,]+) bytes an example", out)[1].replace(",", ""))
    assert shown == sum(4 * o * i for o, i in log.projected.values()) <= size
    for name in ("int1", "none", "bfloat16", "Hessian raw", "Hessian kfac", "weights"):
        assert name in out
    assert "[24, 24]" in out and "[5, 5]" in out and f"{25:12,d}" in out


LIMITS = [("--max_examples", 7), ("--max_examples", 150), ("--max_tokens", 400), ("--max_tokens", 3000), ()]


@pytest.mark.parametrize("order", [(), ("--shuffle_seed", 3)])
@pytest.mark.parametrize("limits", LIMITS)
def test_the_estimate_is_of_the_documents_that_the_run_takes(cli, tiny, workspace, monkeypatch, limits, order):
    """Of long documents behind short ones: tokens, examples and disk are the run's; from a sample to a quarter."""
    texts = [" ".join(["river"] * (3 if i < 120 else 40)) for i in range(160)]
    write_jsonl(Path("docs.jsonl"), [{"text": text} for text in texts])
    flags = ("--block_size", 16, "--rank", 5, *limits, *order)
    log = extract(cli, tiny / "gpt2", *flags)
    tokens = sum(map(len, log.train()["input_ids"]))
    sizes = {"gradients": log.examples * log.parts[0].bytes_per_example, "train": log.train().data.nbytes}
    for sample, error in ((1000, 0.001), (40, 0.25)):
        monkeypatch.setattr(estimate, "SAMPLE", sample)
        out = cli("extract_log", "--model_name", tiny / "gpt2", *DATA, *flags, "--dry_run")[1]
        found = [int(n.replace(",", "")) for n in re.search(r"([\d,]+) tokens in ([\d,]+) examples", out).groups()]
        assert found == pytest.approx([tokens, log.examples], rel=error), sample
        disk = {name: float(size) * 1e6 for name, size in re.findall(r"(gradients|train) ([\d.e-]+) MB", out)}
        assert disk == pytest.approx(sizes, rel=0.02 + error), sample


def test_the_disk_of_checkpoints_is_that_of_their_runs(cli, workspace, monkeypatch):
    """The files in train/ count once: with them twice, the error would be larger. A warning is about all runs."""
    write_jsonl(Path("docs.jsonl"), [{"text": text} for text in make_texts(600)])
    for seed in range(3):
        make_model("llama", seed=seed).save_pretrained(f"step-{seed}")
        make_tokenizer().save_pretrained(f"step-{seed}")
    flags = ("extract_log", "--checkpoints", *(f"step-{i}" for i in range(3)), *DATA, "--layers", "1.mlp.down_proj")
    flags += ("--rank", 6, "--shard_examples", 600)
    out = cli(*flags, "--dry_run")[1]
    number, unit = re.search(r"disk of the runs of 3 checkpoints: ([\d.]+) ([MG]B)", out).groups()
    train = float(re.search(r"train ([\d.]+) MB", out)[1]) * 1e6
    total, one = float(number) * 1e6, needed(out)
    assert unit == "MB" and total == pytest.approx(3 * one - 2 * train, rel=0.01)
    assert "one of the 3 models is in memory at a time" in out and "WARNING" not in out
    assert cli(*flags)[0] == 0
    files = {path.stat().st_ino: path.stat().st_size for path in Path("log").rglob("*") if path.is_file()}
    assert abs(total - sum(files.values())) < min(0.1 * total, train / 2)
    assert not [path for path in Path("log").rglob("*") if path.suffix == ".tmp"]
    for free, warned in ((one + train, True), (total + train, False)):
        monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _, free=free: type("", (), {"free": free}))
        assert ("WARNING" in cli(*flags, "--dry_run")[1]) == warned


def test_warnings_come_before_anything_runs(cli, tiny, workspace, monkeypatch):
    """Too little disk and too little memory are said."""
    flags = ("--model_name", tiny / "gpt2", *DATA, "--dry_run")
    assert "WARNING" not in cli("extract_log", *flags)[1]
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    out = cli("extract_log", *flags)[1]
    assert out.count("WARNING") == 2 and "of disk are free" in out and "of memory are free" in out


def predicted_parts(out: str) -> dict[str, float]:
    """Return the predicted seconds of each part that --trial printed, and their sum as `all`."""
    (line,) = re.findall(r"^predicted seconds(?: of one checkpoint)?: (.*)$", out, re.MULTILINE)
    parts = {name: float(value.replace(",", "")) for name, value in (part.rsplit(" ", 1) for part in line.split(", "))}
    return parts | {"all": 3600 * float(re.search(r"1 process +([\d.e-]+) hours", out)[1])}


def test_a_trial_predicts_all_parts(cli, tiny, workspace, monkeypatch):
    """The calibration's eigenvectors and the Hessian are measured too; nothing is left on the disk."""
    rotate, write_hessian, before = calibrate.rotate, stages_extract.write_hessian, sorted(Path(".").rglob("*"))
    monkeypatch.setattr(calibrate, "rotate", lambda *args: time.sleep(0.5) or rotate(*args))
    monkeypatch.setattr(stages_extract, "write_hessian", lambda *args: time.sleep(0.3) or write_hessian(*args))
    flags = ("--model_name", tiny / "gpt2", *DATA, "--lora", "none", "--hessian", "ekfac", "--trial", 1)
    status, out, err = cli("extract_log", *flags)
    assert status == 0, err
    parts = predicted_parts(out)
    assert list(parts) == ["tokenising", "loading", "calibration", "gradients", "Hessian", "all"]
    assert 0.5 < parts["calibration"] < 1.5 and 0.3 < parts["Hessian"] < 1.3 and parts["gradients"] > 0
    assert parts["all"] == pytest.approx(sum(parts.values()) - parts["all"], abs=0.05)
    assert sorted(Path(".").rglob("*")) == before


def test_a_trial_of_checkpoints_predicts_the_hours_of_all(cli, tiny, workspace, monkeypatch):
    """The examples are tokenised once; all else takes its time at each checkpoint."""
    seconds = {"loading": 20.0, "calibration": 30.0, "gradients": 400.0, "Hessian": 50.0}
    monkeypatch.setattr(trial, "trial", lambda *_: seconds)
    flags = ("--checkpoints", tiny / "llama", tiny / "llama_tied", *DATA, "--trial")
    status, out, err = cli("extract_log", *flags)
    assert status == 0, err
    parts = predicted_parts(out)
    assert parts["all"] == pytest.approx(parts["tokenising"] + 2 * 500, rel=0.01)
    assert "for all 2 checkpoints, one after another; their examples are tokenised once" in out


@pytest.mark.parametrize("kind", ["raw", "ekfac"])
def test_a_prediction_is_on_the_line_of_the_copies(cli, tiny, workspace, kind):
    """A constant stays as it is, and the rest grows with the work: raw's with the examples' square while N < k."""
    run = extract(cli, tiny / "gpt2", "--rank", 20, "--hessian", "raw")
    sizes = [trial.work_of(estimate.with_examples(run, n), kind, 10.0 * n) for n in (4, 32, 1000)]
    ratio = sizes[1]["Hessian"] / sizes[0]["Hessian"]
    assert ratio == (64 if kind == "raw" else 8) and sizes[2]["gradients"] == 10_000
    copies = [trial.Measured(work, {stage: 2 + 3 * work[stage] for stage in work}) for work in sizes[:2]]
    for stage in sizes[2]:
        assert trial.predict(copies, stage, sizes[2][stage]) == pytest.approx(2 + 3 * sizes[2][stage])
        assert trial.predict(copies[1:], stage, sizes[1][stage]) == pytest.approx(copies[1].seconds[stage])


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--lora", "none", "--hessian", "ekfac"), ("--rank", 24, "--hessian", "raw"), ("--preset", "best")]
)
def test_a_trial_is_near_the_time_of_the_run(cli, workspace, flags):
    """Alone on a machine it is mostly within a quarter; other work changes both, so the bounds are wide."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=192, n_layer=3, n_head=4, n_positions=256))
    model.save_pretrained("m")
    make_tokenizer().save_pretrained("m")
    write_jsonl(Path("docs.jsonl"), [{"text": " ".join(make_texts(6, seed=i))} for i in range(250)])
    flags = ("--model_name", "m", *DATA, "--mlp_only", "--block_size", 128, *flags)
    ratios = []
    while len(ratios) < 3 and not any(0.6 < ratio < 1.6 for ratio in ratios):
        predicted = predicted_parts(cli("extract_log", *flags, "--trial", 5)[1])["all"]
        begin = time.perf_counter()
        assert cli("extract_log", *flags, "--overwrite")[0] == 0
        ratios.append(predicted / (time.perf_counter() - begin))
    assert any(0.6 < ratio < 1.6 for ratio in ratios), ratios


def test_a_model_whose_code_reads_values(cli, workspace):
    """XLM's forward pass compares lengths, which do not exist without weights: one line, and nothing is written."""
    XLMConfig(vocab_size=VOCAB, emb_dim=24, n_layers=1, n_heads=2, causal=True, n_langs=1).save_pretrained("xlm")
    make_tokenizer().save_pretrained("xlm")
    refused(cli("extract_log", "--model_name", "xlm", *DATA, "--dry_run"), "runs without its weights, got type xlm")
    assert not Path("log").exists()


def test_the_graph_is_what_a_real_batch_keeps():
    """What is added up without weights is, to 15%, what a real batch keeps (there is a mask more)."""
    real = make_model("llama")
    shapes = choose_layers(real, False, None)
    expected = estimate.graph_bytes(real, shapes, shapes, 64, 16)
    with FakeTensorMode():
        fake = type(real)(real.config)
        assert estimate.graph_bytes(fake, shapes, shapes, 64, 16) == pytest.approx(expected, rel=0.15)
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
