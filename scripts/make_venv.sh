#!/bin/sh
# make_venv.sh FOLDER TORCH REQUIREMENT...
# Makes the virtual environment FOLDER with $PYTHON, torch first and alone, then the requirements. Does nothing when
# FOLDER was made from the same Python, the same requirements and the same pyproject.toml.
set -eu

folder=$1 torch=$2
shift 2

version=$("$PYTHON" -c 'import platform; print(platform.python_version())' 2>/dev/null) || {
    echo "actcache needs Python 3.11 or newer, and '$PYTHON' does not run. Name another: make PYTHON=python3.12 ..." >&2
    exit 1
}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "actcache needs Python 3.11 or newer; '$PYTHON' is $version. Name another: make PYTHON=python3.12 ..." >&2
    exit 1
}

recipe="python $version; $torch; $*; $(cksum <pyproject.toml); $(pwd)"
if [ -x "$folder/bin/python" ] && [ "$(cat "$folder/recipe" 2>/dev/null)" = "$recipe" ]; then
    exit 0
fi

echo "==> $folder: making a virtual environment (Python $version)"
rm -f "$folder/recipe"
"$PYTHON" -m venv --clear "$folder" || {
    echo "'$PYTHON -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
}
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$folder/bin/python" -m pip "$@"; }

# First and alone: later steps find the requirement met and pull no other build of it.
echo "==> $folder: installing $torch (the largest part)"
# shellcheck disable=SC2086  # TORCH may hold several pip arguments
pip install -qq $torch || {
    echo "pip could not install '$torch'. Another build or version: make TORCH='torch>=2.4' ..." >&2
    exit 1
}
echo "==> $folder: installing actcache and what it needs"
pip install -qq "$@"
printf '%s' "$recipe" >"$folder/recipe"
echo "==> $folder: ready"
