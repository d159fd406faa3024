"""Shares of tokens and of blocks of layers."""

from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, write_jsonl
from helpers import extract, influence
from reference import full_gradient, layer_io

from logra.analysis import report
from logra.analysis.tokens import TokenSplitter, pieces
from logra.run_dir import RunDir
from logra.runtime.settings import MODES
from logra.scoring.rank import read_record


def equal(one, two, scale) -> bool:
    """Say whether two numbers differ by at most 1e-4 of a scale."""
    return abs(float(one) - float(two)) <= 1e-4 * float(scale)


def shares_of(folder: Path, shown: list[list[int]]):
    """Return the TokenSplitter of a folder of scores, and the shares of the pairs and of the queries."""
    run = RunDir.load(folder.parents[1])
    splitter = TokenSplitter(run, read_record(folder, run), False)
    return splitter, *splitter.split(splitter.run.train(), shown, shown)


@pytest.mark.parametrize("hessian", ["raw", "ekfac"])
def test_shares_add_up_to_the_score(cli, tiny, workspace, model_name, hessian):
    """In every mode a pair's shares add up to its score, by token and by block; a query's to its summed dots."""
    run = extract(cli, tiny / model_name, "--rank", 5, "--hessian", hessian, "--block_size", 16)
    dots, _ = influence(cli, "--mode", "dot")
    train, shown = run.train(), [[0, 3, 7], [3], [19, 2]]
    for mode in MODES:
        scores, folder = influence(cli, "--mode", mode)
        splitter, pairs, of_queries = shares_of(folder, shown)
        assert set(pairs) == {(q, e) for q, row in enumerate(shown) for e in row}
        for (q, e), shares in pairs.items():
            assert len(shares.tokens) == len(train[e]["input_ids"]) and len(shares.blocks) == 2
            scale = shares.tokens.abs().sum()
            assert equal(shares.tokens.sum(), scores[q, e], scale), mode
            assert equal(sum(shares.blocks.values()), scores[q, e], scale), mode
        for q, row in enumerate(shown):
            assert len(of_queries[q]) == len(splitter.groups[q][0].token_ids)
            assert equal(of_queries[q].sum(), dots[q, row].sum(), of_queries[q].abs().sum()), mode


def test_shares_are_those_of_autograd(cli, tiny, workspace, model_name):
    """Without projection and Hessian, position t's share is d_t^T G x_t, with autograd's full gradient G."""
    extract(cli, tiny / model_name, "--lora", "none", "--hessian", "none")
    _, folder = influence(cli, "--hessian", "none")
    splitter, pairs, _ = shares_of(folder, [[4], [], []])
    model, layers = make_model(model_name), splitter.run.layers
    query, example = (ids.token_ids for ids in (splitter.groups[0][0], splitter.groups[0][0]._replace(
        token_ids=splitter.run.train()[4]["input_ids"])))  # fmt: skip
    grads, io = full_gradient(model, layers, query), layer_io(model, layers, example)
    expected = sum((io[layer][1] @ grads[layer] * io[layer][0]).sum(dim=1) for layer in layers)
    torch.testing.assert_close(pairs[0, 4].tokens, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_shares_of_few_bits_and_of_groups(cli, tiny, workspace):
    """Of signs the shares are of the exact gradients; a group of queries has shares of its pairs, not of its tokens."""
    write_jsonl(Path("groups.jsonl"), [{"text": f"the river {w}", "kind": "a"} for w in ("ran", "past", "old")])
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac")
    exact, _ = influence(cli, "--damping", 0.2)
    extract(cli, tiny / "llama", "--rank", 5, "--hessian", "ekfac", "--store_dtype", "int1", "--log_dir", "few")
    status, out, err = cli("compute_influence", "--log_dir", "few", "--split", "queries.jsonl")
    assert status == 0, err
    folder = Path(next(line for line in out.splitlines() if " in " in line).split(" in ")[1])
    _, pairs, _ = shares_of(folder, [[1], [], []])
    assert equal(pairs[0, 1].tokens.sum(), exact[0, 1], pairs[0, 1].tokens.abs().sum())
    assert cli("compute_influence", "--log_dir", "log", "--split", "groups.jsonl", "--group_by", "kind")[0] == 0
    status, _, err = cli("analysis", "--log_dir", "log", "--tokens", "--format", "csv")
    assert status == 2 and "html" in err, "the shares are in the page alone"
    status, out, err = cli("analysis", "--log_dir", "log", "--tokens", "--top_k", 2)
    assert status == 0, err


@pytest.mark.parametrize("lora", [("--rank", 6), ("--lora", "none")])
def test_shares_of_cut_queries(cli, tiny, workspace, lora):
    """With --query_rank the shares add up to the scores of the cut query; the query's own tokens have none."""
    extract(cli, tiny / "llama", *lora, "--hessian", "ekfac", "--mlp_only", "--store_dtype", "none")
    for mode in MODES:
        scores, folder = influence(cli, "--mode", mode, "--query_rank", 1)
        _, pairs, of_queries = shares_of(folder, [[0, 3, 7], [3], [19, 2]])
        for (q, e), shares in pairs.items():
            assert equal(shares.tokens.sum(), scores[q, e], shares.tokens.abs().sum()), mode
        assert not of_queries
    assert cli("analysis", "--log_dir", "log", "--tokens", "--top_k", 2)[0] == 0
    assert "not shaded" in (folder / "report.html").read_text()


def test_pieces_keep_every_character_and_share():
    """The pieces of a text's tokens join to the text, also where a character is several tokens; shares are kept."""
    tokenizer, text = make_tokenizer(), "the “old” mill 😀 ünï"
    ids = tokenizer(text)["input_ids"]
    shares = torch.arange(len(ids), dtype=torch.float64)
    found = pieces(tokenizer, ids, shares)
    assert "".join(piece for piece, _ in found) == text and sum(share for _, share in found) == shares.sum()
    shaded = report.shade(found)
    assert "".join(run.text for run in shaded) == text and max(shaded)[0] == report.SHADE_LEVELS
    assert sum(run.share for run in shaded) == shares.sum()
