#!/usr/bin/env bash
# Reproduces: extraction speed, stored bytes and peak memory of ours, bergson and LogIX (benchmarks/peers.py says how)
# Needs:      as scripts/quickstart.sh, and 4 GB of disk for two more environments; 20 GB of memory and 7 of disk for raw
# Takes:      not measured alone
# Expect:     a row for each setting and program, what was not equal, and one JSON line
# Checked:    not yet
#
# Usage: bash benchmarks/peers.sh [--settings none raw kfac] [--examples 32] [more flags of benchmarks/peers.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${DRY_RUN:-}" ] || source scripts/venv.sh

# edit here
PYTHON=${PYTHON:-python3}
BERGSON=bergson==2.5.1
LOGIX=logix-ai==0.1.1
TORCH=torch==2.13.0
# Both take our versions of torch, transformers, numpy, ... (-c requirements.txt). Without: bergson takes the newest torch
# for its torchvision and torchaudio, gigabytes of CUDA with it.

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# new_environment NAME PIN: true where .venv/peers/NAME was not made with this pin and these requirements yet
new_environment() {
    [ -n "${DRY_RUN:-}" ] || ! { echo "$2"; cat requirements.txt; } | cmp -s - ".venv/peers/$1/installed"
}

# make_environment NAME
make_environment() {
    run "$PYTHON" -m venv --clear ".venv/peers/$1"
    run ".venv/peers/$1/bin/pip" install --quiet --disable-pip-version-check "$TORCH"
}

# done_environment NAME PIN
done_environment() {
    [ -n "${DRY_RUN:-}" ] || { echo "$2"; cat requirements.txt; } >".venv/peers/$1/installed"
}

if new_environment bergson "$BERGSON"; then
    make_environment bergson
    run .venv/peers/bergson/bin/pip install --quiet --disable-pip-version-check -c requirements.txt "$BERGSON"
    # PyPI's torchvision is built for CUDA: with a CPU build of torch, transformers (and so bergson) fails on importing it,
    # "operator torchvision::nms does not exist". Nothing of bergson imports it or torchaudio.
    run .venv/peers/bergson/bin/pip uninstall --quiet --yes torchvision torchaudio
    done_environment bergson "$BERGSON"
fi
if new_environment logix "$LOGIX"; then
    make_environment logix
    # 0.1.1, the newest, says python < 3.11 ("No matching distribution found"), but runs on 3.11. --no-deps, since
    # --ignore-requires-python holds for dependencies too and picks a numpy that has no wheel for this python.
    run .venv/peers/logix/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python "$LOGIX"
    run .venv/peers/logix/bin/pip install --quiet --disable-pip-version-check -c requirements.txt numpy einops pyyaml tqdm \
        transformers
    done_environment logix "$LOGIX"
fi
run python benchmarks/peers.py "$@"
