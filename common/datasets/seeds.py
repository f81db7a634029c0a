"""Random draws of a sample: every generator of this process, seeded by a key."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators by key."""
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])  # noqa: NPY002 - timm draws from the global generator
    torch.default_generator.manual_seed(words[2])


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Let `seed_all` seed the generators, if there is a key; in the main process restore them afterwards."""
    in_main = torch.utils.data.get_worker_info() is None
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if in_main else None  # noqa: NPY002
    try:
        if key:
            seed_all(*key)
        yield
    finally:
        if before:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            torch.set_rng_state(before[2])
