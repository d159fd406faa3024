"""Compare two commits: do their five scripts write the same files, bit for bit? Logra is run, but not imported here.

A case is a folder in which a list of commands runs on a tiny model with random weights, once with each commit. Each
command is a process of one thread; those that accelerate does not launch are forked after the imports of other
packages, which take most of the time. Gradients, factors, projections, Hessians, scores, lists and the names of their
folders have to be equal; so has what JSON files hold, but for checksums, versions and arguments. HEAD also scores the
runs that BASE extracted, and has to find BASE's scores. What differs in report.html, in arguments or in what is printed
is shown, and is no failure. BASE and HEAD are commits, or folders of a checkout, whose results are never kept. Prints a
line a case and one JSON line; exit status 1 where a case differs.

    python benchmarks/compare_commits.py HEAD~1 HEAD --keep /tmp/compare
"""

import argparse
import difflib
import io
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {  # {run}: the flags of the case's run
    "generate": "generate.py --model_name models/gpt2 --prompts prompts.txt --max_new_tokens 12 --temperature 0",
    "chat": "generate_llama3.py --model_name models/llama --prompts prompts.txt --max_new_tokens 12 --temperature 0",
    "extract": "extract_log.py {run}",
    "score": "compute_influence.py {run} --split queries.jsonl",
    "analyse": "analysis.py --top_k 5",
}
LAUNCH = "-m accelerate.commands.launch --num_processes 2 --num_machines 1 --multi_gpu --main_process_port 0"
LAUNCH = [sys.executable, *LAUNCH.split()]
LLAMA = "--model_name models/llama --data_name docs.jsonl --block_size 32 --shard_examples 10"
GPT2 = LLAMA.replace("llama", "gpt2")
SMOL = "--model_name models/SmolLM2-135M-Instruct"
QUICKSTART = {  # scripts/quickstart.sh
    "quickstart": (
        f"--log_dir logs/quickstart {SMOL} --data_name pydoc --data_config short --lora random --rank 64 "
        "--hessian ekfac --mlp_only --block_size 256 --calibration_examples 32",
        f"chat {SMOL} --max_new_tokens 96 --prompts {{tree}}/scripts/prompts/python.txt",
        "extract",
        "score --split generated --mode cosine --damping 0.1",
        "analyse --top_k 20",
    )
}
CASES = {  # the run's flags; then steps: a script of SCRIPTS and more flags; `launch` starts it on two processes
    "raw-gram": (
        f"{LLAMA} --rank 12 --hessian raw", "extract", "score --layerwise --self_influence",
        "score --mode cosine --damping 0.01 0.1 1", "score --mode l2 --damping_absolute 0.5", "analyse --diagnose",
    ),
    "raw-covariance": (f"{GPT2} --rank 4 --hessian raw", "extract", "score --mode cosine", "analyse --by document"),
    "hessians-projected": (
        f"{LLAMA} --rank 8 --basis projected --hessian kfac", "extract", "extract --hessian ekfac",
        "score --mode cosine", "score --hessian ekfac --mode l2", "score --hessian none", "analyse --bottom",
    ),
    "hessians-eigen": (
        f"{GPT2} --rank 8 --basis eigen --hessian ekfac", "extract", "extract --hessian kfac",
        "extract --hessian raw", "score --hessian kfac --mode l2", "score --hessian raw --mode cosine",
        "score --hessian none --mode cosine", "score --mode cosine --damping 0.1 1 --layerwise", "analyse --tokens",
    ),
    "queries": (
        f"{LLAMA} --rank 8 --hessian ekfac", "extract", "score --group_by topic", "score --split train --max_queries 3",
        "score --score_layers mlp --query_loss all", "score --top_k_only 5 --mode l2", "analyse --diagnose",
        "analyse --by document --combine max",
    ),
    "bfloat16": (f"{LLAMA} --rank 8 --store_dtype bfloat16 --hessian raw", "extract", "score --mode cosine", "analyse"),
    "float16": (f"{GPT2} --rank 8 --store_dtype float16 --hessian ekfac", "extract", "score --mode l2", "analyse"),
    "int8": (f"{LLAMA} --rank 8 --store_dtype int8 --hessian kfac", "extract", "score --mode cosine", "analyse"),
    "int4": (f"{GPT2} --rank 8 --store_dtype int4 --hessian ekfac", "extract", "score --mode l2", "analyse"),
    "int1-best": (f"{LLAMA} --preset best", "extract", "score --mode cosine", "analyse --tokens --diagnose"),
    "store-none": (
        f"{LLAMA} --rank 8 --store_dtype none --hessian ekfac", "extract", "score --mode cosine",
        "score --query_rank 2", "analyse --tokens",
    ),
    "pca": (f"{LLAMA} --lora pca --rank 8 --hessian raw", "extract", "score --mode cosine", "analyse"),
    "lora-none": (f"{GPT2} --lora none --layers mlp --hessian ekfac", "extract", "score --mode cosine", "analyse"),
    "lora-none-int1": (f"{LLAMA} --lora none --store_dtype int1 --hessian ekfac", "extract", "score", "analyse"),
    "lora-none-store-none": (f"{LLAMA} --lora none --store_dtype none --hessian ekfac", "extract", "score", "analyse"),
    "pack": (f"{GPT2} --rank 8 --pack --hessian ekfac", "extract", "score --mode cosine", "analyse --tokens"),
    "response": (f"{LLAMA} --rank 8 --train_loss response --hessian kfac", "extract", "score", "analyse --tokens"),
    "extend": (
        f"{LLAMA} --log_dir logs/extended --rank 8 --hessian ekfac", "extract",
        "extract --data_name more.jsonl --extend", "score --mode cosine", "analyse --by document",
    ),
    "bytes": (f"{LLAMA} --bytes_per_example 2000 --store_dtype int8 --hessian ekfac", "extract", "score", "analyse"),
    "limits": (
        f"{GPT2} --rank_in 6 --rank_out 4 --seed 5 --shuffle_seed 3 --max_tokens 700 --dtype bfloat16 --hessian ekfac",
        "extract --dry_run", "extract --verify", "extract --batch_size 3 --gradient_checkpointing", "score", "analyse",
    ),
    "two-processes": (
        f"{LLAMA} --rank 8 --hessian ekfac", "launch extract", "launch score --mode cosine --self_influence", "analyse",
    ),
    "two-processes-raw": (
        f"{GPT2} --rank 12 --hessian raw", "launch extract", "launch score --mode cosine --top_k_only 7", "analyse",
    ),
    "fsdp": (f"{LLAMA} --rank 8 --hessian kfac", "launch extract --fsdp", "launch score --fsdp", "analyse"),
    "chat": (f"{LLAMA} --rank 8 --hessian ekfac", "chat", "extract", "score --split generated", "analyse"),
    "continuation": (
        f"{GPT2} --rank 8 --mlp_only --hessian kfac", "extract", "generate", "score --split generated --mode cosine",
        "generate --temperature 0.8 --num_return_sequences 2 --output data/drawn.jsonl",
        "score --split data/drawn.jsonl", "analyse",
    ),
}  # fmt: skip
SHOWN = 4  # differences in a line; the JSON line has all that are failures
UNLIKE = {"checksum", "versions", "arguments", "files", "_fingerprint"}  # of JSON; `files` are checksums of files
SERVER = multiprocessing.get_context("forkserver")
IMPORTS = ["torch.distributed.fsdp", "datasets", "accelerate", "numba", "transformers.models.llama.modeling_llama"]
WORDS = "the river ran past an old mill and children threw stones into cold water while a dog barked at 7 birds".split()


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit or folder")
    parser.add_argument("head", nargs="?", default="HEAD", help="commit or folder (the commit checked out)")
    parser.add_argument("--keep", type=Path, help="folder whose results of commits are used again (a temporary one)")
    parser.add_argument("--quickstart", action="store_true", help="also the commands of scripts/quickstart.sh")
    parser.add_argument("--cases", nargs="+", choices=[*QUICKSTART, *CASES], metavar="CASE", help="just these (all)")
    return parser


