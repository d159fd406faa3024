"""Tiny models of each architecture, built from config objects, a tokenizer, and folders in the Hub's layout."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "TEST_GPUS" not in os.environ:  # the tests not marked gpu have the CPU's dtype, tolerances and processes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import copy
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BertConfig,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    NemotronHConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    XGLMConfig,
)

from logra.runtime import files, progress
from logra.runtime.flags import run_script

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 320
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
    "neox": GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    ),
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
}
OTHERS = {
    "gemma2": Gemma2Config(**LLAMA, final_logit_softcapping=5.0, attn_logit_softcapping=8.0, query_pre_attn_scalar=6),
    "cohere": Cohere2Config(**LLAMA, logit_scale=0.25),
    "granite": GraniteConfig(**LLAMA, logits_scaling=3.0),
    "longrope": Phi3Config(
        **LLAMA,
        original_max_position_embeddings=12,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2],
            "long_factor": [2.0, 5.0, 9.0],
            "original_max_position_embeddings": 12,
        },
    ),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=5),
    "gpt_oss": GptOssConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=3, sliding_window=8),
    "nemotron_h": NemotronHConfig(
        **LLAMA,
        layers_block_type=["attention", "moe"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=18,
        moe_shared_expert_intermediate_size=16,
    ),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
    ),
    "llama4": Llama4TextConfig(**LLAMA, moe_layers=[], intermediate_size_mlp=40),  # its base_model is the model itself
    "xglm": XGLMConfig(
        vocab_size=VOCAB,
        d_model=24,
        ffn_dim=40,
        num_layers=2,
        attention_heads=2,
        max_position_embeddings=64,
        init_std=0.3,
    ),
    "bert": BertConfig(**LLAMA, is_decoder=True),  # further layers between its base_model and the head
}


def make_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, context: int = 64):
    """Return a tiny model with random weights, biases and norms included."""
    torch.manual_seed(seed)
    config = copy.deepcopy((CONFIGS | OTHERS)[name])
    config.max_position_embeddings = context
    model = Auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.fixture(params=list(CONFIGS))
def model_name(request) -> str:
    return request.param


@pytest.fixture
def model(model_name):
    return make_model(model_name)


WORDS = (
    "the river ran past the old mill and the children threw stones into cold water while a dog barked at birds".split()
)


def make_texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Return texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most VOCAB tokens, without special tokens of its own in texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(200), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}<|eot_id|>{% endfor %}<s>"
    return fast


def save_model(folder: Path, name: str, context: int = 64) -> Path:
    """Write a tiny model and its tokenizer as a Hub-like folder."""
    make_model(name, context=context).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON object, and its checksum, as someone would who knows the format."""
    content = json.loads(path.read_text())
    content.pop("checksum", None)
    change(content)
    files.write_json(path, content)


def vouch(folder: Path) -> None:
    """Enter the checksums that the files of a folder of scores have now."""
    edit_json(folder / "run.json", lambda about: about.update(files=files.file_checksums(folder, about["files"])))


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_cli(script: str, *flags: object) -> int:
    """Run a script's command line in this process; return its exit status."""
    module = importlib.import_module(script)
    argv, sys.argv = sys.argv, [f"{script}.py", *map(str, flags)]
    try:
        run_script(module.main, module.build_parser())
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv
        progress.begin(quiet=False)  # or later lines of this process would go to the run's log.txt
    return 0


@pytest.fixture
def cli(capsys):
    """Return a function (script, *flags) -> (exit status, stdout, stderr without progress bars)."""

    def call(script: str, *flags: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run_cli(script, *flags)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip() and not re.search(r"\[\d\d:\d\d.*/s.*\]\s*$", line)]
        return status, out, "\n".join(lines)

    return call


TRAJECTORY = "--rank 4 --mlp_only --block_size 32 --shard_examples 7 --batch_tokens 200 --hessian ekfac".split()


@pytest.fixture(scope="session")
def trajectory(tmp_path_factory) -> Path:
    """A folder with three checkpoints of a tiny Llama in out/, documents and queries, and their runs in parent/.

    The flags of the runs are TRAJECTORY and --store_dtype int1. Three of the 23 documents have no gradient.
    """
    root = tmp_path_factory.mktemp("trajectory")
    model, tokenizer = make_model("llama"), make_tokenizer()
    texts = make_texts(20, seed=1)
    steps = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(15):
        ids = torch.tensor([tokenizer(texts[step])["input_ids"][:32]])
        model(input_ids=ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()
        if step % 5 == 4:
            model.save_pretrained(root / f"out/checkpoint-{step + 1}")
            tokenizer.save_pretrained(root / f"out/checkpoint-{step + 1}")
    texts[4:4] = texts[11:11] = texts[20:20] = ["t"]
    write_jsonl(root / "docs.jsonl", [{"id": f"doc{i}", "text": text} for i, text in enumerate(texts)])
    queries = [{"text": text, "topic": topic} for text, topic in zip(make_texts(2, seed=2), "ab", strict=True)]
    queries.append({"id": "pr", "prompt": "the old mill", "response": " and the river ran past", "topic": "a"})
    write_jsonl(root / "queries.jsonl", queries)
    flags = ("--checkpoints", f"{root}/out/*", "--data_name", root / "docs.jsonl", "--log_dir", root / "parent")
    assert run_cli("extract_log", *flags, *TRAJECTORY, "--store_dtype", "int1") == 0
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folders of tiny models, named by architecture."""
    root = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        save_model(root / name, name)
    return root


def write_workspace(folder: Path) -> None:
    """Write docs.jsonl (20 documents) and queries.jsonl."""
    rows = [{"id": f"doc{i}", "text": text} for i, text in enumerate(make_texts(20, seed=1))]
    write_jsonl(folder / "docs.jsonl", rows)
    queries = [{"text": text} for text in make_texts(2, seed=2)]
    queries += [{"id": "pr", "prompt": "the old mill", "response": " and the river ran past cold water"}]
    write_jsonl(folder / "queries.jsonl", queries)


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """A working directory with docs.jsonl (20 documents) and queries.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_workspace(tmp_path)
    return tmp_path
