"""Random projections are stable; rotation merges the eigenvectors."""

import pytest
import torch

from logra import projection


def test_projections_are_stable():
    """The same seed, layer and side give the same numbers whatever else is tracked; E[P^T P] = I."""
    shapes = {"a": (300, 200), "b": (100, 50)}
    sizes = projection.projected_shapes(shapes, 64, 32)
    both, one = projection.draw(shapes, sizes, 3), projection.draw({"b": (100, 50)}, sizes, 3)
    assert torch.equal(both["b"].p_out, one["b"].p_out) and both["b"].p_in is None
    assert not torch.equal(both["a"].p_in, projection.draw(shapes, sizes, 4)["a"].p_in)
    assert abs((both["a"].p_in ** 2).sum(0).mean().item() - 1) < 0.05
    x, y = torch.randn(2, 200)
    mean = sum((p.p_in @ x) @ (p.p_in @ y) for p in (projection.draw(shapes, sizes, s)["a"] for s in range(300))) / 300
    assert abs(mean - x @ y) < 4 * x.norm() * y.norm() / (64 * 300) ** 0.5
    known = projection.random_side(0, "model.layers.0.mlp.up_proj", "in", 2, 4)
    pinned = [-0.603464, -0.389696, 0.640583, 0.100162, 0.567567, -0.631193, -0.144797, 0.129394]
    assert torch.allclose(known.flatten(), torch.tensor(pinned), atol=1e-6), "stored runs would not fit any more"


def test_rotate_merges_the_eigenvectors():
    """In the space of U^T P the covariance is diagonal, the largest first."""
    x = torch.randn(50, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64)
    p = torch.randn(5, 9)
    cov = (x @ p.double().T).T @ (x @ p.double().T)
    new = projection.rotate(projection.Projection(p, None), cov, torch.eye(4), (4, 5))
    turned = x @ new.p_in.double().T
    diagonal = turned.T @ turned
    assert (diagonal - diagonal.diag().diag()).norm() < 1e-5 * diagonal.norm()
    assert (diagonal.diag().diff() < 1e-9).all()
    assert torch.equal(
        new.p_in, projection.rotate(projection.Projection(p, None), cov * 1.0, torch.eye(4), (4, 5)).p_in
    )


def test_an_experts_part_does_not_depend_on_their_number():
    """P of four experts begins with the P of two; experts have different parts, with entries of N(0, 1/r)."""
    four, two = (projection.random_side(0, "experts.down_proj", "in", 8, 30 * n, n) for n in (4, 2))
    assert torch.equal(four[:, :60], two)
    assert not torch.equal(four[:, :30], four[:, 30:60])
    assert four.square().mean().item() == pytest.approx(1 / 8, rel=0.15)
