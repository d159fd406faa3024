#!/usr/bin/env bash
# Reproduces: all four stages on your model, your texts and your prompts
# Needs:      as scripts/quickstart.sh; disk and memory as extract_log.py --dry_run prints, which runs first
# Takes:      as extract_log.py --trial predicts; SmolLM2-135M and 10,000 tokens: 2 minutes on 2 CPU cores
# Expect:     {LOG_DIR}/scores/queries-*/report.html, and a printed table of the first documents of each query
# Checked:    2026-11-24, 2 CPU cores, Python 3.11, with a tiny model
#
# Usage: bash scripts/custom_data.sh MODEL TEXTS.jsonl [PROMPTS.txt] [more flags of extract_log.py]
#   MODEL      a local folder or a Hub id; with a chat template it answers the prompts, without one it continues them
#   TEXTS      .jsonl (rows with `text`, and optionally `id`), .json, .csv, .txt, .parquet, a folder of these, or a Hub
#              id; for chats and instructions see docs/inputs.md, and add --train_loss response
#   PROMPTS    a file with one prompt per line (default: four questions about Python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# edit here
MODEL=${1:-${MODEL:-models/SmolLM2-135M-Instruct}}
DATA=${2:-${DATA:-pydoc}}
shift $(($# < 2 ? $# : 2))
PROMPTS=(--prompts scripts/prompts/python.txt --max_new_tokens 96 --temperature 0)
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    PROMPTS[1]=$1
    shift
fi
LOG_DIR=${LOG_DIR:-logs/$(basename "$MODEL")-$(basename "${DATA%.*}")}
NUM_GPUS=${NUM_GPUS:-1}
RUN=(--preset best)
SCORES=(--mode cosine)
ANALYSIS=(--tokens)

source scripts/stages.sh
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh
choose_generate
run python extract_log.py --model_name "$MODEL" --data_name "$DATA" "${RUN[@]}" "$@" --verify
run python extract_log.py --log_dir "$LOG_DIR" --model_name "$MODEL" --data_name "$DATA" "${RUN[@]}" "$@" --dry_run
stages "$@"
