"""Types of the command line's flags: each turns a text into a value, or says what it expected."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from typing import Any


def number(kind: type, low: float, what: str, high: float = math.inf) -> Callable[[str], Any]:
    """Return an argparse type: a finite int or float from `low` to `high`. Error messages call it `what`.

    An int may be written as 1e9.
    """

    def parse(text: str):
        with suppress(ValueError, OverflowError):
            value = kind(float(text)) if kind is int and re.fullmatch(r"\d+(\.0*)?e\d+", text) else kind(text)
            if math.isfinite(value) and low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")

    return parse


positive_int = number(int, 1, "an integer of at least 1")
seed_int = number(int, 0, "an integer of at least 0")
non_negative = number(float, 0, "a number of at least 0")
positive = number(float, sys.float_info.min, "a positive, finite number")


def share_or_count(text: str) -> float | int:
    """Argparse type of a share between 0 and 1 (a float), or of a positive integer."""
    with suppress(argparse.ArgumentTypeError):
        return positive_int(text)
    share = number(float, sys.float_info.min, "a share below 1, or an integer of at least 1", math.nextafter(1, 0))
    return share(text)


def pattern(text: str) -> str:
    """Argparse type of a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r} ({error})") from error
    return text


def iso_date(text: str) -> str:
    """Argparse type of a date, YYYY-MM-DD."""
    with suppress(ValueError):
        return date.fromisoformat(text).isoformat()
    raise argparse.ArgumentTypeError(f"expected a date such as 2024-07-26, got {text!r}")


def positive_int_or_auto(text: str) -> int | str:
    """Argparse type of a positive integer or `auto`."""
    return text if text == "auto" else positive_int(text)


def positive_int_auto_or_none(text: str) -> int | str:
    """Argparse type of a positive integer, `auto` or `none`."""
    return text if text in ("auto", "none") else positive_int(text)
