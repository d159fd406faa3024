#!/usr/bin/env bash
# Reproduces: the table of topic recall in docs/results.md: 24 questions about Python, each with a known topic
# Needs:      as scripts/quickstart.sh; uses the quickstart's run if it exists
# Takes:      10 minutes on 2 CPU cores after scripts/quickstart.sh, 15 without
# Expect:     a table: scores, share of questions with the topic in the top 10 and in first place, mean of 1 / rank
# Checked:    2026-11-24, 2 CPU cores, Python 3.11: the table in docs/results.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

MODEL=models/SmolLM2-135M-Instruct
QUERIES=data/generated/SmolLM2-135M-Instruct/topics.jsonl
RUN=(--model_name "$MODEL" --data_name pydoc --data_config short --lora random --rank 64 --mlp_only --block_size 256 --calibration_examples 32)

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

run python generate_llama3.py --model_name "$MODEL" --prompts evaluation/topics.jsonl --output "$QUERIES" \
    --max_new_tokens 96 --temperature 0
run python extract_log.py --log_dir logs/quickstart "${RUN[@]}" --hessian ekfac
run python extract_log.py --log_dir logs/topics_raw "${RUN[@]}" --hessian raw
for mode in dot cosine; do
    run python compute_influence.py --log_dir logs/quickstart --hessian ekfac --split "$QUERIES" --mode "$mode" --damping 0.1
    run python compute_influence.py --log_dir logs/topics_raw --hessian raw --split "$QUERIES" --mode "$mode"
    run python compute_influence.py --log_dir logs/topics_raw --hessian none --split "$QUERIES" --mode "$mode"
done
run python evaluation/topic_recall.py logs/quickstart/scores/topics-* logs/topics_raw/scores/topics-*
