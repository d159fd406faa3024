"""The four stages through their command lines: exact scores, resuming, what is written, who is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import reference
import torch
from conftest import make_model, make_texts, make_tokenizer, write_jsonl
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from logra import store
from logra.run_dir import RunDir
from logra.runtime import files

DATA = ("--data_name", "docs.jsonl", "--log_dir", "log")
QUERIES = ("--log_dir", "log", "--split", "queries.jsonl")


def extract(cli, model: Path, *flags):
    status, out, err = cli("extract_log", "--model_name", model, *DATA, *flags)
    assert status == 0, err
    return RunDir.load(Path("log"))


def influence(cli, *flags) -> tuple[np.ndarray, Path]:
    status, out, err = cli("compute_influence", *QUERIES, *flags)
    assert status == 0, err
    folder = Path(next(line for line in out.splitlines() if " in " in line).split(" in ")[1])
    return np.load(folder / "scores.npy"), folder


def stored_gradients(log: RunDir) -> dict[str, torch.Tensor]:
    every = range(len(log.shards))
    return {layer: torch.cat(list(log.read(layer, every))) for layer in log.layers}


def hessian_tensors(log: RunDir, kind: str) -> dict[str, torch.Tensor]:
    path = log.hessian_path(kind)
    return store.load_tensors(
        path, files.read_json(path.with_suffix(".json"), "")["checksums"], log.hessian_layout(kind)
    )


def close(one: np.ndarray, two: np.ndarray) -> bool:
    return np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(two)


@pytest.mark.parametrize("mode", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "llama_tied"])
def test_unprojected_raw_is_the_exact_fisher_influence(cli, tiny, workspace, name, mode):
    """--lora none and no compression: q^T (C + lambda I)^-1 z with the full gradients' dense covariance."""
    log = extract(cli, tiny / name, "--lora", "none", "--hessian", "raw", "--mlp_only", "--max_examples", 12)
    scores, _ = influence(cli, "--mode", mode)
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
    expected = {"dot": dots, "cosine": dots / own.sqrt(), "l2": dots - own / 2}[mode].numpy()
    assert np.linalg.norm(scores - expected) < 1e-3 * np.linalg.norm(expected)


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


def test_what_is_written(cli, tiny, workspace):
    """The run directory of DESIGN: readable with plain safetensors, numpy, datasets and json."""
    from datasets import load_from_disk
    from safetensors.torch import load_file

    flags = ("--hessian", "ekfac", "--rank_in", 3, "--rank_out", 4, "--block_size", 16, "--shard_examples", 7)
    log = extract(cli, tiny / "llama", *flags)
    train = load_from_disk("log/train")
    assert log.examples == len(train) > 20 and log.settings.block_size == 16
    assert json.load(open("log/run.json"))["arguments"]["hessian"] == "ekfac"
    total = 0
    for index, ids in enumerate(log.shards):
        grads = load_file(f"log/gradients/{index:05d}.safetensors")
        manifest = json.load(open(f"log/gradients/{index:05d}.json"))
        assert manifest["first_example"] == ids.start and manifest["examples"] == len(ids)
        assert {tuple(g.shape) for g in grads.values()} == {(len(ids), 12)} and set(grads) == set(log.layers)
        total += len(ids)
    assert total == len(train)
    sums = load_file("log/hessian/ekfac.safetensors")
    squares = sum(g.double().square().sum(0) for g in log.read(next(iter(log.layers)), range(len(log.shards))))
    assert torch.allclose(sums[f"{next(iter(log.layers))}.square"].flatten(), squares, rtol=1e-5)
    scores, folder = influence(cli, "--mode", "cosine", "--self_influence")
    assert scores.shape == (3, len(train)) and scores.dtype == np.float32
    assert (np.load(folder / "self_influence.npy") >= 0).all()
    assert [json.loads(line)["id"] for line in open(folder / "queries.jsonl")] == ["0", "1", "pr"]
    assert not list(Path("log").rglob("*.tmp")) and not Path("log/work").exists()
    status, out, err = cli(
        "analysis", "--log_dir", "log", "--top_k", 5, "--bottom", "--by", "document", "--combine", "max"
    )
    assert status == 0, err
    rows = [json.loads(line) for line in open(folder / "top_k.jsonl")]
    assert len(rows) == 3 * 2 * 5
    first = [row for row in rows if row["query"] == "pr" and row["side"] == "top"]
    assert first[0]["score"] == scores[2].max() and [row["rank"] for row in first] == [1, 2, 3, 4, 5]
    assert len({row["document"] for row in first}) == 5
    assert all(train[row["example"]]["text"] == row["text"] for row in rows)
    assert "top_k.jsonl" in out and first[0]["document"] in out
    assert first[0]["text"].strip() in open(folder / "top_k.txt").read()


