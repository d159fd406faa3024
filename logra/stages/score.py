"""Stage 3 between queries and scores: queries' gradients, preconditioned, against shards or against a running model.

Notation: Q queries, N train examples, S dampings, rows = S * Q, k = r_out * r_in of a layer.
"""

import re
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from logra import hessian, influence
from logra.hessian import Damping
from logra.hooks import GradientCapture, ScoreCapture
from logra.inputs.queries import Query
from logra.projection import Projection, identity
from logra.run_dir import RunDir
from logra.runtime import processes, progress
from logra.runtime.memory import available_memory
from logra.runtime.settings import Execution
from logra.stages.gradients import Extractor, make_extractor
from logra.stages.score_files import SelfInfluence

ShardScores = Iterator[tuple[int, dict[str, Tensor], list[Tensor]]]  # see influence.score_shards


def block_name(layer: str) -> str:
    """Return the transformer block that a layer is in: its name up to the first number."""
    found = re.match(r"(.*?\.\d+)(\.|$)", layer)
    return found[1] if found else layer


def low_rank(queries: Tensor, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of each query as a sum of `rank` outer products (torch.svd_lowrank).

    Args:
        queries: [rows, r_out * r_in].
        shape: (r_out, r_in).
        rank: R; at most min(shape) are of use.

    Returns:
        Left [rows, R, r_out], which holds the singular values, and right [rows, R, r_in].
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)  # svd_lowrank draws; the ranks must find the same
        u, s, v = torch.svd_lowrank(queries.view(-1, *shape), q=min(rank, *shape), niter=4)
    return (u * s[:, None]).mT.contiguous(), v.mT.contiguous()


def unrotated(queries: Tensor, projection: Projection, shape: tuple[int, int]) -> Tensor:
    """Return P_out^T Q P_in of queries [rows, r_out * r_in]: q . vec(P_out G P_in^T) is its vec . vec(G)."""
    q = queries.view(-1, *shape)
    q = q if projection.p_out is None else projection.p_out.T @ q
    return (q if projection.p_in is None else q @ projection.p_in).flatten(1)


