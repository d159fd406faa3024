"""Make a small run with the pipeline's own functions, score it with those of stage 3, and check each number of it.

The reference (verify_reference) shares no code with the pipeline. Each step is checked with the numbers of the one
before: gradients and factor sums against autograd, stored values against the gradients, scores against dense algebra
with the stored values. So the rounding of a dtype hides no error of a later step. Last, small steps of the model itself
are compared with the scores. Notation: n train examples, Q queries, k = r_out * r_in of a layer.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_utils import local_torch_dtype

from logra.hooks import GradientCapture
from logra.inputs.queries import Query
from logra.models import model
from logra.models.layers import MLP_PATTERN
from logra.run_dir import RunDir, RunRecord
from logra.runtime import processes
from logra.runtime.memory import release_memory
from logra.runtime.progress import say, silent
from logra.runtime.settings import MODES, Execution, QuerySettings, RerankSettings, RunSettings, ScoreSettings
from logra.scoring.combine import combine
from logra.scoring.score import ScoreTask, describe_scores, score_run
from logra.scoring.score_files import ScoreRecord
from logra.stages import calibrate, extract, open_run
from logra.stages.fine_run import FineRun, choose_rank
from logra.stages.gradients import make_extractor
from logra.tools import verify_reference as reference
from logra.tools.small_run import Check, load_reference, make_queries, report, small_settings
from logra.tools.verify_reference import Text, relative_error
from logra.tools.verify_scores import combined_errors, reranked_errors

GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}  # by the model's dtype; factor sums too
ROUNDING_TOLERANCE = 1e-3  # in steps, and of a scale
SCORE_TOLERANCE, SIGN_SCORE_TOLERANCE = 1e-3, 0.05  # with int1 a CPU rounds the queries to 8 bits
COMBINED_TOLERANCE = 1e-4  # of sums of float32 scores
STANDARD_ERRORS, CORRELATION, STEP_TOLERANCE = 6, 0.9, 0.5
MAX_FINE_BYTES, CHECKED_RANK = 2e9, 32  # of the gradients that the reference of re-ranking holds
Rerank = tuple[int | str, Callable[..., None]]


def verify(
    every: list[RunSettings], kind: str, execution: Execution, examples: int, cache_dir: str | None,
    rerank: Rerank | None,
) -> None:  # fmt: skip
    """Check the flags of a command line of extract_log.py on a small run of the first examples.

    Args:
        every: Settings of the run; of several checkpoints, those of each run. The last one's is checked in all parts,
            of the others the scores, and then the combined ones.
        kind: Its Hessian.
        execution: How to run the model.
        examples: Number of train examples at most.
        cache_dir: See load_documents.
        rerank: The rank of re-ranking (--rerank_rank), and stage 3's function; None: re-ranking is not checked.

    Raises:
        ValueError: A check failed.
    """
    if every[0].quantize:
        raise ValueError(
            "expected --verify without --quantize, got both, and quantised weights have no gradient; leave one out"
        )
    if processes.processes_here() < processes.state().num_processes:
        raise ValueError("expected --verify on one machine, got several; start it on one of them")
    with processes.temporary_folder("verify-") as temporary:
        runs: list[ScoredRun] = []
        for number, settings in enumerate(every):
            if len(every) > 1:
                say(f"checkpoint {number + 1} of {len(every)}: {settings.revision or settings.model_name}")
            first, folder = runs[0].run if runs else None, temporary / f"run-{number}"
            runs.append(make_run(folder, settings, kind, execution, examples, cache_dir, first, len(every) > 1, rerank))
            release_memory()
        combined = combine_runs(runs, temporary) if len(runs) > 1 else {}
        if processes.state().is_main_process:
            plain = load_reference(runs[-1].settings, execution)
            with local_torch_dtype(plain.dtype):  # some models make constants of the default dtype
                report(chain(runs[-1].checks(plain), combined_checks(runs, combined)))
        processes.state().wait_for_everyone()


def make_run(
    folder: Path, settings: RunSettings, kind: str, execution: Execution, examples: int, cache_dir: str | None,
    first: RunDir | None, keep_queries: bool, rerank: Rerank | None,
) -> "ScoredRun":  # fmt: skip
    """Make a small run, and score it. That of a further checkpoint has the examples of the first one."""
    lm, tokenizer, described = open_run.load_model(settings, execution)
    if not first:
        open_run.say_tracked(lm, described, settings)
    settings = small_settings(settings, described["layers"], examples)
    execution = replace(execution, batch_tokens=64 * settings.block_size)  # long and short texts in one batch
    if processes.state().is_main_process:
        new = RunDir(folder, RunRecord(settings, {"hessian": kind}, **described))
        if first:
            extract.share_train(new, first)
        else:
            extract.write_train(new, tokenizer, None, cache_dir, None)
    calibrate.make_projections(lm, open_run.reload(folder), execution)
    run = open_run.reload(folder)
    extract.write_shards(lm, run, extract.unfinished_shards(run), execution)
    extract.write_hessian(kind, run)
    scored = ScoredRun(run, kind, lm, execution, keep_queries)
    if rerank:
        scored.rerank(*rerank, lm, execution)
    return scored


def combine_runs(runs: list["ScoredRun"], temporary: Path) -> dict[Path, ScoreRecord]:
    """Combine the scores of each mode: all with equal weights, the highest and lowest with others. Return the folders.

    Without stored gradients all scores are kept in both.
    """
    made, last = {}, runs[-1]
    kept = None if last.settings.store_dtype == "none" else math.ceil(last.run.examples / 2)
    different = [float(number + 1) for number in range(len(runs))]
    for mode in MODES:
        scored = [run.scored[mode] for run in runs]
        for name, top_k, weights in (("equal weights", None, [1.0] * len(runs)), ("other weights", kept, different)):
            entries = [
                {"run": r.run.folder.name, "scores": mode, "weight": w} for r, w in zip(runs, weights, strict=True)
            ]
            record = replace(last.records[mode], top_k_only=top_k, checkpoints=entries)
            base = temporary / name / mode
            combine(base, record, scored, last.dampings, last.stage_3_queries, mode != "dot")
            made[base.with_name(f"{mode}-{last.dampings[0].label}")] = record
    return made


def combined_checks(runs: list["ScoredRun"], combined: dict[Path, ScoreRecord]) -> Iterator[Check]:
    """Check the scores of each checkpoint but the last, and the combined scores; nothing without checkpoints."""
    if combined:
        errors = {
            f"{name} of checkpoint {number}": error
            for number, run in enumerate(runs[:-1], 1) for name, error in run.score_errors().items()
        }  # fmt: skip
        yield Check("scores of the other checkpoints", errors, runs[0].score_tolerance)
        errors = {}
        for folder, record in combined.items():
            mode, weights = record.mode, [checkpoint["weight"] for checkpoint in record.checkpoints]
            own, scores = ([run.scores[name] for run in runs] for name in ("self-influence", mode))
            found = combined_errors(folder, scores, None if mode == "dot" else own, weights, mode != "cosine")
            errors |= {f"{name} of {mode} with {folder.parent.name}": error for name, error in found.items()}
        yield Check("combined scores", errors, COMBINED_TOLERANCE)


class ScoredRun:
    """A small run of stage 2, queries, and their scores by stage 3.

    Attributes:
        train, queries: The texts.
        grads, query_grads: Their gradients before they are stored, {layer: [n, k]} and {layer: [Q, k]} float32.
        scored: What is left of scoring the run in each mode.
        scores: Scores [Q, n] of each mode, and self-influence [n].
        fine: The view of the run that re-ranked, if one did.
    """

    fine: FineRun | None = None

    def __init__(self, run: RunDir, kind: str, lm: nn.Module, execution: Execution, keep_queries: bool):
        self.run, self.kind, self.settings, rows = run, kind, run.settings, run.train()[:]
        counted = rows.get("counted") or [[True] * len(ids) for ids in rows["input_ids"]]
        self.train = [Text(*pair) for pair in zip(rows["input_ids"], counted, strict=True)]
        self.longest = max(range(run.examples), key=lambda number: len(self.train[number].token_ids))
        self.queries = make_queries(self.train, self.longest, run.settings.block_size, model.rope_boundaries(lm.config))
        batches = [*(self.train[ids.start : ids.stop] for ids in run.shards), self.queries]
        with GradientCapture(lm, run.projections()) as capture:
            extractor = make_extractor(lm, capture, execution, run)
            *shards, self.query_grads = (
                extractor.gradients([t.token_ids for t in batch], [t.counted for t in batch]).wait()[0]
                for batch in batches
            )
            extractor.finish()
        self.grads = {layer: torch.cat([shard[layer] for shard in shards]) for layer in run.layers}
        self.stored, self.sums = reference.read_shards(run.folder, len(run.shards))
        self.score(lm, execution, keep_queries and run.settings.store_dtype != "none")

    def score(self, lm: nn.Module, execution: Execution, keep_queries: bool) -> None:
        """Score the queries in each mode with stage 3's function, with the default damping."""
        run, layers = self.run, list(self.run.layers)
        self.dampings = ScoreSettings().dampings(self.kind, self.settings.store_dtype)
        self.stage_3_queries = [Query(str(number), *text, {}) for number, text in enumerate(self.queries)]
        task = ScoreTask(run, self.kind, dict.fromkeys(layers, ""), self.dampings)
        self.records, self.scored, self.scores = {}, {}, {}
        for mode in MODES:
            wanted = ScoreSettings(mode=mode, self_influence=mode != "dot")
            record = describe_scores(run, self.kind, layers, self.stage_3_queries, QuerySettings(), wanted)
            scored = score_run(
                task, lm, execution, wanted, run.folder / "scores" / mode, record,
                [[query] for query in self.stage_3_queries], self.stage_3_queries,
                run.folder / f"queries-{mode}" if keep_queries else None,
            )  # fmt: skip
            self.records[mode], self.scored[mode] = record, scored
            self.scores[mode] = torch.from_numpy(np.load(scored.folders[0] / "scores.npy"))
        self.scores["self-influence"] = torch.from_numpy(np.load(scored.folders[0] / "self_influence.npy"))

    def rerank(self, rank: int | str, rerank: Callable[..., None], lm: nn.Module, execution: Execution) -> None:
        """Re-rank all examples in each mode with stage 3's function."""
        self.fine = FineRun(self.run, choose_rank(self.run.shapes, rank))
        coordinates = sum(map(math.prod, self.fine.projected.values()))
        if 8 * coordinates * (len(self.train) + len(self.queries)) > MAX_FINE_BYTES:
            say(f"--rerank_rank {rank}: its gradients are too large for the reference; checking rank {CHECKED_RANK}")
            self.fine = FineRun(self.run, CHECKED_RANK)
        calibrate.make_fine_statistics(lm, self.fine, execution)
        groups, settings = [[query] for query in self.stage_3_queries], RerankSettings(rerank=self.run.examples)
        for mode, record in self.records.items():
            folders = self.scored[mode].folders
            with silent():
                rerank(folders, self.run, record, [(self.fine, lm, 1.0)], groups, settings, execution)

    def checks(self, lm: nn.Module) -> Iterator[Check]:
        """Compare all numbers with those of the reference model `lm`."""
        sides = reference.projections(self.run.folder, list(self.run.layers))
        self.expected = reference.projected_sums(lm, sides, self.train)
        for part in (self.check_projections, self.check_gradients, self.check_scores):
            yield from part(lm, sides)
        if self.fine:
            folders = {mode: scored.folders[0] for mode, scored in self.scored.items()}
            errors = reranked_errors(folders, self.fine.path, lm, self.train, self.queries)
            yield Check("re-ranked scores", errors, GRADIENT_TOLERANCE[self.settings.dtype])

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
            stored = load_file(self.run.folder / "projections.safetensors")
            errors = reference.eigenbasis_errors(stored, sides, self.expected, settings.lora != "random")
            yield Check("eigenbasis", errors, GRADIENT_TOLERANCE[settings.dtype])

    def check_gradients(self, lm: nn.Module, sides: reference.Sides) -> Iterator[Check]:
        """Check gradients, factor sums, and what is stored of the gradients."""
        tolerance = GRADIENT_TOLERANCE[self.settings.dtype]
        asked = reference.projected_sums(lm, sides, self.queries)
        for what, grads, expected in (("train", self.grads, self.expected), ("query", self.query_grads, asked)):
            errors = {layer: relative_error(grad, expected[layer]) for layer, grad in grads.items()}
            yield Check(f"{what} gradients", errors, tolerance)
        errors = {key: relative_error(value, self.expected[key]) for key, value in self.sums.items()}
        counts = {key: float(self.sums[key] != self.expected[key]) for key in ("examples", "tokens")}
        yield Check("factor sums", errors | counts, tolerance)
        yield Check(
            "stored values",
            reference.stored_errors(self.stored, self.grads, self.settings.store_dtype),
            ROUNDING_TOLERANCE,
        )

    def check_scores(self, lm: nn.Module, sides: reference.Sides) -> Iterator[Check]:
        """Compare the scores with those of dense algebra, and with steps of the model."""
        yield Check("scores", self.score_errors(), self.score_tolerance)
        if steps := self.step_errors(lm, sides, self.solved):
            yield Check("steps of the model", steps, STEP_TOLERANCE)

    def score_errors(self) -> dict[str, float]:
        """Compare the scores with those of dense algebra. `solved` is (C + lambda I)^-1 z from now on."""
        kind, dtype, z = self.kind, self.settings.store_dtype, {}
        self.solved: dict[str, Tensor] = {}
        for layer, g in self.grads.items():
            z[layer] = g.double() if dtype == "none" else reference.restored(self.stored, layer, g.shape[1], dtype)
            c = reference.hessian(kind, z[layer], self.sums, layer, self.settings.basis == "eigen")
            self.solved[layer] = reference.preconditioned(kind, z[layer], c, dtype)
        expected = reference.scores(self.query_grads, z, self.solved)
        return {name: relative_error(self.scores[name], value) for name, value in expected.items()}

    @property
    def score_tolerance(self) -> float:
        """The largest error of scores that passes."""
        if self.settings.store_dtype == "none":  # stage 3 computes the gradients again, at full width unrounded
            return GRADIENT_TOLERANCE[self.settings.dtype]
        return SIGN_SCORE_TOLERANCE if self.settings.store_dtype == "int1" else SCORE_TOLERANCE

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
