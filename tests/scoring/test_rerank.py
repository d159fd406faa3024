"""Re-ranking: against dense float64 algebra, against uncompressed runs, and what stage 4 shows of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import OTHERS, make_texts, make_tokenizer, save_model, write_jsonl
from helpers import extract, influence, one_model_at_a_time, refused
from transformers import AutoModelForCausalLM

from logra import projection
from logra.analysis.tokens import TokenSplitter
from logra.influence import checkpoint_factors
from logra.inputs.groups import document_numbers
from logra.run_dir import RunDir
from logra.runtime import processes
from logra.scoring import parts, rank, rerank
from logra.scoring import reranked as reranked_module
from logra.scoring.reranked import Reranked
from logra.stages import calibrate
from logra.stages.fine_run import FineRun, choose_rank

SIGNS = ("--preset", "best", "--rank", 3, "--calibration_examples", 11)
MODES = ("dot", "cosine", "l2")
N, Q = 20, 3  # of the workspace


def load(folder: Path, combine: str | None = None) -> Reranked:
    """Return the re-ranked scores in a folder."""
    found = Reranked.load(folder, rank.read_record(folder, rank.scored_runs(folder)[-1]), combine)
    assert found is not None
    return found


def again(cli, *flags, kept: int = N) -> Reranked:
    """Score log/ and re-rank; by default all examples are candidates."""
    return load(influence(cli, "--rerank", kept, *flags)[1])


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> bool:
    return np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


# ---- the numbers
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "llama_tied"])
def test_against_dense_algebra(cli, tiny, workspace, name):
    """EK-FAC of the calibration sample, unprojected and at a rank, in all modes; examples of different lengths."""
    log = extract(cli, tiny / name, *SIGNS)
    model, train = AutoModelForCausalLM.from_pretrained(tiny / name), log.train()["input_ids"]
    sample = np.sort(np.random.default_rng(0).choice(N, 11, replace=False))
    ids = make_tokenizer()(json.loads(open("queries.jsonl").readline())["text"])["input_ids"]
    q, z = (reference.full_gradient(model, log.shapes, ids) for ids in (ids, train[0])), None
    q = next(q)
    z = [reference.full_gradient(model, log.shapes, ids) for ids in train]
    io = [reference.layer_io(model, log.shapes, train[i]) for i in sample]
    for space in ("none", 5):
        found = {mode: again(cli, "--mode", mode, "--rerank_rank", space, "--layerwise") for mode in MODES}
        p = FineRun(log, None if space == "none" else space).projections()
        dots, own, by_layer = 0, 0, {}
        for layer in log.layers:
            sides = p[layer][:2] if space == 5 else (None, None)
            grads = torch.stack([reference.project(g[layer], *sides) for g in z])
            if space == 5:
                c = torch.diag(grads[sample].square().mean(0))
            else:
                xs, ds = ([of_example[layer][side][:-1] for of_example in io] for side in (0, 1))
                c = reference.dense_hessian("ekfac", grads[sample], xs, ds)
            solved = torch.linalg.solve(c + 0.01 * c.trace() / len(c) * torch.eye(len(c)), grads.T)
            by_layer[layer] = reference.project(q[layer], *sides) @ solved
            dots, own = dots + by_layer[layer], own + (grads.T * solved).sum(0)
        for mode, values in {"dot": dots, "cosine": dots / own.sqrt(), "l2": dots - own / 2}.items():
            assert close(found[mode].candidates(0)[1], values.numpy(), 1e-3), (space, mode)
        blocks = np.stack([sum(by_layer[x] for x in by_layer if f".{n}." in x).numpy() for n in (0, 1)])
        assert close(found["dot"].of(0, "blocks"), blocks, 1e-3) and close(found["l2"].of(0, "blocks"), blocks, 1e-3)
        assert close(found["cosine"].of(0, "blocks").sum(0), found["cosine"].candidates(0)[1], 1e-4)


def test_rank_is_that_of_orthogonal_directions(cli, tiny, workspace):
    """At a rank, projections are random ones turned into an eigenbasis: on the sample, covariances are diagonal."""
    log = extract(cli, tiny / "llama", *SIGNS, "--calibration_examples", N)
    again(cli, "--rerank_rank", 5)
    run = FineRun(log, 5)
    drawn = projection.draw(log.shapes, run.projected, log.settings.seed)
    model = AutoModelForCausalLM.from_pretrained(tiny / "llama")
    io = [reference.layer_io(model, log.shapes, ids) for ids in log.train()["input_ids"]]
    for layer, (p_in, p_out, *_) in run.projections().items():
        for side, found, random in ((0, p_in, drawn[layer].p_in), (1, p_out, drawn[layer].p_out)):
            tokens = torch.cat([of_example[layer][side][:-1] for of_example in io]) @ found.double().T
            cov = tokens.T @ tokens
            assert (cov - cov.diag().diag()).norm() < 1e-4 * cov.norm()
            assert torch.allclose(found.T @ found, random.T @ random, atol=1e-5), "rotated, not changed"


QUERIES = ("--split", "rows.jsonl")
CASES = {
    "plain": ((), ()),
    "packed": (("--pack", "--block_size", 16), ()),
    "responses": (("--train_loss", "response"), ()),
    "some layers": ((), ("--score_layers", r"\.1\.")),
    "groups": ((), ("--group_by", "topic")),
    "all layers": (("--layers", "."), ()),
}


@pytest.mark.parametrize(
    ("name", "case"), [*(("gpt2", case) for case in CASES), ("mixtral", "plain"), ("mixtral", "all layers")]
)
def test_equals_an_uncompressed_run(cli, tiny, workspace, name, case):
    """The re-ranked scores are those of --lora none with the same sample, batched in other ways."""
    model = save_model(workspace / name, name) if name in OTHERS else tiny / name
    if case == "responses":
        rows = [{"prompt": a, "response": f" {b}"} for a, b in zip(make_texts(N), make_texts(N, seed=4), strict=True)]
        write_jsonl(Path("docs.jsonl"), rows)
    rows = [{"text": text, "topic": topic} for text, topic in zip(make_texts(3, seed=2), "aba", strict=True)]
    write_jsonl(Path("rows.jsonl"), rows)
    of_run, of_scores = CASES[case]
    extract(cli, model, *SIGNS, "--calibration_examples", 100, *of_run)
    found = {mode: again(cli, *QUERIES, *of_scores, "--mode", mode, kept=4) for mode in MODES}
    shutil.rmtree("log")
    extract(cli, model, "--hessian", "ekfac", "--mlp_only", "--lora", "none", "--calibration_examples", 100, *of_run)
    for mode in MODES:
        expected, _ = influence(cli, *QUERIES, *of_scores, "--mode", mode)
        for query, row in enumerate(expected):
            ids, scores = found[mode].candidates(query)
            assert len(ids) == min(8, len(row)) and close(scores, row[ids])


def test_candidates_are_the_ends_of_each_ranking(cli, tiny, workspace):
    """K of each end by the stored scores, of each damping on its own; the files of the stored scores are untouched."""
    extract(cli, tiny / "gpt2", *SIGNS)
    status, out, _ = cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", "--rerank", 3,
                         "--damping", 0.2, 1e-4)  # fmt: skip
    folders = [Path(line.split(" in ")[1]) for line in out.splitlines() if " x " in line]
    assert status == 0 and len(folders) == 2
    for folder in folders:
        stored, found = np.load(folder / "scores.npy"), load(folder)
        for query, row in enumerate(stored):
            ids, _ = found.candidates(query)
            assert sorted(ids) == sorted({*np.argsort(row)[:3], *np.argsort(row)[-3:]})
            assert (found.of(query, "stored") == row[ids]).all()
    assert not np.array_equal(load(folders[0]).tensors["ids"], load(folders[1]).tensors["ids"])
    both = [dict(zip(*load(folder).candidates(0), strict=True)) for folder in folders]
    shared = both[0].keys() & both[1].keys()
    assert shared and all(np.isclose(both[0][i], both[1][i], rtol=1e-5) for i in shared), "one damping re-ranks"


def test_passes_of_few_queries(cli, tiny, workspace, monkeypatch):
    """Memory for one query at a time, and memory that runs out, change no score."""
    extract(cli, tiny / "llama", *SIGNS)
    expected = again(cli, "--mode", "cosine", kept=4)
    write_pass, calls = rerank.write_pass, []

    def fails_at_first(scorer, batch, *values):
        calls.append(len(batch))
        return len(calls) > 1 and write_pass(scorer, batch, *values)

    monkeypatch.setattr(rerank, "write_pass", fails_at_first)
    found = again(cli, "--mode", "cosine", kept=4)
    assert calls == [3, 1, 1, 1]
    for name, tensor in expected.tensors.items():
        assert np.allclose(found.tensors[name], tensor, rtol=1e-4, atol=1e-6), name


# ---- several checkpoints
def parts_alone(cli, checkpoints: list[str], mode: str) -> np.ndarray:
    """Return the scores [C, Q, N] at each checkpoint, re-ranked with it alone."""
    flags = ("--mode", mode, "--rerank_checkpoints")
    return np.stack([again(cli, *flags, name, kept=24).tensors["scores"].reshape(Q, 24) for name in checkpoints])


@pytest.mark.parametrize("mode", ["dot", "cosine"])
def test_over_checkpoints(cli, trajectory, tmp_path, monkeypatch, mode):
    """By the rule of --checkpoints, with the deviations of the sample; the run's own model is one if it is named."""
    monkeypatch.chdir(tmp_path)
    for name in ("out", "queries.jsonl"):
        (tmp_path / name).symlink_to(trajectory / name)
    shutil.copytree(trajectory / "parent", "parent")
    shutil.copytree("parent/checkpoint-15", "log")
    names = [f"out/checkpoint-{step}" for step in (5, 10, 15)]
    alone = torch.from_numpy(parts_alone(cli, names, mode)).double()
    factors = checkpoint_factors(alone.std(2, correction=0), [1.0] * 3, mode)
    one_model_at_a_time(monkeypatch)
    found = again(cli, "--mode", mode, "--rerank_checkpoints", "out/*", kept=24)
    expected = (factors[..., None] * alone).numpy()
    assert close(found.tensors["scores"].reshape(Q, 24), expected.sum(0))
    assert close(found.tensors["parts"].reshape(3, Q, 24), expected)
    files = {path.name for path in Path("log/hessian").glob("rerank*.safetensors")}
    assert files == {f"rerank-none{suffix}.safetensors" for suffix in ("", "-checkpoint-5", "-checkpoint-10")}
    flags = ("--log_dir", "parent", "--split", "queries.jsonl", "--mode", mode, "--rerank", 24)
    for _ in range(2):  # the second time the checkpoints' own scores are kept, and no model is loaded for them
        status, _, err = cli("compute_influence", *flags)
        assert status == 0, err
    folder = rank.newest_scores(Path("parent"), None)
    of_parent = load(folder)
    assert close(of_parent.tensors["scores"].reshape(Q, 24), expected.sum(0), 1e-3)
    assert [entry["run"] for entry in of_parent.record.models] == [f"checkpoint-{step}" for step in (5, 10, 15)]
    status, _, err = cli("analysis", "--log_dir", "parent", "--tokens")
    assert status == 0, err
    row = rows_of(folder)[0]
    assert [*row["checkpoints"]] == [f"checkpoint-{step}" for step in (5, 10, 15)]
    assert np.isclose(sum(row["checkpoints"].values()), row["score"], rtol=1e-5)


