"""A tiny random model of each causal-LM family of transformers, and what --verify says of it.

    python tests/families/families.py --write    # writes docs/models.md, about six minutes on 2 cores
    python tests/families/families.py llama xlm  # the outcomes of these families, with all that is printed

A family is a model type of transformers. Its model is saved as a checkpoint on the Hub would be: with all its parts.
"""

import argparse
import contextlib
import dataclasses
import io
import multiprocessing
import re
import sys
import tempfile
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import VOCAB, make_texts, make_tokenizer, run_cli, write_jsonl  # noqa: E402  it sets HF_HUB_OFFLINE

# isort: split
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

PAGE = ROOT / "docs/models.md"
FLAGS = "--model_name model --data_name docs.jsonl --log_dir log --rank 2 --block_size 32".split()
UNUSED_TOKEN = 200  # a byte that no text holds; stands for images and sounds
MAX_PARAMETERS = 350_000
SIZES = {
    VOCAB: "vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions mamba_d_ssm",
    32: "hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size input_embedding_size mm_embed_dim "
        "index_n_heads "  # of few, an indexer's scores are often 0: such ties break differently in another batch
        "output_embedding_size hidden_size_global out_hidden_size vision_output_dim projector_input_dim "
        "projector_output_dim adapter_in_dim adapter_out_dim adapter_input_size output_proj_dims audio_embed_dim "
        "backbone_hidden_size ext_pw_out_channel depthwise_separable_out_channel base_channels",
    48: "intermediate_size d_ff ffn_dim n_inner dff dim_ff d_inner decoder_ffn_dim encoder_ffn_dim feed_forward_size "
        "ffn_hidden_size dense_intermediate_size intermediate_size_mlp mlp_dim encoder_hash_byte_group_vocab "
        "ngram_vocab_size_base",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size image_size mamba_head_dim crop_size "
        "num_position_embeddings position_embedding_size mm_posemb_size codebook_size router_hidden_size",
    12: "q_lora_rank",
    8: "head_dim d_kv v_head_dim swa_head_dim kv_lora_rank index_head_dim attention_head_size kv_channels dim_head "
       "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state state_size ssm_state_size chunk_size "
       "mamba_chunk_size sliding_window attention_window_size local_attention window_size attention_chunk_size "
       "hc_lowrank o_lora_rank hidden_size_per_layer_input laurel_rank output_channels adapter_rank indexer_head_dim "
       "nemo_conv_channels downsample_hidden_size shape_embed_dim pronunciation_embed_dim indexer_budget",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
       "num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads num_experts "
       "n_routed_experts num_local_experts moe_num_experts mamba_n_heads n_mamba_heads linear_num_value_heads "
       "linear_num_heads qk_rope_head_dim qk_nope_head_dim rotary_dim patch_size mamba_num_heads "
       "num_buckets local_attn_chunk_length lsh_attn_chunk_length",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
       "num_encoder_layers num_key_value_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k depth "
       "linear_num_key_heads index_topk n_groups num_blocks num_global_layers o_groups heads_per_ngram "
       "zero_expert_num num_filters indexer_n_heads indexer_compress_ratio",
    1: "n_group topk_group first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts mamba_n_groups "
       "indexer_kv_heads",
}  # fmt: skip
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()} | {
    "initializer_range": 0.2, "is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2, "sep_token_id": 3,
}  # fmt: skip
ALL_HEADS = {"num_key_value_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TWO_KINDS = ["sliding_attention", "full_attention"]
SHARED_BLOCK = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
LATENT = {"num_attention_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "head_dim": 8, "qk_nope_head_dim": 4}
# What else a model type needs, types of parts (vision_config and so on) included: field -> value
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": ALL_HEADS,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": TWO_KINDS, "rope_parameters": dict.fromkeys(TWO_KINDS, ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": ALL_HEADS,
    "deepseek_v4": {
        "num_key_value_heads": 1, "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots3_note_text": ALL_HEADS | {f"swa_{key}": value for key, value in (ALL_HEADS | LATENT).items()},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"]},
    "emu3": {"vocabulary_map": {"<image>": UNUSED_TOKEN, "<|extra_200|>": UNUSED_TOKEN + 1}},
    "emu3_vqgan": {"channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [], "num_attention_heads": 1},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": TWO_KINDS * 2, "num_kv_shared_layers": 2},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2
        }
    },
    "gemma4_audio": {"subsampling_conv_channels": [8, 8]},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm_moe_dsa": ALL_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"head_dim": 16},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "qwen4_exp_text": {"ple_layer_ids": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": SHARED_BLOCK,
    "zamba2": SHARED_BLOCK,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# transformers 5.23 can't build these: one needs the package timm, the others' configurations are refused whatever
# num_kv_shared_layers is. Their checkpoint has a configuration and no weights.
NOT_BUILT = ("gemma3n", "gemma4_assistant", "gemma4_unified_assistant")


@cache
def families() -> dict[str, type[PretrainedConfig]]:
    """Return model type -> class of its configuration."""
    return {found.model_type: found for found in sorted(MODEL_FOR_CAUSAL_LM_MAPPING, key=lambda c: c.model_type)}


def small_config(config_class: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """Return a configuration with small sizes, and one layer of each kind that its default has."""
    overrides = OVERRIDES.get(config_class.model_type, {}) | overrides
    fields, values = {field.name: field.default for field in dataclasses.fields(config_class)}, {}
    for name, default in fields.items():
        if name in SMALL:
            values[name] = SMALL[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(default, int):
            values[name] = UNUSED_TOKEN + len(values)
    if "layer_types" in fields:
        kinds = list(dict.fromkeys(config_class().layer_types or []))
        if len(kinds) > 1:
            values |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    for part, part_class in config_class.sub_configs.items():
        if part_class is AutoConfig:
            part_class = CONFIG_MAPPING[config_class.sub_configs_defaults[part].model_type]
        values[part] = small_config(part_class, **overrides.pop(part, {}))
    return config_class(**values | overrides)


def build(family: str) -> PreTrainedModel:
    """Return a tiny random model, biases and norms included."""
    config_class = families()[family]
    config, model_class = small_config(config_class), MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if config.sub_configs and not isinstance(config, model_class.config_class):
        # transformers loads the text part of such a checkpoint, which holds the other parts too
        whole = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING)
        model_class = next(mapping[config_class] for mapping in whole if config_class in mapping)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert size <= MAX_PARAMETERS, f"{family}: {size} parameters; add its sizes to SIZES"
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Outcome(NamedTuple):
    """What extract_log.py ended with.

    Attributes:
        verdict: `passes`, `refused` (one line, before or without a failed check) or `fault`.
        reason: That line, or what went wrong.
        output: All that was printed, but for progress bars.
    """

    verdict: str
    reason: str
    output: str


def outcome(*flags: str) -> Outcome:
    """Run extract_log.py on the model in the working directory."""
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run_cli("extract_log", *FLAGS, *flags)
        except Exception:
            traceback.print_exc()
    errors = [line for line in err.getvalue().splitlines() if line.strip() and not re.search(r"\[\d\d:\d\d.*/s", line)]
    failed = [" ".join(line.split()) for line in out.getvalue().splitlines() if "  FAIL  " in line]
    output = "\n".join([out.getvalue(), *errors])
    if status == 0 and not failed and not errors:
        return Outcome("passes", "", output)
    if status == 2 and not failed and len(errors) == 1:
        return Outcome("refused", errors[0].partition("error: ")[2], output)
    return Outcome("fault", "; ".join(failed) or errors[-1], output)


def outcomes(family: str) -> tuple[Outcome, Outcome]:
    """Return the outcomes of --verify, with --mlp_only and with all layers. A fault of --dry_run is one of both."""
    with tempfile.TemporaryDirectory(prefix="family-") as temporary, contextlib.chdir(temporary):
        made = small_config(families()[family]) if family in NOT_BUILT else build(family)
        for part in (made, make_tokenizer()):
            part.save_pretrained("model")
        if family in NOT_BUILT:
            save_file({}, "model/model.safetensors", {"format": "pt"})
        write_jsonl(Path("docs.jsonl"), [{"text": text} for text in make_texts(4, seed=1)])
        estimated = outcome("--dry_run")
        if estimated.verdict == "fault":
            return estimated, estimated
        return outcome("--verify", "2", "--mlp_only"), outcome("--verify", "2")


def all_outcomes(names: Iterable[str]) -> dict[str, tuple[Outcome, Outcome]]:
    """Return family -> outcomes, found by two processes."""
    names = list(names)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(names, pool.map(outcomes, names), strict=True))


def render(results: dict[str, tuple[Outcome, Outcome]]) -> str:
    """Return the content of docs/models.md. Families with one model class and the same outcomes share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}  # model class and cells -> families, first that of the class itself
    for family, (mlp, every) in results.items():
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[families()[family]]
        reasons = "; ".join(dict.fromkeys(shown(result.reason) for result in (mlp, every) if result.reason))
        names = rows.setdefault((model_class.__name__, mlp.verdict, every.verdict, reasons), [])
        names.insert(0 if model_class.config_class is families()[family] else len(names), family)
    lines = sorted((", ".join(names), *cells) for (_, *cells), names in rows.items())
    counts = [sum(pair[i].verdict == "passes" for pair in results.values()) for i in (0, 1)]
    head = HEAD.format(version=transformers.__version__, families=len(results), mlp=counts[0], every=counts[1])
    return head + "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def shown(reason: str) -> str:
    """Return a refusal without its advice, and without a number that differs between machines."""
    reason = re.sub(r"(, got a relative difference of| by) \d\S*", "", reason.rpartition("; ")[0] or reason)
    return reason.replace("|", "\\|").replace("<", "\\<")


def main(args: argparse.Namespace) -> None:
    """Write the page, or print the outcomes of some families."""
    if args.write:
        PAGE.write_text(render(all_outcomes(families())), "utf-8")
    for family in args.families:
        for layers, result in zip(("--mlp_only", "all layers"), outcomes(family), strict=True):
            print(result.output, f"{family}, {layers}: {result.verdict} {result.reason}\n", sep="\n")


HEAD = """# Which models work

`python tests/families/families.py --write` writes this page. It makes a tiny random model of each of the {families}
causal-LM families (model types) of transformers {version}, and runs `extract_log.py --verify` on it with `--mlp_only`
and with all layers. {mlp} pass with `--mlp_only` and {every} with all layers. The others are refused in one line, which
is the reason here, without its advice. Embeddings and the head are never tracked. If your model's family is not in the
table (code of its own, a newer transformers), run `--verify` on the model itself.

| family | MLP | all layers | reason |
|---|---|---|---|
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    main(parser.parse_args())
