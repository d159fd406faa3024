"""Stage 1/4 (chat). Reads prompts. Writes data/generated/<model>/queries.jsonl, one row per response.

Works for any model that has a chat template:

    python generate_llama3.py --model_name models/SmolLM2-135M-Instruct --prompts scripts/prompts/python.txt
"""

import argparse
from pathlib import Path

from logra.runtime import flags, progress
from logra.runtime.settings import RUN_FIELDS, RunSettings, Sampling

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
PROMPTS = Path(__file__).resolve().parent / "scripts/prompts/chat.txt"


def build_parser() -> flags.Parser:
    """Return the parser of the command line."""
    parser = flags.Parser(description=__doc__)
    flags.add_generation_flags(parser, MODEL, PROMPTS, Sampling(max_new_tokens=256, temperature=0.6, top_p=0.9))
    flags.add_settings(parser, RunSettings(), skip={*RUN_FIELDS} - {"chat_date"})
    return parser


if __name__ == "__main__":  # --help and wrong flags do not wait for the slow imports below
    PARSER = build_parser()
    ARGS = PARSER.parse_args()

from logra.inputs.rows import chat_tokens
from logra.stages.generate import ModelSource, write_queries


def main(args: argparse.Namespace) -> None:
    """Generate responses and write them as queries."""
    sampling = flags.read_settings(Sampling, args)
    source = ModelSource(args.model_name, args.dtype, args.revision, args.trust_remote_code)

    def encode(tokenizer, prompt: str) -> list[int]:
        """Return the token ids of the prompt as a user's turn, followed by what opens the assistant's turn."""
        return chat_tokens(tokenizer, [{"role": "user", "content": prompt}], args.chat_date)

    path = write_queries(args.prompts, args.output, source, encode, sampling)
    progress.say(f"Wrote {path}")
    progress.summary("extract_log.py")


if __name__ == "__main__":
    flags.run_script(main, PARSER, ARGS)
