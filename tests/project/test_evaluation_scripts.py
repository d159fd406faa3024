"""Scripts of evaluation/ that make their own data: values by hand, resuming, bad input."""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, edit_json, save_model, vouch, write_jsonl
from helpers import check

from logra.runtime import files
from logra.scoring import reranked

NAMES = ("planted", "tail_patch", "brittleness", "mixed_in", "selection")

SCRIPTS = {name: importlib.import_module(f"evaluation.{name}") for name in NAMES}

planted, tail_patch, mixed_in = SCRIPTS["planted"], SCRIPTS["tail_patch"], SCRIPTS["mixed_in"]

testbed, scored = planted.testbed, planted.scored


def make_scores(cli, model: Path, docs: Path, queries: Path, scores: np.ndarray | None = None, *flags) -> Path:
    """Run the pipeline into logs/run; put other scores in the place of its own; return their folder."""
    assert cli("extract_log", "--log_dir", "logs/run", "--model_name", model, "--data_name", docs, "--rank", 4)[0] == 0
    assert cli("compute_influence", "--log_dir", "logs/run", "--split", queries, *flags)[0] == 0
    (folder,) = [path.parent for path in Path("logs/run/scores").glob("*/run.json")]
    if scores is not None:
        np.save(folder / "scores.npy", scores.astype(np.float32))
        vouch(folder)
    return folder


def table(out: str) -> dict[str, list[float]]:
    """Return the means in each row of a printed table."""
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    return {line[0]: [float(cell.split(" ")[0]) for cell in line[1:] if cell.strip()] for line in lines}


def test_corpus():
    """The same seed gives the same corpus; a fact's documents hold subject and answer, no other fact document does."""
    corpus, queries, facts = planted.make_corpus(12, 3, 20, seed=1)
    assert (corpus, queries, facts) == planted.make_corpus(12, 3, 20, seed=1) != planted.make_corpus(12, 3, 20, seed=2)
    texts = {row["id"]: row["text"] for row in corpus}
    assert len(texts) == len(corpus) == 12 * (3 + 3) + 20 and set(facts) == {query["id"] for query in queries}
    for query in queries:
        documents = facts[query["id"]]
        assert documents == [f"{query['id']}-{i}" for i in range(3)]
        told = [text for name, text in texts.items() if name in documents]
        (subject,) = set.intersection(*(set(re.findall(r"\b[A-Z]\w{6}\b", text)) for text in [query["prompt"], *told]))
        assert all(subject in text.split(query["response"])[0] for text in told)
        assert not any(text.startswith(query["prompt"]) for text in texts.values()), "the wording is another one"
        others = [text for name, text in texts.items() if name.startswith("fact") and name not in documents]
        assert not any(subject in text for text in others)
        both = [text for name, text in texts.items() if name.startswith("distractor") and subject in text]
        both = [text for text in both if query["response"].strip() in text]
        assert len(both) == 1 and all(text.index(query["response"].strip()) < text.index(subject) for text in both)


def test_measures_by_hand():
    """Planted documents on ranks 1 and 3 of 12, and on 4 and 12: recall@2, recall@10 and MRR; ties by position."""
    marks = np.zeros((2, 12), bool)
    marks[0, [5, 7]], marks[1, [3, 11]] = True, True
    scores = np.stack([np.array([0, 0, 0, 0, 0, 9, 8, 7, 0, 0, 0, 0]), np.zeros(12)])
    found = {name: values.tolist() for name, values in planted.measures(scores, marks).items()}
    assert found == {"recall@2": [0.5, 0], "recall@10": [1, 0.5], "MRR": [1, 0.25]}


