#!/usr/bin/env bash
# Runs:   the tests; with --all the slow ones too. More arguments go to pytest.
# Needs:  python3 >= 3.11 with venv, 4 GB of memory; no GPU, no network beyond pip
# Takes:  9 minutes on 2 CPU cores after installation, with --all 35 minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REQUIREMENTS=tests/requirements.txt
source scripts/venv.sh

SELECT=(-m "not slow" -n 2)
if [ "${1:-}" = --all ]; then
    SELECT=()
    shift
fi
ruff check .
ruff format --check .
bandit -q -c pyproject.toml -r logra ./*.py
vulture
mypy
codespell
python -m pytest -q "${SELECT[@]}" "$@"
