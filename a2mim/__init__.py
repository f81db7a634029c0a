"""A2MIM (ICML 2023) and SimMIM: ViTs, ResNets and ConvNeXts pre-trained by masked image modelling."""

import sys
from pathlib import Path

import common

if Path(common.__file__ or "").resolve().parent.parent != Path(__file__).resolve().parent.parent:
    print(f"error: {common} hides this project's own `common`; rename it or run in another folder", file=sys.stderr)
    sys.exit(2)
