"""SemAIM's encoders of any checkpoint: as k-NN and the classifiers see them, and under timm's names."""

import argparse
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from common.distributed import UserError
from scripts.tools.encoders import load
from scripts.tools.encoders.semaim import ENCODERS
from semaim import main_knn, main_linprobe, models_semaim
from semaim.models_vit import MODELS, VisionTransformer
from tests.support.helpers import golden_files, load_golden
from tests.support.timm_forms import assert_timm_form, timm_model

load_backbone, timm_form = partial(load.load_backbone, "semaim"), partial(load.timm_form, "semaim")

SIZES = {"img_size": 16, "patch_size": 4}
IMGS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    for value in model.parameters():
        value.data.add_(0.02 * torch.randn_like(value))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean, module.running_var = torch.randn(96), 1 + torch.rand(96)
    return model.eval()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    """As main_pretrain.py writes it, with a moving average."""
    path = tmp_path_factory.mktemp("semaim") / "aim_nano.exp.temp.pth"
    state: dict[str, Any] = {"model": "aim_nano", "args": argparse.Namespace(model="aim_nano", input_size=16)}
    for key, seed in (("state_dict", 1), ("ema_state_dict", 2)):
        model = models_semaim.MODELS["aim_nano"](**SIZES, query_depth=2, permutation_type="stochastic")
        state[key] = shaken(model, seed).state_dict()
    torch.save(state, path)
    return str(path)


@golden_files("semaim", "vit_eval")
def test_authors_networks(path, tmp_path, monkeypatch):
    ref = load_golden(path)
    monkeypatch.setitem(MODELS, "golden", lambda **kw: VisionTransformer(**{**ref.kwargs, **kw}))
    for case, keys in ref.meta["cases"].items():
        pool = "avg" if "fc_norm.weight" in keys["missing"] else "token"
        torch.save({"state_dict": {**ref.weights, **ref.group(f"in/{case}")}}, tmp_path / case)
        backbone = load_backbone(str(tmp_path / case), "golden", pool=pool)
        tol = {"rtol": ref.meta["tol"], "atol": ref.meta["tol"]}
        ref.check(f"out/{case}/features", backbone(ref["in/imgs"]), **tol)
        ref.check(f"out/{case}/logits", timm_model(timm_form(backbone))(ref["in/imgs"]), **tol)


OTHERS = [pytest.param(*case, marks=pytest.mark.slow) for case in (("avg", ""), ("token", "ema_state_dict"))]


@pytest.mark.parametrize(("pool", "key"), [("token", ""), ("avg", "ema_state_dict"), *OTHERS])
def test_features_are_those_of_knn(pool, key, pretrained):
    flags = ["--model", "vit_nano_patch16", "--input_size", "24", "--patch_size", "4"]
    flags += ["--pretrained_weights", pretrained, "--checkpoint_key", key or "state_dict"]
    flags += ["--global_pool"] if pool == "avg" else []
    model = main_knn.build_model(main_knn.get_args_parser().parse_args(flags)).eval()
    imgs = torch.randn(2, 3, 24, 24)
    backbone = load_backbone(pretrained, input_size=24, key=key, pool=pool)
    assert torch.equal(backbone(imgs), model(imgs))
    assert_timm_form(timm_form(backbone), backbone, imgs)


@pytest.mark.parametrize(("global_pool", "probe"), [(False, False), (True, False), (True, True)])
def test_classifiers_keep_their_head(global_pool, probe, tmp_path):
    model = MODELS["vit_nano_patch16"](**SIZES, num_classes=5, global_pool=global_pool)
    if probe:
        main_linprobe.add_probe(model)
    shaken(model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    backbone = load_backbone(str(tmp_path / "a.pth"))
    assert backbone.head is not None
    assert torch.equal(backbone.head(backbone(IMGS)), model(IMGS))
    assert_timm_form(timm_form(backbone), backbone, IMGS)
    torch.save({"model": backbone.weights()}, tmp_path / "again.pth")
    again = load_backbone(str(tmp_path / "again.pth"))
    assert torch.equal(again.head(again(IMGS)), model(IMGS))  # type: ignore[misc]


@pytest.mark.parametrize(("size", "crop", "tuned"), [(224, 224 / 256, 224 / 256), (384, 384 / 512, 1.0)])
def test_crop_is_that_of_the_evaluation(size, crop, tuned, tmp_path):
    """k-NN resizes to 512 pixels above 224, the classifiers' evaluation to the size itself."""
    backbone = load_backbone("", "vit_nano_patch16", size)
    assert backbone.crop_pct == crop
    assert main_knn.knn_transform(size).transforms[0].size == int(size / crop)
    model = MODELS["vit_nano_patch16"](**SIZES, num_classes=2)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    assert load_backbone(str(tmp_path / "a.pth"), input_size=size).crop_pct == tuned


def test_all_pre_training_models_have_an_encoder():
    assert set(ENCODERS) == set(models_semaim.MODELS)


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("aim_large", "aim_huge")]


@pytest.mark.parametrize("name", [*sorted(ENCODERS.keys() - {"aim_large", "aim_huge"}), *LARGE])
def test_encoders_have_the_sizes_of_pre_training(name):
    with torch.device("meta"):
        whole = models_semaim.MODELS[name](query_depth=16 if "huge" in name else 1)
        own = MODELS[ENCODERS[name]]()
    heads = [net.blocks[0].attn.num_heads for net in (whole, own)]  # type: ignore[union-attr]
    assert heads[0] == heads[1]
    assert len(whole.blocks) == len(own.blocks)
    assert whole.cls_token.shape == own.cls_token.shape


def test_mistakes_are_told(pretrained):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"key": "teacher"}, "holds no weights under 'teacher'; its keys: model, args, state_dict, ema_state_dict"),
        ({"model": "vit_nano"}, "--model vit_nano: expected one of"),
        ({"input_size": 15}, "image size 15 is not a multiple of the patch size 4"),
    ]
    for kwargs, words in cases:
        with pytest.raises(UserError, match=words):
            load_backbone(pretrained, **kwargs)
