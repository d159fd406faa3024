#!/usr/bin/env bash
# Reproduces: uncompressed EK-FAC, ours and kronfluence 1.0.1's: agreement of the scores, and the time of both
# Needs:      as scripts/quickstart.sh, 1.3 GB of disk for one more environment
# Takes:      not measured on idle cores (on busy ones 4 minutes with the flags below, 3 of them for the environment)
# Expect:     seconds of both by pass and their ratio, the scores' relative difference (an error above 1e-3; 2e-5 seen),
#             what was not equal, and one JSON line
# Checked:    2026-11-24, 2 CPU cores that others used, Python 3.11: from no environment, with --threads 1
#             --num_texts 100 --num_queries 8 --repeats 1; python benchmarks/kronfluence_compare.py with --repeats 2
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
    # see benchmarks/peers.sh: PyPI's torchvision breaks transformers beside a CPU build of torch; kronfluence asks for
    # it, and never imports it
    run "$PEER/bin/python" -m pip uninstall --yes torchvision
    [ -n "${DRY_RUN:-}" ] || { echo "$KRONFLUENCE"; cat requirements.txt; } >"$PEER/installed"
fi
run python benchmarks/kronfluence_compare.py "$@"
