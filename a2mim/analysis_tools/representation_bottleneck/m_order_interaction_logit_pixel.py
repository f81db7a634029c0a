"""Upstream's name of ../../main_interactions.py --stage logits."""

import runpy
import sys
from pathlib import Path

sys.argv[1:1] = ["--stage", "logits"]
runpy.run_path(str(Path(__file__).resolve().parents[2] / "main_interactions.py"), run_name="__main__")