def make_inputs(folder: Path) -> None:
    """Write two models, a tokenizer for both, documents, queries and prompts; all seeded."""
    logging.disable_progress_bar()
    draw = random.Random(0)

    def text(longest: int = 40) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(4, longest)))

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options |= {"special_tokens": ["<pad>", "<s>", "</s>", "<|eot_id|>"], "vocab_size": 320}
    tokenizer.train_from_iterator([text() for _ in range(200)], trainers.BpeTrainer(**options))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}<|eot_id|>{% endfor %}<s>"
    common = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaConfig(**common, **sizes, num_key_value_heads=2, max_position_embeddings=64)
    gpt2 = GPT2Config(**common, n_embd=24, n_layer=2, n_head=2, n_positions=64)
    for name, kind, config in (("llama", LlamaForCausalLM, llama), ("gpt2", GPT2LMHeadModel, gpt2)):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder / "models" / name)
        fast.save_pretrained(folder / "models" / name)
    rows = [{"id": f"doc{i}", "text": text(), "prompt": text(8), "response": " " + text(8)} for i in range(50)]
    rows[3]["text"], rows[5]["text"] = "= Łaba, 長江 \N{SLIGHTLY SMILING FACE}", rows[4]["text"]
    write("docs.jsonl", rows[:40])
    write("more.jsonl", rows[40:])
    turns = [{"role": "user", "content": "the old mill"}, {"role": "assistant", "content": text(8)}]
    pair = {"prompt": text(8), "response": " " + text(8)}
    queries = [{"text": text(20)}, pair, {"messages": turns}, {"text": text(20)}]
    write("queries.jsonl", [{"id": f"q{i}", "topic": "ab"[i % 2]} | row for i, row in enumerate(queries)])
    (folder / "prompts.txt").write_text("the old mill\na dog barked\nthe river ran past\n")


