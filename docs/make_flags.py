"""Write docs/flags.md from the scripts' parsers. A default that a parser lacks ends the help text, in parentheses."""

import argparse
import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"generate_llama3": 1, "generate": 1, "extract_log": 2, "compute_influence": 3, "analysis": 4}
HEAD = """# All flags

`python docs/make_flags.py` writes this page from the five scripts; `--help` of a script prints the same texts.
[method.md](method.md) explains the terms.

- Stages: 1 `generate_llama3.py` and `generate.py`, 2 `extract_log.py`, 3 `compute_influence.py`, 4 `analysis.py`.
- The flags of the groups "the run" and "documents" are kept in `run.json`. A later command takes the flags that you
  leave out from there. A flag that you give must have the same value; if not, the command stops and names both values.
- A preset sets several flags and prints them ([list](results.md#the-two-presets)). A flag that you give overrides it.
- Whole numbers may be written as `1e9`. Flags cannot be abbreviated.
"""
TABLE = "| flag | stage | meaning | default | values |\n|---|---|---|---|---|\n"


def described(action: argparse.Action) -> tuple[str, str, str]:
    """Return the meaning, the default and the possible values of a flag."""
    meaning, default = (action.help or "") % vars(action), action.default
    if action.nargs == 0:
        return meaning, "off", ""
    if found := re.fullmatch(r"(.*?)\s*\(((?:[^()]|\([^()]*\))*)\)", meaning):
        meaning, default = found.groups()
    default = "" if default is None else str(default).replace(f"{ROOT}/", "")
    values = [", ".join(f"`{choice}`" for choice in action.choices or ()) or action.metavar]
    return meaning, default, ", ".join(filter(None, [*values, "one or more" if action.nargs == "+" else ""]))


def render() -> str:
    """Return the content of docs/flags.md; equal flags of several scripts are one row."""
    rows: dict[tuple[str | None, str, str, str], dict[str, list[str]]] = {}  # group, flag ... -> {default: scripts}
    for script in STAGES:
        groups = importlib.import_module(script).build_parser()._action_groups
        for group, action in ((g, a) for g in groups for a in g._group_actions if a.dest != "help"):
            meaning, default, values = described(action)
            row = rows.setdefault((group.title, action.option_strings[0], meaning, values), {})
            row.setdefault(default, []).append(f"{script}.py")
    tables: dict[str, str] = {}
    for (title, flag, meaning, values), defaults in rows.items():
        scripts = [script for names in defaults.values() for script in names]
        if title == "options":  # argparse's own group, for what a script puts into no other
            title = "In every script" if len(scripts) == len(STAGES) else f"Only in {scripts[0]}"
        shown = defaults if len(defaults) == 1 else [f"{value} ({', '.join(defaults[value])})" for value in defaults]
        stages = ", ".join(sorted({str(STAGES[script[:-3]]) for script in scripts}))
        cells = " | ".join((f"`{flag}`", stages, meaning, "; ".join(shown), values)).replace("<", "\\<")
        tables[title] = tables.get(title, f"\n## {title[0].upper() + title[1:]}\n\n{TABLE}") + f"| {cells} |\n"
    return HEAD + "".join(tables.values())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    (ROOT / "docs/flags.md").write_text(render(), "utf-8")
