"""Optimizers, parameter options by name, schedules per iteration, and the moving average of the weights."""

import argparse
import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim.lamb import Lamb
from torch import Tensor, nn

from a2mim import config, openmixup
from common import distributed, lr_sched

OPTIMIZERS = ("adamw", "lamb", "sgd")
POLICIES = ("step", "CosineAnnealing", "StepFixCosineAnnealing")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of optimizer, schedule and run length; each main sets the defaults of its recipes."""
    g = distributed.flag_groups(parser).optimizer
    g.add_argument("--epochs", default=100, type=int, help="length of the run")
    g.add_argument(
        "--batch_per_gpu",
        "--batch_size",
        dest="batch_size",
        default=128,
        type=int,
        help="images per process and micro-step",
    )
    g.add_argument(
        "--accum",
        "--accum_iter",
        dest="accum_iter",
        default=1,
        type=int,
        help="micro-steps per update, whose gradients are averaged",
    )
    g.add_argument(
        "--opt", default="adamw", choices=OPTIMIZERS, help="lamb: as in RSB, clips the gradient norm at 1, eps 1e-6"
    )
    g.add_argument(
        "--lr", default=1e-3, type=float, help="learning rate, not scaled by the number of images per update"
    )
    g.add_argument("--weight_decay", default=0.05, type=float, help="weight decay, where --paramwise has no other")
    g.add_argument(
        "--betas", default=[0.9, 0.999], type=float, nargs=2, help="decay rates of both moments (AdamW, LAMB)"
    )
    g.add_argument(
        "--eps",
        default=None,
        type=float,
        help="added to the denominator; default: AdamW 1e-8, LAMB 1e-6",
    )
    g.add_argument("--momentum", default=0.9, type=float, help="momentum of SGD")
    g.add_argument(
        "--paramwise",
        default=[],
        type=config.patterns,
        help="options of parameters whose name in OpenMixup contains a pattern, later ones win: "
        '[("pattern", {"weight_decay": 0.0, "lr_mult": 0.1}), ...]',
    )
    g.add_argument(
        "--clip_grad", default=None, type=float, help="largest norm of the gradient, by default any; authors' ViTs: 5"
    )
    g.add_argument(
        "--sched",
        default="CosineAnnealing",
        choices=POLICIES,
        help="the learning rate falls at --steps, or by a cosine from the first iteration or the end of the warm-up on",
    )
    g.add_argument("--min_lr", default=0.0, type=float, help="learning rate at the end of a cosine, of all parameters")
    g.add_argument("--warmup_epochs", default=0, type=int, help="epochs in which the learning rate grows linearly")
    g.add_argument(
        "--warmup_ratio",
        default=1e-6,
        type=float,
        help="share of the learning rate at which the warm-up starts (StepFixCosineAnnealing: at 0)",
    )
    g.add_argument("--by_epoch", default=False, type=config.boolean, help="CosineAnnealing: constant within an epoch")
    g.add_argument("--steps", default=[], type=int, nargs="*", help="step: epochs at which the learning rate falls")
    g.add_argument("--gamma", default=0.1, type=float, help="step: factor by which the learning rate falls each time")
    p = distributed.flag_groups(parser).process
    p.add_argument(
        "--amp", default=True, type=config.boolean, help="mixed precision; false: float32, unless --amp_dtype is given"
    )
    p.add_argument(
        "--sync_bn",
        default=False,
        type=config.boolean,
        help="batch norms take the statistics of all processes together",
    )


# ---- parameter options


def _layer_scale(name: str, decay: float, model_type: str, n_blocks: int) -> float:
    """Factor on the learning rate of a parameter with OpenMixup's name."""
    block = re.match(r"backbone\.(?:layers|stages\.2)\.(\d+)\.", name)
    if model_type == "vit":
        if block:
            return decay ** (n_blocks - int(block[1]))
        first = name.startswith(("backbone.pos_embed", "backbone.cls_token", "backbone.patch_embed"))
        return decay ** (n_blocks + 1) if first else 1.0
    top = 12 if n_blocks > 9 else 6
    stage = re.match(r"backbone\.(downsample_layers|stages)\.(\d)\.", name)
    if not stage:
        return 1.0  # norm and head
    downsample, index = stage[1] == "downsample_layers", int(stage[2])
    deep = 3 + int(block[1]) // 3 if block else 3  # three blocks of the long stage make a layer
    layer = {0: 0 if downsample else 1, 1: 2, 2: deep, 3: top}[index]
    return decay ** (top + 1 - layer)


