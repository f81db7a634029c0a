#!/usr/bin/env bash
# The default tests with the oldest and with the newest packages that requirements.txt allows, each in an environment of
# its own, .matrix/PYTHON-PACKAGES (6 GB each). Called by: bash scripts/test.sh --matrix [3.11:oldest ...] [pytest arguments]
# Default: the oldest Python with the oldest packages, and the newest with the newest. A Python comes from uv, if that is
# installed, else from the PATH; those missing are named at the end. Exit status: 1 if a test fails, 2 if nothing ran.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
chosen=() missing=() failed=() passed=()
while [[ ${1:-} =~ ^3\.[0-9]+:(oldest|newest)$ ]]; do
    chosen+=("$1")
    shift
done
((${#chosen[@]})) || chosen=(3.10:oldest 3.13:newest)

# environment PYTHON FOLDER: make it, unless it is there
environment() {
    [[ -x $2/bin/python ]] && return
    if command -v uv >/dev/null && uv venv --quiet --seed --python "$1" "$2"; then return; fi
    "python$1" -m venv "$2" 2>/dev/null # pyenv's stand-ins are there for versions that are not installed, too
}

for each in "${chosen[@]}"; do
    folder=.matrix/${each/:/-} packages=${each#*:}
    environment "${each%:*}" "$folder" || { missing+=("Python ${each%:*}") && continue; }
    if [[ $packages == oldest ]]; then # torch>=2.11 as torch==2.11.*
        sed -E 's/#.*//; s/>=([0-9.]+)[^ ]*/==\1.*/' requirements.txt >"$folder/requirements.txt"
    else
        cp requirements.txt "$folder/requirements.txt"
    fi
    echo "== $each"
    if "$folder/bin/python" -m pip install --quiet --upgrade -r "$folder/requirements.txt" pytest pytest-timeout \
        pytest-xdist setuptools braceexpand pycocotools &&
        "$folder/bin/python" -m pip list 2>/dev/null | grep -E "^(torch|torchvision|timm|numpy) " &&
        "$folder/bin/python" -m pytest -q -n 2 "$@"; then
        passed+=("$each")
    else
        failed+=("$each")
    fi
done
echo "passed: ${passed[*]:-none}; failed: ${failed[*]:-none}; not here: ${missing[*]:-none}"
((${#failed[@]} == 0)) || exit 1
((${#passed[@]})) || exit 2
