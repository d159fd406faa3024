#!/usr/bin/env bash
# Reproduces: recall of planted facts by raw and ekfac of rank 64, compared with BM25, embeddings and a random order
# Needs:      as scripts/test.sh
# Takes:      7 minutes on 2 busy CPU cores
# Expect:     the share of facts that the model has learned, and a table: scores, recall@3, recall@10, MRR
# Checked:    2026-11-24, 2 CPU cores, Python 3.11; see evaluation/results/planted_*
#
# Usage: bash evaluation/planted.sh [--model_name MODEL] [more flags of evaluation/planted.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REQUIREMENTS=tests/requirements.txt
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

# edit here
FOLDER=${FOLDER:-data/planted}
LOG=logs/$(basename "$FOLDER")
MODES=(dot cosine)

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

run python evaluation/planted.py "$FOLDER" "$@"
for hessian in raw ekfac; do
    run python extract_log.py --log_dir "${LOG}_$hessian" --model_name "$FOLDER/model" --data_name "$FOLDER/corpus.jsonl" \
        --lora random --rank 64 --hessian "$hessian" --mlp_only
    for mode in "${MODES[@]}"; do
        run python compute_influence.py --log_dir "${LOG}_$hessian" --split "$FOLDER/queries.jsonl" --mode "$mode"
    done
done
run python evaluation/planted.py "$FOLDER" "${LOG}"_{raw,ekfac}/scores/queries-* "$@"
