"""Upstream's name of ../../main_linprobe.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "main_linprobe.py"), run_name="__main__")
