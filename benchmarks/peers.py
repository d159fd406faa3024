"""Extraction speed of ours, bergson and LogIX with the same model, tokens, layers, rank and batches.

Settings: `none` (gradients only), `raw` (and the Hessian of the stored gradients) and `kfac` (and its factors; without
bergson, whose factors are never projected). The clock runs from the first batch until everything is written, without
imports, loading and tokenising. Runs alternate. Prints medians, what was not equal, and one JSON line.
benchmarks/peers.sh makes the peers' environments, then runs this. Notation: N examples, L layers, k = rank * rank.

    python benchmarks/peers.py --examples 32
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "logs/peers"
PEERS = {"bergson": "bergson", "logix": "logix-ai"}  # name -> package
PYTHON = {"ours": sys.executable} | {name: str(ROOT / f".venv/peers/{name}/bin/python") for name in PEERS}
SETTINGS = {"none": list(PYTHON), "raw": list(PYTHON), "kfac": ["ours", "logix"]}
GRADIENT_FILES = {
    "ours": "gradients/00000.safetensors", "bergson": "gradients.bin", "logix": "log_rank_0_chunk_0.mmap",
}  # fmt: skip
PROJECTION_FILES = ("projections.safetensors", "lora_state_dict.pt")  # not counted: bergson draws its own again
NOT_EQUAL = """\
- ours flushes its files to the disk and takes checksums; the peers leave the flushing to the system
- ours sums kfac's factors and the squares for ekfac in every setting, and stores them (4.4 MB per shard)
- ours, raw: if N < k, it stores a layer's [N, N] Gram matrix, which gives the same scores as the peers' [k, k]
- bergson, raw: a second pass over the model (its command `hessian`); the eigendecompositions at its end, [k, k] per
  layer, are skipped here, because ours and LogIX factor their matrices when they score