def test_a_second_start_computes_only_what_is_missing(cli, tiny, workspace):
    """Finished shards are kept as they are; a deleted, altered or truncated one is found and computed again alone."""
    log = extract(cli, tiny / "gpt2", "--shard_examples", 4, "--rank", 4)
    before, times = stored_gradients(log), {p: p.stat().st_mtime_ns for p in log.folder.glob("gradients/*")}
    kinds = ("gradients", "factors", "manifest")
    shards = [{kind: log.shard(index).path(kind) for kind in kinds} for index in range(5)]
    shards[1]["manifest"].unlink()
    content = bytearray(shards[2]["gradients"].read_bytes())
    content[-5] ^= 4
    shards[2]["gradients"].write_bytes(content)
    shards[3]["factors"].write_bytes(shards[3]["factors"].read_bytes()[:-8])
    shards[0]["manifest"].rename("kept.json")
    shards[0]["manifest"].write_text("{")
    status, _, err = cli("compute_influence", *QUERIES)
    assert status == 2 and "00000.json" in err
    Path("kept.json").rename(shards[0]["manifest"])
    for index, words in ((1, "missing"), (2, "altered")):
        status, _, err = cli("compute_influence", *QUERIES)
        assert status == 2 and words in err and f"{index:05d}" in err and len(err.splitlines()) == 1
        if index == 1:
            files.write_json(shards[1]["manifest"], {"first_example": 4, "examples": 4})
            assert cli("compute_influence", *QUERIES)[0] == 2
            shards[1]["manifest"].unlink()
            extract(cli, tiny / "gpt2", "--shard_examples", 4, "--rank", 4)
            content[-5] ^= 4
            shards[2]["gradients"].write_bytes(b"x" + bytes(content[1:]))
    log = extract(cli, tiny / "gpt2", "--shard_examples", 4, "--rank", 4)
    for layer, grads in stored_gradients(log).items():
        assert torch.allclose(grads, before[layer], rtol=1e-5, atol=1e-6)
    for path, time in times.items():
        if path.name.startswith(("00000", "00004")):
            assert path.stat().st_mtime_ns == time, path


def test_another_hessian_needs_no_model_and_no_data(cli, tiny, workspace):
    """--hessian X on a finished log, with model and data gone; the same as a fresh run's."""
    shutil.copytree(tiny / "llama", "model")
    extract(cli, Path("model"), "--rank", 4)
    expected = {}
    for kind in ("kfac", "ekfac"):
        fresh = ("--log_dir", f"log_{kind}", "--hessian", kind, "--basis", "projected", "--rank", 4)
        assert cli("extract_log", "--model_name", "model", "--data_name", "docs.jsonl", *fresh)[0] == 0
        expected[kind] = hessian_tensors(RunDir.load(Path(f"log_{kind}")), kind)
    shutil.move("model", "elsewhere")
    Path("docs.jsonl").unlink()
    for kind in ("kfac", "ekfac"):
        status, _, err = cli("compute_influence", *QUERIES, "--hessian", kind)
        assert status == 2 and f"extract_log.py --log_dir log --hessian {kind}" in err
        assert cli("extract_log", "--log_dir", "log", "--hessian", kind)[0] == 0
        for key, tensor in hessian_tensors(RunDir.load(Path("log")), kind).items():
            assert torch.allclose(tensor, expected[kind][key], rtol=1e-4, atol=1e-6)
    shutil.move("elsewhere", "model")
    kfac, _ = influence(cli, "--hessian", "kfac")
    ekfac, _ = influence(cli, "--hessian", "ekfac")
    assert not np.allclose(kfac, ekfac)


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


