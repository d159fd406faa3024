"""What run.json, of a run or of scores, has to hold: it may come from someone else, and be wrong on purpose."""

import argparse
from collections.abc import Collection
from functools import partial
from typing import Any

from logra.disk import fits, is_count
from logra.hessian import KINDS
from logra.influence import MODES
from logra.run import DATA_FLAGS, RUN_FLAGS

LATER = ("block_size", "dtype", "basis")  # None on the command line only


def is_setting(name: str, value: Any) -> bool:
    """Say whether run.json may hold a value for a flag that describes a run."""
    default, options = RUN_FLAGS[name]
    if value is None:
        return name in ("rank_in", "rank_out") or (default is None and name not in LATER)
    if "action" in options:
        return isinstance(value, bool)
    try:
        return value in options.get("choices", [value]) and options.get("type", str)(str(value)) == value
    except (argparse.ArgumentTypeError, ValueError):
        return False


def is_positive(value: Any) -> bool:
    """Say whether a value is a whole number of at least 1."""
    return is_count(value) and value > 0


def is_layer(sizes: Any) -> bool:
    """Say whether a value is [d_out, d_in, r_out, r_in]."""
    return fits(sizes, [is_positive]) and len(sizes) == 4 and sizes[2] <= sizes[0] and sizes[3] <= sizes[1]


def is_run(content: Any) -> bool:
    """Say whether a value is the content of a run's run.json; `data` may not be there yet."""
    if not fits(content, RUN) or not fits(content.get("extensions", []), [PART]):
        return False
    return "data" not in content or fits(content["data"], PART)


def are_scores(about: Any, layers: Collection[str]) -> bool:
    """Say whether a value is the content of run.json of scores, of some of a run's layers."""
    return fits(about, SCORES) and fits(about.get("blocks", []), [str]) and set(about["layers"]) <= set(layers)


SETTINGS = {name: partial(is_setting, name) for name in RUN_FLAGS}
PART = {
    "settings": {name: SETTINGS[name] for name in DATA_FLAGS},
    "source": str | None,
    "fingerprint": str,
    "files": dict,
    "examples": is_positive,
    "shard_examples": is_positive,
} | dict.fromkeys(("documents", "rows", "tokens"), is_count)
RUN = {
    "settings": SETTINGS,
    "arguments": {"hessian": lambda kind: kind in (None, *KINDS)},
    "versions": dict,
    "model": {"class": str, "fingerprint": str},
    "tokenizer": str,
    "layers": lambda layers: isinstance(layers, dict) and layers and fits([*layers.values()], [is_layer]),
}
SCORES = {
    "log": lambda log: is_run(log) and "data" in log,
    "mode": lambda mode: mode in MODES,
    "hessian": lambda kind: kind in KINDS,
    "layers": lambda names: names and fits(names, [str]),
    "num_queries": is_count,
    "files": dict,
    "top_k_only": lambda k: k is None or is_positive(k),
    "group_by": str | None,
    "damping": float | None,
    "damping_absolute": float | None,
} | dict.fromkeys(("split", "query_loss", "queries"), str)
