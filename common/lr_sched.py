"""Schedules as pure functions: a step (or a fractional epoch) in, a value out. Nothing here knows an optimizer.

Continuous schedules take the fractional epoch, epoch + step / steps_per_epoch; tables hold a float64 value per step.
"""

import math
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray


def warmup_cosine(epoch: float, base: float, final: float, warmup: float, epochs: float) -> float:
    """Linear from 0 over `warmup` epochs, then half a cosine from base to final at `epochs`, if that is later."""
    if epoch < warmup:
        return base * epoch / warmup
    if epochs <= warmup:
        return base
    return final + (base - final) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def cosine_table(
    base: float,
    final: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
    start: float = 0.0,
    warmup_steps: int = -1,
) -> NDArray[np.float64]:
    """One value per step, as DINO and BEiT tabulate learning rate, weight decay and EMA momentum.

    The warm-up runs from start to base inclusive, so base occurs twice; the cosine never quite reaches final.
    warmup_steps > 0 overrides warmup_epochs. Of a warm-up that is longer than the run the beginning is the table.
    """
    total = epochs * steps_per_epoch
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * steps_per_epoch
    phase = np.pi * np.arange(total - warmup) / max(total - warmup, 1)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(phase))
    return np.concatenate([np.linspace(start, base, warmup)[:total], cosine])


def cosine(position: float, base: float, final: float) -> float:
    """Half a cosine from base (position 0) to final (1). Positions below 0 follow the cosine, too."""
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * position))


def _warmed(rate: float, step: int, warmup: int, ratio: float) -> float:
    """The rate, in the first `warmup` steps times a factor that rises linearly from `ratio` to 1, as in mmcv."""
    return rate * (1 - (1 - step / warmup) * (1 - ratio)) if step < warmup else rate


def warmup_poly(
    step: int, base: float, total: int, warmup: int, ratio: float = 1e-6, power: float = 1.0, final: float = 0.0
) -> float:
    """From base to final at step `total` by (1 - step / total)^power; in the first `warmup` steps times a factor that
    rises linearly from `ratio` to 1, as mmcv's recipes warm up."""
    return _warmed(final + (base - final) * (1 - step / total) ** power, step, warmup, ratio)


def warmup_drops(step: int, epoch: int, base: float, drops: Collection[int], warmup: int, ratio: float = 1e-3) -> float:
    """base, a tenth of it from each of the epochs `drops` on (counted from 0); warmed up as in `warmup_poly`."""
    return _warmed(base * 0.1 ** sum(epoch >= drop for drop in drops), step, warmup, ratio)


def set_lr(param_groups: Iterable[dict], lr: float) -> None:
    """Write lr to every group, times the group's `lr_scale` where it has one."""
    for group in param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
