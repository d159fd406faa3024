#!/usr/bin/env bash
# Reproduces: agreement of scores with those of uncompressed EK-FAC on SmolLM2-135M, all MLP layers
# Needs:      as scripts/quickstart.sh, 12 GB of memory
# Takes:      about 50 minutes on 2 CPU cores, half of it for the reference; with EXAMPLES=60 half of that
# Expect:     a row for each run: Spearman's correlation, overlap of the top 10, stored bytes per example
# Checked:    2026-11-24, 2 CPU cores, Python 3.11; the last run (rank 256) was left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

# edit here
MODEL=models/SmolLM2-135M-Instruct
QUERIES=data/generated/SmolLM2-135M-Instruct/topics.jsonl
EXAMPLES=${EXAMPLES:-120}
RUN=(--model_name "$MODEL" --data_name pydoc --data_config short --shuffle_seed 0 --max_examples "$EXAMPLES" --block_size 256 --mlp_only)
LOGS=${LOGS:-logs/agreement}

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# method NAME HESSIAN "FLAGS OF STAGE 3" FLAGS
method() {
    local log=$LOGS/$1 hessian=$2 scoring=($3)
    shift 3
    run python extract_log.py --log_dir "$log" "${RUN[@]}" --hessian "$hessian" "$@"
    run python compute_influence.py --log_dir "$log" --split "$QUERIES" --hessian "$hessian" "${scoring[@]}"
}

run python generate_llama3.py --model_name "$MODEL" --prompts evaluation/topics.jsonl --output "$QUERIES" \
    --max_new_tokens 96 --temperature 0
method full ekfac "--damping 0.01 --query_rank 64" --lora none --store_dtype none
method raw64 raw "--damping 0.1 0.01" --rank 64
method ekfac64 ekfac "--damping 0.01 0.1" --rank 64
method int1-64 ekfac "--damping 0.01 0.2" --rank 64 --store_dtype int1
method best ekfac "--damping 0.01 0.2" --preset best
method int1-256 ekfac "--damping 0.01 0.2" --rank 256 --store_dtype int1
run python evaluation/agreement.py "$LOGS"/full/scores/* "$LOGS"/{raw64,ekfac64,int1-64,best,int1-256}/scores/*
