"""Upstream's other name of ../../eval_finetuning/extract_backbone_weights_for_finetuning.py."""

import runpy
from pathlib import Path

SCRIPT = "eval_finetuning/extract_backbone_weights_for_finetuning.py"
runpy.run_path(str(Path(__file__).resolve().parents[2] / SCRIPT), run_name="__main__")
