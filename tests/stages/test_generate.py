"""Stage 1: exact tokens, and where a response ends."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, write_jsonl
from helpers import extract, influence
from transformers import AutoModelForCausalLM, GenerationConfig

from logra.inputs.queries import load_queries
from logra.runtime.settings import QuerySettings, RunSettings, Sampling
from logra.stages import generate

MANY = list(range(4, 300))
# a value of each entry of generation_config.json; most of them change the tokens where transformers reads them
ENTRIES = {
    "max_length": 3, "max_new_tokens": 2, "min_length": 30, "min_new_tokens": 8, "early_stopping": True,
    "max_time": 1e-9, "stop_strings": ["e"], "do_sample": True, "num_beams": 4, "use_mtp": True,
    "cache_implementation": "static", "cache_config": {"a": 1}, "max_cache_len": 9, "temperature": 0.2, "top_k": 1,
    "top_p": 0.1, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5,
    "repetition_penalty": 5.0, "encoder_repetition_penalty": 5.0, "length_penalty": 9.0, "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in MANY], "renormalize_logits": True, "forced_bos_token_id": 9,
    "forced_eos_token_id": 9, "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 5.0],
    "suppress_tokens": MANY, "begin_suppress_tokens": MANY, "sequence_bias": [[[5], 90.0]], "token_healing": True,
    "guidance_scale": 5.0, "watermarking_config": {"bias": 50.0}, "output_attentions": True,
    "output_hidden_states": True, "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
    "encoder_no_repeat_ngram_size": 1, "decoder_start_token_id": 5, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2, "assistant_early_exit": 1, "assistant_lookbehind": 3,
    "target_lookbehind": 3, "assistant_ensemble_weight": 0.5, "speculation_type": "x", "disable_compile": True,
    "low_memory": True, "penalty_alpha": 0.6, "dola_layers": "low", "diversity_penalty": 0.5, "num_beam_groups": 2,
    "constraints": [1], "force_words_ids": [[9]], "prefill_chunk_size": 2, "an_entry_of_its_own": 1,
}  # fmt: skip
REFUSED_BY_TRANSFORMERS = {"num_return_sequences", "compile_config", "continuous_batching_config"}  # or deprecated
PROMPTS = [[260], [270, 271, 272], [4, 5, 6, 7, 8, 9]]
ENDS = [37, 138]  # one ends a greedy response, one a sampled response


def greedy(model, ids: list[int], new_tokens: int) -> list[int]:
    """Return the most likely token, again and again, up to an end token."""
    response = []
    while len(response) < new_tokens and (not response or response[-1] not in ENDS):
        logits = model(torch.tensor([ids + response])).logits[0, -1]
        response.append(logits.argmax().item())
    return response


@pytest.fixture(scope="module")
def plain():
    """A model whose generation_config.json is empty; its greedy responses, and its samples, which end early."""
    model = make_model("llama")
    sampled = Sampling(max_new_tokens=8, batch_size=1, temperature=0.8)
    with torch.no_grad():
        best = [[greedy(model, ids, 8)] for ids in PROMPTS]
    model.generation_config = GenerationConfig()
    samples = generate.generate(model, PROMPTS, ENDS, sampled)
    assert any(row[-1] in ENDS for (row,) in best) and any(row[-1] in ENDS for (row,) in samples)
    return model, {Sampling(max_new_tokens=8, batch_size=1, temperature=0): best, sampled: samples}


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_flags_alone_choose_the_tokens(plain, entry):
    """Whatever generation_config.json holds, greedy is greedy, samples are the same ones, and the entry is named."""
    model, expected = plain
    for sampling, responses in expected.items():
        model.generation_config = GenerationConfig.from_dict({"eos_token_id": ENDS, entry: ENTRIES[entry]})
        not_used = generate.settings_not_used(model, sampling)
        assert generate.generate(model, PROMPTS, ENDS, sampling) == responses
        assert list(not_used) == [entry] or (entry == "do_sample" and not not_used and sampling.temperature > 0)


def test_every_entry_is_known():
    """An entry that a newer transformers adds needs a value above."""
    known = set(ENTRIES) | set(generate.NO_CHOICE) | REFUSED_BY_TRANSFORMERS
    assert set(GenerationConfig().to_dict()) <= known


def test_entries_that_are_not_used_are_named_and_recorded(cli, tiny, workspace):
    """One line, and in each row; end tokens are those of the file too; code in the folder does not generate."""
    shutil.copytree(tiny / "llama", "m")
    Path("p.txt").write_text("the river\nwater\n")
    flags = ("--model_name", "m", "--prompts", "p.txt", "--max_new_tokens", 6, "--temperature", 0)
    status, out, err = cli("generate", *flags)
    assert status == 0 and "Not used" not in out + err
    before = [json.loads(line) for line in open("data/generated/m/queries.jsonl")]
    end = before[0]["response_ids"][2]
    entries = {"num_beams": 4, "forced_bos_token_id": 0, "bad_words_ids": [[end]], "repetition_penalty": 1.3}
    Path("m/generation_config.json").write_text(json.dumps(entries | {"eos_token_id": [2, end]}))
    Path("m/custom_generate").mkdir()
    Path("m/custom_generate/generate.py").write_text("def generate(model, *args, **kwargs): raise KeyError\n")
    status, out, err = cli("generate", *flags, "--trust_remote_code")
    (line,) = [line for line in out.splitlines() if "Not used" in line]
    assert status == 0 and all(f"{key} " in line for key in entries) and "eos" not in line, err
    after = [json.loads(line) for line in open("data/generated/m/queries.jsonl")]
    assert after[0]["response_ids"] == before[0]["response_ids"][: before[0]["response_ids"].index(end) + 1]
    assert all(row["settings"]["model_settings_not_used"] == entries for row in after)
    assert all(row["settings"]["end_ids"] == sorted({2, 3, end}) for row in after)


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


def test_response_ids_are_used_as_they_are(workspace):
    """Also where the tokenizer would make other tokens of the text, or where the text was edited."""
    row = {
        "id": "a",
        "prompt": "the",
        "response": "river",
        "model": "m",
        "prompt_ids": [1, 1],
        "response_ids": [9, 2, 9],
    }
    write_jsonl(Path("q.jsonl"), [row])
    settings = RunSettings(model_name="m", data_name="d")
    _, (query,) = load_queries(QuerySettings("q.jsonl"), settings, make_tokenizer())
    assert query.token_ids == [1, 1, 9, 2, 9] and query.counted == [False, False, True, True, True]


def test_generation_stops_at_both_ends(tiny):
    """A response ends with the EOS token, or the end of a turn, included; nothing follows."""
    from logra.stages.generate import _until_end, end_token_ids

    ends = end_token_ids(make_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny / "llama"))
    assert ends == [2, 3]
    assert _until_end([5, 6, 3, 9, 2], set(ends)) == [5, 6, 3] and _until_end([5, 6], set(ends)) == [5, 6]


def test_a_response_does_not_depend_on_its_batch(monkeypatch):
    """Also where a model chooses its frequencies by the longest text of a batch, before or while it generates."""
    model, greedy = make_model("longrope").eval(), partial(Sampling, max_new_tokens=9, temperature=0)
    prompts = [[5, 6, 7], [*range(10, 28)], [8, 9, 10, 11, 12, 13]]
    alone, together = (generate.generate(model, prompts, [2], greedy(batch_size=size)) for size in (1, 3))
    assert alone == together
    monkeypatch.setattr("logra.stages.generate.rope_boundaries", lambda config: [])
    assert generate.generate(model, prompts, [2], greedy(batch_size=3)) != alone, "this model does choose so"


def test_a_cut_response_is_marked_on_the_page(cli, tiny, workspace):
    """`cut` of a row goes through stage 3 to the report; a column of that name that holds anything else does not."""
    rows = [{"id": str(cut), "prompt": "the", "response": " river", "cut": cut} for cut in (True, False, "beef")]
    write_jsonl(Path("queries.jsonl"), rows)
    extract(cli, tiny / "llama", "--rank", 3)
    _, folder = influence(cli)
    assert cli("analysis", "--log_dir", "log")[0] == 0
    marked = [part for part in (folder / "report.html").read_text().split("<details") if "was cut at" in part]
    assert len(marked) == 1 and "<h2><bdi>True</bdi></h2>" in marked[0]
