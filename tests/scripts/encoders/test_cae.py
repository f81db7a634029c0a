"""Encoders of any checkpoint against the evaluations and the authors' numbers, and as timm models."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from cae import main_linprobe, models_cae
from cae.main_finetune import build_model
from cae.main_linprobe import add_probe
from cae.models_segmentation import upernet_cae_nano
from cae.models_vit import MODELS, VisionTransformer, load_encoder
from common.distributed import UserError
from scripts.tools.encoders import load
from scripts.tools.encoders.backbone import Backbone
from tests.support.helpers import assert_close, golden_files, load_golden, tolerance

load_backbone, timm_form = partial(load.load_backbone, "cae"), partial(load.timm_form, "cae")


def randomised(model: Any) -> Any:
    """Every parameter and running statistic off its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * (torch.rand(value.shape, generator=generator) - 0.3))
    return model.eval()


def classifier(**keywords) -> VisionTransformer:
    probe = keywords.pop("probe", False)
    model = MODELS["cae_nano"](**{"img_size": 32, "patch_size": 8, "num_classes": 7, **keywords})
    if probe:
        add_probe(model)
    return randomised(model)


def pretraining(**keywords) -> models_cae.ContextAutoencoderViT:
    return randomised(models_cae.MODELS["cae_nano"](img_size=32, patch_size=8, **keywords))


def written(tmp_path: Path, model: Any, **others) -> str:
    torch.save({"model": model.state_dict(), **others}, tmp_path / "checkpoint.pth")
    return str(tmp_path / "checkpoint.pth")


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def assert_timm_agrees(backbone: Backbone) -> None:
    """The timm form in a timm model, in float64: what differs is not rounding."""
    form, imgs = timm_form(backbone), images(backbone.input_size).double()
    model: Any = timm.create_model(form.architecture, num_classes=form.num_classes, **form.model_args).eval()
    model.load_state_dict(form.weights)
    model, exact = model.double(), backbone.double()
    with torch.no_grad():
        found = exact(imgs)
        assert_close(model.forward_head(model.forward_features(imgs), pre_logits=True), found, rtol=0, atol=1e-9)
        assert (backbone.head is None) == (form.num_classes == 0)
        if backbone.head is not None:
            assert_close(model(imgs), backbone.head(found), rtol=1e-6, atol=1e-6)  # a folded layer is float32
    backbone.float()


@golden_files("cae", "ft_fwd")
def test_features_of_fine_tuning(path, tmp_path, monkeypatch):
    assert_golden(path, tmp_path, monkeypatch)


@golden_files("cae", "linear_fwd")
def test_features_of_linear_probing(path, tmp_path, monkeypatch):
    """In evaluations, whose batch norm takes the running statistics."""
    assert_golden(path, tmp_path, monkeypatch, logits=False)


def assert_golden(path, tmp_path, monkeypatch, logits: bool = True) -> None:
    ref = load_golden(path)
    monkeypatch.setitem(MODELS, "golden", partial(VisionTransformer, **ref.kwargs))
    torch.save({"model": ref.weights}, tmp_path / "golden.pth")
    backbone = load_backbone(str(tmp_path / "golden.pth"), "golden")
    with torch.no_grad():
        found = backbone(ref["in/x"])
        ref.check("out/features", found, **tolerance(ref), what="features")
        assert backbone.head is not None
        if logits:
            ref.check("out/logits", backbone.head(found), **tolerance(ref), what="logits")
    assert_timm_agrees(backbone)


@pytest.mark.parametrize("size", [32, 48])
def test_pretraining_as_in_linear_probing(size, tmp_path):
    """Bit for bit what the paper's probe reads, at the size of pre-training and at another one."""
    path = written(tmp_path, pretraining())
    flags = ["--model", "cae_nano", "--input_size", str(size), "--patch_size", "8", "--nb_classes", "7"]
    flags += ["--enable_linear_eval", "--use_cls", "--disable_rel_pos_bias"]
    probe = build_model(main_linprobe.get_args_parser().parse_args(flags), lin_probe=True)
    load_encoder(probe, path, head_std=0.01, resize_positions=True)
    backbone = load_backbone(path, input_size=None if size == 32 else size)
    assert (backbone.model_name, backbone.pool, backbone.input_size) == ("cae_nano", "token", size)
    assert (backbone.patch_size, backbone.embed_dim, backbone.head) == (8, 96, None)
    assert torch.equal(backbone(images(size)), probe.eval().forward_features(images(size)))
    assert_timm_agrees(backbone)


