"""One epoch of training a discrete VAE, and how much of its codebook is in use."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed, lr_sched
from common.datasets import Loader


class CodeUsage:
    """How often each code was the most likely one in this epoch.

    Saved with a checkpoint, so that a resumed epoch counts its first part, too; rank 0 then holds all ranks' counts.
    """

    def __init__(self, num_tokens: int, device: torch.device):
        self.counts = torch.zeros(num_tokens, dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"] if distributed.is_main() else torch.zeros_like(self.counts))

    def add(self, indices: Tensor) -> None:
        """Count codes of any shape."""
        self.counts.index_add_(0, indices.flatten(), torch.ones_like(self.counts[:1]).expand(indices.numel()))

    def _total(self) -> Tensor:
        return torch.tensor(distributed.all_sum(self.counts.tolist()), dtype=torch.float64)

    def gather(self) -> None:
        """Move all ranks' counts to rank 0. Collective."""
        self.load_state_dict({"counts": self._total()})

    def stats(self) -> dict[str, float]:
        """Over all ranks: codes_used; perplexity, the number of codes that would say as much if used equally often."""
        total = self._total()
        perplexity = torch.special.entr(total / total.sum()).sum().exp()
        return {"codes_used": int((total > 0).sum()), "perplexity": perplexity.item()}


def temperature_at(progress: float, start: float, end: float, share: float) -> float:
    """Half a cosine from start to end over the first `share` of training; progress: 0 to 1."""
    return lr_sched.cosine(min(progress / share, 1.0), start, end)


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    updater: distributed.Updater,
    schedule: Callable[[float], float],
    temperature: Callable[[float], float],
    kl_weight: float,
    usage: CodeUsage,
    epoch_log: distributed.EpochLog,
    seed: int = 0,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        model: a `DiscreteVAE`, or what wraps it.
        schedule, temperature: learning rate and temperature at a fractional epoch, set before each update.
        usage: starts anew with the epoch. seed: the model's draws depend on (seed, rank, step) alone.
    Returns:
        means over the epoch and all ranks: lr, temperature, loss, error and kl as of `Reconstruction`; code_error, the
        squared error of what the most likely codes decode to (of one step in ten), and variance, that of a picture of
        one grey; then codes_used and perplexity as of `CodeUsage`.
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    model.train()
    updater.start_epoch()
    groups = updater.optimizer.param_groups
    if not epoch_log.start:
        usage.counts.zero_()
    try:
        for step, (imgs, _) in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
            now = epoch_log.epoch + step / len(loader)
            if updater.is_first(step):
                lr_sched.set_lr(groups, schedule(now))
            distributed.seed_step(seed, epoch_log.epoch * len(loader) + step)
            code_error = None
            with updater.forward(model, step):
                out = model(imgs, temperature(now), kl_weight)
                if (step + 1) % 10 == 0 or step + 1 == len(loader):
                    with torch.no_grad():
                        decoded = distributed.unwrap(model).decode(out.indices.flatten(1))  # type: ignore[operator]
                        code_error = F.mse_loss(decoded.float(), imgs)
            norm = updater.backward(out.loss, step)
            usage.add(out.indices)
            epoch_log.update(
                step,
                updater.is_last(step),
                lr=groups[0]["lr"],
                temperature=temperature(now),
                loss=out.loss,
                error=out.error,
                kl=out.kl,
                code_error=code_error,
                variance=imgs.var(),
                total_norm=norm,
            )
    except distributed.Exit:
        usage.gather()
        raise
    return epoch_log.means() | usage.stats()
