"""Query sets: the sentences whose training examples are looked for.

A row holds `text` (every token counts), or `prompt` and `response` (the response's tokens count), or `messages` (the
assistant's turns count), or also prompt_ids and response_ids, the exact tokens that stage 1 generated.
"""

import json
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import xxhash
from transformers import PreTrainedTokenizerBase

from logra.inputs.documents import load_documents
from logra.inputs.examples import build_examples
from logra.inputs.rows import Encoded, encode_messages, encode_prompt, row_problem
from logra.runtime.files import read_lines, read_row, same_name, short_name
from logra.runtime.settings import QuerySettings, RunSettings

SPLITS = ("train", "validation", "test")


class Query(NamedTuple):
    """One query: its id, token ids, whether each of them counts, and its row."""

    id: str
    token_ids: list[int]
    counted: list[bool]
    row: dict


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _encode(row: dict, model_name: str, tokenizer: PreTrainedTokenizerBase, query_loss: str) -> Encoded:
    """Return a row's token ids and which count, or raise a ValueError that starts with what the row has."""
    if _is_ids(row.get("prompt_ids")) and _is_ids(row.get("response_ids")):
        if not same_name(str(row.get("model")), model_name):
            raise ValueError(
                f"token ids of the model {row.get('model')}, not of {model_name}; generate with that model"
            )
        prompt, response = row["prompt_ids"], row["response_ids"]
        ids, counted = prompt + response, [False] * len(prompt) + [True] * len(response)
    elif isinstance(row.get("text"), str):
        ids = tokenizer(row["text"])["input_ids"]
        counted = [True] * len(ids)
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        ids, counted = encode_prompt(tokenizer, row["prompt"], row["response"])
    elif not row_problem("messages", (row.get("messages"),)):
        ids, counted = encode_messages(tokenizer, row["messages"])
    else:
        raise ValueError("neither `text`, nor `prompt` and `response`, nor `messages` with an answer; add them")
    return ids, counted if query_loss == "response" else [True] * len(ids)


def read_query_file(
    path: Path, model_name: str, tokenizer: PreTrainedTokenizerBase, wanted: QuerySettings
) -> list[Query]:
    """Read a .jsonl file of queries.

    Raises:
        ValueError: No such file, or a row that is no query or has no token that counts.
    """
    if not path.is_file():
        raise ValueError(f"expected queries in {path}, got no such file; run generate.py or generate_llama3.py first")
    queries = []
    for number, line in enumerate(read_lines(path)[: wanted.max_queries]):
        try:
            row = read_row(line)
            row = row if isinstance(row, dict) else {}
            token_ids, counted = _encode(row, model_name, tokenizer, wanted.query_loss)
        except ValueError as error:
            raise ValueError(f"expected a query in row {number + 1} of {path}, got {error}") from error
        shown = {key: value for key, value in row.items() if key not in ("id", "model", "prompt_ids", "response_ids")}
        queries.append(Query(str(row.get("id", number)), token_ids, counted, shown))
    return queries


def split_queries(
    settings: RunSettings, queries: QuerySettings, tokenizer: PreTrainedTokenizerBase, cache_dir: str | None
) -> list[Query]:
    """Take a split of the run's data set as queries: each example of at most block_size tokens is one."""
    documents = load_documents(settings.data_name, settings.data_config, queries.split, cache_dir)
    settings = replace(settings, pack=False, skip_bad_rows=True)
    settings = replace(settings, max_examples=queries.max_queries, max_tokens=None, shuffle_seed=None)
    with tempfile.TemporaryDirectory() as work:
        rows = build_examples(documents, tokenizer, settings, None, Path(work))[0].to_list()
    found = []
    for row in rows:
        every = [True] * len(row["input_ids"])
        counted = row.get("counted", every) if queries.query_loss == "response" else every
        name = f"{row['document_id']}-{row['block']}"
        found.append(Query(name, row["input_ids"], counted, {"text": row["text"]}))
    return found


def load_queries(
    wanted: QuerySettings,
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None = None,
    cache_dir: str | None = None,
) -> tuple[str, list[Query]]:
    """Return (name of the query set, queries).

    Args:
        wanted: Which queries. Its split is `generated` (stage 1's file), train, validation or test (of the run's data
            set), or a .jsonl file.
        settings: Of the run.
        tokenizer: Of the run's model.
        context: The most tokens that the model can read.
        cache_dir: Where downloaded data sets are kept.

    Raises:
        ValueError: No queries, or one that is empty or too long.
    """
    split = wanted.split
    if split in SPLITS:
        name, queries = split, split_queries(settings, wanted, tokenizer, cache_dir)
    else:
        path = Path(split)
        if split == "generated":
            path = Path("data/generated") / short_name(settings.model_name) / "queries.jsonl"
        elif path.suffix != ".jsonl":
            raise ValueError(f"expected --split generated, {', '.join(SPLITS)} or a .jsonl file, got {split!r}")
        name, queries = path.stem, read_query_file(path, settings.model_name, tokenizer, wanted)
    if not queries:
        raise ValueError(f"expected queries in {split}, got none; check the file or the split")
    if double := [name for name, count in Counter(query.id for query in queries).items() if count > 1]:
        raise ValueError(f"expected a different id for each query of {split}, got {double[0]!r} twice; change one")
    for query in queries:
        if split not in SPLITS and not any(query.counted[1:]):
            raise ValueError(f"expected a token that counts in every query, got none in query {query.id}; remove it")
        if context is not None and len(query.token_ids) > context:
            raise ValueError(
                f"expected queries of at most {context} tokens, the model's context, got {len(query.token_ids)} in "
                f"query {query.id}; shorten it"
            )
    return name, queries


def group_queries(queries: list[Query], column: str | None) -> list[list[Query]]:
    """Return the queries one by one, or those with the same value of a column of their rows together.

    Raises:
        ValueError: A row lacks the column.
    """
    if column is None:
        return [[query] for query in queries]
    groups: dict[str, list[Query]] = {}
    for query in queries:
        if column not in query.row:
            raise ValueError(f"expected a column {column} in every query, got none in query {query.id}; add it")
        groups.setdefault(str(query.row[column]), []).append(query)
    return [[query._replace(row=query.row | {"group": name}) for query in group] for name, group in groups.items()]


def merged(group: list[Query]) -> Query:
    """Return a group as one query, for the lists: its name, all tokens, and its members' ids as text."""
    ids = [query.id for query in group]
    text = f"{len(ids)} queries: {', '.join(ids)}"
    tokens, counted = (list(chain(*parts)) for parts in zip(*(query[1:3] for query in group), strict=True))
    return Query(group[0].row["group"], tokens, counted, {"text": text})


def query_hash(queries: list[Query]) -> str:
    """Return a hash of the queries' ids, tokens and counted positions."""
    return xxhash.xxh3_64_hexdigest(json.dumps([query[:3] for query in queries]).encode())[:8]