def param_options(
    official_name: str, optimizer_cfg: dict[str, Any], n_blocks: int | None = None
) -> tuple[float, float]:
    """Learning rate and weight decay of a parameter.

    Every pattern of `paramwise_options` that is found anywhere in the name applies, later ones win.
    Args:
        optimizer_cfg: lr, weight_decay, paramwise_options {pattern: {"weight_decay", "lr_mult", "lr"}}, and for layer
            decay: layer_decay and model_type (vit or convnext).
        n_blocks: of the ViT, or of the third stage of a ConvNeXt; only layer decay needs it.
    Raises:
        ValueError: layer decay without n_blocks.
    """
    lr, weight_decay = optimizer_cfg["lr"], optimizer_cfg.get("weight_decay", 0.0)
    for pattern, options in (optimizer_cfg.get("paramwise_options") or {}).items():
        if re.search(pattern, official_name):
            weight_decay = options.get("weight_decay", weight_decay)
            lr = options.get("lr", optimizer_cfg["lr"] * options["lr_mult"] if "lr_mult" in options else lr)
    decay = optimizer_cfg.get("layer_decay")
    if decay:
        if n_blocks is None:
            raise ValueError("layer decay needs the number of blocks")
        kind = optimizer_cfg.get("model_type", "vit")
        lr = optimizer_cfg["lr"] * _layer_scale(official_name, decay, kind, n_blocks)
    return lr, weight_decay


def optimizer_cfg(args: argparse.Namespace) -> dict[str, Any]:
    """The flags in the form of `param_options`."""
    cfg = {"lr": args.lr, "weight_decay": args.weight_decay, "paramwise_options": dict(args.paramwise or ())}
    if getattr(args, "layer_decay", None):
        if "resnet" in args.backbone:
            raise distributed.UserError(f"--layer_decay {args.layer_decay}: is for ViTs and ConvNeXts")
        cfg |= {"layer_decay": args.layer_decay, "model_type": "convnext" if "convnext" in args.backbone else "vit"}
    return cfg


