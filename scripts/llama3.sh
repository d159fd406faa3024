#!/usr/bin/env bash
# Reproduces: the paper's run of Llama-3-8B-Instruct: LoGra, rank 64, raw Hessian, 1e9 tokens of OpenWebText
#             (arXiv 2405.13954), data parallel, stages 1 to 4
# Needs:      8 GPUs of 80 GB, 1.6 TB of disk: 1e9 tokens / 1024 = 977,000 examples
#             x 32 layers x 3 matrices x 64 x 64 x 4 bytes = 1.57 MB each (STORE_DTYPE=bfloat16: half);
#             128 GB of memory; access to the model on the Hub
# Takes:      computed, not measured: 2.8 hours on 8 H100. Forward pass and activation-only backward pass:
#             4 x 8e9 x 1e9 = 3.2e19 FLOP, 22 GPU hours at 40% of 990 TFLOP/s.
#             Tokenising before that, on one machine, takes longer; --num_proc 32 speeds it up
# Expect:     {LOG_DIR}/scores/queries-*/report.html, and a printed table of the first documents of each query
# Checked:    on a tiny stand-in model with CPU processes; not measured at this size
#
# Usage: bash scripts/llama3.sh [more flags of extract_log.py]
#   several machines: set NUM_MACHINES=4 MACHINE_RANK=0..3 MAIN_IP=10.0.0.1 on each, or use scripts/slurm.sbatch
#   to try it:        DRY_RUN=1 prints the commands; small: MODEL=folder DATA=file.jsonl BLOCK_SIZE=64 NUM_GPUS=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# edit here
MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}
DATA=${DATA:-openwebtext}
TOKENS=${TOKENS:-1000000000}
BLOCK_SIZE=${BLOCK_SIZE:-1024}
LORA_RANK=${LORA_RANK:-64} # not RANK: torch uses that name for the number of a process
STORE_DTYPE=${STORE_DTYPE:-float32}
LOG_DIR=${LOG_DIR:-logs/llama3}
GENERATE=generate_llama3.py
PROMPTS=(--max_new_tokens 256 --temperature 0.6 --top_p 0.9)
RUN=(--lora random --rank "$LORA_RANK" --hessian raw --mlp_only --pack --block_size "$BLOCK_SIZE" --max_tokens "$TOKENS" --store_dtype "$STORE_DTYPE")
SCORES=(--mode cosine)
ANALYSIS=()

source scripts/stages.sh
stages "$@"
