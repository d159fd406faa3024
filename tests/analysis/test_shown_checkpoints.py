"""Stage 4 on combined scores: what it shows of each checkpoint, and that the parts add up to the score."""

import contextlib
import csv
import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import lds
import numpy as np
import pytest
import scored
import torch
from conftest import edit_json, make_model, make_tokenizer, run_cli, vouch, write_workspace
from helpers import extract, influence, refused
from reference import full_gradient, layer_io

from logra.analysis import report, tokens
from logra.run_dir import RunDir
from logra.runtime import files
from logra.runtime.settings import MODES
from logra.scoring.parts import read_factors
from logra.scoring.rank import read_record, scored_runs

NAMES = ["checkpoint-9", "checkpoint-10", "checkpoint-30"]  # sorted by number
AGAIN = "run compute_influence.py again"


@pytest.fixture(scope="session")
def trajectory(tmp_path_factory) -> Path:
    """A folder of three tiny Llamas that stand for checkpoints of one training."""
    root = tmp_path_factory.mktemp("trajectory")
    for seed, name in enumerate(NAMES):
        make_model("llama", seed=seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


DATA = ("--data_name", "docs.jsonl", "--log_dir", "parent", "--block_size", 16)
QUERIES = ("--log_dir", "parent", "--split", "queries.jsonl")


@pytest.fixture(scope="session")
def scored_trajectory(trajectory, tmp_path_factory) -> Path:
    """The runs of the three checkpoints, with combined dot scores of the queries."""
    root = tmp_path_factory.mktemp("scored_trajectory")
    write_workspace(root)
    with contextlib.chdir(root):
        assert run_cli("extract_log", "--checkpoints", f"{trajectory}/*", *DATA, "--rank", 5, "--hessian", "ekfac") == 0
        assert run_cli("compute_influence", *QUERIES) == 0
    return root / "parent"


@pytest.fixture
def parent(scored_trajectory, workspace) -> Path:
    """A copy of scored_trajectory: parent/, beside its documents and queries."""
    return Path(shutil.copytree(scored_trajectory, "parent"))


def dot_scores() -> Path:
    """Return the folder of the combined scores that a new copy has."""
    return next(Path("parent/scores").iterdir())


def combined(cli, *flags) -> Path:
    """Score parent/, and return the folder of the combined scores."""
    status, out, err = cli("compute_influence", *QUERIES, *flags)
    assert status == 0, err
    return Path(re.findall("in (parent/scores/.*)", out)[-1])


def analyse(cli, folder: Path, *flags) -> tuple[list[dict], str]:
    """Run stage 4 with --bottom; return the rows of top_k.jsonl and the page."""
    status, _, err = cli("analysis", "--log_dir", "parent", "--bottom", "--top_k", 4, *flags)
    assert status == 0, err
    return [json.loads(line) for line in open(folder / "top_k.jsonl")], (folder / "report.html").read_text()


def own_scores(folder: Path) -> list[np.ndarray]:
    """Return the scores [Q, N] of each checkpoint, float64, from its own folder."""
    record = json.loads((folder / "run.json").read_text())
    folders = [next(Path("parent", c["run"], "scores").glob(f"{c['scores']}-*")) for c in record["checkpoints"]]
    return [np.load(path / "scores.npy").astype(np.float64) for path in folders]


def shown_parts(source: str) -> list[dict[str, float]]:
    """Return the parts on each card of the page."""
    lists = re.findall('<ol class="checkpoints".*?</ol>', source, re.DOTALL)
    return [{name: float(part) for name, part in re.findall("<span>(.*?)</span> (.*?)</li>", row)} for row in lists]


@pytest.mark.parametrize("by", [(), ("--by", "document"), ("--by", "document", "--combine", "max")])
def test_parts_by_checkpoint(cli, parent, by):
    """A row's parts are factor times the checkpoint's score, of all its examples; every list and card shows them."""
    folder = combined(cli, "--checkpoint_weights", 1, 2, 5)
    rows, source = analyse(cli, folder, *by)
    factors, own = np.load(folder / "factors.npy"), own_scores(folder)
    owners = np.array(RunDir.load(Path("parent", NAMES[0])).train()["document_id"])
    assert len(rows) == 2 * 3 * 4 and {row["examples"] for row in rows} != {1} if by else True
    for row in rows:
        query = ["0", "1", "pr"].index(row["query"])
        ids = np.flatnonzero(owners == row["document"]) if row["combine"] == "sum" else [row["example"]]
        expected = [f[query] * scores[query, ids].sum() for f, scores in zip(factors, own, strict=True)]
        assert row["checkpoints"] == pytest.approx(dict(zip(NAMES, expected, strict=True)), rel=1e-6)
        assert list(row["checkpoints"]) == NAMES
        scale = np.abs(expected).sum()
        assert sum(row["checkpoints"].values()) == pytest.approx(row["score"], abs=1e-5 * scale)
    with open(folder / "top_k.csv", encoding="utf-8", newline="") as file:
        assert [json.loads(row["checkpoints"]) for row in csv.DictReader(file)] == [row["checkpoints"] for row in rows]
    lines = [line for line in (folder / "top_k.txt").read_text().splitlines() if line.startswith("by checkpoint: ")]
    assert lines[0] == "by checkpoint: " + ", ".join(f"{n} {p:+.4g}" for n, p in rows[0]["checkpoints"].items())
    shown = shown_parts(source)
    assert len(lines) == len(shown) == len(rows)
    for row, parts in zip(rows, shown, strict=True):
        assert parts == pytest.approx(row["checkpoints"], rel=6e-3)
    for name, weight in zip(NAMES, ("0.125", "0.25", "0.625"), strict=True):
        assert f"<code>{name}</code> (weight {weight})" in source
    assert "divided by its standard deviation over the train examples for that query, times" in source
    assert "<title>Influence: parent</title>" in source and "<dt>run</dt><dd>parent</dd>" in source


def test_parts_of_few_scores(cli, parent):
    """--top_k_only: the same parts, without the checkpoints' own scores; documents' maxima too."""
    expected, _ = analyse(cli, dot_scores())
    folder = combined(cli, "--top_k_only", 4)
    found, source = analyse(cli, folder)
    for one, two in zip(found, expected, strict=True):
        assert one["example"] == two["example"] and one["checkpoints"] == pytest.approx(two["checkpoints"], rel=1e-4)
    assert len(shown_parts(source)) == len(found)
    rows, _ = analyse(cli, folder, "--by", "document", "--combine", "max")
    assert all(sum(row["checkpoints"].values()) == pytest.approx(row["score"], rel=1e-4) for row in rows)


def test_ordinary_runs_show_no_checkpoints(cli, tiny, workspace):
    """Neither a column, nor a line, nor a word or a style of the page."""
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac")
    _, folder = influence(cli)
    assert cli("analysis", "--log_dir", "log")[0] == 0
    for name in ("report.html", "top_k.jsonl", "top_k.csv", "top_k.txt"):
        assert "checkpoint" not in (folder / name).read_text()


def test_bars_of_parts():
    """All bars stand on one line, which is at the top if no part is positive; heights are in proportion."""
    bars = report.checkpoint_bars({"a": 3.0, "b": -1.0, "c": 0.0})
    assert [(bar.zero, bar.y, bar.height) for bar in bars] == [(75, 0, 75), (75, 75, 25), (75, 75, 0)]
    assert [(bar.zero, bar.y, bar.height) for bar in report.checkpoint_bars({"a": -2.0})] == [(0, 0, 100)]
    assert [bar.height for bar in report.checkpoint_bars({"a": 0.0, "b": 0.0})] == [0, 0]


def shares(folder: Path, shown: list[list[int]]) -> tokens.Split:
    """Return the shares of combined scores, each checkpoint's by a splitter of its own."""
    runs = scored_runs(folder)
    record = read_record(folder, runs[-1])
    splits = [tokens.TokenSplitter(run, record, False).split(run.train(), shown, shown) for run in runs]
    return tokens.combine(splits, read_factors(folder, record))


@pytest.mark.parametrize("mode", MODES)
def test_shares_add_up_to_the_combined_score(cli, parent, mode):
    """By token, by block of layers and (--layerwise) in the page; a query's tokens to its combined dots."""
    dots = own_scores(dot_scores())
    folder, shown = combined(cli, "--mode", mode, "--layerwise"), [[0, 3, 7], [3], [19, 2]]
    scores, factors = np.load(folder / "scores.npy"), np.load(folder / "factors.npy")
    found = shares(folder, shown)
    assert set(found.pairs) == {(q, e) for q, row in enumerate(shown) for e in row}
    for (q, e), pair in found.pairs.items():
        limit = 1e-4 * pair.tokens.abs().sum().item()
        assert pair.tokens.dtype == torch.float64 and abs(pair.tokens.sum().item() - scores[q, e]) <= limit
        assert abs(sum(pair.blocks.values()) - scores[q, e]) <= limit and len(pair.blocks) == 2
    for q, ids in enumerate(shown):
        expected = sum(f[q] * of[q, ids].sum() for f, of in zip(factors, dots, strict=True))
        of_query = found.queries[q]
        assert abs(of_query.sum().item() - expected) <= 1e-4 * of_query.abs().sum().item()
    rows, source = analyse(cli, folder)
    figure = re.search('<div class="layers".*?</div>', source, re.DOTALL)[0]
    bars = {name: float(value) for name, value in re.findall("<span>([^<]*)</span><i.*?</i><span>(.*?)</span>", figure)}
    mean = np.mean([row["score"] for row in rows if (row["side"], row["query"]) == ("top", "0")])
    assert sum(bars.values()) == pytest.approx(mean, abs=0.01 * sum(map(abs, bars.values())))
    assert any("self-influence" in name for name in bars) == (mode == "l2") and len(bars) == 2 + (mode == "l2")


def test_shares_of_tokens_are_those_of_autograd(cli, trajectory, workspace):
    """Without projection and Hessian, position t's share is the sum over checkpoints of factor times d_t^T G x_t."""
    flags = ("--checkpoints", f"{trajectory}/*", *DATA, "--lora", "none", "--hessian", "none")
    assert cli("extract_log", *flags)[0] == 0
    folder = combined(cli, "--hessian", "none")
    factors, runs = np.load(folder / "factors.npy"), scored_runs(folder)
    query = make_tokenizer()(json.loads(open("queries.jsonl").readline())["text"])["input_ids"]
    example, layers, expected = runs[-1].train()[4]["input_ids"], runs[-1].layers, 0
    for seed, factor in enumerate(factors[:, 0].tolist()):
        model = make_model("llama", seed=seed)
        grads, io = full_gradient(model, layers, query), layer_io(model, layers, example)
        expected += factor * sum((io[layer][1] @ grads[layer] * io[layer][0]).sum(dim=1) for layer in layers)
    found = shares(folder, [[4], [], []]).pairs[0, 4].tokens
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert found.sum().item() == pytest.approx(float(np.load(folder / "scores.npy")[0, 4]), rel=1e-4)


@pytest.mark.parametrize("flags", [(), ("--top_k_only", 5)])
def test_one_model_in_memory_at_a_time(monkeypatch, cli, parent, flags):
    """--tokens frees a checkpoint's model before it loads the next one; the page shades examples and queries."""
    folder, loaded, load = combined(cli, *flags) if flags else dot_scores(), [], tokens.load_model

    def load_model(settings, execution):
        assert not any(model() is not None for model in loaded)
        found = load(settings, execution)
        loaded.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(tokens, "load_model", load_model)
    _, source = analyse(cli, folder, "--tokens", "--by", "document", "--combine", "max", "--diagnose")
    assert len(loaded) == 3 and source.count('class="p4"') > 8 and "summed over the checkpoints" in source
    for heading in ("Hessian ekfac by layer", "Largest self-influence (and its share)", "of the first layer"):
        assert f"{heading}, at the last checkpoint (checkpoint-30)" in source
    assert "Scores, of all checkpoints together" in source


def test_which_scores_are_shown(cli, parent):
    """Without --log_dir the newest, combined ones; with a checkpoint's folder its own. log.txt is in that folder."""
    folder = combined(cli)
    Path("logs").mkdir()
    parent.rename("logs/parent")
    status, out, err = cli("analysis")
    assert status == 0 and f"logs/{folder}/report.html" in out, err
    assert f"logs/{folder}/report.html" in Path("logs/parent/log.txt").read_text()
    status, out, err = cli("analysis", "--log_dir", f"logs/parent/{NAMES[1]}")
    assert status == 0 and f"logs/parent/{NAMES[1]}/scores/" in out, err
    assert "report.html" in Path(f"logs/parent/{NAMES[1]}/log.txt").read_text()
    own = next(Path(f"logs/parent/{NAMES[1]}/scores").iterdir())
    assert "checkpoints" not in (own / "top_k.jsonl").read_text()


def test_the_evaluation_reads_combined_scores(cli, parent):
    """The run is the last checkpoint's; the bytes are those of all checkpoints."""
    folder = dot_scores()
    found = scored.load(folder)
    assert found.run.folder.name == NAMES[-1] and found.scores.shape == (3, len(found.documents))
    assert [run.name for run in lds.runs_of(folder)] == NAMES
    sizes = [lds.gradient_bytes(run, 20) for run in lds.runs_of(folder)]
    assert len(set(sizes)) == 1 and sizes[0] > 0
    own = next(Path("parent", NAMES[0], "scores").iterdir())
    assert [run.name for run in lds.runs_of(own)] == NAMES[:1]


def test_damaged_parts_are_refused(cli, parent):
    """Files of the combined scores or of a checkpoint's own that are missing, altered or of other scores: one line."""
    folder = dot_scores()
    own = next(Path("parent", NAMES[0], "scores").iterdir())
    analysis = ("analysis", "--log_dir", "parent", "--format", "csv")

    def damaged(path: Path, change: Callable[[Path], object], *words: str, of: Path | None = None) -> None:
        """Change a file, expect a refusal, and restore the file; `of`: enter the new checksums in that folder."""
        changed = {file: file.read_bytes() for file in {path, (of or folder) / "run.json"}}
        change(path)
        if of:
            vouch(of)
        refused(cli(*analysis), AGAIN, *words)
        for file, content in changed.items():
            file.write_bytes(content)

    def scaled(path: Path) -> None:
        np.save(path, 2 * np.load(path))

    damaged(own / "scores.npy", Path.unlink, str(own), "got other files")
    damaged(own / "scores.npy", scaled, str(own), "got other files")
    damaged(own / "scores.npy", scaled, "the sum of the checkpoints' parts", of=own)
    damaged(own / "scores.npy", lambda path: np.save(path, np.load(path)[:2]), "float32 [3, ", of=own)
    damaged(own / "run.json", Path.unlink, str(own), "got none")
    damaged(folder / "factors.npy", Path.unlink, "factors.npy", of=folder)
    damaged(folder / "factors.npy", scaled, "got other files")
    damaged(folder / "factors.npy", scaled, "the sum of the checkpoints' parts", of=folder)
    damaged(folder / "factors.npy", lambda path: np.save(path, np.load(path)[:2]), "float64 [3, 3]", of=folder)
    nan = np.full((3, 3), np.nan)
    damaged(folder / "factors.npy", lambda path: np.save(path, nan), "the sum of the checkpoints' parts", of=folder)
    whole = {"run": NAMES[0], "scores": "x", "weight": 1.0}
    for wrong in ([], "x", [whole, whole], [whole | {"run": "../parent"}], [whole | {"weight": 0.0}], [{"run": "x"}]):

        def replace(path: Path, wrong=wrong) -> None:
            edit_json(path, lambda about: about.update(checkpoints=wrong))

        damaged(folder / "run.json", replace, "expected checkpoints in")
    damaged(folder / "run.json", lambda path: edit_json(path, lambda about: about["checkpoints"].pop()), "[2, 3]")
    files.remove(Path("parent", NAMES[1]))
    refused(cli(*analysis), f"parent/{NAMES[1]}/run.json", "extract_log.py")
    assert cli("analysis", "--log_dir", f"parent/{NAMES[0]}")[0] == 0


def test_a_checkpoint_of_other_examples_is_refused(cli, parent, trajectory):
    """A run that was extracted again from other texts has other examples under the same numbers."""
    rows = Path("docs.jsonl").read_text().splitlines()
    Path("few.jsonl").write_text("\n".join(rows[:9]))
    other = Path("parent", NAMES[1])
    files.remove(other)
    flags = ("--data_name", "few.jsonl", "--rank", 5, "--hessian", "ekfac", "--log_dir", other)
    assert cli("extract_log", "--model_name", trajectory / NAMES[1], *flags)[0] == 0
    refused(cli("analysis", "--log_dir", "parent"), f"examples and layers of parent/{NAMES[2]} in {other}", AGAIN)
