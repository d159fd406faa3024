"""Memory: how much is free, the peak, and which errors mean that it ran out."""

import resource
import sys

import psutil
import torch


def available_memory() -> int:
    """Return the bytes of free main memory on this machine."""
    return psutil.virtual_memory().available


def peak_memory() -> int:
    """Return the peak bytes of this process: of GPU memory if there is a GPU, else of main memory (resident)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that the GPU's or this machine's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
