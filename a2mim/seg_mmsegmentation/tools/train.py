"""Upstream's entry point of segmentation: tools/train.py of the method's folder."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "train.py"), run_name="__main__")
