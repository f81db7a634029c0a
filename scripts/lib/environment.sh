# Sourced: finds or makes a Python environment that satisfies requirements.txt and the array `packages`, and leaves its
# interpreter in $PYTHON. The active environment is used if it already satisfies them.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

satisfied() { # satisfied PYTHON: every requirement is installed in a fitting version
    "$1" - requirements.txt ${packages[@]+"${packages[@]}"} <<'PY' 2>/dev/null
import sys
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement

lines = open(sys.argv[1]).read().splitlines() + sys.argv[2:]
for requirement in (Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()):
    assert requirement.specifier.contains(version(requirement.name).split("+")[0], prereleases=True), requirement
PY
}

PYTHON=$(command -v python3 || command -v python) || { echo "error: no python3 found; 3.10 or newer is needed" >&2; exit 2; }
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "error: $("$PYTHON" --version) is too old; 3.10 or newer is needed" >&2; exit 2; }
if ! satisfied "$PYTHON"; then
    [ -x .venv/bin/python ] || { echo "making .venv"; "$PYTHON" -m venv .venv; }
    PYTHON=$PWD/.venv/bin/python
    satisfied "$PYTHON" || {
        echo "installing requirements.txt ${packages[*]-} into .venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt ${packages[@]+"${packages[@]}"}
    }
fi
