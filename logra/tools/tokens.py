"""Influence by token and by block, for chosen pairs of a query and a train example, computed again with the model.

A layer's part of a dot is q . vec(G~) = sum_t d~_t^T Q x~_t, with the preconditioned query Q [r_out, r_in]. So each
token of the example has its share: what its position adds to the gradient. By symmetry each token of the query has
one, with the preconditioned gradients of examples in Q's place. PairShares add up to the score: cosine's are divided by
the root of the self-influence, and l2's Q is q - z / 2. Scores of gradients stored in few bits differ by the rounding.
"""

from typing import NamedTuple

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from logra.hooks import TokenCapture
from logra.inputs.queries import Query, group_queries, load_queries, query_hash
from logra.run_dir import RunDir
from logra.runtime.progress import bar
from logra.runtime.settings import CPU_BATCH_TOKENS, Execution, QuerySettings
from logra.stages.gradients import Extractor
from logra.stages.open_run import load_model
from logra.stages.score import Scorer, block_name
from logra.stages.score_files import ScoreRecord, SelfInfluence
from logra.tools.report import bars, shade


class PairShares(NamedTuple):
    """A pair's score, split: by token of the example [T], and by block of layers."""

    tokens: Tensor
    blocks: dict[str, float]


class TokenSplitter:
    """Splits scores of one folder under logs/<run>/scores/ by token.

    Args:
        run: The run.
        scores: The record of the scores.
        trust_remote_code: Run code that the model's folder holds.

    Raises:
        ValueError: Model or queries are not those that were scored.
    """

    def __init__(self, run: RunDir, scores: ScoreRecord, trust_remote_code: bool, accelerator: Accelerator):
        self.run, self.mode = run, scores.mode
        execution = Execution(CPU_BATCH_TOKENS, trust_remote_code=trust_remote_code)
        self.lm, self.tokenizer, described = load_model(run.settings, execution, accelerator.device)
        run.check_model(described)
        limit = None if scores.group_by else scores.num_queries
        wanted = QuerySettings(scores.split, scores.query_loss, limit)
        _, queries = load_queries(wanted, run.settings, self.tokenizer)
        self.groups, self.grouped = group_queries(queries, scores.group_by), bool(scores.group_by)
        if not self.grouped and query_hash(queries) != scores.queries:
            raise ValueError(f"expected the queries that were scored in {scores.split}, got others; score them again")
        dampings = [scores.applied_damping]
        own = None if self.mode == "dot" else SelfInfluence(run, scores.hessian, scores.layers, dampings)
        if own and not own.whole:
            raise ValueError(f"expected the self-influence in {own.paths[0]}, got none; run compute_influence.py again")
        self.own = own.values[0] if own else None
        blocks = {layer: block_name(layer) for layer in scores.layers}
        self.scorer = Scorer(run, scores.hessian, blocks, self.lm, dampings, None, None, execution, accelerator)

    def split(
        self, train: Dataset, shown: list[list[int]], proponents: list[list[int]]
    ) -> tuple[dict[tuple[int, int], PairShares], list[Tensor]]:
        """Return {(query, example): PairShares} of the examples shown, and each query's tokens' shares [T].

        Args:
            train: The run's examples.
            shown: Ids of each query's (or group's) examples.
            proponents: Of which a query's tokens share the summed dots; groups have no tokens of their own.
        """
        pairs, of_queries = {}, []

        def example(i: int) -> Query:
            row = train[i]
            return Query(str(i), row["input_ids"], row.get("counted") or [True] * len(row["input_ids"]), {})

        step = max(1, self.scorer.queries_per_step // 2)
        for first in range(0, len(shown), step):
            part = range(first, min(first + step, len(shown)))
            means = [] if self.grouped else [[example(e) for e in proponents[i]] for i in part]
            solved, _ = self.scorer.preconditioned([self.groups[i] for i in part] + means)
            asked, found = (
                {name: q[rows] for name, q in solved.items()} for rows in (slice(len(part)), slice(len(part), None))
            )
            examples = sorted({e for i in part for e in shown[i]})
            own = self.scorer.preconditioned([[example(e)] for e in examples])[0] if self.mode == "l2" else {}
            with TokenCapture(self.lm, {layer: self.scorer.projections[layer] for layer in asked}) as capture:
                for number, e in enumerate(bar(examples, desc="tokens", unit="example")):
                    rows = [i for i in part if e in shown[i]]
                    matrices = {layer: q[[i - first for i in rows]] for layer, q in asked.items()}
                    if self.mode == "l2":
                        matrices = {layer: q - own[layer][number] / 2 for layer, q in matrices.items()}
                    scale = 1.0
                    if self.mode == "cosine":
                        scale = self.own[e].clamp_min(1e-30).rsqrt().item() if self.own[e] > 0 else 0.0
                    shares = self._shares(capture, example(e), matrices, scale)
                    pairs |= {(i, e): part_ for i, part_ in zip(rows, shares, strict=True)}
                for i in part if not self.grouped else ():
                    matrices = {layer: z[[i - first]] * len(proponents[i]) for layer, z in found.items()}
                    of_queries.append(self._shares(capture, self.groups[i][0], matrices, 1.0)[0].tokens)
        return pairs, of_queries

    def _shares(
        self, capture: TokenCapture, text: Query, matrices: dict[str, Tensor], scale: float
    ) -> list[PairShares]:
        """Return the shares of a text's tokens and of the blocks, for each of P matrices [P, k] a layer."""
        capture.matrices = {layer: m.view(-1, *self.run.projected[layer]) for layer, m in matrices.items()}
        extractor = Extractor(self.lm, capture, CPU_BATCH_TOKENS)
        parts, _ = extractor.gradients([text.token_ids], [text.counted]).wait()  # {layer: [1, P, T]}
        tokens = scale * sum(part[0].double() for part in parts.values())
        blocks: list[dict[str, float]] = [{} for _ in tokens]
        for layer in self.scorer.blocks:  # in the model's order, not the backward pass's
            of_layer = scale * parts[layer][0].double().sum(dim=1)
            for sums, value in zip(blocks, of_layer.tolist(), strict=True):
                name = self.scorer.blocks[layer]
                sums[name] = sums.get(name, 0.0) + value
        return [PairShares(*pair) for pair in zip(tokens, blocks, strict=True)]


def pieces(tokenizer, token_ids: list[int], shares: Tensor) -> list[tuple[str, float]]:
    """Return (text, share) of a text's tokens; those that make up one character only together are one piece."""
    found: list[tuple[str, float]] = []
    waiting, share = [], 0.0
    for token, value in zip(token_ids, shares.tolist(), strict=True):
        waiting, share = [*waiting, token], share + value
        text = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd") or len(waiting) == 4:
            found.append((text, share))
            waiting, share = [], 0.0
    return found + ([(tokenizer.decode(waiting), share)] if waiting else [])


def add_shares(queries: list[dict], splitter: TokenSplitter, examples: Dataset) -> None:
    """Add to the report's queries what each token, and each block of layers, contributes to the scores shown."""
    top, bottom = ([[row["example"] for row in query["rows"][side]] for query in queries] for side in ("top", "bottom"))
    pairs, of_queries = splitter.split(examples, [[*a, *b] for a, b in zip(top, bottom, strict=True)], top)
    for number, (query, best) in enumerate(zip(queries, top, strict=True)):
        for row in (row for rows in query["rows"].values() for row in rows):
            ids, shares = examples[row["example"]]["input_ids"], pairs[number, row["example"]].tokens
            row["shaded"] = shade(pieces(splitter.tokenizer, ids, shares))
        if of_queries:
            ids = splitter.groups[number][0].token_ids
            query["shaded"] = shade(pieces(splitter.tokenizer, ids, of_queries[number]))
        blocks = [pairs[number, i].blocks for i in best]
        query["layers"] = bars({name: sum(b[name] for b in blocks) / len(blocks) for name in blocks[0]})
