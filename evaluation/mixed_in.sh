#!/usr/bin/env bash
# Reproduces: the table of mixed-in rows in evaluation/results: does a method find the rows of another topic?
# Needs:      as scripts/test.sh, 4 GB of memory
# Takes:      about 10 minutes a model on 2 idle CPU cores (computed), 25 beside other work; REDUCED=1: 2 minutes
# Expect:     for each model the queries' loss, and a table: scores, average precision without and with decoys
# Checked:    2026-11-28, 2 CPU cores, Python 3.11: in parts, beside other work; REDUCED=1 in one piece
#
# Usage: bash evaluation/mixed_in.sh [gpt2|llama ...]      REDUCED=1: tiny models, to check that it works
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REQUIREMENTS=tests/requirements.txt
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

# edit here
TESTBEDS=${TESTBEDS:-testbeds/mixed_in}
SEEDS=(0 1 2)
SIZE=()
if [ -n "${REDUCED:-}" ]; then
    SEEDS=(0)
    SIZE=(--num_pretraining 100 --num_manual 40 --num_mixed 8 --num_queries 4 --num_layers 1 --width 32)
fi

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# evaluate FOLDER: every method on the rows and the model in a folder
evaluate() {
    local queries=${1%/*}/queries.jsonl
    for preset in best paper; do
        run python extract_log.py --log_dir "$1/runs/$preset" --model_name "$1/model" --data_name "$1/corpus.jsonl" --preset "$preset"
        for mode in dot cosine; do
            run python compute_influence.py --log_dir "$1/runs/$preset" --split "$queries" --mode "$mode"
        done
    done
    run python compute_influence.py --log_dir "$1/runs/paper" --split "$queries" --hessian none
    run python evaluation/baselines.py "$1/runs/paper" --split "$queries" --output "$1/baselines" --baselines bm25 embedding
}

[ $# -gt 0 ] || set -- gpt2 llama
for architecture in "$@"; do
    BED=$TESTBEDS/$architecture
    run python evaluation/mixed_in.py "$BED" --architecture "$architecture" --num_seeds "${#SEEDS[@]}" "${SIZE[@]}"
    for seed in "${SEEDS[@]}"; do
        for variant in plain decoys; do
            evaluate "$BED/$seed/$variant"
        done
    done
    run python evaluation/mixed_in.py "$BED" "$BED"/*/*/runs/*/scores/* "$BED"/*/*/baselines/*
done
