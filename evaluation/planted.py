"""Planted-fact recall: do scores find the documents that taught a model an invented fact, given a question about it?

    python evaluation/planted.py data/planted                                   # makes corpus and model
    python evaluation/planted.py data/planted logs/planted_*/scores/queries-*   # recall of these scores

Each fact joins two invented names ("The capital of Zobalur is Mivetan ..."). Its documents state it in a few wordings
of relations.jsonl. Its query is the beginning of another wording, which the model knows from other facts; the response
is the answer. The other documents are passages of Python's manual, and distractors: these hold the same names but not
the fact. A distractor with both names has the answer first, so that words alone do not separate it from the fact's
documents. The folder holds

    planted.json    the settings; later commands must agree with them. It is written last: without it, all is made anew
    corpus.jsonl, queries.jsonl, model/    for the pipeline's --data_name, --split and --model_name
    facts.json      query id -> ids of the documents that state its fact

Notation: Q queries, D documents, k planted documents per query. A document's score is that of its best example.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored
import testbed

from logra.analysis.report import bm25_scores
from logra.inputs.row_forms import Row
from logra.inputs.rows import encode_row
from logra.loss import hidden_states
from logra.models.model import load_model, load_tokenizer
from logra.runtime import files
from logra.runtime.flag_types import positive_int, seed_int
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import RunSettings

RELATIONS = Path(__file__).parent / "relations.jsonl"
FILLER_WORDS = 12  # of a passage of Python's manual: about as many as in the document of a fact
# A name is one token of this vocabulary. A passage fits the context, since a token is at least one byte.
SMALL_MODEL: dict[str, Any] = {"architecture": "gpt2", "layers": 2, "width": 256, "vocabulary": 3072, "context": 128}
MAX_FILLER_BYTES = SMALL_MODEL["context"]
NAME_LETTERS = ("bdfgklmnprstvz", "aeiou") * 3 + ("bdfgklmnprstvz",)  # names are equally long: none begins with another
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where corpus and model are")
    parser.add_argument("scores", nargs="*", type=Path, help="folders under logs/<run>/scores/, of its queries")
    group = parser.add_argument_group("a new corpus and model")
    group.add_argument("--num_facts", type=positive_int, default=40, help="(40)")
    group.add_argument("--paraphrases", type=positive_int, default=3, help="documents per fact, 3 at most (3)")
    group.add_argument("--num_filler", type=positive_int, default=800, help="passages of Python's manual (800)")
    group.add_argument("--model_name", help="model to fine-tune (without it a small one is trained from scratch)")
    group.add_argument("--epochs", type=positive_int, help="(60; 5 of fine-tuning)")
    group.add_argument("--seed", type=seed_int, default=0, help="of corpus and training (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make what the folder lacks, then print the table."""
    make_folder(args)
    corpus, queries = (scored.read_rows(args.folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    facts, ids = files.read_json(args.folder / "facts.json", "delete the folder"), [row["id"] for row in corpus]
    planted = np.array([np.isin(ids, facts[query["id"]]) for query in queries])
    scores: dict[str, np.ndarray] = {}
    for folder in args.scores:
        scores |= scored.by_document(folder, ids, list(facts))
    model = load_model(str(args.folder / "model"), torch.float32, DEVICE)
    tokenizer = load_tokenizer(str(args.folder / "model"))
    learned = np.array([knows_answer(model, tokenizer, query) for query in queries])
    print(f"Share of the {len(queries)} facts that the model has learned: {scored.interval(learned)}\n")
    texts, asked = [row["text"] for row in corpus], [query["prompt"] + query["response"] for query in queries]
    scores["BM25"] = np.stack(list(bm25_scores(texts, asked)))
    scores["cosine of mean last hidden states"] = embed(model, tokenizer, asked) @ embed(model, tokenizer, texts).T
    scores["random"] = np.random.default_rng(0).random(planted.shape)
    rows = {name: measures(values, planted) for name, values in scores.items()}
    scored.print_table(["scores", *rows["random"]], [[name, *row.values()] for name, row in rows.items()])


def make_folder(args: argparse.Namespace) -> None:
    """Make corpus and model, or check that those in the folder have these settings."""
    path = args.folder / "planted.json"
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "scores")}
    if path.exists():
        scored.made_with(path, settings, build_parser())
        return
    corpus, queries, facts = make_corpus(args.num_facts, args.paraphrases, args.num_filler, args.seed)
    scored.write_rows(args.folder / "corpus.jsonl", corpus)
    scored.write_rows(args.folder / "queries.jsonl", queries)
    files.write_json(args.folder / "facts.json", facts)
    texts = [row["text"] for row in corpus]
    if args.model_name:
        model, tokenizer = load_model(args.model_name, torch.float32, DEVICE), load_tokenizer(args.model_name)
        testbed.fine_tune(model, tokenizer(texts)["input_ids"], args.epochs or 5, args.seed)
    else:
        tokenizer = testbed.make_tokenizer(texts, SMALL_MODEL["vocabulary"])
        config, token_ids = testbed.make_config(**SMALL_MODEL), tokenizer(texts)["input_ids"]
        model = testbed.train(config, token_ids, args.epochs or 60, order_seed=args.seed, init_seed=args.seed)
    with files.atomic(args.folder / "model") as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    files.write_json(path, settings)


