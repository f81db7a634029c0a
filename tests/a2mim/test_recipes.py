"""The recipes by value: what runs of the authors' configurations would use, the networks by name, the analyses.

tests/golden/a2mim/recipes.json holds what the authors' files and programs say, not what ours do; "code" marks the few
values that only ours have. `tests.support.recipes` runs every main up to its first epoch.
"""

from itertools import islice
from typing import Any

import pytest
import torch
from timm.data.auto_augment import RandAugment
from torch import Tensor

from a2mim import (
    config,
    data,
    engine_finetune,
    main_finetune,
    main_fourier,
    main_interactions,
    main_linprobe,
    main_pretrain,
    openmixup,
)
from a2mim.backbones import BACKBONES, is_convnext, is_vit
from a2mim.models_a2mim import build_classifier
from common import distributed
from common.distributed.sync_bn import HostSyncBatchNorm
from tests.support.helpers import ROOT
from tests.support.recipes import Captured, accuracies, capture, cases, compare, describe, recipes, without_numbers

MAINS: dict[str, Any] = {m.__name__.split(".")[-1]: m for m in (main_pretrain, main_finetune, main_linprobe)}
LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [-0.5, 1.5, 3.0, -2.0]])
MIXED = torch.tensor([0, 3]), torch.tensor([2, 2]), 0.3  # classes, classes of the partners, share of the first


def parse(parser: Any, words: Any) -> Any:
    return config.parse_args(parser, list(words))


def captured(case: Any) -> Captured:
    """The case's run; one that fine-tunes starts from an encoder, as the authors' do."""
    words = [str(ROOT / "a2mim" / word) if word.startswith("configs/") else word for word in case.argv]
    main = MAINS[case.main]
    encoder = [] if main is main_pretrain else ["--pretrained", "encoder.pth"]
    loads: dict[Any, Any] = {
        distributed.load: lambda path: {},
        openmixup.load_encoder_weights: lambda model, *_: (set(model.net.state_dict()), []),
    }
    where = {"world": case.world, "rank": case.rank, "images": case.images, "classes": case.classes}
    watch = (distributed.Checkpoint,)
    return capture(main, [*words, *encoder], **where, watch=watch, replace=loads, parse=parse)


# ---- what a run has made, in the words of recipes.json


def steps(transform: Any) -> list[list[Any]]:
    """[[class, its values], ...] of composed transforms."""
    found = []
    for step in transform.transforms:
        facts = {k: describe(v) for k, v in vars(step).items() if k in ("size", "scale", "ratio", "p", "mean", "std")}
        if hasattr(step, "interpolation"):
            facts["interpolation"] = describe(step.interpolation)
        if isinstance(step, RandAugment):
            op = step.ops[0]
            facts = {"ops": len(step.ops), "layers": step.num_layers, "prob": op.prob, "magnitude": op.magnitude}
            facts |= {"std": op.magnitude_std, "fill": list(op.kwargs["fillcolor"])}
        elif hasattr(step, "max_count"):  # random erasing
            facts = {"p": step.probability, "mode": step.mode, "count": step.max_count}
        name = type(step).__name__.removesuffix("AndInterpolation").removeprefix("Maybe")
        found.append([name, facts])
    return found


def optimizer(run: Captured) -> dict[str, Any]:
    """Class, settings and groups: [[rate, weight decay, tensors, their elements], ...]."""
    groups = run.optimizer.param_groups
    rows = [[g["initial_lr"], g["weight_decay"], len(g["params"]), sum(map(Tensor.numel, g["params"]))] for g in groups]
    shared = {k: describe(v) for k, v in groups[0].items() if k != "params" and all(g.get(k) == v for g in groups[1:])}
    return {**shared, "class": type(run.optimizer).__name__, "groups": sorted(rows)}


