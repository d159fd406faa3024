"""What the scripts share: flags, processes, one-line errors. The only user of accelerate."""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import xxhash
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor

from logra import processes
from logra.disk import short_name
from logra.hessian import KINDS
from logra.progress import begin, printable, say
from logra.quantise import BITS
from logra.store import DTYPES

DEFAULT_MODEL = "models/SmolLM2-135M-Instruct"  # see model.load_config


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated flags."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, args=None, namespace=None):
        """Parse; a preset's flags that are not given take its values, and are printed."""
        found = super().parse_args(args, namespace)
        begin(getattr(found, "quiet", False))
        if preset := PRESETS.get(getattr(found, "preset", None)):
            ranks = ("rank", "rank_in", "rank_out", "bytes_per_example")
            sized = any(vars(found)[flag] for flag in ranks) or found.lora == "none"
            for flag, value in preset.items():
                if vars(found)[flag] is None and not (flag == "rank" and sized):
                    setattr(found, flag, value)
            shown = [(f"--{flag}", vars(found)[flag]) for flag in preset if vars(found)[flag] is not None]
            say(f"--preset {found.preset}: " + " ".join(f if v is True else f"{f} {v}" for f, v in shown))
        return found

    def error(self, message: str):
        """Print one line and exit with status 2."""
        if os.environ.get("RANK", "0") == "0":
            print(printable(f"{self.prog}: error: {' '.join(message.split())}"), file=sys.stderr)
        raise SystemExit(2)


def number(kind: type, low: float, what: str, high: float = math.inf) -> Callable[[str], Any]:
    """Return an argparse type: a finite int or float of at least `low` and at most `high`."""

    def parse(text: str):
        try:
            value = kind(float(text)) if kind is int and re.fullmatch(r"\d+(\.0*)?e\d+", text) else kind(text)
            good = math.isfinite(value) and low <= value <= high
        except (ValueError, OverflowError):
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


positive_int = number(int, 1, "a whole number of at least 1")
seed_int = number(int, 0, "a whole number of at least 0")
non_negative = number(float, 0, "a number of at least 0")
positive = number(float, sys.float_info.min, "a positive, finite number")


