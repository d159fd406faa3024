"""A model sharded over the processes with FSDP2, and steps that all ranks take together.

Each rank runs its own examples, but every layer gathers its weights from all ranks when it runs. So all ranks must make
the same all-gathers in the same order, even when one of them runs out of memory.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from logra.runtime.memory import is_out_of_memory

T = TypeVar("T")
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # we never write to the view


def shard(
    full_model: nn.Module | None, meta_model: nn.Module, blocks: nn.ModuleList, device: torch.device
) -> nn.Module:
    """Return a model whose blocks are sharded over all ranks. Embedding, norms and head are on every rank.

    Args:
        full_model: The model in rank 0's main memory, which sends the shards; None on the other ranks.
        meta_model: The same model on the meta device.
        blocks: The transformer blocks of `meta_model`.
        device: The device of this rank's shards.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    unsharded = set(meta_model.parameters()) - set(blocks.parameters())
    for block in blocks:
        fully_shard(block, mesh=mesh)
    holders = (child for child in meta_model.children() if any(module is blocks for module in child.modules()))
    root = meta_model.base_model if meta_model.base_model is not meta_model else next(holders)  # without the head
    fully_shard(root, mesh=mesh, ignored_params=unsharded)
    meta_model.recorded_all_gather = _RecordedAllGather()  # one a model, which all its Locksteps share
    meta_model.shard_rows = partial(shard_rows, meta_model.recorded_all_gather, mesh.get_group())
    for module in (root, *blocks):
        module.set_custom_all_gather(meta_model.recorded_all_gather)
    meta_model.to_empty(device=device)
    meta_model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(meta_model, {} if full_model is None else full_model.state_dict(), options=options)
    for key, buffer in meta_model.named_buffers():  # the state dict lacks rotary frequencies
        if full_model is not None:
            buffer.copy_(full_model.get_buffer(key))
        dist.broadcast(buffer, 0)
    return meta_model.eval()


class _RecordedAllGather(AllGather):
    """All-gather that records its calls, so that the rest of a step can be repeated without the model."""

    def __init__(self):
        self.calls: list[tuple[int, torch.dtype, torch.device, dist.ProcessGroup]] = []

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.calls.append((output_tensor.numel(), output_tensor.dtype, output_tensor.device, group))
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


def shard_rows(gather: _RecordedAllGather, group: dist.ProcessGroup, tensor: Tensor) -> Callable[[], Tensor]:
    """Keep this rank's share of the rows of a tensor that all ranks have; return a function that gathers all rows."""
    rows, share = len(tensor), -(-len(tensor) // group.size())
    own = tensor[share * group.rank() :][:share]
    own = torch.cat([own, own.new_zeros(share - len(own), *own.shape[1:])])

    def whole() -> Tensor:
        gathered = own.new_empty(share * group.size(), *own.shape[1:])
        gather(gathered, own, group)
        return gathered[:rows]

    return whole


class Lockstep:
    """Steps that all ranks take together, so that none waits for a rank without memory or without examples.

    If the model is not sharded, each rank takes its own steps, and `any` and `largest` look at this rank alone.

    Args:
        lm: A model, of `shard` or not sharded.
        run_empty_batch: Runs a batch without a loss. It makes the all-gathers of any batch.
    """

    def __init__(self, lm: nn.Module, run_empty_batch: Callable[[], object]):
        self.lm, self.root = lm, next((module for module in lm.modules() if isinstance(module, FSDPModule)), None)
        self.sharded = self.root is not None
        self.gather = lm.recorded_all_gather if self.sharded else _RecordedAllGather()
        self.gather.calls = []
        if self.sharded:
            run_empty_batch()
        self.calls_of_a_step = self.gather.calls

    def step(self, batch: Callable[[], T]) -> T | None:
        """Run `batch` while every other rank runs one. Return its result, or None if any rank ran out of memory.

        A rank without memory makes the remaining all-gathers of its step with empty buffers. The results that the other
        ranks compute from them are discarded.
        """
        self.gather.calls, result = [], None
        try:
            result = batch()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if result is None and self.sharded:
            self.root.reset_iter_state()
            for size, dtype, device, group in self.calls_of_a_step[len(self.gather.calls) :]:
                output = torch.zeros(size, dtype=dtype, device=device)
                dist.all_gather_single(output, output.chunk(group.size())[0].clone(), group=group)
        return None if self.any(result is None) else result

    def any(self, value: bool) -> bool:
        """Return whether the value is true on any rank."""
        return self.largest(float(value)) > 0

    def largest(self, value: float) -> float:
        """Return the largest value of all ranks."""
        if not self.sharded:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.lm.get_input_embeddings().weight.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()
