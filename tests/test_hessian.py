"""Hessian statistics, damping and (C + lambda I)^-1 against dense float64 algebra, and scores by their definition."""

import pytest
import reference
import torch

from logra import hessian, influence, projection, store
from logra.runtime.settings import MODES

R_OUT, R_IN, TOKENS = 4, 5, 6

K = R_OUT * R_IN


class FakeLog:
    """Shards of random examples of one layer, as run_dir.RunDir yields them."""

    def __init__(self, examples: int, per_shard: int = 7):
        self.projected, self.examples = {"layer": (R_OUT, R_IN)}, examples
        self.shards = [range(i, min(i + per_shard, examples)) for i in range(0, examples, per_shard)]
        self.xs = [
            torch.randn(TOKENS, R_IN, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 6).double())
            for _ in range(examples)
        ]
        self.ds = [torch.randn(TOKENS, R_OUT, dtype=torch.float64) for _ in range(examples)]
        self.grads = torch.stack([(d.T @ x).flatten() for d, x in zip(self.ds, self.xs, strict=True)])

    def read(self, name, shards, kind="gradients"):
        for ids in (self.shards[index] for index in shards):
            if kind == "gradients":
                yield self.grads[list(ids)].float()
                continue
            sums = {
                "layer.A": sum(self.xs[i].T @ self.xs[i] for i in ids),
                "layer.B": sum(self.ds[i].T @ self.ds[i] for i in ids),
                "layer.square": self.grads[list(ids)].square().sum(0),
                "examples": torch.tensor(len(ids)),
                "tokens": torch.tensor(TOKENS * len(ids)),
            }
            yield sums[name]


def stats_of(log: FakeLog, kind: str, ranks: int = 1, rotated: bool = False) -> dict[str, torch.Tensor]:
    """Collect the statistics as `ranks` processes would: each its shards, then the sum."""
    layout = store.hessian_layout(kind, log.projected, log.examples, rotated)
    shares = [range(rank, len(log.shards), ranks) for rank in range(ranks)]
    if ranks == 1:
        tensors = list(hessian.statistics(kind, log, shares[0], lambda t: t, rotated, "cpu"))
    else:  # a sum over ranks in lock step
        import threading

        barrier, box, results = threading.Barrier(ranks), {}, {}

        def work(rank):
            def total(tensor):
                box[rank] = tensor
                barrier.wait()
                result = sum(box[r] for r in range(ranks))
                barrier.wait()
                return result

            results[rank] = list(hessian.statistics(kind, log, shares[rank], total, rotated, "cpu"))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        tensors = results[0]
    for (dtype, shape), tensor in zip(layout.values(), tensors, strict=True):
        assert (tensor.dtype, list(tensor.shape)) == (dtype, shape)
    return {name.removeprefix("layer."): tensor for name, tensor in zip(layout, tensors, strict=True)}


def solver(log, kind, damping=0.1, absolute=None, **options):
    stats = stats_of(log, kind, **options)
    return hessian.preconditioner(kind, stats, damping, absolute, log.grads.float() if "gram" in stats else None)


