"""Types of flags."""

import argparse


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