def find_tree(name: str, keep: Path, temporary: Path, other: Path | None = None) -> tuple[Path, Path]:
    """Return the checkout of a commit and the folder of its results; those of `other`, if they are, are made anew."""
    if (Path(name) / "extract_log.py").exists():
        return Path(name).resolve(), Path(temporary, "head" if other else "base")
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "--verify", f"{name}^{{commit}}"], text=True).strip()
    tree = keep / commit / "tree"
    if not tree.exists():
        archive = subprocess.check_output([*git, "archive", "--format=tar", commit])
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(tree, filter="data")
    return tree, temporary / "head" if other == tree.parent else tree.parent


def run_script(argv: list[str], tree: Path, folder: Path, stem: Path) -> None:
    """Be `python argv` in a folder, with what is printed in <stem>.out and .err; the rest of a process's life."""
    os.chdir(folder)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(stem.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.argv, sys.path[0] = argv, str(tree)
    runpy.run_path(argv[0], run_name="__main__")


def run_steps(tree: Path, folder: Path, case: tuple[str, ...], bar: tqdm) -> str:
    """Run the steps of a case in its folder; return what went wrong, or nothing."""
    (folder / "printed").mkdir()
    for number, step in enumerate(case[1:]):
        bar.set_postfix_str(f"{tree.parent.name[:7]} {folder.name}: {step[:30]}")
        script, *more = step.removeprefix("launch ").split()
        first, *flags = f"{SCRIPTS[script]} {' '.join(more)}".format(run=case[0], tree=tree).split()
        argv, stem = [str(tree / first), *flags], folder / f"printed/{number}-{script}"
        if step.startswith("launch"):
            with open(stem.with_suffix(".out"), "w") as out, open(stem.with_suffix(".err"), "w") as err:
                status = subprocess.run([*LAUNCH, *argv], cwd=folder, stdout=out, stderr=err).returncode
        else:
            process = SERVER.Process(target=run_script, args=(argv, tree, folder, stem), daemon=True)
            process.start()
            process.join()
            status = process.exitcode
        bar.update()
        if status:
            said = re.findall(".*rror: .*", stem.with_suffix(".err").read_text())
            return f"{step}: status {status}, {said[0] if said else 'without a message'}"
    return ""


def run_case(tree: Path, folder: Path, inputs: Path, case: tuple[str, ...], bar: tqdm) -> str:
    """Run a case in a new folder, unless it has been; return what went wrong, or nothing."""
    finished = folder / "finished.json"
    if finished.exists() and json.loads(finished.read_text()) == list(case):
        bar.update(len(case) - 1)
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    if not (problem := run_steps(tree, folder, case, bar)):
        finished.write_text(json.dumps(case))
    return problem


def without(content, names: set[str]):
    """Return the content of a JSON file without the entries of those names."""
    if isinstance(content, list):
        return [without(item, names) for item in content]
    kept = content.items() if isinstance(content, dict) else ()
    return {key: without(item, names) for key, item in kept if key not in names} if kept else content


def distance(one: Path, two: Path) -> str:
    """Say how far apart two files of numbers are; nothing of other files."""
    if one.suffix not in (".npy", ".safetensors"):
        return ""
    a, b = (load_file(p) if p.suffix != ".npy" else {"": torch.from_numpy(np.load(p))} for p in (one, two))
    if {key: (t.dtype, t.shape) for key, t in a.items()} != {key: (t.dtype, t.shape) for key, t in b.items()}:
        return " (other names, types or shapes)"
    far = max(((a[key].double() - b[key].double()).norm() / a[key].double().norm()).item() for key in a)
    return f" (relative difference {far:.1e})"


def compare(one: Path, two: Path, scores_only: bool = False) -> tuple[list[str], list[str]]:
    """Return what differs between two folders of results that must not, and what may."""
    names = {p.relative_to(f) for f in (one, two) for d in ("logs", "data", "printed") for p in (f / d).rglob("*.*")}
    if scores_only:
        names = {name for name in names if "scores" in name.parts and not re.match(r"top_k|report", name.name)}
    wrong, reported = [], []
    for name in sorted(name for name in names if not re.search(r"\.lock$|\.err$|log\.txt$", name.name)):
        a, b = one / name, two / name
        if not (a.exists() and b.exists()):
            wrong.append(f"{name} (only in {'BASE' if a.exists() else 'HEAD'})")
        elif a.is_dir() or a.read_bytes() == b.read_bytes():
            continue
        elif name.suffix == ".json":
            first, second = (json.loads(path.read_bytes()) for path in (a, b))
            c, d = without(first, UNLIKE), without(second, UNLIKE)
            wrong += [f"{name}: {key}" for key in c | d if c.get(key, ...) != d.get(key, ...)]
            reported += [f"{name}: arguments"] if first.get("arguments") != second.get("arguments") else []
        elif name.suffix == ".out":  # but for the line with time and memory
            c, d = ([line for line in path.read_text().splitlines() if "of memory" not in line] for path in (a, b))
            lines = [line for line in difflib.ndiff(c, d) if line[0] in "+-"]
            reported += [f"{name}: {len(lines)} lines, {lines[:SHOWN]}"] if lines else []
        else:
            (reported if name.name == "report.html" else wrong).append(f"{name}{distance(a, b)}")
    return wrong, reported


def compare_case(name: str, sides: list[tuple[Path, Path]], inputs: Path, again: Path, bar: tqdm) -> tuple[list, list]:
    """Run a case with both commits, score BASE's run with HEAD, and return what `compare` does."""
    case = (CASES | QUICKSTART)[name]
    for side, (tree, folder) in zip(("BASE", "HEAD"), sides, strict=True):
        if problem := run_case(tree, folder / name, inputs, case, bar):
            return [f"{side}: {problem}"], []
    (_, base), (tree, head) = sides
    wrong, reported = compare(base / name, head / name)
    ignored = shutil.ignore_patterns("scores", "self_influence", "printed")
    shutil.copytree(base / name, again / name, symlinks=True, ignore=ignored)
    problem = run_steps(tree, again / name, (case[0], *(step for step in case[1:] if "score" in step)), bar)
    found = [problem] if problem else compare(base / name, again / name, scores_only=True)[0]
    return wrong + [f"BASE's run scored by HEAD: {text}" for text in found], reported


def main(args: argparse.Namespace) -> int:
    """Run the cases with both commits, and compare; return the exit status."""
    names = args.cases or [*CASES, *(QUICKSTART if args.quickstart else ())]
    started, different, may_differ = time.perf_counter(), {}, {}
    with TemporaryDirectory() as made:
        temporary, keep = Path(made), (args.keep or Path(made, "kept")).resolve()
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{made}/home", "CUDA_VISIBLE_DEVICES": ""}
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        SERVER.set_forkserver_preload(IMPORTS)
        if not (keep / "inputs/prompts.txt").exists():
            make_inputs(keep / "inputs")
        sides = [find_tree(args.base, keep, temporary)]
        sides.append(find_tree(args.head, keep, temporary, sides[0][1]))
        steps = [step for name in names for step in (CASES | QUICKSTART)[name][1:]]
        with tqdm(total=2 * len(steps) + sum("score" in step for step in steps), unit="command") as bar:
            for name in names:
                wrong, reported = compare_case(name, sides, keep / "inputs", temporary / "again", bar)
                more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
                tqdm.write(f"{name}: " + (f"DIFFERENT {', '.join(wrong[:SHOWN])}{more}" if wrong else "same"))
                for text in reported:
                    tqdm.write(f"    (may differ) {text}")
                different |= {name: wrong} if wrong else {}
                may_differ |= {name: reported} if reported else {}
    found = {"base": args.base, "head": args.head, "cases": len(names), "different": different}
    print(json.dumps(found | {"may_differ": may_differ, "seconds": round(time.perf_counter() - started)}))
    return 1 if different else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    sys.exit(main(build_parser().parse_args()))
