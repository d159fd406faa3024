#!/usr/bin/env bash
# Reproduces: the table of LDS in evaluation/results, and its two plots: every method on a small GPT-2 and a small Llama
# Needs:      as scripts/test.sh, 8 GB of disk, 8 GB of memory
# Takes:      about 80 minutes on 2 CPU cores, 55 of them to train on the halves of the texts; REDUCED=1: 3 minutes
# Expect:     a table for each model: method, bytes per example, LDS with its interval, ratio to raw's LDS
# Checked:    2026-11-24, 2 CPU cores, Python 3.11, in parts; raw at dampings 1 and 3 only for rank 64
#             2026-11-27, olmoe with NUM_TEXTS=1000 METHODS=few, in parts; training 67 minutes beside other work
#
# Usage: bash evaluation/lds_table.sh [gpt2|llama|olmoe ...]      REDUCED=1: tiny testbeds, to check that it works
#        olmoe is a mixture of experts; it is also evaluated after half of the training. Settings: "edit here" below
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REQUIREMENTS=tests/requirements.txt
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

# edit here
TEXTS=${TEXTS:-pydoc}
TESTBEDS=${TESTBEDS:-testbeds}
RESULTS=${RESULTS:-$TESTBEDS/results}
DAMPINGS=(0.001 0.01 0.1 0.2 0.3)
NUM_TEXTS=${NUM_TEXTS:-2000}
SUBSETS=${SUBSETS:-60}
METHODS=${METHODS:-all} # few: raw, ekfac, the preset, uncompressed; targets: also those with a target; all
SIZE=(--num_texts "$NUM_TEXTS" --num_queries 100 --num_subsets "$SUBSETS")
if [ -n "${REDUCED:-}" ]; then
    METHODS=few
    SIZE=(--num_texts 60 --num_queries 10 --num_subsets 4 --epochs 2 --width 32 --num_layers 1)
fi

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# method NAME MODE "HESSIAN ..." FLAGS: one extraction, scored with each Hessian and damping
method() {
    local name=$1 mode=$2 hessians=$3 log
    shift 3
    log=$RUNS/$name
    for hessian in $hessians; do
        run python extract_log.py --log_dir "$log" --model_name "$MODEL" --data_name "$BED/train.jsonl" \
            --mlp_only --hessian "$hessian" "$@"
        local dampings=(--damping "${DAMPINGS[@]}")
        [ "$hessian" != none ] || dampings=()
        [ "$hessian" != raw ] || dampings+=(1 3)
        run python compute_influence.py --log_dir "$log" --split "$BED/queries.jsonl" --mode "$mode" \
            --hessian "$hessian" "${dampings[@]}"
    done
}

targets() {
    for rank in 16 32 128; do
        method "raw$rank" dot raw --rank "$rank"
    done
    for rank in 16 32 128; do
        method "eigen$rank" dot "ekfac kfac" --rank "$rank"
    done
    method eigen64 dot kfac --rank 64
    for bits in int8 int4 int1; do
        method "$bits-64" dot ekfac --rank 64 --store_dtype "$bits"
    done
    method int1-128 dot ekfac --rank 128 --store_dtype int1
    method full-int1 dot ekfac --lora none --store_dtype int1
}

others() {
    method raw64 cosine none --rank 64
    method eigen64 cosine ekfac --rank 64
    method pca64 dot ekfac --lora pca --rank 64
    method bfloat16-64 dot ekfac --rank 64 --store_dtype bfloat16
    method int4-128 dot ekfac --rank 128 --store_dtype int4
    method int1-256 dot ekfac --rank 256 --store_dtype int1
    method full-kfac dot kfac --lora none --store_dtype none
}

# evaluate PART: the methods with a model of the testbed; PART is empty, or _half: the checkpoint at half of the training
evaluate() {
    MODEL=$BED/${1:+checkpoints/0.5}
    [ -n "$1" ] || MODEL=$BED/model
    RUNS=$BED/runs$1
    method raw64 dot "raw none" --rank 64
    method eigen64 dot ekfac --rank 64
    method best dot ekfac --preset best
    method full dot ekfac --lora none --store_dtype none
    [ "$METHODS" = few ] || targets
    [ "$METHODS" != all ] || others
    run python evaluation/baselines.py "$RUNS/raw64" --split "$BED/queries.jsonl" --output "$RUNS/baselines"
    run python evaluation/lds.py "$BED" "$RUNS/raw64/scores/"*dot-raw-0.1 "$RUNS"/*/scores/queries-* \
        "$RUNS"/baselines/* --json "$RESULTS/$(basename "$BED")$1.json" ${1:+--half}
}

[ $# -gt 0 ] || set -- gpt2 llama
for architecture in "$@"; do
    BED=$TESTBEDS/$architecture
    run python evaluation/lds.py "$BED" --architecture "$architecture" --texts "$TEXTS" "${SIZE[@]}"
    evaluate ""
    [ "$architecture" != olmoe ] || evaluate _half
done
run python evaluation/lds_plot.py "$RESULTS"
