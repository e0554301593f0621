#!/usr/bin/env bash
# Makes .venv, or brings it up to date, and leaves the stamp named by the argument. PYTHON names the interpreter, TORCH_INDEX an index to take PyTorch from.
set -euo pipefail
cd "$(dirname "$0")/.."
"$PYTHON" -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}, at least 3.11 is needed: make PYTHON=python3.11 ... names another")'
echo 'Setting up .venv: PyTorch, then the rest (some minutes, once)'
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check install -qq)
index=()
if [ -n "${TORCH_INDEX:-}" ] && [ "$(uname)" = Linux ]; then index=(--index-url "$TORCH_INDEX"); fi
"${pip[@]}" ${index[@]+"${index[@]}"} "$(grep '^torch==' constraints.txt)"
"${pip[@]}" -c constraints.txt -e '.[all,dev]'
rm -f .venv/ready-*
touch "$1"
