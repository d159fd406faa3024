"""logra as a package: `pip install .` beside the plain scripts."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution

from conftest import ROOT


def test_installed_package(tmp_path):
    """An installed logra has every file of logra/, the report's template too, and the pinned requirements."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "logra", source / "logra", ignore=shutil.ignore_patterns("__pycache__"))
    files = {path.relative_to(source) for path in (source / "logra").rglob("*")}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--no-compile", "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.relative_to(target) for path in (target / "logra").rglob("*")} == files
    found = Distribution.at(next(target.glob("*.dist-info")))
    pinned = re.findall(r"^\w\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert found.requires == pinned and found.metadata["Requires-Python"] == ">=3.11"
