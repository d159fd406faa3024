"""Stage 3: precondition the queries' gradients, and score train examples with them.

Notation: Q queries, N train examples, S dampings, rows = S * Q (by damping, then by query), k = r_out * r_in of a
layer, R rank of a query (--query_rank).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from logra import hessian, influence
from logra.hooks import GradientCapture, ScoreCapture
from logra.inputs.queries import Query, query_hash, query_rows
from logra.projection import identity, times, unrotated
from logra.run_dir import RunDir
from logra.runtime import processes, progress
from logra.runtime.memory import available_memory, free_memory, is_out_of_memory, release_memory
from logra.runtime.settings import Damping, Execution, QuerySettings, ScoreSettings
from logra.scoring import self_check
from logra.scoring.matrix_files import KeptQueries
from logra.scoring.score_files import (
    ScoredCheckpoint,
    ScoreFile,
    ScoreRecord,
    needed_self_influence,
    score_files,
    score_folders,
)
from logra.stages.gradients import make_extractor

ShardScores = Iterator[tuple[int, dict[str, Tensor], list[Tensor]]]  # see influence.score_shards
FactoredQueries = dict[str, tuple[Tensor, Tensor]]  # layer -> left [rows, R, r_out], right [rows, R, r_in]
QuadraticForms = dict[str, list[influence.QuadraticForm]]  # layer -> one for each damping, or none


def block_name(layer: str) -> str:
    """Return the transformer block that a layer is in: its name up to the first number."""
    match = re.match(r"(.*?\.\d+)(\.|$)", layer)
    return match[1] if match else layer


@dataclass(frozen=True)
class ScoreTask:
    """Which scores of a run to compute.

    Attributes:
        run: The run.
        kind: Its Hessian.
        blocks: Layer -> name of the block over which dots are summed. Layers that are not here do not count.
        dampings: S dampings.
        query_rank: R, or None for exact queries. Only for a run that stores no gradients.
    """

    run: RunDir
    kind: str
    blocks: dict[str, str]
    dampings: list[Damping]
    query_rank: int | None = None

    def __post_init__(self) -> None:
        if self.query_rank and self.stores_gradients:
            raise ValueError("expected --query_rank with a run of --store_dtype none, got another run; leave it out")

    @property
    def stores_gradients(self) -> bool:
        """Whether the run stores gradients (--store_dtype is not none)."""
        return self.run.settings.bits != 0


def describe_scores(
    run: RunDir, kind: str, layers: list[str], queries: list[Query], query_settings: QuerySettings,
    score_settings: ScoreSettings,
) -> ScoreRecord:  # fmt: skip
    """Return the content of the scores' run.json; each folder adds its damping and checksums."""
    blocks = list(dict.fromkeys(map(block_name, layers))) if score_settings.layerwise else None
    return ScoreRecord(
        query_loss=query_settings.query_loss, layers=layers, queries=query_hash(queries), split=query_settings.split,
        mode=score_settings.mode, hessian=kind, num_queries=len(queries), num_examples=run.examples,
        top_k_only=score_settings.top_k_only, group_by=query_settings.group_by, query_rank=score_settings.query_rank,
        log=run.record, damping=None, damping_absolute=None, blocks=blocks,
    )  # fmt: skip


class ScoreSink(Protocol):
    """Takes the scores of passes, of one damping; score_files.ScoreFile is one."""

    def put(self, first_query: int, ids: range, scores: Tensor, block_dots: list[Tensor]) -> None: ...


class StreamedValues(Protocol):
    """Self-influences [S, N] that are summed along with the scores; score_files.SelfInfluence is one."""

    values: Tensor
    complete: bool

    def add(self, ids: range, parts: list[Tensor]) -> None: ...
    def save(self) -> None: ...


