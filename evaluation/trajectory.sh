#!/usr/bin/env bash
# Reproduces: the tables and the plot of LDS over checkpoints in evaluation/results: one, two, three and all checkpoints
# Needs:      as scripts/test.sh, 8 GB of disk, 8 GB of memory
# Takes:      about 40 minutes a testbed on 2 CPU cores, 30 of them to train; REDUCED=1: 3 minutes
# Expect:     for each testbed and kind of gradients: checkpoints, bytes, LDS with its interval, ratio to the final model
# Checked:    2026-11-28, 2 CPU cores, Python 3.11: gpt2 in parts, beside other work; REDUCED=1 in one piece
#
# Usage: bash evaluation/trajectory.sh [gpt2|llama|few ...]      REDUCED=1: tiny testbeds, to check that it works
#        gpt2, llama: 2000 texts, each seen 10 times; few: GPT-2 on 9000 texts, each seen twice. Settings: below
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REQUIREMENTS=tests/requirements.txt
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

# edit here
TEXTS=${TEXTS:-pydoc}                       # of gpt2 and llama
MORE_TEXTS=${MORE_TEXTS:-pydoc docstrings}  # of few: the manual, and the docstrings of Python's standard library
TESTBEDS=${TESTBEDS:-testbeds}
RESULTS=${RESULTS:-$TESTBEDS/trajectory}
SHARES=(0.05 0.1 0.2 0.35 0.5 0.65 0.8)     # of the training; the final model comes last
RANKS=(${RANKS:-136 96 80})                 # two checkpoints of rank 96, or three of rank 80, take the bytes of one of 136
SIZE=()
FEW=(--num_texts 9000 --epochs 2)
if [ -n "${REDUCED:-}" ]; then
    SHARES=(0.2 0.5)
    RANKS=(16)
    SIZE=(--num_texts 60 --num_queries 10 --num_subsets 4 --epochs 2 --width 32 --num_layers 1)
    FEW=()
fi

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# trajectory NAME FLAGS: the runs of all checkpoints in one parent folder, and their scores
trajectory() {
    local log=$BED/trajectory/$1
    shift
    run python extract_log.py --log_dir "$log" --checkpoints "${SHARES[@]/#/$BED/checkpoints/}" "$BED/model" \
        --data_name "$BED/train.jsonl" --mlp_only --hessian ekfac "$@"
    run python compute_influence.py --log_dir "$log" --split "$BED/queries.jsonl"
    PARENTS+=("$log")
}

[ $# -gt 0 ] || set -- gpt2 llama few
for bed in "$@"; do
    BED=$TESTBEDS/$bed
    PARENTS=()
    case $bed in
        few) run python evaluation/lds.py "$BED" --architecture gpt2 --texts $MORE_TEXTS "${SIZE[@]}" "${FEW[@]}" ;;
        *) run python evaluation/lds.py "$BED" --architecture "$bed" --texts $TEXTS "${SIZE[@]}" ;;
    esac
    trajectory full --lora none --store_dtype none
    for rank in "${RANKS[@]}"; do
        trajectory "rank$rank" --store_dtype int1 --rank "$rank" --calibration_examples 2048
    done
    run python evaluation/trajectory.py "$BED" "${PARENTS[@]}" --json "$RESULTS/$bed.json"
done
run python evaluation/trajectory.py --plot "$RESULTS"
