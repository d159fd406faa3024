"""Files of scores: self-influence that is kept, and the highest and lowest scores alone."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from helpers import QUERIES, extract, influence

from logra.quantise import BitQueries, pack
from logra.scoring.score_files import ScoreFile
from logra.scoring.self_check import _lost_bits


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


@pytest.mark.parametrize("flags", ["--mode dot", "--mode cosine --top_k_only 5", "--mode l2 --damping 0.1 1"])
@pytest.mark.parametrize("store_dtype", ["float32", "int1"])
def test_scores_that_differ_from_the_shards_are_refused(cli, tiny, workspace, monkeypatch, flags, store_dtype):
    """Stage 3 computes some scores again: scores that were changed on their way to the file leave no folder."""
    extract(cli, tiny / "llama", "--rank", 8, "--hessian", "ekfac", "--store_dtype", store_dtype)
    put = ScoreFile.put
    changes = {"none": lambda s: s, "zero": torch.zeros_like, "order": lambda s: s.roll(1, 1), "sign": torch.neg}
    for name, change in changes.items():
        monkeypatch.setattr(ScoreFile, "put", lambda self, q, ids, s, b, f=change: put(self, q, ids, f(s.clone()), b))
        status, _, err = cli("compute_influence", *QUERIES, *flags.split())
        assert (status == 0) == (name == "none") == any(Path("log/scores").glob("*/run.json")), (name, err)
        assert name == "none" or "computed again from its shard" in err
        shutil.rmtree("log/scores", ignore_errors=True)


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
    assert status == 0 and "5 instead of 7" in out


def test_what_rounding_a_query_takes_from_a_dot():
    """A CPU rounds int1's queries to 8 bits. The check knows the loss, also where signs add it up."""
    torch.manual_seed(0)
    query = torch.randn(2000).sign() * torch.tensor([127.0] + 1999 * [0.4])  # all but the first are rounded to 0
    packed, scale = pack(query.sign()[None], 1)
    dot, lost = BitQueries(query[None]).score(packed, scale).item(), (_lost_bits(query) @ query.sign()).item()
    assert dot == pytest.approx((query.abs().sum() - lost).item(), rel=1e-5)
    assert lost > 6 * (2000 / 12) ** 0.5  # six standard deviations of errors that are independent of the signs