class Scorer:
    """Scores groups of queries against a run's examples; every rank calls the same methods.

    Args:
        run, kind: The run, and its Hessian.
        blocks: Layer -> name under which its dots are summed; just these layers count.
        lm: The run's model.
        dampings, own: S dampings; where self-influence goes, if it is wanted.
        query_rank: R; only for a run that stores no gradients.
        execution: How the model is executed.
    """

    def __init__(
        self,
        run: RunDir,
        kind: str,
        blocks: dict[str, str],
        lm: nn.Module,
        dampings: list[Damping],
        own: SelfInfluence | None,
        query_rank: int | None,
        execution: Execution,
        accelerator: Accelerator,
    ):
        if query_rank and run.settings.bits != 0:
            raise ValueError("expected --query_rank with a run of --store_dtype none, got another; leave it out")
        self.run, self.kind, self.blocks, self.lm, self.dampings = run, kind, blocks, lm, dampings
        self.own, self.query_rank, self.execution, self.accelerator = own, query_rank, execution, accelerator
        self.projections = run.projections()
        self.mine = processes.share(len(run.shards), accelerator)
        size = 4 * sum(o * i for o, i in run.projected.values()) * (1 + len(dampings))
        free = available_memory() / 4 / processes.processes_here()
        self.queries_per_step = min(
            processes.gather_list([max(1, int(free) // size)], accelerator)
        )  # the ranks take the same steps
        self.queries_per_pass = 2**31 if query_rank else self.queries_per_step
        self.capture = GradientCapture(lm, self.projections)
        with self.capture:
            self.extractor = self._make_extractor(self.capture)

    def _make_extractor(self, capture: GradientCapture) -> Extractor:
        most = max(map(len, self.run.shards))
        return make_extractor(self.lm, capture, self.execution, self.run.settings.block_size, most)

    def score(self, groups: list[list[Query]]) -> ShardScores:
        """Yield what influence.score_shards does; the mean gradient of a group is one query."""
        own = self.own is not None and not self.own.whole and self.kind != "raw"
        whole = self.run.projected == self.run.shapes and not own  # the model's own basis will do
        queries: dict = {}
        for first in range(0, len(groups), self.queries_per_step):
            part = groups[first : first + self.queries_per_step]
            solved, solvers = self.preconditioned(part)
            for layer in list(solved) if self.run.settings.bits == 0 else ():
                q, shape = solved.pop(layer), self.run.projected[layer]
                q = unrotated(q, self.projections[layer], shape) if whole else q
                solved[layer] = low_rank(q, shape, self.query_rank) if self.query_rank else q
            queries = self._joined(queries, solved) if queries else solved
        if self.run.settings.bits == 0:
            used = identity(self.run.shapes) if whole else self.projections
            return self._by_model(queries, {layer: used[layer] for layer in queries}, solvers)
        device, bits = self.accelerator.device, self.run.settings.bits
        return influence.score_shards(self.run.open_shard, self.mine, queries, solvers, device, bits, self.blocks)

    def preconditioned(self, groups: list[list[Query]]) -> tuple[dict[str, Tensor], dict]:
        """Return (C + lambda I)^-1 of the groups' mean gradients, {layer: [S * len(groups), k]}; see _precondition."""
        return self._precondition(self._query_gradients(groups), len(groups))

    def _joined(self, queries: dict, more: dict) -> dict:
        """Join low-rank queries of two groups; rows are by damping, then by query."""

        def join(a: Tensor, b: Tensor) -> Tensor:
            a, b = (part.view(len(self.dampings), -1, *part.shape[1:]) for part in (a, b))
            return torch.cat([a, b], dim=1).flatten(0, 1)

        return {layer: tuple(map(join, queries[layer], more[layer])) for layer in queries}

    def _query_gradients(self, groups: list[list[Query]]) -> dict[str, Tensor]:
        """Return the groups' mean projected gradients, {layer: [Q, k]} float32, on every rank."""
        queries = [(i, 1 / len(group), query) for i, group in enumerate(groups) for query in group]
        queries = [queries[n] for n in processes.share(len(queries), self.accelerator)]
        token_ids, counted = [q.token_ids for _, _, q in queries], [q.counted for _, _, q in queries]
        bar = progress.bar(total=sum(map(len, token_ids)), desc="query gradients", unit="tok")
        with self.capture, bar:
            mine, _ = self.extractor.gradients(token_ids, counted, done=bar.update).wait()
            self.extractor.finish()
        places = torch.tensor([i for i, _, _ in queries], dtype=torch.long)
        weights = torch.tensor([weight for _, weight, _ in queries])[:, None]
        grads = {}
        for layer in self.blocks:
            r_out, r_in = self.run.projected[layer]
            grads[layer] = torch.zeros(len(groups), r_out * r_in)
            if mine:
                grads[layer].index_add_(0, places, mine.pop(layer) * weights)
            grads[layer] = processes.sum_over_ranks(grads[layer], self.accelerator)
        return grads

    def _precondition(
        self, grads: dict[str, Tensor], count: int
    ) -> tuple[dict[str, Tensor], dict[str, list[influence.QuadraticForm]]]:
        """Return (C + lambda I)^-1 q, {layer: [S * count, k]}, and what computes self-influence while shards stream by.

        A layer is one rank's work, and `grads` is emptied. raw's self-influence is added here, layer by layer: its
        factors don't fit in memory.
        """
        run, own, layers = self.run, self.own, processes.share(len(grads), self.accelerator)
        statistics, every = run.statistics(self.kind), range(len(run.shards))
        solved, solvers, device = {}, {layer: [] for layer in grads}, self.accelerator.device
        for number, layer in enumerate(progress.bar(list(grads), desc=f"Hessian {self.kind}", unit="layer")):
            q, mine = grads.pop(layer), number in layers
            solved[layer] = torch.zeros(len(self.dampings) * count, q.shape[1])
            streamed = own and not own.whole and self.kind != "raw"
            if mine or streamed:
                stats = {key: tensor.to(device) for key, tensor in statistics(layer).items()}
                blocks = [block.to(device).float() for block in run.read(layer, every)] if "gram" in stats else None
                train = torch.cat(blocks) if blocks else None
                found = [hessian.preconditioner(self.kind, stats, *damping, train) for damping in self.dampings]
            if mine:
                solved[layer] = torch.cat([solver.solve(q.to(device)) for solver in found]).cpu()
            if streamed:
                solvers[layer] = [solver.quadratic for solver in found]
            elif own and not own.whole and mine:
                for ids, block in zip(run.shards, run.read(layer, every), strict=True):
                    own.put(ids, [solver.quadratic(block.to(device).float()) for solver in found])
            solved[layer] = processes.sum_over_ranks(solved[layer], self.accelerator)
        if own and not own.whole and self.kind == "raw":
            own.save(self.accelerator)
        return solved, solvers

    def _by_model(
        self, queries: dict, projections: dict[str, Projection], own: dict[str, list[influence.QuadraticForm]]
    ) -> ShardScores:
        """Run the model over the train examples again, for a run that stores no gradients."""
        examples, rows = self.run.train(), len(next(iter(queries.values()))[0 if self.query_rank else slice(None)])
        with ScoreCapture(self.lm, projections, queries, own) as capture:
            extractor = self._make_extractor(capture)
            for shard in self.mine:
                ids = self.run.shards[shard]
                batch = examples[ids.start : ids.stop]
                found, _ = extractor.gradients(batch["input_ids"], batch.get("counted"), ids.start).wait()
                dots: dict[str, Tensor] = {}
                for layer, part in found.items():
                    block = self.blocks[layer]
                    dots[block] = dots[block] + part if block in dots else part
                selves = list(sum(dots.values())[:, rows:].T)
                yield shard, {block: part[:, :rows] for block, part in dots.items()}, selves
            extractor.finish()
