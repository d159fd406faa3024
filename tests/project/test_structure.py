"""The rules of the architecture, read from the code: rooms, who imports whom, what a function takes, sizes."""

import ast
import importlib.util
import io
import re
import tokenize
from functools import cache
from pathlib import Path

from conftest import ROOT
from helpers import SCRIPTS

ROOMS = ("analysis", "inputs", "models", "runtime", "stages", "scoring", "tools")
FILES = {f"{name}.py" for name in SCRIPTS}
MATHEMATICS = {f"logra.{name}" for name in "projection experts hooks loss hessian influence quantise".split()}
LATE_IMPORTS = {  # of a function: (module, what it imports) -> why not at the head of the file
    ("analysis", "logra.analysis.tokens"): "it needs transformers' models, which take three seconds to import",
    ("analysis", "logra.analysis.selection"): "the same",
    ("logra.models.weights", "peft"): "only adapters need it, and it need not be installed",
    ("logra.quantise", "numba"): "only scores of one bit need it; it takes half a second to import",
    ("logra.quantise", "numba.extending"): "the same",
    ("logra.analysis.report", "bm25s"): "it imports numba; only the report compares with word matching",
    ("logra.runtime.flags", "torch"): "--help does not need it; it takes 1.5 seconds to import",
    ("logra.runtime.flags", "logra.runtime.processes"): "it imports torch",
    ("logra.runtime.progress", "logra.runtime.memory"): "it imports torch",
}


