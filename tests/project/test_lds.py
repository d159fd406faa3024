"""The linear datamodelling score: its arithmetic, its testbeds, and the reduced table."""

import argparse
import json
import os
import subprocess
from pathlib import Path

import lds
import numpy as np
import pytest
from conftest import ROOT, run_cli, write_jsonl

SMALL = ("--num_texts", 24, "--num_queries", 4, "--num_subsets", 3, "--num_layers", 1, "--width", 16, "--epochs", 1)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation by its definition: Pearson's of mean ranks."""

    def ranks(values):
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    return np.corrcoef(ranks(a), ranks(b))[0, 1]


def test_lds_is_spearmans_correlation_with_the_sums():
    """Each query's value is Spearman's correlation, ties included, of the subsets' sums with minus the losses."""
    random = np.random.default_rng(0)
    scores, subsets = random.integers(-2, 3, (5, 12)), random.random((9, 12)) < 0.5
    losses = random.integers(0, 4, (9, 5)).astype(float)
    got = lds.lds(scores, subsets, losses)
    expected = [spearman(subsets @ scores[q], -losses[:, q]) for q in range(5)]
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_scores_that_explain_the_losses_have_an_lds_of_one():
    """Losses that are minus the sums of the scores: 1; plus: -1; random scores: near 0, and the interval holds it."""
    random = np.random.default_rng(1)
    scores, subsets = random.normal(size=(40, 60)), random.random((50, 60)) < 0.5
    losses = -(subsets @ scores.T)
    assert lds.lds(scores, subsets, losses) == pytest.approx(np.ones(40))
    assert lds.lds(scores, subsets, -losses) == pytest.approx(-np.ones(40))
    unrelated = random.normal(size=(40, 60))
    values, samples = lds.lds(unrelated, subsets, losses).tolist(), lds.bootstrap_means(unrelated, subsets, losses)
    about = lds.describe(values, samples, [1.0] * 40, np.ones(len(samples)))
    assert about["low"] < 0 < about["high"] and abs(about["mean"]) < 0.15
    assert about["ratio"] == pytest.approx(about["mean"]) and about["ratio_low"] == pytest.approx(about["low"])


def test_a_bootstrap_sample_is_the_lds_of_its_subsets_and_queries(monkeypatch):
    """A sample's value is the mean LDS of the subsets and queries that it holds, repeated as often; ties included."""
    monkeypatch.setattr(lds.scored, "BOOTSTRAP_SAMPLES", 30)
    random = np.random.default_rng(2)
    scores, subsets = random.integers(-2, 3, (5, 12)), random.random((9, 12)) < 0.5
    losses = random.integers(0, 4, (9, 5)).astype(float)
    of_subsets, of_queries = (lds.scored.bootstrap_counts(size, seed).astype(int) for seed, size in ((0, 9), (1, 5)))
    rows, columns = (np.arange(size) for size in (9, 5))
    expected = []
    for subset_counts, query_counts in zip(of_subsets, of_queries, strict=True):
        m, q = np.repeat(rows, subset_counts), np.repeat(columns, query_counts)
        expected.append(lds.lds(scores[q], subsets[m], losses[m][:, q]).mean())
    np.testing.assert_allclose(lds.bootstrap_means(scores, subsets, losses), expected, atol=1e-12)


def synthetic(random: np.random.Generator, subsets: int, queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, subsets and losses: what the scores predict, and noise.

    As with trained models, some texts help all queries, and some noise of a model is the same for all of them. So
    another draw of subsets moves the LDS of all queries together.
    """
    scores, halves = np.linspace(-1, 1, 40) + random.normal(size=(queries, 40)), random.random((subsets, 40)) < 0.5
    noise = 3 * random.normal(size=(subsets, 1)) + random.normal(size=(subsets, queries))
    return scores, halves, noise - halves @ scores.T


def test_intervals_cover_the_truth(monkeypatch):
    """95% intervals hold the LDS of many subsets and queries about that often; over queries alone, too seldom."""
    monkeypatch.setattr(lds.scored, "BOOTSTRAP_SAMPLES", 300)
    random = np.random.default_rng(3)
    truth = lds.lds(*synthetic(random, 4000, 400)).mean()
    covered, covered_by_queries, repeats = 0, 0, 200
    for _ in range(repeats):
        sample = synthetic(random, 30, 20)
        values = lds.lds(*sample)
        about = lds.describe(values.tolist(), lds.bootstrap_means(*sample), [1.0], np.ones(1))
        low, high = np.percentile(values[lds.scored.bootstrap_samples(20)].mean(axis=1), (2.5, 97.5))
        covered += about["low"] < truth < about["high"]
        covered_by_queries += low < truth < high
    assert 0.9 <= covered / repeats <= 0.99 and covered_by_queries / repeats < 0.8


def test_queries_are_held_out(tmp_path):
    """No query is a train text or shares half of its 5-grams with one; texts that shortening makes equal stay once."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice([*"abcdefghij"], 6)) for _ in range(2000)]
    texts = [random.choice(words, 20).tolist() for _ in range(30)]
    texts += [text[:12] + random.choice(words, 8).tolist() for text in texts[:10]]  # half of the 5-grams are another's
    long = [random.choice(words, 30).tolist() for _ in range(10)]
    texts += [[*text, end] for text in long for end in ("one", "two")]  # shortening makes two of them equal
    write_jsonl(tmp_path / "texts.jsonl", [{"text": " ".join(text)} for text in texts])
    settings = {
        "texts": [str(tmp_path / "texts.jsonl")],
        "num_texts": 40,
        "num_queries": 5,
        "seed": 0,
        "vocabulary": 300,
    }
    train, queries = lds.make_texts(tmp_path / "bed", settings)
    assert len(queries) == 5 and 30 <= len(train) < 40 and len({*train, *queries}) == len(train) + 5
    for query in queries:
        grams = lds.testbed.five_grams(query)
        assert not [text for text in train if 2 * len(grams & lds.testbed.five_grams(text)) >= len(grams)], query
    with pytest.raises(ValueError, match="share less than half of their 5-grams"):
        lds.make_texts(tmp_path / "other", settings | {"num_texts": 1000, "num_queries": 20})


def test_texts_of_a_testbed():
    """The manual's passages, then those of the standard library's docstrings: at most 32 words, each once."""
    manual, both = lds.testbed.passages("pydoc"), lds.testbed.passages("pydoc", "docstrings")
    assert both[: len(manual)] == manual and len(both) == len({*both}) > len(manual) + 5000
    assert max(len(text.split()) for text in both) == 32
    start = " ".join((argparse.ArgumentParser.__doc__ or "").split()[:8])
    assert any(text.startswith(start) for text in both[len(manual) :])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "olmoe"])
