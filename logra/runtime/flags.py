"""The command line: parsers made from the fields of the settings, presets, and errors reported in one line.

It imports neither torch nor transformers, so that `--help` and wrong flags need less than a second.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from logra.runtime.flag_types import number, positive_int, positive_int_auto_or_none
from logra.runtime.progress import begin, printable, say
from logra.runtime.settings import (
    CPU_BATCH_TOKENS,
    DATA_FIELDS,
    HESSIANS,
    RUN_FIELDS,
    DataSettings,
    Execution,
    RerankSettings,
    RunSettings,
    Sampling,
    ScoreSettings,
    SelectionSettings,
)

T = TypeVar("T")
REMEDIES = {
    errno.ENAMETOOLONG: "choose a shorter name", errno.ENOSPC: "free some disk, or choose another folder",
    errno.EACCES: "choose another folder", errno.EROFS: "choose another folder",
}  # fmt: skip
RANK_FLAGS = ("rank", "rank_in", "rank_out", "bytes_per_example")

# --preset -> its flags. A flag that the user gives takes precedence.
PRESETS: dict[str, dict[str, object]] = {
    "best": {
        "lora": "random", "rank": 136, "hessian": "ekfac", "mlp_only": True, "store_dtype": "int1",
        "calibration_examples": 2048,
    },
    "paper": {"lora": "random", "rank": 64, "hessian": "raw", "mlp_only": True, "store_dtype": "float32"},
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and without abbreviated flags."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, args=None, namespace=None):
        """Parse the command line, fill in the flags of a preset, and print them."""
        parsed = super().parse_args(args, namespace)
        begin(getattr(parsed, "quiet", False))
        if preset := PRESETS.get(getattr(parsed, "preset", None)):
            has_rank = any(vars(parsed)[flag] for flag in RANK_FLAGS) or parsed.lora == "none"
            for flag, value in preset.items():
                if vars(parsed)[flag] is None and not (flag == "rank" and has_rank):
                    setattr(parsed, flag, value)
            chosen = {flag: vars(parsed)[flag] for flag in preset if vars(parsed)[flag] is not None}
            words = (f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in chosen.items())
            say(f"--preset {parsed.preset}: {' '.join(words)}")
        for settings in (ScoreSettings, RerankSettings, SelectionSettings, Sampling):
            if all(field.name in vars(parsed) for field in fields(settings)):
                try:
                    read_settings(settings, parsed)
                except ValueError as error:  # flags that contradict each other
                    self.error(str(error))
        return parsed

    def error(self, message: str):
        """Print one line and exit with status 2."""
        if os.environ.get("RANK", "0") == "0":
            print(printable(f"{self.prog}: error: {' '.join(message.split())}"), file=sys.stderr)
        raise SystemExit(2)


def add_settings(group: Any, defaults: Any, optional: bool = False, skip: Collection[str] = ()) -> None:
    """Add a flag for each field of a dataclass of settings.

    Args:
        group: A parser, or a group of one.
        defaults: Settings with the default of each flag (see settings.setting).
        optional: The value of a flag that is not given is None instead of its default.
        skip: Fields that get no flag.
    """
    for field in fields(defaults):
        if field.metadata and field.name not in skip:
            options, default = dict(field.metadata), getattr(defaults, field.name)
            options["help"] += "" if default is None or default is False else f" ({default})"
            group.add_argument(f"--{field.name}", default=None if optional else default, **options)


def read_settings(settings: Callable[..., T], args: argparse.Namespace) -> T:
    """Return the settings of a parsed command line."""
    return settings(**{field.name: getattr(args, field.name) for field in fields(settings)})  # type: ignore[arg-type]


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script."""
    trust = "run code from the model's folder; never taken from run.json, so give it to each command"
    quiet = "print only errors; log.txt in the run's folder has the rest"
    parser.add_argument("--trust_remote_code", action="store_true", help=trust)
    parser.add_argument("--quiet", action="store_true", help=quiet)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of RunSettings, and --preset, --rank, --hessian, --log_dir and --cache_dir."""
    preset = (
        "sets several flags and prints them; a flag that you give overrides it. best: most accurate per stored byte; "
        "paper: the setting of arXiv 2405.13954 (none)"
    )
    checkpoints = (
        "checkpoints of one training, in its order: local folders, a quoted pattern of them, or revisions of "
        "--model_name on the Hub; each becomes a run inside --log_dir, and stage 3 combines their scores (off)"
    )
    hessian = "kind of Hessian; for another one of a finished run, stage 2 needs neither model nor data (raw)"
    group = parser.add_argument_group("the run (a flag that is not given is read from run.json where there is one)")
    add_settings(group, RunSettings(), optional=True, skip=DATA_FIELDS)
    group.add_argument("--preset", choices=list(PRESETS), help=preset)
    group.add_argument("--rank", type=positive_int, help="sets --rank_in and --rank_out where these are not given (64)")
    group.add_argument("--hessian", choices=HESSIANS, help=hessian)
    group.add_argument("--log_dir", help="folder of the run (logs/ and a name made from the flags)")
    group.add_argument("--checkpoints", nargs="+", metavar="CHECKPOINT", help=checkpoints)
    group = parser.add_argument_group("documents (they belong to the run too)")
    add_settings(group, DataSettings(), optional=True)
    group.add_argument("--cache_dir", help="folder of downloaded data sets (the Hub's cache)")
    add_common_flags(parser)


def add_execution_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of Execution, and return their group."""
    group = parser.add_argument_group("execution (these change results by rounding errors only)")
    add_settings(group, Execution())
    return group


