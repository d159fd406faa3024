"""What a script tells its user: lines, bars, a summary, and log.txt in the run's folder. Rank 0 alone speaks."""

import os
import re
import sys
import time
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path

from tqdm import tqdm

from logra.runtime.memory import peak_memory

_CONTROLS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"  # all but tab and newline


class _State:
    quiet, begun, lines = False, 0.0, list[str]()
    file: Path | None = None


def begin(quiet: bool) -> None:
    """Start the clock of a script; with `quiet` nothing but errors is printed."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks
    _State.quiet, _State.begun, _State.lines, _State.file = quiet, time.monotonic(), [], None


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """Return text with what could drive a terminal, or can't be written as UTF-8, as escapes: \\x1b, say."""
    return re.sub(_CONTROLS, lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Print on rank 0 only, and keep it for log.txt."""
    if not _first():
        return
    text = printable(text)
    if not _State.quiet:
        print(text, flush=True)
    _State.lines.append(text)
    if _State.file:
        _write()


def keep_log(folder: Path) -> None:
    """Add what was said, and what will be, to <folder>/log.txt."""
    if _first() and _State.file is None:
        _State.file = folder / "log.txt"
        _State.lines.insert(0, f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(' '.join(sys.argv))}")
        _write()


def _write() -> None:
    with open(_State.file, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in _State.lines))
    _State.lines = []


def bar(items: Iterable | None = None, **options) -> tqdm:
    """Return a tqdm bar that only rank 0 shows, and not with --quiet."""
    return tqdm(items, disable=_State.quiet or not _first(), **options)


def duration(seconds: float) -> str:
    """Return seconds as text: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def summary(following: str, tokens: int = 0) -> None:
    """Say what a stage took, and what comes next."""
    seconds = time.monotonic() - _State.begun
    what = f"{tokens:,} tokens in {duration(seconds)} ({tokens / seconds:,.0f}/s)" if tokens else duration(seconds)
    say(f"{what}, at most {peak_memory() / 1e9:.2g} GB of memory" + (f"; see {_State.file}" if _State.file else ""))
    say(f"Next: {following}")
