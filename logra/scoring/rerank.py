"""Stage 3 with --rerank: compute the highest and lowest scores of each query again, without compression.

The stored gradients find the candidates. Their gradients and those of the queries are then computed with the model,
unprojected or at a higher rank, and scored with EK-FAC in that space (see stages/fine_run.py). With several checkpoints
the scores are combined as in combine.py; the standard deviations are those of a random sample of train examples.
Notation: Q queries, N train examples, C checkpoints, L blocks of layers, n scores of a query that are computed again.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from logra import influence
from logra.inputs.groups import document_numbers
from logra.inputs.queries import Query
from logra.run_dir import RunDir
from logra.runtime import files, processes, progress
from logra.runtime.settings import Damping, Execution, RerankSettings
from logra.scoring import rank, reranked
from logra.scoring.score import Scorer, ScoreTask, block_name, write_pass
from logra.scoring.score_files import ScoreRecord, deviation
from logra.stages.fine_run import FineRun

MIN_SAMPLE, MAX_SAMPLE = 64, 256  # random train examples: a quarter of all in these limits


class FineScores(NamedTuple):
    """Scores of one query, computed again with one model.

    Attributes:
        scores: [n].
        self_influence: [n]; zeros for dot.
        blocks: [L, n], dots by block of layers.
    """

    scores: Tensor
    self_influence: Tensor
    blocks: Tensor


class _Sink:
    """Takes the scores of a pass of queries (score.ScoreSink), and the self-influence (score.StreamedValues)."""

    complete = False

    def __init__(self, queries: int, examples: int, blocks: int):
        self.scores, self.blocks = torch.zeros(queries, examples), torch.zeros(blocks, queries, examples)
        self.values = torch.zeros(1, examples)

    def put(self, first_query: int, ids: range, scores: Tensor, block_dots: list[Tensor]) -> None:
        columns = slice(ids.start, ids.stop)
        self.scores[:, columns], self.blocks[:, :, columns] = scores, torch.stack(block_dots)

    def add(self, ids: range, parts: list[Tensor]) -> None:
        self.values[:, ids.start : ids.stop] += torch.stack(parts).cpu()

    def save(self) -> None:
        """Sum the parts of all ranks."""
        tensors = (self.scores, self.blocks, self.values)
        self.scores, self.blocks, self.values = (processes.sum_over_ranks(tensor) for tensor in tensors)


def fine_scores(
    run: FineRun, lm: nn.Module, groups: list[list[Query]], wanted: list[np.ndarray], record: ScoreRecord,
    damping: float, execution: Execution,
) -> list[FineScores]:  # fmt: skip
    """Compute scores without compression, on every rank.

    Args:
        run: The view of the run.
        lm: Its model.
        groups: The groups of queries.
        wanted: Example ids [n] of each query, ascending.
        record: Of the stored scores: mode and layers.
        damping: Relative.
        execution: How to run the model.
    """
    blocks = {layer: block_name(layer) if record.blocks else "" for layer in record.layers}
    count = len(set(blocks.values()))
    task = ScoreTask(run, "ekfac", blocks, [Damping(damping, None)])
    scorer = Scorer(task, lm, execution, None)
    found = list[FineScores]()
    while len(found) < len(groups):
        batch = slice(len(found), len(found) + scorer.queries_per_pass)
        ids = run.choose(np.unique(np.concatenate(wanted[batch])))
        sink = _Sink(len(groups[batch]), len(ids), count)
        scorer.self_influence = None if record.mode == "dot" else sink
        if not all(processes.gather_list([write_pass(scorer, groups[batch], 0, [sink], record.mode)])):
            scorer.halve_queries(len(groups[batch]))
            continue
        sink.save()
        order = np.argsort(ids)
        for number, own in enumerate(wanted[batch]):
            columns = torch.from_numpy(order[places_of(own, ids[order])])
            found.append(
                FineScores(sink.scores[number, columns], sink.values[0, columns], sink.blocks[:, number, columns])
            )
    return found


class Candidates(NamedTuple):
    """A query's candidates: example ids [n], ascending, their stored scores, and their ranks among all N."""

    ids: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray


