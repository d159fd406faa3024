"""From token ids to projected gradients: batches that fit in memory, calibration sums, the gradients of a shard.

Notation: k = r_in * r_out of a layer, n examples. `counted` says for each token of an example whether it counts.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from logra.hooks import GradientCapture
from logra.inputs.batches import length_batches, make_batch
from logra.loss import example_losses, input_device
from logra.quantise import ScoreErrorEstimate, stored_tensors
from logra.runtime.fsdp import Lockstep
from logra.runtime.memory import is_out_of_memory
from logra.runtime.progress import say
from logra.runtime.settings import Execution

ROUNDING_SAMPLE = 16  # examples of a shard whose scores are compared before and after rounding
Counted = list[list[bool]] | None


def run_batch(
    model: nn.Module, capture: GradientCapture, token_ids: list[list[int]], counted: Counted = None
) -> dict[str, Tensor]:
    """Return {layer: [B, k]} of the summed losses of some examples, over the tokens that count."""
    batch = make_batch(token_ids, counted, input_device(model))
    return capture.backward(example_losses(model, batch.input_ids, batch.targets, batch.rows), batch.positions)


class HostGradients:
    """Gradients of n examples on their way to the CPU, and the factor sums that go with them.

    On a GPU the copies run on a stream of their own, into pinned memory, while the next batch is computed.
    """

    def __init__(self, examples: int, store_dtype: str, first_id: int, error: ScoreErrorEstimate | None):
        self.examples, self.store_dtype, self.first_id, self.error = examples, store_dtype, first_id, error
        self.grads: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        self.order: list[int] = []
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def add(self, rows: list[int], grads: dict[str, Tensor]) -> None:
        """Begin to copy the gradients of these rows, {layer: [len(rows), k]}."""
        begin, end = len(self.order), len(self.order) + len(rows)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for layer, grad in grads.items():
                if self.error and not begin:
                    self.error.add(layer, grad[:ROUNDING_SAMPLE])
                for name, part in stored_tensors(layer, grad, self.store_dtype).items():
                    if name not in self.grads:
                        size, pinned = (self.examples, *part.shape[1:]), self.stream is not None
                        self.grads[name] = torch.empty(size, dtype=part.dtype, pin_memory=pinned)
                    self.grads[name][begin:end].copy_(part, non_blocking=True)
                if self.stream:
                    grad.record_stream(self.stream)
        self.order += rows

    def wait(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the gradients {layer: [n, k]}, rows in their own order, and the factor sums, on the CPU.

        Raises:
            ValueError: A gradient is NaN or infinite.
        """
        if self.stream:
            self.stream.synchronize()
        places = torch.from_numpy(np.argsort(self.order))
        result = {}
        for name in list(self.grads):
            result[name] = grad = self.grads.pop(name)[places]
            if not grad.is_floating_point():
                continue  # its scale tells
            bad = (~grad.view(len(grad), -1).sum(dim=1, dtype=torch.float32).isfinite()).nonzero()
            if len(bad):
                raise ValueError(
                    f"expected finite gradients, got NaN or infinity in example {self.first_id + int(bad[0])} (layer "
                    f"{name.removesuffix('.scale')}); use --dtype float32 and --store_dtype float32, or leave the "
                    "example out"
                )
        return result, {key: value.cpu() for key, value in self.factors.items()}