def test_a_testbed_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys, architecture):
    """Only the losses that are missing are computed again, and they are the same; other settings are refused."""
    monkeypatch.chdir(tmp_path)
    flags = ("bed", "--architecture", architecture, *SMALL)
    assert run_cli("lds", *flags) == 0
    files = sorted(Path("bed/losses").glob("*.npy"))
    before, times = [np.load(file) for file in files], [file.stat().st_mtime_ns for file in files]
    assert len(files) == 3 and np.load("bed/subsets.npy").sum(axis=1).tolist() == [12, 12, 12]
    halves = lds.load_losses(Path("bed/losses_half"))
    assert len(halves) == 3 and (halves == halves[0]).all(), "half of one step, rounded down: all are untrained"
    assert (halves[0] != before[0]).all()
    assert len(list(Path("bed/losses_again").iterdir())) == 1, "a third of the subsets"
    files[1].unlink()
    assert run_cli("lds", *flags) == 0
    np.testing.assert_allclose(np.load(files[1]), before[1], rtol=1e-3)
    assert [file.stat().st_mtime_ns for file in (files[0], files[2])] == [times[0], times[2]]
    capsys.readouterr()
    assert run_cli("lds", "bed", "--epochs", 7) == 2
    assert "expected --epochs 1" in capsys.readouterr().err
    assert (
        run_cli("extract_log", "--model_name", "bed/checkpoints/0.5", "--data_name", "bed/train.jsonl", "--mlp_only")
        == 0
    )
    model = ("--model_name", "bed/model", "--data_name", "bed/train.jsonl", "--log_dir", "bed/runs/ekfac")
    assert run_cli("extract_log", *model, "--rank", 4, "--hessian", "ekfac", "--mlp_only") == 0
    assert run_cli("compute_influence", "--log_dir", "bed/runs/ekfac", "--split", "bed/queries.jsonl") == 0
    assert run_cli("baselines", "bed/runs/ekfac", "--split", "bed/queries.jsonl", "--output", "bed/runs/baselines") == 0
    found = [*Path("bed/runs/ekfac/scores").glob("queries-*"), *Path("bed/runs/baselines").iterdir()]
    assert run_cli("lds", "bed", *found, "--json", "results/bed.json") == 0
    rows = json.loads(Path("results/bed.json").read_text())["rows"]
    assert len(rows) == 4 and all(len(row["lds"]) == 4 and abs(row["mean"]) <= 1 for row in rows)
    assert rows[0]["bytes"] > 16 * 2 * 4 and rows[0]["ratio"] == 1
    sizes = {Path(row["scores"]).name: row["bytes"] for row in rows[1:]}
    assert sizes == {"bm25": 0, "embedding": 0, "trak": rows[0]["bytes"]}, "TRAK reads the run's gradients"
    assert run_cli("lds_plot", "results") == 0
    assert {path.name for path in Path("results").iterdir()} >= {"lds.md", "lds_bytes.png", "lds_damping.png"}
    assert run_cli("lds", "bed", "bed/runs") == 2


@pytest.mark.slow
def test_the_reduced_table(tmp_path):
    """REDUCED=1 makes a testbed, its runs, the table and the plots from nothing."""
    environment = os.environ | {"REDUCED": "1", "TESTBEDS": str(tmp_path)}
    command = ["bash", ROOT / "evaluation/lds_table.sh", "gpt2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "results/lds.md").read_text()
    for row in ("| raw | rank 64", "| ekfac | rank 136, int1 (--preset best)", "| ekfac | uncompressed", "bm25"):
        assert row in table, table
