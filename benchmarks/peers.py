"""Extraction speed of ours, bergson and LogIX: same model, tokens, layers, ranks and batches; runs alternate.

`bash benchmarks/peers.sh` makes the peers' environments and runs this. Settings: `none` (gradients only), `raw` (and the
Hessian of the stored gradients) and `kfac` (its factors; bergson's are unprojected, so it is left out). Prints medians,
what was not equal, and one JSON line. The clock runs from the first batch until all is written; imports, loading the
model and tokenising are left out. Notation: N examples, L layers, k = rank * rank.

    python benchmarks/peers.py --examples 32
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "logs" / "peers"
PYTHON = {"ours": sys.executable} | {p: str(ROOT / f".venv/peers/{p}/bin/python") for p in ("bergson", "logix")}
SETTINGS = {"none": ("ours", "bergson", "logix"), "raw": ("ours", "bergson", "logix"), "kfac": ("ours", "logix")}
PROJECTIONS = ("projections.safetensors", "lora_state_dict.pt")  # of ours and LogIX; bergson draws its own again
ROWS = {"bergson": "gradients/gradients.bin", "logix": "log/log_rank_0_chunk_0.mmap"}  # [N, L * k] float32
NOT_EQUAL = (
    "ours flushes its files to the disk and writes checksums; the peers leave the flushing to the system",
    "ours sums kfac's factors and squared gradients in every setting; none of that is asked for in `none`",
    "ours, raw, N < k: the N x N Gram matrix of a layer stands for its k x k Hessian, with the same scores",
    "bergson, raw: a second pass (its command `hessian`) for its autocorrelation matrices; their eigendecompositions, a "
    "part of that command, are left out, since ours and LogIX factor theirs when they score: `eigh_seconds` is one's time",
    "bergson computes the gradient of the embedding, hence of a head tied to it, to get hooks called",
    "LogIX adds its projections to the model as LoRA layers, so the forward pass goes through them too",
    "random projections: normal (ours), signs (bergson, drawn within the clock), uniform and of another scale (LogIX)",
)


def build_parser():
    """Return the command line's parser."""
    from logra import run  # not at the top: workers run with the peers' python, which lacks what logra imports

    parser = run.Parser(description=__doc__)
    parser.add_argument("--model_name", default="models/SmolLM2-135M-Instruct", help="Llama architecture (%(default)s)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="(all)")
    parser.add_argument("--examples", type=run.positive_int, default=32, help="full blocks of Python's manual (32)")
    parser.add_argument("--block_size", type=run.positive_int, default=256, help="tokens in a block (256)")
    parser.add_argument("--batch_size", type=run.positive_int, default=4, help="blocks in a batch (4)")
    parser.add_argument("--rank", type=run.positive_int, default=64, help="of each side (64)")
    parser.add_argument("--repeats", type=run.positive_int, default=3, help="runs of each program (3)")
    parser.add_argument("--threads", type=run.positive_int, default=2, help="OMP_NUM_THREADS (2)")
    return parser


def command_line(program: str, setting: str, args, folder: Path) -> list[str]:
    """Return the command of one run."""
    if program != "ours":
        job = {"setting": setting, "folder": str(folder), "model": args.model_name, "rank": args.rank}
        job |= {"block_size": args.block_size, "batch_size": args.batch_size, "tokens": str(OUT / "tokens.json")}
        return [PYTHON[program], __file__, "--worker", program, json.dumps(job)]
    flags = f"--data_name pydoc --data_config short --pack --mlp_only --basis projected --hessian {setting}"
    flags += f" --rank {args.rank} --block_size {args.block_size} --batch_size {args.batch_size}"
    flags += f" --batch_tokens {args.batch_size * args.block_size} --max_examples {args.examples}"
    flags += f" --shard_examples {args.examples}"  # a long run's shards are large; the default cuts a short one into 8
    return [PYTHON["ours"], "extract_log.py", "--model_name", args.model_name, "--log_dir", str(folder), *flags.split()]


def our_seconds(folder: Path) -> float:
    """Return the time from run.json's last entry (model loaded, projections drawn) to the last file of results."""
    results = [file for part in ("gradients", "hessian") for file in (folder / part).glob("*")]
    return max(file.stat().st_mtime for file in results) - (folder / "run.json").stat().st_mtime


def gradient_norms(program: str, folder: Path, examples: int):
    """Return the norm of each example's stored gradients, [N], and the number of stored values, N * L * k."""
    import numpy as np

    from logra import store

    if program == "ours":
        layers = store.load_tensors(store.shard_files(folder / "gradients", 0)["gradients"]).values()
        rows = np.concatenate([layer.numpy() for layer in layers], axis=1)
    else:
        rows = np.fromfile(folder / ROWS[program], np.float32).reshape(examples, -1)
    return np.linalg.norm(rows, axis=1), rows.size


def measure(program: str, setting: str, args) -> dict:
    """Run one program, delete what it wrote, and return what was measured."""
    import psutil

    folder, cores = OUT / f"{setting}-{program}", os.cpu_count()
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    output, before, start = folder.with_suffix(".txt"), psutil.cpu_times(), time.perf_counter()
    with open(output, "w") as file:
        command = command_line(program, setting, args, folder)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    capacity, after = cores * (time.perf_counter() - start), psutil.cpu_times()
    lines = output.read_text(errors="replace").strip().splitlines()
    if process.returncode:
        raise ValueError(f"expected {program} to extract, got status {process.returncode} ({lines[-1:]}); see {output}")
    if program == "ours":
        content = json.loads((folder / "run.json").read_text())
        result = {"seconds": our_seconds(folder), "versions": content["versions"]}
        write_tokens(folder, args)
    else:
        result = json.loads(lines[-1])
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in PROJECTIONS]
    result["peak_rss"], result["bytes"] = (
        usage.ru_maxrss * 1024,
        sum(file.stat().st_size for file in files),
    )  # Linux: KiB
    idle = sum(getattr(after, kind, 0) - getattr(before, kind, 0) for kind in ("idle", "iowait"))
    result["others"] = max(0.0, 1 - (idle + usage.ru_utime + usage.ru_stime) / capacity)
    result["norms"], result["values"] = gradient_norms(program, folder, args.examples)
    shutil.rmtree(folder)
    return result


