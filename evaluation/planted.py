"""Planted-fact recall: are the documents that taught a model an invented fact found for a question about the fact?

    python evaluation/planted.py data/planted                                   # makes corpus and model
    python evaluation/planted.py data/planted logs/planted_*/scores/queries-*   # recall of these scores

Each fact joins an invented name to another ("The capital of Zobalur is Mivetan ..."), told in a few wordings of
relations.jsonl. A query is the beginning of another wording, in which other facts are told; its response is the
answer. The documents hide among passages of Python's manual and distractors, which hold the same names (the answer
first, where both) and not the fact: words alone do not tell them apart. The folder holds

    planted.json    its settings, checked on each use; written last: a start that was stopped begins anew
    corpus.jsonl, queries.jsonl, model/    for the pipeline's --data_name, --split and --model_name
    facts.json      query id -> ids of the documents that tell its fact

Notation: Q queries, D documents, k planted documents a query. A document's score is that of its best example.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored
import testbed

from logra.inputs.batches import make_batch
from logra.inputs.model import load_model, load_tokenizer
from logra.inputs.rows import encode_prompt
from logra.loss import hidden_states
from logra.runtime import files
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import positive_int, seed_int
from logra.tools.report import bm25_scores

RELATIONS = Path(__file__).parent / "relations.jsonl"
WORDS, LONGEST = 12, 128  # words of a passage, about as many as of a fact's document, and bytes; a token is 1 or more
SMALL = {"architecture": "gpt2", "layers": 2, "width": 256, "vocabulary": 3072, "context": 128}  # a name is one token
RATE = 1e-4  # of fine-tuning; it falls linearly to 0
BATCH = 16  # texts, of fine-tuning
SYLLABLES = ("bdfgklmnprstvz", "aeiou") * 3 + ("bdfgklmnprstvz",)  # as long as each other, so none begins with another
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of corpus and model")
    parser.add_argument("scores", nargs="*", type=Path, help="folders under logs/<run>/scores/, of its queries")
    group = parser.add_argument_group("a new corpus and model")
    group.add_argument("--num_facts", type=positive_int, default=40, help="(40)")
    group.add_argument("--paraphrases", type=positive_int, default=3, help="documents a fact, 3 at most (3)")
    group.add_argument("--num_filler", type=positive_int, default=800, help="passages of Python's manual (800)")
    group.add_argument("--model_name", help="to fine-tune (without it a small model is trained from scratch)")
    group.add_argument("--epochs", type=positive_int, help="(60; 5 of fine-tuning)")
    group.add_argument("--seed", type=seed_int, default=0, help="of corpus and training (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make what the folder lacks, then print the table."""
    make(args)
    corpus, queries = (scored.read_rows(args.folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    facts, ids = files.read_json(args.folder / "facts.json", "delete the folder"), [row["id"] for row in corpus]
    planted = np.array([np.isin(ids, facts[query["id"]]) for query in queries])
    found = {str(folder): by_document(folder, ids, list(facts)) for folder in args.scores}
    model = load_model(str(args.folder / "model"), torch.float32, DEVICE)
    tokenizer = load_tokenizer(str(args.folder / "model"))
    known = np.array([learned(model, tokenizer, query) for query in queries])
    print(f"Share of the {len(queries)} facts that the model has learned: {scored.interval(known)}\n")
    texts, asked = [row["text"] for row in corpus], [query["prompt"] + query["response"] for query in queries]
    found["BM25"] = np.stack(list(bm25_scores(texts, asked)))
    found["cosine of mean last hidden states"] = embed(model, tokenizer, asked) @ embed(model, tokenizer, texts).T
    found["random"] = np.random.default_rng(0).random(planted.shape)
    rows = {name: measures(scores, planted) for name, scores in found.items()}
    scored.print_table(["scores", *rows["random"]], [[name, *row.values()] for name, row in rows.items()])


def make(args: argparse.Namespace) -> None:
    """Make corpus and model, or check that those there have these settings."""
    path, others = args.folder / "planted.json", ("folder", "scores")
    settings = {name: value for name, value in vars(args).items() if name not in others}
    if path.exists():
        known = files.read_json(path, "delete the folder")
        for name, value in settings.items():
            if value not in (known[name], build_parser().get_default(name)):
                raise ValueError(f"expected --{name} {known[name]} (from {path}), got {value}; use another folder")
        return
    corpus, queries, facts = make_corpus(args.num_facts, args.paraphrases, args.num_filler, args.seed)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        with files.atomic(args.folder / f"{name}.jsonl") as made:
            made.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    files.write_json(args.folder / "facts.json", facts)
    texts = [row["text"] for row in corpus]
    if args.model_name:
        model, tokenizer = load_model(args.model_name, torch.float32, DEVICE), load_tokenizer(args.model_name)
        fine_tune(model, tokenizer(texts)["input_ids"], args.epochs or 5, args.seed)
    else:
        tokenizer, config = testbed.make_tokenizer(texts, SMALL["vocabulary"]), testbed.make_config(**SMALL)
        model = testbed.train(config, tokenizer(texts)["input_ids"], args.epochs or 60, args.seed, args.seed)
    with files.atomic(args.folder / "model") as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    files.write_json(path, settings)


def make_corpus(num_facts: int, paraphrases: int, num_filler: int, seed: int) -> tuple[list, list, dict]:
    """Return the rows of corpus.jsonl and of queries.jsonl, and facts.json; the same ones for the same arguments."""
    random, relations = np.random.default_rng(seed), scored.read_rows(RELATIONS)
    drawn = ("".join(random.choice(list(letters)) for letters in SYLLABLES).capitalize() for _ in range(4 * num_facts))
    texts, queries, facts, names = {}, [], {}, iter(dict.fromkeys(drawn))  # each name once
    most = min(len(relation["wordings"]) for relation in relations) - 1
    filler = dict.fromkeys(" ".join(text.split()[:WORDS]) for text in testbed.passages("pydoc"))
    filler = [text for text in filler if len(text.encode()) <= LONGEST]
    for flag, got, limit in (("paraphrases", paraphrases, most), ("num_filler", num_filler, len(filler))):
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


def fine_tune(model: torch.nn.Module, token_ids: list[list[int]], epochs: int, seed: int) -> None:
    """Train a model on texts: AdamW, the mean loss a token, no dropout."""
    optimizer, order = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01), np.random.default_rng(seed)
    shuffled = [order.permutation(len(token_ids)) for _ in range(epochs)]
    batches = [rows[i : i + BATCH] for rows in shuffled for i in range(0, len(rows), BATCH)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for rows in tqdm(batches, desc="fine-tuning", unit="batch"):
        batch = make_batch([token_ids[i] for i in rows], device=model.device)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def learned(model: torch.nn.Module, tokenizer, query: dict) -> bool:
    """Say whether each token of the answer is the likeliest one after what comes before it: the greedy continuation."""
    ids, counted = (torch.tensor(part) for part in encode_prompt(tokenizer, query["prompt"], query["response"]))
    best = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].argmax(dim=1).cpu()
    return bool((best[:-1] == ids[1:])[counted[1:]].all())


def by_document(folder: Path, ids: list[str], queries: list[str]) -> np.ndarray:
    """Return the scores [Q, D] of a folder, of each document's best example."""
    run = scored.load(folder)
    if set(run.documents) != set(ids) or run.queries != queries:
        raise ValueError(f"expected scores of corpus.jsonl for queries.jsonl in {folder}, got others; score these")
    best, place = np.full((len(ids), len(queries)), -np.inf), {name: i for i, name in enumerate(ids)}
    np.maximum.at(best, [place[name] for name in run.documents], run.scores.T)
    return best.T


@torch.no_grad()
def embed(model: torch.nn.Module, tokenizer, texts: list[str]) -> np.ndarray:
    """Return the mean last hidden state of each text, of length 1, [len(texts), d]."""
    ids = [torch.tensor([row], device=model.device) for row in tokenizer(texts)["input_ids"]]
    return normalize(torch.cat([hidden_states(model, row).mean(dim=1) for row in ids]), dim=1).cpu().numpy()


def measures(scores: np.ndarray, planted: np.ndarray) -> dict[str, np.ndarray]:
    """Return recall@k, recall@10 and MRR (1 / rank of the first planted document), [Q] each, of scores [Q, D].

    planted [Q, D] bool has k in each row. Of equal scores the first counts as higher.
    """
    k = int(planted[0].sum())
    hits = np.take_along_axis(planted, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return {f"recall@{n}": hits[:, :n].sum(axis=1) / k for n in (k, 10)} | {"MRR": 1 / (1 + hits.argmax(axis=1))}


if __name__ == "__main__":
    run_script(main, build_parser())