def find_candidates(
    stored: rank.StoredScores, query: int, kept: int, examples: int, owners: np.ndarray | None
) -> Candidates:
    """Return the examples with the `kept` highest and lowest stored scores of a query.

    Args:
        stored: The scores of all queries.
        query: The query's number.
        kept: K.
        examples: N.
        owners: Number of each example's document, [N], if K counts documents, whose scores are sums.
    """
    found: dict[int, tuple[float, int]] = {}  # example -> stored score, rank
    for largest in (True, False):
        ranking = stored.ranking(query, largest)
        places = np.arange(min(kept, len(ranking.examples)))
        if owners is not None:
            documents = rank.by_document(ranking, owners, largest, "sum").examples[:kept]
            places = np.flatnonzero(np.isin(owners[ranking.examples], owners[documents]))
        ranks = places + 1 if largest else examples - places
        values = zip(ranking.scores[places].tolist(), ranks.tolist(), strict=True)
        found |= dict(zip(ranking.examples[places].tolist(), values, strict=True))
    ids = sorted(found)
    scores, ranks_of_all = zip(*(found[example] for example in ids), strict=True)
    return Candidates(np.array(ids), np.array(scores, np.float32), np.array(ranks_of_all))


def _all_candidates(folder: Path, run: RunDir, record: ScoreRecord, settings: RerankSettings) -> list[Candidates]:
    """Return the candidates of each query of a folder of scores."""
    checkpoints, queries = len(record.checkpoints or ()), record.num_queries
    stored = rank.StoredScores(folder, queries, run.examples, record.top_k_only, checkpoints)
    owners = document_numbers(run.train(), run.settings.pack) if settings.rerank_by == "document" else None
    return [find_candidates(stored, query, settings.rerank, run.examples, owners) for query in range(queries)]


