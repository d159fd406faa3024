"""Read queries: texts for which influential train examples are sought.

A row has one of the forms of docs/inputs.md. Of a text every token counts, of a prompt with an answer or of a chat the
tokens of the answers. A row with a chosen and a rejected answer is a contrast: its loss is the difference of theirs.
Rows of stage 1 also hold prompt_ids and response_ids, the exact tokens.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from transformers import PreTrainedTokenizerBase

from logra.inputs import file_rows, row_forms
from logra.inputs.documents import load_documents
from logra.inputs.examples import examples_in_memory
from logra.inputs.row_forms import FORMS, Row
from logra.inputs.rows import Encoded, encode_row
from logra.runtime import processes, progress
from logra.runtime.files import has_shape, row_id, same_name, short_name
from logra.runtime.settings import DataSettings, QuerySettings, RunSettings

SPLITS = ("train", "validation", "test")
IDS = [lambda value: type(value) is int and value >= 0]  # see files.has_shape


class Query(NamedTuple):
    """One query.

    Attributes:
        id: Its id.
        token_ids, counted: Its tokens, and which of them count.
        row: What is shown of the row that it was read from.
        rejected: Of a contrast: tokens of the rejected answer, whose loss is subtracted.
        sign: Of its loss in that of its group: -1 of a rejected answer.
    """

    id: str
    token_ids: list[int]
    counted: list[bool]
    row: dict
    rejected: Encoded | None = None
    sign: int = 1


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
            run's data set), a file of rows, or a data set and its split (name:split, name:configuration:split).
        settings: Of the run.
        tokenizer: Of the run's model.
        context: The model's context length in tokens.
        cache_dir: Where downloaded data sets are kept.

    Raises:
        ValueError: There is no query, or one is empty or too long.
    """
    split, name = query_settings.split, query_settings.split
    if split in SPLITS:
        queries = _read_split(settings, query_settings, tokenizer, cache_dir)
    else:
        path = Path("data/generated") / short_name(settings.model_name) / "queries.jsonl"
        path = path if split == "generated" else Path(split)
        data = None if split == "generated" or path.exists() else _data_set(split, query_settings)
        if data:
            rows, name = _rows_of_data_set(data, cache_dir), f"{short_name(data.data_name)}-{data.data_split}"
        else:
            rows, name = _rows_of_file(path), path.name.removesuffix(file_rows.suffixes(path))
        limited = islice(enumerate(rows), query_settings.max_queries)
        queries = [_read_query(row, number, split, settings, tokenizer, query_settings) for number, row in limited]
    if not queries:
        raise ValueError(f"expected queries in {split}, got none; check the file or the split")
    query_id, count = Counter(query.id for query in queries).most_common(1)[0]
    if count > 1:
        raise ValueError(f"expected a different id for each query of {split}, got {query_id!r} twice; change one")
    for query in queries:
        if split not in SPLITS and not any(query.counted[1:]):
            raise ValueError(f"expected a token that counts in every query, got none in query {query.id}; remove it")
    return name, [_fitting(query, context, query_settings.truncate_queries) for query in queries]


def _fitting(query: Query, context: int | None, truncate: bool) -> Query:
    """Return a query that fits the context: of a longer one the last tokens.

    Raises:
        ValueError: It is not to be truncated, or its answer alone does not fit.
    """
    found = [(query.token_ids, query.counted), *([query.rejected] if query.rejected else [])]
    length = max(len(token_ids) for token_ids, _ in found)
    if context is None or length <= context:
        return query
    if not truncate:
        raise ValueError(
            f"expected queries of at most {context} tokens, the model's context, got {length} in query {query.id}; "
            "shorten it, or give --truncate_queries"
        )
    if any(not all(counted) and any(counted[: 1 - context]) for _, counted in found):
        raise ValueError(
            f"expected answers of less than {context} tokens, the model's context, got a longer one in query "
            f"{query.id}; shorten it"
        )
    progress.say(f"query {query.id}: the last {context} of {length} tokens are used (--truncate_queries)")
    (token_ids, counted), *rejected = [(token_ids[-context:], counted[-context:]) for token_ids, counted in found]
    return query._replace(token_ids=token_ids, counted=counted, rejected=rejected[0] if rejected else None)