def write_tokens(folder: Path, args) -> None:
    """Write the token ids of our run's examples for the peers."""
    import datasets

    rows = list(datasets.load_from_disk(folder / "train")["input_ids"])
    if [len(row) for row in rows] != [args.block_size] * args.examples:
        raise ValueError(f"expected {args.examples} full blocks of text, got {len(rows)}; lower --examples")
    (OUT / "tokens.json").write_text(json.dumps(rows))


def summary(runs: dict[str, list[dict]], args) -> dict[str, dict]:
    """Return each program's medians, and the correlation of its examples' gradient norms with ours."""
    import numpy as np

    ours, results = runs["ours"][0], {}
    for program, measured in runs.items():
        if measured[0]["values"] != ours["values"]:
            raise ValueError(
                f"expected {ours['values']} stored numbers, as ours, got {measured[0]['values']} from {program}, "
                "which tracks other layers; give a --model_name of Llama's architecture"
            )
        middle = {key: median(run[key] for run in measured) for key in ("seconds", "others", "bytes")}
        extra = (
            {"eigh_seconds": median(run["eigh_seconds"] for run in measured)} if "eigh_seconds" in measured[0] else {}
        )
        results[program] = {
            "tokens_per_second": args.examples * args.block_size / middle["seconds"],
            "seconds": [round(run["seconds"], 2) for run in measured],
            "bytes": middle["bytes"],
            "peak_rss": max(run["peak_rss"] for run in measured),
            "others_cpu_share": [round(run["others"], 2) for run in measured],
            "norm_correlation": float(np.corrcoef(ours["norms"], measured[0]["norms"])[0, 1]),
        } | extra
    return results


