"""Combined scores of several checkpoints: against the rule in float64, on random numbers and end to end."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAJECTORY, run_cli
from safetensors.torch import load_file

from logra import influence
from logra.influence import checkpoint_factors
from logra.run_dir import RunDir
from logra.scoring import combine
from logra.scoring.score import Scorer
from logra.scoring.score_files import deviation
from logra.stages import open_run


def by_the_rule(scores: np.ndarray, weights: list[float], mode: str) -> np.ndarray:
    """Return the combined scores [Q, N] of scores [C, Q, N]: docs/method.md in float64."""
    scores = scores.astype(np.float64)
    total = np.zeros(scores.shape[1:])
    for own, weight in zip(scores, weights, strict=True):
        for query, row in enumerate(own):
            constant = row.max() - row.min() <= 1e-6 * np.abs(row).max()
            scale = 1.0 if mode == "cosine" else np.inf if constant else np.sqrt(np.mean((row - row.mean()) ** 2))
            total[query] += weight / sum(weights) * row / scale
    return total


# ---- on random numbers
@pytest.mark.parametrize("mode", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("examples", [1, 2, 1000])
def test_factors_by_the_rule(mode, examples):
    """Of scales from 1e-30 to 1e30, a query without gradient, and one of which all examples have the same score."""
    random = np.random.default_rng()
    scores = random.normal(size=(4, 5, examples)) * 10.0 ** random.integers(-30, 30, size=(4, 5, 1))
    scores[:, 3], scores[:, 4], scores[1:3, 2] = 0, random.normal(size=(4, 1)), 0.1
    scores[0, 1] += 1000 * scores[0, 1].std()  # a mean far above the deviation
    scores = scores.astype(np.float32)
    exact = torch.from_numpy(scores).double()
    weights = random.uniform(0.1, 10, size=4).tolist()
    factors = checkpoint_factors(deviation(exact.mean(2), exact.square().mean(2)), weights, mode)
    found = (factors[..., None] * exact).sum(0).numpy()
    expected = by_the_rule(scores, weights, mode)
    assert factors.dtype == torch.float64 and np.isfinite(found).all()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert mode == "cosine" or not found[3:].any()


def test_weights_of_any_scale():
    """Only the ratios of the weights count, also of those whose sum is infinite."""
    deviations = torch.rand(3, 2, dtype=torch.float64) + 0.1
    one, *others = (
        checkpoint_factors(deviations, [w * scale for w in (1.0, 2.0, 4.0)], "dot") for scale in (1, 1e-300, 4e307)
    )
    assert all(torch.allclose(one, other, rtol=1e-12, atol=0) for other in others)
    assert torch.allclose(one, torch.tensor([[1], [2], [4]]) / 7 / deviations)


# ---- end to end
@pytest.fixture(scope="module")
def parents(trajectory, tmp_path_factory):
    """Return a function: flags of stage 2 -> a finished folder of the three checkpoints."""
    made = {"--store_dtype int1": trajectory / "parent"}

    def make(flags: str) -> Path:
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("parent") / "log"
            where = ("--checkpoints", f"{trajectory}/out/*", "--data_name", trajectory / "docs.jsonl")
            assert run_cli("extract_log", *where, "--log_dir", made[flags], *TRAJECTORY, *flags.split()) == 0
        return made[flags]

    return make


@pytest.fixture
def score(cli, trajectory):
    """Return a function: stage 3's flags -> the folders of the combined scores."""

    def run(parent: Path, *flags) -> list[Path]:
        status, out, err = cli(
            "compute_influence", "--log_dir", parent, "--split", trajectory / "queries.jsonl", *flags
        )
        assert status == 0, err
        return [Path(name) for name in re.findall(r"examples in (.*)", out) if Path(name).parent.parent == parent]

    return run


def read(folder: Path) -> tuple[dict, list[Path], np.ndarray]:
    """Return run.json of combined scores, and the folders [C] and the scores [C, Q, N] of the checkpoints."""
    record = json.loads((folder / "run.json").read_text())
    parent, label = folder.parent.parent, re.search(r"-[^-]*$", folder.name)[0]
    own = [parent / part["run"] / "scores" / f"{part['scores']}{label}" for part in record["checkpoints"]]
    return record, own, np.stack([np.load(path / "scores.npy") for path in own])


