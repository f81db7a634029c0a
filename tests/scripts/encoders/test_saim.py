"""SAIM's encoders of any checkpoint: as the evaluations see them, and under timm's names."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.distributed import UserError
from saim import main_linprobe, models_saim
from saim.models_vit import MODELS, VisionTransformer, load_encoder
from scripts.tools.encoders import load
from scripts.tools.encoders.saim import ENCODERS
from tests.support.helpers import golden_files, load_golden
from tests.support.timm_forms import assert_timm_form, timm_model

load_backbone, timm_form = partial(load.load_backbone, "saim"), partial(load.timm_form, "saim")

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4}
IMGS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def shaken(model: nn.Module) -> nn.Module:
    """Every weight moved, so that none is the constant with which training starts."""
    torch.manual_seed(1)
    for value in model.parameters():
        value.data.add_(0.02 * torch.randn_like(value))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean, module.running_var = torch.randn(96), 1 + torch.rand(96)
    return model.eval()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    """As the authors write it: flags in a Namespace."""
    path = tmp_path_factory.mktemp("saim") / "checkpoint.pth"
    model = shaken(models_saim.MODELS["saim_nano"](**SIZES, query_depth=2))
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model="saim_nano", input_size=16)}, path)
    return str(path)


def classifier(global_pool: bool, probe: bool) -> nn.Module:
    """A network with 5 classes, as fine-tuned or as probed."""
    model = MODELS["vit_nano_patch16"](**SIZES, num_classes=5, global_pool=global_pool)
    if probe:
        main_linprobe.add_probe(model)
    return shaken(model)


# ---- the authors' numbers


@golden_files("saim", "vit_")
def test_fine_tuned_networks(path, tmp_path, monkeypatch):
    ref = load_golden(path)
    monkeypatch.setitem(MODELS, "golden", lambda **kw: VisionTransformer(**{**ref.kwargs, **kw}))
    torch.save({"model": ref.weights}, tmp_path / "vit.pth")
    backbone = load_backbone(str(tmp_path / "vit.pth"), "golden")
    ref.check("out/features", backbone(ref["in/imgs"]), rtol=1e-4, atol=2e-5)
    ref.check("out/logits", timm_model(timm_form(backbone))(ref["in/imgs"]), rtol=1e-4, atol=2e-5)


@golden_files("saim", "load_pretrained_")
def test_pretrained_networks(path, tmp_path, monkeypatch):
    ref = load_golden(path)
    monkeypatch.setitem(MODELS, "golden", lambda **kw: VisionTransformer(**{**ref.kwargs, **kw}))
    torch.save(
        {"model": {**ref.weights, **{k: x for k, x in ref.group("in").items() if "fc_norm" in k}}}, tmp_path / "a"
    )
    pool = "avg" if ref.kwargs["global_pool"] else "token"
    backbone = load_backbone(str(tmp_path / "a"), "golden", pool=pool)
    ref.check("out/features", backbone(ref["in/imgs"]), rtol=1e-4, atol=2e-5)
    assert_timm_form(timm_form(backbone), backbone, ref["in/imgs"])


# ---- checkpoints


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_are_what_linear_probes_read(pool, pretrained):
    model = MODELS["vit_nano_patch16"](**SIZES, num_classes=5, global_pool=pool == "avg")
    load_encoder(model, pretrained)
    backbone = load_backbone(pretrained, pool=pool)
    assert torch.equal(backbone(IMGS), model.eval().forward_features(IMGS))
    assert (backbone.model_name, backbone.input_size, backbone.patch_size, backbone.embed_dim) == (
        "vit_nano_patch16",
        16,
        4,
        96,
    )
    assert (backbone.pool, backbone.crop_pct, backbone.head) == (pool, 224 / 256, None)
    assert_timm_form(timm_form(backbone), backbone, IMGS)
    assert load_backbone(pretrained).pool == "token"


@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("probe", [False, True])
def test_classifiers_keep_their_head(global_pool, probe, tmp_path):
    model = classifier(global_pool, probe)
    torch.save({"model": {f"module.{k}": x for k, x in model.state_dict().items()}}, tmp_path / "a.pth")
    backbone = load_backbone(str(tmp_path / "a.pth"))
    assert backbone.pool == ("avg" if global_pool else "token")
    assert backbone.head is not None
    assert torch.equal(backbone.head(backbone(IMGS)), model(IMGS))
    form = timm_form(backbone)
    assert form.num_classes == 5
    assert bool(form.notes) == probe
    assert_timm_form(form, backbone, IMGS)
    # What it gives away is a checkpoint again; so are bare weights.
    for name, state in (("again.pth", {"model": backbone.weights()}), ("bare.pth", backbone.weights())):
        torch.save(state, tmp_path / name)
        again = load_backbone(str(tmp_path / name))
        assert torch.equal(again.head(again(IMGS)), model(IMGS))  # type: ignore[misc]


def test_positions_are_resized(pretrained):
    model = MODELS["vit_nano_patch16"](img_size=24, patch_size=4, num_classes=0)
    load_encoder(model, pretrained)
    backbone, imgs = load_backbone(pretrained, input_size=24), torch.randn(2, 3, 24, 24)
    assert torch.equal(backbone(imgs), model.eval()(imgs))
    assert_timm_form(timm_form(backbone), backbone, imgs)


@pytest.mark.parametrize(("size", "crop"), [(224, 224 / 256), (240, 1.0)])
def test_crop_is_that_of_the_evaluation(size, crop):
    assert load_backbone("", "vit_nano_patch16", size).crop_pct == crop


def test_random_weights_follow_the_seed():
    torch.manual_seed(0)
    first = load_backbone("", "saim_nano", 32)
    torch.manual_seed(0)
    second = load_backbone("", "vit_nano_patch16", 32)
    assert first.model_name == "vit_nano_patch16"
    imgs = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(imgs), second(imgs))


def test_models_are_told_by_their_shapes(tmp_path):
    torch.save({"model": MODELS["vit_tiny_patch16"](**SIZES).state_dict()}, tmp_path / "a.pth")
    assert load_backbone(str(tmp_path / "a.pth")).model_name == "vit_tiny_patch16"
    torch.save(
        {"model": VisionTransformer(**SIZES, embed_dim=8, depth=1, num_heads=2).state_dict()}, tmp_path / "b.pth"
    )
    with pytest.raises(UserError, match="--model must be given, no known model has 8 channels"):
        load_backbone(str(tmp_path / "b.pth"))


def test_pools_without_weights(tmp_path):
    """A head goes with its own pooling; a network that pools has no norm of the class token."""
    for pool in (False, True):
        torch.save({"model": classifier(pool, probe=False).state_dict()}, tmp_path / f"{pool}.pth")
    assert load_backbone(str(tmp_path / "False.pth"), pool="avg").head is None
    with pytest.raises(UserError, match="--pool: 1 encoder weights are missing, first norm.weight|norm.weight"):
        load_backbone(str(tmp_path / "True.pth"), pool="token")


MISTAKES = [
    ({"model": "vit_nano"}, "--model vit_nano: expected one of vit_base_patch16"),
    ({"model": "vit_tiny_patch16"}, "check METHOD, --model, --input_size and --pool: 128 encoder weights are missing"),
    ({"input_size": 18}, "image size 18 is not a multiple of the patch size 4"),
    ({"key": "ema_state_dict"}, "holds no weights under 'ema_state_dict'; its keys: model, args"),
]


@pytest.mark.parametrize(("kwargs", "words"), MISTAKES, ids=str)
def test_mistakes_are_told(kwargs, words, pretrained):
    with pytest.raises(UserError, match=words):
        load_backbone(pretrained, **kwargs)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"model": {"conv1.weight": torch.zeros(1)}}, "holds no ViT; its weights: conv1.weight, ..."),
        ({"model": {}}, "holds no ViT; its weights: none"),
        ({"epoch": 1}, "holds no weights under"),
    ],
    ids=["cnn", "empty", "no weights"],
)
def test_other_files_are_refused(state, words, tmp_path: Path):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=words):
        load_backbone(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_the_sizes_of_pre_training(name):
    with torch.device("meta"):
        whole = models_saim.MODELS[name](query_depth=1) if name != "vit_igpt_base" else models_saim.MODELS[name]()
        encoder = MODELS[ENCODERS[name]](num_classes=0)
    shapes = {key: x.shape for key, x in whole.state_dict().items()}
    assert all(shapes[key] == x.shape for key, x in encoder.state_dict().items())
    heads = [net.blocks[0].attn.num_heads for net in (whole, encoder)]  # type: ignore[union-attr]
    assert heads[0] == heads[1]


def test_all_pre_training_models_have_an_encoder():
    assert set(ENCODERS) == set(models_saim.MODELS)
