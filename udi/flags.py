"""Types and ranges of flags."""

import argparse
import math

PRETRAIN_RANGES = {
    **dict.fromkeys(("momentum_teacher", "alpha"), (0, 1)),
    **dict.fromkeys(("teacher_temp", "warmup_teacher_temp"), (1e-12, math.inf)),
    **dict.fromkeys(("warmup_teacher_temp_epochs", "freeze_last_layer", "local_crops_number"), (0, math.inf)),
    **dict.fromkeys(("global_size", "local_size", "out_dim"), (1, math.inf)),
    **dict.fromkeys(("global_sampling_window_size", "local_sampling_window_size"), (1, math.inf)),
}


def boolean(text: str) -> bool:
    """Type of upstream's flags that are on or off."""
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text}: expected true or false")


def limit(text: str) -> float | None:
    """Type of a largest value, 0 being none."""
    return float(text) or None