@pytest.fixture
def queries_per_pass(monkeypatch, request) -> None:
    """So many queries are scored in a pass, and combined at a time."""
    original = Scorer.__init__

    def small(scorer, *values):
        original(scorer, *values)
        scorer.queries_per_pass = scorer.queries_per_step = request.param

    monkeypatch.setattr(Scorer, "__init__", small)
    monkeypatch.setattr(combine, "BLOCK_SCORES", 7 * request.param)


RAW, SIGNS, WITHOUT = "--hessian raw", "--store_dtype int1", "--store_dtype none"
CASES = [
    (RAW, "--mode dot --layerwise --self_influence", 9),
    (RAW, "--mode cosine --layerwise --checkpoint_weights 3e-4 2e-4 1e-4", 2),
    (SIGNS, "--mode dot --damping 0.01 0.2 3 --checkpoint_weights 1 2 3", 2),
    (SIGNS, "--mode l2 --layerwise --self_influence --group_by topic", 1),
    (SIGNS, "--mode cosine --score_layers down_proj --damping_absolute 1e-3 --layerwise", 9),
    (WITHOUT, "--mode cosine --damping 0.1 1 --layerwise --self_influence", 2),
    ("--pack --store_dtype int8", "--mode dot", 9),
]


@pytest.mark.parametrize(("run", "flags", "queries_per_pass"), CASES, indirect=["queries_per_pass"])
def test_scores_by_the_rule(parents, score, queries_per_pass, run, flags):
    """Scores, factors, parts of blocks of layers and self-influence, in one pass of queries and in several."""
    parent = parents(run)
    folders = score(parent, *flags.split())
    assert len(folders) == (3 if "--damping 0.01" in flags else 2 if "--damping 0.1" in flags else 1)
    for folder in folders:
        record, own, scores = read(folder)
        weights = [part["weight"] for part in record["checkpoints"]]
        assert len(own) == 3 and weights == ([1.0] * 3 if "weights" not in flags else weights)
        expected, found = by_the_rule(scores, weights, record["mode"]), np.load(folder / "scores.npy")
        assert found.dtype == np.float32 and found.shape == (record["num_queries"], record["num_examples"])
        assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max() and np.abs(expected).max(1).all()
        factors = np.load(folder / "factors.npy")
        assert np.abs((factors[..., None] * scores).sum(0) - expected).max() <= 2e-6 * np.abs(expected).max()
        if "--layerwise" in flags:
            layers, at_all = np.load(folder / "layer_scores.npy"), expected
            if record["mode"] == "l2":  # dots alone
                dots = np.stack([np.load(path / "layer_scores.npy").astype(float).sum(0) for path in own])
                at_all = (factors[..., None] * dots).sum(0)
            assert len(layers) == len(record["blocks"]) and np.abs(layers[0]).max() > 0
            assert np.abs(layers.sum(0, dtype=float) - at_all).max() <= 5e-6 * np.abs(at_all).max()
        if "--self_influence" in flags:
            values = np.stack([np.load(path / "self_influence.npy") for path in own])[:, None]
            one = by_the_rule(values, weights, "dot")[0]
            assert np.abs(np.load(folder / "self_influence.npy") - one).max() <= 2e-6 * one.max()


@pytest.mark.parametrize(
    ("run", "flags", "queries_per_pass"),
    [(RAW, "--mode dot", 9), (SIGNS, "--mode cosine --damping 0.01 0.2", 2), (SIGNS, "--mode l2 --group_by topic", 1)],
    indirect=["queries_per_pass"],
)
def test_top_k_only_gives_the_extremes_of_all_scores(parents, score, queries_per_pass, run, flags):
    """Ids, scores and parts, ties by the smaller id, with K below and above the number of examples."""
    parent, flags = parents(run), flags.split()
    folders = score(parent, *flags)
    for k in (4, 60):
        for folder, kept in zip(folders, score(parent, *flags, "--top_k_only", k), strict=True):
            record, _, scores = read(folder)
            full, factors = np.load(folder / "scores.npy"), np.load(folder / "factors.npy")
            assert np.allclose(np.load(kept / "factors.npy"), factors, rtol=1e-6)
            assert not (kept / "scores.npy").exists()
            for end, sign in (("top", -1), ("bottom", 1)):
                found = load_file(kept / f"{end}.safetensors")
                ids = np.argsort(sign * full, axis=1, kind="stable")[:, :k]
                assert (found["ids"].numpy() == ids).all()
                assert np.allclose(found["scores"].numpy(), np.take_along_axis(full, ids, 1), rtol=1e-5, atol=1e-6)
                parts = np.take_along_axis(factors[..., None] * scores, ids[None], 2)
                assert np.allclose(found["parts"].numpy(), parts, rtol=1e-5, atol=1e-6)
            assert (full == 0).sum(1).min() >= 3 or record["mode"] == "l2", "there are ties"


