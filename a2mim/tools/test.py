"""Upstream's evaluation, test.py CONFIG CHECKPOINT [flags]: forwards to the configuration's script with --eval."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from a2mim.config import script

main = script(sys.argv[1:])
after = next(i for i, word in enumerate(sys.argv[1:], 2) if word.endswith(".py"))  # a launcher's flags come first
sys.argv[after : after + 1] = ["--eval", "--resume", *sys.argv[after : after + 1]]
runpy.run_path(main, run_name="__main__")
