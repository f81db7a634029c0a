"""CAE's optimizers by name: timm's and torch's, with apex's names mapped to the same updates where apex is absent."""

import argparse
from collections.abc import Callable, Iterable

import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.optim.lamb import Lamb
from timm.optim.lookahead import Lookahead
from timm.optim.nvnovograd import NvNovoGrad
from torch import nn

from common import distributed, lr_decay, lr_sched

NAMES = (
    *("sgd", "nesterov", "momentum", "adam", "adamw", "nadam", "radam", "adamp", "sgdp", "adadelta", "adafactor"),
    *("adahessian", "rmsprop", "rmsproptf", "novograd", "nvnovograd"),
    *("fusedsgd", "fusedmomentum", "fusedadam", "fusedadamw", "fusedlamb", "fusednovograd"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose and set the optimizer."""
    group = distributed.flag_groups(parser).optimizer
    group.add_argument("--opt", default="adamw", help=f"optimizer, also with prefix lookahead_: {', '.join(NAMES)}")
    group.add_argument("--opt_eps", default=1e-8, type=float, help="epsilon of the optimizer, where it has one")
    group.add_argument("--opt_betas", type=float, nargs="+", help="betas of the optimizer; default: its own")
    group.add_argument(
        "--clip_grad", type=float, help="largest norm of the gradient; default: any norm (README, pre-training: 3)"
    )
    group.add_argument("--momentum", default=0.9, type=float, help="momentum of SGD and RMSprop")
    group.add_argument("--weight_decay", default=0.05, type=float, help="weight decay of all but biases and norms")
    group.add_argument(
        "--weight_decay_end", type=float, help="weight decay at the end, reached by a cosine; default: constant"
    )


def _has_apex() -> bool:
    try:
        import apex.optimizers  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.is_available()


def _instead_of_apex(name: str, groups: Iterable, kwargs: dict) -> torch.optim.Optimizer:
    """The same update as apex's optimizer of that name."""
    lr, decay, momentum = kwargs["lr"], kwargs["weight_decay"], kwargs["momentum"]
    adam = {"lr": lr, "weight_decay": decay, "eps": kwargs["eps"]}
    betas = kwargs.get("betas")
    if name in ("fusedsgd", "fusedmomentum"):
        nesterov = name == "fusedsgd"
        return torch.optim.SGD(groups, lr, momentum, weight_decay=decay, nesterov=nesterov, fused=True)
    if name == "fusednovograd":
        return NvNovoGrad(groups, **adam, betas=betas or (0.95, 0.98))
    if name == "fusedlamb":
        return Lamb(groups, **adam, betas=betas or (0.9, 0.999), max_grad_norm=1.0)
    family = {"fusedadam": torch.optim.Adam, "fusedadamw": torch.optim.AdamW}[name]
    return family(groups, **adam, betas=betas or (0.9, 0.999), fused=True)


def create_optimizer(args: argparse.Namespace, groups: Iterable, lr: float) -> torch.optim.Optimizer:
    """The optimizer of --opt over parameter groups.

    Raises:
        distributed.UserError: the name is unknown, or a value does not suit the optimizer.
    """
    name = args.opt.lower().removeprefix("lookahead_")
    if name not in NAMES:
        raise distributed.UserError(f"--opt {args.opt}: expected one of {', '.join(NAMES)}")
    kwargs = {"lr": lr, "weight_decay": args.weight_decay, "momentum": args.momentum, "eps": args.opt_eps}
    if args.opt_betas is not None:
        kwargs["betas"] = tuple(args.opt_betas)
    with distributed.user_errors(f"--opt {args.opt} and its flags"):
        if args.opt.lower() == "adamw":
            del kwargs["momentum"]
            return torch.optim.AdamW(groups, **kwargs, fused=True)
        if name.startswith("fused") and not _has_apex():
            optimizer = _instead_of_apex(name, groups, kwargs)
            distributed.log(f"--opt {args.opt}: apex is not installed, {type(optimizer).__module__} runs instead")
            return optimizer if name == args.opt.lower() else Lookahead(optimizer)
        if "sgd" in name or name in ("nesterov", "momentum"):
            del kwargs["eps"]
        name = (
            args.opt.lower().replace("nesterov", "sgd").replace("nvnovograd", "novograd")
        )  # timm has one of the latter
        return create_optimizer_v2(groups, name, **kwargs)  # type: ignore[arg-type]


def param_groups(model: nn.Module, weight_decay: float, skip: Iterable[str] = ()) -> list[dict]:
    """Two optimizer groups of the trainable parameters, with weight decay and without, in the order of appearance.

    They carry lr_scale, which the authors' programs ask of every file that they resume. Without any weight decay: one
    group of all parameters, frozen ones too, and no lr_scale, as upstream.
    """
    if weight_decay == 0:
        return [{"params": list(model.parameters()), "weight_decay": 0.0}]
    plain, decayed = ({"lr_scale": 1.0, **group} for group in lr_decay.decay_groups(model, weight_decay, set(skip)))
    named = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    first_is_plain = lr_decay.exempt(*next(iter(named)), set(skip))
    return [plain, decayed] if first_is_plain else [decayed, plain]


def build_rates(args: argparse.Namespace, updates: int) -> Callable[[int], tuple[float, float]]:
    """Learning rate and weight decay by update: warm-up and cosine, and cosine; `updates` per epoch."""
    lr = lr_sched.cosine_table(
        args.lr, args.min_lr, args.epochs, updates, args.warmup_epochs, warmup_steps=args.warmup_steps
    )
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    weight_decay = lr_sched.cosine_table(args.weight_decay, end, args.epochs, updates)
    return lambda update: (float(lr[update]), float(weight_decay[update]))
