"""What the authors' command lines and each main's defaults train with, against the values that the authors used."""

import importlib
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3

from cae import engine_finetune, models_cae, models_vit
from cae.models_cae import ContextAutoencoderViT
from cae.models_dalle import DalleTokenizer
from cae.models_dvae import DiscreteVAE, load_tokenizer
from cae.models_vit import VisionTransformer
from common import distributed
from tests.support import recipes
from tests.support.helpers import ROOT

WATCHED = [ContextAutoencoderViT, VisionTransformer, DiscreteVAE, engine_finetune.fit]
# Flags of a script that name files, or only say what is the default.
OTHERS = ("data_path", "output_dir", "log_dir", "exp_name", "finetune", "discrete_vae_weight_path", "sincos_pos_emb")


def _average(_model, decay: float, **_) -> SimpleNamespace:
    """In place of timm's, which asks for a device."""
    return SimpleNamespace(decay=decay, module=None)


def _tokenizer(*_) -> DalleTokenizer:
    return DalleTokenizer(with_decoder=False)


@recipes.cases("cae")
def test_command_line(case):
    size = "large" if "large" in case.name else "base"

    def pretrained(_path: str) -> dict[str, Any]:
        with torch.device("meta"):
            return {"model": models_cae.MODELS[f"cae_{size}_patch16_224_8k_vocab"]().state_dict()}

    main = importlib.import_module(f"cae.{case.main}")
    replace = {distributed.load: pretrained, load_tokenizer: _tokenizer, ModelEmaV3: _average}
    run = recipes.capture(main, case.argv, case.world, case.rank, watch=WATCHED, replace=replace)
    model = run.call["model"]
    rates = run.call.get("rates") or run.call["schedule"]
    made = {
        name: recipes.describe({k: v for k, v in calls[0].items() if k != "made"}) for name, calls in run.made.items()
    }
    facts = run.facts() | {"made": made}
    facts["trained"] = list(dict.fromkeys(n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad))
    facts["schedule"] = recipes.describe(recipes.at(rates, case.expect["schedule"]))
    if "temperature" in run.call:
        facts["temperature"] = recipes.at(run.call["temperature"], case.expect["temperature"])
    recipes.compare(case.expect, facts, case.name)


@pytest.mark.golden
@pytest.mark.parametrize("script", recipes.recipes("cae")["rows"])
def test_script_of_a_row(script):
    """On the authors' 32 GPUs its commands have the flags of the captured command lines."""
    env = {"PATH": "/usr/bin:/bin", "GPUS": "8", "NNODES": "4"}
    shown = subprocess.run(["bash", script, "--dry_run"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    lines = [line.split(".py ")[1].split() for line in shown.stdout.replace("\\\n", "").splitlines()]
    data = recipes.recipes("cae")
    for (stage, name), words in zip(data["rows"][script].items(), lines, strict=True):
        case = data["cases"][name]
        parser = importlib.import_module(f"cae.{case['main']}").get_args_parser()
        found, expected = (vars(parser.parse_args(argv)) for argv in (words, case["argv"]))
        recipes.compare({k: v for k, v in expected.items() if k not in OTHERS}, found, f"{script} {stage}")


@recipes.cases("cae", "presets")
def test_preset(case):
    module = {"models_cae": models_cae, "models_vit": models_vit}[case.module]
    recipes.compare(case.expect, recipes.preset(module.MODELS[case.constructor], **case.kwargs), case.name)


@pytest.mark.golden
def test_accuracies():
    expected = recipes.recipes("cae")["evaluate"]
    found = recipes.accuracies(engine_finetune.evaluate, expected["ranks"])
    assert (found["acc1"], found["acc5"]) == pytest.approx((expected["acc1"], expected["acc5"]))