def test_constant_self_influence_does_not_count():
    """Copies of one example differ by rounding; divided by that, they would decide alone."""
    values = (0.1 * (1 + 1e-7 * torch.randn(3, 7))).double()
    assert not deviation(values.mean(1), values.square().mean(1)).any()


def test_parts_of_layers_that_cancel():
    """A cosine's blocks are divided by the root of the self-influence, not by what their sum was rounded to."""
    dots = torch.tensor([[[3e7]], [[1.0]], [[-3e7]]])  # their float32 sum is 0, not 1
    own = torch.tensor([4.0])
    parts = influence.layer_parts([(dots, own)], torch.tensor([[0.5]], dtype=torch.float64), "cosine")
    assert torch.equal(parts, dots / 4)


def test_the_check_finds_a_wrong_score(parents, score, monkeypatch, trajectory, tmp_path, cli):
    """A score that is not the sum of the checkpoints' parts ends the command, and leaves no folder."""
    parent = shutil.copytree(parents("--store_dtype int1"), tmp_path / "log")
    shutil.rmtree(parent / "scores", ignore_errors=True)
    fill = combine._fill

    def wrong(made, *values):
        fill(made, *values)
        matrix = np.load(made[0].folder / "scores.npy", mmap_mode="r+")
        matrix += 0.01

    monkeypatch.setattr(combine, "_fill", wrong)
    status, _, err = cli("compute_influence", "--log_dir", parent, "--split", trajectory / "queries.jsonl")
    assert status == 2 and "combined again from the checkpoints' files" in err
    assert not [*(parent / "scores").glob("queries*")] and RunDir.load(parent / "checkpoint-5")


@pytest.mark.parametrize("queries_per_pass", [1], indirect=True)
def test_queries_of_one_pass_in_memory(cli, trajectory, queries_per_pass, monkeypatch):
    """Those of the last pass are freed before the next ones are made."""
    original, kept = Scorer.preconditioned, []

    def watched(scorer, groups):
        kept.append(len(scorer.stored_queries))
        return original(scorer, groups)

    monkeypatch.setattr(Scorer, "preconditioned", watched)
    flags = ("--log_dir", trajectory / "parent/checkpoint-5", "--split", trajectory / "queries.jsonl")
    assert cli("compute_influence", *flags)[0] == 0 and kept == [0, 0, 0]


def test_scores_that_are_there_are_kept(parents, score, monkeypatch, tmp_path):
    """A checkpoint whose scores are whole and the same is not loaded again; the combined scores do not change."""
    parent = shutil.copytree(parents(SIGNS), tmp_path / "log")
    for folder in [parent, *parent.glob("checkpoint-*")]:
        shutil.rmtree(folder / "scores", ignore_errors=True)
    loaded, load = [], open_run.load_model

    def counted(settings, execution):
        loaded.append(Path(settings.model_name).name)
        return load(settings, execution)

    monkeypatch.setattr(open_run, "load_model", counted)
    names = sorted((path.name for path in parent.glob("checkpoint-*/")), key=lambda name: int(name.split("-")[1]))
    flags = ("--mode", "l2", "--damping", 0.1, 0.2)
    score(parent, *flags, "--checkpoints", f"{RunDir.load(parent / names[-1]).settings.model_name}")
    assert loaded == names[-1:]
    first = [np.load(folder / "scores.npy") for folder in score(parent, *flags)]
    assert loaded == [names[-1], *names[:-1]], "one that is added costs only itself"
    loaded.clear()
    again = score(parent, *flags)
    assert not loaded and all((np.load(path / "scores.npy") == a).all() for path, a in zip(again, first, strict=True))
    own = read(again[0])[1][1]
    matrix = np.load(own / "scores.npy", mmap_mode="r+")
    matrix[0, 0] += 1
    matrix.flush()
    score(parent, *flags)
    assert loaded == names[1:2], "it was altered"
    for more in (("--self_influence",), ("--query_loss", "all")):
        loaded.clear()
        score(parent, *flags, *more)
        assert loaded == names, more
