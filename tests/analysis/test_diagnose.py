"""analysis.py --diagnose: spectra against dense matrices, copies and odd examples where they are."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from helpers import extract, influence, stored_gradients

from logra import hessian
from logra.analysis.diagnose import duplicates, eigenvalues, rounding, spectra
from logra.quantise import stored_tensors
from logra.run_dir import RunDir
from logra.runtime.settings import RunSettings
from logra.scoring.rank import read_record


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("raw", ()), ("raw", ("--rank", 6)), ("kfac", ()), ("ekfac", ()), ("ekfac", ("--basis", "projected"))],
)
def test_eigenvalues_are_those_of_the_dense_matrix(cli, tiny, workspace, kind, flags):
    """The eigenvalues are those of C as the solver has it: with a large lambda, (C + lambda I)^-1 inverts to them."""
    log = extract(cli, tiny / "llama", "--rank", 3, "--hessian", kind, *flags)
    layer = next(iter(log.layers))
    stats = log.statistics(kind)(layer)
    train = torch.cat(list(log.read(layer, range(len(log.shards)))))
    k = train.shape[1]
    solver = hessian.preconditioner(kind, stats, None, 50.0, train if "gram" in stats else None)
    inverse = solver.solve(torch.eye(k)).double()
    expected = torch.linalg.eigvalsh(torch.linalg.inv(inverse) - 50.0 * torch.eye(k).double()).flip(0)
    found = eigenvalues(kind, stats)
    assert np.allclose(found[:k], expected[: len(found)], rtol=1e-2, atol=2e-3 * expected[0])
    assert found.sum().item() == pytest.approx(expected.sum().item(), rel=1e-2)


@pytest.mark.parametrize("store", ["float32", "int1", "none"])
def test_copies_are_found_and_nothing_else(cli, tiny, workspace, store):
    """Examples of the same text are one group, also where signs are stored; different texts are none."""
    rows = [json.loads(line) for line in open("docs.jsonl")]
    rows += [{"id": "copy", "text": rows[4]["text"]}, {"id": "again", "text": rows[4]["text"]}]
    write_jsonl(Path("docs.jsonl"), rows)
    log = extract(cli, tiny / "gpt2", "--rank", 12, "--hessian", "ekfac", "--store_dtype", store, "--shard_examples", 3)
    lines = list(duplicates(log, log.train()))
    if store == "none":
        assert "stores no gradients" in lines[0]
        return
    assert lines[0].startswith("1 groups, 3 examples, with") and lines[1].startswith(
        "3 times: 4 (doc4), 20 (copy), 21 (again)"
    )


@pytest.mark.parametrize("kind", ["raw", "ekfac", "none"])
def test_the_diagnosis_is_printed_and_in_the_report(cli, tiny, workspace, kind):
    """The effective dimension is between 0 and k, the largest self-influence comes first; all stands in the report."""
    extract(cli, tiny / "llama", "--rank", 3, "--hessian", kind)
    scores, folder = influence(cli, "--mode", "cosine", "--self_influence")
    status, out, err = cli("analysis", "--log_dir", "log", "--diagnose", "--top_k", 2)
    assert status == 0, err
    own = np.load(folder / "self_influence.npy")
    assert re.search(rf"  example {own.argmax()}, doc{own.argmax()}: ", out)
    assert "0 groups, 0 examples" in out and f"{(scores[0] > 0).mean():10.0%}" in out
    rows = re.findall(r"^(\S+) +9 .* ([\d,]+)$", out, re.MULTILINE)
    assert len(rows) == {"raw": 3, "ekfac": 14, "none": 0}[kind]
    assert all(0 < int(effective) <= 9 for _, effective in rows)
    assert "Equal gradients" in (folder / "report.html").read_text()
    assert RunDir.load(Path("log")).examples == 20


@pytest.mark.parametrize("kind", ["raw", "ekfac"])
def test_shares_are_of_all_layers(cli, tiny, workspace, kind):
    """A layer's share is its trace, the mean squared gradient, over the traces of all layers, not of those shown."""
    log = extract(cli, tiny / "llama", "--rank", 3, "--hessian", kind)
    _, folder = influence(cli)
    squares = {layer: grads.double().square().sum().item() for layer, grads in stored_gradients(log).items()}
    rows = [line.split() for line in spectra(log, read_record(folder, log)) if line.startswith("model.")]
    assert len(rows) == {"raw": 3, "ekfac": 14}[kind]
    for layer, _, trace, share, *_ in rows:
        assert float(trace) == pytest.approx(squares[layer] / log.examples, rel=1e-2)
        assert float(share[:-1]) == pytest.approx(100 * squares[layer] / sum(squares.values()), abs=0.1)


@pytest.mark.parametrize(("store", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("int1", "bfloat16")])
def test_gradients_that_are_only_similar_are_not_equal(store, dtype):
    """Neither pairs that are 3% apart nor a chain of steps of 1%; a gradient that differs by rounding is equal."""
    generator = torch.Generator().manual_seed(0)
    base, *noise = (torch.randn(400, generator=generator) for _ in range(7))
    rows = [base, base + 1e-5 * noise[0], base + 0.4 * noise[1]]
    if dtype == "float32":
        rows += [base + sum((0.01 * step for step in noise[:n]), 0.03 * noise[5]) for n in range(5)]
    settings = RunSettings("m", "d", store_dtype=store, dtype=dtype)
    stored = stored_tensors("layer", torch.stack(rows), store)
    run = SimpleNamespace(
        layers={"layer": []}, projected={"layer": (20, 20)}, shards=[range(len(rows))], settings=settings,
        read=lambda name, shards: iter([stored[name]]),
    )  # fmt: skip
    found = list(duplicates(run, [{"document_id": f"d{i}"} for i in range(len(rows))]))
    assert found[0].startswith("1 groups, 2 examples") and found[1:] == ["2 times: 0 (d0), 1 (d1)"]
    assert f"at most {rounding(run):.1g}" in found[0]
