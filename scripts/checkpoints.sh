#!/usr/bin/env bash
# Reproduces: scores of Pythia-1.4b over its training: --preset best at three of its checkpoints, 1e9 tokens of
#             OpenWebText, data parallel, stages 1 to 4. Not in the paper, which scores the final model
# Needs:      8 GPUs of 40 GB, 0.17 TB of disk: 1e9 tokens / 2048 = 488,000 examples
#             x 24 layers x 2 matrices x 2,316 bytes = 54 GB for each checkpoint, 2 GB of tokenised text; 64 GB of memory
# Takes:      computed, not measured: three times scripts/pythia.sh, 1.5 hours on 8 H100. The text is tokenised once
# Expect:     {LOG_DIR}/scores/queries-*/report.html, whose cards show each checkpoint's part of the score
# Checked:    on three tiny stand-in models with CPU processes; not measured at this size
#
# Which checkpoints: after a fifth, after a half, and the last of the 143,000 steps (docs/results.md says what others
# gave). One checkpoint more costs its own run only: add it and start again. One model is in memory at a time.
#
# Usage: bash scripts/checkpoints.sh [more flags of extract_log.py]
#   to try it: DRY_RUN=1 prints the commands; your own: MODEL=last CHECKPOINTS="out/checkpoint-200 out/checkpoint-500 last"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# edit here
MODEL=${MODEL:-EleutherAI/pythia-1.4b}
CHECKPOINTS=${CHECKPOINTS:-step29000 step72000 step143000}
DATA=${DATA:-openwebtext}
TOKENS=${TOKENS:-1000000000}
BLOCK_SIZE=${BLOCK_SIZE:-2048}
LORA_RANK=${LORA_RANK:-136}
LOG_DIR=${LOG_DIR:-logs/pythia-checkpoints}
GENERATE=generate.py
PROMPTS=(--max_new_tokens 128 --temperature 0.8 --top_p 0.95)
RUN=(--checkpoints $CHECKPOINTS --preset best --rank "$LORA_RANK" --pack --block_size "$BLOCK_SIZE" --max_tokens "$TOKENS")
SCORES=()
ANALYSIS=()

source scripts/stages.sh
stages "$@"
