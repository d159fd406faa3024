"""Memory: what is free, what was used at most, and whether an error means that there is none left."""

import resource
import sys

import psutil
import torch


def available_memory() -> int:
    """Return the bytes of main memory that are free on this machine."""
    return psutil.virtual_memory().available


def peak_memory() -> int:
    """Return the most bytes that this process used: of the GPU's memory where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether an error means that the device's, or this machine's, memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
