"""The settings of every stage as frozen dataclasses: documents, run, execution, queries, scores, sampling.

Each field made by `setting` is also a flag of the command line. Its type, choices, help and default (Sampling's are the
scripts') are defined here alone: flags.py makes the parsers from the fields, and run.json stores RunSettings. Settings
are complete before a stage starts.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

from logra.runtime.flag_types import (
    iso_date,
    non_negative,
    number,
    pattern,
    positive,
    positive_int,
    positive_int_auto_or_none,
    positive_int_or_auto,
    seed_int,
    share_or_count,
)

# The choices of flags, which must be known before torch is imported
HESSIANS = ("raw", "kfac", "ekfac", "none")
MODES = ("dot", "cosine", "l2")
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
INTEGER_BITS = {"int8": 8, "int4": 4, "int1": 1, "none": 0}  # as in quantise.py, which may not import this file
ROW_FORMS = ("text", "prompt_response", "messages", "prompt_completion", "preference", "alpaca", "sharegpt")
DEFAULT_MODEL = "models/SmolLM2-135M-Instruct"  # see models.model.load_config
CPU_BATCH_TOKENS = 1024  # larger batches were slower on a CPU


class Damping(NamedTuple):
    """The damping, either relative to the mean eigenvalue or absolute; the other field is None."""

    relative: float | None
    absolute: float | None

    @property
    def label(self) -> str:
        """The damping's part of file and folder names."""
        value = str(self.absolute if self.relative is None else self.relative).removesuffix(".0")
        return f"abs{value}" if self.relative is None else value


def default_damping(kind: str, store_dtype: str) -> float:
    """Return the relative damping that gave the best scores on small models (evaluation/results)."""
    if kind in ("kfac", "ekfac"):
        return 0.2 if store_dtype == "int1" else 0.01
    return 0.1


def setting(default: Any, help: str, type: Callable = str, **options: Any) -> Any:
    """Return a dataclass field that is also a flag. A bool becomes a switch; `options` go to add_argument."""
    options |= {"action": "store_const", "const": True} if isinstance(default, bool) else {"type": type}
    return field(default=default, metadata=options | {"help": help})


@dataclass(frozen=True)
class DataSettings:
    """Which documents. Each extension of a run (--extend) has its own DataSettings."""

    # fmt: off
    data_name: str = setting("pydoc", "training text: openwebtext, wikitext, pydoc, a Hub id, or a local path, which "
        "has priority")
    data_config: str | None = setting(None, "configuration of the data set; pydoc has all and short (the set's "
        "default)")
    data_split: str = setting("train", "split of the data set")
    text_column: str = setting("text", "column that holds the text")
    max_examples: int | None = setting(None, "use at most this many examples (all)", positive_int)
    max_tokens: int = setting(10**9, "use at most this many tokens", positive_int)
    shuffle_seed: int | None = setting(None, "take the documents in a random order, with this seed (the data's order)",
        seed_int)
    skip_bad_rows: bool = setting(False, "drop and count rows without text, instead of stopping")
    streaming: bool = setting(False, "read a data set from its beginning, only as far as --max_tokens and "
        "--max_examples need it, without a copy (openwebtext: on for less than a tenth of it)")
    row_form: str | None = setting(None, "how rows hold texts, prompts and answers, or chats (found by their columns)",
        choices=ROW_FORMS)
    keep_columns: Sequence[str] | None = setting(None, "further columns to keep beside the text, for stage 4: url, "
        "source ... (none)", nargs="+", metavar="COLUMN")
    # fmt: on


DATA_FIELDS = tuple(f.name for f in fields(DataSettings))


