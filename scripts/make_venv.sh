#!/bin/sh
# make_venv.sh FOLDER FIRST [REQUIREMENT...]
# Makes the virtual environment FOLDER with $PYTHON: FIRST (torch, mostly) and alone, then the requirements. Does only
# what has changed since the last time: nothing, the requirements (or pyproject.toml), or everything.
set -eu

folder=$1 first=$2
shift 2

version=$("$PYTHON" -c 'import platform; print(platform.python_version())' 2>/dev/null) || {
    echo "actcache needs Python 3.11 or newer, and '$PYTHON' does not run. Name another: make PYTHON=python3.12 ..." >&2
    exit 1
}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "actcache needs Python 3.11 or newer; '$PYTHON' is $version. Name another: make PYTHON=python3.12 ..." >&2
    exit 1
}

base="python $version; $first; $(pwd)"
rest="${*:+$*; $(cksum <pyproject.toml)}"
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$folder/bin/python" -m pip "$@"; }
# What is written down was finished: an interrupted run is taken up again.
unchanged() { [ -x "$folder/bin/python" ] && [ "$(cat "$folder/made-from-$1" 2>/dev/null)" = "$2" ]; }

if unchanged base "$base" && unchanged rest "$rest"; then
    echo "==> $folder: up to date"
    exit 0
fi

if ! unchanged base "$base"; then
    echo "==> $folder: making a virtual environment (Python $version)"
    "$PYTHON" -m venv --clear "$folder" || {
        echo "'$PYTHON -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
    # First and alone: later steps find the requirement met and pull no other build of it.
    echo "==> $folder: installing $first (the largest part)"
    # shellcheck disable=SC2086  # FIRST may hold several pip arguments
    pip install -qq $first || {
        case $first in
        *torch*) hint=" Another version, build or index: make TORCH='torch>=2.4' ..." ;;
        *) hint= ;;
        esac
        echo "pip could not install '$first'.$hint" >&2
        exit 1
    }
    printf '%s' "$base" >"$folder/made-from-base"
fi

if [ $# -gt 0 ]; then
    echo "==> $folder: installing actcache and what it needs"
    pip install -qq "$@"
fi
printf '%s' "$rest" >"$folder/made-from-rest"
echo "==> $folder: ready"
