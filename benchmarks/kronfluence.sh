#!/usr/bin/env bash
# Reproduces: uncompressed EK-FAC by this program and by kronfluence 1.0.1: agreement of the scores, time of both
# Needs:      as scripts/quickstart.sh, and 1.3 GB of disk for one more environment
# Takes:      4 minutes on busy cores with the flags below, 3 of them for the environment; idle cores: not measured
# Expect:     seconds of each pass for both and their ratio, relative difference of the scores (measured: 2e-5; above
#             1e-3 it is an error), what was not equal, and one JSON line
# Checked:    2026-11-24, 2 busy CPU cores, Python 3.11: from no environment, with --threads 1 --num_texts 100
#             --num_queries 8 --repeats 1; python benchmarks/kronfluence_compare.py with --repeats 2
#
# Usage: bash benchmarks/kronfluence.sh [--num_texts 500] [more flags of benchmarks/kronfluence_compare.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

# edit here
PYTHON=${PYTHON:-python3}
KRONFLUENCE=kronfluence==1.0.1
TORCH=torch==2.13.0
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

PEER=.venv/peers/kronfluence
if [ -n "${DRY_RUN:-}" ] || ! { echo "$KRONFLUENCE"; cat requirements.txt; } | cmp -s - "$PEER/installed"; then
    run "$PYTHON" -m venv --clear "$PEER"
    run "$PEER/bin/python" -m pip install "$TORCH"
    run "$PEER/bin/python" -m pip install -c requirements.txt "$KRONFLUENCE" transformers numpy safetensors
    # kronfluence requires torchvision but never imports it; PyPI's torchvision breaks transformers with a CPU build of
    # torch (see benchmarks/peers.sh)
    run "$PEER/bin/python" -m pip uninstall --yes torchvision
    [ -n "${DRY_RUN:-}" ] || { echo "$KRONFLUENCE"; cat requirements.txt; } >"$PEER/installed"
fi
run python benchmarks/kronfluence_compare.py "$@"
