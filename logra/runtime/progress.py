"""A script's output: lines, progress bars, a summary, and log.txt in the run's folder. Only rank 0 prints."""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from tqdm import tqdm

_CONTROL_CHARACTERS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"  # all but tab and newline


class _State:  # of the script that runs
    quiet, start_seconds, unwritten_lines = False, 0.0, list[str]()
    file: Path | None = None


def begin(quiet: bool) -> None:
    """Start the clock of a script. With `quiet` only errors are printed."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks
    _State.quiet, _State.start_seconds, _State.unwritten_lines, _State.file = quiet, time.monotonic(), [], None


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """Return text with control characters, and what UTF-8 can't encode, as escapes such as \\x1b."""
    return re.sub(_CONTROL_CHARACTERS, lambda match: match[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Print a line and add it to log.txt, on rank 0 only."""
    if not _is_rank_0():
        return
    text = printable(text)
    if not _State.quiet:
        print(text, flush=True)
    _State.unwritten_lines.append(text)
    if _State.file:
        _write()


def keep_log(folder: Path) -> None:
    """Append the lines of this script, earlier and later ones, to <folder>/log.txt."""
    if _is_rank_0() and _State.file is None:
        _State.file = folder / "log.txt"
        _State.unwritten_lines.insert(0, f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(' '.join(sys.argv))}")
        _write()


def _write() -> None:
    with open(_State.file, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in _State.unwritten_lines))
    _State.unwritten_lines = []


@contextmanager
def silent() -> Iterator[None]:
    """Print nothing and show no bar inside the block."""
    quiet, lines = _State.quiet, _State.unwritten_lines
    _State.quiet, _State.unwritten_lines = True, []
    try:
        yield
    finally:
        _State.quiet, _State.unwritten_lines = quiet, lines


def bar(items: Iterable | None = None, **options) -> tqdm:
    """Return a tqdm bar that is shown on rank 0 only, and not with --quiet."""
    return tqdm(items, disable=_State.quiet or not _is_rank_0(), **options)


def duration(seconds: float) -> str:
    """Return seconds as text: 42 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def summary(following: str, tokens: int = 0) -> None:
    """Print the time and the peak memory of a stage, and the command that comes next."""
    from logra.runtime.memory import peak_memory  # not at the head: it imports torch

    seconds = time.monotonic() - _State.start_seconds
    what = f"{tokens:,} tokens in {duration(seconds)} ({tokens / seconds:,.0f}/s)" if tokens else duration(seconds)
    say(f"{what}, at most {peak_memory() / 1e9:.2g} GB of memory" + (f"; see {_State.file}" if _State.file else ""))
    say(f"Next: {following}")
