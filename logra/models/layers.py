"""Choose the layers to track, and say what share of the model's parameters they hold.

A layer is a matrix that a module multiplies with one input per token. All other parameters are left out, and said.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from logra import experts
from logra.hooks import GradientCapture
from logra.loss import hidden_states, input_device
from logra.models.model import tokenizer_fingerprint
from logra.projection import Shapes, identity, projected_shapes, rank_for_bytes
from logra.quantise import stored_bytes
from logra.runtime.progress import say
from logra.runtime.settings import RunSettings

ATTENTION = r"att(entio)?n"
_MLP = (
    r"mlp|ffn|feed_?forward|expert|moe|(^|\.)ff\.|(^|\.)fc(\d|_in|_out)"
    r"|(^|\.)(up|down)_proj$|\d\.(intermediate|output)\.dense$"  # Nemotron-H; BERT
)
_NOT_MLP = r"router|(^|\.)(shared_expert_)?gate(\.|$)"
MLP_PATTERN = rf"^(?!.*({ATTENTION}|{_NOT_MLP})).*({_MLP})"
EXPERT = r"experts?\.\d+\."  # in a module of its own
PROBE_TOKENS = 8
TRACKED, EMBEDDING, NO_GRADIENT = "tracked", "embedding and head", "(no gradient per token)"  # kinds of parameters
SHOWN_KINDS = 6
FEW = 0.25  # of the parameters besides embedding and head


class Matrix(NamedTuple):
    """A matrix that can be tracked.

    Attributes:
        layer: Its name in run.json.
        parameter: Name of the parameter that holds it.
        shape: (d_out, d_in).
    """

    layer: str
    parameter: str
    shape: tuple[int, int]


def _matrices_of(name: str, module: nn.Module) -> list[Matrix]:
    """Return what a module contributes. A layer of experts bears the name of its parameter."""
    if isinstance(module, nn.Linear) and not type(module).__name__.endswith("Router"):  # such a one returns a tuple
        return [Matrix(name, f"{name}.weight", (module.out_features, module.in_features))]
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return [Matrix(name, f"{name}.weight", (d_out, d_in))]
    return [Matrix(layer, layer, shape) for layer, shape in experts.matrices(name, module).items()]


def _matrices(model: PreTrainedModel) -> Iterator[Matrix]:
    """Yield all matrices that can be tracked, in the model's order: not those of the embedding and the head.

    A weight that several modules share is one matrix.
    """
    head, parameters = model.get_output_embeddings(), {name for name, _ in model.named_parameters()}
    for name, module in model.named_modules():
        if module is not head:
            yield from (matrix for matrix in _matrices_of(name, module) if matrix.parameter in parameters)


def choose_layers(model: PreTrainedModel, mlp_only: bool, pattern: str | None) -> Shapes:
    """Return layer name -> (d_out, d_in) of the tracked layers, in the model's order.

    Layers that don't get one gradient per token of a text are left out: vision and audio towers, cross attention
    without an encoder, further heads, layers that run on parts of a token's vector. A pass over a few tokens
    finds them. With FSDP all ranks must call this together.

    Args:
        model: It may be sharded, offloaded or in FakeTensorMode.
        mlp_only: Track MLP matrices only: experts and shared experts too, routers not.
        pattern: Track only layers in whose name this regular expression is found.

    Raises:
        ValueError: No layer is left, or some are experts of which a router chooses; or, without a pattern, there are
            experts that can't be tracked.
    """
    matrices = list(_matrices(model))
    if (unknown := _unknown_experts(model)) and not pattern:
        raise ValueError(
            f"expected experts that use transformers' common interface, got {unknown} in {type(model).__name__}; "
            "choose other layers with --layers"
        )
    selected = {m.layer: m.shape for m in matrices if _is_selected(m.layer, mlp_only, pattern)}
    if not selected:
        raise ValueError(_nothing_selected(model, matrices, mlp_only, pattern))
    reached = _reached(model, selected)
    shapes = {layer: shape for layer, shape in selected.items() if layer in reached}
    for layer in selected.keys() - reached:
        if re.search(EXPERT, layer):
            raise ValueError(
                f"expected layers that run on every token, got {layer}, an expert that a router chooses; leave experts "
                "out with --layers"
            )
    if not shapes:
        raise ValueError(
            f"expected layers that get one gradient per token of a text, got none in {_kinds(selected)}; choose others"
        )
    return shapes


def _unknown_experts(model: nn.Module) -> str | None:
    """Return the first module of experts that have code of their own, with its type; None if there is none."""
    for name, module in model.named_modules():
        holds_matrix = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        known = isinstance(module, nn.Linear | Conv1D) or experts.is_experts(module)
        if "Expert" in type(module).__name__ and holds_matrix and not known:
            return f"{name} ({type(module).__name__})"
    return None


def _is_selected(layer: str, mlp_only: bool, pattern: str | None) -> bool:
    is_mlp = bool(re.search(MLP_PATTERN, layer, re.IGNORECASE))
    return (is_mlp or not mlp_only) and (pattern is None or bool(re.search(pattern, layer)))


def _nothing_selected(model: PreTrainedModel, matrices: list[Matrix], mlp_only: bool, pattern: str | None) -> str:
    """Return the message of an error: no layer matches the flags."""
    flags = " and ".join(["--mlp_only"] * mlp_only + [f"--layers {pattern!r}"] * bool(pattern))
    if not matrices:
        return f"expected layers of type nn.Linear or Conv1D in {type(model).__name__}, got none; use another model"
    remedy = "leave out --mlp_only, or give" if mlp_only else "give"
    return (
        f"expected layers of {type(model).__name__} that match {flags}, got none; {remedy} --layers PATTERN, e.g. "
        f"{_kinds(matrix.layer for matrix in matrices)}"
    )


def _kinds(layers: Iterable[str]) -> str:
    r"""Return up to three kinds of layers as regular expressions, numbers as \d+."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", r"\\d+", layer) for layer in layers))
    return ", ".join(kinds[:3]) + (" ..." if len(kinds) > 3 else "")


