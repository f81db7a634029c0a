"""Upstream's entry point: runs the script that the configuration is for."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from a2mim.config import script

runpy.run_path(script(sys.argv[1:]), run_name="__main__")
