"""scripts/test.sh --matrix, with stand-ins for the Pythons."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.helpers import ROOT

# Makes an environment, whose Python writes down what it is called with and fails in the tests of $FAIL.
PYTHON = """#!/bin/bash
mkdir -p "$3/bin"
cat >"$3/bin/python" <<'EOF'
#!/bin/bash
echo "$0 $*" >>calls
case $2 in
    pip) if [[ $3 == list ]]; then echo "torch 2.11.0"; fi ;;
    pytest) [[ $0 != *$FAIL* ]] ;;
esac
EOF
chmod +x "$3/bin/python"
"""


def run(folder: Path, *words: str, fail: str = "none") -> subprocess.CompletedProcess[str]:
    """The script in a copy of the checkout with Python 3.10 and 3.13."""
    (folder / "bin").mkdir()
    for version in ("3.10", "3.13"):
        (folder / "bin" / f"python{version}").write_text(PYTHON)
        (folder / "bin" / f"python{version}").chmod(0o755)
    for path in ("scripts/test.sh", "scripts/lib/matrix.sh", "requirements.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "FAIL": fail, "HOME": os.environ.get("HOME", "/")}
    script = ["bash", str(folder / "scripts" / "test.sh"), "--matrix", *words]
    return subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)


def test_oldest_and_newest(tmp_path):
    done = run(tmp_path, "tests/common", "-k", "files")
    assert done.stdout.splitlines()[-1] == "passed: 3.10:oldest 3.13:newest; failed: none; not here: none"
    assert done.returncode == 0
    calls = (tmp_path / "calls").read_text()
    assert calls.count("-m pytest -q -n 2 tests/common -k files\n") == 2
    oldest, newest = (
        (tmp_path / ".matrix" / name / "requirements.txt").read_text() for name in ("3.10-oldest", "3.13-newest")
    )
    assert newest == (ROOT / "requirements.txt").read_text()
    assert {"torch==2.11.*", "timm==1.0.26.*", "numpy==2.0.*"} <= {line.strip() for line in oldest.splitlines()}
    assert ">=" not in oldest and "#" not in oldest


@pytest.mark.parametrize(
    ("fail", "status", "last"),
    [
        ("oldest", 1, "passed: 3.13:newest; failed: 3.10:oldest; not here: Python 3.9"),
        ("3.1", 1, "passed: none; failed: 3.10:oldest 3.13:newest; not here: Python 3.9"),
        ("none", 0, "passed: 3.10:oldest 3.13:newest; failed: none; not here: Python 3.9"),
    ],
)
def test_failures_and_missing_pythons(tmp_path, fail, status, last):
    done = run(tmp_path, "3.9:newest", "3.10:oldest", "3.13:newest", fail=fail)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (status, last)


def test_where_no_python_is_there(tmp_path):
    assert run(tmp_path, "3.9:newest").returncode == 2
