"""EK-FAC without compression, ours and kronfluence's: do the scores agree, and how long do both take?

Both have the same model (Llama's architecture, no biases), token ids, MLP layers, float32, empirical Fisher, and lambda
(0.1 times a layer's mean eigenvalue). The clock runs from texts and a loaded model to scores on the disk, without
tokenising. Runs alternate. Prints medians, what was not equal, and one JSON line. benchmarks/kronfluence.sh makes
kronfluence's environment, then runs this. Notation: Q queries, N train texts; A, B, C and lambda as in docs/method.md.

    python benchmarks/kronfluence_compare.py --num_texts 500 --num_queries 20
"""

import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "logs/kronfluence"
TRAIN, QUERIES = OUT / "train.jsonl", OUT / "queries.jsonl"
PYTHON = {"ours": sys.executable, "kronfluence": str(ROOT / ".venv/peers/kronfluence/bin/python")}
SMALL_MODEL: dict[str, int] = {"layers": 3, "width": 128, "vocabulary": 1024, "context": 128}
PHASES = ("A, B, eigenvectors", "eigenvalues", "scores")  # each is a pass over the train texts
COLUMNS = (*PHASES, "total", "total, CPU")
LEFT_OUT = "left out"  # phase that is not in the total: loading and tokenising
NOT_EQUAL = """\
- ours flushes its files to the disk, takes checksums, and computes a scale of each example's gradients
- ours: batches of similar length, at most 64 * --batch_size tokens; kronfluence: --batch_size texts of at most 64
  tokens, here sorted by length
- kronfluence calls gc.collect ten times, which takes long after many imports; here gc.freeze avoids that
- kronfluence's A would include an example's last position, through which no gradient flows; here get_attention_mask
  leaves it out (else scores differed by 2%, 100 texts). A and B are divided by other counts; eigenvectors stay the same
Nothing else is known to differ: the best factor must be 1, since both are q^T (C + lambda I)^-1 z, C a mean over N."""


def build_parser():
    """Return the command line's parser."""
    from logra.runtime.flag_types import positive_int
    from logra.runtime.flags import Parser  # not at the top, as all of ours: kronfluence's python has no logra

    parser = Parser(description=__doc__)
    parser.add_argument("--model_name", help="of Llama's architecture (a small one, made and briefly trained here)")
    parser.add_argument("--epochs", type=positive_int, default=3, help="of the small model's training (3)")
    parser.add_argument("--num_texts", type=positive_int, default=500, help="passages of Python's manual, N (500)")
    parser.add_argument("--num_queries", type=positive_int, default=20, help="other passages, Q (20)")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="kronfluence's, in texts (32)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="runs of each program (3)")
    parser.add_argument("--threads", type=positive_int, default=os.cpu_count(), help="(%(default)s, the cores)")
    return parser


def make_inputs(args) -> dict:
    """Write the texts, and a small model where none is given; return the model's name and all token ids."""
    from evaluation import testbed  # not at the top: see build_parser
    from logra.models.model import load_tokenizer

    texts, name = testbed.passages("pydoc"), args.model_name or str(OUT / "model")
    if len(texts) < (wanted := args.num_queries + args.num_texts):
        raise ValueError(f"expected {wanted} passages in Python's manual, got {len(texts)}; lower --num_texts")
    np.random.default_rng(0).shuffle(texts)
    parts, ids = {QUERIES: texts[: args.num_queries], TRAIN: texts[args.num_queries : wanted]}, []
    if args.model_name:
        tokenizer = load_tokenizer(name)
    else:
        tokenizer = testbed.make_tokenizer(parts[TRAIN], SMALL_MODEL["vocabulary"])
    for path, part in parts.items():
        part = [testbed.shorten(text, tokenizer) for text in part]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        ids.append(tokenizer(part)["input_ids"])
    if not args.model_name:
        config = testbed.make_config("llama", **SMALL_MODEL)
        testbed.train(config, ids[1], args.epochs, order_seed=0).save_pretrained(name)
        tokenizer.save_pretrained(name)
    return {"model": name, "batch_size": args.batch_size, "queries": ids[0], "train": ids[1]}


def main(args) -> None:
    """Run both programs in turn, compare their scores, print a table and a JSON line."""
    if not Path(PYTHON["kronfluence"]).exists():
        raise ValueError(f"expected {PYTHON['kronfluence']}, got none; run bash benchmarks/kronfluence.sh")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "job.json").write_text(json.dumps(make_inputs(args)))
    runs: dict[str, list[dict]] = {program: [] for program in PYTHON}
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    for program in args.repeats * list(PYTHON):  # in turn, each in a process of its own
        done = subprocess.run([PYTHON[program], __file__, "--worker", program], **options)
        if done.returncode:
            raise ValueError(f"expected scores from {program}, got status {done.returncode}: {done.stderr[-500:]}")
        runs[program].append(json.loads(done.stdout.splitlines()[-1]))
    table = {name: {key: median(run["seconds"][key] for run in runs[name]) for key in COLUMNS} for name in runs}
    table["ratio"] = {key: table["ours"][key] / table["kronfluence"][key] for key in COLUMNS}
    print("median seconds".ljust(15) + "".join(f"{key:>20s}" for key in COLUMNS))
    for name, row in table.items():
        print(f"{name:15s}" + "".join(f"{value:20.2f}" for value in row.values()))
    ours, theirs = (np.load(OUT / f"{program}.npy").astype(np.float64) for program in PYTHON)
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    factor = (ours * theirs).sum() / np.square(theirs).sum()
    print(f"scores: relative difference {difference:.1e}, best factor {factor:.6f}\nNot equal:\n{NOT_EQUAL}")
    about = {"benchmark": "kronfluence", **vars(args), "processor": platform.processor() or platform.machine()}
    about |= {"cores": os.cpu_count(), "difference": difference, "factor": factor, "medians": table, "runs": runs}
    print(json.dumps(about))
    if not difference <= 1e-3:
        raise ValueError(f"expected scores with a relative difference of at most 1e-3, got {difference:.1e}")