def pattern(text: str) -> str:
    """Return an argparse value that is a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r} ({error})") from error
    return text


# The flags that describe a run: name -> (default, argparse options). They stand in run.json; one that is not given is
# read from there, one that is given must be equal to it.
RUN_FLAGS: dict[str, tuple[object, dict]] = {
    "model_name": (DEFAULT_MODEL, {"help": "local folder or Hub id of a causal language model"}),
    "revision": (None, {"help": "commit, tag or branch of the model on the Hub (the newest)"}),
    "data_name": ("pydoc", {"help": "openwebtext, wikitext, pydoc, a Hub id, or a local file or folder"}),
    "data_config": (None, {"help": "the data set's configuration"}),
    "data_split": ("train", {"help": "the data set's split"}),
    "text_column": ("text", {"help": "the column that holds the text"}),
    "block_size": (None, {"type": positive_int, "help": "tokens in an example at most (512, or the model's context)"}),
    "pack": (False, {"action": "store_const", "const": True, "help": "join documents into full blocks"}),
    "max_examples": (None, {"type": positive_int, "help": "examples at most"}),
    "max_tokens": (10**9, {"type": positive_int, "help": "tokens at most"}),
    "shuffle_seed": (None, {"type": seed_int, "help": "take a random sample of documents instead of the first ones"}),
    "skip_bad_rows": (
        False,
        {"action": "store_const", "const": True, "help": "drop rows without text, and count them"},
    ),
    "train_loss": (
        "all",
        {"choices": ["all", "response"], "help": "tokens that count; response needs prompt and response, or messages"},
    ),
    "lora": ("random", {"choices": ["random", "pca", "none"], "help": "projection of the gradients"}),
    "rank_in": (64, {"type": positive_int, "help": "projected size of a layer's inputs"}),
    "rank_out": (64, {"type": positive_int, "help": "projected size of a layer's output gradients"}),
    "bytes_per_example": (
        None,
        {"type": positive_int, "help": "the highest rank whose stored gradients, all layers together, take no more"},
    ),
    "basis": (
        None,
        {"choices": ["projected", "eigen"], "help": "eigen (kfac, ekfac, few bits): rotate to the eigenvectors"},
    ),
    "calibration_examples": (
        None,
        {"type": positive_int, "help": "that the eigenvectors are of (a quarter of all, 64 to 2048)"},
    ),
    "mlp_only": (False, {"action": "store_const", "const": True, "help": "track the MLP's layers only"}),
    "layers": (
        None,
        {"type": pattern, "metavar": "PATTERN", "help": "track layers whose name this expression matches"},
    ),
    "shard_examples": (None, {"type": positive_int, "help": "examples in a shard (chosen from their size)"}),
    "dtype": (None, {"choices": list(DTYPES), "help": "of the model: float32 on a CPU, bfloat16 on a GPU"}),
    "quantize": (None, {"choices": ["8bit", "4bit"], "help": "load the model's weights so (bitsandbytes, a GPU)"}),
    "store_dtype": (
        "float32",
        {
            "choices": [*DTYPES, *BITS],
            "help": "of the stored gradients; int1 keeps signs; none stores none, and stage 3 runs the model on the "
            "train examples again",
        },
    ),
    "seed": (0, {"type": seed_int, "help": "of the projections and the calibration sample"}),
}


# --preset: flags that it stands for; those that are given as well go before it
PRESETS: dict[str, dict[str, object]] = {
    "best": {
        "lora": "random",
        "rank": 136,
        "hessian": "ekfac",
        "mlp_only": True,
        "store_dtype": "int1",
        "calibration_examples": 2048,
    },
    "paper": {"lora": "random", "rank": 64, "hessian": "raw", "mlp_only": True, "store_dtype": "float32"},
}

DATA_FLAGS = (  # which documents; an extension has others
    "data_name", "data_config", "data_split", "text_column",
    "max_examples", "max_tokens", "shuffle_seed", "skip_bad_rows",
)  # fmt: skip


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every script takes. Trust is never read from a file: each command that loads the model needs it."""
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model's folder holds")
    parser.add_argument("--quiet", action="store_true", help="print errors only; log.txt in the run's folder has all")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe a run, and --hessian, --log_dir and --cache_dir."""
    group = parser.add_argument_group("the run (what is not given is read from run.json where there is one)")
    for name, (default, options) in RUN_FLAGS.items():
        shown = "" if default in (None, False) else f" ({default})"
        group.add_argument(f"--{name}", default=None, **{**options, "help": options["help"] + shown})
    group.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="best: most truth per byte; paper: arXiv 2405.13954's (prints its flags)",
    )
    group.add_argument("--rank", type=positive_int, help="--rank_in and --rank_out, where these are not given")
    group.add_argument("--hessian", choices=KINDS, help="Hessian of the run (raw)")
    group.add_argument("--log_dir", help="the run's folder (logs/ and a name made from the flags above)")
    group.add_argument("--cache_dir", help="where downloaded data sets are kept")
    add_common(parser)


def batch_tokens(text: str) -> int | str:
    """Return an argparse value that is a positive whole number or `auto`."""
    return text if text == "auto" else positive_int(text)


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that say how the model runs, in stages 2 and 3, and return their group."""
    group = parser.add_argument_group("execution (results depend on these by rounding only)")
    group.add_argument(
        "--batch_tokens", type=batch_tokens, help="tokens in a batch, with padding; auto: what fits (1024; GPU: auto)"
    )
    group.add_argument("--batch_size", type=positive_int, help="examples in a batch at most (no limit)")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third slower")
    group.add_argument("--fsdp", action="store_true", help="shard the model over the processes (FSDP2)")
    group.add_argument("--device_map", choices=["auto"], help="spread the model over GPUs, main memory and disk")
    return group


