"""Upstream's name of main_pretrain.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("main_pretrain.py")), run_name="__main__")