def rates(run: Captured, iterations: list[int]) -> list[list[Any]]:
    """[[base rate, its values], ...] of the groups with the lowest and the highest rate."""
    groups = sorted(run.optimizer.param_groups, key=lambda group: group["initial_lr"])
    picked = [groups[0], groups[-1]] if groups[0]["initial_lr"] < groups[-1]["initial_lr"] else groups[:1]
    found: list[list[float]] = [[] for _ in picked]
    for iteration in iterations:
        run.call["set_rates"](iteration)
        for values, group in zip(found, picked, strict=True):
            values.append(group["lr"])
    return [[group["initial_lr"], values] for group, values in zip(picked, found, strict=True)]


def drop_path(net: Any) -> Any:
    """Every block's probability in a ViT, the last block's in a CNN."""
    first = "drop_path1" if is_vit(net) else "drop_path"
    blocks = [block for block in net.modules() if hasattr(block, first)]
    rates = [round(getattr(getattr(block, first), "drop_prob", 0.0), 7) for block in blocks]  # of float32
    return rates if is_vit(net) else rates[-1]


def common_facts(run: Captured, case: Any) -> dict[str, Any]:
    updater, made = run.made["Updater"][0], next(made for made in run.made["Loader"] if made["train"])
    files = run.made["Checkpoint"][0]["files"]
    sampler = made["made"].sampler.sampler
    sampler.set_epoch(case.expect["sampler"]["epoch"])
    first = [list(item) if isinstance(item, tuple) else item for item in islice(sampler, 6)]
    iterations = case.expect["schedule"]["iterations"]
    return {
        "images_per_update": made["batch_size"] * case.world * updater["accum_iter"],
        "batch_size": made["batch_size"],
        "accum_iter": updater["accum_iter"],
        "clip_grad": updater["clip_grad"],
        "mixed_precision": updater["precision"],
        "iterations_per_epoch": len(made["made"]),
        "optimizer": optimizer(run),
        "schedule": {"iterations": iterations, "rates": rates(run, iterations)},
        "sampler": {"epoch": sampler.epoch, "images": len(sampler), "first": first, "seed": made["seed"]},
        "drop_last": made["drop_last"],
        "epochs": run.args.epochs,
        "checkpoints": {"every": files.every, "keep_all": files.keep_all, "latest": files.latest},
        "sync_bn": any(isinstance(m, HostSyncBatchNorm) for m in run.call["model"].modules()),
    }


def pretraining_facts(run: Captured) -> dict[str, Any]:
    model = run.call["model"]
    transform = next(made["transform"] for made in run.made["Loader"] if made["train"])
    crop, flip, _ = (step[1] for step in steps(transform.augment))
    masks, fixed = transform.generator, ("mask_layer", "mask_mode", "mask_replace", "mask_detach", "residual", "stride")
    k = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64).view(2, 3, 32, 32)
    mask = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [1, 1]]])
    loss = model.loss(torch.sin(0.1 * k), 2 * torch.cos(0.07 * k), mask)
    return {
        "transform": {
            "crop": crop,
            "flip": flip["p"],
            "mask": {"side": masks.side, "masked": masks.num_masked, "scale": masks.scale},
        },
        "losses": [float(loss[name]) for name in ("loss_spatial", "loss_freq", "loss")],
        "view": run.call["context"],
        "inits": {name: run.init(parameter) for name, parameter in model.named_parameters()},
        "model": {**{name: getattr(model, name) for name in fixed}, "drop_path": drop_path(model.encoder)},
    }


