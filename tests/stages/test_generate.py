"""Stage 1: exact tokens, and where a response ends."""

import json
import shutil
from pathlib import Path

from conftest import make_tokenizer
from helpers import extract
from transformers import AutoModelForCausalLM


def test_generated_tokens_are_attributed_as_they_are(cli, tiny, workspace):
    """Stage 1 stores exact token ids; stage 3 uses them, and refuses another model's."""
    prompts = ["the river", "the old mill and the dog", "water"]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n")
    shutil.copytree(tiny / "llama", "m/tiny")
    outputs = {}
    for size in (1, 3):
        flags = ("--prompts", "prompts.txt", "--temperature", 0, "--max_new_tokens", 7, "--batch_size", size)
        assert cli("generate", "--model_name", "m/tiny", *flags)[0] == 0
        outputs[size] = [json.loads(line) for line in open("data/generated/tiny/queries.jsonl")]
    for one, three in zip(outputs[1], outputs[3], strict=True):
        assert one["response_ids"] == three["response_ids"] and one["response"] == three["response"]
        assert one["prompt_ids"] == make_tokenizer()(one["prompt"])["input_ids"]
    flags = ("--prompts", "prompts.txt", "--max_new_tokens", 5, "--num_return_sequences", 2, "--seed", 3)
    for _ in range(2):
        assert cli("generate_llama3", "--model_name", "m/tiny", *flags)[0] == 0
        outputs[_] = [json.loads(line) for line in open("data/generated/tiny/queries.jsonl")]
    assert outputs[0] == outputs[1] and [r["id"] for r in outputs[0]] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    assert outputs[0][0]["prompt_ids"][0] == 1 and outputs[0][0]["settings"]["temperature"] == 0.6
    extract(cli, Path("m/tiny"), "--rank", 4)
    status, out, err = cli("compute_influence", "--log_dir", "log", "--model_name", "m/tiny")
    assert status == 0 and "6 queries" in out, err
    shutil.copytree("m/tiny", "other/tiny")
    assert cli("extract_log", "--model_name", "other/tiny", "--data_name", "docs.jsonl", "--log_dir", "log2")[0] == 0
    status, _, err = cli("compute_influence", "--log_dir", "log2")
    assert status == 2 and "m/tiny" in err


def test_generation_stops_at_both_ends(tiny):
    """A response ends with the EOS token, or the end of a turn, included; nothing follows."""
    from logra.stages.generate import _until_end, end_token_ids

    ends = end_token_ids(make_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny / "llama"))
    assert ends == [2, 3]
    assert _until_end([5, 6, 3, 9, 2], set(ends)) == [5, 6, 3] and _until_end([5, 6], set(ends)) == [5, 6]
