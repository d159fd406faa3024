"""Diagnose a finished run: its Hessian, unusual examples, duplicates, and the distribution of the scores, as text.

Notation: N train examples, k coordinates of a layer, lambda its damping. The effective dimension is the sum over
eigenvalues of value / (value + lambda): the number of directions of the layer that count in the scores.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from logra import hessian
from logra.quantise import STEPS_IN_RMS, unpack
from logra.run_dir import RunDir
from logra.runtime import progress
from logra.scoring.rank import StoredScores
from logra.scoring.score_files import ScoreRecord, SelfInfluence

MAX_ROWS = 10
RAW_LAYERS = 3  # layers whose C is decomposed for the Hessian raw: the first, the middle and the last one
SKETCH_SIZE = 64  # random directions in which examples are compared; a norm is measured to about 9%
NEIGHBOURS = 64  # each example is compared with this many, the nearest in the first direction
MODEL_ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}  # of the same gradient in two batches, relative
STORE_ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}


def raw_matrix(stats: dict[str, Tensor]) -> Tensor:
    """Return a layer's C times N for the Hessian raw, or its Gram matrix, which has the same trace and eigenvalues."""
    return stats["cov"] if "cov" in stats else stats["gram"]


def eigenvalues(kind: str, stats: dict[str, Tensor]) -> Tensor:
    """Return the eigenvalues of a layer's C, largest first, float64; `stats` as for hessian.preconditioners."""
    if kind == "raw":
        values = torch.linalg.eigvalsh(raw_matrix(stats).double()) / stats["examples"].item()
    else:
        values = hessian.eigen(kind, stats)[0].flatten()
    return values.clamp_min(0).sort(descending=True).values


