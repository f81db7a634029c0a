"""Run a script with a narrow head, whose checkpoints are small: python udi_narrow_head.py <script> <words>.

RECORD=<folder>: each process writes what its networks and centres add up to after every epoch, to <rank>.json.
"""

import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import distributed
from udi import engine_pretrain
from udi.models_udi import DINOHead

WIDTHS = (False, True, 3, 64, 32)  # defaults of DINOHead's arguments: use_bn ... hidden_dim, bottleneck_dim


def record(folder: Path) -> None:
    """Wrap the training of an epoch."""
    train, sums = engine_pretrain.train_one_epoch, []

    def wrapped(student, teacher, udi_loss, *args):
        stats = train(student, teacher, udi_loss, *args)
        parts = (distributed.unwrap(student), teacher, udi_loss)
        sums.append([[value.double().abs().sum().item() for value in part.state_dict().values()] for part in parts])
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(sums))
        return stats

    engine_pretrain.train_one_epoch = wrapped


if __name__ == "__main__":
    DINOHead.__init__.__defaults__ = WIDTHS
    if "RECORD" in os.environ:
        record(Path(os.environ["RECORD"]))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