def test_self_influence_is_kept_for_the_same_run_only(cli, tiny, workspace):
    """An altered file is computed again; so is one of another Hessian or of fewer examples."""
    extract(cli, tiny / "gpt2", "--rank", 4, "--hessian", "ekfac")
    expected, _ = influence(cli, "--mode", "cosine")
    (path,) = Path("log/self_influence").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert np.array_equal(influence(cli, "--mode", "cosine")[0], expected)
    write_jsonl(Path("more.jsonl"), [{"id": "new", "text": "the river ran"}])
    assert cli("extract_log", "--log_dir", "log", "--data_name", "more.jsonl", "--extend")[0] == 0
    more, _ = influence(cli, "--mode", "cosine", "--self_influence")
    assert more.shape[1] == expected.shape[1] + 1 and np.isfinite(more).all()


@pytest.mark.parametrize("mode", ["dot", "cosine"])
def test_top_k_only(cli, tiny, workspace, mode):
    """The running ends are those of the whole matrix; analysis reads them."""
    extract(cli, tiny / "llama", "--rank", 4, "--shard_examples", 3)
    scores, whole = influence(cli, "--mode", mode)
    status, out, err = cli("compute_influence", *QUERIES, "--mode", mode, "--top_k_only", 5)
    assert status == 0, err
    folder = Path(next(line for line in out.splitlines() if " in " in line).split(" in ")[1])
    assert folder != whole and not (folder / "scores.npy").exists()
    rows = []
    for place in (whole, folder):
        os.utime(place / "run.json")
        assert cli("analysis", "--log_dir", "log", "--top_k", 5, "--bottom")[0] == 0
        rows.append([json.loads(line) for line in open(place / "top_k.jsonl")])
    assert [(r["query"], r["rank"], r["example"]) for r in rows[0]] == [
        (r["query"], r["rank"], r["example"]) for r in rows[1]
    ]
    assert np.allclose([r["score"] for r in rows[0]], [r["score"] for r in rows[1]])
    status, out, _ = cli("analysis", "--log_dir", "log", "--top_k", 7)
    assert status == 0 and "5 of 7" in out


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


def test_a_bfloat16_model(cli, tiny, workspace):
    """--dtype bfloat16 through stages 2 and 3, which reads it from run.json: scores near float32's."""
    extract(cli, tiny / "llama", "--rank", 4)
    expected, _ = influence(cli)
    log = extract(cli, tiny / "llama", "--rank", 4, "--overwrite", "--dtype", "bfloat16")
    got, _ = influence(cli)
    assert log.settings.dtype == "bfloat16"
    assert 0 < np.linalg.norm(got - expected) < 0.3 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_store_dtypes(cli, tiny, workspace, dtype):
    """Half-precision stores: scores within 2% of float32's."""
    extract(cli, tiny / "llama", "--rank", 4, "--hessian", "ekfac")
    expected, _ = influence(cli)
    extract(cli, tiny / "llama", "--rank", 4, "--hessian", "ekfac", "--overwrite", "--store_dtype", dtype)
    got, _ = influence(cli)
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)


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


