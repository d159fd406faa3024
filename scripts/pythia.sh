#!/usr/bin/env bash
# Reproduces: the paper's run of Pythia-1.4b: LoGra, rank 64, raw Hessian, 1e9 tokens of OpenWebText
#             (arXiv 2405.13954), data parallel, stages 1 to 4
# Needs:      8 GPUs of 40 GB, 0.4 TB of disk: 1e9 tokens / 2048 = 488,000 examples
#             x 24 layers x 2 matrices x 64 x 64 x 4 bytes = 0.79 MB each (STORE_DTYPE=bfloat16: half); 64 GB of memory
# Takes:      computed, not measured: 0.5 hours on 8 H100. Forward pass and activation-only backward pass:
#             4 x 1.4e9 x 1e9 = 5.6e18 FLOP, 3.9 GPU hours at 40% of 990 TFLOP/s.
#             Tokenising before that, on one machine, takes longer; --num_proc 32 speeds it up
# Expect:     {LOG_DIR}/scores/queries-*/report.html, and a printed table of the first documents of each query
# Checked:    on a tiny stand-in model with CPU processes; not measured at this size
#
# Usage: bash scripts/pythia.sh [more flags of extract_log.py]
#   several machines: set NUM_MACHINES=4 MACHINE_RANK=0..3 MAIN_IP=10.0.0.1 on each, or use scripts/slurm.sbatch
#   to try it:        DRY_RUN=1 prints the commands; small: MODEL=folder DATA=file.jsonl BLOCK_SIZE=64 NUM_GPUS=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# edit here
MODEL=${MODEL:-EleutherAI/pythia-1.4b}
DATA=${DATA:-openwebtext}
TOKENS=${TOKENS:-1000000000}
BLOCK_SIZE=${BLOCK_SIZE:-2048}
LORA_RANK=${LORA_RANK:-64} # not RANK: torch uses that name for the number of a process
STORE_DTYPE=${STORE_DTYPE:-float32}
LOG_DIR=${LOG_DIR:-logs/pythia}
GENERATE=generate.py
PROMPTS=(--max_new_tokens 128 --temperature 0.8 --top_p 0.95)
RUN=(--lora random --rank "$LORA_RANK" --hessian raw --mlp_only --pack --block_size "$BLOCK_SIZE" --max_tokens "$TOKENS" --store_dtype "$STORE_DTYPE")
SCORES=(--mode cosine)
ANALYSIS=()

source scripts/stages.sh
stages "$@"