def finetuning_facts(run: Captured, case: Any) -> dict[str, Any]:
    model, ema, mixing = run.call["model"], run.call["ema"], run.call["mixing"]
    views = {made["train"]: steps(made["transform"]) for made in run.made["Loader"]}
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    names = openmixup.official_names(model, parameters_only=True).items()
    facts = {
        "transform": views[True],
        "eval_transform": views[False],
        "mixing": mixing and [[mode.func.__name__, mode.keywords["alpha"]] for mode in mixing.modes],
        "losses": float(run.call["criterion"](LOGITS, MIXED)),
        "head_init": run.init(model.head.weight),
        "ema": None,
        "model": {"classes": model.head.out_features, "drop_path": drop_path(model.net)},
        "trained": [name for name, own in names if id(model.get_parameter(own)) in trained],
    }
    if is_vit(model.net):
        facts["model"]["global_pool"] = model.net.global_pool
    if ema is not None:
        moments = [ema.momentum_at(i) for i in case.expect["ema"]["iterations"]]
        facts["ema"] = {**case.expect["ema"], "update_interval": ema.update_interval, "momentum": moments}
    return facts


@cases("a2mim")
def test_recipe(case):
    """All that its run would use."""
    run = captured(case)
    own = pretraining_facts(run) if case.main == "main_pretrain" else finetuning_facts(run, case)
    assert own.pop("losses") == pytest.approx(case.expect.pop("losses"), rel=1e-5), f"{case.name}: losses"
    compare(case.expect, {**common_facts(run, case), **own}, case.name)
    assert run.seeds == [run.args.seed + case.rank], f"{case.name}: every process draws by itself"


def test_pixels_are_normalised_by_imagenets_statistics():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    black, white = data.normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    torch.testing.assert_close(black.flatten(), -mean / std)
    torch.testing.assert_close(white.flatten(), (1 - mean) / std)


@pytest.mark.golden
def test_accuracies():
    expected = recipes("a2mim")["evaluate"]
    found = accuracies(engine_finetune.evaluate, expected["ranks"])
    assert found == pytest.approx({name: expected[name] for name in ("head0_top1", "head0_top5")})


# ---- networks by name


def network(name: str) -> dict[str, Any]:
    """What a preset was built with; shapes show all of it but the heads."""
    with without_numbers():
        model = build_classifier(name, 1000, drop_path=0.0)
    net: Any = model.net
    facts: dict[str, Any] = {"class": type(net).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    if is_vit(net):
        block = net.blocks[0]
        tables = getattr(block.attn, "relative_position_bias_table", None)
        return facts | {
            "width": net.embed_dim,
            "depth": len(net.blocks),
            "heads": block.attn.num_heads,
            "hidden": block.mlp.fc1.out_features,
            "norm_eps": block.norm1.eps,
            "position_tables": None if tables is None else list(tables.shape),
        }
    stages = [s.blocks for s in net.stages] if is_convnext(net) else [net.layer1, net.layer2, net.layer3, net.layer4]
    facts |= {"blocks": [len(stage) for stage in stages], "widths": [f["num_chs"] for f in net.feature_info][-4:]}
    if is_convnext(net):
        return facts | {"norm_eps": net.head.norm.eps}
    return facts | {
        "block": type(net.layer1[0]).__name__,
        "stem": net.conv1.out_channels,
        "batch_norm": [net.bn1.eps, net.bn1.momentum],
    }


@cases("a2mim", "presets")
def test_preset(case):
    compare({k: v for k, v in vars(case).items() if k not in ("name", "source")}, network(case.name), case.name)


def test_every_preset_has_values():
    assert set(recipes("a2mim")["presets"]) == set(BACKBONES)


# ---- analyses


def test_interactions():
    """The settings of the authors' two files, and the defaults of their flags."""
    expected = recipes("a2mim")["analyses"]["interactions"]
    flags = vars(main_interactions.get_args_parser().parse_args([]))
    own = {
        "ratios": main_interactions.RATIOS,
        "imagenet": main_interactions.IMAGENET,
        "cifar10": main_interactions.CIFAR,
        "flags": flags,
        "archs": main_interactions.ARCHS,
    }
    compare(expected, own, "interactions")
    assert flags["ratios"] == expected["ratios"]


def test_fourier():
    expected = recipes("a2mim")["analyses"]["fourier"]
    compare(expected, {"flags": vars(main_fourier.get_args_parser().parse_args([]))}, "fourier")
