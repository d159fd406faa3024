#!/usr/bin/env bash
# Runs:   the tests; with --all the slow ones too. More arguments go to pytest.
# Needs:  python3 >= 3.11 with venv, 4 GB of memory; no GPU, no network beyond pip
# Takes:  8 minutes on 2 CPU cores after installation, with --all 50 (that with other work beside it)
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
[ -z "$ALL" ] || python -m pytest -q -m slow "$@" # one at a time: some kill processes at random moments
