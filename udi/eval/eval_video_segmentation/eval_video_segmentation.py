"""Upstream's name of ../../main_video_segmentation.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "main_video_segmentation.py"), run_name="__main__")
