#!/usr/bin/env bash
# Reproduces: extraction speed, stored bytes, peak memory of this program, bergson and LogIX (see benchmarks/peers.py)
# Needs:      as scripts/quickstart.sh, and 4 GB of disk for two more environments; raw: 20 GB of memory, 7 GB of disk
# Takes:      about 25 minutes on 2 CPU cores after installation, 17 with --examples 16 (added up from partial runs)
# Expect:     a row for each setting and program, a list of what was not equal, and one JSON line
# Checked:    2026-11-24, 2 CPU cores, Python 3.11: from no environments, with --settings none raw --examples 4; then
#             all settings with --examples 16. Not checked: the default 32 examples to the end; a GPU
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
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Both peers get our versions of torch, transformers, numpy, ... (-c requirements.txt). Without that, bergson's
# torchvision installs the newest torch with gigabytes of CUDA.

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# new_environment NAME PIN: true if .venv/peers/NAME was not yet made with this pin and these requirements
new_environment() {
    [ -n "${DRY_RUN:-}" ] || ! { echo "$2"; cat requirements.txt; } | cmp -s - ".venv/peers/$1/installed"
}

# make_environment NAME
make_environment() {
    run "$PYTHON" -m venv --clear ".venv/peers/$1"
    run ".venv/peers/$1/bin/python" -m pip install "$TORCH"
}

# done_environment NAME PIN
done_environment() {
    [ -n "${DRY_RUN:-}" ] || { echo "$2"; cat requirements.txt; } >".venv/peers/$1/installed"
}

if new_environment bergson "$BERGSON"; then
    make_environment bergson
    run .venv/peers/bergson/bin/python -m pip install -c requirements.txt "$BERGSON"
    # PyPI's torchvision is built for CUDA. With a CPU build of torch, transformers (and so bergson) fails to import it:
    # "operator torchvision::nms does not exist". bergson imports neither it nor torchaudio.
    run .venv/peers/bergson/bin/python -m pip uninstall --yes torchvision torchaudio
    done_environment bergson "$BERGSON"
fi
if new_environment logix "$LOGIX"; then
    make_environment logix
    # 0.1.1, the newest version, requires python < 3.11 ("No matching distribution found") but runs on 3.11. --no-deps,
    # because --ignore-requires-python applies to dependencies too, and picks a numpy without a wheel for this python.
    run .venv/peers/logix/bin/python -m pip install --no-deps --ignore-requires-python "$LOGIX"
    run .venv/peers/logix/bin/python -m pip install -c requirements.txt numpy einops pyyaml tqdm transformers
    done_environment logix "$LOGIX"
fi
run python benchmarks/peers.py "$@"