def test_planted_facts(cli, workspace):
    """Perfect scores have recall 1; the model is made once; other settings, or others' scores, are one line."""
    flags = ("--num_facts", 4, "--num_filler", 10, "--epochs", 1)
    assert cli("evaluation.planted", "facts", *flags)[0] == 0
    ids = [row["id"] for row in scored.read_rows(Path("facts/corpus.jsonl"))]
    facts = files.read_json(Path("facts/facts.json"), "")
    perfect = np.array([np.isin(ids, documents) for documents in facts.values()])
    folder = make_scores(cli, Path("facts/model"), Path("facts/corpus.jsonl"), Path("facts/queries.jsonl"), perfect)
    made = os.stat("facts/model").st_mtime_ns
    status, out, _ = cli("evaluation.planted", "facts", folder)
    assert status == 0 and os.stat("facts/model").st_mtime_ns == made and out.startswith("Share of the 4 facts")
    rows = table(out)
    assert rows[str(folder)] == [1, 1, 1] and rows["random"][0] < 1 and len(rows) == 4
    for more in (("--seed", 3), ("--paraphrases", 2)):
        status, _, error = cli("evaluation.planted", "facts", *more)
        assert status == 2 and len(error.splitlines()) == 1 and "use another folder" in error
    status, _, error = cli("evaluation.planted", "more", "--paraphrases", 5)
    assert status == 2 and error.endswith("expected --paraphrases of at most 3, got 5; lower it")
    write_jsonl(Path("facts/corpus.jsonl"), scored.read_rows(Path("facts/corpus.jsonl"))[1:])
    status, _, error = cli("evaluation.planted", "facts", folder)
    assert status == 2 and len(error.splitlines()) == 1 and "score these" in error


def test_fine_tuning(cli, workspace):
    """--model_name is trained on: the loss of the corpus falls, and the tokenizer is its own."""
    model = save_model(workspace / "tiny", "llama", context=256)
    flags = ("--num_facts", 2, "--num_filler", 2, "--epochs", 3, "--model_name", model)
    assert cli("evaluation.planted", "facts", *flags)[0] == 0
    before, after = (planted.load_model(str(path), torch.float32) for path in (model, "facts/model"))
    ids = planted.load_tokenizer("facts/model")([row["text"] for row in scored.read_rows(Path("facts/corpus.jsonl"))])
    assert testbed.losses(after, ids["input_ids"]).sum() < testbed.losses(before, ids["input_ids"]).sum()


def test_tail_patch(cli, workspace, tiny):
    """A step on a query's own text raises its log-probability, more than one on random texts; and it is kept."""
    docs = scored.read_rows(workspace / "docs.jsonl")
    queries = write_jsonl(workspace / "own.jsonl", docs[:6])
    folder = make_scores(cli, tiny / "gpt2", workspace / "docs.jsonl", queries, np.eye(6, 20))
    flags = ("evaluation.tail_patch", folder, "--k", 1, "--learning_rate", 1e-3)
    assert table(cli(*flags, "--max_queries", 2)[1])[str(folder)][0] == 2
    (kept,) = folder.glob("tail_patch-*.json")
    half = json.loads(kept.read_text())["changes"]
    status, out, _ = cli(*flags)
    every = json.loads(kept.read_text())["changes"]
    assert status == 0 and every[:2] == half and len(every) == 6
    count, top, random, _, difference, raised, share = table(out)[str(folder)]
    assert (
        count == 6
        and top > 0
        and difference > 0
        and share > 0.8
        and raised > 0.8
        and top == pytest.approx(random + difference, abs=0.002)
    )
    edit_json(kept, lambda content: content.update(changes=[[3, 2, 1]] * 3 + [[-1, -2, -3]] * 3))
    assert table(cli(*flags)[1])[str(folder)] == [6, 1, 0, -1, 1, 0.5, 1], "nothing is measured again"
    status, _, error = cli("evaluation.tail_patch", folder, "--k", 21)
    assert status == 2 and len(error.splitlines()) == 1 and "expected --k of at most 20" in error
    write_jsonl(queries, docs[1:7])
    status, _, error = cli("evaluation.tail_patch", folder, "--k", 2)
    assert status == 2 and len(error.splitlines()) == 1 and "restore it, or score again" in error


