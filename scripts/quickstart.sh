#!/usr/bin/env bash
# Reproduces: the README's first result, stages 1 to 4 on SmolLM2-135M-Instruct and Python's reference manual
# Needs:      python3 >= 3.11 with venv, 4 GB of memory, 4 GB of disk; no GPU; the network only for pip
# Takes:      5 minutes on 2 CPU cores after installation (1 minute), half a minute when run again
# Expect:     the 3 documents with the highest scores for each of four questions, and the paths of report and lists
# Checked:    2026-11-24, 2 CPU cores, Python 3.11, from a fresh clone with an empty HOME: 4 min 40 s; not on a GPU
#
# Usage: bash scripts/quickstart.sh [--all] [--model_name MODEL] [--data_name DATA] [more flags of extract_log.py]
#   --all uses the whole manual (about 113k tokens) instead of its shorter topics (about 43k tokens)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

# edit here
MODEL=models/SmolLM2-135M-Instruct
DATA=(--data_name pydoc --data_config short)
PROMPTS=(--prompts scripts/prompts/python.txt)
RUN=(--lora random --rank 64 --hessian ekfac --mlp_only --block_size 256 --calibration_examples 32)

GENERATE=generate_llama3.py
LOG=logs/quickstart
[ $# -eq 0 ] || LOG+=-$(printf '%s\n' "$@" | cksum | cut -d' ' -f1)
MORE=()
while [ $# -gt 0 ]; do
    case $1 in
        --all) DATA=(--data_name pydoc) ;;
        --model_name) MODEL=${2:?--model_name needs a value}; shift ;;
        --data_name) DATA=(--data_name "${2:?--data_name needs a value}"); PROMPTS=(); shift ;;
        --log_dir) LOG=${2:?--log_dir needs a value}; shift ;;
        *) MORE+=("$1") ;;
    esac
    shift
done

source scripts/stages.sh
[ "$MODEL" = models/SmolLM2-135M-Instruct ] || choose_generate
run python "$GENERATE" --model_name "$MODEL" --max_new_tokens 96 --temperature 0 "${PROMPTS[@]}"
run python extract_log.py --log_dir "$LOG" --model_name "$MODEL" "${DATA[@]}" "${RUN[@]}" "${MORE[@]}"
run python compute_influence.py --log_dir "$LOG" --mode cosine --damping 0.1
run python analysis.py --log_dir "$LOG"
