"""Memory: how much is free, the peak, and which errors mean that it ran out."""

import gc
import resource
import sys

import psutil
import torch
from torch import nn

OUT_OF_MEMORY_WORDS = (  # in errors of other types; cuBLAS has no memory left for its workspace
    "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED",
)  # fmt: skip


class TooLittleMemoryError(ValueError):
    """Memory ran out for a single example."""


def available_memory() -> int:
    """Return the bytes of free main memory on this machine."""
    return psutil.virtual_memory().available


def free_memory(device: torch.device) -> int:
    """Return the bytes of free memory of a device; of main memory for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def wait_for_devices(model: nn.Module) -> None:
    """Wait until the GPUs that hold a model have done what is queued."""
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def release_memory() -> None:
    """Free what a failed attempt leaves: objects in cycles, and the GPU memory that torch keeps for later."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def peak_memory() -> int:
    """Return the peak bytes of this process: of GPU memory if there is a GPU, else of main memory (resident)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the GPU's or this machine's memory is full."""
    known = isinstance(error, torch.OutOfMemoryError | TooLittleMemoryError)
    return known or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)