def param_groups(model: openmixup.Model, cfg: dict[str, Any]) -> list[dict[str, Any]]:
    """One optimizer group per pair of learning rate and weight decay, of the trained parameters."""
    net: Any = model.encoder if isinstance(model, openmixup.MaskedImageModel) else model.net
    blocks = len(net.stages[2].blocks) if hasattr(net, "stages") else len(getattr(net, "blocks", ()))
    params = dict(model.named_parameters())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for official, name in openmixup.official_names(model, parameters_only=True).items():
        if params[name].requires_grad:
            lr, weight_decay = param_options(official, cfg, blocks)
            group = {"params": [], "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}
            groups.setdefault((lr, weight_decay), group)["params"].append(params[name])
    return list(groups.values())


def build_optimizer(args: argparse.Namespace, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer --opt for groups with learning rate and weight decay; raises UserError."""
    if not all(0 <= beta < 1 for beta in args.betas):
        raise distributed.UserError(f"--betas {args.betas[0]} {args.betas[1]}: expected two numbers, 0 to below 1")
    if args.opt == "lamb":
        eps = 1e-6 if args.eps is None else args.eps
        return Lamb(groups, eps=eps, betas=tuple(args.betas), max_grad_norm=1.0)
    if args.opt == "sgd":
        return torch.optim.SGD(groups, momentum=args.momentum, fused=True)
    eps = 1e-8 if args.eps is None else args.eps
    return torch.optim.AdamW(groups, betas=tuple(args.betas), eps=eps, fused=True)


def no_updates() -> torch.optim.Optimizer:
    """An optimizer without parameters, for evaluations."""
    return torch.optim.SGD([torch.zeros(0)], lr=0.0)


class OfficialOptimizer:
    """The state of an optimizer in OpenMixup's layout: one group per parameter, in the order of its parameters.

    Frozen parameters have a group, too, without state. Loading keeps the hyper-parameters of this run, and also takes
    files that hold the trained parameters alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: openmixup.Model):
        self.optimizer = optimizer
        params = dict(model.named_parameters())
        self.params = [params[name] for name in openmixup.official_names(model, parameters_only=True).values()]

    def _own(self) -> dict[Tensor, tuple[int, int]]:
        """Parameter -> its number and that of its group in the optimizer's own state dict."""
        pairs = [(p, g) for g, group in enumerate(self.optimizer.param_groups) for p in group["params"]]
        return {p: (i, g) for i, (p, g) in enumerate(pairs)}

    def state_dict(self) -> dict[str, Any]:
        own, state = self._own(), self.optimizer.state_dict()
        settings = {p: state["param_groups"][own[p][1] if p in own else 0] for p in self.params}
        groups = [{**settings[p], "params": [i]} for i, p in enumerate(self.params)]
        moved = {i: own[p][0] for i, p in enumerate(self.params) if p in own}
        moments = {i: state["state"][j] for i, j in moved.items() if j in state["state"]}
        return {"state": moments, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        found = [i for group in state["param_groups"] for i in group["params"]]
        own, now = self._own(), self.optimizer.state_dict()
        trained = [p for p in self.params if p in own]
        if len(found) not in (len(self.params), len(trained)):
            raise ValueError(f"the optimizer holds {len(found)} parameters, expected {len(self.params)}")
        pairs = list(zip(found, self.params if len(found) == len(self.params) else trained, strict=True))
        now["state"] = {own[p][0]: state["state"][i] for i, p in pairs if p in own and i in state["state"]}
        steps = {i: float(group["step"]) for group in state["param_groups"] for i in group["params"] if "step" in group}
        for i, p in pairs:  # LAMB counts its steps by group
            if p in own and i in steps:
                now["param_groups"][own[p][1]]["step"] = steps[i]
        self.optimizer.load_state_dict(now)


# ---- schedules


def warmup_factor(step: float, warmup_steps: float, ratio: float = 0.0) -> float:
    """Factor that grows linearly from ratio to 1 over warmup_steps."""
    return 1.0 if step >= warmup_steps else 1 - (1 - step / warmup_steps) * (1 - ratio)


def lr_at(lr_config: dict[str, Any], base_lr: float, it: int, iters_per_epoch: int, epochs: int) -> float:
    """Learning rate at iteration `it`, counted from 0 over the whole run.

    Args:
        lr_config: policy (one of POLICIES), step and gamma, or min_lr and by_epoch; warmup, warmup_iters (epochs where
            warmup_by_epoch) and warmup_ratio.
    """
    total = epochs * iters_per_epoch
    warmup = lr_config.get("warmup_iters", 0) if lr_config.get("warmup") else 0
    warmup *= iters_per_epoch if lr_config.get("warmup_by_epoch") else 1
    ratio, low = lr_config.get("warmup_ratio", 0.1), lr_config.get("min_lr", 0.0)
    epoch = it // iters_per_epoch
    match lr_config["policy"]:
        case "step":
            steps = lr_config["step"]
            if isinstance(steps, int):
                steps = range(steps, epochs + 1, steps)
            lr = max(base_lr * lr_config.get("gamma", 0.1) ** sum(epoch >= m for m in steps), low)
        case "CosineAnnealing" if lr_config.get("by_epoch", True):
            lr = lr_sched.cosine(epoch / epochs, base_lr, low)
        case "CosineAnnealing":
            lr = lr_sched.cosine(it / total, base_lr, low)
        case "StepFixCosineAnnealing":
            # As upstream: the cosine also runs before its start, and the warm-up starts at 0 whatever the ratio.
            phase = (it - warmup) / (total - warmup) if total > warmup else 0.0
            lr, ratio = lr_sched.cosine(phase, base_lr, low), 0.0
        case policy:
            raise ValueError(f"policy {policy}: expected one of {', '.join(POLICIES)}")
    return lr * warmup_factor(it, warmup, ratio) if it < warmup else lr


def lr_config(args: argparse.Namespace) -> dict[str, Any]:
    """The flags in the form of `lr_at`."""
    cfg = {"policy": args.sched, "step": args.steps, "gamma": args.gamma, "min_lr": args.min_lr}
    cfg |= {"by_epoch": args.by_epoch, "warmup_ratio": args.warmup_ratio, "warmup_iters": args.warmup_epochs}
    return cfg | {"warmup": "linear" if args.warmup_epochs else None, "warmup_by_epoch": True}


def check_schedule(cfg: dict[str, Any]) -> None:
    """Raise UserError for `step` without epochs."""
    if cfg["policy"] == "step" and not cfg["step"]:
        raise distributed.UserError("--sched step: needs the epochs of --steps, such as --steps 60 80")


def set_rates(groups: Iterable[dict], cfg: dict[str, Any], it: int, iters_per_epoch: int, epochs: int) -> None:
    """Write every group's learning rate at iteration `it`; min_lr is the same for all (as upstream)."""
    for group in groups:
        group["lr"] = lr_at(cfg, group["initial_lr"], it, iters_per_epoch, epochs)


# ---- average of the weights


class EMA:
    """Moving average of a model's parameters; buffers are the live ones.

    Args:
        momentum: share of the average that an update keeps. warmup_iters: it grows from warmup_ratio to momentum.
        update_interval: iterations between updates.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.9999,
        warmup: str | None = "linear",
        warmup_iters: int = 100,
        warmup_ratio: float = 0.9,
        update_interval: int = 1,
    ):
        self.model, self.momentum, self.update_interval = model, momentum, update_interval
        self.warmup_iters, self.warmup_ratio = warmup_iters if warmup else 0, warmup_ratio
        self.module = copy.deepcopy(model).requires_grad_(False)

    def momentum_at(self, it: int) -> float:
        """Share of the average that the update after iteration `it` (from 0) keeps."""
        return self.momentum * warmup_factor(it, self.warmup_iters, self.warmup_ratio)

    @torch.no_grad()
    def update(self, it: int, updater: distributed.Updater | None = None) -> None:
        """Move the average after iteration `it`; frozen where `updater` freezes the weights."""
        share = 1 - self.momentum_at(it)
        pairs = zip(self.module.parameters(), self.model.parameters(), strict=True)
        own, new = (list(tensors) for tensors in zip(*pairs, strict=True))
        if updater is None:
            torch._foreach_lerp_(own, new, share)  # type: ignore[reportPrivateImportUsage]
        else:
            updater.move(own, new, share)

    @torch.no_grad()
    def averaged(self) -> nn.Module:
        """The model with the averaged parameters and the live buffers."""
        for own, live in zip(self.module.buffers(), self.model.buffers(), strict=True):
            own.copy_(live)
        return self.module


class Weights:
    """What a checkpoint's `state_dict` holds: OpenMixup's names; with an average, the averaged parameters under the
    normal names and the live ones under `ema_<name, dots as underscores>` (as upstream)."""

    def __init__(self, model: openmixup.Model, ema: EMA | None = None):
        self.model, self.ema = model, ema

    def _live(self, state: dict[str, Tensor]) -> dict[str, str]:
        """{normal name: name of the live weight} of the parameters."""
        names = openmixup.official_names(self.model, parameters_only=True)
        return {name: "ema_" + name.replace(".", "_") for name in names if name in state}

    def state_dict(self) -> dict[str, Tensor]:
        state = openmixup.to_openmixup_state_dict(self.model)
        if self.ema is None:
            return state
        averaged = openmixup.to_openmixup_state_dict(self.ema.averaged())  # type: ignore[arg-type]
        return averaged | {live: state[name] for name, live in self._live(state).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        live = self._live(state)
        has_average = all(name in state for name in live.values())
        openmixup.load_openmixup_state_dict(
            self.model, state | ({name: state[own] for name, own in live.items()} if has_average else {})
        )
        if self.ema is not None:
            openmixup.load_openmixup_state_dict(self.ema.module, state)  # type: ignore[arg-type]
