"""Compute the projected gradients of examples, in batches that fit in memory.

Notation: n examples, B examples of a batch, k = r_in * r_out of a layer. `counted` marks the tokens that count in an
example's loss.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from logra.hooks import GradientCapture, GradientPositions
from logra.loss import IGNORE, example_losses, input_device
from logra.models.model import check_token_ids, rope_boundaries
from logra.projection import identity
from logra.quantise import ScoreErrorEstimate, stored_tensors
from logra.run_dir import RunDir
from logra.runtime.fsdp import Lockstep
from logra.runtime.memory import TooLittleMemoryError, release_memory, wait_for_devices
from logra.runtime.progress import say
from logra.runtime.settings import Execution
from logra.stages.batches import length_batches, make_batch

ROUNDING_SAMPLE = 16  # examples of a shard whose scores are compared before and after rounding
MIN_SPEEDUP = 1.03  # a larger batch must be this much faster to be chosen
Counted = list[list[bool]] | None
TakeGradients = Callable[[dict[str, Tensor]], object]
HostCopies = Callable[[], dict[str, Tensor]]  # waits for copies on the CPU, and returns them


def run_batch(
    model: nn.Module, capture: GradientCapture, token_ids: list[list[int]], counted: Counted = None
) -> dict[str, Tensor]:
    """Return the gradients of some examples' losses, {layer: [B, k]}."""
    batch = make_batch(token_ids, counted, input_device(model))
    return capture.backward(example_losses(model, batch.input_ids, batch.targets, batch.rows), batch.positions)


def check_layers(model: nn.Module, layers: Iterable[str]) -> None:
    """Run two short texts before the long step, and refuse layers that would give wrong gradients.

    Only the start of the first text counts in the loss. So no other position may have a gradient.

    Raises:
        ValueError: Another position has one; or as GradientCapture.backward.
    """
    ids = torch.arange(16, device=input_device(model)).view(2, 8) % len(model.get_input_embeddings().weight)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[0, :4] = True
    targets = ids.roll(-1, 1).masked_fill(~counts, IGNORE)
    with GradientPositions(model, identity(layers)) as capture:
        sizes = capture.backward(example_losses(model, ids, targets), counts)
    for layer, size in sizes.items():
        if (size > 1e-3 * size.amax())[~counts.to(size.device)].any():
            raise ValueError(
                f"expected gradients in the text that counts, before its last token that counts, got others in layer "
                f"{layer}: it looks at later tokens, mixes texts, or takes [tokens, texts, width]; leave it out with "
                "--layers, or use another model"
            )


