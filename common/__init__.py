"""What the five methods share: images, schedules, distributed runs and their checkpoints."""

__version__ = "0.1.0"