def _read_split(
    settings: RunSettings, query_settings: QuerySettings, tokenizer: PreTrainedTokenizerBase, cache_dir: str | None
) -> list[Query]:
    """Read a split of the run's data set. Each example of at most block_size tokens is a query."""
    documents = load_documents(replace(settings, data_split=query_settings.split, keep_columns=None), cache_dir)
    settings = replace(
        settings, pack=False, skip_bad_rows=True, max_examples=query_settings.max_queries, max_tokens=None,
        shuffle_seed=None, keep_columns=None,
    )  # fmt: skip
    queries = []
    for row in examples_in_memory(documents, tokenizer, settings):
        query_id, token_ids = f"{row['document_id']}-{row['block']}", row["input_ids"]
        counted = row.get("counted") if query_settings.query_loss == "response" else None
        queries.append(Query(query_id, token_ids, counted or [True] * len(token_ids), {"text": row["text"]}))
    return queries


def _data_set(name: str, query_settings: QuerySettings) -> DataSettings:
    """Return the data set that name:split or name:configuration:split stands for.

    Raises:
        ValueError: The name is of another form.
    """
    data_name, *config, split = name.rsplit(":", 2 if name.count(":") > 1 else 1) if ":" in name else ("", "")
    if not data_name or Path(name).suffix in (*file_rows.KINDS, *file_rows.COMPRESSIONS):
        raise ValueError(
            f"expected --split generated, {', '.join(SPLITS)}, a file ({', '.join(file_rows.KINDS)}) or the split of a "
            f"data set (name:split), got {name!r}, and no such file; run generate.py or generate_llama3.py first, or "
            "correct it"
        )
    kept = (query_settings.group_by,) if query_settings.group_by else None
    return DataSettings(data_name, config[0] if config else None, split, keep_columns=kept)


def _rows_of_data_set(data: DataSettings, cache_dir: str | None) -> Iterator[dict]:
    documents = load_documents(data, cache_dir)
    columns = tuple(name for name in documents.column_names if name != file_rows.NOT_TEXT)
    for values in file_rows.values_of(documents, columns):
        yield {name: value for name, value in zip(columns, values, strict=True) if value is not None}


def _rows_of_file(path: Path) -> Iterator[dict]:
    """Yield the rows of a file; blank lines of a .txt are none."""
    if not path.is_file():
        raise ValueError(f"expected queries in {path}, got no such file; run generate.py or generate_llama3.py first")
    if file_rows.kind(path) not in file_rows.KINDS:
        raise ValueError(f"expected a file of queries ({', '.join(file_rows.KINDS)}), got {path}; convert it")
    try:
        for row in file_rows.read_rows(path, None, {}):
            if file_rows.kind(path) != ".txt" or row["text"].strip():
                yield row
    except ValueError as error:
        raise ValueError(f"expected queries in {path}, got an error: {error}; correct it") from error


def _read_query(
    row: dict, number: int, source: str, settings: RunSettings, tokenizer: PreTrainedTokenizerBase,
    query_settings: QuerySettings,
) -> Query:  # fmt: skip
    """Return a row as a query.

    Raises:
        ValueError: It is not one.
    """
    try:
        shown = json.loads(json.dumps(row, default=str, ensure_ascii=False).encode())  # no half surrogate pairs
        query_id = row_id(row, number)
        (token_ids, counted), rejected, texts = _encode(row, settings, tokenizer)
    except ValueError as error:
        raise ValueError(f"expected a query in row {number + 1} of {source}, got {error}") from error
    if query_settings.query_loss == "all":
        counted = [True] * len(token_ids)
        rejected = rejected and (rejected[0], [True] * len(rejected[0]))
    shown = {key: value for key, value in shown.items() if key not in ("id", "model", "prompt_ids", "response_ids")}
    return Query(query_id, token_ids, counted, shown | texts, rejected)


