"""The training loops against the authors' trajectories: losses, rates, norms and final weights of every step."""

import argparse
import copy
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from cae import engine_finetune, engine_pretrain, main_finetune, main_linprobe, main_pretrain, optim
from cae.models_cae import ContextAutoencoderViT
from cae.models_vit import VisionTransformer
from common import distributed, lr_sched
from tests.support.cae import Tokens
from tests.support.helpers import assert_close, golden_files, load_golden, tolerance
from tests.support.runs import CPU, FixedLoader, RecordingLog

TAGS = {"loss/loss": "loss", "loss/mlm_acc": "mlm_acc", "loss/class_acc": "class_acc"}
TAGS |= {"loss_main/loss": "loss_main", "loss_align/loss": "loss_align"}


def args_of(main: ModuleType, hyper: dict, optimizer: str) -> argparse.Namespace:
    """The flags of a trajectory: every hyper-parameter that is one."""
    args = main.get_args_parser().parse_args([])
    vars(args).update({name: value for name, value in hyper.items() if name in args})
    args.opt = optimizer
    return args


def assert_groups(ref, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (group.get("lr_scale", 1.0), group["weight_decay"], [names[id(p)] for p in group["params"]])
        for group in optimizer.param_groups
    ]
    if "param_groups" in ref.meta:
        expected = [(g["lr_scale"] or 1.0, g["weight_decay"], g["params"]) for g in ref.meta["param_groups"]]
        assert [(pytest.approx(scale), decay, params) for scale, decay, params in found] == expected


def assert_history(ref, history: list[dict[str, float]]) -> None:
    """What upstream logs of every micro-step; NaN where it made no update."""
    tol = tolerance(ref, "loss")
    for tag, expected in ref.group("out/log").items():
        name = TAGS.get(tag) or tag.removeprefix("opt/")
        found = [step.get(name, float("nan")) for step in history]
        exact = name in ("lr", "min_lr", "weight_decay", "loss_scale")
        scale = {"rtol": 1e-6, "atol": 1e-12} if exact else tol
        assert_close(np.array(found, dtype=np.float32), expected, **scale, what=tag)


def assert_means(history: list[dict[str, float]], stats: dict[str, float], steps: int) -> None:
    for name, mean in stats.items():
        values = [step[name] for step in history[-steps:]]
        assert mean == pytest.approx(np.nanmean(values), rel=1e-6), name


def assert_final(ref, model: nn.Module) -> None:
    state = model.state_dict()
    for name, expected in ref.group("out/final").items():
        assert_close(state[name], expected, **tolerance(ref, "final"), what=name)


@golden_files("cae", "pretrain_traj")
def test_pretraining_trajectory(path):
    ref = load_golden(path)
    hyper = ref.meta["hyper"]
    args = args_of(main_pretrain, hyper, ref.meta.get("optimizer", hyper.get("opt")))
    given = {name: hyper[name] for name in ("base_momentum",) if name in hyper}
    model = ContextAutoencoderViT(**{**{k: v for k, v in ref.kwargs.items() if k != "num_out_dim"}, **given})
    model.load_state_dict(ref.weights)
    optimizer = main_pretrain.build_optimizer(args, model, args.lr)
    assert_groups(ref, model, optimizer)
    accum = hyper.get("update_freq", hyper.get("accum_iter", 1))
    per_epoch = hyper["niter_per_ep"]
    rates = optim.build_rates(args, per_epoch)
    for i, name in enumerate(("lr_schedule", "wd_schedule")):
        steps = range(len(ref.get(f"out/{name}", ())))
        ref.check(f"out/{name}", [rates(update)[i] for update in steps], rtol=1e-6, atol=0)
    updater = distributed.Updater(optimizer, CPU, "fp32", accum, args.clip_grad)
    tokenizer, history = Tokens(ref["in/token_ids"]), []
    for epoch in range(args.epochs):
        own = slice(epoch * per_epoch * accum, (epoch + 1) * per_epoch * accum)
        imgs, masks = ref["in/x"][own], ref["in/bool_masked_pos"][own]
        loader = FixedLoader([(x, x, mask) for x, mask in zip(imgs, masks, strict=True)], imgs)
        log = RecordingLog(history, epoch, len(loader))
        stats = engine_pretrain.train_one_epoch(model, loader, updater, rates, log, tokenizer, args.align_loss_weight)
        assert_means(history, stats, len(loader))
    assert_history(ref, history)
    assert_final(ref, model)