# ---- statistics
def test_statistics_are_computed_once(cli, tiny, workspace, monkeypatch):
    """Of stage 2 with --rerank_rank, used by later query sets; those that are altered, or of other data, are not."""
    made = []
    monkeypatch.setattr(
        calibrate, "in_eigenbasis", lambda *x, original=calibrate.in_eigenbasis: made.append(1) or original(*x)
    )
    extract(cli, tiny / "gpt2", *SIGNS, "--rerank_rank", "none")
    assert len(made) == 2  # the run's, and those of re-ranking
    expected = again(cli)
    again(cli, "--max_queries", 1)
    assert len(made) == 2
    path = Path("log/hessian/rerank-none.safetensors")
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    found = again(cli)
    assert len(made) == 3 and close(found.tensors["scores"], expected.tensors["scores"])
    write_jsonl(Path("more.jsonl"), [{"id": f"m{i}", "text": text} for i, text in enumerate(make_texts(3, seed=8))])
    assert cli("extract_log", "--log_dir", "log", "--extend", "--data_name", "more.jsonl")[0] == 0
    again(cli, kept=5)
    assert len(made) == 4


def test_auto_is_the_highest_rank_in_the_budget(monkeypatch):
    """None, else powers of two; the bytes are those of the file."""
    shapes = {"a": (1000, 300), "b": (300, 1000)}
    whole = 2 * 4 * (1000**2 + 300**2 + 1000 * 300 + 1000 + 300) + 16
    at_256 = 2 * 4 * (256 * 1000 + 256 * 300 + 256**2 + 512) + 16
    for budget, expected in ((whole, None), (whole - 1, 512), (at_256, 256), (at_256 - 1, 128)):
        monkeypatch.setattr("logra.stages.fine_run.MAX_BYTES", budget)
        assert choose_rank(shapes, "auto") == expected
    assert choose_rank(shapes, "none") is None and choose_rank(shapes, 7) == 7


