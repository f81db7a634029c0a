"""Encoders of any checkpoint against the evaluations and the authors' numbers, and as timm models."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from a2mim import main_linprobe
from a2mim.backbones import BACKBONES, convnext, is_convnext, is_resnet, plain_vit, resnet, vit
from a2mim.losses import MIMLoss
from a2mim.main_finetune import build_model
from a2mim.models_a2mim import Classifier, build_classifier, build_from_openmixup, build_masked
from a2mim.openmixup import extract_encoder, load_classifier, load_encoder, load_openmixup_state_dict
from a2mim.openmixup import to_openmixup_state_dict as official
from a2mim.optim import EMA, Weights
from common.distributed import UserError
from scripts.tools.encoders import load
from scripts.tools.encoders.a2mim import _shape_by_name, _shape_of
from scripts.tools.encoders.backbone import Backbone
from tests.support.helpers import assert_close, golden_files, load_golden

load_backbone, timm_form = partial(load.load_backbone, "a2mim"), partial(load.timm_form, "a2mim")

NANO = ("vit_nano", "resnet_nano", "convnext_nano")


def randomised(model: Any) -> Any:
    """Every parameter and running statistic off its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * (torch.rand(value.shape, generator=generator) - 0.3))
    return model.eval()


def sizes(name: str) -> dict[str, Any]:
    return {"img_size": 32} | ({"patch_size": 8} if "vit" in name else {})


def pretraining(name: str) -> Any:
    return randomised(build_masked(name, MIMLoss(), **sizes(name)))


def classifier(name: str, classes: int = 7, **keywords) -> Any:
    return randomised(build_classifier(name, classes, **sizes(name), **keywords))


def written(tmp_path: Path, weights: dict[str, Tensor], args: Any = None, **others) -> str:
    torch.save({"state_dict": weights, "args": args, **others}, tmp_path / "checkpoint.pth")
    return str(tmp_path / "checkpoint.pth")


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def assert_timm_agrees(backbone: Backbone) -> None:
    """The timm form in a timm model: the same functions in the same order."""
    form, imgs = timm_form(backbone), images(backbone.input_size)
    model: Any = timm.create_model(form.architecture, num_classes=form.num_classes, **form.model_args).eval()
    model.load_state_dict(form.weights)
    with torch.no_grad():
        found = backbone(imgs)
        assert_close(model.forward_head(model.forward_features(imgs), pre_logits=True), found, rtol=1e-6, atol=1e-6)
        assert (backbone.head is None) == (form.num_classes == 0)
        if backbone.head is not None:
            assert_close(model(imgs), backbone.head(found), rtol=1e-6, atol=1e-6)


def backbone_of(model: Classifier) -> partial:
    """What builds a network of the same sizes."""
    net: Any = model.net
    shape = _shape_of(net.state_dict())
    if is_resnet(net):
        return partial(resnet, depth=50, base_channels=shape[3], block_counts=shape[2])
    if is_convnext(net):
        return partial(convnext, depths=shape[1], dims=shape[2])
    heads = net.blocks[0].attn.num_heads
    return partial(vit, embed_dim=shape[1], depth=shape[2], num_heads=heads, mlp_ratio=shape[3] / shape[1])


@golden_files("a2mim", "finetune")
def test_features_of_fine_tuning(path, tmp_path, monkeypatch):
    ref = load_golden(path)
    model: Any = build_from_openmixup(ref.meta["constructor"], ref.meta.get("block_counts"))
    load_openmixup_state_dict(model, ref.weights)
    monkeypatch.setitem(BACKBONES, "golden", backbone_of(model))
    backbone = load_backbone(written(tmp_path, ref.weights), "golden", input_size=ref["in/x"].shape[-1])
    with torch.no_grad():
        found = backbone(ref["in/x"])
        ref.check("out/feat", found, rtol=1e-4, atol=2e-5)
        assert backbone.head is not None
        ref.check("out/logits", backbone.head(found), rtol=1e-4, atol=2e-5)
    assert_timm_agrees(backbone)


