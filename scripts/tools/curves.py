"""Reference bands, docs/curves/<row>.json: the losses by epoch that a small recipe had with several seeds.

record_curves.py writes the files. A run of the same recipe is inside its band or not.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.distributed.checkpoint import ELSEWHERE, STARTS

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "curves"
# Flags in which runs of one recipe may differ.
NOT_LEARNT = {*ELSEWHERE, *STARTS, "seed", "force", "compile", "bad_images", "save_freq", "saveckp_freq"}
OTHERS = ("initial_checkpoint", "in_chans")  # flags that make another run, also where a band has no record of them
LOSS = "train_loss"
# Half width in deviations between seeds: with three seeds 95 % of further runs are inside, by Student's t
# (4.30 deviations, times (1 + 1/3)^0.5 because the mean has an error, too).
WIDTH = 5.0


@dataclass(frozen=True)
class Band:
    """Losses of a recipe: mean and standard deviation over seeds, by epoch in their order."""

    row: str
    flags: dict[str, Any]
    images: int  # of the training set
    seeds: list[int]
    mean: list[float]
    std: list[float]

    @property
    def half_width(self) -> np.ndarray:
        """By epoch (E,). Three seeds may agree by chance: the deviation is at least the typical share of the loss."""
        mean, std = np.abs(self.mean), np.array(self.std)
        return WIDTH * np.maximum(std, np.median(std / mean.clip(1e-12)) * mean)

    def outside(self, losses: list[float]) -> list[int]:
        """Positions of the losses, an epoch's each, that are not inside or not finite."""
        pairs = zip(losses, self.mean, self.half_width, strict=False)
        return [i for i, (loss, mean, half) in enumerate(pairs) if not abs(loss - mean) <= half]

    def verdict(self, log: dict[int, dict[str, float]]) -> str:
        """One line on a run's log; '' before its first epoch is over. A loss that the log lacks was not finite."""
        losses = [values.get(LOSS, math.nan) for values in log.values()]
        if not losses:
            return ""
        seeds, odd = f"{len(self.seeds)} seeds", self.outside(losses)
        if not odd:
            return f"loss inside the reference band of {self.row} ({seeds}) in all {len(losses)} epochs so far"
        first, names = odd[0], list(log)
        low, high = (self.mean[first] + sign * self.half_width[first] for sign in (-1, 1))
        where = f"in {len(odd)} of {len(losses)} epochs, first in epoch {names[first]}"
        values = f"{losses[first]:.4g}, {low:.4g} to {high:.4g} expected"
        return f"loss outside the reference band of {self.row} ({seeds}) {where}: {values}"


def learnt(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags on which a loss depends, as JSON has them."""
    return json.loads(json.dumps({k: v for k, v in flags.items() if k not in NOT_LEARNT}, default=str))


def read(path: Path) -> Band:
    content = json.loads(path.read_text("utf-8"))
    return Band(**{name: content[name] for name in Band.__dataclass_fields__})


def band_of(flags: dict[str, Any], images: int | None = None, folder: Path = FOLDER) -> Band | None:
    """The band of a run's recipe, by its flags; None if there is none.

    Flags that came after a band was recorded are not compared, but for those of `OTHERS`.
    Args:
        images: of the run's training set, where known.
    """
    own = learnt(flags)
    for path in sorted(folder.glob("*.json")) if own else ():
        band = read(path)
        other = any(flags.get(name) and name not in band.flags for name in OTHERS)
        if band.flags.items() <= own.items() and not other and images in (None, band.images):
            return band
    return None