def spectra(run: RunDir, record: ScoreRecord) -> Iterator[str]:
    """Yield a line for each layer; for the Hessian raw for three of them.

    It shows k, the trace and its share of all scored layers' traces, the share of the largest 1% of the eigenvalues in
    the trace, lambda, and the effective dimension.
    """
    kind, layers = record.hessian, list(record.layers)
    if kind == "none":
        yield "Hessian none: nothing to show"
        return
    shown = {layers[i] for i in np.linspace(0, len(layers) - 1, RAW_LAYERS).astype(int)} if kind == "raw" else {*layers}
    statistics, rows, total = run.statistics(kind), [], 0.0
    for layer in progress.bar(layers, desc="spectra", unit="layer"):
        stats = statistics(layer)
        if layer not in shown:
            total += raw_matrix(stats).double().trace().item() / run.examples
            continue
        values, k = eigenvalues(kind, stats), math.prod(run.projected[layer])
        trace = values.sum().item()
        lam = hessian.damping_lambda(trace, k, *record.applied_damping)
        largest = values[: max(1, k // 100)].sum().item() / max(trace, 1e-30)
        effective_dimension = (values / (values + lam)).sum().item() if lam else 0.0
        rows.append((layer, k, trace, largest, lam, effective_dimension))
        total += trace
    yield f"{'layer':44s}{'k':>9s}{'trace':>11s}{'share':>8s}{'top 1%':>8s}{'lambda':>11s}{'effective':>11s}"
    for layer, k, trace, largest, lam, effective in rows:
        share = trace / max(total, 1e-30)
        yield f"{layer:44s}{k:9,d}{trace:11.3g}{share:8.1%}{largest:8.1%}{lam:11.3g}{effective:11,.0f}"
    if kind == "raw":
        yield f"({len(rows)} of {len(layers)} layers, whose C was decomposed; a share is of all {len(layers)} traces)"


def odd_examples(run: RunDir, record: ScoreRecord, train: Dataset) -> Iterator[str]:
    """Yield the examples with the largest self-influence. These are often broken, rare or very long texts."""
    self_influence = SelfInfluence(run, record.hessian, record.layers, [record.applied_damping])
    if not self_influence.complete:
        yield "not known: score with --self_influence, or with --mode cosine or l2"
        return
    values = self_influence.values[0]
    total = max(values.double().sum().item(), 1e-30)
    for i in values.sort(descending=True, stable=True).indices[:MAX_ROWS].tolist():
        example, value = train[i], values[i].item()
        text = " ".join(example["text"].split())[:60]
        yield f"{value:11.4g}{value / total:7.1%}  example {i}, {example['document_id']}: {text}"


def sketches(run: RunDir) -> np.ndarray:
    """Return each example's gradient of the first layer in random directions, [N, SKETCH_SIZE] float32."""
    layer, bits = next(iter(run.layers)), run.settings.bits
    k = math.prod(run.projected[layer])
    directions = torch.randn(k, SKETCH_SIZE, generator=torch.Generator().manual_seed(0)) / k**0.5
    shards = range(len(run.shards))
    blocks = run.read(layer, shards)
    if bits is not None:
        scales = run.read(f"{layer}.scale", shards)
        blocks = (unpack(packed, scale, bits, k) for packed, scale in zip(blocks, scales, strict=True))
    return np.concatenate([(grads.float() @ directions).numpy() for grads in blocks])


def rounding(run: RunDir) -> float:
    """Return the largest relative difference that rounding makes between stored gradients of the same text.

    A batch's rounding, relative to the root mean square of an example's gradient, moves few numbers to another of the
    levels that few bits have, but those by a whole step.
    """
    settings = run.settings
    of_model = MODEL_ROUNDING[settings.dtype]
    if settings.bits is None:
        return max(of_model, STORE_ROUNDING.get(settings.store_dtype, 0.0))
    return max(of_model, (STEPS_IN_RMS.get(settings.bits, 2.0) * of_model) ** 0.5)


def duplicates(run: RunDir, train: Dataset) -> Iterator[str]:
    """Yield groups of examples whose gradients are equal to within rounding: those of the same text.

    Each is compared with the first one of the group.
    """
    if run.settings.bits == 0:
        yield "not known: the run stores no gradients"
        return
    sketch, limit = sketches(run), rounding(run)
    norms, groups = np.linalg.norm(sketch, axis=1), dict[int, list[int]]()
    recent: list[int] = []  # the first ones of the last groups
    for i in np.argsort(sketch[:, 0], kind="stable").tolist():
        distances = np.linalg.norm(sketch[recent] - sketch[i], axis=1)
        near = int(distances.argmin()) if recent and norms[i] > 0 else None
        if near is not None and distances[near] <= limit * norms[i]:
            groups[recent[near]].append(i)
        else:
            groups[i], recent = [i], [*recent, i][-NEIGHBOURS:]
    copies = sorted((sorted(group) for group in groups.values() if len(group) > 1), key=len, reverse=True)
    yield f"{len(copies)} groups, {sum(map(len, copies))} examples, with a relative difference of at most {limit:.1g}"
    for group in copies[:MAX_ROWS]:
        names = ", ".join(f"{i} ({train[i]['document_id']})" for i in group[:6])
        yield f"{len(group)} times: {names}{' ...' if len(group) > 6 else ''}"


def distribution(scores: StoredScores, queries: list[dict]) -> Iterator[str]:
    """Yield a line with the distribution of the scores for each of the first queries."""
    if scores.matrix is None:
        yield "not known: scores of --top_k_only"
        return
    yield f"{'query':24s}{'mean':>11s}{'deviation':>11s}{'lowest':>11s}{'highest':>11s}{'positive':>10s}"
    for number, query in enumerate(queries[:MAX_ROWS]):
        row = np.asarray(scores.matrix[number], dtype=np.float64)
        numbers = "".join(f"{value:11.3g}" for value in (row.mean(), row.std(), row.min(), row.max()))
        yield f"{str(query['id'])[:23]:24s}{numbers}{(row > 0).mean():10.0%}"


def diagnose(run: RunDir, record: ScoreRecord, scores: StoredScores, queries: list[dict], train: Dataset) -> str:
    """Return the whole diagnosis, with headings. Of combined scores, `run` is that of the last checkpoint."""
    of_checkpoint = f", at the last checkpoint ({run.folder.name})" if record.checkpoints else ""
    sections = {
        f"Hessian {record.hessian} by layer{of_checkpoint}": spectra(run, record),
        f"Largest self-influence (and its share){of_checkpoint}": odd_examples(run, record, train),
        f"Equal gradients, of the first layer{of_checkpoint}": duplicates(run, train),
        f"Scores{', of all checkpoints together' if record.checkpoints else ''}": distribution(scores, queries),
    }
    return "\n".join(line for title, lines in sections.items() for line in (title, *lines, ""))
