"""Stage 3 with several checkpoints: combine their scores (see influence.checkpoint_factors).

Notation: C checkpoints, Q queries, N train examples, S dampings, k = r_out * r_in of a layer.
The combined folder parent/scores/<label>/ holds the files of score_files.py, and factors.npy [C, Q] float64: a score is
the sum over checkpoints of factor times score. With --top_k_only no checkpoint's scores are kept, so the shards are
scored a second time, with the preconditioned queries of the first time.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logra import influence
from logra.inputs.queries import Query, query_rows
from logra.run_dir import RunDir
from logra.runtime import files, processes, progress
from logra.runtime.settings import Damping
from logra.scoring.score_files import (
    AGAIN,
    ScoredCheckpoint,
    ScoreFile,
    ScoreRecord,
    deviation,
    needed_self_influence,
    score_files,
    score_folders,
)

BLOCK_SCORES = 2**24  # of each checkpoint in memory at a time
PAIRS = 100  # combined scores that are computed again from the files
TOLERANCE = 1e-5  # relative to the sum of the absolute parts


def kept_scores(
    run: RunDir, base: Path, record: ScoreRecord, dampings: list[Damping], self_influence: bool
) -> ScoredCheckpoint | None:
    """Return what score.score_run does, if an earlier command wrote the same scores and they are whole; else None.

    With --top_k_only the queries are needed too, which are not kept.

    Args:
        run: Of a checkpoint.
        base, record, dampings: See score_files.score_files.
        self_influence: The folders must have the self-influences.
    """
    values = needed_self_influence(run, record, dampings, self_influence)
    if record.top_k_only is not None or (values and not values.complete):
        return None
    if not _are_kept(base, record, dampings, self_influence):
        return None
    return ScoredCheckpoint(run, score_folders(base, dampings), None, values and values.values, None, 0)


@processes.on_rank_0
def _are_kept(base: Path, record: ScoreRecord, dampings: list[Damping], self_influence: bool) -> bool:
    """Return whether an earlier command wrote these scores, and they are whole; arguments as for kept_scores."""
    for damping, folder in zip(dampings, score_folders(base, dampings), strict=True):
        try:
            content = files.read_json(folder / "run.json", AGAIN)
        except ValueError:
            return False
        names = content["files"] if files.has_shape(content, {"files": dict}) else {}
        expected = replace(record, damping=damping.relative, damping_absolute=damping.absolute, files=names).to_json()
        same = json.loads(json.dumps(expected)) == content and ("self_influence.npy" in names) == self_influence
        if not same or files.file_checksums(folder, names) != names:
            return False
    return True


@processes.on_rank_0
def _stored_deviations(folder: Path) -> Tensor:
    """Return the standard deviation of each query's scores in a folder, [Q] float64."""
    rows = (torch.from_numpy(row.copy()).double() for row in np.load(folder / "scores.npy", mmap_mode="r"))
    return torch.stack([deviation(row.mean(), row.square().mean()) for row in rows])


def combine(
    base: Path, record: ScoreRecord, scored: Sequence[ScoredCheckpoint], dampings: list[Damping],
    queries: list[Query], self_influence: bool,
) -> None:  # fmt: skip
    """Write the combined scores of S dampings: folders <base>-<damping>.

    Args:
        base: parent/scores/<label>.
        record: Of the scores. Its `checkpoints` are those of `scored`.
        scored: The checkpoints, in order.
        dampings: S.
        queries: The queries (or groups).
        self_influence: Also combine the examples' self-influences, as if they were the scores of one query.
    """
    weights = [checkpoint["weight"] for checkpoint in record.checkpoints or ()]
    by_checkpoint = [
        torch.stack([_stored_deviations(folder) for folder in checkpoint.folders])
        if record.top_k_only is None
        else checkpoint.deviations
        for checkpoint in scored
    ]
    deviations = torch.stack(by_checkpoint, dim=1)  # [S, C, Q]
    factors = [influence.checkpoint_factors(part, weights, record.mode) for part in deviations]
    own_influences: list[Tensor | None] = [None] * len(dampings)
    if self_influence:
        stacked = torch.stack([checkpoint.self_influence for checkpoint in scored], dim=1)  # [S, C, N]
        spread = deviation(stacked.double().mean(dim=2), stacked.double().square().mean(dim=2))  # [S, C]
        of_examples = [influence.checkpoint_factors(part[:, None], weights, "dot") for part in spread]
        own_influences = [(f * part).sum(dim=0).float() for f, part in zip(of_examples, stacked, strict=True)]
    with score_files(base, record, dampings, scored[0].run.shards) as made:
        _fill(made, scored, factors)
        for s, file in enumerate(made) if processes.state().is_main_process else ():
            if record.top_k_only is None:
                _check(file, [checkpoint.folders[s] for checkpoint in scored], factors[s])
            np.save(file.folder / "factors.npy", factors[s].numpy())
            file.describe(query_rows(queries), own_influences[s])
    processes.state().wait_for_everyone()


