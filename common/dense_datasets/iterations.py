"""Batches of a run that counts updates instead of passes over the images."""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from common.datasets import Loader
from common.distributed import Position, UserError, flag_groups, log, world_size


def add_flags(parser: argparse.ArgumentParser, iters: int, eval_interval: int) -> None:
    """Add the flags of a schedule that counts updates of the weights."""
    g = flag_groups(parser)
    g.optimizer.add_argument("--iters", default=iters, type=int, help="updates of the weights")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="batches per update of the weights")
    g.output.add_argument("--eval_interval", default=eval_interval, type=int, help="updates between evaluations")
    saved = "updates between checkpoints, besides that at every evaluation"
    g.output.add_argument("--save_interval", default=8000, type=int, help=saved)


class IterationLoader:
    """Training batches by intervals, which take the place of epochs in `Checkpoint.epochs`.

    An interval is the batches between two evaluations. Passes over the images, each shuffled, follow one another
    whatever the intervals, so that order and augmentation depend on (seed, pass, index) alone.
    Args:
        loader: of the passes, made with accum_iter 1.
        iters, interval: updates of the run and of an interval; the last interval may be shorter.
        accum_iter: batches per update.
    """

    def __init__(self, loader: Loader, iters: int, interval: int, accum_iter: int = 1):
        for flag, value in (("iters", iters), ("eval_interval", interval), ("accum_iter", accum_iter)):
            if value < 1:
                raise UserError(f"--{flag} {value}: expected at least 1")
        self.loader, self.accum_iter = loader, accum_iter
        self.device, self.batch_size = loader.device, loader.batch_size
        self.total, self.interval = iters * accum_iter, min(iters, interval) * accum_iter
        self.intervals = -(-self.total // self.interval)

    def __len__(self) -> int:
        """Batches per interval and rank; the last one's are `total` less those before."""
        return self.interval

    def start(self, position: Position) -> tuple[int, dict[str, list[float]]]:
        """The batch of the interval at which a run continues, and the meters there."""
        step, rest = divmod(position.images, self.batch_size * world_size())
        if rest or step % self.accum_iter:
            log(f"{position.images} images are no whole number of updates of this run; continuing at the one before")
        whole = min(step, len(self)) // self.accum_iter * self.accum_iter
        return whole, position.own_meters() if whole == step and not rest else {}

    def batches(self, interval: int = 0, start: int = 0) -> Iterator[tuple[Any, Any]]:
        """The batches of an interval from number `start` on; raises as `Loader.batches`."""
        step = interval * self.interval + start
        end = min((interval + 1) * self.interval, self.total)
        while step < end:
            epoch, first = divmod(step, len(self.loader))
            for batch in itertools.islice(self.loader.batches(epoch, first), end - step):
                yield batch
                step += 1