class _Probe(GradientCapture):
    """Finds the layers that a loss depends on, but those that run on several parts of each token's vector."""

    def __init__(self, model: nn.Module, shapes: Shapes):
        super().__init__(model, identity(shapes), grads=False)
        self.reached = set[str]()

    def _collect(self, name: str, x: Tensor, d: Tensor) -> None:
        parts, rest = divmod(x.shape[:-1].numel(), PROBE_TOKENS)
        if parts == 1 or rest:  # check_layers refuses the rest
            self.reached.add(name)


def _reached(model: PreTrainedModel, shapes: Shapes) -> set[str]:
    """Return the layers that get a gradient from a few tokens; see _Probe."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(PROBE_TOKENS, device=input_device(model))[None] % vocabulary
    with _Probe(model, shapes) as probe:
        hidden = hidden_states(model, ids)
        if hidden.requires_grad:
            hidden.float().sum().backward()
    return probe.reached


def describe(
    model: PreTrainedModel, weights_hash: str, tokenizer: PreTrainedTokenizerBase, settings: RunSettings
) -> dict[str, Any]:
    """Return the entries of run.json that identify a model.

    Args:
        model: The model.
        weights_hash: Fingerprint of its weights.
        tokenizer: Its tokenizer.
        settings: Of the run; they choose layers and ranks.

    Returns:
        `model` (class, fingerprint), `tokenizer` (fingerprint), `layers` (name -> [d_out, d_in, r_out, r_in]).
    """
    shapes = choose_layers(model, settings.mlp_only, settings.layers)
    rank_in, rank_out = settings.rank_in, settings.rank_out
    if settings.bytes_per_example:
        layer_bytes = partial(stored_bytes, store_dtype=settings.store_dtype)
        rank_in = rank_out = rank_for_bytes(shapes, settings.bytes_per_example, layer_bytes)
    projected = projected_shapes(shapes, rank_in, rank_out)
    return {
        "model": {"class": type(model).__name__, "fingerprint": weights_hash},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "layers": {layer: [*shapes[layer], *projected[layer]] for layer in shapes},
    }


def say_coverage(model: PreTrainedModel, layers: Iterable[str], mlp_only: bool, pattern: str | None) -> None:
    """Print the share of the model's parameters that the tracked layers hold, and the largest kinds of others.

    Args:
        model: The model.
        layers: The layers that choose_layers chose with these flags.
        mlp_only, pattern: See choose_layers.
    """
    matrices, tracked = list(_matrices(model)), set(layers)
    sizes = {m.parameter: math.prod(m.shape) for m in matrices}  # the parameters of quantised weights are packed
    weights = {id(model.get_parameter(m.parameter)) for m in matrices if m.layer in tracked}
    selected = [m.layer for m in matrices if _is_selected(m.layer, mlp_only, pattern)]
    unreached = _unreached_modules(tracked, selected)
    kinds = Counter[str]()
    for name, parameter in model.named_parameters():  # a tied parameter comes once
        kind = TRACKED if id(parameter) in weights else _kind(model, name, parameter, unreached, mlp_only)
        kinds[kind] += sizes.get(name, parameter.numel())
    total, size = kinds.total(), kinds.pop(TRACKED)
    parts = [f"{kind} {number / total:.1%}" for kind, number in kinds.most_common(SHOWN_KINDS)]
    parts += ["..."] if len(kinds) > SHOWN_KINDS else []
    say(f"tracked {size / total:.1%} of {total:,} parameters; left out: {', '.join(parts) or 'none'}")
    others = sum(number for kind, number in kinds.items() if kind == EMBEDDING or kind.endswith(NO_GRADIENT))
    if size < FEW * (total - others) and not pattern:
        say("WARNING: less than a quarter of the parameters besides embedding and head are tracked")


def _unreached_modules(tracked: set[str], selected: list[str]) -> tuple[str, ...]:
    """Return prefixes of parameters: the highest modules that hold selected layers, but none that is tracked."""
    in_use = {prefix for layer in tracked for prefix in _prefixes(layer)}
    return tuple({next(p for p in _prefixes(layer) if p not in in_use) for layer in selected if layer not in tracked})


def _prefixes(name: str) -> list[str]:
    """Return a., a.b. and a.b.c. for a.b.c."""
    return [name[: dot.start()] + "." for dot in re.finditer(r"\.|$", name)]


def _kind(model: nn.Module, name: str, parameter: nn.Parameter, unreached: tuple[str, ...], mlp_only: bool) -> str:
    """Return what kind of parameter is left out, for a reader."""
    module = model.get_submodule(name.rpartition(".")[0])
    if name.startswith(unreached):
        root = next(root for root in unreached if name.startswith(root))
        return f"{_last_parts(root)} {NO_GRADIENT}"
    if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
        return EMBEDDING
    if parameter.dim() < 2:
        return "norms and biases"
    if mlp_only and re.search(ATTENTION, name, re.IGNORECASE):
        return "attention"
    return _last_parts(name.removesuffix(".weight"))


def _last_parts(name: str) -> str:
    """Return the last two parts of a name that are not numbers."""
    return ".".join([part for part in name.split(".") if part and not part.isdigit()][-2:])
