"""A look at a finished run: its Hessian, odd examples, duplicates, and the scores, as text.

Notation: N train examples, k coordinates of a layer, lambda its damping. The effective dimension is the sum over
eigenvalues of value / (value + lambda): how many directions of the layer the scores still tell apart.
"""

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from logra import hessian, progress
from logra.log import Log
from logra.quantise import unpack
from logra.ranking import Scores
from logra.scores import SelfInfluence, damping_label

SHOWN = 10
DENSE = 3  # layers whose C is decomposed, of the kind raw: the first, the middle and the last one
SKETCH = 16  # random directions in which examples are compared
NEIGHBOURS = 64  # examples, nearest in the first direction, that each is compared with
ALIKE = 0.02  # of two gradients, relative difference that is still called equal; batches and few bits round


def eigenvalues(kind: str, stats: dict[str, Tensor]) -> Tensor:
    """Return the eigenvalues of a layer's C, largest first, float64 (see hessian.preconditioner for the statistics)."""
    if kind == "raw":
        found = torch.linalg.eigvalsh(stats["cov" if "cov" in stats else "gram"].double()) / stats["examples"].item()
    else:
        found = hessian.eigen(kind, stats)[0].flatten()
    return found.clamp_min(0).sort(descending=True).values


def spectra(log: Log, about: dict) -> Iterator[str]:
    """Yield a line a layer: k, trace and its share, the largest eigenvalues' share, lambda, effective dimension."""
    kind, layers = about["hessian"], list(about["layers"])
    if kind == "none":
        yield "Hessian none: nothing to show"
        return
    if kind == "raw":
        layers = list(dict.fromkeys(layers[i] for i in np.linspace(0, len(layers) - 1, DENSE).astype(int)))
    statistics, traces, rows = log.statistics(kind), {}, []
    for layer in progress.bar(layers, desc="spectra", unit="layer"):
        values, k = eigenvalues(kind, statistics(layer)), log.projected[layer][0] * log.projected[layer][1]
        traces[layer] = values.sum().item()
        lam = hessian.damping_lambda(traces[layer], k, about["damping"], about["damping_absolute"])
        first = values[: max(1, k // 100)].sum().item() / max(traces[layer], 1e-30)
        rows.append((layer, k, first, lam, (values / (values + lam)).sum().item() if lam else 0.0))
    yield f"{'layer':44s}{'k':>9s}{'trace':>11s}{'share':>8s}{'top 1%':>8s}{'lambda':>11s}{'effective':>11s}"
    for layer, k, first, lam, effective in rows:
        share = traces[layer] / max(sum(traces.values()), 1e-30)
        yield f"{layer:44s}{k:9,d}{traces[layer]:11.3g}{share:8.1%}{first:8.1%}{lam:11.3g}{effective:11,.0f}"
    if kind == "raw":
        yield f"({len(rows)} of {len(about['layers'])} layers, whose C is decomposed)"


def odd_examples(log: Log, about: dict, train: Dataset) -> Iterator[str]:
    """Yield the examples with the largest self-influence: often broken, rare or very long texts."""
    label = damping_label(about["damping"], about["damping_absolute"])
    own = SelfInfluence(log, about["hessian"], about["layers"], [label])
    if not own.whole:
        yield "not known: score with --self_influence, or in a mode that needs it"
        return
    values = own.values[0]
    for i in values.sort(descending=True, stable=True).indices[:SHOWN].tolist():
        row = train[i]
        share = values[i].item() / max(values.double().sum().item(), 1e-30)
        text = " ".join(row["text"].split())[:60]
        yield f"{values[i]:11.4g}{share:7.1%}  example {i}, {row['document_id']}: {text}"


def sketches(log: Log) -> np.ndarray:
    """Return each example's gradient of the first layer in random directions, [N, SKETCH] float32."""
    layer, found = next(iter(log.layers)), []
    k = log.projected[layer][0] * log.projected[layer][1]
    directions = torch.randn(k, SKETCH, generator=torch.Generator().manual_seed(0)) / k**0.5
    for index in range(len(log.shards)):
        with log.open_shard(index) as file:
            rows = file.read(layer)
            z = rows.float() if log.bits is None else unpack(rows, file.read(f"{layer}.scale"), log.bits, k)
            found.append((z @ directions).numpy())
    return np.concatenate(found)


def duplicates(log: Log, train: Dataset) -> Iterator[str]:
    """Yield groups of examples whose gradients are equal: the same text, again."""
    if log.bits == 0:
        yield "not known: the run stores no gradients"
        return
    sketch = sketches(log)
    order, groups, leader = np.argsort(sketch[:, 0], kind="stable"), {}, {}
    for place, i in enumerate(order.tolist()):
        near = order[max(0, place - NEIGHBOURS) : place]
        equal = np.linalg.norm(sketch[near] - sketch[i], axis=1) <= ALIKE * np.linalg.norm(sketch[i])
        leader[i] = leader[int(near[equal.argmax()])] if equal.any() and sketch[i].any() else i
        groups.setdefault(leader[i], []).append(i)
    found = sorted((sorted(group) for group in groups.values() if len(group) > 1), key=len, reverse=True)
    yield f"{len(found)} groups, {sum(len(group) for group in found)} examples"
    for members in found[:SHOWN]:
        names = ", ".join(f"{i} ({train[i]['document_id']})" for i in members[:6])
        yield f"{len(members)} times: {names}{' ...' if len(members) > 6 else ''}"


def distribution(scores: Scores, queries: list[dict]) -> Iterator[str]:
    """Yield each query's spread of scores, for the first queries."""
    if scores.ends:
        yield "not known: scores of --top_k_only"
        return
    yield f"{'query':24s}{'mean':>11s}{'deviation':>11s}{'lowest':>11s}{'highest':>11s}{'positive':>10s}"
    for number, query in enumerate(queries[:SHOWN]):
        row = np.asarray(scores.matrix[number], dtype=np.float64)
        numbers = "".join(f"{value:11.3g}" for value in (row.mean(), row.std(), row.min(), row.max()))
        yield f"{str(query['id'])[:23]:24s}{numbers}{(row > 0).mean():10.0%}"


def diagnose(log: Log, about: dict, scores: Scores, queries: list[dict], train: Dataset) -> str:
    """Return all of it, with headings."""
    parts = {
        f"Hessian {about['hessian']} by layer": spectra(log, about),
        "Largest self-influence (and its share)": odd_examples(log, about, train),
        "Equal gradients": duplicates(log, train),
        "Scores": distribution(scores, queries),
    }
    return "\n".join(line for title, lines in parts.items() for line in (title, *lines, ""))
