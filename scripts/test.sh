#!/usr/bin/env bash
# Runs:   the checks and the fast tests; with --all also the slow tests. Further arguments go to pytest.
# Needs:  python3 >= 3.11 with venv, 4 GB of memory; no GPU; the network only for pip
# Takes:  8 minutes on 2 CPU cores after installation; with --all 50 minutes (measured on a busy machine)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REQUIREMENTS=tests/requirements.txt
source scripts/venv.sh

ALL=
if [ "${1:-}" = --all ]; then
    ALL=1
    shift
fi
ruff check .
ruff format --check .
bandit -q -c pyproject.toml -r logra ./*.py
vulture
mypy
codespell
python -m pytest -q -n 2 -m "not slow" "$@"
[ -z "$ALL" ] || python -m pytest -q -m slow "$@" # one at a time: some tests kill processes at random moments