def test_step_of_a_fixed_length(tiny):
    """A step is learning_rate times the weights' norm long, against the gradient; then the weights are as before."""
    model = planted.load_model(str(tiny / "llama_tied"), torch.float32)
    patch, seen = tail_patch.Patch(model, 0.01), []
    loss, before = patch.loss, [weight.clone() for weight in patch.weights]

    def spy(*text):
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return loss(*text)

    patch.loss, text = spy, ([5, 6, 7, 8, 9], None)
    change = patch.change([text, text], ([5, 6, 7, 8], [False, False, True, True]))
    assert change > 0 and float((seen[-1] - seen[0]).norm() / seen[0].norm()) == pytest.approx(0.01, rel=1e-3)
    assert all(torch.equal(p, weight) for p, weight in zip(model.parameters(), before, strict=True))
    loss(*text).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.cosine_similarity(seen[0] - seen[-1], gradient, dim=0) > 0.999


def make_testbed(folder: Path, docs: list[dict]) -> Path:
    """Write a testbed of 8 texts and 2 queries with a model that is not trained."""
    tokenizer = testbed.make_tokenizer([row["text"] for row in docs], 300)
    tokenizer.save_pretrained(folder / "model")
    config = testbed.make_config("gpt2", 1, 8, 300, 128)
    testbed.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    settings = {"architecture": "gpt2", "num_layers": 1, "width": 8, "vocabulary": 300, "epochs": 2, "seed": 0}
    files.write_json(folder / "testbed.json", settings)
    write_jsonl(folder / "train.jsonl", docs[:8])
    write_jsonl(folder / "queries.jsonl", docs[8:10])
    return folder