def _encode(
    row: dict, settings: RunSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[Encoded, Encoded | None, dict[str, Any]]:
    """Return a row's tokens and those of its rejected answer; and its texts for the report, where they are not columns.

    Raises:
        ValueError: The row is not a query; the message says what it holds instead.
    """
    if any(row.get(key) is not None for key in ("prompt_ids", "response_ids")):
        if not has_shape(row, {"prompt_ids": IDS, "response_ids": IDS}):
            raise ValueError("`prompt_ids` and `response_ids` that are not both lists of token ids; correct them")
        if not same_name(str(row.get("model")), settings.model_name):
            raise ValueError(
                f"token ids of the model {row.get('model')}, not of {settings.model_name}; generate with that model"
            )
        prompt, response = row["prompt_ids"], row["response_ids"]
        return (prompt + response, [False] * len(prompt) + [True] * len(response)), None, {}
    forms = row_forms.detect([key for key in row if row[key] is not None], "text")
    form = "preference" if "preference" in forms else next(iter(forms), None)
    if form is None:
        expected = ", ".join(" and ".join(f"`{column}`" for column in form.needed) for form in FORMS.values())
        raise ValueError(f"the columns {', '.join(row)}, which are none of {expected}; add them")
    made = [row_forms.make_row(form, row)]
    if form == "preference":
        made = list(row_forms.contrast(*(row.get(name) for name in ("chosen", "rejected", "prompt", "tools"))))
    encoded = [encode_row(tokenizer, part, settings.chat_date) for part in made]
    return encoded[0], encoded[1] if len(made) > 1 else None, _texts(made, tokenizer)


def _texts(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what is shown of a query: prompt, response and, of a contrast, rejected; {} of a text."""
    answers = []
    for row in rows:
        prompt, answer = row.texts[:1], row.texts[1:]
        if row.messages and (tokenizer.chat_template or not row.texts):
            first = row.first or len(row.messages) - 1
            prompt, answer = (
                tuple(f"{turn['role']}: {turn['content'] or json.dumps(turn.get('tool_calls'))}" for turn in turns)
                for turns in (row.messages[:first], row.messages[first:])
            )
        answers.append(("\n".join(prompt), "\n".join(answer)))
    (prompt, answer), *rejected = answers
    if not answer:
        return {}
    return {"prompt": prompt, "response": answer} | ({"rejected": rejected[0][1]} if rejected else {})


def group_queries(queries: list[Query], column: str | None) -> list[list[Query]]:
    """Group queries by the value of a column of their rows; without a column each query is a group.

    A contrast becomes two members of its group, of opposite signs.

    Raises:
        ValueError: A row lacks the column.
    """
    if column is None:
        return [_members([query]) for query in queries]
    groups: dict[str, list[Query]] = {}
    for query in queries:
        if column not in query.row:
            raise ValueError(f"expected a column {column} in every query, got none in query {query.id}; add it")
        groups.setdefault(str(query.row[column]), []).append(query)
    return [
        _members([query._replace(row=query.row | {"group": name}) for query in group]) for name, group in groups.items()
    ]


def _members(queries: list[Query]) -> list[Query]:
    members = []
    for query in queries:
        members.append(query)
        if query.rejected:
            token_ids, counted = query.rejected
            members.append(Query(query.id, token_ids, counted, query.row, sign=-1))
    return members


def merge_group(group: list[Query]) -> Query:
    """Return a group as one query: its name, all its tokens, and the ids and rows of its queries."""
    rows = [{"id": query.id, **query.row} for query in group if query.sign > 0]
    token_ids = [token for query in group for token in query.token_ids]
    counted = [counts for query in group for counts in query.counted]
    return Query(group[0].row["group"], token_ids, counted, {"queries": rows})


def query_rows(queries: list[Query]) -> list[dict]:
    """Return the rows of queries.jsonl in a folder of scores."""
    return [{"id": q.id, **q.row, "tokens": len(q.token_ids), "counted": sum(q.counted)} for q in queries]


def query_hash(queries: list[Query]) -> str:
    """Return a hash of the queries' ids, tokens and counted positions."""
    parts = [query[:3] + ((query.rejected,) if query.rejected else ()) for query in queries]
    return xxhash.xxh3_64_hexdigest(json.dumps(parts).encode())[:8]