def _fill(made: list[ScoreFile], scored: Sequence[ScoredCheckpoint], factors: list[Tensor]) -> None:
    """Combine the scores of this rank's shards, a batch of queries at a time, and close the files.

    Args:
        made: The files of the S dampings.
        scored: The C checkpoints.
        factors: S times [C, Q].
    """
    record, shards = made[0].record, scored[0].run.shards
    own_shards = processes.share(len(shards))
    step = BLOCK_SCORES // max(map(len, shards))
    source = _stored_blocks
    if record.top_k_only is not None:
        step, source = min(checkpoint.queries_per_pass for checkpoint in scored) // len(scored), _scored_again
    for first in range(0, record.num_queries, max(1, step)):
        rows = slice(first, min(first + max(1, step), record.num_queries))
        blocks = source(scored, record, own_shards, rows)
        for ids, by_damping in progress.bar(blocks, total=len(own_shards), desc="combining", unit="shard"):
            for file, factor, checkpoints in zip(made, factors, by_damping, strict=True):
                parts = [f[rows, None] * part.scores for f, part in zip(factor, checkpoints, strict=True)]
                dots = [(part.block_dots, part.self_influence) for part in checkpoints]
                layer_parts = influence.layer_parts(dots, factor[:, rows], record.mode) if record.blocks else ()
                kept = None if record.top_k_only is None else torch.stack(parts).float()
                file.put(first, ids, sum(parts).float(), list(layer_parts), kept)
    for file in made:
        file.close()


class _Block(NamedTuple):
    """A checkpoint's part of a shard's examples: scores [q, n], self-influence [n] unless the mode is dot, and with
    --layerwise the dots of blocks of layers [L, q, n].
    """

    scores: Tensor
    self_influence: Tensor | None
    block_dots: Tensor | None = None


def _stored_blocks(
    scored: Sequence[ScoredCheckpoint], record: ScoreRecord, shards: Sequence[int], rows: slice
) -> Iterator[tuple[range, list[list[_Block]]]]:
    """Yield the example ids of each shard and, for each damping and checkpoint, the scores in its files."""
    names = ["scores.npy", "layer_scores.npy"] if record.blocks else ["scores.npy"]
    matrices = [
        [[np.load(folder / name, mmap_mode="r") for name in names] for folder in checkpoint.folders]
        for checkpoint in scored
    ]
    for shard in shards:
        ids = scored[0].run.shards[shard]
        by_damping: list[list[_Block]] = [[] for _ in scored[0].folders]
        for checkpoint, of_dampings in zip(scored, matrices, strict=True):
            for s, found in enumerate(by_damping):
                values = (torch.from_numpy(m[..., rows, ids.start : ids.stop].copy()) for m in of_dampings[s])
                scores, *block_dots = values
                found.append(_Block(scores, _self_influence(checkpoint, s, ids), *block_dots))
        yield ids, by_damping


def _self_influence(checkpoint: ScoredCheckpoint, damping: int, ids: range) -> Tensor | None:
    """Return the self-influences of a shard's examples."""
    return None if checkpoint.self_influence is None else checkpoint.self_influence[damping, ids.start : ids.stop]


def _scored_again(
    scored: Sequence[ScoredCheckpoint], record: ScoreRecord, shards: Sequence[int], rows: slice
) -> Iterator[tuple[range, list[list[_Block]]]]:
    """Yield what _stored_blocks does, from the gradients of the checkpoints' runs and the queries that were kept."""
    count, device = rows.stop - rows.start, processes.state().device
    streams = []
    for checkpoint in scored:
        queries = {
            layer: torch.from_numpy(np.load(path, mmap_mode="r")[:, rows].copy()).flatten(0, 1)
            for layer, path in checkpoint.queries.items()
        }
        run, no_forms = checkpoint.run, {layer: [] for layer in queries}
        streams.append(influence.score_shards(run.open_shard, shards, queries, no_forms, device, run.settings.bits))
    for blocks in zip(*streams, strict=True):
        ids = scored[0].run.shards[blocks[0][0]]
        by_damping: list[list[_Block]] = [[] for _ in scored[0].folders]
        for checkpoint, (_, dots, _) in zip(scored, blocks, strict=True):
            for s, found in enumerate(by_damping):
                own = _self_influence(checkpoint, s, ids)
                part = dots[""].T[s * count : (s + 1) * count].cpu()
                found.append(_Block(influence.scores_of_mode(part, own, record.mode), own))
        yield ids, by_damping


def _check(file: ScoreFile, folders: list[Path], factors: Tensor) -> None:
    """Compute random scores of a closed file again from the checkpoints' files.

    Raises:
        ValueError: One is another one.
    """
    matrices = [np.load(folder / "scores.npy", mmap_mode="r") for folder in folders]
    for _ in range(PAIRS):
        query, example = (secrets.randbelow(size) for size in matrices[0].shape)
        parts = [factor[query].item() * float(m[query, example]) for factor, m in zip(factors, matrices, strict=True)]
        score = file.read(query, example)
        if not abs(score - sum(parts)) <= TOLERANCE * sum(map(abs, parts)) + 1e-30:
            raise ValueError(
                f"expected the score {sum(parts):.6g} of query {query} and example {example}, combined again from the "
                f"checkpoints' files, got {score:.6g} in the file; run compute_influence.py again, and if this comes "
                "back, report it"
            )
