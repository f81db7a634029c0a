"""Upstream's entry point of segmentation: tools/test.py of the method's folder."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "test.py"), run_name="__main__")
