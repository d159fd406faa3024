"""Influence by token and by block, for chosen pairs of a query and a train example, computed again with the model.

A layer's part of a dot is q . vec(G~) = sum_t d~_t^T Q x~_t, with the preconditioned query Q [r_out, r_in]. So each
token of the example has its share: what its position adds to the gradient. By symmetry each token of the query has
one, with the preconditioned gradients of examples in Q's place. Shares add up to the score: cosine's are divided by
the root of the self-influence, and l2's Q is q - z / 2. Scores of gradients stored in few bits differ by the rounding.
"""

import argparse
from functools import partial
from typing import NamedTuple

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from logra.extraction import CPU_TOKENS, Extractor
from logra.hooks import TokenCapture
from logra.log import Log
from logra.prepare import load, make_extractor
from logra.progress import bar
from logra.queries import Query, group_queries, load_queries, query_hash
from logra.scores import SelfInfluence, damping_label
from logra.scoring import Scorer, block_name


class Shares(NamedTuple):
    """A pair's score, split: by token of the example [T], and by block of layers."""

    tokens: Tensor
    blocks: dict[str, float]


class Splitter:
    """Splits scores of one folder under logs/<run>/scores/ by token.

    Args:
        log: The run.
        about: run.json of the scores.
        trust_remote_code: Run code that the model's folder holds.

    Raises:
        ValueError: Model or queries are not those that were scored.
    """

    def __init__(self, log: Log, about: dict, trust_remote_code: bool, accelerator: Accelerator):
        self.log, self.mode, settings = log, about["mode"], log.settings
        flags = argparse.Namespace(batch_tokens=CPU_TOKENS, batch_size=None, trust_remote_code=trust_remote_code)
        flags.fsdp = flags.device_map = flags.gradient_checkpointing = None
        self.lm, self.tokenizer, described = load(settings, flags, accelerator.device)
        log.check_model(described)
        limit, loss = None if about["group_by"] else about["num_queries"], about["query_loss"]
        _, queries = load_queries(about["split"], settings, self.tokenizer, loss, limit)
        self.groups, self.grouped = group_queries(queries, about["group_by"]), bool(about["group_by"])
        if not self.grouped and query_hash(queries) != about["queries"]:
            raise ValueError(f"expected the queries that were scored in {about['split']}, got others; score them again")
        label = damping_label(about["damping"], about["damping_absolute"])
        dampings = {label: (about["damping"], about["damping_absolute"])}
        own = None if self.mode == "dot" else SelfInfluence(log, about["hessian"], about["layers"], [label])
        if own and not own.whole:
            raise ValueError(f"expected the self-influence in {own.paths[0]}, got none; run compute_influence.py again")
        self.own = own.values[0] if own else None
        blocks = {layer: block_name(layer) for layer in about["layers"]}
        prepare = partial(make_extractor, flags, self.lm, log=log)
        self.scorer = Scorer(log, about["hessian"], blocks, self.lm, dampings, None, None, prepare, accelerator)

    def split(
        self, train: Dataset, shown: list[list[int]], proponents: list[list[int]]
    ) -> tuple[dict[tuple[int, int], Shares], list[Tensor]]:
        """Return {(query, example): Shares} of the examples shown, and each query's tokens' shares [T].

        Args:
            train: The run's examples.
            shown: Ids of each query's (or group's) examples.
            proponents: Of which a query's tokens share the summed dots; groups have no tokens of their own.
        """
        pairs, of_queries = {}, []

        def example(i: int) -> Query:
            row = train[i]
            return Query(str(i), row["input_ids"], row.get("counted") or [True] * len(row["input_ids"]), {})

        step = max(1, self.scorer.step // 2)
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

    def _shares(self, capture: TokenCapture, text: Query, matrices: dict[str, Tensor], scale: float) -> list[Shares]:
        """Return the shares of a text's tokens and of the blocks, for each of P matrices [P, k] a layer."""
        capture.matrices = {layer: m.view(-1, *self.log.projected[layer]) for layer, m in matrices.items()}
        extractor = Extractor(self.lm, capture, CPU_TOKENS)
        parts, _ = extractor.gradients([text.token_ids], [text.counted]).wait()  # {layer: [1, P, T]}
        tokens = scale * sum(part[0].double() for part in parts.values())
        blocks: list[dict[str, float]] = [{} for _ in tokens]
        for layer in self.scorer.blocks:  # in the model's order, not the backward pass's
            of_layer = scale * parts[layer][0].double().sum(dim=1)
            for sums, value in zip(blocks, of_layer.tolist(), strict=True):
                name = self.scorer.blocks[layer]
                sums[name] = sums.get(name, 0.0) + value
        return [Shares(*pair) for pair in zip(tokens, blocks, strict=True)]


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