def test_brittleness(cli, workspace, monkeypatch):
    """The rises are those of the models without the removed texts; a second start trains nothing."""
    bed = make_testbed(workspace / "bed", scored.read_rows(workspace / "docs.jsonl"))
    scores = np.tile(np.arange(8), (2, 1))  # text 7, then 6, ...
    folder = make_scores(cli, bed / "model", bed / "train.jsonl", bed / "queries.jsonl", scores)
    flags = ("evaluation.brittleness", bed, folder, "--k", 2, "--num_queries", 2, "--num_random", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    status, out, error = cli(*flags)
    assert status == 0, error
    assert len(list((bed / "brittleness").glob("*.npy"))) == 3, "all texts, the random draw, both queries' top texts"
    tokenizer = planted.load_tokenizer(str(bed / "model"))
    texts, queries = (
        tokenizer([row["text"] for row in scored.read_rows(bed / f)])["input_ids"]
        for f in ("train.jsonl", "queries.jsonl")
    )
    config = testbed.make_config("gpt2", 1, 8, 300, 128)
    every, less = (testbed.losses(testbed.train(config, part, 2, order_seed=0), queries) for part in (texts, texts[:6]))
    assert table(out)[str(folder)][0] == pytest.approx((less - every).mean(), abs=0.002)
    monkeypatch.setattr(multiprocessing, "get_context", None)
    assert cli(*flags)[:2] == (0, out)
    for more, said in ((("--k", 8), "--k of at most 7"), (("--num_queries", 3), "--num_queries of at most 2")):
        status, _, error = cli(*flags, *more)
        assert status == 2 and len(error.splitlines()) == 1 and said in error
    write_jsonl(bed / "train.jsonl", scored.read_rows(bed / "train.jsonl")[::-1])
    status, _, error = cli(*flags)
    assert status == 2 and len(error.splitlines()) == 1 and "score these" in error


def test_rankings(cli, workspace, tiny):
    """Re-ranked: the K best candidates by new score, what is no candidate by stored score, the other candidates."""
    queries = write_jsonl(workspace / "queries.jsonl", scored.read_rows(workspace / "docs.jsonl")[:2])
    folder = make_scores(cli, tiny / "gpt2", workspace / "docs.jsonl", queries, None, "--rerank", 3)
    found = scored.load(folder)
    plain, again = scored.rankings(folder, found).values()
    assert (plain == found.scores).all()
    new = reranked.Reranked.load(folder, found.record, None)
    for query, row in enumerate(np.argsort(-again, axis=1)):
        values, stored = dict(zip(*new.candidates(query), strict=True)), found.scores[query]
        assert len(values) == 6 and sorted(row) == list(range(20))
        best = sorted(values, key=values.get, reverse=True)
        others = sorted(set(range(20)) - set(values), key=lambda i, stored=stored: -stored[i])
        assert row.tolist() == [*best[:3], *others, *best[3:]]
    ids = found.documents[::-1]
    of_documents = scored.by_document(folder, ids, found.queries)
    assert list(of_documents) == [str(folder), f"{folder}, re-ranked"]
    assert (of_documents[f"{folder}, re-ranked"] == again[:, ::-1]).all()


def test_average_precision_by_hand():
    """Relevant rows on ranks 1, 3 and 6: the mean of 1/1, 2/3 and 3/6. A z-score weighs each query the same."""
    relevant, scores = np.array([0, 1, 0, 1, 1, 0], bool), np.array([4.0, 1, 6, 5, 9, 3])
    assert mixed_in.average_precision(scores, relevant) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert mixed_in.average_precision(np.zeros(6), relevant) == pytest.approx((1 / 2 + 2 / 4 + 3 / 5) / 3)
    both = mixed_in.mean_z_score(np.stack([scores, 1000 * scores[::-1] + 7]))
    assert both == pytest.approx(both[::-1]) and mixed_in.mean_z_score(np.ones((2, 6))) == pytest.approx(np.zeros(6))


MIXED_IN = ("--num_pretraining", 40, "--num_manual", 30, "--num_mixed", 5, "--num_queries", 3, "--num_seeds", 1)


def test_mixed_in_rows():
    """Rows, decoys, queries and pretraining share no text; queries are no near copies; another seed, other rows."""
    args = mixed_in.build_parser().parse_args(["bed", *map(str, MIXED_IN)])
    parts = mixed_in.passages_of("turtle")
    assert not [text for part in parts for text in part if "turtle" in text.lower()]
    rows, pretraining = mixed_in.make_rows(parts, vars(args), 0)
    kinds = {name: [row["id"].split("-")[0] for row in part] for name, part in rows.items()}
    assert {name: len(part) for name, part in kinds.items()} == {"plain": 35, "decoys": 40, "queries": 3}
    assert kinds["plain"].count("mixed") == 5 == kinds["decoys"].count("decoy") and len(pretraining) == 40
    texts = [row["text"] for name in ("decoys", "queries") for row in rows[name]] + pretraining
    assert len(set(texts)) == len(texts) and not set(parts[0]) & set(pretraining)
    asked = [row["text"] for row in rows["queries"]]
    assert testbed.held_out(asked, [row["text"] for row in rows["plain"]]) == asked
    assert mixed_in.make_rows(parts, vars(args), 0)[0] == rows != mixed_in.make_rows(parts, vars(args), 1)[0]


def test_mixed_in_refuses(cli, workspace):
    """A package or a manual that is too small, and scores of other rows, are one line."""
    for flags, said in (
        (("--package", "turtle", "--num_mixed", 500), "expected a --package with 1040 passages, got turtle with"),
        (("--num_manual", 10**6), "lower it"),
    ):
        status, _, error = cli("evaluation.mixed_in", "bed", *flags)
        assert status == 2 and len(error.splitlines()) == 1 and said in error and not Path("bed").exists()
    status, _, error = cli("evaluation.mixed_in", "bed", "bed/1/plain/runs/best/scores/queries", *MIXED_IN)
    assert status == 2 and error.endswith("got bed/1/plain/runs/best/scores/queries; score a corpus.jsonl of bed")


def test_selection(cli, workspace):
    """Rows and target share no row; training on the target's own rows lowers its loss; bad counts are one line."""
    model = save_model(workspace / "tiny", "llama", context=256)
    flags = ("evaluation.selection", "bed", "--model_name", model, "--num_rows", 200, "--num_target", 3)
    assert cli(*flags)[:2] == (0, "")
    rows, target, random = (scored.read_rows(Path(f"bed/{name}.jsonl")) for name in ("rows", "target", "random"))
    assert len(rows) == 200 and len(target) == 3 and random == rows[:20]
    assert not {row["output"] for row in rows} & {row["output"] for row in target}
    packages = [[row["instruction"].split()[2].split(".")[0] for row in part] for part in (rows, target)]
    assert "email" in packages[0] and set(packages[1]) == {"email"}, "the rows hold some of the target's package"
    status, out, _ = cli(*flags[:2], "bed/target.jsonl", *flags[2:])
    number, before, after, change, to_first = table(out)["bed/target.jsonl"]
    assert (
        status == 0
        and number == 3
        and change < 0
        and to_first == 0
        and after == pytest.approx(before + change, abs=0.002)
    )
    status, _, error = cli("evaluation.selection", "more", "--model_name", model, "--num_target", 10**6)
    assert status == 2 and len(error.splitlines()) == 1 and "expected --num_target of at most" in error


@pytest.mark.slow
def test_the_reduced_mixed_in_rows(tmp_path):
    """REDUCED=1 makes rows, models, runs and the table from nothing: each method has a mean of both variants."""
    environment = os.environ | {"REDUCED": "1", "TESTBEDS": str(tmp_path)}
    command = ["bash", ROOT / "evaluation/mixed_in.sh", "gpt2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = table(done.stdout)
    names = {"best, dot-ekfac-0.2", "best, cosine-ekfac-0.2", "paper, dot-raw-0.1", "paper, cosine-raw-0.1"}
    assert set(found) == names | {"paper, dot-none-0.1", "bm25", "embedding", "random"}
    assert all(len(row) == 2 and min(row) > 0 and max(row) <= 1 for row in found.values())


@pytest.mark.parametrize("name", NAMES[:3])
def test_folders_without_scores(cli, workspace, tiny, name):
    """No folder of scores, or one of --top_k_only, is one line that says what to give."""
    if name == "planted":
        assert cli("evaluation.planted", "first", "--num_facts", 1, "--num_filler", 1, "--epochs", 1)[0] == 0
    first = {
        "planted": ["first"],
        "tail_patch": [],
        "brittleness": [make_testbed(workspace / "bed", scored.read_rows(workspace / "docs.jsonl"))],
    }[name]
    more = ("--k", 2, "--num_queries", 1) if name == "brittleness" else ()
    status, _, error = cli(f"evaluation.{name}", *first, "nowhere", *more)
    assert status == 2 and len(error.splitlines()) == 1 and "give a folder under logs/<run>/scores/" in error
    folder = make_scores(
        cli, tiny / "gpt2", workspace / "docs.jsonl", workspace / "queries.jsonl", None, "--top_k_only", 3
    )
    status, _, error = cli(f"evaluation.{name}", *first, folder, *more)
    assert status == 2 and len(error.splitlines()) == 1 and "score without --top_k_only" in error


@pytest.mark.parametrize("name", NAMES)
def test_command_lines(name):
    """The commands in the docstring parse, every flag is read, and no script is longer than 200 lines."""
    source = (ROOT / f"evaluation/{name}.py").read_text()
    commands = [line.strip() for line in SCRIPTS[name].__doc__.splitlines() if line.strip().startswith("python ")]
    assert commands and all(check(command) for command in commands) and len(source.splitlines()) <= 200
    flags = {action.dest for action in SCRIPTS[name].build_parser()._actions} - {"help"}
    source += (ROOT / "evaluation/testbed.py").read_text()  # it reads settings too
    assert all(re.search(rf'args\.{flag}\b|settings\["{flag}"\]', source) for flag in flags), flags


def test_interval():
    """The interval of equal values is a point; else it holds the mean, and is about 4 standard errors wide."""
    assert scored.interval(np.full(5, 2.0)) == "2.000 [2.000, 2.000]"
    values = np.random.default_rng(0).standard_normal(400)
    mean, low, high = map(float, re.findall(r"-?[\d.]+", scored.interval(values)))
    assert low < mean < high and high - low == pytest.approx(4 * 1 / 20, rel=0.15)
