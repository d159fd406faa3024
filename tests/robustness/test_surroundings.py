"""What surrounds a script: imports, folders that can't be written, accelerate's configuration, too long names."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, write_jsonl
from helpers import DATA, QUERIES, SCRIPTS, extract, influence, refused, start

from logra.inputs import documents

NOWHERE = "/dev/null/cache"  # can't be made, by root neither
WRONG_FLAGS = {
    "generate": "--top_p 0", "generate_llama3": "--top_p 0", "extract_log": "--rank 0",
    "compute_influence": "--damping 1 --damping_absolute 1", "analysis": "--drop",
}  # fmt: skip
SLOW = ("torch", "transformers", "datasets", "numba", "pandas", "accelerate")  # to import


def run(script: str, *flags: object, before: str = "pass", **variables: str) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, after some Python, with further variables."""
    program = f"import runpy, sys; {before}; sys.argv[1:] = sys.argv[2:]; sys.path.insert(0, {str(ROOT)!r})"
    program += f"; runpy.run_path({str(ROOT / script)!r} + '.py', run_name='__main__')"
    command = [sys.executable, "-c", program, script, *map(str, flags)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def imported(script: str, *flags: object, status: int = 0) -> list[str]:
    """Run a script in a process of its own; return the names in SLOW of what it has imported."""
    before = f"import atexit; atexit.register(lambda: print('', *[n for n in {SLOW} if n in sys.modules], sep='|'))"
    done = run(script, *flags, before=before, HOME=NOWHERE, HF_HOME=NOWHERE)
    assert done.returncode == status, done.stderr
    return done.stdout.splitlines()[-1].split("|")[1:]


@pytest.mark.parametrize(("script", "wrong"), WRONG_FLAGS.items())
def test_the_command_line_imports_nothing_slow(script, wrong):
    """Help and wrong flags take less than a second, also flags that contradict each other."""
    assert not imported(script, "--help")
    assert not imported(script, *wrong.split(), status=2)


def test_stages_import_what_they_need(cli, tiny, workspace):
    """Only scores of few bits and the report need numba; stage 4 needs no model."""
    extract(cli, tiny / "llama", "--rank", 4)
    assert "numba" not in imported("compute_influence", *QUERIES)
    assert "transformers" not in imported("analysis", "--log_dir", "log")
    assert "numba" not in imported("analysis", "--log_dir", "log", "--diagnose", "--format", "jsonl")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_folder_for_temporary_files(script):
    """torch needs one when it is imported: one line names the variable."""
    done = run(script, "--help", before="import tempfile; tempfile._candidate_tempdir_list = lambda: ['/dev/null']")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "set TMPDIR" in done.stderr, done.stderr


def test_stages_without_a_cache(tiny, workspace):
    """They copy data files among temporary files, and say so; the copy is deleted."""
    (workspace / "temporary").mkdir()
    places = {"HOME": NOWHERE, "HF_HOME": NOWHERE, "TMPDIR": str(workspace / "temporary")}
    done = run("extract_log", "--model_name", tiny / "llama", *DATA, "--rank", 4, "--preset", "best", **places)
    assert done.returncode == 0 and "--cache_dir chooses a folder" in done.stdout, done.stderr
    no_code = "import numba.core.caching as c; c.CacheImpl._locator_classes = []"  # numba can't keep compiled code
    done = run("compute_influence", *QUERIES, before=no_code, **places)
    assert done.returncode == 0, done.stderr
    assert not list(workspace.glob("temporary/data-*"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_cache_without_room(cli, tiny, workspace, monkeypatch, number):
    """The cache is to blame, and not the data."""
    flags = ("--model_name", tiny / "llama", *DATA, "--rank", 4)
    refused(cli("extract_log", *flags, "--cache_dir", "/dev/null/c"), "/dev/null/c", "as --cache_dir")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "/cache/copy.arrow")

    monkeypatch.setattr(documents.file_rows, "_write", fail)
    refused(cli("extract_log", *flags, "--cache_dir", workspace / "new"), "has room, as --cache_dir")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    refused(cli("extract_log", *flags[:2], "--data_name", "wikitext", *flags[4:]), "has room, as --cache_dir")


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism_config"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
        ("PJRT_DEVICE", "TPU", "TPU"),
    ],
)
def test_what_accelerate_is_asked_for(cli, tiny, workspace, monkeypatch, variable, value, word):
    """Anything but processes on GPUs or CPUs is refused by every script, with the file to give instead."""
    monkeypatch.setenv(variable, value)
    for script in SCRIPTS:
        refused(cli(script), f"got {word} in its configuration", "scripts/accelerate.yaml", "--fsdp")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_not_used(cli, tiny, workspace, monkeypatch, precision):
    """It is said, and the run has the numbers of --dtype."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    status, out, err = cli("extract_log", "--model_name", tiny / "llama", *DATA, "--rank", 4)
    assert status == 0 and f"mixed precision {precision} is not used; --dtype" in out, err
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert "mixed precision" not in cli("extract_log", "--model_name", tiny / "llama", *DATA)[1]


def test_a_launch_with_another_configuration(tiny, workspace):
    """The variables are those that accelerate launch sets: one line, printed once."""
    command = f"accelerate launch --num_processes 2 --num_machines 1 --use_fsdp {ROOT}/extract_log.py"
    done = start(f"{command} --model_name {tiny}/llama --data_name docs.jsonl", workspace)
    assert done.returncode != 0 and done.stderr.count("got FSDP in its configuration") == 1, done.stderr


def test_long_names(cli, tiny, workspace):
    """Of queries, data and output: names made from them are cut, with a hash, and differ; what can't be is said."""
    model, queries = ("--model_name", tiny / "llama"), [f"{'q' * 240}{i}.jsonl" for i in range(2)]
    extract(cli, tiny / "llama", "--rank", 4)
    for name in queries:
        write_jsonl(Path(name), [{"text": "the river"}])
    assert len({influence(cli, "--split", name)[1] for name in queries}) == 2
    status, out, err = cli("analysis", "--log_dir", "log", "--split", queries[0])
    assert status == 0 and Path(out.splitlines()[-1]).exists(), err
    data, prompts = Path("d" * 240), Path("p.txt")
    write_jsonl(data / "docs.jsonl", [{"text": "the river"}])
    assert cli("extract_log", *model, "--data_name", data)[0] == 0 == cli("extract_log", *model, "--data_name", data)[0]
    prompts.write_text("the river\n")
    generate = ("generate", *model, "--prompts", prompts, "--max_new_tokens", 2, "--output")
    assert cli(*generate, "o" * 255)[0] == 0 and Path("o" * 255).exists()
    refused(cli(*generate, "o" * 256), "File name too long", "choose a shorter name")
    refused(cli("extract_log", *model, *DATA[:2], "--log_dir", "l" * 256), "File name too long", "a shorter name")
