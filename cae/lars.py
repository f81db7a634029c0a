"""LARS, the optimizer of CAE's linear probe (arXiv 1708.03888)."""

from collections.abc import Iterable

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each weight is scaled by trust_coefficient * |w| / |g|.

    g includes the weight decay. Parameters of one dimension take plain momentum steps without decay, as in the
    published linear probes.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad
                if p.ndim > 1:
                    g = g.add(p, alpha=group["weight_decay"])
                    size, slope = p.norm(), g.norm()
                    trust = group["trust_coefficient"] * size / slope
                    g = g * torch.where((size > 0) & (slope > 0), trust, torch.ones_like(trust))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(g)
                p.add_(state["mu"], alpha=-group["lr"])
