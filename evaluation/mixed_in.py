"""Mixed-in rows: do scores find the rows of another topic in a fine-tuning set, given other texts of that topic?

    python evaluation/mixed_in.py testbeds/mixed_in/gpt2 --architecture gpt2                      # makes rows, models
    python evaluation/mixed_in.py testbeds/mixed_in/gpt2 testbeds/mixed_in/gpt2/*/*/runs/*/scores/*  # the table

The task is like that of DATE-LM (arXiv 2507.09424) to find toxic rows, but needs no download. A small model is
pretrained on docstrings of Python's standard library, without one package. It is fine-tuned on passages of Python's
manual, and on docstrings of this package: the mixed-in rows. Queries are other docstrings of the package. A row's score
is its mean z-score over the queries. The table has the average precision (AUPRC) of the order by these scores: mean and
range over seeds, which have other rows, initial weights and orders. The folder holds

    testbed.json                       the settings; later commands must agree with them
    <seed>/queries.jsonl, losses.json  mean loss of the queries, in nats, before and after fine-tuning
    <seed>/plain/corpus.jsonl, model/  the fine-tuning rows, and the fine-tuned model
    <seed>/decoys/...                  the same with decoys: other passages whose words are most like the queries' by
                                       BM25; not seen in pretraining
"""

import argparse
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lds
import scored
import testbed

from logra.analysis.report import bm25_scores
from logra.runtime import files
from logra.runtime.flag_types import positive_int
from logra.runtime.flags import Parser, run_script

VARIANTS = ("plain", "decoys")
FINE_TUNING_RATE = 1e-3  # the learning rate


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where rows and models are")
    parser.add_argument("scores", nargs="*", type=Path, help="folders of scores in <folder>/<seed>/<variant>/")
    group = parser.add_argument_group("new rows and models")
    group.add_argument("--architecture", choices=testbed.ARCHITECTURES, default="gpt2", help="(gpt2)")
    group.add_argument("--package", default="turtle", help="of the standard library: the other topic (turtle)")
    group.add_argument("--num_pretraining", type=positive_int, default=8000, help="docstrings at most (8000)")
    group.add_argument("--num_manual", type=positive_int, default=1000, help="passages of the manual (1000)")
    group.add_argument("--num_mixed", type=positive_int, default=50, help="mixed-in rows, and decoys (50)")
    group.add_argument("--num_queries", type=positive_int, default=20, help="(20)")
    group.add_argument("--num_seeds", type=positive_int, default=3, help="(3)")
    testbed.add_size_flags(group)
    group.add_argument("--epochs", type=positive_int, default=3, help="of fine-tuning (3)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make what the folder lacks, then print the table."""
    path = args.folder / "testbed.json"
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "scores")}
    if path.exists():
        settings = scored.made_with(path, settings, build_parser())
    seeds = range(settings["num_seeds"])
    places = {(variant, seed): args.folder / str(seed) / variant for variant in VARIANTS for seed in seeds}
    if lost := [folder for folder in args.scores if not set(places.values()) & set(folder.parents)]:
        raise ValueError(
            f"expected scores in {args.folder}/<seed>/{{{','.join(VARIANTS)}}}, got {lost[0]}; score a corpus.jsonl of "
            f"{args.folder}"
        )
    if jobs := [seed for seed in seeds if not (args.folder / str(seed) / "losses.json").exists()]:
        check_sizes(settings)
        files.write_json(path, settings)
        testbed.train_in_parallel(partial(make_seed, args.folder, settings), jobs)
    losses = [files.read_json(args.folder / str(seed) / "losses.json", "delete the folder") for seed in seeds]
    means = [f"{name} {np.mean([loss[name] for loss in losses]):.1f}" for name in losses[0]]
    print(f"Mean loss of the queries, nats: {', '.join(means)}")
    found: dict[str, dict[str, list[float]]] = {}
    for (variant, _), place in places.items():
        for name, precision in precisions(place, [path for path in args.scores if place in path.parents]).items():
            found.setdefault(name, {}).setdefault(variant, []).append(precision)
    shown = [[name, *(spread(row.get(variant, [])) for variant in VARIANTS)] for name, row in found.items()]
    if args.scores:
        scored.print_table(["scores", *VARIANTS], shown)


def passages_of(package: str) -> list[list[str]]:
    """Return the passages of a package, of the other docstrings and of the manual.

    None holds the package's name: it alone would mark the rows. Modules that begin with it (turtledemo) are left out.
    """
    documents = testbed.docstrings()
    own = testbed.cut(text for name, text in documents if name.split(".")[0] == package)
    others = testbed.cut(text for name, text in documents if not name.startswith(package))
    return [[text for text in part if package not in text.lower()] for part in (own, others, testbed.passages("pydoc"))]


def check_sizes(settings: dict[str, Any]) -> None:
    """Refuse a package or a manual with too few passages."""
    own, _, manual = passages_of(settings["package"])
    enough = 2 * (settings["num_mixed"] + settings["num_queries"])  # some are near copies, and no queries
    if len(own) < enough:
        raise ValueError(
            f"expected a --package with {enough} passages, got {settings['package']} with {len(own)}; name another one"
        )
    if len(manual) < settings["num_manual"]:
        raise ValueError(f"expected --num_manual of at most {len(manual)}, got {settings['num_manual']}; lower it")


