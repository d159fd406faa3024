"""The settings of --verify's small run, the model of its reference, and the lines that it prints."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import local_torch_dtype

from logra.models import model
from logra.quantise import FLOAT_DTYPES
from logra.runtime.memory import available_memory
from logra.runtime.progress import say, silent
from logra.runtime.settings import Execution, RunSettings
from logra.tools import verify_reference as reference
from logra.tools.verify_reference import Text

MAX_K, MAX_OTHER_K = 2**12, 2**8  # of the first and the last layer, and of the others: each C [k, k] is solved
SHORT_TEXT = 8  # tokens
MAX_CUBES = 2e11  # sum of k^3 up to which --lora none is kept
COPY_BYTES = 24  # bytes per parameter that a float64 copy of the model and its gradients need


def small_settings(settings: RunSettings, sizes: dict[str, list[int]], examples: int) -> RunSettings:
    """Return the settings of the small run, and reduce the ranks in `sizes` so that C can be solved by its definition.

    The middle layer gets k <= n: there raw has a solver of its own. `sizes` is layer -> [d_out, d_in, r_out, r_in].
    """
    ks = [r_out * r_in for *_, r_out, r_in in sizes.values()]
    if settings.lora == "none" and (max(ks) > MAX_K or sum(k**3 for k in ks) > MAX_CUBES):
        say("--lora none: the layers are too wide to solve their C here; random projections are checked instead")
        settings = replace(settings, lora="random")
    last = len(sizes) - 1
    for number, size in enumerate(sizes.values()) if settings.lora != "none" else ():
        limit = MAX_K if number in (0, last) else MAX_OTHER_K
        if number == math.ceil(last / 2) and last:
            limit = examples
        rank = math.isqrt(limit)
        if size[2] * size[3] > limit:
            size[2] = min(size[2], rank)
            size[3] = min(size[3], limit // size[2])
    return replace(
        settings, max_examples=min(examples, settings.max_examples or examples), calibration_examples=examples,
        shard_examples=math.ceil(examples / 2),
    )  # fmt: skip


def make_queries(train: list[Text], longest: int, block_size: int, boundaries: list[int]) -> list[Text]:
    """Return the longest example, a piece of the last one, and texts of very different lengths.

    One text is just above each length where a batch changes the model (models.model.rope_boundaries).
    """
    ids = train[-1].token_ids
    piece = ids[: len(ids) // 2 + 1]
    queries = [train[longest], Text(piece, [t > len(piece) // 2 for t in range(len(piece))])]
    tokens = [token for text in train for token in text.token_ids] or [0]
    above = [length + 1 for length in boundaries if length < block_size]
    whole = [] if len(queries[0].token_ids) > block_size // 2 else [block_size]
    lengths = sorted({min(SHORT_TEXT, block_size), *above, *whole})
    return queries + [Text((tokens * length)[:length], [True] * length) for length in lengths]


def load_reference(settings: RunSettings, execution: Execution) -> nn.Module:
    """Load the model again, on the CPU, in float64 if it fits and runs so: the device never holds it twice."""
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    with silent():  # what there is to say of the model was said
        plain = model.load_model(settings.model_name, FLOAT_DTYPES[settings.dtype], "cpu", **hub)  # the same rounding
    reference.run_experts(plain, "eager")  # the grouped product has no float64
    double = COPY_BYTES * sum(p.numel() for p in plain.parameters()) < available_memory()
    if double:
        try:
            with torch.no_grad(), local_torch_dtype(torch.float64):
                reference.loss(plain.double(), Text([0, 1], [True, True]))
        except RuntimeError:  # some models compute a part in float32 (Inkling 2)
            double = False
    say(f"model in {settings.dtype}, reference in {'float64' if double else 'float32'}:")
    return plain.to(torch.float64 if double else torch.float32).requires_grad_()


class Check(NamedTuple):
    """One line of the report: what was compared, the error of each part by its name, and the largest allowed one."""

    what: str
    errors: dict[str, float]
    tolerance: float

    @property
    def failed(self) -> list[str]:
        """The parts whose error is too large, or NaN."""
        return [name for name, error in self.errors.items() if not error <= self.tolerance]

    def say(self) -> None:
        """Print the line."""
        worst = max(self.failed or self.errors, key=lambda name: self.errors[name])
        verdict, places = ("FAIL", self.failed[:3]) if self.failed else ("pass", [worst])
        say(f"  {verdict}  {self.what}: {len(self.errors)} compared, largest error {self.errors[worst]:.1e}, "
            f"in {', '.join(places)}")  # fmt: skip


def report(checks: Iterable[Check]) -> None:
    """Print the lines.

    Raises:
        ValueError: A check failed.
    """
    failed = []
    for line in checks:
        line.say()
        failed += [line.what] if line.failed else []
    if failed:
        raise ValueError(
            f"expected all checks of --verify to pass, got FAIL in {len(failed)} ({', '.join(failed)}); where "
            "layers are named, leave them out with --layers, and report it"
        )
