"""Stage 1/4 (plain continuation). Reads prompts. Writes data/generated/<model>/queries.jsonl, one row a response.

Works for any causal language model:

    python generate.py --model_name gpt2-xl --max_new_tokens 64
"""

from pathlib import Path

from logra.generation import add_generation_flags, run_generation
from logra.progress import say, summary
from logra.run import Parser, guarded

PROMPTS = Path(__file__).resolve().parent / "scripts/prompts/continuation.txt"


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    add_generation_flags(parser, "EleutherAI/pythia-1.4b", PROMPTS, max_new_tokens=128, temperature=0.8, top_p=0.95)
    return parser


def encode(tokenizer, prompt: str) -> list[int]:
    """Return the token ids of the prompt."""
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError(f"expected a prompt of at least one token, got {prompt!r}; change it")
    return ids


def main(args) -> None:
    """Generate continuations and say where they are."""
    say(f"Wrote {run_generation(args, encode)}")
    summary("extract_log.py")


if __name__ == "__main__":
    guarded(main, build_parser())
