"""Upstream's entry point: main_detection.py with the flags of the row that the configuration's name stands for."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from a2mim import authors_commands, main_detection

authors_commands.start(main_detection, sys.argv[1:], test=True)
