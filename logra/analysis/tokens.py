"""Split scores of chosen pairs of a query and a train example by token and by block of layers. This runs the model.

A layer adds q . vec(G~) = sum_t d~_t^T Q x~_t to a dot, where Q [r_out, r_in] is the preconditioned query. The term of
position t is the share of the example's token t. The roles can be swapped: with preconditioned gradients of examples
in Q's place, the query's tokens have shares too. An example's shares add up to its score: cosine divides them by the
root of the self-influence, and l2 takes q - z / 2 for q. Scores from gradients in few bits differ by the rounding.
With several checkpoints a share is the sum over checkpoints of its factor times the share there, as a score is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from torch import Tensor

from logra import influence
from logra.hooks import TokenCapture
from logra.inputs.queries import Query, group_queries, load_queries, query_hash
from logra.inputs.rows import split_text
from logra.models.model import context_length
from logra.run_dir import RunDir
from logra.runtime.memory import release_memory
from logra.runtime.progress import bar
from logra.runtime.settings import CPU_BATCH_TOKENS, Execution, QuerySettings
from logra.scoring.rank import WHOLE
from logra.scoring.reranked import ScoredModel
from logra.scoring.score import Scorer, ScoreTask, block_name
from logra.scoring.score_files import ScoreRecord, SelfInfluence
from logra.stages.gradients import Extractor
from logra.stages.open_run import check_model_files, load_model


class PairShares(NamedTuple):
    """The score of a pair, split by token of the example [T], and by block of layers."""

    tokens: Tensor
    blocks: dict[str, float]


class Split(NamedTuple):
    """Shares of the pairs {(query, example): PairShares}, and of each query's tokens [T]."""

    pairs: dict[tuple[int, int], PairShares]
    queries: list[Tensor]