def read_modules() -> dict[str, Path]:
    """Return module -> file, of logra/ and the five scripts; a package's own code is the package."""
    found = {name: ROOT / f"{name}.py" for name in SCRIPTS}
    for path in sorted((ROOT / "logra").rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = read_modules()
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def imported(module: str, node: ast.AST) -> set[str]:
    """Return all modules that the import statements inside a node name, logra's by their full name."""
    found = set()
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            found |= {name.name for name in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{module}: imports are absolute"
            names = [f"{statement.module}.{name.name}" for name in statement.names]
            found |= {name if name in MODULES else statement.module for name in names}
    return found


IMPORTS = {module: imported(module, tree) for module, tree in TREES.items()}


def room(module: str) -> str:
    """Return the folder of a module below logra/: "" for the method, a script's own file for a script."""
    first, *parts = module.split(".")
    if first != "logra":
        return f"{first}.py"
    return parts[0] if parts and parts[0] in ROOMS else ""


def functions(module: str):
    """Yield all functions of a module, methods and inner ones too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_a_folder_holds_nine_modules_at_most():
    """__init__.py is not counted; the rooms are those that the tests know."""
    folders = [ROOT / "logra", *(path for path in (ROOT / "logra").rglob("*") if any(path.glob("*.py")))]
    counts = {path.name: len([file for file in path.glob("*.py") if file.stem != "__init__"]) for path in folders}
    assert set(counts) == {"logra", *ROOMS} and max(counts.values()) <= 9, counts


def test_a_folder_of_tests_holds_nine_files_at_most():
    """And no test file imports another one."""
    folders = [ROOT / "tests", *(path for path in (ROOT / "tests").rglob("*") if any(path.glob("*.py")))]
    counts = {path.name: len([file for file in path.iterdir() if file.is_file()]) for path in folders}
    assert max(counts.values()) <= 9, counts
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imported(path.name, ast.parse(path.read_text())) if name.startswith("test_")], path


def floors() -> dict[str, int]:
    """Return each module's floor: 1 + the highest floor of what it imports. An import cycle is an error."""
    above: list[str] = []

    @cache
    def floor(module: str) -> int:
        assert module not in above, f"a cycle of imports: {[*above, module]}"
        above.append(module)
        found = 1 + max((floor(other) for other in IMPORTS[module] & MODULES.keys()), default=0)
        above.pop()
        return found

    return {module: floor(module) for module in MODULES}


def test_no_import_cycle():
    """The modules stand on floors."""
    assert min(floors().values()) == 1


def test_eight_floors_at_most():
    """Of imports, from the mathematics to the scripts."""
    assert max(floors().values()) <= 8, sorted(floors().items(), key=lambda pair: pair[1])


def allowed(module: str, other: str) -> bool:
    """Say whether one of our modules may import another one."""
    if module in MATHEMATICS:
        return other in MATHEMATICS
    if module in ("logra.store", "logra.run_dir"):
        return not room(other) or other in ("logra.runtime.files", "logra.runtime.settings")
    above = {"analysis", "tools", *FILES}
    forbidden = {
        "inputs": {"stages", "scoring", *above},
        "models": {"inputs", "stages", "scoring", *above},
        "stages": {"scoring", *above},
        "scoring": above,
        "analysis": {"tools", *FILES},
        "tools": {"analysis", *FILES},
        "runtime": {"inputs", "models", "stages", "scoring", *above},
    }
    if room(module) == "runtime" and other in ("logra.run_dir", "logra.store"):
        return False
    return room(other) not in forbidden.get(room(module), FILES)


def test_rooms_import_downwards():
    """The mathematics stands alone; a run directory needs files and settings; no script imports another one."""
    wrong = [(m, other) for m in MODULES for other in IMPORTS[m] & MODULES.keys() - {m} if not allowed(m, other)]
    assert not wrong


def test_the_rules_of_imports_refuse():
    """What the rules are there for is refused, and what they allow is allowed."""
    for module, other in (
        ("logra.hessian", "logra.store"), ("logra.hooks", "logra.runtime.files"), ("analysis", "generate"),
        ("logra.store", "logra.runtime.flags"), ("logra.run_dir", "logra.models.model"),
        ("logra.models.model", "logra.scoring.score"), ("logra.scoring.score", "logra.tools.verify"),
        ("logra.runtime.files", "logra.run_dir"), ("logra.stages.extract", "logra.scoring.score"),
        ("logra.scoring.rank", "logra.analysis.report"), ("logra.tools.trial", "logra.analysis.report"),
    ):  # fmt: skip
        assert not allowed(module, other)
    assert allowed("logra.run_dir", "logra.store") and allowed("logra.analysis.report", "logra.scoring.rank")


def test_imports_stand_at_the_head():
    """Of a file, not in a function, but for those that are named here with their reason."""
    found = {(m, name) for m in MODULES for function in functions(m) for name in imported(m, function)}
    assert found == set(LATE_IMPORTS)


def test_libraries_take_typed_values():
    """No function of logra/ but the parsers' own takes `args` or a Namespace; settings have attributes, not keys."""
    for module in MODULES:
        library = module not in SCRIPTS and module != "logra.runtime.flags"
        for function in functions(module) if library else ():
            arguments = [a for a in ast.walk(function.args) if isinstance(a, ast.arg)]
            for argument in arguments:
                annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                assert argument.arg != "args" and "Namespace" not in annotation, (module, function.name)
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                of_settings = ast.unparse(node.value).split(".")[-1] == "settings"
                assert not (of_settings and isinstance(node.slice.value, str)), (module, ast.unparse(node))


def code_lines(path: Path) -> set[int]:
    """Return the numbers of a file's lines that hold code: no docstrings, comments or blank lines."""
    text, lines, documentation = path.read_text(), set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            documentation |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    return lines - documentation


LONG_FILES: set[str] = set()  # known exceptions
LONG_FUNCTIONS: set[tuple[str, str]] = set()  # (module, function)


def test_sizes():
    """Of logra/ at most 250 lines of code a file, of a function 40; of a script 150 lines in all, of its main 60."""
    long_files, long_functions = set(), set()
    for module, path in MODULES.items():
        code = code_lines(path)
        long_files |= {module} if len(code) > 250 else set()
        for function in functions(module):
            most = 60 if (module in SCRIPTS and function.name == "main") else 40
            if len(code & {*range(function.lineno, function.end_lineno + 1)}) > most:
                long_functions.add((module, function.name))
        assert module not in SCRIPTS or len(path.read_text().splitlines()) <= 150, module
    assert long_files == LONG_FILES and long_functions == LONG_FUNCTIONS


def test_shell_scripts_name_modules_that_exist():
    """What the recipes import from logra is there, also in the branches that a dry run leaves out."""
    paths = [path for folder in ("scripts", "evaluation", "benchmarks") for path in (ROOT / folder).glob("*.sh")]
    named = {name for path in paths for name in re.findall(r"(?:from|import) (logra[\w.]*)", path.read_text())}
    assert named and all(importlib.util.find_spec(name) for name in named), named