def test_segmentation__gives_its_backbone(tmp_path):
    network = randomised(upernet_cae_nano(img_size=32, patch_size=8, num_classes=3))
    path = written(tmp_path, network)
    assert load_backbone(path).pool == "avg"
    backbone = load_backbone(path, pool="token")
    assert (backbone.model_name, backbone.pool, backbone.input_size) == ("cae_nano", "token", 32)
    assert "The pyramid and the heads of a dense task are left out." in backbone.notes
    assert torch.equal(backbone(images()), network.backbone.tokens(images(), slice(0, 1))[:, 0])


def test_pretraining__pooled_as_in_fine_tuning(tmp_path):
    path = written(tmp_path, pretraining())
    model = classifier(init_values=0.1)
    load_encoder(model, path)
    backbone = load_backbone(path, pool="avg")
    assert_close(backbone(images()), model.forward_features(images()), rtol=0, atol=1e-6)
    assert any("regressor" in note for note in timm_form(backbone).notes)
    assert_timm_agrees(backbone)


def test_pretraining__of_the_earlier_revision_and_of_a_moving_average(tmp_path):
    source = pretraining(base_momentum=0.9)
    old = {f"module.{k}": v for k, v in source.state_dict().items() if not k.startswith("alignment_encoder.")}
    torch.save({"module": old, "args": argparse.Namespace(model="cae_nano", input_size=32)}, tmp_path / "old.pth")
    expected = load_backbone(written(tmp_path, source))(images())
    assert torch.equal(load_backbone(str(tmp_path / "old.pth"))(images()), expected)