def add_stage_2_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only extract_log.py has."""
    group = add_execution_flags(parser)
    group.add_argument(
        "--num_proc", type=positive_int, help="processes that tokenise (1, with the tokenizer's threads)"
    )
    group.add_argument("--overwrite", action="store_true", help="delete the run's folder and start again")
    group.add_argument(
        "--extend", action="store_true", help="add the documents of --data_name to the finished run in --log_dir"
    )
    parser.add_argument_group("re-ranking").add_argument(
        "--rerank_rank", type=positive_int_auto_or_none, metavar="RANK",
        help="also write the statistics that compute_influence.py --rerank would compute at this rank (off)",
    )  # fmt: skip
    group = parser.add_argument_group("before the run (with one of these, extract_log.py does nothing else)")
    group.add_argument("--dry_run", action="store_true", help="print what the run needs: disk and memory")
    group.add_argument(
        "--trial", type=number(float, 1, "1 to 86400 seconds", 86400), nargs="?", const=30, metavar="SECONDS",
        help="like --dry_run, and the hours predicted from so many seconds of extraction (off; 30 without a value)",
    )  # fmt: skip
    group.add_argument(
        "--verify", type=positive_int, nargs="?", const=4, metavar="EXAMPLES",
        help="check a small run of these flags, its stored bits and scores, against autograd (off; 4 without a value)",
    )  # fmt: skip


def add_generation_flags(parser: argparse.ArgumentParser, model: str, prompts: Path, sampling: Sampling) -> None:
    """Add the flags of the generation scripts, with these defaults."""
    group = parser.add_argument_group("model and files")
    group.add_argument("--model_name", default=model, help="local folder, GGUF file or Hub id (%(default)s)")
    add_settings(group, RunSettings(), skip={*RUN_FIELDS} - {"revision", "dtype"})
    group.add_argument(
        "--prompts", type=Path, default=prompts, help="a .txt with a prompt per line, or a .jsonl with id and prompt"
    )
    group.add_argument("--output", type=Path, help="output file (data/generated/<model>/queries.jsonl)")
    add_common_flags(parser)
    add_settings(parser.add_argument_group("sampling"), sampling)


class RunFlags(NamedTuple):
    """The flags that select a run: those of RunSettings that the user gave, and those that locate its folder."""

    user_flags: dict[str, Any]
    hessian: str | None
    log_dir: str | None
    overwrite: bool
    extend: bool
    checkpoints: tuple[str, ...] = ()

    @property
    def documents(self) -> DataSettings:
        """The documents of the flags, with the defaults of a new run."""
        return DataSettings(**{name: value for name, value in self.user_flags.items() if name in DATA_FIELDS})


def read_run_flags(args: argparse.Namespace) -> RunFlags:
    """Return the flags of a parsed command line that select a run."""
    user_flags = {name: getattr(args, name) for name in RUN_FIELDS if getattr(args, name) is not None}
    if args.rank is not None:
        user_flags = {"rank_in": args.rank, "rank_out": args.rank} | user_flags
    overwrite, extend = (getattr(args, name, False) for name in ("overwrite", "extend"))
    return RunFlags(user_flags, args.hessian, args.log_dir, overwrite, extend, tuple(args.checkpoints or ()))


def read_execution(args: argparse.Namespace) -> Execution:
    """Return the settings of execution, with the default batch size of this machine."""
    import torch  # not at the head: see there

    tokens = args.batch_tokens or ("auto" if torch.cuda.is_available() else CPU_BATCH_TOKENS)
    args = argparse.Namespace(**vars(args) | {"batch_tokens": None if tokens == "auto" else tokens})
    return read_settings(Execution, args)


def run_script(
    main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, args: argparse.Namespace | None = None
) -> None:
    """Run main(args). A ValueError or OSError becomes one line on stderr and exit status 2.

    Rank 0 prints its error at once. The launcher ends all ranks when one fails. So a rank that is still alive after
    five seconds failed by itself, and prints its error too.

    Args:
        main: A script's main.
        parser: Its parser.
        args: What it has parsed; None: parse here.
    """
    args = args or parser.parse_args()
    import torch  # not at the head: see there

    from logra.runtime import processes

    try:
        if precision := processes.check_launch():
            say(f"accelerate's mixed precision {precision} is not used; --dtype chooses the numbers of the model")
        main(args)
        processes.finish()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(5)
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        if isinstance(error, OSError) and error.errno in REMEDIES:
            reason = f"expected a file or folder that can be written or read, got {reason}; {REMEDIES[error.errno]}"
        if isinstance(error, torch.OutOfMemoryError):
            reason = (
                f"expected free GPU memory, got too little ({reason}); end other programs on the GPU, or use --fsdp"
            )
        suffix = f" (rank {rank})" if rank != "0" else ""
        print(f"{parser.prog}: error: {reason}{suffix}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
