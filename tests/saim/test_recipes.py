"""What the authors' command lines and each main's defaults train with, against the values that the authors used."""

import importlib
from typing import Any

import pytest
import torch

from common import distributed
from saim import engine_finetune, models_saim
from tests.support import recipes


def _pretrained(_path: str) -> dict[str, Any]:
    with torch.device("meta"):
        return {"model": models_saim.saim_base().state_dict()}


@recipes.cases("saim")
def test_command_line(case):
    main = importlib.import_module(f"saim.{case.main}")
    watch, replace = [models_saim.GaussianConv2d], {distributed.load: _pretrained}
    run = recipes.capture(main, case.argv, case.world, case.rank, watch=watch, replace=replace)
    facts = run.facts() | {"blur": recipes.describe(run.made.get("GaussianConv2d", []))}
    facts["schedule"] = {"lr": recipes.at(run.call["schedule"], case.expect["schedule"]["lr"])}
    recipes.compare(case.expect, facts, case.name)


@recipes.cases("saim", "presets")
def test_preset(case):
    module = importlib.import_module(f"saim.{case.module}")
    recipes.compare(case.expect, recipes.preset(getattr(module, case.build), **case.kwargs), case.name)


@pytest.mark.golden
def test_accuracies():
    expected = recipes.recipes("saim")["evaluate"]
    found = recipes.accuracies(engine_finetune.evaluate, expected["ranks"])
    assert (found["acc1"], found["acc5"]) == pytest.approx((expected["acc1"], expected["acc5"]))