- bergson computes the embedding's gradient, so that its hooks are called; if the head is tied, also the head's
- LogIX also runs the forward pass through its projections, as LoRA layers
- projections: normal (ours), signs (bergson; drawn within the clock), uniform with another scale (LogIX)"""


def build_parser():
    """Return the command line's parser."""
    from logra.runtime.flag_types import non_negative, positive_int
    from logra.runtime.flags import Parser  # not at the top: the peers' python has no logra

    parser = Parser(description=__doc__)
    parser.add_argument(
        "--model_name", default="models/SmolLM2-135M-Instruct", help="of Llama's architecture (%(default)s)"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="(all)")
    parser.add_argument("--examples", type=positive_int, default=32, help="full blocks of Python's manual (32)")
    parser.add_argument("--block_size", type=positive_int, default=256, help="tokens in a block (256)")
    parser.add_argument("--batch_size", type=positive_int, default=4, help="blocks in a batch (4)")
    parser.add_argument("--rank", type=positive_int, default=64, help="of each side (64)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="runs of each program (3)")
    parser.add_argument(
        "--max_others", type=non_negative, default=1.0, help="repeat if others used more of the cores (1: never)"
    )
    parser.add_argument("--threads", type=positive_int, default=os.cpu_count(), help="(%(default)s, the cores)")
    return parser


def our_flags(setting: str, args, folder: Path) -> list[str]:
    """Return the flags of extract_log.py. One shard, as a long run's are large; the default would make 8 of them."""
    flags = "--data_name pydoc --data_config short --pack --mlp_only --basis projected"
    flags += f" --max_examples {args.examples} --shard_examples {args.examples} --block_size {args.block_size}"
    flags += f" --batch_size {args.batch_size} --batch_tokens {args.batch_size * args.block_size}"
    flags += f" --rank {args.rank} --hessian {setting}"
    return [*flags.split(), "--model_name", args.model_name, "--log_dir", str(folder)]


def run_once(program: str, setting: str, args) -> dict:
    """Run a program in its own process, delete what it wrote, and return what was measured."""
    import psutil  # not at the top: LogIX's python has no psutil

    folder, output = OUT / f"{setting}-{program}", OUT / f"{setting}-{program}.txt"
    shutil.rmtree(folder, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    job = vars(args) | {"setting": setting, "folder": str(folder)}
    words = ["benchmarks/peers.py", "--worker", program, json.dumps(job)]
    words = ["extract_log.py", *our_flags(setting, args, folder)] if program == "ours" else words
    variables = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    options: dict[str, Any] = {"cwd": ROOT, "env": variables, "stderr": subprocess.STDOUT}
    before, start = psutil.cpu_times(), time.perf_counter()
    with open(output, "w") as file:
        process = subprocess.Popen([PYTHON[program], *words], stdout=file, **options)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = output.read_text(errors="replace").strip().splitlines()
    if process.returncode:
        raise ValueError(f"expected {program} to succeed, got status {process.returncode}; see {output}: {lines[-1:]}")
    idle = sum(getattr(psutil.cpu_times(), kind) - getattr(before, kind) for kind in ("idle", "iowait"))
    not_others = idle + used.ru_utime + used.ru_stime
    result = our_result(folder, args) if program == "ours" else json.loads(lines[-1])
    stored = [file for file in folder.rglob("*") if file.is_file() and file.name not in PROJECTION_FILES]
    result["bytes"] = sum(file.stat().st_size for file in stored)
    result["peak_bytes"] = used.ru_maxrss * 1024  # of the process, on Linux
    result["others"] = round(1 - not_others / (time.perf_counter() - start) / os.cpu_count(), 2)
    result["gradients"] = stored_gradients(next(folder.rglob(GRADIENT_FILES[program])), args.examples)
    shutil.rmtree(folder)
    return result


def our_result(folder: Path, args) -> dict:
    """Return the seconds from run.json's last entry (the projections) to the last file, and the versions.

    Writes the token ids for the peers to OUT.
    """
    import datasets  # not at the top: LogIX's python has no datasets

    rows = list(datasets.load_from_disk(folder / "train")["input_ids"])
    if [len(row) for row in rows] != [args.block_size] * args.examples:
        raise ValueError(f"expected {args.examples} full blocks of text, got at most {len(rows)}; lower --examples")
    (OUT / "tokens.json").write_text(json.dumps(rows))
    written = [file.stat().st_mtime for part in ("gradients", "hessian") for file in (folder / part).glob("*")]
    about = json.loads((folder / "run.json").read_text())
    return {"seconds": max(written) - (folder / "run.json").stat().st_mtime, "versions": about["versions"]}


def stored_gradients(file: Path, examples: int) -> dict:
    """Return the number of stored values, N * L * k, and the norm of each example's values."""
    layers = list(load_file(file).values()) if file.suffix == ".safetensors" else [np.fromfile(file, np.float32)]
    rows = np.concatenate([layer.reshape(examples, -1) for layer in layers], axis=1)
    return {"numbers": rows.size, "norms": np.linalg.norm(rows, axis=1)}


def summary(runs: dict[str, list[dict]], args) -> dict[str, dict]:
    """Return each program's medians.

    Raises:
        ValueError: A program stored another number of values, so it tracked other layers.
    """
    ours, results = runs["ours"][0]["gradients"], {}
    for program, measured in runs.items():
        theirs = measured[0]["gradients"]
        if theirs["numbers"] != ours["numbers"]:
            raise ValueError(
                f"expected {ours['numbers']} stored numbers, as ours, got {theirs['numbers']} from {program}, which "
                "tracks other layers; give a --model_name of Llama's architecture"
            )
        seconds = [run["seconds"] for run in measured]
        results[program] = {
            "tokens_per_second": args.examples * args.block_size / median(seconds),
            "seconds": seconds,
            "others_share_of_cores": [run["others"] for run in measured],
            "stored_bytes": median(run["bytes"] for run in measured),
            "peak_bytes": max(run["peak_bytes"] for run in measured),
            "norms_correlation_with_ours": float(np.corrcoef(ours["norms"], theirs["norms"])[0, 1]),
        }
    return results


def main(args) -> None:
    """Run all settings, print a table and a JSON line."""
    if missing := [python for python in PYTHON.values() if not Path(python).exists()]:
        raise ValueError(f"expected the peers' environments, got no {missing[0]}; run bash benchmarks/peers.sh")
    results, versions = {}, {}
    for setting in args.settings:
        runs: dict[str, list[dict]] = {program: [] for program in SETTINGS[setting]}
        for _ in range(args.repeats):
            for program, measured in runs.items():
                while (result := run_once(program, setting, args))["others"] > args.max_others:
                    print(f"{setting} {program} again: others used {result['others']} of the cores", flush=True)
                measured.append(result)
                versions[program] = result["versions"]
        results[setting] = summary(runs, args)
        for program, r in results[setting].items():
            row = f"{setting:5s} {program:8s} {r['tokens_per_second']:5.0f} tokens/s"
            row += f" {r['stored_bytes'] / 1e6:8.1f} MB stored {r['peak_bytes'] / 1e9:6.2f} GB peak"
            print(f"{row}  others' share of the cores {max(r['others_share_of_cores'])}", flush=True)
    print("Not equal:", NOT_EQUAL, sep="\n")
    about = {"benchmark": "peers", **vars(args), "processor": platform.processor() or platform.machine()}
    print(json.dumps(about | {"cores": os.cpu_count(), "versions": versions, "results": results}))


def bergson(job: dict, rows: list[list[int]]) -> float:
    """Extract with bergson 2.5 (its commands `build` and `hessian`, the model loaded once); return the seconds."""
    import bergson.process_autocorrelation  # not at the top: only bergson's python has bergson
    import torch
    from bergson import CollectorComputer, IndexConfig, PreprocessConfig, collect_gradients
    from bergson.data import allocate_batches
    from bergson.hessians.autocorrelation import AutocorrelationCollector
    from bergson.utils.worker_utils import create_processor, setup_model_and_peft
    from datasets import Dataset

    bergson.process_autocorrelation._eigh = lambda *_: (torch.empty(0), torch.empty(0))  # skipped: see NOT_EQUAL
    options = {"model": job["model_name"], "precision": "fp32", "projection_dim": job["rank"]}
    options |= {"token_batch_size": job["batch_size"] * job["block_size"], "filter_modules": "*self_attn*"}
    cfg, cfg_hessian = (IndexConfig(run_path=f"{job['folder']}/{part}", **options) for part in ("index", "hessian"))
    model, targets = setup_model_and_peft(cfg)
    data = Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})
    batches = allocate_batches(data["length"][:], cfg.token_batch_size)
    model(input_ids=torch.arange(8)[None])  # ours runs these tokens too, before its clock starts
    start = time.perf_counter()
    cfg.partial_run_path.mkdir(parents=True)
    given = {"processor": create_processor(model, cfg, targets), "target_modules": targets}
    collect_gradients(model, data, cfg=cfg, batches=batches, preprocess_cfg=PreprocessConfig(), **given)
    if job["setting"] == "raw":
        cfg_hessian.partial_run_path.mkdir(parents=True)
        given["processor"] = create_processor(model, cfg_hessian, targets)
        given |= {"path": str(cfg_hessian.partial_run_path), "filter_modules": cfg_hessian.filter_modules}
        collector = AutocorrelationCollector(model=model.base_model, data=data, **given)
        computer = CollectorComputer(model, data, collector=collector, batches=batches, cfg=cfg_hessian)
        computer.run_with_collector_hooks("Hessian")
    return time.perf_counter() - start


