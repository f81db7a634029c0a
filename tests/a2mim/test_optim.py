"""Parameter options, optimizers, schedules, averages and how checkpoints hold them."""

import argparse
import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from a2mim import config, main_finetune, main_linprobe, main_pretrain, optim
from a2mim.losses import MIMLoss
from a2mim.models_a2mim import build_classifier, build_masked
from a2mim.openmixup import official_names, to_openmixup_state_dict
from common import distributed
from tests.support.helpers import ROOT, assert_close, golden_files, load_golden
from tests.support.recipes import without_numbers
from tests.support.runs import CPU

CONFIGS = ROOT / "a2mim" / "configs" / "openmixup"
NO_DECAY = [("(bn|ln|gn)(\\d+)?.(weight|bias)", {"weight_decay": 0.0}), ("bias", {"weight_decay": 0.0})]


# ---- goldens


@golden_files("a2mim", "lr_schedule")
def test_learning_rates_match_upstream(path):
    ref = load_golden(path)
    rtol = {"rtol": 1e-9, **ref.meta.get("tolerance", {})}["rtol"]
    assert ref.meta["cases"]
    for name, case in ref.meta["cases"].items():
        per_epoch, epochs = case["iters_per_epoch"], case["epochs"]
        listed = f"out/{name.replace('real/', 'real_iters/')}"
        if f"out/{name}" not in ref or (name.startswith("real/") and listed not in ref):
            continue
        iterations = ref[listed].tolist() if name.startswith("real/") else range(len(ref[f"out/{name}"]))
        found = [[optim.lr_at(case["lr_config"], b, i, per_epoch, epochs) for b in case["base_lr"]] for i in iterations]
        ref.check(f"out/{name}", found, rtol=rtol, atol=0)


def flags_of(name: str) -> tuple[Any, argparse.Namespace]:
    main = main_pretrain if name.startswith("pretrain/") else main_finetune
    return main, config.parse_args(main.get_args_parser(), [str(CONFIGS / f"{name}.py")])


@golden_files("a2mim", "lr_schedule")
def test_learning_rates_of_the_configurations(path):
    """Those of the flags that the files of ours give, on the iterations of ImageNet."""
    ref = load_golden(path)
    cases = {name: case for name, case in ref.meta["cases"].items() if "config" in case}
    assert cases
    for name, case in cases.items():
        args = flags_of(case["config"])[1]
        assert args.epochs == case["epochs"]
        per_epoch = math.ceil(math.ceil(case["images"] / case["gpus"]) / args.batch_size)
        assert per_epoch == case["iters_per_epoch"], name
        groups = [{"initial_lr": b} for b in case["base_lr"]]
        assert args.lr in case["base_lr"], name
        found = []
        for i in ref.get(f"out/{name.replace('real/', 'real_iters/')}", torch.empty(0)).tolist():
            optim.set_rates(groups, optim.lr_config(args), int(i), per_epoch, args.epochs)
            found.append([group["lr"] for group in groups])
        if found:
            ref.check(f"out/{name}", found, rtol=1e-9, atol=0)


def options(model: Any, optimizer: torch.optim.Optimizer) -> list[tuple[str, float, float]]:
    """(official name, learning rate, weight decay) of every trained parameter."""
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names = official_names(model, parameters_only=True)
    params = {official: id(model.get_parameter(own)) for official, own in names.items()}
    groups = {official: held[p] for official, p in params.items() if p in held}
    return [(official, group["lr"], group["weight_decay"]) for official, group in groups.items()]


@golden_files("a2mim", "optim_groups", ".json")
def test_parameter_options_match_upstream(path):
    """Of networks and optimizers of full size, as the mains build them from the configurations."""
    cases = load_golden(path)["configs"]
    assert cases
    for name, case in cases.items():
        main, args = flags_of(name)
        with without_numbers():
            model = main.build_model(args)
        optimizer = main.build_optimizer(args, model, args.lr)
        assert type(optimizer).__name__.lower() == case["optimizer"].lower()
        found = options(model, optimizer)
        assert [row[0] for row in found] == [row[0] for row in case["groups"]], name
        for own, (key, lr, decay) in zip(found, case["groups"], strict=True):
            assert own[1:] == pytest.approx((lr, decay), rel=1e-9), f"{name} {key}"
        pairs = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        assert len(pairs) == len(set(pairs)), "groups are merged"
        assert all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)


