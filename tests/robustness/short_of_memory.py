"""A script, the first argument, whose memory runs out: FAULTS has places, the next for each batch of several examples.

Places: forward (in the last block), backward (in the first block), gather (an all-gather's buffer), batch (before the
model runs), none. RANKS holds the ranks that this befalls. QUERIES is the number of queries of a pass.
"""

import importlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from logra.models.model import blocks
from logra.runtime import flags, fsdp
from logra.scoring import score
from logra.stages import gradients

faults = os.environ["FAULTS"].split(",") if os.environ.get("RANK", "0") in os.environ["RANKS"].split(",") else []
armed = set()


def fail(place: str) -> None:
    if place in armed:
        armed.remove(place)
        raise torch.OutOfMemoryError(f"simulated, in {place}")


original = gradients.run_batch


def run_batch(model, capture, token_ids, counted=None):
    if not hasattr(model, "faults"):
        model.faults = True
        first, last = blocks(model)[0], blocks(model)[-1]
        last.register_forward_pre_hook(lambda *_: fail("forward"))
        first.mlp.register_full_backward_pre_hook(lambda *_: fail("backward"))
    if faults and len(token_ids) > 1:
        armed.add(faults.pop(0))
    fail("batch")
    return original(model, capture, token_ids, counted)


allocate = fsdp._RecordedAllGather.allocate


def failing_allocate(self, *args, **kwargs):
    fail("gather")
    return allocate(self, *args, **kwargs)


give_way = gradients.Extractor._shrink_batches


def give_way_once(self, size, examples):
    """Keep the batches large, so that every fault finds one of several examples."""
    before = self.batch_tokens
    give_way(self, size, examples)
    self.batch_tokens = before


gradients.run_batch, gradients.Extractor._shrink_batches = run_batch, give_way_once
fsdp._RecordedAllGather.allocate = failing_allocate
scorer_init = score.Scorer.__init__


def scorer_of_few_queries(self, *args):
    scorer_init(self, *args)
    self.queries_per_pass = self.queries_per_step = int(os.environ["QUERIES"])


score.Scorer.__init__ = scorer_of_few_queries
if __name__ == "__main__":
    script = importlib.import_module(sys.argv.pop(1))
    flags.run_script(script.main, script.build_parser())