def make_rows(parts: list[list[str]], settings: dict[str, Any], seed: int) -> tuple[dict[str, list[dict]], list[str]]:
    """Return the rows of the queries and of each variant's corpus, and the texts of pretraining.

    A row's id says what it is: mixed-, manual- or decoy-, and its number among all such passages.
    """
    random, (own, docstrings, manual) = np.random.default_rng(seed), parts

    def shuffled(name: str, texts: list[str]) -> list[dict]:
        return [{"id": f"{name}-{i}", "text": texts[i]} for i in random.permutation(len(texts)).tolist()]

    package, prose = shuffled("mixed", own), shuffled("manual", manual)
    mixed, manual_rows = package[: settings["num_mixed"]], prose[: settings["num_manual"]]
    held_out = set(testbed.held_out([row["text"] for row in package], [row["text"] for row in mixed]))
    queries = [row for row in package if row["text"] in held_out][: settings["num_queries"]]
    used = {row["text"] for row in manual_rows + package}
    others = shuffled("decoy", [text for text in dict.fromkeys(docstrings + manual) if text not in used])
    scores = list(bm25_scores([row["text"] for row in others], [row["text"] for row in queries]))
    decoys = [others[i] for i in np.argsort(-mean_z_score(np.array(scores)), kind="stable")[: settings["num_mixed"]]]
    rows = {"plain": manual_rows + mixed, "decoys": manual_rows + mixed + decoys}
    rows = {name: [part[i] for i in random.permutation(len(part))] for name, part in rows.items()}
    allowed = set(docstrings) - {row["text"] for row in decoys}
    pretraining = [row["text"] for row in others if row["text"] in allowed]
    return rows | {"queries": queries}, pretraining[: settings["num_pretraining"]]


def make_seed(folder: Path, settings: dict[str, Any], seed: int) -> None:
    """Write a seed's rows and models."""
    parts, of_seed = passages_of(settings["package"]), folder / str(seed)
    tokenizer = testbed.make_tokenizer(parts[1], settings["vocabulary"])
    parts = [list(dict.fromkeys(testbed.shorten(text, tokenizer) for text in part)) for part in parts]
    rows, pretraining = make_rows(parts, settings, seed)
    token_ids = {name: tokenizer([row["text"] for row in part])["input_ids"] for name, part in rows.items()}
    pretrained = testbed.train_with_settings(
        settings | {"epochs": 1, "seed": seed}, tokenizer(pretraining)["input_ids"], order_seed=seed
    )
    losses = {"after pretraining": testbed.losses(pretrained, token_ids["queries"]).mean()}
    scored.write_rows(of_seed / "queries.jsonl", rows["queries"])
    for variant in VARIANTS:
        model = deepcopy(pretrained)
        testbed.fine_tune(model, token_ids[variant], settings["epochs"], seed, FINE_TUNING_RATE)
        losses[variant] = testbed.losses(model, token_ids["queries"]).mean()
        model.save_pretrained(of_seed / variant / "model")
        tokenizer.save_pretrained(of_seed / variant / "model")
        scored.write_rows(of_seed / variant / "corpus.jsonl", rows[variant])
    files.write_json(of_seed / "losses.json", {name: float(loss) for name, loss in losses.items()})


def precisions(of_variant: Path, folders: list[Path]) -> dict[str, float]:
    """Return method -> average precision: of the folders with scores of a seed's variant, and of a random order."""
    ids, queries = (
        [row["id"] for row in scored.read_rows(path)]
        for path in (of_variant / "corpus.jsonl", of_variant.parent / "queries.jsonl")
    )
    mixed, found = np.array([name.startswith("mixed-") for name in ids]), {}
    for folder in folders:
        if (folder / "run.json").exists() or not (folder / "scores.npy").exists():
            name = f"{folder.parents[1].name}, {folder.name.split('-', 2)[-1]}"  # without the hash of the queries
            scores = scored.by_document(folder, ids, queries)[str(folder)]
        else:
            name, scores = folder.name, lds.load_scores(folder, of_variant, len(queries), len(ids))
        found[name] = average_precision(mean_z_score(scores), mixed)
    return found | {"random": average_precision(np.random.default_rng(0).random(len(ids)), mixed)}


def mean_z_score(scores: np.ndarray) -> np.ndarray:
    """Return each row's mean z-score over the queries, [D], from scores [Q, D]."""
    centred = scores - scores.mean(axis=1, keepdims=True)
    return (centred / np.maximum(scores.std(axis=1, keepdims=True), 1e-30)).mean(axis=0)


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Return the mean, over the relevant rows, of the share of relevant ones down to the row's rank.

    `relevant` [D] is bool. Of equal scores [D] the first counts as higher.
    """
    hits = relevant[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def spread(values: list[float]) -> str:
    """Return `mean (least to largest)`; nothing of no values."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""


if __name__ == "__main__":
    run_script(main, build_parser())
