"""The calibration sample: each example counts once, however the processes divide it."""

import torch
from helpers import extract

from logra import projection
from logra.hooks import GradientCapture
from logra.models.model import load_model
from logra.runtime import processes
from logra.stages import calibrate
from logra.stages.gradients import Extractor


def test_ranks_with_batches_of_different_sizes(cli, tiny, workspace, monkeypatch):
    """Two ranks that found different batch sizes sum what one process sums."""
    run = extract(cli, tiny / "llama", "--rank", 4, "--calibration_examples", 17)
    model = load_model(str(tiny / "llama"), torch.float32, torch.device("cpu"))
    projections = projection.draw(run.shapes, run.projected, run.settings.seed)

    layout = {f"{layer}.A": (r_in, r_in) for layer, (_, r_in) in run.projected.items()}
    layout |= {f"{layer}.B": (r_out, r_out) for layer, (r_out, _) in run.projected.items()}

    def sums(rank: int, ranks: int, batch_tokens: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(processes, "share", lambda count: range(rank, count, ranks))
        with GradientCapture(model, projections, grads=False, factors=True) as capture:
            return calibrate.sample_sums(Extractor(model, capture, batch_tokens), run, layout)

    expected, one, two = sums(0, 1, 100), sums(0, 2, 40), sums(1, 2, 100)
    assert all(torch.allclose(one[key] + two[key], total, rtol=1e-5) for key, total in expected.items())
