"""Work by layer is shared: while a rank works on one of its layers, the others work on theirs.

Run as a script, this file is one of two ranks: it writes seconds and results to a file.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from logra import hessian, projection
from logra.runtime import processes
from logra.runtime.settings import Damping
from logra.scoring.score import Scorer
from logra.stages import calibrate

LAYERS = {f"layer{i}": (3, 4) for i in range(7)}  # the last round of two ranks has one layer
SECONDS = 0.5  # of work on a layer
SHARDS = 4


def factors(shard: int) -> dict[str, Tensor]:
    """Return a shard's random factor sums."""
    torch.manual_seed(shard)
    sums = {"examples": torch.tensor(5), "tokens": torch.tensor(40)}
    for layer, (r_out, r_in) in LAYERS.items():
        d, x = torch.randn(8, r_out), torch.randn(8, r_in)
        sums |= {f"{layer}.A": x.T @ x, f"{layer}.B": d.T @ d}
    return sums


class Run:
    """A run of random numbers: a hessian.GradientSource, and what Scorer.preconditioned reads."""

    projected, examples, shards = LAYERS, 5 * SHARDS, [range(5 * i, 5 * i + 5) for i in range(SHARDS)]

    def read(self, name: str, shards: range, kind: str = "gradients") -> Iterator[Tensor]:
        for shard in shards:
            sums = factors(shard)  # also sets the seed
            yield torch.randn(5, 12) if kind == "gradients" else sums[name]

    def statistics(self, kind: str) -> Callable[[str], dict[str, Tensor]]:
        return lambda layer: {key.removeprefix(f"{layer}."): tensor for key, tensor in factors(0).items()}


def eigenbases() -> list[Tensor]:
    """Stage 2's EK-FAC from gradients that are not in the eigenbasis."""
    own_shards = processes.share(SHARDS)
    return list(hessian.statistics("ekfac", Run(), own_shards, processes.sum_over_ranks, False, "cpu"))


def rotations() -> list[Tensor]:
    """Stage 2's projections, rotated into the eigenbasis of a sample that the ranks share."""
    sums = {key: torch.zeros_like(tensor).double() for key, tensor in factors(0).items() if "." in key}
    for shard in processes.share(SHARDS):
        sums = {key: total + factors(shard)[key] for key, total in sums.items()}
    rotated = calibrate.rotate(projection.identity(LAYERS), sums, LAYERS)
    assert list(rotated) == list(LAYERS)
    return [tensor for matrices in rotated.values() for tensor in matrices]


def solutions() -> list[Tensor]:
    """Stage 3's preconditioned queries."""
    scorer = object.__new__(Scorer)
    scorer.task = SimpleNamespace(kind="kfac", dampings=[Damping(0.1, None), Damping(None, 2.0)])
    scorer.run, scorer.self_influence, scorer.device = Run(), None, torch.device("cpu")
    scorer._query_gradients = lambda groups: dict(zip(LAYERS, torch.randn(7, len(groups), 12), strict=True))
    torch.manual_seed(0)
    queries, _ = scorer.preconditioned([[]] * 2)
    assert list(queries) == list(LAYERS)
    return list(queries.values())


PLACES = (eigenbases, rotations, solutions)


def main() -> None:
    """Time each place on this rank; an eigenbasis of one side takes half of a layer's seconds."""
    processes.start()
    slow, found = (lambda cov, quick=projection.eigenbasis: time.sleep(SECONDS / 2) or quick(cov)), {}
    hessian.eigenbasis = projection.eigenbasis = slow
    for place in PLACES:
        processes.state().wait_for_everyone()
        start = time.monotonic()
        results = place()
        found[place.__name__] = time.monotonic() - start, [tensor.tolist() for tensor in results]
    Path(f"found.{os.environ['RANK']}").write_text(json.dumps(found))
    processes.finish()


def test_two_ranks_work_side_by_side(tmp_path):
    """Eigenbases, rotations and solutions take about half of the time on two ranks, and are those of one process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}
    place |= {"LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    environments = [os.environ | place | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    ranks = [subprocess.Popen([sys.executable, __file__], cwd=tmp_path, env=own) for own in environments]
    expected = {place.__name__: place() for place in PLACES}
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    for rank in "01":
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        for name, tensors in expected.items():
            for values, tensor in zip(found[name][1], tensors, strict=True):
                assert torch.allclose(torch.tensor(values, dtype=tensor.dtype), tensor, rtol=1e-5, atol=1e-6), name
        seconds = {name: of_place for name, (of_place, _) in found.items()}
        assert max(seconds.values()) < 0.75 * SECONDS * len(LAYERS), seconds


if __name__ == "__main__":
    main()