@pytest.mark.parametrize("form", ["checkpoint", "extracted", "timm"])
@pytest.mark.parametrize("name", NANO)
def test_pretraining_as_in_linear_probing(name, form, tmp_path):
    """Bit for bit what the probe reads of a run's checkpoint, of an extracted encoder and of timm's names."""
    source = pretraining(name)
    checkpoint = {"state_dict": official(source)}
    weights = {
        "checkpoint": checkpoint["state_dict"],
        "extracted": extract_encoder(checkpoint),
        "timm": source.encoder.state_dict(),
    }[form]
    path = written(tmp_path, weights)
    flags = ["--backbone", name, "--train_size", "32", "--val_crop", "32", "--patch_size", "8", "--nb_classes", "7"]
    args = main_linprobe.get_args_parser().parse_args(flags)
    probe = build_model(args, **({"global_pool": "token"} if name == "vit_nano" else {}))
    load_encoder(probe, path)
    backbone = load_backbone(path, input_size=32)
    assert (backbone.model_name, backbone.head, backbone.input_size) == (name, None, 32)
    assert backbone.pool == ("token" if name == "vit_nano" else "avg")
    found = backbone(images())
    assert found.shape == (3, backbone.embed_dim)
    assert torch.equal(found, probe.eval().features(images()))
    notes = timm_form(backbone).notes
    assert notes == (["The mask token and the decoder of pre-training are left out."] if form == "checkpoint" else [])
    assert_timm_agrees(backbone)


@pytest.mark.parametrize(
    ("name", "pool"),
    [*((name, "avg") for name in (*NANO, "mae_vit_nano")), ("vit_nano", "token"), ("mae_vit_nano", "token")],
)
def test_classifiers(name, pool, tmp_path, monkeypatch):
    """They keep their features and their head, are read back from their own weights, and are timm's."""
    keywords: dict[str, Any] = {"global_pool": pool} if pool == "token" else {}
    monkeypatch.setitem(BACKBONES, "mae_vit_nano", partial(plain_vit, embed_dim=96, depth=2, num_heads=3))
    model = classifier(name, **keywords)
    path = written(tmp_path, official(model), {"backbone": name, "val_crop": 32, "val_resize": 37})
    again = classifier(name, **keywords)
    load_classifier(again, path)
    backbone = load_backbone(path)
    assert (backbone.model_name, backbone.input_size) == (name, 32)
    assert int(32 / backbone.crop_pct) == 37
    assert torch.equal(backbone(images()), again.eval().features(images()))
    assert backbone.head is not None
    assert torch.equal(backbone.head(backbone(images())), model(images()))
    assert_timm_agrees(backbone)
    own = load_backbone(written(tmp_path, backbone.weights()), input_size=32)
    assert torch.equal(own(images()), backbone(images()))
    assert (own.model_name, own.pool, own.head is None) == (name, backbone.pool, False)


@pytest.mark.parametrize("name", NANO)
def test_another_input_size(name, tmp_path):
    path = written(tmp_path, official(classifier(name)), {"backbone": name, "val_crop": 32})
    backbone = load_backbone(path, input_size=48)
    assert backbone.input_size == 48
    assert backbone(images(48)).shape == (3, backbone.embed_dim)
    assert_timm_agrees(backbone)
    if name == "vit_nano":  # the flag's interpolation, not the zeros that training starts from
        assert all(block.attn.relative_position_bias_table.any() for block in backbone.network.net.blocks)


def test_another_pooling(tmp_path):
    """The final norm follows the pooling; the head, which it was not trained for, stays behind."""
    encoder = official(pretraining("vit_nano"))
    mean = load_backbone(written(tmp_path, encoder), pool="avg")
    assert torch.equal(mean.network.net.fc_norm.weight, encoder["backbone.ln1.weight"])
    assert_timm_agrees(mean)
    token = load_backbone(written(tmp_path, official(classifier("vit_nano"))), pool="token")
    assert (token.pool, token.head) == ("token", None)
    assert_timm_agrees(token)


