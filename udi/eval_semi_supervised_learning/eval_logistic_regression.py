"""Upstream's name of ../main_logistic_regression.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "main_logistic_regression.py"), run_name="__main__")
