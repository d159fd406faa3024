"""What several test files share: stages, processes, refusals, gradients, and the commands that documents show."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from logra import experts, projection, store
from logra.hooks import GradientCapture
from logra.models.layers import choose_layers
from logra.run_dir import RunDir
from logra.runtime import files
from logra.stages import open_run
from logra.stages.gradients import Extractor

SCRIPTS = ("generate", "generate_llama3", "extract_log", "compute_influence", "analysis")
COMMANDS = """\
python generate_llama3.py
python generate.py
accelerate launch --num_processes 2 --num_machines 1 --multi_gpu extract_log.py --model_name meta-llama/Meta-Llama-3-8B-Instruct --lora random --hessian raw --mlp_only --data_name openwebtext
python compute_influence.py --model_name meta-llama/Meta-Llama-3-8B-Instruct --lora random --hessian raw --split generated --mlp_only --data_name openwebtext --mode cosine
python analysis.py
"""  # noqa: E501

# ---- the stages, in this process, in the fixture `workspace`
DATA = ("--data_name", "docs.jsonl", "--log_dir", "log")
QUERIES = ("--log_dir", "log", "--split", "queries.jsonl")


def extract(cli, model: Path, *flags) -> RunDir:
    """Run stage 2 into log/, and return the run."""
    status, _, err = cli("extract_log", "--model_name", model, *DATA, *flags)
    assert status == 0, err
    return RunDir.load(Path("log"))


def influence(cli, *flags) -> tuple[np.ndarray, Path]:
    """Run stage 3 on log/; return the scores and their folder."""
    status, out, err = cli("compute_influence", *QUERIES, *flags)
    assert status == 0, err
    folder = Path(next(line for line in out.splitlines() if " in " in line).split(" in ")[1])
    return np.load(folder / "scores.npy"), folder


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Assert status 2 and one line on stderr that holds the words."""
    status, _, err = result
    assert status == 2 and len(err.splitlines()) == 1, err
    assert "error: " in err and all(word in err for word in words), err


# ---- what a run holds
def stored_gradients(log: RunDir) -> dict[str, Tensor]:
    """Return {layer: [N, k]} of all shards."""
    every = range(len(log.shards))
    return {layer: torch.cat(list(log.read(layer, every))) for layer in log.layers}


def hessian_tensors(log: RunDir, kind: str) -> dict[str, Tensor]:
    """Return the content of a Hessian file, checked."""
    path = log.hessian_path(kind)
    checksums = files.read_json(path.with_suffix(".json"), "")["checksums"]
    return store.load_tensors(path, checksums, log.hessian_layout(kind))


def same_run(folder: Path, other: Path) -> None:
    """Assert that two runs hold the same gradients to 1e-5, whole, and the same Hessian."""
    one, two = RunDir.load(folder), RunDir.load(other)
    assert one.fingerprints == two.fingerprints
    assert one.shards == two.shards
    assert not any(one.shard(i).problem() for i in range(len(one.shards)))
    expected = stored_gradients(two)
    for layer, grads in stored_gradients(one).items():
        assert (grads - expected[layer]).norm() < 1e-5 * expected[layer].norm()
    assert one.hessian_problem("ekfac") is None
    sums = hessian_tensors(two, "ekfac")
    for key, tensor in hessian_tensors(one, "ekfac").items():
        assert (tensor - sums[key]).double().norm() <= 1e-4 * sums[key].double().norm()


def close(one: np.ndarray, two: np.ndarray) -> bool:
    """Say whether two matrices of scores agree to 1e-4."""
    return np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(two)


def relative(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|, or |a - b| where |b| is below 1."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1.0)).item()


# ---- gradients without a run
class InMemory:
    """A shard's gradients in memory, as influence.score_shards reads them."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def size(self, name: str) -> int:
        return self.tensors[name].nbytes

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        tensor = self.tensors[name]
        return tensor if buffer is None else buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def close(self) -> None:
        pass


def random_ids(lengths: list[int]) -> list[list[int]]:
    """Return examples of these lengths."""
    return [torch.randint(3, VOCAB, (n,)).tolist() for n in lengths]


def draw_projections(
    model, rank_in: int = 5, rank_out: int = 4, pattern: str | None = None
) -> tuple[projection.Shapes, dict]:
    """Return the shapes of all layers (or of those that match), and random projections."""
    shapes = choose_layers(model, False, pattern)
    sizes = projection.projected_shapes(shapes, rank_in, rank_out)
    return shapes, projection.draw(shapes, sizes, torch.randint(1000, ()).item(), experts.wide_sides(model))


def compute_gradients(model, capture: GradientCapture, ids: list[list[int]], *limits) -> dict[str, Tensor]:
    """Return {layer: [n, k]} of examples; `limits` are batch_tokens and batch_size."""
    return Extractor(model, capture, *limits).gradients(ids).wait()[0]


def poison_model(source: Path, folder: Path, letter: str) -> None:
    """Copy a model with one token's embedding made NaN."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    model.get_input_embeddings().weight.data[tokenizer(letter)["input_ids"][0]] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- processes of their own
def start(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a shell command in a folder, with this interpreter's programs first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PATH": path}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def launch(processes: int, folder: Path, flags: str) -> subprocess.CompletedProcess:
    """Run extract_log.py in a folder, on that many processes."""
    several = f"accelerate launch --num_processes {processes} --num_machines 1 --multi_gpu"
    return start(f"{'python' if processes == 1 else several} {ROOT}/extract_log.py {flags}", folder)


# ---- commands that documents show
def check(command: str) -> str | None:
    """Parse the flags of a command line of ours, and check that its files exist; return the script."""
    words = shlex.split(command, comments=True)
    scripts = [i for i, word in enumerate(words) if re.fullmatch(r"((evaluation|benchmarks)/)?\w+\.py", word)]
    if not scripts:
        return None
    name = words[scripts[0]]
    assert (ROOT / name).exists(), command
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    try:
        module.build_parser().parse_args(words[scripts[0] + 1 :])
    except SystemExit as stop:
        raise AssertionError(f"{command} is refused") from stop
    return name


def shown_commands(path: Path) -> list[str]:
    """Return the command lines in a Markdown file's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] in ("python", "accelerate", "bash")]


def one_model_at_a_time(monkeypatch) -> None:
    """Make it an error to load a model while another checkpoint's is still there."""
    load, models = open_run.load_model, weakref.WeakSet()

    def load_model(*values):
        assert not models, "another checkpoint's model is still there"
        found = load(*values)
        models.add(found[0])
        return found

    monkeypatch.setattr(open_run, "load_model", load_model)
