"""Scores through the command lines of stages 2 and 3, against dense algebra."""

import json
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import reference
import torch
from conftest import make_model, make_texts, make_tokenizer
from helpers import DATA, QUERIES, close, extract, influence
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from logra import influence as influence_module


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "llama_tied"])
def test_unprojected_raw_is_the_exact_fisher_influence(cli, tiny, workspace, name):
    """--lora none and no compression: q^T (C + lambda I)^-1 z with the full gradients' dense covariance."""
    log = extract(cli, tiny / name, "--lora", "none", "--hessian", "raw", "--mlp_only", "--max_examples", 12)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny / name), make_tokenizer()
    train = [row["input_ids"] for row in log.train()]
    rows = [json.loads(line) for line in open("queries.jsonl")]
    queries = [(tokenizer(row["text"])["input_ids"], 1) for row in rows[:2]]
    prompt, response = (tokenizer(rows[2][key])["input_ids"] for key in ("prompt", "response"))
    queries.append((prompt + response, len(prompt)))
    z = [reference.full_gradient(model, log.shapes, ids) for ids in train]
    q = [reference.full_gradient(model, log.shapes, ids, start) for ids, start in queries]
    dots = own = 0
    for layer in log.layers:
        grads = torch.stack([g[layer].flatten() for g in z])
        cov = grads.T @ grads / len(grads)
        lam = 0.1 * cov.trace() / len(cov)
        solved = torch.linalg.solve(cov + lam * torch.eye(len(cov)), grads.T)
        dots = dots + torch.stack([g[layer].flatten() for g in q]) @ solved
        own = own + (grads.T * solved).sum(0)
    for mode, values in {"dot": dots, "cosine": dots / own.sqrt(), "l2": dots - own / 2}.items():
        shutil.rmtree("log/self_influence", ignore_errors=True)  # each mode computes its own
        scores, expected = influence(cli, "--mode", mode)[0], values.numpy()
        assert np.linalg.norm(scores - expected) < 1e-3 * np.linalg.norm(expected), mode