def test_generated_tokens_are_attributed_as_they_are(cli, tiny, workspace):
    """Stage 1 stores exact token ids; stage 3 uses them, and refuses another model's."""
    prompts = ["the river", "the old mill and the dog", "water"]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n")
    shutil.copytree(tiny / "llama", "m/tiny")
    outputs = {}
    for size in (1, 3):
        flags = ("--prompts", "prompts.txt", "--temperature", 0, "--max_new_tokens", 7, "--batch_size", size)
        assert cli("generate", "--model_name", "m/tiny", *flags)[0] == 0
        outputs[size] = [json.loads(line) for line in open("data/generated/tiny/queries.jsonl")]
    for one, three in zip(outputs[1], outputs[3], strict=True):
        assert one["response_ids"] == three["response_ids"] and one["response"] == three["response"]
        assert one["prompt_ids"] == make_tokenizer()(one["prompt"])["input_ids"]
    flags = ("--prompts", "prompts.txt", "--max_new_tokens", 5, "--num_return_sequences", 2, "--seed", 3)
    for _ in range(2):
        assert cli("generate_llama3", "--model_name", "m/tiny", *flags)[0] == 0
        outputs[_] = [json.loads(line) for line in open("data/generated/tiny/queries.jsonl")]
    assert outputs[0] == outputs[1] and [r["id"] for r in outputs[0]] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    assert outputs[0][0]["prompt_ids"][0] == 1 and outputs[0][0]["settings"]["temperature"] == 0.6
    extract(cli, Path("m/tiny"), "--rank", 4)
    status, out, err = cli("compute_influence", "--log_dir", "log", "--model_name", "m/tiny")
    assert status == 0 and "6 queries" in out, err
    shutil.copytree("m/tiny", "other/tiny")
    assert cli("extract_log", "--model_name", "other/tiny", "--data_name", "docs.jsonl", "--log_dir", "log2")[0] == 0
    status, _, err = cli("compute_influence", "--log_dir", "log2")
    assert status == 2 and "m/tiny" in err


def test_generation_stops_at_both_ends(tiny):
    """A response ends with the EOS token, or the end of a turn, included; nothing follows."""
    from logra.stages.generate import _until_end, end_token_ids

    ends = end_token_ids(make_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny / "llama"))
    assert ends == [2, 3]
    assert _until_end([5, 6, 3, 9, 2], set(ends)) == [5, 6, 3] and _until_end([5, 6], set(ends)) == [5, 6]


def test_runs_are_found_by_name(cli, tiny, workspace):
    """Stage 3 finds the run by the flags that stage 2 was given; a run in the other basis when none is asked for."""
    base = ("--model_name", tiny / "gpt2", "--data_name", "docs.jsonl", "--rank", 4, "--mlp_only")
    assert cli("extract_log", *base, "--hessian", "ekfac")[0] == 0
    assert [p.name for p in Path("logs").iterdir()] == ["gpt2_docs.jsonl_random4x4_eigen_mlp"]
    assert cli("compute_influence", *base, "--hessian", "ekfac", "--split", "queries.jsonl")[0] == 0
    status, _, err = cli(
        "compute_influence", *base, "--split", "queries.jsonl", "--hessian", "raw", "--basis", "projected"
    )
    assert status == 2 and "gpt2_docs.jsonl_random4x4_eigen_mlp" in err and "extract_log.py" in err
    assert cli("analysis")[0] == 0


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


def test_settings_that_are_read_from_the_run_are_said(cli, tiny, workspace):
    """A second start that leaves a flag out goes on with the run's value, and says so."""
    extract(cli, tiny / "gpt2", "--rank", 4, "--block_size", 9)
    status, out, _ = cli("extract_log", "--model_name", tiny / "gpt2", *DATA)
    assert status == 0 and "--block_size 9" in out and "--rank 4" in out
    status, out, _ = cli("extract_log", "--model_name", tiny / "gpt2", *DATA, "--rank", 4, "--block_size", 9)
    assert status == 0 and "As in" not in out
    status, out, _ = cli(
        "extract_log", "--log_dir", "both", *DATA[:2], "--model_name", tiny / "gpt2", "--rank", 4, "--rank_in", 3
    )
    assert set(map(tuple, RunDir.load(Path("both")).projected.values())) == {(4, 3)}, "--rank_in goes before --rank"
