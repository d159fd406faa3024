"""Selection: is a model fine-tuned on selected rows better at a target than one fine-tuned on others? No download.

    python evaluation/selection.py data/selection                                     # makes the rows
    python evaluation/selection.py data/selection data/selection/random.jsonl         # fine-tunes on a file's rows

Rows are instructions in Alpaca's form: what does a function, class or module of Python's standard library do? The
output is the first paragraph of its docstring. The target are such rows of one package, which the others do not
repeat. For each file of rows (of any form with answers) the model is fine-tuned anew, on the answers. The table has the
mean loss of the target's answers, in nats per token, with intervals over the target's rows. The folder holds

    rows.jsonl      the rows to select from
    random.jsonl    a tenth of them, drawn at random
    target.jsonl    the target: the queries of compute_influence.py --split
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scored
import testbed

from logra.inputs.queries import Query, load_queries
from logra.loss import example_losses
from logra.models.model import load_model, load_tokenizer
from logra.runtime.flag_types import positive_int, seed_int
from logra.runtime.flags import Parser, run_script
from logra.runtime.settings import QuerySettings, RunSettings
from logra.stages.batches import make_batch

MIN_WORDS, MAX_TOKENS = 5, 60  # of an answer
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the rows are")
    parser.add_argument("rows", nargs="*", type=Path, help="files of rows to fine-tune on, each from the same model")
    parser.add_argument("--model_name", default=RunSettings.model_name, help=f"({RunSettings.model_name})")
    parser.add_argument("--package", default="email", help="of the standard library: the target's (email)")
    parser.add_argument("--num_rows", type=positive_int, default=600, help="to select from (600)")
    parser.add_argument("--num_target", type=positive_int, default=30, help="rows of the target (30)")
    parser.add_argument("--epochs", type=positive_int, default=2, help="of fine-tuning (2)")
    parser.add_argument("--seed", type=seed_int, default=0, help="of the rows and of the order in training (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make the rows that the folder lacks; fine-tune; print the table."""
    tokenizer = load_tokenizer(args.model_name)
    if not (args.folder / "target.jsonl").exists():
        rows, target = make_rows(tokenizer, args.package, args.num_rows, args.num_target, args.seed)
        scored.write_rows(args.folder / "rows.jsonl", rows)
        scored.write_rows(args.folder / "random.jsonl", rows[: max(1, len(rows) // 10)])  # the rows are shuffled
        scored.write_rows(args.folder / "target.jsonl", target)
    target, table = read(args.folder / "target.jsonl", tokenizer), []
    for path in args.rows:
        rows, model = read(path, tokenizer), load_model(args.model_name, torch.float32, DEVICE)
        before, counted = losses(model, target), [row.counted for row in rows]
        testbed.fine_tune(model, [row.token_ids for row in rows], args.epochs, args.seed, counted=counted)
        after = losses(model, target)
        first = table[0][3] if table else after
        table.append([path, len(rows), before, after, after - before, after - first])
    if table:
        scored.print_table(["rows", "number", "loss before", "after", "change", "after, less that of the first"], table)


def make_rows(
    tokenizer: PreTrainedTokenizerBase, package: str, num_rows: int, num_target: int, seed: int
) -> tuple[list[dict], list[dict]]:
    """Return rows to select from, shuffled, and rows of the target.

    Raises:
        ValueError: There are too few docstrings.
    """
    answers: dict[str, str] = {}  # each once: the same answer to two questions would be a copy
    for name, text in testbed.docstrings():
        answer = " ".join(text.split("\n\n")[0].split())
        if len(answer.split()) >= MIN_WORDS and len(tokenizer(answer)["input_ids"]) <= MAX_TOKENS:
            answers.setdefault(answer, name)
    shuffled = np.random.default_rng(seed).permutation(list(answers)).tolist()
    # from the end: the first rows would else be without the package
    target = [answer for answer in shuffled if answers[answer].split(".")[0] == package][-num_target:]
    others = testbed.held_out([answer for answer in shuffled if answer not in target], target)[:num_rows]
    for flag, got, wanted in (("num_target", target, num_target), ("num_rows", others, num_rows)):
        if len(got) < wanted:
            raise ValueError(f"expected --{flag} of at most {len(got)}, got {wanted}; lower it")
    return tuple(
        [
            {"id": f"{i}: {answers[a]}", "instruction": f"What does {answers[a]} do?", "output": a}
            for i, a in enumerate(part)
        ]
        for part in (others, target)
    )


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Query]:
    """Return the tokens of a file's rows, of which those of the answers count, as the pipeline reads them."""
    return load_queries(QuerySettings(split=str(path)), RunSettings(), tokenizer)[1]


@torch.no_grad()
def losses(model: torch.nn.Module, rows: list[Query]) -> np.ndarray:
    """Return the mean loss of each row's answer, in nats per token, [len(rows)]."""
    found = []
    for row in rows:
        batch = make_batch([row.token_ids], [row.counted], model.device)
        found.append(float(example_losses(model, batch.input_ids, batch.targets)) / len(batch.rows))
    return np.array(found)


if __name__ == "__main__":
    run_script(main, build_parser())