def random_sample(run: RunDir) -> np.ndarray:
    """Return the ids of some random train examples, ascending; the run's seed draws them."""
    generator = np.random.default_rng([run.settings.seed, 1])
    size = min(run.examples, MAX_SAMPLE, max(MIN_SAMPLE, run.examples // 4))
    return np.sort(generator.choice(run.examples, size, replace=False))


def check(settings: RerankSettings, run: RunDir, top_k_only: int | None) -> None:
    """Refuse what the stored scores don't allow.

    Raises:
        ValueError: They are too few.
    """
    if settings.rerank and top_k_only and settings.rerank > top_k_only:
        raise ValueError(
            f"expected --rerank of at most {top_k_only} (--top_k_only), got {settings.rerank}; lower it, or raise "
            "--top_k_only"
        )
    if settings.rerank_by == "document" and (top_k_only or run.settings.pack):
        raise ValueError(
            "expected all scores, and examples of one document each, for --rerank_by document, got --top_k_only or "
            "--pack; leave one out"
        )


def rerank(
    folders: Sequence[Path], run: RunDir, record: ScoreRecord, models: Iterable[tuple[FineRun, nn.Module, float]],
    groups: list[list[Query]], settings: RerankSettings, execution: Execution,
) -> None:  # fmt: skip
    """Write the re-ranked scores of each folder of stored scores.

    Args:
        folders: Of one damping each.
        run: Of the train examples.
        record: Of the stored scores.
        models: The views of C models, with model and weight; one model is in memory at a time.
        groups: The groups of queries.
        settings: K, and how to compute.
        execution: How to run the models.
    """
    by_folder = processes.on_rank_0(lambda: [_all_candidates(folder, run, record, settings) for folder in folders])()
    sample = random_sample(run)
    wanted = [
        np.unique(np.concatenate([sample, *(own.ids for own in of_query)])) for of_query in zip(*by_folder, strict=True)
    ]
    by_model, entries = list[list[FineScores]](), list[dict[str, Any]]()
    for view, lm, weight in models:
        by_model.append(fine_scores(view, lm, groups, wanted, record, settings.rerank_damping, execution))
        entries.append(view.entry | {"weight": weight})
        rank_of_models = view.rank
        del lm  # before the next one is loaded
    by_query = list(zip(*by_model, strict=True))
    in_sample = [places_of(sample, ids) for ids in wanted]
    factors = torch.ones(1, len(groups), dtype=torch.float64)
    if len(entries) > 1:
        columns = [_deviations(fine, places) for fine, places in zip(by_query, in_sample, strict=True)]
        weights = [entry["weight"] for entry in entries]
        factors = influence.checkpoint_factors(torch.stack(columns, dim=1), weights, record.mode)
    computed = [_combined(fine, own, record) for fine, own in zip(by_query, factors.T, strict=True)]
    sampled = [part["scores"][places].numpy() for part, places in zip(computed, in_sample, strict=True)]
    for folder, candidates in zip(folders, by_folder, strict=True) if processes.state().is_main_process else ():
        tensors = _of_candidates(computed, wanted, candidates) | {"factors": factors}
        quality = _quality(folder, candidates, tensors["scores"], sample, sampled)
        about = reranked.RerankRecord(
            files.file_content(folder / "run.json"), len(tensors["ids"]), settings.rerank, settings.rerank_by,
            rank_of_models, settings.rerank_damping, entries, quality,
        )  # fmt: skip
        reranked.save(folder, about, record, tensors)
        for line in reranked.quality_lines(about):
            progress.say(line)
    processes.state().wait_for_everyone()


def places_of(some: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return where some of the ascending ids are."""
    return np.asarray(np.searchsorted(ids, some))


def _deviations(fine: Sequence[FineScores], places: np.ndarray) -> Tensor:
    """Return the standard deviation over some examples of a query's scores with each model, [C] float64."""
    scores = torch.stack([part.scores[places] for part in fine]).double()
    return deviation(scores.mean(dim=1), scores.square().mean(dim=1))


def _combined(fine: Sequence[FineScores], factors: Tensor, record: ScoreRecord) -> dict[str, Tensor]:
    """Return the tensors of reranked.safetensors for one query and all n examples whose scores were computed.

    Args:
        fine: The scores with each of C models.
        factors: What they are multiplied by, [C].
        record: Of the stored scores: mode and blocks.
    """
    parts = torch.stack([factor * part.scores.double() for factor, part in zip(factors, fine, strict=True)])
    tensors = {"scores": parts.sum(dim=0).float(), "parts": parts.float()}
    if record.mode != "dot":
        tensors["self_influence"] = torch.stack([part.self_influence for part in fine])
    if record.blocks:
        dots = [(part.blocks, part.self_influence) for part in fine]
        tensors["blocks"] = influence.layer_parts(dots, factors[:, None], record.mode)
    return tensors


def _of_candidates(
    computed: list[dict[str, Tensor]], wanted: list[np.ndarray], candidates: list[Candidates]
) -> dict[str, Tensor]:
    """Return the content of reranked.safetensors but for `factors`: the candidates of all queries, joined.

    Args:
        computed: Of each query (see _combined).
        wanted: Ids of its n examples, ascending.
        candidates: The query's candidates, which are some of these.
    """
    places = [places_of(own.ids, ids) for ids, own in zip(wanted, candidates, strict=True)]
    tensors = {"first": torch.from_numpy(np.cumsum([0, *map(len, places)]))}
    tensors["ids"] = torch.from_numpy(np.concatenate([own.ids for own in candidates]))
    tensors["stored"] = torch.from_numpy(np.concatenate([own.scores for own in candidates]))
    for name in computed[0]:
        parts = [of_query[name][..., own] for of_query, own in zip(computed, places, strict=True)]
        tensors[name] = torch.cat(parts, dim=-1)
    return tensors


def _quality(
    folder: Path, candidates: list[Candidates], scores: Tensor, sample: np.ndarray, sampled: list[np.ndarray]
) -> dict[str, Any]:
    """Return what the new scores say of the stored ones; lists hold a value for each query.

    Args:
        folder: Of the stored scores.
        candidates: Of each query.
        scores: New scores of all queries' candidates, joined.
        sample: Ids of the random examples.
        sampled: Their new scores for each query.

    Returns:
        sample: how many random examples; spearman: correlation of their stored and new scores (not with --top_k_only);
        found: how many of the SHOWN highest new scores have one of as many highest stored ones; last: the lowest rank
        by stored scores among them.
    """
    content: dict[str, Any] = {"sample": len(sample), "found": [], "last": []}
    for own, new in zip(candidates, scores.split([len(own.ids) for own in candidates]), strict=True):
        ranks = own.ranks[influence.top_k(new, reranked.SHOWN).numpy()]
        content["found"].append(int((ranks <= reranked.SHOWN).sum()))
        content["last"].append(int(ranks.max()))
    if (folder / "scores.npy").exists():
        stored = np.load(folder / "scores.npy", mmap_mode="r")[:, sample]
        content["spearman"] = (reranked.ranks(stored) * reranked.ranks(np.stack(sampled))).sum(axis=1).tolist()
    return content