@golden_files("a2mim", "optimizer_ema")
def test_lamb_matches_upstream(path):
    ref = load_golden(path)
    decays, given = ref.meta["group_wd"], ref.meta["lamb"]
    params = [nn.Parameter(ref[f"in/p{i}"].clone()) for i in range(len(decays))]
    groups = [{"params": [p], "lr": given["lr"], "weight_decay": d} for p, d in zip(params, decays, strict=True)]
    flags = argparse.Namespace(opt="lamb", betas=given["betas"], eps=given["eps"])
    optimizer = optim.build_optimizer(flags, groups)
    own = {k: v for k, v in given.items() if k not in ("lr", "weight_decay")}
    assert {k: optimizer.defaults[k] for k in own} == {**own, "betas": tuple(own["betas"])}
    steps = len({name.split("_")[0] for name in ref.group("in") if name.startswith("g")})
    assert steps > 1
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = ref[f"in/g{step}_{i}"]
        optimizer.step()
        for i, param in enumerate(params):
            ref.check(f"out/t{step}_p{i}", param, **ref.meta["tolerance"], what=f"step {step}, {i}")


@golden_files("a2mim", "optimizer_ema")
def test_average_matches_upstream(path):
    ref = load_golden(path)
    if "out/ema/weight" not in ref:
        pytest.skip("the file holds no averages")
    shape = ref["out/ema/weight"].shape[1:]
    net = nn.Linear(*reversed(shape))
    net.weight.data = torch.arange(float(shape.numel())).view(shape)  # as meta's ema_note says
    average = optim.EMA(net, **ref.meta["ema"])
    momenta = [average.momentum_at(i) for i in range(len(ref.get("out/ema/momentum", ())))]
    ref.check("out/ema/momentum", momenta, rtol=1e-9, atol=0)
    for i, weight in enumerate(ref["out/ema/weight"]):
        net.weight.data += 0.5
        average.update(i)
        assert_close(average.module.weight, weight, **ref.meta["tolerance"], what=f"update {i}")


# ---- options by name


@pytest.mark.parametrize(
    ("rows", "name", "expected"),
    [
        ([], "backbone.conv1.weight", (1.0, 0.5)),
        ([("bias", {"weight_decay": 0.0})], "backbone.layers.0.attn.relative_position_bias_table", (1.0, 0.0)),
        (NO_DECAY, "backbone.layer1.0.downsample.1.weight", (1.0, 0.5)),  # a batch norm, as upstream
        (NO_DECAY, "backbone.layer1.0.bn1.weight", (1.0, 0.0)),
        (NO_DECAY, "backbone.stages.0.0.norm.weight", (1.0, 0.5)),
        ([("mask_token", {"weight_decay": 0.0, "lr_mult": 0.1})], "backbone.mask_token", (0.1, 0.0)),
        ([("mask", {"lr_mult": 0.1}), ("token", {"lr_mult": 0.5})], "backbone.mask_token", (0.5, 0.5)),
        ([("mask", {"weight_decay": 0.2}), ("token", {"lr_mult": 0.5})], "backbone.mask_token", (0.5, 0.2)),
        ([("token", {"lr": 7.0})], "backbone.mask_token", (7.0, 0.5)),
        ([("^mask", {"weight_decay": 0.0})], "backbone.mask_token", (1.0, 0.5)),
    ],
)
def test_options__later_patterns_win(rows, name, expected):
    cfg = {"lr": 1.0, "weight_decay": 0.5, "paramwise_options": dict(rows)}
    assert optim.param_options(name, cfg) == pytest.approx(expected)


def vit_scale(name: str, decay: float, depth: int) -> float:
    """As upstream: pos_embed, cls_token, patch_embed d^(L+1), block i d^(L-i), the rest 1."""
    block = re.match(r"backbone\.layers\.(\d+)\.", name)
    if block:
        return decay ** (depth - int(block[1]))
    return decay ** (depth + 1) if re.match(r"backbone\.(pos_embed|cls_token|patch_embed)", name) else 1.0


