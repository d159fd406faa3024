"""Stage 1/4 (chat). Reads prompts. Writes data/generated/<model>/queries.jsonl, one row a response.

Works for any model that has a chat template:

    python generate_llama3.py --model_name models/SmolLM2-135M-Instruct --prompts scripts/prompts/python.txt
"""

from pathlib import Path

from logra.generation import add_generation_flags, run_generation
from logra.progress import say, summary
from logra.rows import chat_tokens
from logra.run import Parser, guarded

PROMPTS = Path(__file__).resolve().parent / "scripts/prompts/chat.txt"


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(description=__doc__)
    model = "meta-llama/Meta-Llama-3-8B-Instruct"
    add_generation_flags(parser, model, PROMPTS, max_new_tokens=256, temperature=0.6, top_p=0.9)
    return parser


def encode(tokenizer, prompt: str) -> list[int]:
    """Return the token ids of the prompt as a user's turn, ready for the assistant's answer."""
    return chat_tokens(tokenizer, [{"role": "user", "content": prompt}], prompt=True)


def main(args) -> None:
    """Generate responses and say where they are."""
    say(f"Wrote {run_generation(args, encode)}")
    summary("extract_log.py")


if __name__ == "__main__":
    guarded(main, build_parser())
