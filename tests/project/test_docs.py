"""README.md and docs/: their commands, links, messages and Python are right, and so are the commands of scripts/."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_texts, save_model, write_jsonl
from helpers import COMMANDS, SCRIPTS, check, extract, influence, shown_commands

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_commands_of_the_pages():
    """The commands of README.md and docs/ parse, and their scripts exist; the paper's stand there word for word."""
    commands = [command for page in PAGES for command in shown_commands(page)]
    assert {check(c) for c in commands if not c.startswith("bash")} >= {f"{name}.py" for name in SCRIPTS}
    for command in commands:
        if command.startswith("bash"):
            assert (ROOT / command.split()[1]).exists(), command
    assert COMMANDS in (ROOT / "docs/paper.md").read_text()
    assert "docs/paper.md" in (ROOT / "README.md").read_text()


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to a Markdown file's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_size_and_links_of_the_pages():
    """README.md has at most 200 lines, a page fewer; README's last section links to each page; no link is broken."""
    readme, *others = PAGES
    assert len(readme.read_text().splitlines()) <= 200
    assert all(len(page.read_text().splitlines()) < 200 for page in others)
    assert len(list((ROOT / "docs").glob("*.md"))) <= 11
    last = readme.read_text().rpartition("\n## ")[2]
    assert {f"docs/{page.name}" for page in others} <= set(re.findall(r"\]\(([^)#]+)\)", last))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "evaluation/README.md", ROOT / "benchmarks/README.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not target.startswith("https://"):
                path, _, name = target.partition("#")
                linked = page.parent / path if path else page
                assert linked.exists(), f"{page.name}: {target}"
                assert not name or name in anchors(linked), f"{page.name}: {target}"


