#!/usr/bin/env bash
# Reproduces: your model, your texts: which of them mattered for what the model says?
# Needs:      as scripts/quickstart.sh; disk and memory as extract_log.py --dry_run says, which is asked first
# Takes:      what --trial says; SmolLM2-135M and 10,000 tokens: 2 minutes on 2 CPU cores
# Expect:     {LOG_DIR}/scores/queries-*/report.html, and the first documents of each query
# Checked:    2026-11-24, 2 CPU cores, Python 3.11, with a tiny model
#
# Usage: bash scripts/custom_data.sh MODEL TEXTS.jsonl [PROMPTS.txt] [more flags of extract_log.py]
#   MODEL      a local folder or a Hub id; with a chat template it is asked, else it goes on
#   TEXTS      .jsonl (rows with `text`, and perhaps `id`), .json, .txt, .parquet, a folder of these, or a Hub id
#   PROMPTS    a prompt a line (default: a few about Python)
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
run python extract_log.py --model_name "$MODEL" --data_name "$DATA" "${RUN[@]}" --verify
run python extract_log.py --log_dir "$LOG_DIR" --model_name "$MODEL" --data_name "$DATA" "${RUN[@]}" "$@" --dry_run
stages "$@"