def convnext_scale(name: str, decay: float, depth: int) -> float:
    """As upstream: stem 0; stage 0 1; stage 1 and its down-sampling 2; down-sampling 2 3; block b of stage 2
    3 + b // 3; stage 3 and its down-sampling n; norm and head n + 1."""
    n = 12 if depth > 9 else 6
    layers = {"stem": 0, "stages.0": 1, "down.1": 2, "stages.1": 2, "down.2": 3, "down.3": n, "stages.3": n}
    short = name.removeprefix("backbone.").replace("downsample_layers.0.", "stem.").replace("downsample_layers", "down")
    block = re.match(r"stages\.2\.(\d+)\.", short)
    if block:
        return decay ** (n + 1 - (3 + int(block[1]) // 3))
    layer = next((v for k, v in layers.items() if short.startswith(f"{k}.")), n + 1)
    return decay ** (n + 1 - layer)


@pytest.mark.parametrize(
    ("backbone", "kind", "depth"),
    [
        ("vit_small", "vit", 8),
        ("vit_large", "vit", 24),
        ("mae_vit_base", "vit", 12),
        ("deit_small", "vit", 12),
        ("convnext_tiny", "convnext", 9),
        ("convnext_small", "convnext", 27),
    ],
)
def test_layer_decay(backbone, kind, depth):
    with without_numbers():
        model = build_classifier(backbone, 10)
    paramwise = [*NO_DECAY, ("head", {"lr_mult": 3.0})]
    cfg = {"lr": 2.0, "weight_decay": 0.1, "paramwise_options": dict(paramwise), "layer_decay": 0.7, "model_type": kind}
    optimizer = torch.optim.AdamW(optim.param_groups(model, cfg))
    scale = vit_scale if kind == "vit" else convnext_scale
    found = options(model, optimizer)
    assert len(found) == len(list(model.parameters()))
    for name, lr, _ in found:
        assert lr == pytest.approx(2 * scale(name, 0.7, depth), rel=1e-12), name
    rates = {lr for _, lr, _ in found}
    assert len(rates) == (depth + 2 if kind == "vit" else {9: 8, 27: 14}[depth])
    assert max(rates) == 2.0


def test_configurations_say_the_kind_of_layer_decay():
    parser = main_finetune.get_args_parser()
    for backbone, kind in (("vit_base", "vit"), ("deit_small", "vit"), ("convnext_tiny", "convnext")):
        cfg = optim.optimizer_cfg(parser.parse_args(["--backbone", backbone, "--layer_decay", "0.5"]))
        assert (cfg["layer_decay"], cfg["model_type"]) == (0.5, kind)
    assert "layer_decay" not in optim.optimizer_cfg(parser.parse_args([]))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backbone", "resnet50", "--layer_decay", "0.7"], "--layer_decay 0.7: is for ViTs and ConvNeXts"),
        (["--betas", "0.9", "1.5"], "--betas 0.9 1.5: expected two numbers"),
    ],
)
def test_optimizer__user_errors(flags, words):
    args = main_finetune.get_args_parser().parse_args(flags)
    with pytest.raises(distributed.UserError, match=words):
        main_finetune.build_optimizer(args, classifier(), 1.0)


def pretraining(name: str = "vit_nano", **keywords) -> Any:
    torch.manual_seed(0)
    return build_masked(name, MIMLoss(), 64, **keywords)


def classifier(name: str = "resnet_nano") -> Any:
    torch.manual_seed(0)
    return build_classifier(name, 5, 64)


def cfg_of(**values) -> dict[str, Any]:
    return {"lr": 1e-2, "weight_decay": 0.1, "paramwise_options": dict(NO_DECAY), **values}


def args_of(opt: str = "adamw") -> argparse.Namespace:
    return argparse.Namespace(opt=opt, betas=[0.9, 0.999], eps=None, momentum=0.9)


def test_groups_are_merged_and_hold_what_is_trained():
    """Every trained parameter once, one group per pair of learning rate and weight decay; frozen tokens are out."""
    model = pretraining(mask_token="randn")
    cfg = cfg_of(paramwise_options=dict([*NO_DECAY, ("cls_token", {"lr_mult": 0.1})]))
    groups = optim.param_groups(model, cfg)
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(1e-2, 0.1), (1e-2, 0.0), (1e-3, 0.1)}
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert id(model.mask_token) not in held


def test_linear_probe_trains_the_last_layer():
    model = classifier().requires_grad_(False)
    model.head.requires_grad_(True)
    args = main_linprobe.get_args_parser().parse_args([])
    optimizer = main_finetune.build_optimizer(args, model, args.lr)
    assert [name for name, *_ in options(model, optimizer)] == ["head.fc.weight", "head.fc.bias"]
    group = optimizer.param_groups[0]
    assert (type(optimizer), group["lr"], group["momentum"], group["weight_decay"]) == (torch.optim.SGD, 30.0, 0.9, 0)


