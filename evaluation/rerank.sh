#!/usr/bin/env bash
# Reproduces: the tables and plots of re-ranking in evaluation/results: what the first candidates hold, re-ranked lists,
#             and with RETRAIN=10 the rise of 10 queries' losses after training without the first 20 texts of each list
# Needs:      as scripts/test.sh, 8 GB of disk, 8 GB of memory
# Takes:      5 minutes a testbed on 2 CPU cores, and 40 to train it; smollm2 20 minutes; RETRAIN=10: 35 minutes more a
#             testbed; REDUCED=1: 2 minutes
# Expect:     for each store: share of the uncompressed top 10 among its first 10 to 200, and in the re-ranked top 10
# Checked:    2026-11-28, 2 CPU cores, Python 3.11: its commands one by one, beside other work; REDUCED=1 in one piece
#
# Usage: bash evaluation/rerank.sh [gpt2|llama|few|smollm2 ...]      REDUCED=1: a tiny testbed, to check that it works
#        Testbeds are those of trajectory.sh. smollm2: SmolLM2-135M, 9 MLP matrices of 3 blocks, 240 blocks of pydoc
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REQUIREMENTS=tests/requirements.txt
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

# edit here
TESTBEDS=${TESTBEDS:-testbeds}
RESULTS=${RESULTS:-$TESTBEDS/rerank}
RERANK=${RERANK:-200}
RETRAIN=${RETRAIN:-0}                       # number of queries
MODEL=models/SmolLM2-135M-Instruct
QUESTIONS=data/generated/SmolLM2-135M-Instruct/topics.jsonl
CALIBRATION=2048
SIZE=()
FEW=(--num_texts 9000 --epochs 2)
if [ -n "${REDUCED:-}" ]; then
    SIZE=(--num_texts 60 --num_queries 10 --num_subsets 4 --epochs 2 --width 32 --num_layers 1)
    FEW=()
fi

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# method NAME "FLAGS OF STAGE 3" FLAGS
method() {
    local log=$LOGS/$1 scoring=($2)
    shift 2
    run python extract_log.py --log_dir "$log" "${RUN[@]}" "$@"
    run python compute_influence.py --log_dir "$log" --split "$QUERIES" "${scoring[@]}"
}

[ -n "${DRY_RUN:-}" ] || mkdir -p "$RESULTS"
[ $# -gt 0 ] || set -- gpt2 llama few
for bed in "$@"; do
    BED=$TESTBEDS/$bed
    LOGS=$BED/rerank
    QUERIES=$BED/queries.jsonl
    RUN=(--model_name "$BED/model" --data_name "$BED/train.jsonl" --mlp_only)
    case $bed in
        few) run python evaluation/lds.py "$BED" --architecture gpt2 --texts pydoc docstrings "${SIZE[@]}" "${FEW[@]}" ;;
        smollm2)
            QUERIES=$QUESTIONS
            CALIBRATION=64
            RUN=(--model_name "$MODEL" --data_name pydoc --data_config short --shuffle_seed 0 --max_examples 240 --block_size 256 --layers 'layers\.(5|15|25)\.mlp')
            run python generate_llama3.py --model_name "$MODEL" --prompts evaluation/topics.jsonl --output "$QUERIES" \
                --max_new_tokens 96 --temperature 0
            ;;
        *) run python evaluation/lds.py "$BED" --architecture "$bed" "${SIZE[@]}" ;;
    esac
    method full "" --hessian ekfac --lora none --store_dtype none --calibration_examples "$CALIBRATION"
    method best "--rerank $RERANK" --preset best --calibration_examples "$CALIBRATION"
    method paper "--rerank $RERANK" --preset paper --calibration_examples "$CALIBRATION"
    run python evaluation/agreement.py "$LOGS"/full/scores/* "$LOGS"/{best,paper}/scores/* --plot "$RESULTS/$bed.png"
    if [ "$RETRAIN" != 0 ] && [ "$bed" != smollm2 ]; then
        run python evaluation/brittleness.py "$BED" "$LOGS"/{paper,best}/scores/* --num_queries "$RETRAIN"
        run python compute_influence.py --log_dir "$LOGS/best" --split "$QUERIES" --rerank "$RERANK" \
            --rerank_checkpoints "$BED"/checkpoints/{0.2,0.5} "$BED/model"
        run python evaluation/brittleness.py "$BED" "$LOGS"/best/scores/* --num_queries "$RETRAIN"
    fi
done
