"""The run that a command line means."""

from pathlib import Path

from helpers import DATA, extract

from logra.run_dir import RunDir


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
