"""A run as re-ranking sees it (compute_influence.py --rerank): unprojected, or at a higher rank, with EK-FAC there.

hessian/rerank-<rank>[-<checkpoint>].safetensors    eigenbasis and eigenvalues of the calibration sample: <layer>.in,
                                                    .out and so on as in projections.safetensors, <layer>.square
                                                    [r_out, r_in] (a sum), and the counts `examples` and `tokens`
                                   ....json         what they are of, and checksums
Gradients in this space are never stored. Notation: r_in/r_out projected sizes, N train examples.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from logra import projection, store
from logra.projection import Shapes
from logra.run_dir import RunDir
from logra.runtime import files, processes

MAX_BYTES = 4 * 2**30  # of the statistics with --rerank_rank auto
SHARD_EXAMPLES = 64  # examples that a rank computes at a time


def statistics_layout(shapes: Shapes, projected: Shapes) -> store.Layout:
    """Return the layout of the statistics' file."""
    squares = {f"{layer}.square": (torch.float32, list(size)) for layer, size in projected.items()}
    return store.projection_layout(shapes, projected, rotated=True) | squares | store.COUNTS_LAYOUT


def choose_rank(shapes: Shapes, rank: int | str) -> int | None:
    """Return the rank that --rerank_rank says, None for none; see RerankSettings for auto."""
    if rank != "auto":
        return None if rank == "none" else int(rank)
    powers = [2**n for n in reversed(range(max(map(max, shapes.values())).bit_length()))]
    sizes = {
        chosen: store.layout_bytes(statistics_layout(shapes, projection.projected_shapes(shapes, chosen, chosen)))
        for chosen in (None, *powers)
    }
    return next((chosen for chosen, size in sizes.items() if size <= MAX_BYTES), 1)


def at_checkpoint(run: RunDir, model_name: str, revision: str | None, model: dict[str, str]) -> RunDir:
    """Return a run with the model of another checkpoint; `model` is its class and fingerprint."""
    settings = replace(run.settings, model_name=model_name, revision=revision)
    return RunDir(run.folder, replace(run.record, settings=settings, model=model, model_files=None))


class FineRun(RunDir):
    """The view of a run, or of another checkpoint with its examples, in the space of re-ranking.

    Its examples are those that were chosen; all train examples at first.

    Args:
        run: The run, with the settings and the record of the model that computes the gradients.
        rank: Of both sides; None does not project.
        checkpoint: Name of another checkpoint than the run's own model, or "".
    """

    def __init__(self, run: RunDir, rank: int | None, checkpoint: str = ""):
        settings = replace(
            run.settings, lora="random" if rank else "none", rank_in=rank, rank_out=rank, bytes_per_example=None,
            basis="eigen", store_dtype="none",
        )  # fmt: skip
        projected = projection.projected_shapes(run.shapes, rank, rank)
        layers = {layer: [*shape, *projected[layer]] for layer, shape in run.shapes.items()}
        super().__init__(run.folder, replace(run.record, settings=settings, layers=layers))
        self.rank, self.checkpoint = rank, checkpoint
        self.layout = statistics_layout(self.shapes, self.projected)
        self.bytes = store.layout_bytes(self.layout)
        name = f"rerank-{rank or 'none'}" + (f"-{checkpoint}" if checkpoint else "")
        self.path = run.folder / "hessian" / f"{name}.safetensors"
        self.key: dict[str, Any] = {"model": self.record.model, "fingerprints": self.fingerprints}
        self.key |= {"seed": settings.seed, "calibration_examples": settings.calibration_examples}
        self._chosen: Dataset | None = None

    def of_model(self, model: dict[str, str]) -> Self:
        """Return the view with the class and fingerprint of its model, which are not known before it is loaded."""
        loaded = at_checkpoint(self, self.settings.model_name, self.settings.revision, model)
        return type(self)(loaded, self.rank, self.checkpoint)

    def check_room(self) -> None:
        """Raise a ValueError if memory or disk are too small for the statistics."""
        processes.check_memory(self.bytes, "the statistics of re-ranking", "use a lower --rerank_rank")
        free = shutil.disk_usage(self.folder).free
        if self.bytes > free and not self.path.exists():
            raise ValueError(
                f"expected {self.bytes / 1e9:.3g} GB of free disk for the statistics of re-ranking, got "
                f"{free / 1e9:.3g}; use a lower --rerank_rank"
            )

    @property
    def entry(self) -> dict[str, Any]:
        """What finds this view again (see scoring/reranked.py): the model, the run's folder, the checkpoint's name."""
        settings = self.settings
        model = {"model_name": settings.model_name, "revision": settings.revision, "model": self.record.model}
        return model | {"run": self.folder.name, "name": self.checkpoint}

    def _open(self) -> store.TensorFile:
        manifest = store.read_manifest(self.path.with_suffix(".json"))
        if any(manifest.get(key) != value for key, value in self.key.items()):
            raise ValueError(f"{self.path} is of another model or of other examples")
        return store.TensorFile(self.path, manifest.get("checksums"), self.layout)

    def problem(self) -> str | None:
        """Return what is wrong with the statistics (missing, altered, of another model), or None if they are whole."""
        return store.problem(self._open)

    def save_statistics(self, projections: dict[str, projection.Projection], sums: dict[str, Tensor]) -> None:
        """Write the statistics. The sums are <layer>.square [r_out * r_in], `examples` and `tokens`."""
        tensors = store.projection_tensors(projections)
        squares = {f"{name}.square": size for name, size in self.projected.items()}
        tensors |= {name: sums[name].float().view(size) for name, size in squares.items()}
        tensors |= {name: sums[name].long() for name in store.COUNTS_LAYOUT}
        checksums = store.save_tensors(self.path, self.layout, tensors)
        files.write_json(self.path.with_suffix(".json"), self.key | {"checksums": checksums})

    def projections(self) -> dict[str, projection.Projection]:
        """Load the eigenbasis.

        Raises:
            ValueError: The statistics are missing or were altered.
        """
        file = files.retried(self._open)
        with file:
            tensors = {name: file.read(name) for name in store.projection_layout(self.shapes, self.projected, True)}
        return store.projections_of_tensors(tensors, self.shapes)

    def statistics(self, kind: str) -> Callable[[str], dict[str, Tensor]]:
        """Return a function layer -> its statistics of EK-FAC, as hessian.preconditioners takes them."""
        file = files.retried(self._open)
        counts = {name: file.read(name) for name in store.COUNTS_LAYOUT}
        return lambda layer: counts | {"square": file.read(f"{layer}.square")}

    @cached_property
    def _all_examples(self) -> Dataset:
        return super().train()

    def choose(self, ids: np.ndarray) -> np.ndarray:
        """Take these train examples [n], and return their ids in the order that they have from now on: by length."""
        chosen = self._all_examples.select(ids)
        order = np.argsort([-len(tokens) for tokens in chosen["input_ids"]], kind="stable")
        self._chosen = chosen.select(order)
        return ids[order]

    def train(self) -> Dataset:
        """Return the chosen examples; all train examples before `choose`."""
        return self._all_examples if self._chosen is None else self._chosen

    @property
    def shards(self) -> list[range]:  # type: ignore[override]
        """Ranges of the chosen examples, to share among ranks."""
        count = self.examples if self._chosen is None else len(self._chosen)
        return [range(i, min(i + SHARD_EXAMPLES, count)) for i in range(0, count, SHARD_EXAMPLES)]
