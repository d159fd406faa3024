"""Make a small run with the pipeline's own functions, score it with those of stage 3, and check each number of it.

The reference (verify_reference) shares no code with the pipeline. Each step is checked from the numbers of the one
before: gradients and factor sums against autograd, stored values against the gradients, scores against dense algebra
with the stored values. So rounding errors of a dtype do not hide an error of a later step. Last, small steps of the
model itself are compared with the scores. Notation: n train examples, Q queries, k = r_out * r_in of a layer.
"""

import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from logra.hooks import GradientCapture
from logra.influence import MODES
from logra.inputs import model
from logra.inputs.queries import Query, query_hash, query_rows
from logra.quantise import FLOAT_DTYPES
from logra.run_dir import RunDir, RunRecord
from logra.runtime import processes
from logra.runtime.memory import available_memory
from logra.runtime.progress import say
from logra.runtime.settings import Execution, RunSettings, ScoreSettings
from logra.stages import calibrate, extract, open_run
from logra.stages.gradients import make_extractor
from logra.stages.score import Scorer, ScoreTask, write_pass
from logra.stages.score_files import ScoreRecord, SelfInfluence, score_files
from logra.tools import verify_reference as reference
from logra.tools.verify_reference import Text, relative_error

SHORT_TEXT = 8  # tokens
MAX_K = 2**12  # of the first, the middle and the last layer: C [k, k] is built and solved in float64
MAX_OTHER_K = 2**8  # of all other layers
MAX_CUBES = 2e11  # sum of k^3 up to which --lora none is kept
COPY_BYTES = 24  # bytes per parameter that a float64 copy of the model and its gradients need
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}  # by the model's dtype; factor sums too
ROUNDING_TOLERANCE = 1e-3  # in steps, and of a scale
SCORE_TOLERANCE, SIGN_SCORE_TOLERANCE = 1e-3, 0.05  # with int1 a CPU rounds the queries to 8 bits
STANDARD_ERRORS, CORRELATION = 6, 0.9  # of the entries of random projections


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
        worst = max(self.errors, key=lambda name: math.inf if math.isnan(self.errors[name]) else self.errors[name])
        verdict, error = "FAIL" if self.failed else "pass", self.errors[worst]
        say(f"  {verdict}  {self.what}: {len(self.errors)} compared, error {error:.1e} at most, in {worst}")


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
    execution = replace(execution, batch_tokens=64 * settings.block_size)  # long and short texts in one batch
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        folder = processes.on_rank_0(lambda: Path(temporary))() / "run"
        run = make_run(folder, lm, tokenizer, described, small_settings(settings, described, examples), kind,
                       execution, cache_dir)  # fmt: skip
        queries = make_queries(run, lm)
        grads, query_grads = unrounded_gradients(run, lm, execution, queries)
        scores = stage_3(run, kind, lm, execution, queries)
        if processes.state().is_main_process:
            report(check(run, kind, load_reference(run, execution, lm), queries, grads, query_grads, scores))
        processes.state().wait_for_everyone()


