"""Faults planted into the pipeline, and the lines of --verify that find them.

As a script, `python tests/tools/verify_faults.py`, it writes the table of docs/limits.md.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import make_model, make_texts, make_tokenizer, run_cli, save_model, write_jsonl  # noqa: E402

from logra import experts, hessian, hooks, influence, projection, quantise  # noqa: E402
from logra.models import layers  # noqa: E402
from logra.runtime import settings  # noqa: E402
from logra.scoring import combine, rerank, score, score_files, self_check  # noqa: E402
from logra.stages import fine_run, gradients  # noqa: E402

Patch = pytest.MonkeyPatch
FAULTS: dict[str, tuple[str, Callable[[Patch], None]]] = {}  # fault -> flags, and a function that plants it


def fault(name: str, flags: str = "") -> Callable:
    """Enter a function that plants a fault, with the flags that it concerns."""

    def enter(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        assert name not in FAULTS
        FAULTS[name] = flags, plant
        return plant

    return enter


def changed(owner: object, name: str, change: Callable) -> Callable[[Patch], None]:
    """Return a function that replaces owner.name by change(original, *its arguments)."""
    original = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *values, **options: change(original, *values, **options))


def after_backward(change: Callable) -> Callable[[Patch], None]:
    """Return a function that lets change(sums, gradients) alter a batch's factor sums."""

    def backward(original, self, losses, positions):
        grads = original(self, losses, positions)
        if self.want_factors:
            change(self._batch_sums, grads)
        return grads

    return changed(hooks.GradientCapture, "backward", backward)


def of_batch(change: Callable) -> Callable[[Patch], None]:
    """Return a function that replaces a batch's positions or targets by change(batch)."""
    return changed(
        gradients, "make_batch", lambda original, *values: original(*values)._replace(**change(original(*values)))
    )


def cut(g: torch.Tensor) -> torch.Tensor:
    """Set the lower 16 bits of float32 numbers to 0."""
    return (g.view(torch.int32) & -65536).view(torch.float32)


# ---- the loss and its gradient
fault("the gradient's sign")(changed(hooks.GradientCapture, "_reduce", lambda f, *a: -f(*a)))
fault("a factor of 1.01 in the loss")(changed(gradients, "example_losses", lambda f, *a, **k: 1.01 * f(*a, **k)))
fault("targets off by one")(of_batch(lambda b: {"targets": b.input_ids.roll(-2, 1)}))
fault("counted tokens off by one")(
    changed(
        gradients,
        "make_batch",
        lambda f, ids, counted, device: f(ids, counted and [[*c[1:], True] for c in counted], device),
    )
)
fault("examples in the order of the batch")(
    changed(gradients.HostGradients, "wait", lambda f, self: (self.rows.sort(), f(self))[1])
)
fault("texts on both sides of a length where the model changes, in one batch", "--model_name longrope")(
    lambda patch: patch.setattr(gradients, "rope_boundaries", lambda config: [])
)

# ---- layers and projections
fault("the last layer is dropped")(changed(layers, "choose_layers", lambda f, *a: dict([*f(*a).items()][:-1])))
fault("the same P for all layers", "--rank 4")(
    changed(projection, "random_side", lambda f, seed, layer, *a: f(seed, "", *a))
)
fault("the same P for all layers, rotated", "--rank 4 --hessian ekfac")(FAULTS["the same P for all layers"][1])
fault("P without 1 / sqrt(r)", "--rank 4")(
    changed(projection, "random_side", lambda f, *a: None if a[3] >= a[4] else f(*a) * a[3] ** 0.5)
)
fault("the sides of P are swapped", "--rank 4 --layers [qo]_proj")(
    changed(hooks.GradientCapture, "_hook", lambda f, self, name, p_in, p_out, *a: f(self, name, p_out, p_in, *a))
)
fault("U for U^T in the projection", "--hessian ekfac")(
    changed(projection, "eigenbasis", lambda f, cov: (f(cov)[0], f(cov)[1].T))
)
fault("stored eigenvalues in reverse order", "--hessian ekfac")(
    changed(projection, "eigenbasis", lambda f, cov: (f(cov)[0].flip(0), f(cov)[1]))
)
fault("PCA keeps the smallest directions", "--lora pca --rank 4")(
    changed(projection, "eigenbasis", lambda f, cov: tuple(tensor.flip(0) for tensor in f(cov)))
)

