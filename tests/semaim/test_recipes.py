"""What the authors' command lines and each main's defaults train with, against the values that the authors used."""

import copy
import importlib
from functools import partial
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from common import distributed
from semaim import engine_finetune, engine_pretrain, main_knn, models_clip, models_semaim
from tests.support import recipes


def shapes(build, *args, **kwargs) -> dict[str, Any]:
    """The state dict of a network without numbers."""
    with torch.device("meta"):
        return build(*args, **kwargs).state_dict()


def clip_weights(_path: str) -> dict[str, Any]:
    """Of the image tower of CLIP ViT-B/16."""
    return {f"visual.{k}": v for k, v in shapes(models_clip.ClipVisual, 224, 16, 768, 12, 512).items()}


def dino_weights(_path: str) -> dict[str, Any]:
    """Of DINO ViT-B/16."""
    return shapes(models_clip.DinoViT, 224, 16, 768, 12)


def guide_facts(run: recipes.Captured) -> dict[str, Any]:
    """Which network draws the maps, how, and the average's decay by epoch."""
    guide, model, ema = (run.call[name] for name in ("guide", "model", "ema"))
    networks: dict[str, nn.Module | None] = {"teacher": guide.teacher, "ema": ema and ema.module, "model": model}
    asked = guide.teacher if guide.teacher is not None else guide.source
    teacher = guide.teacher and recipes.preset(lambda: guide.teacher)
    facts = {name: getattr(guide, name) for name in ("features", "needed", "amp")}
    return {**facts, "source": next(name for name, net in networks.items() if net is asked), "teacher": teacher}


class Average:
    """In place of timm's, which needs a device."""

    def __init__(self, model: nn.Module):
        self.module = copy.deepcopy(model)


def replaced(case) -> dict[Any, Any]:
    """Files that the case's command reads, without numbers: an encoder and the teacher."""
    encoder = case.encoder and shapes(getattr(models_semaim, case.encoder))
    teacher = dino_weights if "dino" in case.argv else clip_weights
    files = {distributed.load: lambda _: {"state_dict": encoder}, models_clip.read_weights: teacher}
    return {**files, ModelEmaV3: Average}


@recipes.cases("semaim")
def test_command_line(case):
    main, watch = importlib.import_module(f"semaim.{case.main}"), [models_semaim.GaussianConv2d]
    run = recipes.capture(main, case.argv, case.world, case.rank, watch=watch, replace=replaced(case))
    facts = run.facts() | {"blur": recipes.describe(run.made.get("GaussianConv2d", []))}
    facts["schedule"] = {"lr": recipes.at(run.call["schedule"], case.expect["schedule"]["lr"])}
    if "guide" in case.expect:
        decay = case.expect["guide"]["ema"]
        average = recipes.at(engine_pretrain.ema_decay, decay) if run.call["ema"] else None
        facts["guide"] = guide_facts(run) | {"ema": average}
    facts["drop_path"] = [getattr(block.drop_path, "drop_prob", 0.0) for block in run.call["model"].blocks]
    recipes.compare(case.expect, facts, case.name)


@recipes.cases("semaim", "knn")
def test_nearest_neighbours(case):
    """The images and the network of the features, and the vote."""
    capture = partial(recipes.capture, main_knn, case.argv, case.world, case.rank)
    run = capture(stops=["extract_features"], replace=replaced(case))
    vote = capture(stops=["vote"], replace={main_knn.compute: lambda *_: [torch.empty(0)] * 4})
    facts = {"loaders": run.loaders(), "model": recipes.modules(run.call["model"])}
    recipes.compare(case.expect, facts | {"vote": recipes.describe(vote.call)}, case.name)


@recipes.cases("semaim", "presets")
def test_preset(case):
    module = importlib.import_module(f"semaim.{case.module}")
    recipes.compare(case.expect, recipes.preset(getattr(module, case.build), **case.kwargs), case.name)


@pytest.mark.golden
def test_accuracies():
    expected = recipes.recipes("semaim")["evaluate"]
    found = recipes.accuracies(engine_finetune.evaluate, expected["ranks"])
    assert (found["acc1"], found["acc5"]) == pytest.approx((expected["acc1"], expected["acc5"]))