# ---- what is said of the stored scores
def test_quality_of_the_stored_scores(cli, tiny, workspace):
    """Spearman over the sample, how many of the first ten were found, and the last one's place."""
    extract(cli, tiny / "llama", *SIGNS)
    _, folder = influence(cli, "--rerank", N)
    stored, found = np.load(folder / "scores.npy"), load(folder)
    quality = found.record.quality
    for query, row in enumerate(stored):
        scores = found.candidates(query)[1]  # of all examples, which are the sample too
        distances = np.argsort(np.argsort(row)) - np.argsort(np.argsort(scores))
        assert np.isclose(quality["spearman"][query], 1 - 6 * (distances**2).sum() / (N * (N**2 - 1)), atol=1e-4)
        best, order = np.argsort(-scores)[:10], np.argsort(-row).tolist()
        places = [order.index(example) + 1 for example in best]
        assert quality["found"][query] == sum(place <= 10 for place in places)
        assert quality["last"][query] == max(places)


@pytest.mark.parametrize(("last", "hint"), [([40, 70], False), ([41, 81], True)])
def test_a_larger_k_is_recommended(last, hint):
    """If one of the ten highest comes from the last fifth of the candidates."""
    quality = {"sample": 256, "spearman": [0.5, 0.7], "found": [9, 8], "last": last}
    record = reranked_module.RerankRecord("", 400, 100, "example", None, 0.01, [], quality)
    lines = " ".join(reranked_module.quality_lines(record))
    assert "Spearman 0.60 over 256" in lines and "8.5 of the 10" in lines and f"number {last[1]}" in lines
    assert ("for 1 of 2 queries" in lines and "--rerank 200" in lines) == hint


