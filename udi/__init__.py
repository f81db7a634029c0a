"""UDI (ECCV 2024): a ViT pre-trained by self-distillation on several levels."""

import sys
from pathlib import Path

import common

if Path(common.__file__ or "").resolve().parent.parent != Path(__file__).resolve().parent.parent:
    print(f"error: {common} hides this project's own `common`; rename it or run in another folder", file=sys.stderr)
    sys.exit(2)