def logix(job: dict, rows: list[list[int]]) -> float:
    """Extract with LogIX 0.1 (the loop of its README); return the seconds."""
    import torch  # not at the top: only LogIX's python has logix
    from logix import LogIX, LogIXScheduler
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    config = Path(job["folder"]) / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"root_dir": job["folder"], "lora": {"init": "random", "rank": job["rank"]}}))
    model = AutoModelForCausalLM.from_pretrained(job["model_name"], dtype=torch.float32).eval()
    run = LogIX("log", config=str(config))
    run.watch(model, name_filter=["mlp"])
    run.add_lora()
    examples = [(str(number), torch.tensor(row)) for number, row in enumerate(rows)]
    loader = torch.utils.data.DataLoader(examples, batch_size=job["batch_size"])
    model(input_ids=torch.arange(8)[None])  # ours runs these tokens too, before its clock starts
    start = time.perf_counter()
    for _ in LogIXScheduler(run, lora="none", hessian=job["setting"], save="grad"):
        for ids, tokens in loader:
            mask = torch.ones_like(tokens)
            with run(data_id=ids, mask=mask):
                model.zero_grad()
                logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
                F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
        run.finalize()
    return time.perf_counter() - start


def worker(program: str, description: str) -> None:
    """Run a peer with its own python, and print its seconds and versions."""
    job, rows = json.loads(description), json.loads((OUT / "tokens.json").read_text())
    seconds = {"bergson": bergson, "logix": logix}[program](job, rows)
    names = (PEERS[program], "torch", "transformers", "numpy")
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    print(f"\n{json.dumps({'seconds': seconds, 'versions': versions})}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        sys.path.insert(0, str(ROOT))
        from logra.runtime.flags import run_script  # not at the top: see build_parser

        run_script(main, build_parser())