# ---- stage 4
def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "top_k.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_shown(cli, tiny, workspace, mode):
    """Rows are ranked by the new scores and name the stored ones; shares and bars are of the new, z of the stored."""
    extract(cli, tiny / "llama", *SIGNS)
    _, folder = influence(cli, "--rerank", 5, "--mode", mode, "--layerwise")
    status, out, err = cli("analysis", "--log_dir", "log", "--bottom", "--tokens", "--top_k", 6)
    assert status == 0, err
    assert "5 instead of 6, since --rerank 5 computed no more (3 of 3 queries)" in out
    stored, found, rows = np.load(folder / "scores.npy"), load(folder), rows_of(folder)
    for query in range(Q):
        (ids, scores), top = found.candidates(query), set[int]()
        for side, sign in (("top", -1), ("bottom", 1)):
            own = [row for row in rows if row["query"] == rows[query * 10]["query"] and row["side"] == side]
            expected = ids[np.argsort(sign * scores, kind="stable")][:5].tolist()
            assert [row["example"] for row in own] == [i for i in expected if side == "top" or i not in top]
            top |= {row["example"] for row in own}
            order = np.argsort(sign * stored[query], kind="stable").tolist()
            for row in own:
                value = stored[query, row["example"]]
                assert row["score"] == scores[ids.tolist().index(row["example"])]
                assert row["stored_score"] == value and row["stored_rank"] == order.index(row["example"]) + 1
                assert np.isclose(row["z"], (value - stored[query].mean()) / stored[query].std(), atol=1e-4)
    run = RunDir.load(Path("log"))
    (model,) = parts.scored_models(folder, rank.read_record(folder, run), [run], found)
    splitter = TokenSplitter(model.run, model.record, False, model.self_influence)
    shown = [found.candidates(query)[0].tolist() for query in range(Q)]
    pairs = splitter.split(run.train(), shown, shown).pairs
    for query, ids in enumerate(shown):
        for shares in (pairs[query, example] for example in ids):
            assert np.isclose(shares.tokens.sum(), sum(shares.blocks.values()), rtol=1e-4)
        sums = np.array([pairs[query, example].tokens.sum() for example in ids])
        assert close(sums, found.candidates(query)[1])
    page = (folder / "report.html").read_text()
    assert (
        "Re-ranked: the scores of the 5 examples" in page
        and ", stored rank " in page
        and "All 20 stored scores" in page
    )
    assert "stored_rank" in (folder / "top_k.csv").read_text().splitlines()[0]