fault("each expert with the P of another one", "--model_name mixtral --layers experts --rank 4")(
    changed(
        experts.WideSide,
        "__init__",
        lambda f, self, p, shard: f(self, None if p is None else p.roll(p.shape[1] // 5, 1), shard),
    )
)
fault("the mean over a token's experts for the sum", "--model_name mixtral --layers experts --rank 4")(
    changed(experts.WideSide, "__call__", lambda f, self, x, pairs: f(self, x, pairs) / pairs.per_token)
)

# ---- factor sums
fault("the token count is doubled", "--hessian kfac")(after_backward(lambda sums, grads: sums["tokens"].mul_(2)))
fault("positions off by one", "--hessian kfac")(of_batch(lambda b: {"positions": b.positions.roll(1, 1)}))
fault("the last token's position is kept", "--hessian kfac")(
    of_batch(lambda b: {"positions": b.positions | b.positions.roll(1, 1)})
)
fault("padding is counted", "--hessian kfac")(of_batch(lambda b: {"positions": torch.ones_like(b.positions)}))
fault("ekfac's squares are not squared", "--hessian ekfac")(
    after_backward(lambda sums, grads: sums.update({f"{x}.square": g.abs().sum(dim=0) for x, g in grads.items()}))
)
fault("the Hessian is of the first shard alone", "--hessian ekfac")(
    changed(hessian, "statistics", lambda f, kind, run, shards, *a: f(kind, run, range(1), *a))
)

# ---- stored values
fault("int1's sign is flipped", "--preset best")(changed(quantise, "pack", lambda f, g, bits: f(-g, bits)))


def upper_bits_first(patch: Patch) -> None:
    def swapped(packed):
        return packed // 16 + packed % 16 * 16

    changed(quantise, "pack", lambda f, *a: (swapped(f(*a)[0]), f(*a)[1]))(patch)
    changed(influence.LevelQueries, "score", lambda f, self, packed, scale: f(self, swapped(packed), scale))(patch)


fault("int4 packed with the upper bits first, and read so", "--store_dtype int4 --hessian ekfac")(upper_bits_first)
fault("int8's step is 0.06", "--store_dtype int8 --hessian ekfac")(
    lambda patch: patch.setitem(quantise.STEPS_IN_RMS, 8, 0.06)
)
fault("bfloat16 is cut off, not rounded", "--store_dtype bfloat16")(
    changed(gradients, "stored_tensors",
            lambda f, layer, g, dtype: f(layer, cut(g) if dtype == "bfloat16" else g, dtype))
)  # fmt: skip

# ---- the Hessian and its inverse
fault("damping times 100")(changed(settings, "default_damping", lambda f, *a: 100 * f(*a)))
fault("damping without / k")(changed(hessian, "damping_lambda", lambda f, trace, k, damping, absolute: damping * trace))
fault("raw's dense solver (N >= k) is doubled")(changed(hessian.DensePreconditioner, "solve", lambda f, *a: 2 * f(*a)))
fault("raw's dual solver (N < k) without N")(
    changed(
        hessian.DualPreconditioner, "__init__", lambda f, self, g, gram, damping: f(self, g, gram * len(g), damping)
    )
)
fault("ekfac without / N", "--hessian ekfac")(
    changed(hessian, "eigen", lambda f, kind, stats: (f(kind, stats)[0] * stats["examples"], *f(kind, stats)[1:]))
)
fault("ekfac's eigenvalues in another order", "--hessian ekfac")(
    changed(hessian, "eigen", lambda f, *a: (f(*a)[0].flip(1), *f(*a)[1:]))
)
fault("ekfac's squares are not squared, in another basis", "--hessian ekfac --basis projected")(
    changed(hessian, "rotated_squares",
            lambda f, blocks, *u: sum(hessian.change_basis(g, *u).abs().sum(dim=0) for g in blocks).flatten().double())
)  # fmt: skip


def transposed(patch: Patch) -> None:
    def solve(original, self, g):
        return hessian.change_basis(self._in_eigenbasis(g) * self.inverse, *self.bases).flatten(1)

    changed(hessian.EigenPreconditioner, "solve", solve)(patch)


fault("U for U^T in the eigenbasis", "--hessian kfac --basis projected")(transposed)
# ---- stage 3
fault("the sign of the scores")(changed(influence, "scores_of_mode", lambda f, *a: -f(*a)))
fault("l2 without its half")(
    changed(influence, "scores_of_mode", lambda f, dots, own, mode: dots - own if mode == "l2" else f(dots, own, mode))
)
fault("cosine without its root")(
    changed(influence, "scores_of_mode",
            lambda f, dots, own, mode: dots / own if mode == "cosine" else f(dots, own, mode))
)  # fmt: skip


def without_first_layer(queries: dict[str, torch.Tensor], forms: dict) -> tuple[dict, dict]:
    """Set the queries of the first layer to 0."""
    first = next(iter(queries))
    return queries | {first: torch.zeros_like(queries[first])}, forms


fault("a layer is left out in stage 3")(
    changed(score.Scorer, "preconditioned", lambda f, *a: without_first_layer(*f(*a)))
)


def fewer_shards(patch: Patch) -> None:
    def score_shards(original, open_shard, shards, *values):
        return original(open_shard, [*shards][:-1], *values)

    changed(influence, "score_shards", score_shards)(patch)


fault("the last shard is not scored")(fewer_shards)
fault("scores are one example to the right")(
    changed(
        score_files.ScoreFile, "put", lambda f, self, q, ids, scores, dots: f(self, q, ids, scores.roll(1, 1), dots)
    )
)
fault("self-influence of another example")(
    changed(score_files.SelfInfluence, "add", lambda f, self, ids, parts: f(self, ids, [p.roll(1) for p in parts]))
)
fault("queries in another order")(
    changed(score.Scorer, "_query_gradients", lambda f, *a: {x: g.flip(0) for x, g in f(*a).items()})
)
fault("all tokens of a query count")(
    changed(score.Scorer, "_query_gradients",
            lambda f, self, groups: f(self, [[q._replace(counted=[True] * len(q.counted)) for q in g] for g in groups]))
)  # fmt: skip
fault("signs are scored without their scale", "--preset best")(
    changed(influence.BitQueries, "score", lambda f, self, packed, scale: f(self, packed, torch.ones_like(scale)))
)
fault("queries of a run without gradients are not turned back", "--lora none --store_dtype none --hessian ekfac")(
    lambda patch: patch.setattr(score, "unrotated", lambda queries, *_: queries)
)

# ---- checkpoints
CHECKPOINTS = "--checkpoints step-1 step-2 --layers down_proj"
of_factors = partial(changed, influence, "checkpoint_factors")
fault("scores are not divided by their standard deviation", CHECKPOINTS)(
    of_factors(lambda f, deviations, *a: f(torch.ones_like(deviations), *a))
)
fault("the standard deviation has N - 1 for N", CHECKPOINTS)(
    changed(score_files.ScoreFile, "deviations",
            lambda f, self: f(self) * (self.record.num_examples / (self.record.num_examples - 1)) ** 0.5)
)  # fmt: skip
fault("one standard deviation for all queries", CHECKPOINTS)(
    changed(score_files.ScoreFile, "deviations", lambda f, self: f(self).mean().expand(self.record.num_queries))
)
fault("the standard deviations of another checkpoint", CHECKPOINTS)(
    of_factors(lambda f, deviations, *a: f(deviations.flip(0), *a))
)
fault("the weights do not count", CHECKPOINTS)(
    of_factors(lambda f, deviations, weights, mode: f(deviations, [1.0] * len(weights), mode))
)
fault("a checkpoint is left out", CHECKPOINTS)(
    of_factors(lambda f, *a: f(*a) * torch.tensor([[0.0], [1.0]], dtype=torch.float64))
)


def of_scored_again(change: Callable) -> Callable[[Patch], None]:
    """Return a function that scores the shards again with change(checkpoint, another one) in place of a checkpoint."""
    return changed(combine, "_scored_again", lambda f, scored, *a: f([*map(change, scored, scored[::-1])], *a))


fault("the self-influence of another checkpoint", CHECKPOINTS)(
    of_scored_again(lambda one, other: one._replace(self_influence=other.self_influence))
)
fault("the kept queries of another checkpoint", CHECKPOINTS)(
    of_scored_again(lambda one, other: one._replace(queries=other.queries))
)
fault("the parts of another checkpoint", CHECKPOINTS)(
    changed(
        score_files.ScoreFile, "put",
        lambda f, self, q, ids, scores, dots, parts=None: f(
            self, q, ids, scores, dots, None if parts is None else parts.flip(0)
        ),
    )
)  # fmt: skip


def last_queries(original: Callable, self: score.Scorer, task: score.ScoreTask, lm: torch.nn.Module, *values) -> None:
    """Make a Scorer with the model of the last checkpoint."""
    last = Path(task.run.settings.model_name).with_name("step-2")
    original(self, task, AutoModelForCausalLM.from_pretrained(last), *values)


fault("the last model's queries at an earlier checkpoint", CHECKPOINTS)(changed(score.Scorer, "__init__", last_queries))


# ---- re-ranking
RERANK = "--preset best --rerank_rank none"
fault("re-ranked scores of another query", RERANK)(
    changed(rerank, "fine_scores", lambda f, *values: [*reversed(f(*values))])
)
fault("re-ranked scores of the example beside", RERANK)(
    changed(
        rerank, "places_of", lambda f, some, ids: (f(some, ids) + 1) % len(ids)
    )
)  # fmt: skip
fault("the eigenvalues of re-ranking are not squares", RERANK)(
    changed(
        hooks.SquareCapture, "_reduce",
        lambda f, self, name, x, d: hooks.GradientCapture._reduce(self, name, x, d).abs().sum(dim=0),
    )
)  # fmt: skip
fault("the eigenvalues of re-ranking are sums", RERANK)(
    changed(
        fine_run.FineRun, "save_statistics",
        lambda f, self, p, sums: f(self, p, sums | {"examples": torch.ones_like(sums["examples"])}),
    )
)  # fmt: skip


def not_rotated(original: Callable, self: fine_run.FineRun, projections: dict, sums: dict) -> None:
    """Write the statistics with the identity for each basis."""
    eyes = {n: p._replace(p_in=torch.eye(len(p.p_in)), p_out=torch.eye(len(p.p_out))) for n, p in projections.items()}
    original(self, eyes, sums)


fault("the rotation of re-ranking is left out", RERANK)(changed(fine_run.FineRun, "save_statistics", not_rotated))
fault("re-ranking with another damping", RERANK)(
    changed(rerank, "fine_scores", lambda f, *values: f(*values[:5], 0.1, *values[6:]))
)


def without_root(original: Callable, *values) -> list:
    """Divide cosines by the self-influence."""
    fine, mode = original(*values), values[4].mode
    return [x._replace(scores=x.scores / x.self_influence.sqrt()) if mode == "cosine" else x for x in fine]


fault("cosine of re-ranked scores without the root", RERANK)(changed(rerank, "fine_scores", without_root))


def found(name: str, folder: Path) -> tuple[int, str]:
    """Return the exit status of --verify with a fault, and its row of the table. See prepare for the folder.

    Stage 3's own checks, of a few scores at random, are off.
    """
    flags, plant = FAULTS[name]
    words = (
        flags.split() if re.search("--model_name|--checkpoints", flags) else ["--model_name", "llama", *flags.split()]
    )
    words = [str(folder / word) if (folder / word).exists() else word for word in words]
    out, quiet = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(quiet):
        plant(patch)
        patch.setattr(self_check, "PAIRS", 0)
        patch.setattr(combine, "PAIRS", 0)
        status = run_cli("extract_log", *words, "--data_name", folder / "docs.jsonl", "--verify")
    lines = dict.fromkeys(re.findall(r"^  FAIL  ([^:,]+)", out.getvalue(), re.MULTILINE))
    return status, f"| {name} | {f'`{flags}`' if flags else ''} | {', '.join(lines)} |"


def prepare(folder: Path) -> None:
    """Write what `found` needs."""
    for name in ("llama", "longrope", "mixtral"):
        save_model(folder / name, name)
    for number in (1, 2):
        make_model("llama", seed=number).save_pretrained(folder / f"step-{number}")
        make_tokenizer().save_pretrained(folder / f"step-{number}")
    rows = [{"id": f"doc{i}", "text": text} for i, text in enumerate(make_texts(20, seed=1))]
    write_jsonl(folder / "docs.jsonl", rows)


if __name__ == "__main__":
    page = ROOT / "docs/limits.md"
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        prepare(Path(temporary))
        rows = [found(name, Path(temporary))[1] for name in FAULTS]
    before, head, _ = page.read_text("utf-8").partition(
        "| fault | flags | lines of `--verify` that FAIL |\n|---|---|---|\n"
    )
    page.write_text(before + head + "\n".join(rows) + "\n", "utf-8")