class Scorer:
    """Scores groups of queries against a run's train examples. Every rank calls the same methods.

    Args:
        task: Which scores.
        lm: The run's model.
        execution: How to run the model.
        self_influence: Computed along with the scores unless complete; None if it is not needed.

    Attributes:
        stored_queries: Layer -> preconditioned queries [rows, k] of the last pass over stored gradients.
    """

    def __init__(self, task: ScoreTask, lm: nn.Module, execution: Execution, self_influence: StreamedValues | None):
        self.task, self.run, self.lm, self.execution = task, task.run, lm, execution
        self.self_influence, self.device = self_influence, processes.state().device
        self.projections = self.run.projections()
        query_bytes = 4 * sum(r_out * r_in for r_out, r_in in self.run.projected.values()) * (1 + len(task.dampings))
        memory = int(min(available_memory() / processes.processes_here(), free_memory(self.device)) / 4)
        self.queries_per_step = min(processes.gather_list([max(1, memory // query_bytes)]))
        self.queries_per_pass = 2**31 if task.query_rank else self.queries_per_step  # factored queries are small
        self.stored_queries: dict[str, Tensor] = {}
        self.capture = GradientCapture(lm, self.projections)
        with self.capture:
            self.extractor = make_extractor(lm, self.capture, execution, self.run)

    @property
    def own_shards(self) -> range:
        """The shards of this rank."""
        return processes.share(len(self.run.shards))

    def halve_queries(self, queries: int) -> None:
        """Score fewer queries in later passes, after memory ran out in one of `queries` queries."""
        self.queries_per_pass = self.queries_per_step = queries // 2
        progress.say(f"out of memory with {queries} queries in a pass; going on with {queries // 2}")
        if self.self_influence and not self.self_influence.complete:
            self.self_influence.values.zero_()
        release_memory()

    @property
    def _self_influence_is_streamed(self) -> bool:
        """Whether self-influence is computed while shards are scored. raw's is computed layer by layer before."""
        return self.self_influence is not None and not self.self_influence.complete and self.task.kind != "raw"

    def score(self, groups: list[list[Query]]) -> ShardScores:
        """Yield what influence.score_shards does; a group's mean gradient is one query."""
        run, task = self.run, self.task
        self.stored_queries = {}  # frees those of the last pass
        if task.stores_gradients:
            queries, forms = self.preconditioned(groups)
            self.stored_queries = queries
            return influence.score_shards(
                run.open_shard, self.own_shards, queries, forms, self.device, run.settings.bits, task.blocks
            )
        full_width = run.projected == run.shapes and not self._self_influence_is_streamed
        queries = {}
        for first in range(0, len(groups), self.queries_per_step):
            step_queries, forms = self.preconditioned(groups[first : first + self.queries_per_step])
            for layer in list(step_queries):
                q, shape, projection = step_queries.pop(layer), run.projected[layer], self.projections[layer]
                if task.query_rank:
                    left, right = influence.low_rank(q, shape, task.query_rank)  # before it is unrotated, as `cut` does
                    if full_width:
                        left, right = times(left, projection.p_out), times(right, projection.p_in)
                    step_queries[layer] = left, right
                else:
                    step_queries[layer] = unrotated(q, projection, shape) if full_width else q
            queries = self._join(queries, step_queries) if queries else step_queries
        projections = identity(run.shapes) if full_width else self.projections
        capture = ScoreCapture(self.lm, {layer: projections[layer] for layer in queries}, queries, forms)
        return self._score_with_model(capture, len(task.dampings) * len(groups))

    def preconditioned(self, groups: list[list[Query]]) -> tuple[dict[str, Tensor], QuadraticForms]:
        """Return (C + lambda I)^-1 q of the groups' mean gradients q.

        Returns:
            Layer -> [S * len(groups), k]; and functions that compute self-influence, if it is streamed.
        """
        grads = self._query_gradients(groups)
        layers, rows = list(grads), len(self.task.dampings) * len(groups)
        own_layers = [layers[number] for number in processes.share(len(layers))]  # a rank solves its layers
        statistics = self.run.statistics(self.task.kind)
        quadratic_forms: QuadraticForms = {layer: [] for layer in layers}
        # Self-influence that is streamed needs the solvers of all layers on every rank.
        needed = layers if self._self_influence_is_streamed else own_layers
        for layer in progress.bar(needed, desc=f"Hessian {self.task.kind}", unit="layer"):
            solvers = self._preconditioners(layer, statistics(layer))
            if layer in own_layers:
                q = grads[layer].to(self.device)
                grads[layer] = torch.cat([solver.solve(q) for solver in solvers]).cpu()
            if self._self_influence_is_streamed:
                quadratic_forms[layer] = [solver.quadratic for solver in solvers]
            elif self.self_influence and not self.self_influence.complete:  # raw
                for ids, block in zip(self.run.shards, self._stored_gradients(layer), strict=True):
                    self.self_influence.add(ids, [solver.quadratic(block) for solver in solvers])
        for number, layer in enumerate(layers):  # after all solving: then no rank waits for another one's layer
            own = grads[layer] if layer in own_layers else torch.empty(rows, grads[layer].shape[1], device="meta")
            grads[layer] = processes.from_owner(number, own)
        if self.self_influence and not self.self_influence.complete and self.task.kind == "raw":
            self.self_influence.save()
        return grads, quadratic_forms

    def _preconditioners(self, layer: str, statistics: dict[str, Tensor]) -> list[hessian.Preconditioner]:
        """Return (C + lambda I)^-1 of a layer for each damping."""
        statistics = {key: tensor.to(self.device) for key, tensor in statistics.items()}
        train = torch.cat(list(self._stored_gradients(layer))) if "gram" in statistics else None
        return hessian.preconditioners(self.task.kind, statistics, self.task.dampings, train)

    def _stored_gradients(self, layer: str) -> Iterator[Tensor]:
        """Yield a layer's gradients [n, k] float32, shard by shard, of the whole run."""
        for block in self.run.read(layer, range(len(self.run.shards))):
            yield block.to(self.device).float()

    def _query_gradients(self, groups: list[list[Query]]) -> dict[str, Tensor]:
        """Return the groups' gradients (means of their queries'), {layer: [len(groups), k]}, on every rank."""
        sizes = [sum(query.sign > 0 for query in group) for group in groups]
        members = [(i, query.sign / sizes[i], query) for i, group in enumerate(groups) for query in group]
        members = [members[n] for n in processes.share(len(members))]
        token_ids, counted = [query.token_ids for *_, query in members], [query.counted for *_, query in members]
        bar = progress.bar(total=sum(map(len, token_ids)), desc="query gradients", unit="tok")
        with self.capture, bar:
            own_grads, _ = self.extractor.gradients(token_ids, counted, on_batch=bar.update).wait()
            self.extractor.finish()
        group_numbers = torch.tensor([i for i, *_ in members], dtype=torch.long)
        weights = torch.tensor([weight for _, weight, _ in members])[:, None]
        grads = {}
        for layer in self.task.blocks:
            r_out, r_in = self.run.projected[layer]
            grads[layer] = torch.zeros(len(groups), r_out * r_in)
            if own_grads:  # a rank may have no query
                grads[layer].index_add_(0, group_numbers, own_grads.pop(layer) * weights)
            grads[layer] = processes.sum_over_ranks(grads[layer])
        return grads

    def _join(self, queries: FactoredQueries, more: FactoredQueries) -> FactoredQueries:
        """Join the factored queries of two steps; rows stay in the order damping, then query."""

        def join(one: Tensor, two: Tensor) -> Tensor:
            by_damping = (part.unflatten(0, (len(self.task.dampings), -1)) for part in (one, two))
            return torch.cat(list(by_damping), dim=1).flatten(0, 1)

        return {layer: (join(q[0], more[layer][0]), join(q[1], more[layer][1])) for layer, q in queries.items()}

    def _score_with_model(self, capture: ScoreCapture, rows: int) -> ShardScores:
        """Score a run that stores no gradients: run the model on the train examples again."""
        examples = self.run.train()
        with capture:
            extractor = make_extractor(self.lm, capture, self.execution, self.run)
            for shard in self.own_shards:
                ids = self.run.shards[shard]
                batch = examples[ids.start : ids.stop]
                scores, _ = extractor.gradients(batch["input_ids"], batch.get("counted"), ids.start).wait()
                totals: dict[str, Tensor] = {}  # block -> [n, rows + S]
                for layer, layer_scores in scores.items():
                    block = self.task.blocks[layer]
                    totals[block] = totals[block] + layer_scores if block in totals else layer_scores
                dots = {block: total[:, :rows] for block, total in totals.items()}
                yield shard, dots, list(sum(totals.values())[:, rows:].T)
            extractor.finish()


def score_run(
    task: ScoreTask, lm: nn.Module, execution: Execution, score_settings: ScoreSettings, base: Path,
    record: ScoreRecord, groups: list[list[Query]], queries: list[Query], keep_queries: Path | None,
) -> ScoredCheckpoint:  # fmt: skip
    """Score a run's examples, and write a folder <base>-<damping> for each damping.

    Args:
        task, lm, execution: See Scorer.
        score_settings: Its mode, and whether the folders get the self-influences.
        base: scores/<label>.
        record: Of the scores, see describe_scores.
        groups: The groups of queries.
        queries: What queries.jsonl says of each group.
        keep_queries: A new folder for the preconditioned queries; None: they are not kept.
    """
    self_influence = needed_self_influence(task.run, record, task.dampings, score_settings.self_influence)
    scorer = Scorer(task, lm, execution, self_influence)
    widths = {layer: math.prod(task.run.projected[layer]) for layer in task.blocks}
    kept = KeptQueries(keep_queries, widths, len(task.dampings), len(groups)) if keep_queries else None
    with score_files(base, record, task.dampings, task.run.shards) as files:
        pairs = write_scores(scorer, groups, files, record.mode, kept)
        self_check.check(pairs, files, record.mode, self_influence and self_influence.values)
        for s, file in enumerate(files) if processes.state().is_main_process else ():
            file.describe(query_rows(queries), self_influence.values[s] if score_settings.self_influence else None)
    processes.state().wait_for_everyone()
    deviations = torch.stack([file.deviations() for file in files]) if kept else None
    values, kept_files = self_influence and self_influence.values, kept.close() if kept else None
    folders = score_folders(base, task.dampings)
    return ScoredCheckpoint(task.run, folders, deviations, values, kept_files, scorer.queries_per_step)


def write_scores(
    scorer: Scorer, groups: list[list[Query]], files: list[ScoreFile], mode: str, kept: KeptQueries | None
) -> list[self_check.CheckedPair]:
    """Score the groups of queries and fill the files. Return a few scores of this rank, computed again.

    A pass over all train examples scores as many queries as fit in memory.
    """
    pairs: list[self_check.CheckedPair] = []
    first, self_influence = 0, scorer.self_influence
    while first < len(groups):
        batch = groups[first : first + scorer.queries_per_pass]
        if not all(processes.gather_list([write_pass(scorer, batch, first, files, mode)])):
            scorer.halve_queries(len(batch))
            for file in files:
                file.forget(first)
            continue
        if self_influence and not self_influence.complete:
            self_influence.save()
        if scorer.stored_queries:  # the run stores gradients
            pairs += self_check.recomputed(scorer.run, scorer.own_shards, scorer.stored_queries, files, first)
        if kept:
            kept.keep(first, scorer.stored_queries)
        first += len(batch)
    for file in files:
        file.close()
    return pairs


def write_pass(scorer: Scorer, batch: list[list[Query]], first: int, files: Sequence[ScoreSink], mode: str) -> bool:
    """Score a batch of groups, of which `first` is the first one's number. Return False if memory runs out.

    Raises:
        RuntimeError, ValueError: Memory runs out for a single query; or as Scorer.score.
    """
    self_influence = scorer.self_influence
    scores = progress.bar(scorer.score(batch), total=len(scorer.own_shards), desc="scoring", unit="shard")
    try:
        for shard, dots, self_influence_parts in scores:
            ids = scorer.run.shards[shard]
            if self_influence_parts:
                self_influence.add(ids, self_influence_parts)
            for s, file in enumerate(files):
                rows = slice(s * len(batch), (s + 1) * len(batch))
                block_dots = [dots[block].T[rows].cpu() for block in dict.fromkeys(scorer.task.blocks.values())]
                values = self_influence.values[s, ids.start : ids.stop] if self_influence else None
                file.put(first, ids, influence.scores_of_mode(sum(block_dots), values, mode), block_dots)
    except (RuntimeError, ValueError) as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
        return False
    return True
