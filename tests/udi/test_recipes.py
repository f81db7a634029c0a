"""What the mains train with and evaluate by, and the networks' sizes, by value: tests/golden/udi/recipes.json."""

import importlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from timm.utils.model_ema import ModelEmaV3
from torch.optim.lr_scheduler import CosineAnnealingLR

from common import distributed
from tests.support.recipes import (
    Captured,
    Images,
    accuracies,
    at,
    capture,
    cases,
    compare,
    describe,
    modules,
    preset,
    recipes,
)
from udi import (
    backbone,
    data,
    engine_finetune,
    main_finetune,
    main_knn,
    models_eval,
    models_finetune,
    models_udi,
    optim,
)
from udi.udi_augmentation import Photometric, RandomCropCoord

# Warnings speak of the many workers of the recipes, and of a scheduler's steps without updates.
pytestmark = pytest.mark.filterwarnings("ignore")
# Nothing is read: no weights, no lists of images; features are those of 3. Of a moving average its decay is kept.
FEATURES = [torch.zeros(3, 1, device="cpu"), torch.zeros(3, dtype=torch.long, device="cpu")]
ABSENT: dict[Any, Any] = {
    backbone.load_backbone: lambda *_: None,
    distributed.load: lambda _: {},
    models_eval.load_head: lambda *_: None,
    main_finetune.pretrained_weights: lambda _: None,
    ModelEmaV3: lambda module, decay, device: SimpleNamespace(module=module, decay=decay),
    main_knn.extract_features: lambda *_: FEATURES,
    distributed.is_main: lambda: True,  # which alone computes the regression
    distributed.gather_to_main: lambda value: [value],
}
WATCH = (CosineAnnealingLR, backbone.build_backbone)
STOPS = ("train_one_epoch", "fit", "vote")
PRESETS: dict[str, dict[str, Callable[..., Any]]]
PRESETS = {"models_udi": models_udi.MODELS, "models_finetune": models_finetune.MODELS}


@cases("udi")
def test_recipe(case):
    sizes = {True: (case.images, case.classes), False: (50_000, case.classes)}
    sets = {data.semi_supervised_sets: lambda _: tuple(Images(*sizes[train]) for train in (True, False))}
    sets |= {data.transfer_set: lambda _, train: Images(*sizes[train])}
    main = importlib.import_module(f"udi.{case.main}")
    where = {"world": case.world, "rank": case.rank, "images": case.images, "classes": case.classes}
    run = capture(main, case.argv, **where, watch=WATCH, replace=ABSENT | sets, stops=STOPS)
    facts = run.facts() if "Updater" in run.made else {"loaders": run.loaders(), **run.call}
    if "build_backbone" in run.made:
        facts["backbone"] = modules(run.made["build_backbone"][0]["made"])
    if "teacher" in run.call:
        facts |= pretraining(run, case.expect)
    if "CosineAnnealingLR" in run.made:
        facts["rates"] = epoch_rates(run, case.expect["rates"])
    elif "rates" in run.call:
        facts["rates"] = at(run.call["rates"], case.expect["rates"])
    if run.call.get("ema"):
        facts["call"]["ema"] = {"decay": run.call["ema"].decay}
    compare(case.expect, describe(facts), case.name)


def pretraining(run: Captured, expect: dict[str, Any]) -> dict[str, Any]:
    """What only pre-training has: teacher, centres, temperatures by epoch, clipped and dropped gradients."""
    loss = run.call["udi_loss"]
    with mock.patch.multiple(optim, clip_gradients=mock.DEFAULT, cancel_gradients_last_layer=mock.DEFAULT) as called:
        run.made["Updater"][0]["on_gradients"]()
    clips = [call.args[1] for call in called["clip_gradients"].call_args_list]
    epoch, _, freeze = called["cancel_gradients_last_layer"].call_args.args
    return {
        "teacher": modules(run.call["teacher"]),
        "trained_teacher": sum(p.requires_grad for p in run.call["teacher"].parameters()),
        "center_momentum": loss.centering.momentum,
        "exact_center": loss.centering.exact,
        "temperatures": at(loss.temperatures.__getitem__, expect["temperatures"]),
        "gradients": {"clip_each": clips, "epoch": epoch, "freeze_last_layer": freeze},
        "ratio": RandomCropCoord.RATIO,
    }


def epoch_rates(run: Captured, pairs: list[list[float]]) -> list[list[float]]:
    """Rates of a scheduler that is stepped after each epoch."""
    scheduler = run.made["CosineAnnealingLR"][0]["made"]
    found = []
    for epoch, _ in pairs:
        while scheduler.last_epoch < epoch:
            scheduler.step()
        found.append([epoch, run.optimizer.param_groups[0]["lr"]])
    return found


@cases("udi", "presets")
def test_preset(case):
    compare(case.expect, preset(PRESETS[case.module][case.preset], **case.kwargs), case.name)


@pytest.mark.golden
def test_accuracies():
    expected = recipes("udi")["accuracies"]
    found = accuracies(engine_finetune.evaluate, expected["ranks"])
    assert (found["acc1"], found["acc5"]) == pytest.approx((expected["acc1"], expected["acc5"]))
    scores = -torch.arange(10.0).expand(len(expected["ranks"]), -1)  # class k is choice k
    found = main_knn.accuracy(scores, torch.tensor(expected["ranks"]), k=20)
    assert found == pytest.approx((expected["acc1"], expected["acc5"]))


@cases("udi", "photometric")
def test_photometric(case):
    """Probabilities, at which an effect of the draws changes, radii of the blur, and the level of the solarisation."""
    photometric, radii = Photometric(), set()
    photometric.colour = lambda image: image  # type: ignore[assignment]  # compared with the transforms
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))

    def effects(*draws: float) -> tuple[bool, int]:
        """Whether an image is blurred, and the first level that is inverted."""
        blurred = []

        def radius(low: float, high: float) -> float:
            radii.add((low, high))
            blurred.append(True)
            return 0

        with mock.patch.object(random, "random", side_effect=draws), mock.patch.object(random, "uniform", radius):
            levels = photometric(ramp).tobytes()
        return bool(blurred), next((i for i, level in enumerate(levels) if level != i), -1)

    def switch(*draws: float | None) -> float:
        """The value of the draw None at which the effects change."""
        low, high = 0.0, 1.0
        filled = lambda x: effects(*(x if draw is None else draw for draw in draws))  # noqa: E731
        first = filled(0.0)
        for _ in range(50):
            low, high = ((low + high) / 2, high) if filled((low + high) / 2) == first else (low, (low + high) / 2)
        return high

    found = {name: switch(*draws) for name, draws in case.draws.items()}
    inverted, certain = effects(0.9, 0.9, 0.0)[1], effects(0.0, 0.9, 1.0)[0]
    compare(case.expect, {**found, "radii": describe(sorted(radii)), "inverted": inverted, "certain": certain}, "")