def test_documents(cli, tiny, workspace):
    """Candidates are all examples of the first K documents by their sums; what was not computed is refused."""
    extract(cli, tiny / "gpt2", *SIGNS, "--block_size", 8)
    _, folder = influence(cli, "--rerank", 2, "--rerank_by", "document")
    run, found = RunDir.load(Path("log")), load(folder, "sum")
    owners, stored = document_numbers(run.train(), False), np.load(folder / "scores.npy")
    sums = np.array([np.bincount(owners, weights=row) for row in stored])
    assert cli("analysis", "--log_dir", "log", "--by", "document", "--bottom")[0] == 0
    rows = rows_of(folder)
    for query in range(Q):
        chosen = {*np.argsort(sums[query])[:2], *np.argsort(sums[query])[-2:]}
        ids, scores = found.candidates(query)
        assert ids.tolist() == [i for i, owner in enumerate(owners) if owner in chosen]
        new = {owner: scores[owners[ids] == owner].sum() for owner in chosen}
        first = next(row for row in rows if row["query"] == rows[query * 4]["query"])
        best = max(new, key=new.get)
        assert first["document"] == f"doc{best}" and np.isclose(first["score"], new[best], rtol=1e-5)
        assert np.isclose(first["stored_score"], sums[query, best], rtol=1e-5)
    refused(cli("analysis", "--log_dir", "log"), "--rerank_by example")
    influence(cli, "--rerank", 2)
    refused(cli("analysis", "--log_dir", "log", "--by", "document"), "--rerank_by document")
    assert cli("analysis", "--log_dir", "log", "--by", "document", "--combine", "max")[0] == 0


def test_the_top_alone(cli, tiny, workspace):
    """With --top_k_only: the same candidates and scores; what was not kept is said."""
    extract(cli, tiny / "gpt2", *SIGNS)
    expected = again(cli, kept=4)
    flags = ("--log_dir", "log", "--split", "queries.jsonl", "--top_k_only", 6)
    assert cli("compute_influence", *flags, "--rerank", 4)[0] == 0
    folder = max(Path("log/scores").glob("*/"), key=lambda path: path.stat().st_mtime)
    found = load(folder)
    assert "spearman" not in found.record.quality
    for name in ("ids", "scores", "stored"):
        assert np.allclose(found.tensors[name], expected.tensors[name], rtol=1e-4)
    assert cli("analysis", "--log_dir", "log", "--bottom")[0] == 0
    assert len(rows_of(folder)) == 2 * 4 * Q
    refused(cli("compute_influence", *flags, "--rerank", 7), "--rerank of at most 6")


# ---- faults
def test_stopped_and_damaged(cli, tiny, workspace, monkeypatch):
    """A stop leaves the stored scores whole; the command again gives the same; a damaged file is one line."""
    extract(cli, tiny / "gpt2", *SIGNS)
    _, folder = influence(cli, "--rerank", 4)
    expected = (folder / "reranked.safetensors").read_bytes()
    write = reranked_module.store.write_tensors

    def stops(path, layout, tensors):
        write(path, layout, tensors)
        if "reranked" in path.name:
            raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(reranked_module.store, "write_tensors", stops)
        refused(cli("compute_influence", "--log_dir", "log", "--split", "queries.jsonl", "--rerank", 4), "stopped")
    assert not [*folder.glob("reranked*")]
    assert cli("analysis", "--log_dir", "log")[0] == 0 and "stored_rank" not in rows_of(folder)[0]
    influence(cli, "--rerank", 4)
    assert (folder / "reranked.safetensors").read_bytes() == expected
    (folder / "reranked.safetensors").write_bytes(expected[:-4] + b"abcd")
    refused(cli("analysis", "--log_dir", "log"), "re-ranked scores", "was altered", "run compute_influence.py again")


def test_what_does_not_go_together(cli, tiny, workspace, monkeypatch):
    """One line each, before anything is computed."""
    flags = ("compute_influence", "--log_dir", "log", "--split", "queries.jsonl")
    refused(cli(*flags, "--rerank_rank", 8), "--rerank with --rerank_rank")
    extract(cli, tiny / "gpt2", *SIGNS, "--pack", "--block_size", 16)
    refused(cli(*flags, "--rerank", 3, "--rerank_by", "document"), "--pack")
    refused(cli(*flags, "--rerank", 3, "--rerank_checkpoints", "nothing/*"), "nothing/*")
    refused(cli(*flags, "--rerank", 3, "--rerank_checkpoints", tiny / "gpt2", tiny / "gpt2"), "twice")
    refused(cli(*flags, "--rerank", 3, "--rerank_checkpoints", tiny / "llama"), "another layers")
    monkeypatch.setattr(processes, "available_memory", lambda: 1000)
    refused(cli(*flags, "--rerank", 3), "of memory for the statistics of re-ranking", "--rerank_rank")
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    refused(cli(*flags, "--rerank", 3), "of free disk for the statistics of re-ranking")
    assert not [*Path("log").glob("scores/*/")] and not [*Path("log").glob("hessian/rerank*")]
