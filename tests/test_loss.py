"""The fused loss is the model's own; a head that is not reproduced is refused, and a model that is not causal."""

import gc
import logging
import weakref

import pytest
import reference
import torch
from conftest import LLAMA, VOCAB, make_model
from helpers import draw_projections, random_ids, relative
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from logra import loss
from logra.hooks import GradientCapture
from logra.models.model import blocks
from logra.stages.batches import make_batch
from logra.stages.gradients import run_batch


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "opt", "llama4", "bert"])
def test_other_heads(name):
    """Soft-capped and scaled logits, OPT's layers, and layers between base_model and head are exact too."""
    model = make_model(name)
    loss.check_head(model)
    shapes, projections = draw_projections(model)
    ids = random_ids([8, 13])
    with GradientCapture(model, projections) as capture:
        grads = run_batch(model, capture, ids)
    for row, example in enumerate(ids):
        for layer, g in reference.full_gradient(model, shapes, example).items():
            assert relative(grads[layer][row], reference.project(g, *projections[layer][:2])) < 2e-5, layer


def family(name: str, **fields):
    """Return a tiny model of a family of transformers; older versions lack some."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**LLAMA | fields)).eval()


MAMBA = {"mamba_d_ssm": 24, "mamba_n_heads": 2, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_chunk_size": 4}
INKLING = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
           "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 6}  # fmt: skip
MINICPM = {"num_key_value_heads": 4, "dim_model_base": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
NEXT = {"linear_key_head_dim": 6, "linear_value_head_dim": 6, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]}  # fmt: skip
JAMBA = {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 4}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 24}),
        ("xlstm", {"output_logit_soft_cap": 2.0, "num_heads": 2}),
        ("falcon_h1", {"lm_head_multiplier": 0.3, **MAMBA}),
        ("hyperclovax", {"logits_scaling": 0.3}),
        ("minicpm3", MINICPM),
        ("inkling_text", {"unpadded_vocab_size": VOCAB - 20, **INKLING}),
        ("mpt", {"logit_scale": "inv_sqrt_d_model", "d_model": 24, "n_heads": 2, "n_layers": 2}),
        ("electra", {"is_decoder": True, "embedding_size": 16}),
        ("rembert", {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 20}),
        ("modernbert-decoder", {}),
        ("qwen3_next", NEXT),
        ("jamba", JAMBA),
    ],
)
def test_families(name, fields):
    """The loss of texts padded to one length is that of the model's own logits of each text, and so is its gradient."""
    torch.manual_seed(0)
    model = family(name, **fields)
    loss.check_head(model)
    ids = [[token % (VOCAB - 20) for token in row] for row in random_ids([21, 10, 13])]
    batch, parameters = make_batch(ids), [p for p in blocks(model).parameters() if p.requires_grad]
    losses = loss.example_losses(model, batch.input_ids, batch.targets, batch.rows)
    grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
    texts = [torch.tensor([row]) for row in ids]
    logits = [model(input_ids=text, use_cache=False).logits[0] for text in texts]
    alone = torch.stack([cross_entropy(logits[i][:-1], texts[i][0, 1:], reduction="sum") for i in range(3)])
    assert relative(losses.detach(), alone.detach()) < 1e-5
    expected = torch.autograd.grad(alone.sum(), parameters, allow_unused=True, materialize_grads=True)
    assert relative(*(torch.cat([g.flatten() for g in side]) for side in (grads, expected))) < 1e-4


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("bert", {}, "expected a causal model, got BertLMHeadModel"),
        ("xmod", {"is_decoder": True}, "XmodForCausalLM, which fails: ValueError, Input language unknown"),
    ],
)
def test_refused_families(name, fields, words):
    """A model that is not causal or needs more than token ids is refused in one line."""
    with pytest.raises(ValueError, match=words) as refused:
        loss.check_head(family(name, **fields))
    assert "\n" not in str(refused.value)


def test_a_forward_pass_that_stops_leaves_nothing():
    """The head's input is freed with its last name, without the garbage collector: it can be large."""
    model = make_model("llama")
    gc.disable()
    hidden = loss.hidden_states(model, torch.ones(1, 4, dtype=torch.long))
    freed = weakref.ref(hidden)
    del hidden
    gc.enable()
    assert freed() is None and not model.lm_head._forward_pre_hooks


def test_no_advice_on_attention_masks():
    """GPT-2 does not ask for an attention_mask where a text begins with the padding token: none is needed."""
    model, said = make_model("gpt2"), []
    model.config.pad_token_id = 7
    logger, handler = logging.getLogger("transformers.modeling_utils"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.warning_once.cache_clear()
    loss.hidden_states(model, torch.full((1, 4), 7))
    logger.removeHandler(handler)
    assert not said


def test_losses(model):
    """The fused loss is the plain one, to 1e-5, whatever the chunk."""
    ids = random_ids([14, 10, 2])
    expected = torch.tensor([reference.example_loss(model, row) for row in ids])
    batch = make_batch(ids)
    for chunk in (2**25, 16 * VOCAB):
        loss.CHUNK_LOGITS, before = chunk, loss.CHUNK_LOGITS
        assert relative(loss.example_losses(model, batch.input_ids, batch.targets).detach(), expected) < 1e-5
        loss.CHUNK_LOGITS = before


def test_a_model_that_changes_its_logits_is_refused():
    """check_head notices a transformation that is not reproduced."""
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda m, a, output: output if len(a[0].shape) == 2 else output * 2)
    model.model.register_forward_hook(lambda m, a, output: output)
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = forward
    with pytest.raises(ValueError, match="not supported"):
        loss.check_head(model)