def test_a_step_on_a_proponent_lowers_the_querys_loss(cli, workspace):
    """On a trained model: one small step on the best example lowers the loss, on the worst one raises it."""
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    train = [tokenizer(text)["input_ids"] for text in make_texts(20, seed=1)]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        loss = sum(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in train) / len(train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained("trained")
    tokenizer.save_pretrained("trained")
    log = extract(cli, Path("trained"), "--lora", "none", "--hessian", "none")
    scores, _ = influence(cli, "--max_queries", 1)
    query = tokenizer(json.loads(open("queries.jsonl").readline())["text"])["input_ids"]
    before = reference.example_loss(model, query)
    assert before < 0.7 * reference.example_loss(make_model("gpt2"), query), "the model has learned"
    rate = 1e-4
    for example in (scores[0].argmax(), scores[0].argmin()):
        stepped = AutoModelForCausalLM.from_pretrained("trained").double()
        for layer, grad in reference.full_gradient(model, log.shapes, train[example]).items():
            stepped.get_submodule(layer).weight.data -= rate * grad.T  # Conv1D
        change = reference.example_loss(stepped, query) - before
        assert change * scores[0, example] < 0
        assert abs(-change / rate - scores[0, example]) < 0.2 * abs(scores[0, example])
    assert scores[0].max() > 0 > scores[0].min()


@pytest.mark.parametrize(("kind", "lora"), [("kfac", "random"), ("ekfac", "random"), ("ekfac", "pca")])
def test_projected_runs_against_dense_algebra(cli, tiny, workspace, kind, lora):
    """Scores from files equal dense (C + lambda I)^-1 on the projected gradients of autograd, in the stored basis."""
    flags = ("--hessian", kind, "--lora", lora, "--rank", 4, "--basis", "eigen", "--mlp_only")
    log = extract(cli, tiny / "llama", *flags)
    scores, _ = influence(cli, "--mode", "dot", "--damping", 0.2)
    model, p = AutoModelForCausalLM.from_pretrained(tiny / "llama"), log.projections()
    train = [row["input_ids"] for row in log.train()]
    rows = [json.loads(line) for line in open("queries.jsonl")]
    ids = make_tokenizer()(rows[0]["text"])["input_ids"]
    q, expected = reference.full_gradient(model, log.shapes, ids), 0
    z = [reference.full_gradient(model, log.shapes, ids) for ids in train]
    io = [reference.layer_io(model, log.shapes, ids) for ids in train]
    for layer in log.layers:
        grads = torch.stack([reference.project(g[layer], *p[layer][:2]) for g in z])
        if kind == "ekfac":  # the stored basis is the eigenbasis of the calibration sample
            cov = torch.diag(grads.square().mean(0))
        else:
            xs = [x[layer][0][:-1] @ p[layer].p_in.double().T for x in io]
            ds = [x[layer][1][:-1] @ p[layer].p_out.double().T for x in io]
            cov = reference.dense_hessian("kfac", grads, xs, ds)
        lam = 0.2 * cov.trace() / len(cov)
        expected = expected + reference.scores(reference.project(q[layer], *p[layer][:2])[None], grads, cov, lam, "dot")
    assert np.linalg.norm(scores[0] - expected[0].numpy()) < 1e-3 * expected.norm()


def test_ranks_at_or_above_the_width_are_exact(cli, tiny, workspace):
    """A rank above every width gives the scores of --lora none, said once; in the eigenbasis too."""
    extract(cli, tiny / "gpt2", "--lora", "none", "--hessian", "raw")
    expected, _ = influence(cli)
    status, out, _ = cli("extract_log", "--model_name", tiny / "gpt2", *DATA, "--overwrite", "--rank", 500)
    assert status == 0 and out.count("not projected") == 1
    same, _ = influence(cli)
    assert np.allclose(same, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    extract(cli, tiny / "gpt2", "--lora", "none", "--basis", "eigen", "--overwrite")
    turned, _ = influence(cli)
    assert np.allclose(turned, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_score_layers_add_up(cli, tiny, workspace):
    """Scores of two disjoint sets of layers add up to all layers' scores."""
    extract(cli, tiny / "gpt2", "--rank", 4)
    whole, _ = influence(cli)
    parts = [influence(cli, "--score_layers", pattern)[0] for pattern in (r"\.0\.", r"\.1\.")]
    assert np.allclose(sum(parts), whole, rtol=1e-4, atol=1e-4 * np.abs(whole).max())


def test_several_dampings_in_one_pass(cli, tiny, workspace):
    """Each damping's scores are those of a run with it alone; self-influence that is kept gives the same again."""
    extract(cli, tiny / "gpt2", "--rank", 4, "--hessian", "ekfac", "--shard_examples", 6)
    for kind in ("ekfac", "kfac", "raw"):
        assert cli("extract_log", "--log_dir", "log", "--hessian", kind)[0] == 0
        for flag in ("--damping", "--damping_absolute"):
            flags = (*QUERIES, "--hessian", kind, "--mode", "cosine")
            status, out, err = cli("compute_influence", *flags, flag, 0.05, 3)
            assert status == 0, err
            folders = [Path(line.split(" in ")[1]) for line in out.splitlines() if " in " in line]
            together = [np.load(folder / "scores.npy") for folder in folders]
            assert len(together) == 2 and not np.allclose(*together)
            again = [influence(cli, *flags[4:], flag, value)[0] for value in (0.05, 3)]
            assert all(close(a, b) for a, b in zip(together, again, strict=True))
            shutil.rmtree("log/self_influence")
            alone = [influence(cli, *flags[4:], flag, value)[0] for value in (0.05, 3)]
            assert all(close(a, b) for a, b in zip(together, alone, strict=True))


def test_queries_in_groups(cli, tiny, workspace, monkeypatch):
    """Queries that don't fit in memory together are scored group by group, with the same result."""
    extract(cli, tiny / "llama", "--rank", 4, "--hessian", "ekfac", "--shard_examples", 3)
    expected, _ = influence(cli, "--mode", "cosine")
    shutil.rmtree("log/self_influence")
    memory = psutil.virtual_memory()._replace(available=30_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    status, out, err = cli("compute_influence", *QUERIES, "--mode", "cosine")
    assert status == 0 and err == "", err
    folder = Path(next(line for line in out.splitlines() if " in " in line).split(" in ")[1])
    assert np.allclose(np.load(folder / "scores.npy"), expected, rtol=1e-4, atol=1e-5)


def test_query_splits_and_losses(cli, tiny, workspace):
    """--split train of the data set; --query_loss all counts the prompt too."""
    log = extract(cli, tiny / "gpt2", "--rank", 4, "--block_size", 32)
    status, out, err = cli("compute_influence", "--log_dir", "log", "--split", "train", "--max_queries", 6)
    assert status == 0, err
    folder = next(Path("log/scores").glob("train-*"))
    scores = np.load(folder / "scores.npy")
    assert scores.shape == (6, log.examples)
    assert (scores.argmax(1) == np.arange(6)).mean() > 0.5, "an example mostly has its greatest influence on itself"
    response, _ = influence(cli, "--query_loss", "response")
    every, _ = influence(cli, "--query_loss", "all")
    assert np.allclose(response[:2], every[:2]) and not np.allclose(response[2], every[2])


def test_damping_is_in_the_scores(cli, tiny, workspace):
    """--damping and --damping_absolute change the scores each time, and the folder's name."""
    extract(cli, tiny / "gpt2", "--rank", 4, "--hessian", "kfac")
    flags = [("--damping", 0.1), ("--damping", 0.3), ("--damping_absolute", 0.5)]
    results = [influence(cli, *f) for f in flags]
    assert len({folder.name for _, folder in results}) == 3
    for (one, _), (two, _) in zip(results, results[1:], strict=False):
        assert np.abs(one - two).max() > 1e-3 * np.abs(one).max()


def test_reference_loss_is_the_models(tiny):
    """The reference's own loss is transformers' mean loss times the tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "gpt2").double()
    ids = [5, 6, 7, 8, 9]
    expected = F.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum")
    assert abs(reference.example_loss(model, ids) - expected.item()) < 1e-9


def test_layerwise_scores_add_up(cli, tiny, workspace):
    """--layerwise: a matrix a transformer block, whose sum is the dot."""
    extract(cli, tiny / "gpt2", "--rank", 4, "--hessian", "ekfac")
    scores, folder = influence(cli, "--layerwise")
    parts = np.load(folder / "layer_scores.npy")
    assert json.loads((folder / "run.json").read_text())["blocks"] == ["transformer.h.0", "transformer.h.1"]
    assert parts.shape == (2, *scores.shape) and close(parts.sum(axis=0), scores)
    one, _ = influence(cli, "--score_layers", r"h\.1\.")
    assert not close(parts[0], parts[1])
    assert close(parts[1], one)


def test_a_group_of_queries_is_their_mean(cli, tiny, workspace):
    """--group_by: rows with the same value are one query, whose scores are the mean of its members'."""
    rows = [json.loads(line) for line in open("queries.jsonl")]
    labels = ["x", "y", "x"]
    text = "".join(json.dumps(row | {"kind": kind}) + "\n" for row, kind in zip(rows, labels, strict=True))
    Path("queries.jsonl").write_text(text)
    extract(cli, tiny / "gpt2", "--rank", 4, "--hessian", "ekfac")
    each, _ = influence(cli)
    groups, folder = influence(cli, "--group_by", "kind")
    assert close(groups, np.stack([(each[0] + each[2]) / 2, each[1]]))
    assert [json.loads(line)["id"] for line in open(folder / "queries.jsonl")] == ["x", "y"]
    status, out, err = cli("analysis", "--log_dir", "log", "--top_k", 2)
    assert status == 0, err


@pytest.mark.parametrize(
    "flags", ["--mode cosine --damping 0.1 1", "--mode l2 --damping 0.1 --top_k_only 4", "--mode dot --damping 0.1"]
)
def test_memory_that_runs_out_for_queries(cli, tiny, workspace, monkeypatch, flags):
    """A pass for which memory runs out is taken again with half of the queries; the scores are the same."""
    extract(cli, tiny / "llama", "--rank", 4, "--hessian", "ekfac", "--shard_examples", 5)
    results = []
    score_shards = influence_module.score_shards

    def short(open_shard, shards, queries, *rest):
        for number, scored in enumerate(score_shards(open_shard, shards, queries, *rest)):
            if number == 2 and len(next(iter(queries.values()))) > 2 * (1 + flags.endswith(" 1")):
                raise torch.OutOfMemoryError("simulated")
            yield scored

    for scorer in (score_shards, short):
        monkeypatch.setattr(influence_module, "score_shards", scorer)
        status, out, err = cli("compute_influence", *QUERIES, *flags.split())
        assert status == 0, err
        (path,) = Path("log/scores").glob("*-0.1/top.safetensors" if "top" in flags else "*-0.1/scores.npy")
        tensors = load_file(path) if "top" in flags else {"scores": torch.from_numpy(np.load(path))}
        results.append(tensors)
        shutil.rmtree("log/scores"), shutil.rmtree("log/self_influence", ignore_errors=True)
    assert "out of memory with 3 queries in a pass; going on with 1" in out
    assert all(torch.allclose(results[0][key].double(), results[1][key].double(), rtol=1e-4) for key in results[0])
