"""The quickstart's command line; its steps are the scripts that the other tests run."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.helpers import ROOT


def test_a_missing_folder_is_one_line():
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "scripts/quickstart.sh", "--data_path", "/nowhere"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == "quickstart.py: --data_path /nowhere: no such folder\n"