def test_averaged_weights(tmp_path):
    """A file with a moving average holds it under the normal names."""
    model = classifier("resnet_nano")
    ema = EMA(model, 0.5)
    with torch.no_grad():
        for value in ema.module.parameters():
            value.mul_(0.9)
    backbone = load_backbone(written(tmp_path, Weights(model, ema).state_dict()), input_size=32)
    averaged: Any = ema.averaged().eval()
    assert torch.equal(backbone(images()), averaged.features(images()))
    assert "moving average" in timm_form(backbone).notes[0]


def test_vits_without_layer_scale(tmp_path):
    model = classifier("vit_nano", init_values=None)
    backbone = load_backbone(written(tmp_path, official(model)))
    assert torch.equal(backbone(images()), model.features(images()))
    assert_timm_agrees(backbone)


def test_names_by_shapes():
    """No two backbones have the same, and those of a network are those of its name."""
    shapes = _shape_by_name()
    assert len(set(shapes.values())) == len(BACKBONES)
    for name in (*NANO, "resnet18"):
        assert _shape_of(build_classifier(name, 3, **sizes(name)).net.state_dict()) == shapes[name]


def test_key(tmp_path):
    model, other = classifier("resnet_nano"), classifier("resnet_nano", 3)
    path = written(tmp_path, official(model), other=official(other))
    backbone = load_backbone(path, key="other", input_size=32)
    assert backbone.head is not None
    assert torch.equal(backbone.head(backbone(images())), other(images()))
    with pytest.raises(UserError, match="holds no weights under 'ema'; its keys: state_dict, args, other"):
        load_backbone(path, key="ema")


def test_random_weights():
    torch.manual_seed(0)
    one = load_backbone("", "convnext_nano", 32)
    torch.manual_seed(0)
    assert torch.equal(one(images()), load_backbone("", "convnext_nano", 32)(images()))
    assert load_backbone("", "vit_nano").input_size == 224


def test_mistakes(tmp_path):
    path = written(tmp_path, official(classifier("resnet_nano")))
    torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "other.pth")
    lacking = {k: v for k, v in official(pretraining("vit_nano")).items() if "ln1" not in k}
    torch.save({"state_dict": lacking}, tmp_path / "lacking.pth")
    torch.save({"state_dict": {"cls_token": torch.zeros(1, 1, 8)}}, tmp_path / "token.pth")
    torch.save(build_classifier("resnet_nano", 3).net.layer1.state_dict(prefix="layer1."), tmp_path / "part.pth")
    Path(tmp_path / "damaged.pth").write_bytes(Path(path).read_bytes()[:999])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"checkpoint": path, "model": "resnet"}, "--model resnet: expected one of vit_small"),
        ({"checkpoint": path, "model": "resnet50"}, "is no resnet50; check --model"),
        ({"checkpoint": path, "pool": "token"}, "--pool token: resnet_nano has no class token"),
        ({"checkpoint": path, "pool": "max"}, "--pool max: expected token or avg"),
        ({"checkpoint": str(tmp_path / "other.pth")}, "holds no ViT, ResNet or ConvNeXt; its keys: w"),
        ({"checkpoint": str(tmp_path / "lacking.pth")}, "lacking.pth: has no final norm"),
        ({"checkpoint": str(tmp_path / "token.pth")}, "token.pth: check --model and --input_size: .*layers.0.ffn"),
        (
            {"checkpoint": str(tmp_path / "part.pth")},
            "part.pth: check --model and --input_size: A2MIM has no ResNet of",
        ),
        ({"checkpoint": str(tmp_path / "damaged.pth")}, "truncated or not a checkpoint"),
        ({"checkpoint": str(tmp_path / "none.pth")}, "no such checkpoint file"),
        ({"checkpoint": ""}, "--model: expected one of"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            load_backbone(**given)