class HostGradients:
    """The gradients of n examples while they are copied to the CPU, and their factor sums.

    From a GPU the copies run in a stream of their own, into pinned memory, while the next batch is computed.

    Args:
        examples: n.
        streams: Of the copies.
        store_dtype: Of the result; see quantise.stored_tensors.
        first_id: Id of the first example, for error messages.
        score_error: Takes the first examples before they are rounded.
    """

    def __init__(
        self, examples: int, streams: "CopyStreams", store_dtype: str, first_id: int,
        score_error: ScoreErrorEstimate | None,
    ):  # fmt: skip
        self.examples, self.streams = examples, streams
        self.store_dtype, self.first_id, self.score_error = store_dtype, first_id, score_error
        self.grads: dict[str, Tensor] = {}
        self.factors: HostCopies = dict  # of the factor sums, the last to be copied
        self.rows: list[int] = []  # row of each copied gradient

    def copy(self, grads: dict[str, Tensor]) -> None:
        """Start to copy the next B examples' gradients, {layer: [B, k]}. They count once their rows are in `rows`."""
        begin = len(self.rows)
        if self.score_error and begin == 0:
            self.score_error.reset()  # after an attempt for which memory ran out
        for layer, grad in grads.items():
            with self.streams.use(grad):
                if self.score_error and begin == 0:
                    self.score_error.add(layer, grad[:ROUNDING_SAMPLE])
                for name, tensor in stored_tensors(layer, grad, self.store_dtype).items():
                    if name not in self.grads:
                        self.grads[name] = host_buffer((self.examples, *tensor.shape[1:]), tensor)
                    self.grads[name][begin : begin + len(tensor)].copy_(tensor, non_blocking=True)

    def wait(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the gradients {layer: [n, k]}, in the order of the examples, and the factor sums, on the CPU.

        Raises:
            ValueError: A gradient is NaN or infinite.
        """
        factors = self.factors()  # waits for the gradients too
        order = torch.from_numpy(np.argsort(self.rows))
        result = {}
        for name in list(self.grads):
            result[name] = grad = self.grads.pop(name)[order]
            if not grad.is_floating_point():
                continue  # whole numbers; their scale shows NaN
            bad = (~grad.view(len(grad), -1).sum(dim=1, dtype=torch.float32).isfinite()).nonzero()
            if len(bad):
                raise ValueError(
                    f"expected finite gradients, got NaN or infinity in example {self.first_id + int(bad[0])} (layer "
                    f"{name.removesuffix('.scale')}); use --dtype float32 and --store_dtype float32, or leave the "
                    "example out"
                )
        return result, factors


class CopyStreams:
    """A stream for copies to the CPU on each GPU of a model, used for the whole run."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def use(self, tensor: Tensor) -> Iterator[None]:
        """Run the block in the stream of the tensor's GPU, after the work that is queued there."""
        device = tensor.device
        if device.type != "cuda":
            yield
            return
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        stream = self.streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            tensor.record_stream(stream)

    def to_host(self, tensors: dict[str, Tensor]) -> HostCopies:
        """Start to copy tensors. Return a function that waits for all copies so far, and returns these."""
        copies = dict(tensors)
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                with self.use(tensor):
                    copies[name] = host_buffer(tensor.shape, tensor).copy_(tensor, non_blocking=True)
        events = [stream.record_event() for stream in self.streams.values()]

        def wait() -> dict[str, Tensor]:
            for event in events:
                event.synchronize()
            return copies

        return wait


def host_buffer(shape: Sequence[int], source: Tensor) -> Tensor:
    """Return an empty CPU tensor of the source's type; for a source on a GPU it is pinned."""
    return torch.empty(shape, dtype=source.dtype, pin_memory=source.is_cuda)


class Extractor:
    """Runs examples through a model. A batch for which memory runs out is split in halves.

    If the model is sharded over the ranks (runtime.fsdp.shard), every rank calls the same methods.

    Args:
        model: A model of transformers.
        capture: A capture of the model, inside its `with` block.
        batch_tokens: Tokens in a batch at most, padding included. A longer example is a batch of its own.
        batch_size: Examples in a batch at most.
    """

    def __init__(self, model: nn.Module, capture: GradientCapture, batch_tokens: int, batch_size: int | None = None):
        self.model, self.capture = model, capture
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        self.streams = CopyStreams()
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.boundaries = rope_boundaries(model.config)
        self.lockstep = Lockstep(model, self._run_empty_batch)

    def gradients(
        self,
        token_ids: list[list[int]],
        counted: Counted = None,
        first_id: int = 0,
        store_dtype: str = "float32",
        on_batch: Callable[[int], object] = lambda tokens: None,
        score_error: ScoreErrorEstimate | None = None,
    ) -> HostGradients:
        """Compute the gradients of n examples, in batches of similar length; see HostGradients.wait.

        Args:
            token_ids, counted: Of each example. Without `counted`, all tokens count.
            first_id, store_dtype, score_error: See HostGradients.
            on_batch: Called with the number of tokens after each batch.

        Raises:
            ValueError: A token id is not in the model's vocabulary, or memory runs out for a single example.
        """
        self.check_vocabulary(token_ids, range(first_id, first_id + len(token_ids)))
        result = HostGradients(len(token_ids), self.streams, store_dtype, first_id, score_error)
        for batch in self.batches([len(ids) for ids in token_ids]):
            for rows in self.run(token_ids, counted, batch, result.copy):
                result.rows += rows
            on_batch(sum(len(token_ids[i]) for i in batch))
        result.factors = self.streams.to_host(self.capture.take_factors())
        return result

    def batches(self, lengths: list[int] | np.ndarray) -> list[list[int]]:
        """Group examples of these lengths into batches; see stages.batches.length_batches."""
        return length_batches(lengths, self.batch_tokens, self.batch_size, self.boundaries)

    def run(
        self, token_ids: list[list[int]], counted: Counted, batch: list[int], take: TakeGradients = lambda grads: None
    ) -> Iterator[list[int]]:
        """Run a batch, in parts if it does not fit in memory; yield each part's rows when it is done.

        Args:
            token_ids, counted: See gradients.
            batch: The rows of `token_ids` that are in the batch.
            take: Called with each part's gradients {layer: [B, k]}. If memory runs out there, or on another rank, it is
                called again with those of a smaller part.

        Raises:
            ValueError: Memory runs out for a single example.
        """
        parts = [batch]
        while parts:
            rows = parts.pop(0)
            tokens = len(rows) * max(len(token_ids[i]) for i in rows)
            if len(rows) == 1 or tokens <= self.batch_tokens:
                self.lockstep.any(True)  # tells the other ranks that this one has a batch; see finish
                ids, counts = [token_ids[i] for i in rows], [counted[i] for i in rows] if counted else None
                if self._try_batch(ids, counts, take):
                    yield rows
                    continue
                self._shrink_batches(tokens, len(rows))
            half = len(rows) // 2
            parts[:0] = [part for part in (rows[:half], rows[half:]) if part]

    def _try_batch(self, token_ids: list[list[int]], counted: Counted, take: TakeGradients) -> bool:
        """Compute and take a batch's gradients. Return False if memory ran out (with a sharded model, on any rank)."""

        def attempt() -> bool:
            take(run_batch(self.model, self.capture, token_ids, counted))
            return True

        done = self.lockstep.step(attempt)
        if done:
            self.capture.commit()
        else:
            self.capture.rollback()
            release_memory()
        return bool(done)

    def _shrink_batches(self, tokens: int, examples: int) -> None:
        """Halve the size of later batches after memory ran out for one of `tokens` tokens.

        With a sharded model, a rank whose batch is a single example tries again while another rank can halve its own.
        """
        can_halve = examples > 1
        if not self.lockstep.any(can_halve):
            raise TooLittleMemoryError(
                f"expected memory for an example of {tokens} tokens, got too little; use --gradient_checkpointing, "
                "--fsdp, --device_map auto or a smaller --block_size"
            )
        if can_halve:
            self.batch_tokens = tokens // 2
            say(f"out of memory with {tokens} tokens in a batch; going on with {tokens // 2}")

    def _run_empty_batch(self) -> dict[str, Tensor]:
        """Run a batch without a loss: with a sharded model, the other ranks need this rank's part."""
        grads = run_batch(self.model, self.capture, [[0]])
        self.capture.rollback()
        return grads

    def finish(self) -> None:
        """With a sharded model, run empty batches until no rank has examples left."""
        while self.lockstep.any(False):
            if self.lockstep.step(self._run_empty_batch) is None:
                self._shrink_batches(1, 1)

    def check_vocabulary(self, token_ids: list[list[int]], ids: Sequence[int]) -> None:
        """Raise a ValueError if a token id is not in the model's vocabulary; `ids` are the examples'."""
        for example, tokens in zip(ids, token_ids, strict=True):
            check_token_ids(self.model, tokens, f"example {example}")

    def find_batch_tokens(self, length: int, max_examples: int) -> int:
        """Measure batches of 1, 2, 4 ... examples, set batch_tokens to the best size, and return it.

        The search stops at the first size for which memory runs out or that is not faster (MIN_SPEEDUP).

        Args:
            length: Tokens of each example.
            max_examples: Examples in a batch at most.
        """
        self.batch_tokens, best_speed, examples = length, 0.0, 1
        while examples <= max_examples:
            seconds = self._time_batch(length, examples)
            if seconds is None or examples / seconds < MIN_SPEEDUP * best_speed:
                break
            self.batch_tokens, best_speed, examples = examples * length, examples / seconds, 2 * examples
        return self.batch_tokens

    def _time_batch(self, length: int, examples: int) -> float | None:
        """Return the seconds that a batch of this size takes, or None if memory runs out.

        With a sharded model, the seconds are those of the slowest rank.
        """
        token_ids = [[i % self.vocabulary for i in range(length)]] * examples
        for _ in range(2):  # the first run warms up
            wait_for_devices(self.model)
            begin = time.perf_counter()
            done = self._try_batch(token_ids, None, lambda grads: None)
            self.capture.take_factors()
            if not done:
                return None
            wait_for_devices(self.model)
        seconds = time.perf_counter() - begin
        return self.lockstep.largest(seconds)


def make_extractor(lm: nn.Module, capture: GradientCapture, execution: Execution, run: RunDir) -> Extractor:
    """Return an Extractor for a run, with the batch size that the user gave, or with the best one by measurement."""
    extractor = Extractor(lm, capture, execution.batch_tokens or 0, execution.batch_size)
    if execution.batch_tokens is None:
        max_examples = min(execution.batch_size or 2**20, max(map(len, run.shards)))
        tokens = extractor.find_batch_tokens(run.settings.block_size, max_examples)
        say(f"--batch_tokens {tokens}")
    return extractor