@dataclass(frozen=True)
class RunSettings(DataSettings):
    """What defines a run: two commands with the same RunSettings make the same run.

    A flag that the user leaves out takes its value from run.json, or else its default. A flag that the user gives must
    equal run.json's. `basis`, `block_size` and `dtype` are None until from_user_flags and `completed` fill them in.
    """

    # fmt: off
    model_name: str = setting(DEFAULT_MODEL, "local folder or Hub id of a causal language model with nn.Linear or "
        "Conv1D layers, or the folder of an adapter (peft)")
    revision: str | None = setting(None, "commit, tag or branch of the model on the Hub (the newest)")
    block_size: int = setting(None, "at most this many tokens per example (512, or the model's context)", positive_int)
    pack: bool = setting(False, "join documents into full blocks")
    train_loss: str = setting("all", "tokens that count in the loss; response needs prompt and response, or messages",
        choices=["all", "response"])
    lora: str = setting("random", "projection of the gradients", choices=["random", "pca", "none"])
    rank_in: int | None = setting(64, "projected size of a layer's inputs", positive_int)
    rank_out: int | None = setting(64, "projected size of a layer's output gradients", positive_int)
    bytes_per_example: int | None = setting(None, "instead of a rank: the highest rank whose stored gradients take at "
        "most this many bytes per example, all layers together (off)", positive_int)
    basis: str = setting(None, "eigen: store gradients in the Hessian's eigenbasis (eigen for --hessian kfac, ekfac "
        "and --store_dtype int8, int4, int1, none; else projected)", choices=["projected", "eigen"])
    calibration_examples: int | None = setting(None, "examples that the eigenbasis is computed from (a quarter of "
        "all, 64 to 2048)", positive_int)
    mlp_only: bool = setting(False, "track only the MLP layers, experts included")
    layers: str | None = setting(None, "track only layers whose name matches this regular expression (all but "
        "embedding and head)", pattern, metavar="PATTERN")
    shard_examples: int | None = setting(None, "examples per shard (file of gradients); a crash loses at most "
        "the shards in progress (chosen from their size)", positive_int)
    dtype: str = setting(None, "dtype of the model (float32; bfloat16 on a GPU)", choices=FLOAT_DTYPES)
    quantize: str | None = setting(None, "load the weights in 8 or 4 bits; needs bitsandbytes and a GPU (off)",
        choices=["8bit", "4bit"])
    store_dtype: str = setting("float32", "dtype of the stored gradients; int1 stores signs; none stores none, and "
        "stage 3 runs the model again", choices=[*FLOAT_DTYPES, *INTEGER_BITS])
    seed: int = setting(0, "seed of the projections and the calibration sample", seed_int)
    chat_date: str = setting("2024-07-26", "the date for chat templates that ask for today's", iso_date)
    # fmt: on

    @classmethod
    def from_user_flags(cls, user_flags: Mapping[str, Any], hessian: str) -> Self:
        """Return the settings of a new run. block_size and dtype may still be None (see `completed`).

        Args:
            user_flags: Name -> value of the flags that the user gave.
            hessian: The Hessian that the run starts with, which decides the default basis.

        Raises:
            ValueError: The flags contradict each other.
        """
        settings = cls(**user_flags)
        eigen = settings.bits is not None or hessian in ("kfac", "ekfac")
        basis = settings.basis or ("eigen" if eigen else "projected")
        if settings.bits and basis != "eigen":
            raise ValueError(
                f"expected --basis eigen with --store_dtype {settings.store_dtype}, got projected, where a few large "
                "coordinates make the others round to zero; leave --basis out"
            )
        if settings.pack and settings.keep_columns:
            raise ValueError("expected --keep_columns without --pack, whose blocks hold many rows; leave one out")
        if settings.lora == "none" and settings.bytes_per_example:
            raise ValueError("expected --bytes_per_example with a projection, got --lora none; leave one out")
        if settings.lora != "none" and not settings.bytes_per_example:
            return replace(settings, basis=basis)
        if "rank_in" in user_flags or "rank_out" in user_flags:
            reason = "--lora none, which does not project"
            if settings.bytes_per_example:
                reason = "--bytes_per_example, which chooses the rank"
            raise ValueError(f"expected no rank with {reason}, got one; leave --rank out")
        return replace(settings, basis=basis, rank_in=None, rank_out=None)

    def completed(self, context: int | None, default_dtype: str) -> Self:
        """Fill in block_size and dtype.

        Args:
            context: The model's context in tokens, None if unlimited. block_size is 512, or the context if smaller.
            default_dtype: The device's dtype.

        Raises:
            ValueError: block_size is above the context.
        """
        longest = context or 10**12
        if self.block_size is not None and self.block_size > longest:
            raise ValueError(
                f"expected --block_size of at most {longest}, the model's context, got {self.block_size}; lower it"
            )
        return replace(self, block_size=self.block_size or min(512, longest), dtype=self.dtype or default_dtype)

    def squares_only(self, first_hessian: str) -> bool:
        """Return whether a run that starts with this Hessian stores no factors A and B.

        At full width, A and B take most of a shard's bytes, and ekfac in its eigenbasis does not need them.
        """
        return self.lora == "none" and self.basis == "eigen" and first_hessian == "ekfac"

    def check_hessian(self, kind: str, first_hessian: str) -> None:
        """Check that a Hessian can be computed from what a run stores.

        Args:
            kind: raw, kfac, ekfac or none.
            first_hessian: The kind that the run started with.

        Raises:
            ValueError: It can't.
        """
        if kind == "raw" and self.store_dtype in INTEGER_BITS:
            raise ValueError(
                f"expected --hessian ekfac, kfac or none with --store_dtype {self.store_dtype}, got raw, which needs "
                "exact gradients; use --hessian ekfac, or --store_dtype float32"
            )
        if kind == "ekfac" and self.store_dtype == "none" and self.basis != "eigen":
            raise ValueError(
                "expected --basis eigen with --store_dtype none and ekfac, got projected; leave --basis out"
            )
        if kind == "kfac" and self.squares_only(first_hessian):
            raise ValueError(
                "expected --hessian ekfac, got kfac, whose factors this run does not store; extract with --hessian kfac"
            )

    @property
    def bits(self) -> int | None:
        """Bits per stored coordinate of an integer store type, 0 for `none`, None for a floating-point type."""
        return INTEGER_BITS.get(self.store_dtype)

    @property
    def data(self) -> DataSettings:
        """The settings of the documents."""
        return DataSettings(**{name: getattr(self, name) for name in DATA_FIELDS})

    def with_data(self, data: DataSettings) -> Self:
        """Return the settings with other documents."""
        return replace(self, **asdict(data))


