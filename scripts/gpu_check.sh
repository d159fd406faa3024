#!/usr/bin/env bash
# Reproduces: what docs/gpu.md computes, on one GPU: the tests marked gpu, Llama-3-8B's shape with random weights,
#             SmolLM2-135M, scoring. Writes one record, benchmarks/results/gpu_<card>_<date>.json
# Needs:      one GPU; Python with the packages of requirements.txt and tests/requirements.txt, in .venv or on the PATH;
#             16 GB of memory and 5 GB of disk in TMPDIR; no network
# Takes:      at most 8 minutes: each step has a time limit, and the limits add up to less
# Expect:     a line for each step, "ok" with its seconds; a step that fails is recorded, and the exit status is not 0
# Checked:    2026-11-28, without a GPU, and with steps that stand for the real ones; not measured on a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# edit here
RECORDS=${RECORDS:-benchmarks/results}
[ ! -x .venv/bin/python ] || PATH="$PWD/.venv/bin:$PATH"
PYTHON=${PYTHON:-python}

export PATH HF_HUB_OFFLINE=1
CARD="not asked"
if [ -z "${DRY_RUN:-}" ]; then
    CARD=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
fi
if [ -z "$CARD" ]; then
    echo "expected a GPU, got none; nothing was checked"
    exit 0
fi
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT

# step NAME SECONDS COMMAND...: keeps output, errors, command, seconds and exit status of a command in FOLDER
step() {
    local name=$1 limit=$2 status=0 start=$SECONDS
    shift 2
    echo "+ $*"
    [ -z "${DRY_RUN:-}" ] || return 0
    timeout --kill-after=5 "$limit" "$@" >"$FOLDER/$name.out" 2>"$FOLDER/$name.err" || status=$?
    printf '%s\n%s\n%s\n' "$status" "$((SECONDS - start))" "$*" >"$FOLDER/$name.step"
    if [ "$status" = 0 ]; then
        echo "  ok, $((SECONDS - start)) s"
    else
        echo "  FAILED with status $status$([ "$status" != 124 ] || echo ", out of time") after $((SECONDS - start)) s"
        tail -n 5 "$FOLDER/$name.err" "$FOLDER/$name.out"
    fi
}

export TEST_GPUS=1 # the other tests hide the GPUs
step tests 150 "$PYTHON" -m pytest -q -n 8 -p no:cacheprovider -m gpu tests/device
step llama3_8b 120 "$PYTHON" benchmarks/llama3_8b_gpu.py --repeats 2
step smollm2 90 "$PYTHON" benchmarks/extraction.py --block_size 512 --batch_size 32 --rank 64 136 --batches 4 --repeats 2
SCORING=(benchmarks/scoring.py --device cuda --queries 1 10 100 1000 --repeats 3)
step scoring_float32 45 "$PYTHON" "${SCORING[@]}" --examples 1000
step scoring_int1 45 "$PYTHON" "${SCORING[@]}" --examples 500 --rank 136 --store_dtype int1
[ -n "${DRY_RUN:-}" ] || "$PYTHON" benchmarks/gpu_record.py --folder "$FOLDER" --card "$CARD" --records "$RECORDS"
