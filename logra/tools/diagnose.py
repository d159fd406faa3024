"""A look at a finished run: its Hessian, odd examples, duplicates, and the scores, as text.

Notation: N train examples, k coordinates of a layer, lambda its damping. The effective dimension is the sum over
eigenvalues of value / (value + lambda): how many directions of the layer the scores still tell apart.
"""

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from logra import hessian
from logra.quantise import unpack
from logra.run_dir import RunDir
from logra.runtime import progress
from logra.stages.rank import StoredScores
from logra.stages.score_files import ScoreRecord, SelfInfluence

MAX_ROWS = 10
DECOMPOSED_LAYERS = 3  # layers whose C is decomposed, of the kind raw: the first, the middle and the last one
SKETCH_SIZE = 16  # random directions in which examples are compared
NEIGHBOURS = 64  # examples, nearest in the first direction, that each is compared with
MAX_RELATIVE_DIFFERENCE = (
    0.02  # of two gradients, relative difference that is still called equal; batches and few bits round
)


def eigenvalues(kind: str, stats: dict[str, Tensor]) -> Tensor:
    """Return the eigenvalues of a layer's C, largest first, float64 (see hessian.preconditioner for the statistics)."""
    if kind == "raw":
        found = torch.linalg.eigvalsh(stats["cov" if "cov" in stats else "gram"].double()) / stats["examples"].item()
    else:
        found = hessian.eigen(kind, stats)[0].flatten()
    return found.clamp_min(0).sort(descending=True).values


def spectra(run: RunDir, record: ScoreRecord) -> Iterator[str]:
    """Yield a line a layer: k, trace and its share, the largest eigenvalues' share, lambda, effective dimension."""
    kind, layers = record.hessian, list(record.layers)
    if kind == "none":
        yield "Hessian none: nothing to show"
        return
    if kind == "raw":
        layers = list(dict.fromkeys(layers[i] for i in np.linspace(0, len(layers) - 1, DECOMPOSED_LAYERS).astype(int)))
    statistics, traces, rows = run.statistics(kind), {}, []
    for layer in progress.bar(layers, desc="spectra", unit="layer"):
        values, k = eigenvalues(kind, statistics(layer)), run.projected[layer][0] * run.projected[layer][1]
        traces[layer] = values.sum().item()
        lam = hessian.damping_lambda(traces[layer], k, *record.applied_damping)
        first = values[: max(1, k // 100)].sum().item() / max(traces[layer], 1e-30)
        rows.append((layer, k, first, lam, (values / (values + lam)).sum().item() if lam else 0.0))
    yield f"{'layer':44s}{'k':>9s}{'trace':>11s}{'share':>8s}{'top 1%':>8s}{'lambda':>11s}{'effective':>11s}"
    for layer, k, first, lam, effective in rows:
        share = traces[layer] / max(sum(traces.values()), 1e-30)
        yield f"{layer:44s}{k:9,d}{traces[layer]:11.3g}{share:8.1%}{first:8.1%}{lam:11.3g}{effective:11,.0f}"
    if kind == "raw":
        yield f"({len(rows)} of {len(record.layers)} layers, whose C is decomposed)"


def odd_examples(run: RunDir, record: ScoreRecord, train: Dataset) -> Iterator[str]:
    """Yield the examples with the largest self-influence: often broken, rare or very long texts."""
    own = SelfInfluence(run, record.hessian, record.layers, [record.applied_damping])
    if not own.whole:
        yield "not known: score with --self_influence, or in a mode that needs it"
        return
    values = own.values[0]
    for i in values.sort(descending=True, stable=True).indices[:MAX_ROWS].tolist():
        row = train[i]
        share = values[i].item() / max(values.double().sum().item(), 1e-30)
        text = " ".join(row["text"].split())[:60]
        yield f"{values[i]:11.4g}{share:7.1%}  example {i}, {row['document_id']}: {text}"


def sketches(run: RunDir) -> np.ndarray:
    """Return each example's gradient of the first layer in random directions, [N, SKETCH_SIZE] float32."""
    layer, found = next(iter(run.layers)), []
    k = run.projected[layer][0] * run.projected[layer][1]
    directions = torch.randn(k, SKETCH_SIZE, generator=torch.Generator().manual_seed(0)) / k**0.5
    for index in range(len(run.shards)):
        with run.open_shard(index) as file:
            rows = file.read(layer)
            z = (
                rows.float()
                if run.settings.bits is None
                else unpack(rows, file.read(f"{layer}.scale"), run.settings.bits, k)
            )
            found.append((z @ directions).numpy())
    return np.concatenate(found)


def duplicates(run: RunDir, train: Dataset) -> Iterator[str]:
    """Yield groups of examples whose gradients are equal: the same text, again."""
    if run.settings.bits == 0:
        yield "not known: the run stores no gradients"
        return
    sketch = sketches(run)
    order, groups, leader = np.argsort(sketch[:, 0], kind="stable"), {}, {}
    for place, i in enumerate(order.tolist()):
        near = order[max(0, place - NEIGHBOURS) : place]
        equal = np.linalg.norm(sketch[near] - sketch[i], axis=1) <= MAX_RELATIVE_DIFFERENCE * np.linalg.norm(sketch[i])
        leader[i] = leader[int(near[equal.argmax()])] if equal.any() and sketch[i].any() else i
        groups.setdefault(leader[i], []).append(i)
    found = sorted((sorted(group) for group in groups.values() if len(group) > 1), key=len, reverse=True)
    yield f"{len(found)} groups, {sum(len(group) for group in found)} examples"
    for members in found[:MAX_ROWS]:
        names = ", ".join(f"{i} ({train[i]['document_id']})" for i in members[:6])
        yield f"{len(members)} times: {names}{' ...' if len(members) > 6 else ''}"


def distribution(scores: StoredScores, queries: list[dict]) -> Iterator[str]:
    """Yield each query's spread of scores, for the first queries."""
    if scores.extremes:
        yield "not known: scores of --top_k_only"
        return
    yield f"{'query':24s}{'mean':>11s}{'deviation':>11s}{'lowest':>11s}{'highest':>11s}{'positive':>10s}"
    for number, query in enumerate(queries[:MAX_ROWS]):
        row = np.asarray(scores.matrix[number], dtype=np.float64)
        numbers = "".join(f"{value:11.3g}" for value in (row.mean(), row.std(), row.min(), row.max()))
        yield f"{str(query['id'])[:23]:24s}{numbers}{(row > 0).mean():10.0%}"


def diagnose(run: RunDir, record: ScoreRecord, scores: StoredScores, queries: list[dict], train: Dataset) -> str:
    """Return all of it, with headings."""
    parts = {
        f"Hessian {record.hessian} by layer": spectra(run, record),
        "Largest self-influence (and its share)": odd_examples(run, record, train),
        "Equal gradients": duplicates(run, train),
        "Scores": distribution(scores, queries),
    }
    return "\n".join(line for title, lines in parts.items() for line in (title, *lines, ""))