def test_optimizers_are_the_documented_ones():
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1, "weight_decay": 0.0}]
    adamw = optim.build_optimizer(argparse.Namespace(opt="adamw", betas=[0.8, 0.9], eps=1e-3), copy.deepcopy(groups))
    assert isinstance(adamw, torch.optim.AdamW)
    assert [adamw.defaults[k] for k in ("betas", "eps")] == [(0.8, 0.9), 1e-3]
    for given, eps in ((None, 1e-6), (1e-3, 1e-3)):
        flags = argparse.Namespace(opt="lamb", betas=[0.8, 0.9], eps=given)
        lamb = optim.build_optimizer(flags, copy.deepcopy(groups))
        assert [lamb.defaults[k] for k in ("betas", "eps", "max_grad_norm")] == [(0.8, 0.9), eps, 1.0]


# ---- schedules


def lr_of(it: int, base: float = 1.0, per_epoch: int = 4, epochs: int = 10, **cfg) -> float:
    warm = {"warmup": "linear", "warmup_iters": 2, "warmup_by_epoch": True, "warmup_ratio": 0.5}
    return optim.lr_at({**warm, **cfg}, base, it, per_epoch, epochs)


def test_schedules():
    step: dict[str, Any] = {"policy": "step", "step": [5, 8], "gamma": 0.1}
    rates = [lr_of(i, **step) for i in (0, 4, 8, 19, 20, 31, 32, 39)]
    assert rates == pytest.approx([0.5, 0.75, 1, 1, 0.1, 0.1, 0.01, 0.01])
    every = [lr_of(4 * e, policy="step", step=3, warmup=None) for e in range(10)]
    assert every == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001])
    by_epoch = [lr_of(i, policy="CosineAnnealing", min_lr=0.2) for i in range(40)]
    assert by_epoch[20:24] == [by_epoch[20]] * 4 == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi / 2))] * 4)
    by_iter = [lr_of(i, policy="CosineAnnealing", min_lr=0.2, by_epoch=False) for i in range(40)]
    assert by_iter[21] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 21 / 40)))


def test_schedules__oddities_of_upstream():
    """StepFixCosineAnnealing starts at 0 whatever the ratio, and its cosine also runs before its start; the smallest
    rate is the same for all groups, so that smaller ones grow."""
    cfg: dict[str, Any] = {"policy": "StepFixCosineAnnealing", "min_lr": 0.1}
    assert lr_of(0, **cfg) == 0
    assert lr_of(4, **cfg) == pytest.approx(0.5 * (0.1 + 0.45 * (1 + math.cos(-math.pi * 4 / 32))))
    assert lr_of(8, **cfg) == 1
    assert lr_of(39, **cfg) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 31 / 32)))
    small = [lr_of(i, base=0.01, **cfg) for i in range(8, 40)]
    assert small == sorted(small)
    assert small[0] == pytest.approx(0.01)
    assert small[-1] > 0.09


@pytest.mark.parametrize("warmup", [10, 20])
def test_a_warmup_as_long_as_the_run_only_rises(warmup):
    rates = [lr_of(i, policy="StepFixCosineAnnealing", warmup_iters=warmup) for i in range(40)]
    assert rates == pytest.approx([i / (4 * warmup) for i in range(40)])


def test_schedules__user_errors():
    with pytest.raises(ValueError, match="policy poly: expected one of step, CosineAnnealing"):
        lr_of(0, policy="poly")
    parser = main_pretrain.get_args_parser()
    with pytest.raises(distributed.UserError, match="--sched step: needs the epochs of --steps"):
        optim.check_schedule(optim.lr_config(parser.parse_args(["--sched", "step"])))
    optim.check_schedule(optim.lr_config(parser.parse_args(["--sched", "step", "--steps", "60", "80"])))


# ---- steps


def imgs_and_mask(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 64, 64, generator=generator), torch.randint(0, 2, (2, 4, 4), generator=generator)


def take_steps(model: Any, optimizer: torch.optim.Optimizer, seeds: Any) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        model(*imgs_and_mask(seed))["loss"].backward()
        optimizer.step()


def of_flags(opt: str, model: Any, **cfg) -> torch.optim.Optimizer:
    return optim.build_optimizer(args_of(opt), optim.param_groups(model, cfg_of(**cfg)))


# ---- average of the weights


