"""A model sharded over the processes with FSDP2: loading, and steps that all ranks take together.

Every rank works on examples of its own, but each layer's weights are gathered from all ranks when it runs. So each
rank has to make the same all-gathers in the same order, whatever happens to its batch.
"""

import warnings
from collections.abc import Callable
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
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing is done in place to it here


def shard(whole: nn.Module | None, empty: nn.Module, blocks: nn.ModuleList, device: torch.device) -> nn.Module:
    """Return a model whose blocks are sharded over all ranks; embedding, norms and head are on every rank.

    Args:
        whole: The model in rank 0's main memory, which sends the shards; None on the other ranks.
        empty: The same model on the meta device.
        blocks: The transformer blocks of `empty`.
        device: Where the shards go.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sharded = {parameter for block in blocks for parameter in block.parameters()}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(empty.base_model, mesh=mesh, ignored_params={p for p in empty.parameters() if p not in sharded})
    empty.to_empty(device=device)
    empty.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(empty, {} if whole is None else whole.state_dict(), options=options)
    for key, buffer in empty.named_buffers():  # rotary frequencies are in no state dict
        if whole is not None:
            buffer.copy_(whole.get_buffer(key))
        dist.broadcast(buffer, 0)
    return empty.eval()


class _RecordedAllGather(AllGather):
    """All-gather that keeps a list of its calls, so that the rest of a step can be made without the model."""

    def __init__(self):
        self.calls: list[tuple[int, torch.dtype, torch.device, dist.ProcessGroup]] = []

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.calls.append((output_tensor.numel(), output_tensor.dtype, output_tensor.device, group))
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class Lockstep:
    """Steps of all ranks together: none waits for ever for one that ran out of memory or of examples.

    Args:
        lm: A model of `shard`.
        empty: Runs a batch without a loss, which makes all the all-gathers of any batch.
    """

    def __init__(self, lm: nn.Module, empty: Callable[[], object]):
        self.lm, self.gather = lm, _RecordedAllGather()
        for module in lm.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(self.gather)
        empty()
        self.plan = self.gather.calls

    def step(self, batch: Callable[[], T]) -> T | None:
        """Run `batch` while every other rank runs one; return its result, or None if one rank's memory ran out.

        That rank makes the all-gathers that are left of its step with empty buffers; what the others compute from
        them is thrown away.
        """
        self.gather.calls, result = [], None
        try:
            result = batch()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if result is None:
            self.lm.base_model.reset_iter_state()
            for size, dtype, device, group in self.plan[len(self.gather.calls) :]:
                output = torch.zeros(size, dtype=dtype, device=device)
                dist.all_gather_single(output, output.chunk(group.size())[0].clone(), group=group)
        return None if self.any(result is None) else result

    def any(self, mine: bool) -> bool:
        """Say whether it is so on any rank."""
        return self.largest(float(mine)) > 0

    def largest(self, mine: float) -> float:
        """Return the largest of all ranks' numbers."""
        value = torch.tensor(mine, dtype=torch.float64, device=self.lm.get_input_embeddings().weight.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()