def small_settings(settings: RunSettings, described: dict, examples: int) -> RunSettings:
    """Return the settings of the small run, and reduce the ranks in `described` so that C can be built and solved.

    With raw one layer has k <= n, which has a solver of its own.
    """
    sizes, count = described["layers"], len(described["layers"])
    ks = [r_out * r_in for *_, r_out, r_in in sizes.values()]
    if settings.lora == "none" and (max(ks) > MAX_K or sum(k**3 for k in ks) > MAX_CUBES):
        say("--lora none: C of such wide layers can't be solved here; checked with random projections instead")
        settings = replace(settings, lora="random")
    dense = {0, count // 2, count - 1}
    for number, size in enumerate(sizes.values()) if settings.lora != "none" else ():
        rank = math.isqrt(MAX_K if number in dense else MAX_OTHER_K)
        if size[2] * size[3] > rank * rank:
            size[2:] = min(size[2], rank), min(size[3], rank)
        if number == count // 2 and count > 1:
            r_out = min(size[2], math.isqrt(examples))
            size[2:] = r_out, min(size[3], examples // r_out)
    return replace(
        settings, max_examples=min(examples, settings.max_examples or examples), calibration_examples=examples,
        shard_examples=math.ceil(examples / 2),
    )  # fmt: skip


def make_run(
    folder: Path, lm: nn.Module, tokenizer: PreTrainedTokenizerBase, described: dict, settings: RunSettings, kind: str,
    execution: Execution, cache_dir: str | None,
) -> RunDir:  # fmt: skip
    """Run stage 2 with these settings in a new folder."""
    if processes.state().is_main_process:
        new = RunDir(folder, RunRecord(settings, {"hessian": kind}, **described))
        extract.write_train(new, tokenizer, None, cache_dir, None)
    calibrate.make_projections(lm, open_run.reload(folder), execution)
    run = open_run.reload(folder)
    extract.write_shards(lm, run, extract.unfinished_shards(run), execution)
    extract.write_hessian(kind, run)
    return run


def texts(run: RunDir) -> list[Text]:
    """Return the run's train examples."""
    rows = run.train()[:]
    counted = rows.get("counted") or [[True] * len(ids) for ids in rows["input_ids"]]
    return [Text(*pair) for pair in zip(rows["input_ids"], counted, strict=True)]


def make_queries(run: RunDir, lm: nn.Module) -> list[Query]:
    """Return the longest example, the end of the last one's first half, and texts of very different lengths.

    One text is just above each length where a batch changes the model (model.rope_boundaries).
    """
    examples, block_size = texts(run), run.settings.block_size
    half = examples[-1].token_ids[: len(examples[-1].token_ids) // 2 + 1]
    found = [longest(examples), Text(half, [t > len(half) // 2 for t in range(len(half))])]
    tokens = [token for text in examples for token in text.token_ids] or [0]
    boundaries = [length + 1 for length in model.rope_boundaries(lm.config) if length < block_size]
    for length in sorted({min(SHORT_TEXT, block_size), block_size, *boundaries}):
        found.append(Text((tokens * length)[:length], [True] * length))
    return [Query(str(number), *text, {"text": ""}) for number, text in enumerate(found)]


def longest(examples: list[Text]) -> Text:
    """Return the text with the most tokens."""
    return max(examples, key=lambda text: len(text.token_ids))


def unrounded_gradients(
    run: RunDir, lm: nn.Module, execution: Execution, queries: list[Query]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the gradients of each shard's examples and of the queries, {layer: [n, k]} float32."""
    examples = texts(run)
    batches = [examples[ids.start : ids.stop] for ids in run.shards] + [[Text(q.token_ids, q.counted) for q in queries]]
    with GradientCapture(lm, run.projections()) as capture:
        extractor = make_extractor(lm, capture, execution, run)
        *grads, query_grads = (
            extractor.gradients([t.token_ids for t in batch], [t.counted for t in batch]).wait()[0] for batch in batches
        )
        extractor.finish()
    return grads, query_grads


def stage_3(run: RunDir, kind: str, lm: nn.Module, execution: Execution, queries: list[Query]) -> dict[str, Tensor]:
    """Score the queries in each mode, with the default damping. Return the scores [Q, n], and the self-influence."""
    dampings, layers = ScoreSettings().dampings(kind, run.settings.store_dtype), list(run.layers)
    task, scores = ScoreTask(run, kind, dict.fromkeys(layers, ""), dampings), {}
    for mode in MODES:
        self_influence = None if mode == "dot" else SelfInfluence(run, kind, layers, dampings)
        record = ScoreRecord(
            query_loss="all", layers=layers, queries=query_hash(queries), split="verify", mode=mode, hessian=kind,
            num_queries=len(queries), num_examples=run.examples, top_k_only=None, group_by=None, log=run.record,
            damping=None, damping_absolute=None,
        )  # fmt: skip
        base = run.folder / "scores" / mode
        with score_files(base, record, dampings, run.shards) as files:
            scorer = Scorer(task, lm, execution, self_influence)
            write_pass(scorer, [[query] for query in queries], 0, files, mode)
            if self_influence and not self_influence.complete:
                self_influence.save()
            files[0].close()
            if processes.state().is_main_process:
                files[0].describe(query_rows(queries), None)
        if processes.state().is_main_process:
            scores[mode] = torch.from_numpy(np.load(f"{base}-{dampings[0].label}/scores.npy"))
    return scores | {"self-influence": self_influence.values[0]}


def load_reference(run: RunDir, execution: Execution, lm: nn.Module) -> nn.Module:
    """Load the model again, on the CPU and in float64 if that fits: the device never holds it twice."""
    fits = COPY_BYTES * sum(p.numel() for p in lm.parameters()) < available_memory()
    settings, dtype = run.settings, torch.float64 if fits else torch.float32
    hub = model.hub_options(settings.revision, execution.trust_remote_code)
    plain = model.load_model(settings.model_name, FLOAT_DTYPES[settings.dtype], "cpu", **hub)  # the same rounding
    say(f"{run.examples} examples, model in {settings.dtype}, reference in {str(dtype)[6:]}:")
    return plain.to(dtype).requires_grad_()


def stored_files(run: RunDir) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the stored gradients of all shards, in the form in which they are stored, and the factor sums."""
    folder, stored, sums = run.folder / "gradients", {}, {}
    for number in range(len(run.shards)):
        for name, tensor in load_file(folder / f"{number:05d}.safetensors").items():
            stored[name] = torch.cat([stored[name], tensor]) if name in stored else tensor
        for name, tensor in load_file(folder / f"{number:05d}.factors.safetensors").items():
            sums[name] = sums.get(name, 0) + (tensor.double() if tensor.is_floating_point() else tensor)
    return stored, sums


def check(
    run: RunDir, kind: str, lm: nn.Module, queries: list[Query], grads: list[dict[str, Tensor]],
    query_grads: dict[str, Tensor], scores: dict[str, Tensor],
) -> list[Check]:  # fmt: skip
    """Compare the small run and its scores with the reference model `lm`; see the module's docstring."""
    settings, layers, examples = run.settings, list(run.layers), texts(run)
    sides, (stored, sums) = reference.projections(run.folder, layers), stored_files(run)
    train = {layer: torch.cat([part[layer] for part in grads]) for layer in layers}
    expected = reference.projected_sums(lm, sides, examples)
    expected_queries = reference.projected_sums(lm, sides, [Text(q.token_ids, q.counted) for q in queries])

    counts = {"tokens": int(expected["tokens"]), "examples": len(examples)}
    factors = {key: relative_error(value, expected[key]) for key, value in sums.items() if key not in counts}
    tolerance = GRADIENT_TOLERANCE[settings.dtype]
    return [
        *check_projections(run, lm, sides, expected, tolerance),
        Check("gradients of train examples", {x: relative_error(train[x], expected[x]) for x in layers}, tolerance),
        Check("gradients of queries of very different lengths, in one batch",
              {x: relative_error(query_grads[x], expected_queries[x]) for x in layers}, tolerance),
        Check("factor sums", factors, tolerance),
        Check("counts", {key: abs(int(sums[key]) - count) for key, count in counts.items()}, 0),
        Check(f"stored values, {settings.store_dtype}",
              reference.stored_errors(stored, train, settings.store_dtype), ROUNDING_TOLERANCE),
        *check_scores(run, kind, lm, queries, train, query_grads, stored, sums, sides, scores),
    ]  # fmt: skip


def check_projections(
    run: RunDir, lm: nn.Module, sides: reference.Sides, expected: dict[str, Tensor], tolerance: float
) -> list[Check]:
    """Check which layers are tracked, and the projections; `expected` as in reference.projected_sums."""
    settings, checks = run.settings, []
    names = [name for name in reference.linear_layers(lm) if re.search(settings.layers or "", name)]
    names = [name for name in names if not settings.mlp_only or re.search(model.MLP_PATTERN, name, re.IGNORECASE)]
    wrong = {name: float((name in names) != (name in run.layers)) for name in [*names, *run.layers]}
    checks.append(Check("tracked layers", wrong, 0))
    if settings.lora == "random":
        moments, shared = reference.random_errors(sides, run.rotated), reference.shared_errors(sides)
        checks += [Check("projections, moments of N(0, 1/r) in standard errors", moments, STANDARD_ERRORS)]
        checks += [Check("projections, correlation of layers and sides", shared, CORRELATION)]
    if run.rotated:
        errors = reference.eigenbasis_errors(run.folder, sides, expected, settings.lora != "random")
        checks.append(Check("projections, covariances in the eigenbasis", errors, tolerance))
    return [line for line in checks if line.errors]  # no side may be projected


def check_scores(
    run: RunDir, kind: str, lm: nn.Module, queries: list[Query], train: dict[str, Tensor],
    query_grads: dict[str, Tensor], stored: dict[str, Tensor], sums: dict[str, Tensor], sides: reference.Sides,
    scores: dict[str, Tensor],
) -> list[Check]:  # fmt: skip
    """Compare the scores with those of dense algebra, and with steps of the model."""
    dtype, z, solved = run.settings.store_dtype, {}, {}
    for layer, g in train.items():
        z[layer] = g.double() if dtype == "none" else reference.restored(stored, layer, g.shape[1], dtype)
        c = None if kind == "none" else reference.hessian(kind, z[layer], sums, layer, run.settings.basis == "eigen")
        solved[layer] = reference.preconditioned(kind, z[layer], c, dtype)
    expected = reference.scores(query_grads, z, solved)
    tolerance = SIGN_SCORE_TOLERANCE if dtype == "int1" else SCORE_TOLERANCE
    checks = [
        Check("self-influence" if name == "self-influence" else f"scores, {name}",
              {f"Hessian {kind}": relative_error(scores[name], value)}, tolerance)
        for name, value in expected.items()
    ]  # fmt: skip
    return checks + check_steps(run, lm, queries, query_grads, solved, sides, scores["dot"])


def check_steps(
    run: RunDir, lm: nn.Module, queries: list[Query], query_grads: dict[str, Tensor], solved: dict[str, Tensor],
    sides: reference.Sides, dots: Tensor,
) -> list[Check]:  # fmt: skip
    """Compare dots with how fast a query's loss falls along small steps of the model.

    A step along (C + lambda I)^-1 z, for the highest and the lowest dot, lowers the loss by the dot. A plain gradient
    step on an example lowers its own loss, so its dot with itself is positive, whatever the Hessian.
    """
    asked = [Text(q.token_ids, q.counted) for q in queries]
    examples, errors = texts(run), {}
    query_norms, step_norms = (sum(g.double().square().sum(dim=1) for g in grads.values()).sqrt()
                               for grads in (query_grads, solved))  # fmt: skip
    for what, position in (("highest", dots.argmax()), ("lowest", dots.argmin())):
        q, example = divmod(int(position), dots.shape[1])
        dot, uncertain = (
            dots[q, example].item(),
            GRADIENT_TOLERANCE[run.settings.dtype] * query_norms[q] * step_norms[example],
        )
        if abs(dot) <= 2 * uncertain or (dot > 0) != (what == "highest"):
            say(f"  skip  steps: the {what} dot, {dot:.1e}, is too small or has the other sign")
            continue
        step = {}
        for layer, (p_in, p_out) in sides.items():
            y = solved[layer][example].view(run.projected[layer])
            y = y if p_out is None else p_out.double().T @ y
            step[layer] = y if p_in is None else y @ p_in.double()
        errors[f"the {what} dot"] = abs(reference.fall(lm, step, asked[q]) - dot) / abs(dot)
    own = examples.index(longest(examples))
    step = {
        layer: grad.detach()
        for layer, (grad, *_) in zip(sides, reference.gradients(lm, list(sides), asked[0]), strict=True)
    }
    if any(grad.any() for grad in step.values()):
        errors["a plain step"] = float(not reference.fall(lm, step, asked[0]) * dots[0, own] > 0)
    return [Check("steps of the model", errors, 0.5)] if errors else []


def report(checks: list[Check]) -> None:
    """Print the checks, and raise a ValueError if one failed."""
    for line in checks:
        line.say()
    if failed := [line for line in checks if line.failed]:
        raise ValueError(
            f"expected every check of --verify to pass, got FAIL in {len(failed)} of {len(checks)} (first: "
            f"{failed[0].what}, in {', '.join(failed[0].failed[:3])}); leave these layers out with --layers, or change "
            "the flags, and report it"
        )
