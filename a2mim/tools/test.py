"""Upstream's evaluation, test.py CONFIG CHECKPOINT [flags]: forwards to the configuration's script with --eval."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from a2mim.config import script

sys.argv[2:3] = ["--eval", "--resume", *sys.argv[2:3]]
runpy.run_path(script(sys.argv[1:]), run_name="__main__")