class Extractor:
    """Runs examples through a model in batches that fit: a batch that memory runs out for is halved.

    Args:
        model: Of transformers; with `together` one of fsdp.load_sharded, and every rank calls the same methods.
        capture: Of the model, and entered.
        batch_tokens: In a batch at most, with padding (an example that is longer is a batch of its own).
        batch_size: Examples in a batch at most.
        together: The model is sharded over the ranks, which step together.
        say: Called with a line when batches become smaller.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: GradientCapture,
        batch_tokens: int,
        batch_size: int | None = None,
        together: bool = False,
        say: Callable[[str], object] = print,
    ):
        self.model, self.capture, self.say = model, capture, say
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.lockstep = Lockstep(model, self._run_empty_batch) if together else None

    def _run_empty_batch(self) -> dict[str, Tensor]:
        """Run a batch without a loss, for the sake of the other ranks."""
        grads = run_batch(self.model, self.capture, [[0]])
        self.capture.rollback()
        return grads

    def _try_batch(self, token_ids: list[list[int]], counted: Counted) -> dict[str, Tensor] | None:
        """Return a batch's gradients, or None where memory ran out, on this rank or, in step, on any."""

        def batch() -> dict[str, Tensor]:
            return run_batch(self.model, self.capture, token_ids, counted)

        if self.lockstep:
            grads = self.lockstep.step(batch)
        else:
            try:
                grads = batch()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                grads = None
        if grads is not None:
            self.capture.commit()
        else:
            self.capture.rollback()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return grads

    def run(self, token_ids: list[list[int]], counted: Counted = None) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield (rows, {layer: [len(rows), k]}) of the parts of a batch that fit in memory; each row once.

        Raises:
            ValueError: Memory runs out for a single example.
        """
        parts = [list(range(len(token_ids)))]
        while parts:
            rows = parts.pop(0)
            size = len(rows) * max(len(token_ids[i]) for i in rows)
            fits, grads = len(rows) == 1 or size <= self.batch_tokens, None
            if fits:
                if self.lockstep:
                    self.lockstep.any(True)  # this rank goes on; see finish
                grads = self._try_batch([token_ids[i] for i in rows], [counted[i] for i in rows] if counted else None)
            if grads is not None:
                yield rows, grads
                continue
            if fits:
                self._shrink_batches(size, len(rows))
            half = len(rows) // 2
            parts[:0] = [part for part in (rows[:half], rows[half:]) if part]

    def _shrink_batches(self, size: int, examples: int) -> None:
        """Make batches smaller after memory ran out for one of `size` tokens; in step, on this rank or on another.

        Ranks with a single example try again as long as another one can halve its batch.
        """
        can_halve = examples > 1
        if not (self.lockstep.any(can_halve) if self.lockstep else can_halve):
            raise ValueError(
                f"expected memory for an example of {size} tokens, got too little; use --gradient_checkpointing, "
                "--fsdp, --device_map auto or a smaller --block_size"
            )
        if can_halve:
            self.batch_tokens = size // 2
            self.say(f"out of memory with {size} tokens in a batch; going on with {size // 2}")

    def gradients(
        self,
        token_ids: list[list[int]],
        counted: Counted = None,
        first_id: int = 0,
        store_dtype: str = "float32",
        done: Callable[[int], object] = lambda tokens: None,
        error: ScoreErrorEstimate | None = None,
    ) -> HostGradients:
        """Compute the gradients of n examples, in batches of like length; see HostGradients.wait.

        Args:
            token_ids, counted: Of the examples; without `counted` all tokens count.
            first_id: Id of the first example, for messages.
            store_dtype: Of the result; see quantise.stored_tensors.
            done: Called with the number of tokens after each batch.
            error: Takes the first examples, before they are rounded.

        Raises:
            ValueError: A token id is not in the model's vocabulary, or memory runs out for a single example.
        """
        self.check_vocabulary(token_ids, range(first_id, first_id + len(token_ids)))
        result = HostGradients(len(token_ids), store_dtype, first_id, error)
        for batch in length_batches([len(ids) for ids in token_ids], self.batch_tokens, self.batch_size):
            ids, counts = [token_ids[i] for i in batch], [counted[i] for i in batch] if counted else None
            for rows, grads in self.run(ids, counts):
                result.add([batch[i] for i in rows], grads)
            done(sum(map(len, ids)))
        if self.capture.want_factors:
            result.factors = self.capture.take_factors()
        return result

    def finish(self) -> None:
        """Run empty batches as long as another rank has examples."""
        while self.lockstep and self.lockstep.any(False):
            if self.lockstep.step(self._run_empty_batch) is None:
                self._shrink_batches(1, 1)

    def check_vocabulary(self, token_ids: list[list[int]], examples: Sequence[int]) -> None:
        """Raise a ValueError where a token id is not in the model's vocabulary; `examples` are ids for the message."""
        for example, ids in zip(examples, token_ids, strict=True):
            if max(ids, default=0) >= self.vocabulary:
                raise ValueError(
                    f"expected token ids below {self.vocabulary}, the model's vocabulary, got {max(ids)} in example "
                    f"{example}; use the model's own tokenizer"
                )

    def find_batch_tokens(self, length: int, most: int) -> int:
        """Set, and return, the largest batch_tokens that fit, by trying 1, 2, 4 ... examples of a length.

        Args:
            length: Tokens of each example.
            most: Examples at most.

        It ends at the first size that memory runs out for, or that is not 3% faster than the one before.
        """
        best, fastest, examples = length, 0.0, 1
        while examples <= most:
            begin, self.batch_tokens = 0.0, examples * length
            for _ in range(2):  # the first one warms up
                begin = time.perf_counter()
                grads = self._try_batch([[i % self.vocabulary for i in range(length)]] * examples, None)
                self.capture.take_factors()
                if grads is None:
                    break
                if grads:
                    next(iter(grads.values())).sum().item()  # waits for the device
            seconds = time.perf_counter() - begin
            seconds = self.lockstep.largest(seconds) if self.lockstep else seconds
            speed = examples / seconds
            if grads is None or speed < 1.03 * fastest:
                break
            best, fastest, examples = self.batch_tokens, speed, 2 * examples
        self.batch_tokens = best
        return best


def make_extractor(
    lm: nn.Module, capture: GradientCapture, execution: Execution, block_size: int, most_examples: int
) -> Extractor:
    """Return what runs the model, with the size of batch that the user gave, or the largest that fits.

    Args:
        lm, capture: See Extractor.
        execution: How the model is executed.
        block_size: Tokens of an example, to find the size of a batch with.
        most_examples: Examples of a batch at most.
    """
    tokens = execution.batch_tokens
    extractor = Extractor(lm, capture, tokens or 0, execution.batch_size, execution.fsdp, say)
    if tokens is None:
        found = extractor.find_batch_tokens(block_size, min(execution.batch_size or 2**20, most_examples))
        say(f"--batch_tokens {found}")
    return extractor
