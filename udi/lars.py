"""LARS, one of the optimizers of pre-training (arXiv 1708.03888)."""

from collections.abc import Iterable

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each weight is scaled by eta * |w| / |g|, where g includes the weight decay.

    Parameters of one dimension take plain momentum steps without decay. Groups have the keys of the authors' LARS, so
    that their program goes on from our checkpoints; its two filters are None, as it leaves them.
    """

    def __init__(
        self, params: Iterable, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 0.001
    ):
        filters = {"weight_decay_filter": None, "lars_adaptation_filter": None}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta, **filters})

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # earlier checkpoints of ours have another name of eta, and no filters
            group.setdefault("eta", group.pop("trust_coefficient", 0.001))
            group.setdefault("weight_decay_filter", None)
            group.setdefault("lars_adaptation_filter", None)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad
                if p.ndim > 1:
                    g = g.add(p, alpha=group["weight_decay"])
                    size, slope = p.norm(), g.norm()
                    trust = group["eta"] * size / slope
                    g = g * torch.where((size > 0) & (slope > 0), trust, torch.ones_like(trust))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(g)
                p.add_(state["mu"], alpha=-group["lr"])
