"""Stage 1/4 (plain continuation). Reads prompts. Writes data/generated/<model>/queries.jsonl, one row per response.

Works for any causal language model:

    python generate.py --model_name gpt2-xl --max_new_tokens 64
"""

import argparse
from pathlib import Path

from logra.runtime import flags, progress
from logra.runtime.settings import Sampling

MODEL = "EleutherAI/pythia-1.4b"
PROMPTS = Path(__file__).resolve().parent / "scripts/prompts/continuation.txt"


def build_parser() -> flags.Parser:
    """Return the parser of the command line."""
    parser = flags.Parser(description=__doc__)
    flags.add_generation_flags(parser, MODEL, PROMPTS, Sampling(max_new_tokens=128, temperature=0.8, top_p=0.95))
    return parser


if __name__ == "__main__":  # --help and wrong flags do not wait for the slow imports below
    PARSER = build_parser()
    ARGS = PARSER.parse_args()

from logra.inputs.rows import prompt_tokens
from logra.stages.generate import ModelSource, write_queries


def main(args: argparse.Namespace) -> None:
    """Generate continuations and write them as queries."""
    sampling = flags.read_settings(Sampling, args)
    source = ModelSource(args.model_name, args.dtype, args.revision, args.trust_remote_code)
    path = write_queries(args.prompts, args.output, source, prompt_tokens, sampling)
    progress.say(f"Wrote {path}")
    progress.summary("extract_log.py")


if __name__ == "__main__":
    flags.run_script(main, PARSER, ARGS)
