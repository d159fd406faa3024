"""Make a small run with the pipeline's own functions, score it with those of stage 3, and check each number of it.

The reference (verify_reference) shares no code with the pipeline. Each step is checked with the numbers of the one
before: gradients and factor sums against autograd, stored values against the gradients, scores against dense algebra
with the stored values. So the rounding of a dtype hides no error of a later step. Last, small steps of the model itself
are compared with the scores. Notation: n train examples, Q queries, k = r_out * r_in of a layer.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_utils import local_torch_dtype

from logra.hooks import GradientCapture
from logra.influence import MODES
from logra.inputs import model
from logra.inputs.layers import MLP_PATTERN
from logra.inputs.queries import Query
from logra.quantise import FLOAT_DTYPES
from logra.run_dir import RunDir, RunRecord
from logra.runtime import processes
from logra.runtime.memory import available_memory
from logra.runtime.progress import say, silent
from logra.runtime.settings import Execution, RunSettings, ScoreSettings
from logra.scoring.score import Scorer, ScoreTask, write_pass
from logra.scoring.score_files import ScoreRecord, SelfInfluence, score_files
from logra.stages import calibrate, extract, open_run
from logra.stages.gradients import make_extractor
from logra.tools import verify_reference as reference
from logra.tools.verify_reference import Text, relative_error

SHORT_TEXT = 8  # tokens
MAX_K, MAX_OTHER_K = 2**12, 2**8  # of the first and the last layer, and of the others: each C [k, k] is solved
MAX_CUBES = 2e11  # sum of k^3 up to which --lora none is kept
COPY_BYTES = 24  # bytes per parameter that a float64 copy of the model and its gradients need
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}  # by the model's dtype; factor sums too
ROUNDING_TOLERANCE = 1e-3  # in steps, and of a scale
SCORE_TOLERANCE, SIGN_SCORE_TOLERANCE = 1e-3, 0.05  # with int1 a CPU rounds the queries to 8 bits
STANDARD_ERRORS, CORRELATION, STEP_TOLERANCE = 6, 0.9, 0.5


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


def verify(settings: RunSettings, kind: str, execution: Execution, examples: int, cache_dir: str | None) -> None:
    """Check the flags of a command line of extract_log.py on a small run of the first examples.

    Args:
        settings: Of the run.
        kind: Its Hessian.
        execution: How to run the model.
        examples: Number of train examples at most.
        cache_dir: See load_documents.

    Raises:
        ValueError: A check failed.
    """
    if settings.quantize:
        raise ValueError(
            "expected --verify without --quantize, got both, and quantised weights have no gradient; leave one out"
        )
    if processes.processes_here() < processes.state().num_processes:
        raise ValueError("expected --verify on one machine, got several; start it on one of them")
    lm, tokenizer, described = open_run.load_model(settings, execution)
    open_run.say_tracked(lm, described, settings)
    settings = small_settings(settings, described["layers"], examples)
    execution = replace(execution, batch_tokens=64 * settings.block_size)  # long and short texts in one batch
    with processes.temporary_folder("verify-") as temporary:
        folder = temporary / "run"
        if processes.state().is_main_process:
            new = RunDir(folder, RunRecord(settings, {"hessian": kind}, **described))
            extract.write_train(new, tokenizer, None, cache_dir, None)
        calibrate.make_projections(lm, open_run.reload(folder), execution)
        run = open_run.reload(folder)
        extract.write_shards(lm, run, extract.unfinished_shards(run), execution)
        extract.write_hessian(kind, run)

        scored = ScoredRun(run, kind, lm, execution)
        if processes.state().is_main_process:
            plain = load_reference(settings, execution)
            with local_torch_dtype(plain.dtype):  # some models make constants of the default dtype
                scored.check(plain)
        processes.state().wait_for_everyone()


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


class ScoredRun:
    """A small run of stage 2, queries, and their scores by stage 3.

    Attributes:
        train, queries: The texts.
        grads, query_grads: Their gradients before they are stored, {layer: [n, k]} and {layer: [Q, k]} float32.
        scores: Scores [Q, n] of each mode, and self-influence [n].
    """

    def __init__(self, run: RunDir, kind: str, lm: nn.Module, execution: Execution):
        self.run, self.kind, self.settings, rows = run, kind, run.settings, run.train()[:]
        counted = rows.get("counted") or [[True] * len(ids) for ids in rows["input_ids"]]
        self.train = [Text(*pair) for pair in zip(rows["input_ids"], counted, strict=True)]
        self.longest = max(range(run.examples), key=lambda number: len(self.train[number].token_ids))
        self.queries = self.make_queries(model.rope_boundaries(lm.config))
        batches = [*(self.train[ids.start : ids.stop] for ids in run.shards), self.queries]
        with GradientCapture(lm, run.projections()) as capture:
            extractor = make_extractor(lm, capture, execution, run)
            *shards, self.query_grads = (
                extractor.gradients([t.token_ids for t in batch], [t.counted for t in batch]).wait()[0]
                for batch in batches
            )
            extractor.finish()
        self.grads = {layer: torch.cat([shard[layer] for shard in shards]) for layer in run.layers}
        self.score(lm, execution)

    def make_queries(self, boundaries: list[int]) -> list[Text]:
        """Return the longest example, a piece of the last one, and texts of very different lengths.

        One text is just above each length where a batch changes the model.
        """
        ids, block_size = self.train[-1].token_ids, self.settings.block_size
        piece = ids[: len(ids) // 2 + 1]
        queries = [self.train[self.longest], Text(piece, [t > len(piece) // 2 for t in range(len(piece))])]
        tokens = [token for text in self.train for token in text.token_ids] or [0]
        above = [length + 1 for length in boundaries if length < block_size]
        whole = [] if len(queries[0].token_ids) > block_size // 2 else [block_size]
        lengths = sorted({min(SHORT_TEXT, block_size), *above, *whole})
        return queries + [Text((tokens * length)[:length], [True] * length) for length in lengths]

    def score(self, lm: nn.Module, execution: Execution) -> None:
        """Score the queries in each mode, with the default damping."""
        run, kind, layers = self.run, self.kind, list(self.run.layers)
        dampings = ScoreSettings().dampings(kind, self.settings.store_dtype)
        task = ScoreTask(run, kind, dict.fromkeys(layers, ""), dampings)
        groups = [[Query(str(number), *text, {})] for number, text in enumerate(self.queries)]
        self.scores = {}
        for mode in MODES:
            self_influence = None if mode == "dot" else SelfInfluence(run, kind, layers, dampings)
            record = ScoreRecord(
                query_loss="all", layers=layers, queries="", split="", mode=mode, hessian=kind, top_k_only=None,
                num_queries=len(groups), num_examples=run.examples, group_by=None, log=run.record, damping=None,
                damping_absolute=None, query_rank=None,
            )  # fmt: skip
            with score_files(run.folder / "scores" / mode, record, dampings, run.shards) as files:
                if not write_pass(Scorer(task, lm, execution, self_influence), groups, 0, files, mode):
                    raise ValueError(
                        f"expected memory to score {len(groups)} queries at a time, got too little; use a lower --rank"
                    )
                if self_influence and not self_influence.complete:
                    self_influence.save()
                files[0].close()
                if processes.state().is_main_process:
                    self.scores[mode] = torch.from_numpy(np.load(files[0].folder / "scores.npy"))
        self.scores["self-influence"] = self_influence.values[0]

    def check(self, lm: nn.Module) -> None:
        """Print how far all numbers are from those of the reference model `lm`.

        Raises:
            ValueError: A check failed.
        """
        sides = reference.projections(self.run.folder, list(self.run.layers))
        self.expected = reference.projected_sums(lm, sides, self.train)
        failed = []
        for part in (self.check_projections, self.check_gradients, self.check_scores):
            for line in part(lm, sides):
                line.say()
                failed += [line.what] if line.failed else []
        if failed:
            raise ValueError(
                f"expected all checks of --verify to pass, got FAIL in {len(failed)} ({', '.join(failed)}); where "
                "layers are named, leave them out with --layers, and report it"
            )

    def check_projections(self, lm: nn.Module, sides: reference.Sides) -> Iterator[Check]:
        """Check which layers are tracked, and the projections."""
        settings, tracked = self.settings, self.run.layers
        mlp = MLP_PATTERN if settings.mlp_only else ""
        chosen = [name for name in reference.linear_layers(lm) if re.search(mlp, name, re.IGNORECASE)]
        chosen = [name for name in chosen if re.search(settings.layers or "", name)]
        chosen = reference.with_gradient(lm, chosen, self.queries[0])
        yield Check("tracked layers", {x: float((x in chosen) != (x in tracked)) for x in [*chosen, *tracked]}, 0)
        moments, shared = reference.random_errors(sides, self.run.rotated) if settings.lora == "random" else ({}, {})
        if moments:
            yield Check("random projections, moments in standard errors", moments, STANDARD_ERRORS)
        if shared:
            yield Check("random projections, correlation with one another", shared, CORRELATION)
        if self.run.rotated:
            errors = reference.eigenbasis_errors(self.run.folder, sides, self.expected, settings.lora != "random")
            yield Check("eigenbasis", errors, GRADIENT_TOLERANCE[settings.dtype])

    def check_gradients(self, lm: nn.Module, sides: reference.Sides) -> Iterator[Check]:
        """Check gradients, factor sums, and what is stored of the gradients."""
        folder, dtype = self.run.folder / "gradients", self.settings.store_dtype
        self.stored: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        for number in range(len(self.run.shards)):
            for name, tensor in load_file(folder / f"{number:05d}.safetensors").items():
                self.stored[name] = torch.cat([self.stored[name], tensor]) if name in self.stored else tensor
            for name, tensor in load_file(folder / f"{number:05d}.factors.safetensors").items():
                self.sums[name] = self.sums.get(name, 0) + tensor.double()
        tolerance = GRADIENT_TOLERANCE[self.settings.dtype]
        asked = reference.projected_sums(lm, sides, self.queries)
        for what, grads, expected in (("train", self.grads, self.expected), ("query", self.query_grads, asked)):
            errors = {layer: relative_error(grad, expected[layer]) for layer, grad in grads.items()}
            yield Check(f"{what} gradients", errors, tolerance)
        errors = {key: relative_error(value, self.expected[key]) for key, value in self.sums.items()}
        counts = {key: float(self.sums[key] != self.expected[key]) for key in ("examples", "tokens")}
        yield Check("factor sums", errors | counts, tolerance)
        yield Check("stored values", reference.stored_errors(self.stored, self.grads, dtype), ROUNDING_TOLERANCE)

    def check_scores(self, lm: nn.Module, sides: reference.Sides) -> Iterator[Check]:
        """Compare the scores with those of dense algebra, and with steps of the model."""
        kind, dtype, solved, z = self.kind, self.settings.store_dtype, {}, {}
        for layer, g in self.grads.items():
            z[layer] = g.double() if dtype == "none" else reference.restored(self.stored, layer, g.shape[1], dtype)
            c = reference.hessian(kind, z[layer], self.sums, layer, self.settings.basis == "eigen")
            solved[layer] = reference.preconditioned(kind, z[layer], c, dtype)
        expected = reference.scores(self.query_grads, z, solved)
        errors = {name: relative_error(self.scores[name], value) for name, value in expected.items()}
        tolerance = SIGN_SCORE_TOLERANCE if dtype == "int1" else SCORE_TOLERANCE
        if dtype == "none":  # stage 3 computes the gradients again, at full width without rounding the projected ones
            tolerance = GRADIENT_TOLERANCE[self.settings.dtype]
        yield Check("scores", errors, tolerance)
        if steps := self.step_errors(lm, sides, solved):
            yield Check("steps of the model", steps, STEP_TOLERANCE)

    def step_errors(self, lm: nn.Module, sides: reference.Sides, solved: dict[str, Tensor]) -> dict[str, float]:
        """Compare dots with how fast a query's loss falls along small steps of the model.

        A step along (C + lambda I)^-1 z, for the highest and the lowest dot, lowers the loss by the dot. A plain
        gradient step on an example lowers its own loss, so its dot with itself is positive, whatever the Hessian.
        """
        own = [*reference.gradients(lm, list(sides), self.queries[0])]
        if any(d is None for *_, runs in own for _, d in runs):
            say("  skip  steps of the model: it runs layers without a gradient too, and a step changes these runs")
            return {}
        dots, errors = self.scores["dot"].double(), {}
        norms = [
            sum(g.double().square().sum(dim=1) for g in part.values()).sqrt() for part in (self.query_grads, solved)
        ]
        clear = dots.abs() > GRADIENT_TOLERANCE[self.settings.dtype] / 5 * torch.outer(*norms)
        for what, sign in (("highest", 1), ("lowest", -1)):
            q, example = divmod(int((sign * dots).argmax()), dots.shape[1])
            if not clear[q, example]:
                say(f"  skip  steps of the model: the {what} dot, {dots[q, example]:.1e}, is too small")
                continue
            step = {
                layer: reference.unprojected(y[example].view(self.run.projected[layer]), *sides[layer])
                for layer, y in solved.items()
            }
            fall = reference.fall(lm, step, self.queries[q])
            errors[f"the {what} dot"] = abs(fall / dots[q, example].item() - 1)
        step = {layer: grad for layer, grad, _ in own}
        if any(grad.any() for grad in step.values()):
            fall = reference.fall(lm, step, self.queries[0])
            errors["a plain step"] = float(fall * dots[0, self.longest] <= 0)
        return errors