RUN_FIELDS = tuple(f.name for f in fields(RunSettings))


def is_setting(field: Field, value: Any) -> bool:
    """Return whether run.json may hold this value for a field of RunSettings: one that the flag accepts.

    The field's type says whether it may be null. The default may be None where the type is not: run.json is complete.
    """
    options = field.metadata
    if "nargs" in options:
        return value is None or (isinstance(value, list) and all(type(part) is options["type"] for part in value))
    if value is None or "action" in options:
        return isinstance(value, field.type)  # type: ignore[arg-type]
    with suppress(argparse.ArgumentTypeError, ValueError):
        return value in options.get("choices", [value]) and options["type"](str(value)) == value
    return False


@dataclass(frozen=True)
class Execution:
    """How the model is executed. These settings change results by rounding errors only.

    With `batch_tokens` None, Extractor.find_batch_tokens tries which batch fits.
    """

    # fmt: off
    batch_tokens: int | None = setting(None, "tokens per batch, with padding; auto: find the fastest size that fits "
        "(1024; auto on a GPU)", positive_int_or_auto)
    batch_size: int | None = setting(None, "at most this many examples in a batch (no limit)", positive_int)
    gradient_checkpointing: bool = setting(False, "keep only each transformer block's input, run the block twice: "
        "less memory, 1.4 times the time (computed)")
    fsdp: bool = setting(False, "shard the model over the processes (FSDP2)")
    device_map: str | None = setting(None, "auto: spread the model over GPUs, main memory and disk (off)",
        choices=["auto"])
    # fmt: on
    trust_remote_code: bool = False  # never read from run.json: each command that loads the model needs it


@dataclass(frozen=True)
class QuerySettings:
    """Which queries to score, and which of their tokens count in the loss."""

    # fmt: off
    split: str = setting("generated", "queries: generated (stage 1's file), train, validation, test, a file, or the "
        "split of a data set (name:split)")
    query_loss: str = setting("response", "tokens of a query that count in the loss", choices=["response", "all"])
    max_queries: int | None = setting(None, "use at most this many queries (all)", positive_int)
    group_by: str | None = setting(None, "queries with the same value in this column are one query: their mean "
        "gradient (off)", metavar="COLUMN")
    truncate_queries: bool = setting(False, "of a query that is longer than the model's context, use the last tokens")
    # fmt: on