KINDS = {
    "mean": {},
    "relative": {"use_rel_pos_bias": True, "init_values": 0.1},
    "shared": {"use_shared_rel_pos_bias": True, "use_mean_pooling": False, "sin_pos_emb": False},
    "both": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "abs_pos_emb": True},
    "probe": {"probe": True, "lin_probe": True, "use_mean_pooling": False},
    "probe of the mean": {"probe": True},
    "probe without norm": {"probe": True, "lin_probe": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_classifiers(kind, tmp_path):
    """They keep their features and their head, are read back from their own weights, and are timm's."""
    model = classifier(**KINDS[kind])
    backbone = load_backbone(written(tmp_path, model, args={"model": "cae_nano", "input_size": 32}))
    assert torch.equal(backbone(images()), model.forward_features(images(), is_train=False))
    assert backbone.head is not None
    assert torch.equal(backbone.head(backbone(images())), model(images()))
    torch.save({"model": backbone.weights()}, tmp_path / "again.pth")
    again = load_backbone(str(tmp_path / "again.pth"))
    assert torch.equal(again(images()), backbone(images()))
    assert again.head is not None
    assert_timm_agrees(backbone)
    larger = load_backbone(written(tmp_path, model), input_size=48)
    assert larger(images(48)).shape == (3, 96)
    assert_timm_agrees(larger)


def test_classifiers__another_pooling_has_no_head(tmp_path):
    path = written(tmp_path, classifier())
    backbone = load_backbone(path, pool="token")
    assert (backbone.pool, backbone.head) == ("token", None)
    assert_timm_agrees(backbone)


def test_probes_without_norm__with_relative_positions_are_not_timms(tmp_path):
    model = classifier(probe=True, lin_probe=True, use_rel_pos_bias=True)
    with pytest.raises(UserError, match="norms the class token"):
        timm_form(load_backbone(written(tmp_path, model)))
    for block in model.blocks:
        block.attn.relative_position_bias_table.data.zero_()  # type: ignore[union-attr]
    form = timm_form(load_backbone(written(tmp_path, model)))
    assert form.architecture == "vit_base_patch16_224"
    assert any("all of which are 0" in note for note in form.notes)
    assert_timm_agrees(load_backbone(written(tmp_path, model)))


@pytest.mark.parametrize("mean", [False, True])
def test_attentive_probes__are_the_encoder(mean, tmp_path):
    model = classifier(lin_probe=True, linear_type="attentive", use_mean_pooling=mean)
    path = written(tmp_path, model)
    backbone = load_backbone(path)
    token = model.tokens(images())[:, 0]
    expected = token if mean else model.norm(token)
    assert_close(backbone(images()), expected.detach(), rtol=1e-5, atol=1e-5)
    assert backbone.head is None
    assert any("attentive" in note for note in timm_form(backbone).notes)
    assert_timm_agrees(backbone)
    if mean:
        with pytest.raises(UserError, match=r"--pool avg: .* has no final norm"):
            load_backbone(path, pool="avg")


def test_statistics_and_view_of_the_images(tmp_path):
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    cases = [
        (classifier(), {"imagenet_default_mean_and_std": False}, half, 0.875),
        (classifier(), {"imagenet_default_mean_and_std": True, "crop_pct": 0.9}, imagenet, 0.9),
        (classifier(probe=True), {"imagenet_default_mean_and_std": False}, imagenet, 0.875),
        (pretraining(), {"imagenet_default_mean_and_std": False}, imagenet, 0.875),
        (classifier(img_size=384, patch_size=96), {"input_size": 384}, imagenet, 1.0),
    ]
    for model, args, mean, crop_pct in cases:
        backbone = load_backbone(written(tmp_path, model, args=args))
        assert (backbone.mean, backbone.crop_pct, backbone.interpolation) == (mean, crop_pct, "bicubic")


def test_key(tmp_path):
    other = classifier(num_classes=3)
    path = written(tmp_path, classifier(), model_ema=other.state_dict())
    backbone = load_backbone(path, key="model_ema")
    assert torch.equal(backbone(images()), other.forward_features(images()))
    with pytest.raises(UserError, match="holds no weights under 'ema'; its keys: model, model_ema"):
        load_backbone(path, key="ema")


def test_random_weights():
    torch.manual_seed(0)
    one = load_backbone("", "cae_nano", 64)
    torch.manual_seed(0)
    assert torch.equal(one(images(64)), load_backbone("", "cae_nano", 64)(images(64)))
    assert load_backbone("", "cae_tiny_patch16_224_8k_vocab").model_name == "cae_tiny_patch16_224"


def test_mistakes(tmp_path):
    path = written(tmp_path, pretraining())
    torch.save({"model": {"w": torch.zeros(2)}}, tmp_path / "other.pth")
    torch.save({"model": MODELS["cae_nano"](depth=3, img_size=32).state_dict()}, tmp_path / "depth.pth")
    Path(tmp_path / "damaged.pth").write_bytes(Path(path).read_bytes()[:999])
    cases = [
        ({"checkpoint": path, "model": "vit"}, "--model vit: expected one of cae_tiny_patch16_224"),
        (
            {"checkpoint": path, "model": "cae_tiny_patch16_224"},
            "check METHOD, --model and --input_size: 120 encoder weights",
        ),
        ({"checkpoint": path, "input_size": 30}, "image size 30 is not a multiple"),
        ({"checkpoint": path, "pool": "max"}, "--pool max: expected token or avg"),
        ({"checkpoint": str(tmp_path / "other.pth")}, "holds no encoder of CAE, cls_token is missing; its keys: w"),
        ({"checkpoint": str(tmp_path / "depth.pth")}, "no known model has 96 channels and 3 blocks"),
        ({"checkpoint": str(tmp_path / "damaged.pth")}, "truncated or not a checkpoint"),
        ({"checkpoint": str(tmp_path / "none.pth")}, "no such checkpoint file"),
        ({"checkpoint": ""}, "--model: expected one of"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            load_backbone(**given)


def test_width_that_heads_do_not_divide__is_not_timms(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "odd", partial(VisionTransformer, embed_dim=20, depth=1, num_heads=3))
    backbone = load_backbone("", "odd", 32)
    assert backbone(images()).shape == (3, 20)
    with pytest.raises(UserError, match="3 heads divide, not 20"):
        timm_form(backbone)