def main(args) -> None:
    """Run all settings, print a table and a JSON line."""
    missing = [python for python in PYTHON.values() if not Path(python).exists()]
    if missing:
        raise ValueError(f"expected the peers' environments, got no {missing[0]}; run bash benchmarks/peers.sh")
    results, versions = {}, {}
    for setting in args.settings:
        runs: dict[str, list[dict]] = {program: [] for program in SETTINGS[setting]}
        for repeat in range(args.repeats):
            for program, measured in runs.items():
                measured.append(measure(program, setting, args))
                versions[program] = measured[-1]["versions"]
                print(f"{setting} {repeat} {program}: {measured[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        results[setting] = summary(runs, args)
        for program, r in results[setting].items():
            print(
                f"{setting:5s} {program:8s} {r['tokens_per_second']:6.0f} tokens/s {r['bytes'] / 1e6:8.1f} MB stored "
                f"{r['peak_rss'] / 1e9:6.2f} GB peak   norms' correlation with ours {r['norm_correlation']:.3f}"
            )
    print(*(f"{program}: {entries}" for program, entries in versions.items()), sep="\n")
    print("Not equal:", *NOT_EQUAL, sep="\n- ")
    about = {"benchmark": "peers", **vars(args), "processor": platform.processor() or platform.machine()}
    about |= {"cores": os.cpu_count(), "versions": versions, "not_equal": NOT_EQUAL}
    print(json.dumps(about | {"results": results}))


def bergson(job: dict, model_path: str, rows: list[list[int]]) -> dict:
    """Extract with bergson 2: what its commands `build` and `hessian` do, with the model loaded once."""
    import bergson.process_autocorrelation as autocorrelation
    import torch
    from bergson import CollectorComputer, IndexConfig, PreprocessConfig, collect_gradients
    from bergson.data import allocate_batches
    from bergson.hessians.autocorrelation import AutocorrelationCollector
    from bergson.utils.worker_utils import create_processor, setup_model_and_peft
    from datasets import Dataset

    autocorrelation._eigh = lambda matrix, device, dtype: (torch.empty(0), torch.empty(0))  # see NOT_EQUAL

    def config(part: str) -> IndexConfig:
        path, tokens = str(Path(job["folder"]) / part), job["batch_size"] * job["block_size"]
        options = {"precision": "fp32", "projection_dim": job["rank"], "token_batch_size": tokens}
        made = IndexConfig(run_path=path, model=model_path, filter_modules="*self_attn*", **options)
        made.partial_run_path.mkdir(parents=True)
        return made

    cfg = config("gradients")
    model, targets = setup_model_and_peft(cfg)
    data = Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})
    batches = allocate_batches(data["length"][:], cfg.token_batch_size)
    warm_up(model)
    start = time.perf_counter()
    processor = create_processor(model, cfg, targets)
    options = {"batches": batches, "target_modules": targets, "preprocess_cfg": PreprocessConfig()}
    collect_gradients(model, data, processor, cfg, **options)
    cfg.partial_run_path.rename(cfg.run_path)
    if job["setting"] == "raw":
        cfg = config("hessian")
        processor = create_processor(model, cfg, targets)
        collector = AutocorrelationCollector(
            model=model.base_model, data=data, path=str(cfg.partial_run_path), processor=processor,
            target_modules=targets, filter_modules=cfg.filter_modules,
        )  # fmt: skip
        CollectorComputer(model, data, collector=collector, batches=batches, cfg=cfg).run_with_collector_hooks()
        cfg.partial_run_path.rename(cfg.run_path)
    result = {"seconds": time.perf_counter() - start}
    if job["setting"] == "raw":
        matrix, start = next(iter(processor.hessians.values())).double(), time.perf_counter()
        torch.linalg.eigh(matrix)
        result["eigh_seconds"] = time.perf_counter() - start
    return result


def logix(job: dict, model_path: str, rows: list[list[int]]) -> dict:
    """Extract with LogIX 0.1: the loop of its README."""
    import torch
    import yaml
    from logix import LogIX, LogIXScheduler
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    config = Path(job["folder"]) / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump({"root_dir": job["folder"], "lora": {"init": "random", "rank": job["rank"]}}))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    run = LogIX("log", config=str(config))
    run.watch(model, name_filter=["mlp"])
    run.add_lora()
    examples = [(str(number), torch.tensor(row)) for number, row in enumerate(rows)]
    loader = torch.utils.data.DataLoader(examples, batch_size=job["batch_size"])
    warm_up(model)
    start = time.perf_counter()
    for _ in LogIXScheduler(run, lora="none", hessian=job["setting"], save="grad"):
        for ids, tokens in loader:
            mask = torch.ones_like(tokens)
            with run(data_id=ids, mask=mask):
                model.zero_grad()
                logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
                F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
        run.finalize()
    return {"seconds": time.perf_counter() - start}


def warm_up(model) -> None:
    """Run the model on 8 tokens, as ours does before its clock starts when it checks the loss."""
    import torch

    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])


def worker(program: str, description: str) -> None:
    """Run one peer, inside its own environment, and print a JSON line."""
    from importlib.metadata import version

    job = json.loads(description)
    rows = json.loads(Path(job["tokens"]).read_text())
    function, package = {"bergson": (bergson, "bergson"), "logix": (logix, "logix-ai")}[program]
    result = function(job, str(Path(job["model"])), rows)
    names = (package, "torch", "transformers", "numpy")
    print()
    print(json.dumps(result | {"versions": {"python": platform.python_version()} | {n: version(n) for n in names}}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        sys.path.insert(0, str(ROOT))
        from logra import run

        run.guarded(main, build_parser())