def close(got, expected, tolerance=1e-4):
    return (got.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("kind", ["raw", "kfac", "ekfac"])
@pytest.mark.parametrize("examples", [K - 6, K, 3 * K])
@pytest.mark.parametrize("ranks", [1, 3])
def test_inverse_is_the_dense_one(kind, examples, ranks):
    """(C + lambda I)^-1 g and g^T (C + lambda I)^-1 g; raw also in its dual, for more and fewer examples than k."""
    log = FakeLog(examples)
    cov = reference.dense_hessian(kind, log.grads, log.xs, log.ds)
    g = torch.randn(3, K, dtype=torch.float64)
    for damping, absolute in ((0.1, None), (0.01, None), (0.1, 0.7)):
        lam = absolute or damping * cov.trace() / K
        expected = torch.linalg.solve(cov + lam * torch.eye(K), g.T).T
        found = solver(log, kind, damping, absolute, ranks=ranks)
        assert close(found.solve(g.float()), expected)
        assert close(found.quadratic(g.float()), (expected * g).sum(1))


def test_the_dual_keeps_its_precision_for_many_weights():
    """N far below k, with a direction that all gradients share: within 1% of the exact solution."""
    examples, k = 40, 200_000
    grads = torch.randn(examples, k, dtype=torch.float64) + 20 * torch.randn(k, dtype=torch.float64)
    gram = hessian.gram_rows([grads[:25].float(), grads[25:].float()], [range(40)])
    stats = {"gram": gram, "examples": torch.tensor(examples)}
    found = hessian.preconditioner("raw", stats, 0.1, None, grads.float())
    grads = grads.float().double()
    lam = 0.1 * grads.square().sum() / examples / k
    inner = torch.linalg.solve(grads @ grads.T + examples * lam * torch.eye(examples), grads @ grads[:3].T)
    expected = (grads[:3] - inner.T @ grads) / lam @ grads.T
    assert close(found.solve(grads[:3].float()).double() @ grads.T, expected, 0.01)


def test_a_damping_that_is_too_small_is_refused():
    """A Cholesky factor that does not exist is one line, not a traceback."""
    with pytest.raises(ValueError, match="raise --damping"):
        hessian.DensePreconditioner(-torch.eye(3), 0.5)


def test_damping_takes_effect_each_time():
    """The same statistics with two dampings give two answers."""
    log = FakeLog(40)
    g = torch.randn(1, K)
    for kind in ("raw", "kfac", "ekfac"):
        one, two = (solver(log, kind, damping).solve(g) for damping in (0.1, 0.2))
        assert (one - two).norm() / one.norm() > 0.01


def test_rotated_store_gives_the_same_ekfac():
    """Gradients stored in the eigenbasis, with eigenvalues as means of squares: the same EK-FAC as by a second pass."""
    log = FakeLog(30)
    sums = stats_of(log, "kfac")
    u_a, u_b = projection.eigenbasis(sums["A"])[1], projection.eigenbasis(sums["B"])[1]
    turned = FakeLog(30)
    turned.xs, turned.ds = [x @ u_a.T for x in log.xs], [d @ u_b.T for d in log.ds]
    turned.grads = torch.stack([(d.T @ x).flatten() for d, x in zip(turned.ds, turned.xs, strict=True)])
    g, h = torch.randn(2, K, dtype=torch.float64)
    rotate = torch.kron(u_b, u_a)
    plain = h @ solver(log, "ekfac").solve(g[None].float())[0].double()
    rotated = (rotate @ h) @ solver(turned, "ekfac", rotated=True).solve((rotate @ g)[None].float())[0].double()
    assert abs(plain - rotated) < 1e-4 * abs(plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["raw", "kfac", "ekfac", "none"])
def test_scores_by_definition(mode, kind, tmp_path):
    """Two layers: terms are summed over layers first, then root and half are taken."""
    logs = [FakeLog(30), FakeLog(30)]
    queries = [torch.randn(4, K, dtype=torch.float64) for _ in logs]
    dots, own = 0, 0
    for log, q in zip(logs, queries, strict=True):
        cov = reference.dense_hessian(kind, log.grads, log.xs, log.ds) if kind != "none" else torch.eye(K).double()
        lam = 0.1 * cov.trace() / K if kind != "none" else 0
        dots = dots + reference.scores(q, log.grads, cov, lam, "dot")
        own = own + 2 * (
            reference.scores(q, log.grads, cov, lam, "dot") - reference.scores(q, log.grads, cov, lam, "l2")
        )
    expected = {"dot": dots, "cosine": dots / own.sqrt(), "l2": dots - own / 2}[mode]
    solvers = [solver(log, kind) if kind != "none" else hessian.preconditioner("none", {}, 0.1) for log in logs]
    solved = {str(i): s.solve(q.float()) for i, (s, q) in enumerate(zip(solvers, queries, strict=True))}
    block = {str(i): log.grads.float() for i, log in enumerate(logs)}
    self_influence = sum(s.quadratic(log.grads.float()) for s, log in zip(solvers, logs, strict=True))
    dots = sum(p @ block[layer].T for layer, p in solved.items())
    assert close(influence.scores_of_mode(dots, self_influence, mode), expected)
    shards, files = [range(20), range(20, 30)], []
    for shard, ids in enumerate(shards):
        grads = {layer: z[ids.start : ids.stop].contiguous() for layer, z in block.items()}
        layouts = {
            "gradients": store.gradient_layout(dict.fromkeys(block, (R_OUT, R_IN)), len(ids), "float32"),
            "factors": {},
        }
        files.append(store.Shard(tmp_path, shard, ids, layouts))
        files[-1].write(grads, {})
    own = {str(i): [s.quadratic] for i, s in enumerate(solvers)}
    doubled = {layer: torch.cat([p, p]) for layer, p in solved.items()}
    found = influence.score_shards(lambda i: files[i].open(), range(2), doubled, own, "cpu")
    for (shard, streamed, selves), n in zip(found, (20, 10), strict=True):
        part = slice(20 * shard, 20 * shard + n)
        rows = streamed[""].T.double()
        assert close(rows[:4], dots[:, part].double()) and close(rows[4:8], dots[:, part].double())
        assert close(selves[0], self_influence[part].double())


def test_zero_gradients_add_nothing():
    """A layer of zero gradients gives 0, not NaN; a self-influence of 0 gives cosine 0."""
    for kind in ("raw", "kfac", "ekfac"):
        for examples in (10, 40):
            log = FakeLog(examples)
            log.grads = log.grads * 0
            log.xs, log.ds = [x * 0 for x in log.xs], [d * 0 for d in log.ds]
            found = solver(log, kind)
            assert not found.solve(torch.randn(2, K)).any() and not found.quadratic(torch.randn(2, K)).any()
    dots = torch.tensor([[1.0, 2.0]])
    assert influence.scores_of_mode(dots, torch.tensor([0.0, 4.0]), "cosine").tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_damping_is_refused(damping):
    """Damping is positive and finite."""
    with pytest.raises(ValueError, match="positive"):
        hessian.damping_lambda(1.0, 4, damping, None)
    with pytest.raises(ValueError, match="positive"):
        hessian.damping_lambda(1.0, 4, 0.1, damping)


def test_top_k_breaks_ties_by_id():
    """Best first; equal scores in the order of ids, from both ends."""
    scores = torch.tensor([1.0, 3.0, 3.0, -1.0])
    assert influence.top_k(scores, 3).tolist() == [1, 2, 0]
    assert influence.top_k(scores, 2, largest=False).tolist() == [3, 0]
