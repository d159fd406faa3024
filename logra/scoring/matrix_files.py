"""Files of float32 matrices that are mapped into memory: scores, and preconditioned queries.

Notation: S dampings, Q queries, k = r_out * r_in of a layer.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from logra.runtime import files, processes


def create_matrix(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Create a file of a float32 matrix, and map it into memory.

    Raises:
        OSError: The disk is too small. Without this check a memory-mapped write would crash.
    """
    create = partial(np.lib.format.open_memmap, path, mode="w+", dtype=np.float32, shape=shape)
    matrix = files.retried(create)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return matrix


class KeptQueries:
    """Preconditioned queries of a run's passes on the disk, [S, Q, k] for each layer. Rank 0 writes them.

    Args:
        folder: A new folder for the files.
        widths: Layer -> k.
        dampings: S.
        queries: Q.
    """

    def __init__(self, folder: Path, widths: dict[str, int], dampings: int, queries: int):
        self.paths = {layer: folder / f"{number:05d}.npy" for number, layer in enumerate(widths)}
        self.files: dict[str, np.memmap] = {}
        if processes.state().is_main_process:
            folder.mkdir(parents=True)
            for layer, path in self.paths.items():
                self.files[layer] = create_matrix(path, (dampings, queries, widths[layer]))

    def keep(self, first: int, queries: dict[str, Tensor]) -> None:
        """Write a pass's queries, {layer: [S * queries, k]}, of which `first` is the first one's number."""
        for layer, file in self.files.items():
            rows = queries[layer].numpy()
            rows = rows.reshape(len(file), -1, rows.shape[1])
            file[:, first : first + rows.shape[1]] = rows

    def close(self) -> dict[str, Path]:
        """Flush the files, and return them."""
        for file in self.files.values():
            file.flush()
        processes.state().wait_for_everyone()
        return self.paths