class TokenSplitter:
    """Splits a run's scores.

    Args:
        run: The run.
        scores: The record of its scores, or of combined scores to which it contributes.
        trust_remote_code: Run code from the model's folder.
        self_influence: Of the examples by id; by default as stored in the run.

    Raises:
        ValueError: Model or queries are not those that were scored.
    """

    def __init__(
        self,
        run: RunDir,
        scores: ScoreRecord,
        trust_remote_code: bool,
        self_influence: Mapping[int, float] | None = None,
    ):
        self.run, self.mode = run, scores.mode
        check_model_files(run)
        execution = Execution(CPU_BATCH_TOKENS, trust_remote_code=trust_remote_code)
        self.lm, self.tokenizer, described = load_model(run.settings, execution)
        run.check_model(described)
        self.grouped, self.query_rank = scores.group_by is not None, scores.query_rank
        query_settings = QuerySettings(
            scores.split, scores.query_loss, None if self.grouped else scores.num_queries, scores.group_by, True
        )
        context = context_length(self.lm.config)
        _, queries = load_queries(query_settings, scores.log.settings, self.tokenizer, context)
        if not self.grouped and query_hash(queries) != scores.queries:
            raise ValueError(f"expected the queries that were scored in {scores.split}, got others; score them again")
        self.groups = group_queries(queries, scores.group_by)
        self.whole = self.grouped or self.query_rank or any(query.rejected for query in queries)
        blocks = {layer: block_name(layer) for layer in scores.layers}
        task = ScoreTask(run, scores.hessian, blocks, [scores.applied_damping], scores.query_rank)
        self.scorer = Scorer(task, self.lm, execution, None)
        self.capture = TokenCapture(self.lm, {layer: self.scorer.projections[layer] for layer in blocks})
        if self.mode != "dot" and self_influence is None:
            stored = SelfInfluence(run, task.kind, scores.layers, task.dampings)
            if not stored.complete:
                path = stored.paths[0]
                raise ValueError(f"expected the self-influence in {path}, got none; run compute_influence.py again")
            self_influence = dict(enumerate(stored.values[0].tolist()))
        self.self_influence = self_influence

    def split(self, train: Dataset, shown: list[list[int]], proponents: list[list[int]]) -> Split:
        """Split the scores of the examples shown, and the dots of the queries with their proponents.

        Args:
            train: The run's examples.
            shown: Example ids of each query (or group).
            proponents: Example ids of each query, whose dots are summed before they are split by the query's tokens.

        Returns:
            The shares. Those of the queries' tokens are left out if queries are grouped or contrasts, or cut
            (--query_rank): the cut of a sum over tokens is not the sum of their cuts.
        """
        pairs, query_shares = dict[tuple[int, int], PairShares](), list[Tensor]()
        step = max(1, self.scorer.queries_per_step // 2)  # half for the queries, half for their proponents
        for first in range(0, len(shown), step):
            numbers = range(first, min(first + step, len(shown)))
            groups = [self.groups[i] for i in numbers]
            examples = [] if self.whole else [[_as_query(train, e) for e in proponents[i]] for i in numbers]
            solved, _ = self.scorer.preconditioned(groups + examples)
            if self.query_rank:
                solved = {
                    layer: influence.cut(q, self.run.projected[layer], self.query_rank) for layer, q in solved.items()
                }
            pairs |= self._split_pairs(train, solved, {i: shown[i] for i in numbers})
            with self.capture:
                for row, i in enumerate(numbers if examples else (), len(groups)):
                    matrices = {layer: mean[[row]] * len(proponents[i]) for layer, mean in solved.items()}
                    query_shares.append(self._shares(self.groups[i][0], matrices, 1.0)[0].tokens)
        return Split(pairs, query_shares)

    def _split_pairs(
        self, train: Dataset, queries: dict[str, Tensor], shown: dict[int, list[int]]
    ) -> dict[tuple[int, int], PairShares]:
        """Split the scores of some queries with the examples shown for each.

        Args:
            train: The run's examples.
            queries: {layer: [rows, k]}; the first len(shown) rows are the queries, in the order of `shown`.
            shown: Example ids of each query, by the query's number.
        """
        pairs, row_of = {}, {query: row for row, query in enumerate(shown)}
        examples = sorted({example for ids in shown.values() for example in ids})
        step, l2 = self.scorer.queries_per_step, self.mode == "l2"
        for number, example in enumerate(bar(examples, desc="tokens", unit="example")):
            if l2 and number % step == 0:
                texts = [[_as_query(train, other)] for other in examples[number : number + step]]
                solved_examples, _ = self.scorer.preconditioned(texts)
            numbers = [query for query, ids in shown.items() if example in ids]
            matrices = {layer: q[[row_of[query] for query in numbers]] for layer, q in queries.items()}
            scale = 1.0
            if l2:
                matrices = {layer: q - solved_examples[layer][number % step] / 2 for layer, q in matrices.items()}
            elif self.mode == "cosine":
                value = self.self_influence[example]
                scale = max(value, 1e-30) ** -0.5 if value > 0 else 0.0
            with self.capture:
                shares = self._shares(_as_query(train, example), matrices, scale)
            pairs |= {(query, example): split for query, split in zip(numbers, shares, strict=True)}
        return pairs

    def _shares(self, text: Query, matrices: dict[str, Tensor], scale: float) -> list[PairShares]:
        """Split a text's dots with P matrices [P, k] a layer, times `scale`."""
        shapes = self.run.projected
        self.capture.matrices = {layer: matrix.view(-1, *shapes[layer]) for layer, matrix in matrices.items()}
        extractor = Extractor(self.lm, self.capture, CPU_BATCH_TOKENS)
        parts, _ = extractor.gradients([text.token_ids], [text.counted]).wait()  # {layer: [1, P, T]}
        token_shares = scale * sum(part[0].double() for part in parts.values())
        block_shares: dict[str, Tensor] = {}  # block -> [P]
        for layer, block in self.scorer.task.blocks.items():  # in the model's order, not the backward pass's
            block_shares[block] = block_shares.get(block, 0) + scale * parts[layer][0].double().sum(dim=1)
        return [
            PairShares(tokens, {block: shares[p].item() for block, shares in block_shares.items()})
            for p, tokens in enumerate(token_shares)
        ]


def _as_query(train: Dataset, example: int) -> Query:
    """Return a train example as a query."""
    row = train[example]
    return Query(str(example), row["input_ids"], row.get("counted") or [True] * len(row["input_ids"]), {})


def pieces(tokenizer, token_ids: list[int], shares: Tensor) -> list[tuple[str, float]]:
    """Return (text, share) of a text's tokens. Tokens that are parts of one character are one piece."""
    _, *texts = split_text(tokenizer, token_ids, list(range(len(token_ids))), skip_special_tokens=False)
    joined, share = [], 0.0
    for text, token_share in zip(texts, shares.tolist(), strict=True):
        share += token_share
        if text:
            joined.append((text, share))
            share = 0.0
    return [*joined, ("", share)] if share else joined


def combine(splits: Sequence[Split], factors: np.ndarray) -> Split:
    """Return the shares of combined scores from those at C checkpoints; factors [C, Q]."""
    weighted, pairs = list(zip(factors.tolist(), splits, strict=True)), {}
    for query, example in splits[0].pairs:
        found = [(of_query[query], split.pairs[query, example]) for of_query, split in weighted]
        tokens = sum(factor * shares.tokens for factor, shares in found)
        blocks = {name: sum(factor * shares.blocks[name] for factor, shares in found) for name in found[0][1].blocks}
        pairs[query, example] = PairShares(tokens, blocks)
    numbers = range(len(splits[0].queries))
    return Split(pairs, [sum(of_query[i] * split.queries[i] for of_query, split in weighted) for i in numbers])


def add_shares(queries: list[dict], models: Iterable[ScoredModel], examples: Dataset, trust_remote_code: bool) -> None:
    """Add to the report's queries the shares of tokens (`pieces`, see there) and of blocks of layers (`layers`).

    A row keeps the `layers` of --layerwise. A sum or mean gets none: the shares are those of the example shown.

    Args:
        queries: `rows` of each is {"top": rows, "bottom": rows}. The queries and all rows get `pieces`, the rows of the
            top `layers`.
        models: Those of the scores shown. One is in memory at a time.
        examples: The run's train examples.
        trust_remote_code: Run code from the model's folder.
    """
    top, bottom = ([[row["example"] for row in query["rows"][side]] for query in queries] for side in ("top", "bottom"))
    shown = [[*best, *worst] for best, worst in zip(top, bottom, strict=True)]
    splits, factors = [], []
    for run, record, of_queries, self_influence in models:
        splitter = TokenSplitter(run, record, trust_remote_code, self_influence)
        splits.append(splitter.split(examples, shown, top))
        factors.append(of_queries)
        tokenizer, groups = splitter.tokenizer, splitter.groups
        del splitter
        release_memory()
    pairs, query_shares = combine(splits, np.stack(factors))
    for number, query in enumerate(queries):
        for row in [*query["rows"]["top"], *query["rows"]["bottom"]]:
            ids, shares = examples[row["example"]]["input_ids"], pairs[number, row["example"]].tokens
            row["pieces"] = pieces(tokenizer, ids, shares)
        if query_shares:
            ids = groups[number][0].token_ids
            query["pieces"] = pieces(tokenizer, ids, query_shares[number])
        for row in query["rows"]["top"]:
            if row["combine"] not in WHOLE:
                row.setdefault("layers", pairs[number, row["example"]].blocks)