def test_python_of_the_pages(cli, tiny, workspace):
    """The Python of docs/faq.md runs as it stands, and its scores are those of the scripts."""
    (code,) = (block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    texts, asked = ([json.loads(line)["text"] for line in [*open(f"{name}.jsonl")][:2]] for name in ("docs", "queries"))
    write_jsonl(Path("two.jsonl"), [{"text": text} for text in texts])
    given = {"name, asked = ": f"{(str(tiny / 'llama'), asked)}", "texts = ": f"{texts}"}
    lines = [
        next((key + value for key, value in given.items() if line.startswith(key)), line) for line in code.splitlines()
    ]
    found: dict = {}
    exec("\n".join(lines), found)
    extract(cli, tiny / "llama", "--data_name", "two.jsonl", "--hessian", "kfac", "--mlp_only")
    scores, _ = influence(cli, "--max_queries", 2)
    assert np.allclose(found["scores"], scores, rtol=1e-3) and Path("mine.safetensors").exists()


def test_commands_in_docstrings():
    """The example at the head of each script parses."""
    for name in (*SCRIPTS, *(f"evaluation.{path.stem}" for path in (ROOT / "evaluation").glob("*.py"))):
        if not hasattr(importlib.import_module(name), "build_parser"):
            continue  # what the scripts there share
        lines = [line.strip() for line in importlib.import_module(name).__doc__.splitlines()]
        commands = [line for line in lines if line.startswith("python ")]
        assert commands and all(check(command) for command in commands)


SHELL = sorted(
    path
    for folder in ("scripts", "evaluation", "benchmarks")
    for path in (ROOT / folder).glob("*.sh")
    if path.name not in ("venv.sh", "stages.sh")  # the others source them
)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts(script):
    """Each is valid bash with the header of STYLE; what it would run (DRY_RUN=1) parses."""
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "set -euo pipefail" in text
    if script.name in ("test.sh", "test_matrix.sh"):
        return
    for word in ("# Reproduces:", "# Needs:", "# Takes:", "# Expect:", "# Checked:"):
        assert word in text, word
    flags, least = (
        (["--all"] if script.name == "quickstart.sh" else []),
        1 if script.name in ("peers.sh", "kronfluence.sh") else 4,
    )
    for extra in ([], flags):
        dry = os.environ | {"DRY_RUN": "1"}
        done = subprocess.run(["bash", script, *extra], env=dry, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        commands = [line.removeprefix("+ ") for line in done.stdout.splitlines() if line.startswith("+ ")]
        assert len([c for c in commands if check(c)]) >= least


def test_several_machines_take_their_part():
    """Each machine launches the two long steps with its own rank; the first one alone generates and analyses."""
    ranks = []
    for rank in ("0", "1"):
        environment = os.environ | {"DRY_RUN": "1", "NUM_MACHINES": "2", "MACHINE_RANK": rank, "MAIN_IP": "10.0.0.1"}
        command = ["bash", ROOT / "scripts/llama3.sh", "--num_proc", "32"]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert out.count("--num_processes 16 --num_machines 2 --machine_rank " + rank) == 2
        assert "10.0.0.1" in out and "--num_proc 32" in out
        ranks.append(("generate_llama3.py" in out, "analysis.py" in out))
    assert ranks == [(True, True), (False, False)]
    assert subprocess.run(["bash", "-n", ROOT / "scripts/slurm.sbatch"]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="scripts/test.sh makes .venv, and was not used")
@pytest.mark.parametrize(
    ("recipe", "architecture"), [("gpt2_xl", "gpt2"), ("pythia", "neox"), ("llama3", "llama"), ("custom_data", "llama")]
)
def test_recipes_run_through_on_stand_ins(tmp_path, recipe, architecture):
    """With a tiny model of the same architecture and a small file, on two processes, each ends with its report."""
    stand_in = save_model(tmp_path / f"stand-in-{recipe}", architecture, context=512)
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in make_texts(30)])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the old mill\nthe river\n")
    names = {"MODEL": str(stand_in), "DATA": str(data), "LOG_DIR": str(tmp_path / "log"), "NUM_GPUS": "2"}
    environment = os.environ | names | {"BLOCK_SIZE": "32", "LORA_RANK": "4", "HF_HUB_OFFLINE": "1"}
    flags = [stand_in, data, prompts] if recipe == "custom_data" else ["--shard_examples", "4"]
    command = ["bash", ROOT / f"scripts/{recipe}.sh", *flags]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    finally:
        shutil.rmtree(ROOT / "data/generated" / stand_in.name, ignore_errors=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert list((tmp_path / "log/scores").glob("queries-*/report.html"))


def test_flags_page():
    """docs/flags.md is what its generator makes of the parsers; it has each flag of the scripts, and no other."""
    spec = importlib.util.spec_from_file_location("make_flags", ROOT / "docs/make_flags.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    page = (ROOT / "docs/flags.md").read_text()
    assert page == maker.render(), "run: python docs/make_flags.py"
    actions = [action for name in SCRIPTS for action in importlib.import_module(name).build_parser()._actions]
    known = {option for action in actions for option in action.option_strings}
    assert set(re.findall(r"^\| `(--\w+)`", page, re.MULTILINE)) == known - {"-h", "--help"}


def test_messages_of_the_faq():
    """Each message that docs/faq.md explains is raised by the file that it names."""
    rows = re.findall(r"^\| `(.+?)` \|.*\| `(\S+\.py)` \|$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(rows) >= 20
    for message, file in rows:
        source = re.sub(r'"\s+f?"', "", (ROOT / file).read_text())  # a message of several lines is one
        assert message in source, f"{file}: {message}"


def test_messages_of_the_inputs():
    """Each message in the tables of docs/inputs.md stands in logra/."""
    page = (ROOT / "docs/inputs.md").read_text()
    tables = re.findall(r"^\| input \| what happens \| message \|\n(.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    messages = [message for table in tables for message in re.findall(r"\| `([^`|]+)` \|$", table, re.MULTILINE)]
    source = "".join(path.read_text() for path in sorted((ROOT / "logra").rglob("*.py")))
    source = re.sub(r'"\s+f?"', "", source)  # a message of several lines is one
    assert len(messages) >= 5 and not [message for message in messages if message not in source]


def test_prompts():
    """A dozen prompts of each kind, all different."""
    from logra.stages.generate import read_prompts

    for name in ("chat", "continuation"):
        assert len(read_prompts(ROOT / f"scripts/prompts/{name}.txt")) == 12
    assert len(read_prompts(ROOT / "evaluation/topics.jsonl")) >= 20


def test_requirements_are_pinned():
    """Exact versions only."""
    for path in ("requirements.txt", "tests/requirements.txt"):
        lines = (ROOT / path).read_text().split()
        assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text().split()


def test_a_machine_without_python_gets_one_line():
    """What is missing, and what to install."""
    for script in ("quickstart.sh", "test.sh"):
        environment = os.environ | {"PYTHON": "false", "DRY_RUN": ""}
        command = ["bash", ROOT / "scripts" / script, "--all"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
        assert "python3-venv" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="scripts/test.sh makes .venv, and was not used")
def test_quickstart(tmp_path):
    """In a fresh copy, from another working directory, on the first examples only; the second time it reuses all."""
    for name in ("logra", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    for name in (*(f"{script}.py" for script in SCRIPTS), "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / "copy")
    (tmp_path / "copy/.venv").symlink_to(ROOT / ".venv")
    command = ["bash", tmp_path / "copy/scripts/quickstart.sh", "--max_examples", "24"]
    for again in (False, True):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("extracting" in done.stderr) != again
        assert done.stdout.count("\n  3. ") == 4, done.stdout
        paths = [line for line in done.stdout.splitlines() if line.endswith("top_k.jsonl")]
        assert len(paths) == 1 and (tmp_path / "copy" / paths[0]).exists()


def test_no_placeholder_is_left():
    """What was to be filled in has been."""
    for path in (*PAGES, *SHELL):
        assert not re.findall(r"\b[A-Z]+_(?:NOTE|OUTPUT|TABLE|TIME|CHECKED|TEXT)\b", path.read_text()), path


def attributes_read(paths: list[Path]) -> set[str]:
    """Return the names of the attributes that the code of these files reads and does not call."""
    found: set[str] = set()
    for path in paths:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        loaded = (n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))
        found |= {node.attr for node in loaded if id(node) not in called}
    return found


def test_every_flag_is_read():
    """Each flag of each script is read as an attribute, outside of the files that define the flags."""
    definitions = [ROOT / "logra/runtime/settings.py", ROOT / "logra/runtime/flags.py"]
    paths = {*ROOT.glob("*.py"), *(ROOT / "logra").rglob("*.py")} - {*definitions}
    stand_for_others = {"preset", "rank"}  # flags.py puts the others in their place
    read = attributes_read([*paths]) | (attributes_read(definitions) & stand_for_others)
    for name in SCRIPTS:
        unread = {action.dest for action in importlib.import_module(name).build_parser()._actions} - read - {"help"}
        assert not unread, (name, unread)
