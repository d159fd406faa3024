"""Batches: a gradient depends neither on the batch nor on memory that runs out."""

import pytest
import torch
from conftest import CONFIGS, make_model
from helpers import compute_gradients, draw_projections, random_ids, relative

from logra.hooks import GradientCapture
from logra.quantise import ScoreErrorEstimate
from logra.runtime.memory import is_out_of_memory
from logra.stages import gradients
from logra.stages.gradients import Extractor


@pytest.mark.parametrize("name", [*CONFIGS, "longrope"])
def test_a_gradient_does_not_depend_on_the_batch(name):
    """Alone, among others, in batches of any size: the same to 1e-5. Also where a model reads the longest length."""
    model = make_model(name)
    _, projections = draw_projections(model)
    ids = random_ids([12, 3, 20, 1, 9, 20])
    with GradientCapture(model, projections) as capture:
        together = compute_gradients(model, capture, ids, 10**6, None)
        alone = compute_gradients(model, capture, ids, 10**6, 1)
        some = compute_gradients(model, capture, ids, 40, None)
    for layer in together:
        assert relative(together[layer], alone[layer]) < 1e-5
        assert relative(some[layer], alone[layer]) < 1e-5
        assert not together[layer][3].any(), "a document of one token has no loss"


def test_batches_give_way_to_memory(model, monkeypatch):
    """Where memory runs out for a batch it is halved, and later ones are smaller; rows and sums stay exact."""
    _, projections = draw_projections(model)
    ids, said = random_ids([12, 3, 20, 1, 9, 20, 20, 18]), []
    with GradientCapture(model, projections, factors=True) as capture:
        expected, sums = Extractor(model, capture, 10**6).gradients(ids).wait()
        original, sizes = gradients.run_batch, []

        def short(model, capture, token_ids, counted=None):
            sizes.append(len(token_ids) * max(map(len, token_ids)))
            grads = original(model, capture, token_ids, counted)
            if sizes[-1] > 45:
                raise torch.OutOfMemoryError("simulated")
            return grads

        monkeypatch.setattr(gradients, "run_batch", short)
        monkeypatch.setattr(gradients, "say", said.append)
        extractor = Extractor(model, capture, 10**6)
        got, factors = extractor.gradients(ids).wait()
        assert said[0] == "out of memory with 160 tokens in a batch; going on with 80" and len(said) == 2
        assert all(relative(got[layer], expected[layer]) < 1e-5 for layer in expected)
        assert all(relative(factors[key], total) < 1e-5 for key, total in sums.items())
        sizes.clear()
        extractor.gradients(ids).wait()
        assert max(sizes) <= 45, "what was found out is kept"
        assert extractor.find_batch_tokens(10, 100) in (10, 20, 40) and max(sizes) <= 80
        with pytest.raises(ValueError, match=r"memory for an example of 46 tokens.*--gradient_checkpointing"):
            extractor.gradients(random_ids([46]))


def test_an_example_without_tokens(model):
    """A document that a tokenizer turns into nothing stays, with zero gradient, beside others."""
    _, projections = draw_projections(model)
    with GradientCapture(model, projections) as capture:
        grads = compute_gradients(model, capture, [*random_ids([6]), []], 10**6, None)
    assert all(g[0].any() and not g[1].any() for g in grads.values())


def test_memory_that_runs_out_while_gradients_are_packed(model, monkeypatch):
    """Packing is part of the attempt: the batch is halved, and gradients and the rounding error are as without it."""
    _, projections = draw_projections(model)
    ids = random_ids([12, 3, 20, 1, 9, 20])
    values = {layer: (torch.ones(p.p_in.shape[0]), torch.ones(p.p_out.shape[0])) for layer, p in projections.items()}

    def run(extractor: Extractor) -> tuple[dict, float]:
        gradients_on_host = extractor.gradients(
            ids, None, 0, "int8", score_error=ScoreErrorEstimate(values, "int8", 0.1)
        )
        return gradients_on_host.wait()[0], gradients_on_host.score_error.result()

    with GradientCapture(model, projections, factors=True) as capture:
        extractor = Extractor(model, capture, 60)
        expected, error = run(extractor)
        packing, failures = gradients.stored_tensors, [True, False, True]

        def short(layer, grads, store_dtype):
            if len(grads) > 1 and failures and failures.pop():
                raise torch.AcceleratorError("CUDA error: out of memory", 2)
            return packing(layer, grads, store_dtype)

        monkeypatch.setattr(gradients, "stored_tensors", short)
        monkeypatch.setattr(gradients, "say", lambda text: None)
        extractor.batch_tokens = 60
        found, found_error = run(extractor)
    assert not failures and all(
        torch.allclose(found[name].float(), expected[name].float(), atol=1) for name in expected
    )
    assert error > 0 and found_error == 0, "the first part that succeeded has a single example, which has no pair"


def test_the_device_of_a_gradient_decides_about_streams(model, monkeypatch):
    """A model on the CPU needs no stream, whatever the machine has (the README's example, accelerate launch --cpu)."""
    _, projections = draw_projections(model)
    ids = random_ids([12, 3])
    with GradientCapture(model, projections) as capture:
        expected = compute_gradients(model, capture, ids, 10**6)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        found = compute_gradients(model, capture, ids, 10**6)
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_errors_of_memory(message, is_memory):
    """Each form in which torch and cuBLAS say that memory ran out, and none that says something else."""
    assert is_out_of_memory(RuntimeError(message)) == is_memory