def assert_finetuning_trajectory(path) -> None:
    ref = load_golden(path)
    hyper = ref.meta["hyper"]
    args = args_of(main_finetune, hyper, hyper["opt"])
    model = VisionTransformer(**ref.kwargs)
    model.load_state_dict(ref.weights)
    before = copy.deepcopy(model.state_dict())
    trained = ("query_token", "attentive_blocks", "head")
    if hyper.get("attentive_freeze"):
        main_finetune.freeze(model, *trained)
    optimizer = main_finetune.build_optimizer(args, model, args.lr)
    assert_groups(ref, model, optimizer)
    accum, per_epoch = hyper.get("update_freq", 1), hyper["niter_per_ep"]
    lr = lr_sched.cosine_table(
        args.lr, args.min_lr, args.epochs, per_epoch, args.warmup_epochs, warmup_steps=args.warmup_steps
    )
    ref.check("out/lr_schedule", lr, rtol=1e-6, atol=0)
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    decay = lr_sched.cosine_table(args.weight_decay, end, args.epochs, per_epoch)

    def rates(epoch: int, step: int) -> tuple[float, float]:
        update = epoch * per_epoch + step // accum
        return float(lr[update]), float(decay[update])

    updater = distributed.Updater(optimizer, CPU, "fp32", accum, args.clip_grad)
    soft = ref["in/y"].ndim == 3
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if soft else args.smoothing)
    history = []
    for epoch in range(args.epochs):
        own = slice(epoch * per_epoch * accum, (epoch + 1) * per_epoch * accum)
        loader = FixedLoader(ref["in/x"][own], ref["in/y"][own])
        log = RecordingLog(history, epoch, len(loader))
        stats = engine_finetune.train_one_epoch(model, criterion, loader, updater, rates, log)
        assert_means(history, stats, len(loader))
    assert_history(ref, history)
    assert_final(ref, model)
    if hyper.get("attentive_freeze"):
        for name, value in model.state_dict().items():
            frozen = name.split(".")[0] not in (*trained, "fc_norm")
            assert not frozen or torch.equal(value, before[name]), name


@golden_files("cae", "ft_traj")
def test_finetuning_trajectory(path):
    assert_finetuning_trajectory(path)


@golden_files("cae", "attentive_traj")
def test_attentive_probe_trajectory(path):
    assert_finetuning_trajectory(path)


@golden_files("cae", "linear_traj")
def test_linear_probe_trajectory(path):
    ref = load_golden(path)
    hyper, accum = ref.meta["hyper"], ref.meta["hyper"].get("accum_iter", 1)
    model = VisionTransformer(**ref.kwargs)
    head = main_linprobe.add_probe(model)
    model.load_state_dict(ref.weights)
    before = copy.deepcopy(model.state_dict())
    args = args_of(main_linprobe, hyper, "")
    optimizer = main_linprobe.build_optimizer(args, head, args.lr)
    optimizer.param_groups[0].update({k: hyper[k] for k in ("momentum", "trust_coefficient") if k in hyper})
    updater, history = distributed.Updater(optimizer, CPU, "fp32", accum), []
    steps = len(ref["in/x"]) // args.epochs

    def rates(epoch: int, step: int) -> tuple[float, float]:
        at = epoch + step / steps
        return lr_sched.warmup_cosine(at, args.lr, args.min_lr, args.warmup_epochs, args.epochs), args.weight_decay

    for epoch in range(args.epochs):
        own = slice(epoch * steps, (epoch + 1) * steps)
        loader = FixedLoader(ref["in/x"][own], ref["in/y"][own])
        log = RecordingLog(history, epoch, steps)
        engine_finetune.train_one_epoch(model, nn.CrossEntropyLoss(), loader, updater, rates, log)
    ref.check("out/loss", [step["loss"] for step in history], **tolerance(ref, "loss"))
    ref.check("out/lr", [step["lr"] for step in history], rtol=1e-6, atol=0)
    assert_final(ref, model)
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, before[name]), name
    ref.check("out/eval_logits", model.eval()(ref["in/x"][0]), **tolerance(ref, "final"))
