"""Read queries: texts for which influential train examples are sought.

A row holds `text` (every token counts), `prompt` and `response` (the response's tokens count) or `messages` (the
assistant's turns count). Rows of stage 1 also hold prompt_ids and response_ids, the exact tokens.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from transformers import PreTrainedTokenizerBase

from logra.inputs.documents import load_documents
from logra.inputs.examples import examples_in_memory
from logra.inputs.rows import Encoded, encode_rows, row_problem
from logra.runtime import processes
from logra.runtime.files import has_shape, read_lines, read_row, row_id, same_name, short_name
from logra.runtime.settings import QuerySettings, RunSettings

SPLITS = ("train", "validation", "test")
IDS = [lambda value: type(value) is int and value >= 0]  # see files.has_shape


class Query(NamedTuple):
    """One query: id, token ids, which of them count, and the row that it was read from."""

    id: str
    token_ids: list[int]
    counted: list[bool]
    row: dict


@processes.on_rank_0
def load_queries(
    query_settings: QuerySettings,
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None = None,
    cache_dir: str | None = None,
) -> tuple[str, list[Query]]:
    """Return the name of the query set, and its queries.

    Args:
        query_settings: Which queries. The split is `generated` (stage 1's file), train, validation or test (of the
            run's data set), or a .jsonl file.
        settings: Of the run.
        tokenizer: Of the run's model.
        context: The model's context length in tokens.
        cache_dir: Where downloaded data sets are kept.

    Raises:
        ValueError: There is no query, or one is empty or too long.
    """
    split = query_settings.split
    generated = Path("data/generated") / short_name(settings.model_name) / "queries.jsonl"
    path = generated if split == "generated" else Path(split)
    if split in SPLITS:
        queries = _read_split(settings, query_settings, tokenizer, cache_dir)
    elif path.suffix == ".jsonl":
        queries = _read_file(path, settings.model_name, tokenizer, query_settings)
    else:
        raise ValueError(f"expected --split generated, {', '.join(SPLITS)} or a .jsonl file, got {split!r}")
    if not queries:
        raise ValueError(f"expected queries in {split}, got none; check the file or the split")
    query_id, count = Counter(query.id for query in queries).most_common(1)[0]
    if count > 1:
        raise ValueError(f"expected a different id for each query of {split}, got {query_id!r} twice; change one")
    for query in queries:
        if split not in SPLITS and not any(query.counted[1:]):
            raise ValueError(f"expected a token that counts in every query, got none in query {query.id}; remove it")
        if context is not None and len(query.token_ids) > context:
            raise ValueError(
                f"expected queries of at most {context} tokens, the model's context, got {len(query.token_ids)} in "
                f"query {query.id}; shorten it"
            )
    return path.stem, queries


def _read_split(
    settings: RunSettings, query_settings: QuerySettings, tokenizer: PreTrainedTokenizerBase, cache_dir: str | None
) -> list[Query]:
    """Read a split of the run's data set. Each example of at most block_size tokens is a query."""
    documents = load_documents(
        settings.data_name, settings.data_config, query_settings.split, cache_dir, settings.text_column
    )
    settings = replace(
        settings, pack=False, skip_bad_rows=True, max_examples=query_settings.max_queries, max_tokens=None,
        shuffle_seed=None,
    )  # fmt: skip
    queries = []
    for row in examples_in_memory(documents, tokenizer, settings):
        query_id, token_ids = f"{row['document_id']}-{row['block']}", row["input_ids"]
        counted = row.get("counted") if query_settings.query_loss == "response" else None
        queries.append(Query(query_id, token_ids, counted or [True] * len(token_ids), {"text": row["text"]}))
    return queries


def _read_file(
    path: Path, model_name: str, tokenizer: PreTrainedTokenizerBase, query_settings: QuerySettings
) -> list[Query]:
    """Read a .jsonl file of queries.

    Raises:
        ValueError: There is no such file, or a row is not a query.
    """
    if not path.is_file():
        raise ValueError(f"expected queries in {path}, got no such file; run generate.py or generate_llama3.py first")
    queries = []
    for number, line in enumerate(read_lines(path)[: query_settings.max_queries]):
        try:
            row = read_row(line)
            row = row if isinstance(row, dict) else {}
            query_id = row_id(row, number)
            token_ids, counted = _encode(row, model_name, tokenizer)
        except ValueError as error:
            raise ValueError(f"expected a query in row {number + 1} of {path}, got {error}") from error
        if query_settings.query_loss == "all":
            counted = [True] * len(token_ids)
        shown = {key: value for key, value in row.items() if key not in ("id", "model", "prompt_ids", "response_ids")}
        queries.append(Query(query_id, token_ids, counted, shown))
    return queries


def _encode(row: Any, model_name: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Return a row's token ids, and which of them count.

    Raises:
        ValueError: The row is not a query; the message says what it holds instead.
    """
    if any(row.get(key) is not None for key in ("prompt_ids", "response_ids")):
        if not has_shape(row, {"prompt_ids": IDS, "response_ids": IDS}):
            raise ValueError("`prompt_ids` and `response_ids` that are not both lists of token ids; correct them")
        if not same_name(str(row.get("model")), model_name):
            raise ValueError(
                f"token ids of the model {row.get('model')}, not of {model_name}; generate with that model"
            )
        prompt, response = row["prompt_ids"], row["response_ids"]
        return prompt + response, [False] * len(prompt) + [True] * len(response)
    if has_shape(row, {"text": str}):
        return encode_rows("text", tokenizer, [(row["text"],)])[0]
    if has_shape(row, {"prompt": str, "response": str}):
        return encode_rows("prompt", tokenizer, [(row["prompt"], row["response"])])[0]
    if has_shape(row, {"messages": lambda messages: not row_problem("messages", (messages,))}):
        return encode_rows("messages", tokenizer, [(row["messages"],)])[0]
    raise ValueError("neither `text`, nor `prompt` and `response`, nor `messages` with an answer; add them")


def group_queries(queries: list[Query], column: str | None) -> list[list[Query]]:
    """Group queries by the value of a column of their rows; without a column each query is a group.

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


def merge_group(group: list[Query]) -> Query:
    """Return a group as one query: its name, all its tokens, and the ids and rows of its queries."""
    rows = [{"id": query.id, **query.row} for query in group]
    token_ids = [token for query in group for token in query.token_ids]
    counted = [counts for query in group for counts in query.counted]
    return Query(group[0].row["group"], token_ids, counted, {"queries": rows})


def query_rows(queries: list[Query]) -> list[dict]:
    """Return the rows of queries.jsonl in a folder of scores."""
    return [{"id": q.id, **q.row, "tokens": len(q.token_ids), "counted": sum(q.counted)} for q in queries]


def query_hash(queries: list[Query]) -> str:
    """Return a hash of the queries' ids, tokens and counted positions."""
    return xxhash.xxh3_64_hexdigest(json.dumps([query[:3] for query in queries]).encode())[:8]