def test_average__follows_parameters_and_takes_buffers():
    model = classifier()
    average = optim.EMA(model, momentum=0.75, warmup=None)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for value in model.state_dict().values():
        value.copy_(value + 1)
    average.update(0)
    state, live = average.averaged().state_dict(), model.state_dict()
    for name, value in state.items():
        expected = 0.75 * before[name] + 0.25 * live[name] if name in before else live[name]
        assert_close(value, expected, rtol=1e-6, atol=1e-6, what=name)
    assert not any(p.requires_grad for p in average.module.parameters())


def test_average__momentum_grows():
    average = optim.EMA(nn.Linear(1, 1), momentum=0.9999, warmup_iters=10)
    found = [average.momentum_at(i) for i in (0, 5, 10, 100)]
    assert found == pytest.approx([0.9999 * 0.9, 0.9999 * 0.95, 0.9999, 0.9999])
    assert optim.EMA(nn.Linear(1, 1), warmup=None).momentum_at(0) == 0.9999


def test_average__of_the_training_loop_is_the_same():
    """Through the updater, which can freeze it on the device."""
    model = classifier()
    plain, guarded = optim.EMA(model, 0.9, warmup=None), optim.EMA(model, 0.9, warmup=None)
    updater = distributed.Updater(of_flags("adamw", model), CPU, "fp32")
    for param in model.parameters():
        param.data += 1
    plain.update(3)
    guarded.update(3, updater)
    for value, expected in zip(guarded.module.parameters(), plain.module.parameters(), strict=True):
        assert_close(value, expected, rtol=1e-6, atol=1e-6)
    updater._frozen.fill_(1)
    kept = [p.clone() for p in guarded.module.parameters()]
    for param in model.parameters():
        param.data += 1
    guarded.update(4, updater)
    assert all(torch.equal(value, old) for value, old in zip(guarded.module.parameters(), kept, strict=True))


def averaged_run() -> tuple[Any, optim.EMA]:
    """A classifier whose live and averaged parameters differ."""
    model = classifier()
    average = optim.EMA(model, 0.5, warmup=None)
    for i, value in enumerate(model.state_dict().values()):
        value.add_(i + 1)
    average.update(0)
    return model, average


def test_weights__average_stands_under_the_normal_names():
    model, average = averaged_run()
    state = optim.Weights(model, average).state_dict()
    live, names = to_openmixup_state_dict(model), official_names(model, parameters_only=True)
    extra = {k: v for k, v in state.items() if k not in live}
    assert set(extra) == {"ema_" + name.replace(".", "_") for name in names}
    assert "ema_backbone_layer1_0_bn1_weight" in extra
    assert "ema_head_fc_bias" in extra
    for name, own in names.items():
        assert torch.equal(extra["ema_" + name.replace(".", "_")], model.get_parameter(own)), name
        assert torch.equal(state[name], average.module.get_parameter(own)), name
        assert not torch.equal(state[name], live[name]), name
    for name in set(live) - set(names):
        assert torch.equal(state[name], live[name]), f"{name} is a buffer, the live one"


def test_weights__resume_restores_live_and_averaged_weights():
    """Upstream loses the live ones."""
    model, average = averaged_run()
    saved = copy.deepcopy(optim.Weights(model, average).state_dict())
    other = classifier()
    fresh = optim.EMA(other, 0.5, warmup=None)
    optim.Weights(other, fresh).load_state_dict(saved)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    for name, value in average.averaged().state_dict().items():
        assert torch.equal(fresh.averaged().state_dict()[name], value), name


def test_weights__with_and_without_an_average():
    model, average = averaged_run()
    with_average = optim.Weights(model, average).state_dict()
    without = optim.Weights(model).state_dict()
    assert list(without) == list(to_openmixup_state_dict(model))
    plain = classifier()
    optim.Weights(plain).load_state_dict(with_average)  # a run that goes on without
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in model.state_dict().items())
    other = classifier()
    fresh = optim.EMA(other)
    optim.Weights(other, fresh).load_state_dict(without)  # a run that begins to average
    for net in (other, fresh.module):
        assert all(torch.equal(net.state_dict()[k], v) for k, v in model.state_dict().items())


def test_weights__refuses_another_network():
    state = optim.Weights(classifier()).state_dict()
    with pytest.raises(ValueError, match="are missing"):
        optim.Weights(classifier("convnext_nano")).load_state_dict(state)