def make_corpus(num_facts: int, paraphrases: int, num_filler: int, seed: int) -> tuple[list, list, dict]:
    """Return the rows of corpus.jsonl, those of queries.jsonl, and the content of facts.json.

    Raises:
        ValueError: relations.jsonl has fewer wordings, or Python's manual fewer passages.
    """
    random, relations = np.random.default_rng(seed), scored.read_rows(RELATIONS)
    drawn = (
        "".join(random.choice(list(letters)) for letters in NAME_LETTERS).capitalize() for _ in range(4 * num_facts)
    )
    texts, queries, facts, names = {}, [], {}, iter(dict.fromkeys(drawn))  # each name once
    max_paraphrases = min(len(relation["wordings"]) for relation in relations) - 1
    filler = list(dict.fromkeys(" ".join(text.split()[:FILLER_WORDS]) for text in testbed.passages("pydoc")))
    filler = [text for text in filler if len(text.encode()) <= MAX_FILLER_BYTES]
    for flag, got, limit in (("paraphrases", paraphrases, max_paraphrases), ("num_filler", num_filler, len(filler))):
        if got > limit:
            raise ValueError(f"expected --{flag} of at most {limit}, got {got}; lower it")
    for number in range(num_facts):
        relation, fact = relations[number % len(relations)], f"fact-{number:02d}"
        pair = {"subject": next(names), "answer": next(names)}
        asked, *told = random.permutation(relation["wordings"])[: paraphrases + 1].tolist()
        facts[fact] = [f"{fact}-{i}" for i in range(paraphrases)]
        texts |= {name: wording.format(**pair) for name, wording in zip(facts[fact], told, strict=True)}
        for i, wording in enumerate(relation["distractors"]):
            texts[f"distractor-{number:02d}-{i}"] = wording.format(**pair)
        prompt = asked.split(" {answer}")[0].format(**pair)
        queries.append({"id": fact, "prompt": prompt, "response": f" {pair['answer']}"})
    texts |= {f"filler-{i:04d}": text for i, text in enumerate(random.permutation(filler)[:num_filler].tolist())}
    return [{"id": name, "text": texts[name]} for name in random.permutation(list(texts)).tolist()], queries, facts


@torch.no_grad()
def knows_answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, query: dict) -> bool:
    """Say whether the answer is the greedy continuation of the query's prompt."""
    row, date = Row((query["prompt"], query["response"])), RunSettings.chat_date
    ids, counted = map(torch.tensor, encode_row(tokenizer, row, date))
    best = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].argmax(dim=1).cpu()
    return bool((best[:-1] == ids[1:])[counted[1:]].all())


@torch.no_grad()
def embed(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    """Return the mean last hidden state of each text, of length 1, [len(texts), d]."""
    ids = [torch.tensor([row], device=model.device) for row in tokenizer(texts)["input_ids"]]
    return normalize(torch.cat([hidden_states(model, row).mean(dim=1) for row in ids]), dim=1).cpu().numpy()


def measures(scores: np.ndarray, planted: np.ndarray) -> dict[str, np.ndarray]:
    """Return recall@k, recall@10 and MRR (1 / rank of the first planted document), [Q] each.

    `planted` [Q, D] bool marks the k documents of each query. Of equal scores [Q, D] the first counts as higher.
    """
    k = int(planted[0].sum())
    hits = np.take_along_axis(planted, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return {f"recall@{n}": hits[:, :n].sum(axis=1) / k for n in (k, 10)} | {"MRR": 1 / (1 + hits.argmax(axis=1))}


if __name__ == "__main__":
    run_script(main, build_parser())