def timed(seconds: Counter, phase: str, function):
    """Return the function with a clock: it adds the call's seconds to `phase`, its CPU seconds to `<phase>, CPU`."""

    def call(*args, **kwargs):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        result = function(*args, **kwargs)
        seconds.update({phase: time.perf_counter() - begin, f"{phase}, CPU": time.process_time() - begin_cpu})
        return result

    return call


def add_clocks(seconds: Counter) -> None:
    """Time the steps of stages 2 and 3, where the two scripts look them up."""
    from logra.runtime import processes
    from logra.scoring import score
    from logra.stages import calibrate, extract, open_run

    steps = {
        PHASES[0]: [(calibrate, "make_projections")],
        PHASES[1]: [(extract, "write_shards"), (extract, "write_hessian")],
        PHASES[2]: [(score, "Scorer"), (score, "write_scores")],
        LEFT_OUT: [
            (processes, "start"), (open_run, "new_settings"), (open_run, "load_model"), (extract, "write_train"),
            (open_run, "read_queries"),
        ],
    }  # fmt: skip
    for phase, places in steps.items():
        for module, name in places:
            setattr(module, name, timed(seconds, phase, getattr(module, name)))


def ours(job: dict, seconds: Counter) -> np.ndarray:
    """Run stages 2 and 3 in this process; return the scores, [Q, N]."""
    sys.path.insert(0, str(ROOT))
    import compute_influence  # not at the top: see build_parser
    import extract_log

    folder = OUT / "run"
    shutil.rmtree(folder, ignore_errors=True)
    add_clocks(seconds)
    flags = f"--log_dir {folder} --lora none --hessian ekfac --mlp_only --model_name {job['model']} --data_name {TRAIN}"
    flags += f" --batch_tokens {64 * job['batch_size']} --shard_examples 250"
    stages = {extract_log: f"{flags} --dtype float32 --store_dtype none --calibration_examples 1000000"}
    stages[compute_influence] = f"{flags} --split {QUERIES} --mode dot --damping 0.1"
    for module, words in stages.items():
        timed(seconds, "total", module.main)(module.build_parser().parse_args(words.split()))
    seconds.update({key: -seconds[key.replace("total", LEFT_OUT)] for key in ("total", "total, CPU")})
    return np.load(next(folder.glob("scores/*/scores.npy")))


def kronfluence(job: dict, seconds: Counter) -> np.ndarray:
    """Fit the factors and score with kronfluence 1.0; return the scores, [Q, N]."""
    import torch  # not at the top: our python has no kronfluence, and the parent process needs none of these
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs
    from torch.nn import functional as F
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    class LanguageModelling(Task):
        def compute_train_loss(self, batch, model, sample=False):
            # no attention_mask: with causal attention, padding on the right needs none, and it would cost time
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
            return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

        compute_measurement = compute_train_loss

        def get_influence_tracked_modules(self):
            return [name for name, _ in model.named_modules() if name.endswith("_proj") and ".mlp." in name]

        def get_attention_mask(self, batch):  # used for A only; see NOT_EQUAL
            return F.pad(batch["labels"][:, 1:] != -100, (0, 1)).long()

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: pad_sequence(rows, True, value) for key, value in (("input_ids", 0), ("labels", -100))}

    order = np.argsort([-len(row) for row in job["train"]], kind="stable")
    train, queries = [torch.tensor(job["train"][i]) for i in order], [torch.tensor(row) for row in job["queries"]]
    model, task = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32), LanguageModelling()
    analyzer = Analyzer("run", prepare_model(model, task), task, output_dir=str(OUT / "factors"))
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
    model(input_ids=torch.arange(8, device=analyzer.state.device)[None])  # ours runs these too, on loading
    gc.freeze()
    about = FactorArguments(use_empirical_fisher=True, covariance_max_examples=None, lambda_max_examples=None)
    about = {"factors_name": "run", "factor_args": about, "overwrite_output_dir": True}
    data = {"dataset": train, "per_device_batch_size": job["batch_size"]}
    timed(seconds, PHASES[0], analyzer.fit_covariance_matrices)(**about, **data)
    timed(seconds, PHASES[0], analyzer.perform_eigendecomposition)(**about)
    timed(seconds, PHASES[1], analyzer.fit_lambda_matrices)(**about, **data)
    about = {"score_args": ScoreArguments(damping_factor=None), "overwrite_output_dir": True}  # 0.1 mean eigenvalues
    score = timed(seconds, PHASES[2], analyzer.compute_pairwise_scores)
    score("run", "run", queries, train, len(queries), job["batch_size"], **about)
    seconds.update({f"total{unit}": sum(seconds[f"{phase}{unit}"] for phase in PHASES) for unit in ("", ", CPU")})
    return analyzer.load_pairwise_scores("run")["all_modules"].numpy()[:, np.argsort(order)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        program, job, seconds = sys.argv[2], json.loads((OUT / "job.json").read_text()), Counter()
        np.save(OUT / f"{program}.npy", {"ours": ours, "kronfluence": kronfluence}[program](job, seconds))
        names = ["torch", "transformers", "numpy"] + ["kronfluence"] * (program == "kronfluence")
        print(f"\n{json.dumps({'seconds': seconds, 'versions': {name: version(name) for name in names}})}")
    else:
        sys.path.insert(0, str(ROOT))
        from logra.runtime.flags import run_script  # not at the top: see build_parser

        run_script(main, build_parser())
