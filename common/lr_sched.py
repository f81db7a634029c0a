"""Schedules as pure functions: a step (or a fractional epoch) in, a value out. Nothing here knows an optimizer.

Continuous schedules take the fractional epoch, epoch + step / steps_per_epoch; tables hold a float64 value per step.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def warmup_cosine(epoch: float, base: float, final: float, warmup: float, epochs: float) -> float:
    """Linear from 0 over `warmup` epochs, then half a cosine from base to final at `epochs`.

    Raises:
        ValueError: the warm-up is as long as the whole run or longer.
    """
    if epochs <= warmup:
        raise ValueError(f"{epochs} epochs leave nothing after {warmup} warm-up epochs")
    if epoch < warmup:
        return base * epoch / warmup
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
    warmup_steps > 0 overrides warmup_epochs.
    Raises:
        ValueError: the warm-up is longer than the run.
    """
    total = epochs * steps_per_epoch
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * steps_per_epoch
    if warmup > total:
        raise ValueError(f"a warm-up of {warmup} steps does not fit into {total} steps")
    phase = np.pi * np.arange(total - warmup) / max(total - warmup, 1)
    return np.concatenate([np.linspace(start, base, warmup), final + 0.5 * (base - final) * (1 + np.cos(phase))])


def ramp(step: float, start: float, end: float, length: float) -> float:
    """Linear from start to end over `length` steps, then end (EMA decay)."""
    return end if step >= length else start + (end - start) * step / length


def ramp_table(start: float, end: float, length: int, total: int) -> NDArray[np.float64]:
    """start to end inclusive over the first `length` entries, then end; cut at `total` (teacher temperature)."""
    return np.concatenate([np.linspace(start, end, length), np.full(max(total - length, 0), end)])[:total]


def multi_step(epoch: float, base: float, milestones: Sequence[float], gamma: float) -> float:
    """base times gamma for every milestone reached."""
    return base * gamma ** sum(epoch >= m for m in milestones)


def cosine(position: float, base: float, final: float) -> float:
    """Half a cosine from base (position 0) to final (1). Positions below 0 follow the cosine, too."""
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * position))


def warmup_factor(step: float, warmup_steps: float, ratio: float = 0.0) -> float:
    """Factor that grows linearly from ratio to 1 over warmup_steps."""
    return 1.0 if step >= warmup_steps else 1 - (1 - step / warmup_steps) * (1 - ratio)


def set_lr(param_groups: Iterable[dict], lr: float) -> None:
    """Write lr to every group, times the group's `lr_scale` where it has one."""
    for group in param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