@dataclass(frozen=True)
class ScoreSettings:
    """Which scores to compute."""

    # fmt: off
    mode: str = setting("dot", "dot: the influence; cosine: dot divided by the root of the example's self-influence; "
        "l2: dot minus half of it", choices=MODES)
    damping: Sequence[float] | None = setting(None, "lambda, in units of the layer's mean eigenvalue; several "
        "are scored in one pass (0.1 for raw, 0.2 for int1, else 0.01)", positive, nargs="+")
    damping_absolute: Sequence[float] | None = setting(None, "lambda itself, instead of --damping (off)", positive,
        nargs="+")
    score_layers: str | None = setting(None, "use only layers whose name matches this regular expression (all)",
        pattern, metavar="PATTERN")
    layerwise: bool = setting(False, "also write the dot scores of each transformer block")
    self_influence: bool = setting(False, "also write each example's self-influence, self_influence.npy")
    top_k_only: int | None = setting(None, "keep only the K highest and K lowest scores of each query, no scores.npy "
        "(off)", positive_int, metavar="K")
    checkpoint_weights: Sequence[float] | None = setting(None, "with checkpoints: the weight of each in the combined "
        "scores, such as its learning rate (equal weights)", positive, nargs="+", metavar="W")
    query_rank: int | None = setting(None, "with --store_dtype none: keep R singular values of each query in each "
        "layer, so that more queries fit in memory (all)", positive_int, metavar="R")
    # fmt: on

    def __post_init__(self) -> None:
        if self.damping and self.damping_absolute:
            raise ValueError("expected --damping or --damping_absolute, got both; leave one out")
        if self.layerwise and self.top_k_only:
            raise ValueError("expected --layerwise without --top_k_only, which keeps no matrix; leave one out")

    def dampings(self, hessian: str, store_dtype: str) -> list[Damping]:
        """Return the dampings of the flags, or the default for this Hessian and store type."""
        if self.damping_absolute:
            return [Damping(None, value) for value in dict.fromkeys(self.damping_absolute)]
        relative = self.damping or [default_damping(hessian, store_dtype)]
        return [Damping(value, None) for value in dict.fromkeys(relative)]


@dataclass(frozen=True)
class RerankSettings:
    """Which scores to compute again without compression, and how."""

    # fmt: off
    rerank: int | None = setting(None, "compute the K highest and K lowest scores of each query again, without "
        "compression, and rank by these (off)", positive_int, metavar="K")
    rerank_rank: int | str = setting("auto", "projected size of the gradients that re-rank: none does not project; auto"
        " is none if their statistics take at most 4 GB, else the highest power of two that does",
        positive_int_auto_or_none)
    rerank_by: str = setting("example", "what K counts: examples, or documents with all their examples",
        choices=["example", "document"])
    rerank_damping: float = setting(0.01, "lambda of these scores, in units of the layer's mean eigenvalue", positive)
    rerank_checkpoints: Sequence[str] | None = setting(None, "average these scores over checkpoints: local folders, a "
        "quoted pattern of them, or revisions on the Hub; their gradients are not stored (the run's own model, or its "
        "checkpoints)", nargs="+", metavar="CHECKPOINT")
    # fmt: on

    def __post_init__(self) -> None:
        changed = [f.name for f in fields(self) if f.name != "rerank" and getattr(self, f.name) != f.default]
        if self.rerank is None and changed:
            raise ValueError(f"expected --rerank with --{changed[0]}, got none; add --rerank 50, say")


@dataclass(frozen=True)
class SelectionSettings:
    """Which documents to select for all queries together."""

    # fmt: off
    select: float | int | None = setting(None, "write selected.jsonl: the rows of the documents with the highest "
        "scores over all queries, a share of them below 1, or a number of them (off)", share_or_count,
        metavar="HOW_MANY")
    drop: bool = setting(False, "with --select: write the other rows, those that remain without these documents")
    aggregate: str = setting("mean", "with --select: over the queries, the mean or the maximum of a document's "
        "z-scores, or the mean of its ranks", choices=["mean", "max", "rank"])
    per: str | None = setting(None, "with --select: the same share of the documents with each value of this kept "
        "column (off)", metavar="COLUMN")
    # fmt: on

    def __post_init__(self) -> None:
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.select is None and changed:
            raise ValueError(f"expected --select with --{changed[0]}, got none; add --select 0.05, say")


@dataclass(frozen=True)
class Sampling:
    """How stage 1 samples responses."""

    max_new_tokens: int = setting(128, "at most this many tokens per response", positive_int)
    temperature: float = setting(0.8, "sampling temperature; 0 is greedy", non_negative)
    top_p: float = setting(0.95, "sample from the most likely tokens that together have this probability", non_negative)
    num_return_sequences: int = setting(1, "responses per prompt", number(int, 1, "an integer from 1 to 1000", 1000))
    seed: int = setting(0, "seed of the sampling", seed_int)
    batch_size: int = setting(8, "prompts in a batch", positive_int)

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"expected --top_p above 0 and at most 1, got {self.top_p}")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"expected --temperature 0 (greedy) or at least 0.001, got {self.temperature}; give 0")
        if self.temperature == 0 and self.num_return_sequences > 1:
            raise ValueError(
                "expected --num_return_sequences 1 with --temperature 0, which has one response, got "
                f"{self.num_return_sequences}; raise --temperature"
            )