def given_settings(args: argparse.Namespace) -> dict:
    """Return the run settings that were given on the command line."""
    given = {name: getattr(args, name) for name in RUN_FLAGS if getattr(args, name) is not None}
    for side in ("rank_in", "rank_out"):
        if args.rank is not None:
            given.setdefault(side, args.rank)
    return given


def with_defaults(given: dict, hessian: str) -> dict:
    """Fill in the settings that were not given; those that depend on model or device stay None."""
    settings = {name: default for name, (default, _) in RUN_FLAGS.items()} | given
    few = settings["store_dtype"] in BITS
    settings["basis"] = settings["basis"] or ("eigen" if few or hessian in ("kfac", "ekfac") else "projected")
    if few and settings["store_dtype"] != "none" and settings["basis"] != "eigen":
        raise ValueError(
            f"expected --basis eigen with --store_dtype {settings['store_dtype']}, got projected: in few bits, a few "
            "large directions drown the rest there; leave --basis out"
        )
    free = {"none": "--lora none, which projects nothing"}.get(settings["lora"])
    free = free or ("--bytes_per_example, which chooses it" if settings["bytes_per_example"] else None)
    if free:
        if "rank_in" in given or "rank_out" in given:
            raise ValueError(f"expected no rank with {free}; leave --rank out")
        settings["rank_in"] = settings["rank_out"] = None
    if settings["lora"] == "none" and settings["bytes_per_example"]:
        raise ValueError("expected --bytes_per_example with a projection, got --lora none; leave one out")
    return settings


def processes_here() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def run_name(settings: dict) -> str:
    """Return the folder name of a run: model, data, projection and layers."""
    rank = "" if settings["lora"] == "none" else f"{settings['rank_out']}x{settings['rank_in']}"
    rank = f"{settings['bytes_per_example']}B" if settings["bytes_per_example"] else rank
    parts = [short_name(settings["model_name"]), short_name(settings["data_name"])]
    parts += [short_name(settings["data_config"])] if settings["data_config"] else []
    parts += [settings["lora"] + rank] + (["eigen"] if settings["basis"] == "eigen" else [])
    parts += ["mlp" if settings["mlp_only"] else "all"]
    parts += [settings["store_dtype"]] if settings["store_dtype"] in BITS else []
    parts += [f"layers-{xxhash.xxh32_hexdigest(settings['layers'].encode())}"] if settings["layers"] else []
    return "_".join(parts)


def start_processes() -> Accelerator:
    """Connect the processes that accelerate launched; on a machine without a GPU they are CPU processes over gloo.

    The long time-out is for the others while rank 0 tokenises.
    """
    local, gpus = processes_here(), torch.cuda.device_count()
    if 0 < gpus < local:
        raise ValueError(
            f"expected at most {gpus} processes on this machine, one a GPU, got {local}; lower --num_processes"
        )
    wait = InitProcessGroupKwargs(timeout=timedelta(days=7))
    if "RANK" in os.environ:
        processes.end_with_parent()
        processes.name_interface()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[wait])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise ValueError(
            f"expected {world} processes (WORLD_SIZE), got {accelerator.num_processes}; use accelerate launch"
        )
    return accelerator


def share(count: int, accelerator: Accelerator) -> range:
    """Return which of `count` things, shards for instance, are this rank's."""
    return range(accelerator.process_index, count, accelerator.num_processes)


def gather_list(mine: list, accelerator: Accelerator) -> list:
    """Return the items of all ranks, on every rank."""
    return gather_object(mine) if accelerator.num_processes > 1 else mine


def sum_over_ranks(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the sum of every rank's tensor, on the CPU of every rank."""
    if accelerator.num_processes == 1:
        return tensor.cpu()
    return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()


def guarded(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Run main(args); turn ValueError and OSError into one line on stderr and exit status 2.

    Rank 0 speaks for all. Another rank that is still alive after a while (the launcher ends all when one fails) met
    an error of its own, and says so itself.
    """
    args = parser.parse_args()
    try:
        main(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(5)
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            reason = f"expected room for a batch on the GPU, got none ({reason}); lower --batch_tokens or --batch_size"
        print(
            f"{parser.prog}: error: {reason}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr, flush=True
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
