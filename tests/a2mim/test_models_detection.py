"""A2MIM's Mask R-CNNs: names, sizes and initial weights, encoders from files, and what small ones learn."""

from functools import partial

import pytest
import torch

from a2mim import models_detection
from a2mim.dense_backbone import DenseResNet
from a2mim.models_detection import MODELS, c4
from common.distributed import UserError
from tests.support import detection


def test_parameters_of_the_authors_networks():
    with torch.device("meta"):
        networks = {name: MODELS[f"mask_rcnn_{name}"]() for name in ("r50_c4", "r50_fpn", "vit_base")}
    parts = {name: detection.parameters(model) for name, model in networks.items()}
    convolutions = sum((256, 512, 1024, 2048)) * 256 + 4 * 256 * 256 * 9
    assert parts["r50_fpn"]["backbone"] == 23_508_032
    assert parts["r50_fpn"]["neck"] == convolutions + 8 * 2 * 256
    assert parts["vit_base"]["rpn_head"] == parts["r50_fpn"]["rpn_head"] == 593_935
    assert detection.parameters(networks["vit_base"].roi_head) == {"bbox_head": 15_618_449, "mask_head": 2_643_280}
    stage5 = 14_964_736  # the ResNet's fourth stage
    c4_heads = detection.parameters(networks["r50_c4"].roi_head)
    assert c4_heads["shared_head"] == stage5 + 2 * 2048
    assert c4_heads["bbox_head"] == 2048 * (81 + 320) + 81 + 320
    assert c4_heads["mask_head"] == 2048 * 256 * 4 + 256 + 256 * 80 + 80
    assert parts["r50_c4"]["backbone"] == 23_508_032 - stage5
    assert [m.roi_head.giou_weight for m in networks.values()] == [0, 0, 10]
    assert [m.rpn_head.train_proposals for m in networks.values()] == [(12000, 2000), (2000, 1000), (2000, 2000)]


def test_names_and_initial_weights():
    model = MODELS["mask_rcnn_resnet_nano"](num_classes=3)
    detection.assert_names(model, convs=4, fcs=1, box_norm=True, neck_norm=True, mask_norm=True)
    detection.assert_initial_weights(model)
    model = MODELS["mask_rcnn_vit_nano"](num_classes=3)
    detection.assert_names(model, convs=4, fcs=1, box_norm=True)
    detection.assert_initial_weights(model)
    names = {name.split(".")[1] for name, _ in c4("resnet_nano").roi_head.named_parameters()}
    assert {"layer4", "norm", "fc_cls", "fc_reg", "upsample", "conv_logits"} == names


@pytest.mark.parametrize(
    "build", [MODELS["mask_rcnn_resnet_nano"], MODELS["mask_rcnn_vit_nano"], partial(c4, "resnet_nano", num_regions=64)]
)
def test_every_weight_learns(build):
    torch.manual_seed(0)
    detection.assert_learns(build(num_classes=3))


def test_encoders_of_files(tmp_path):
    encoder = DenseResNet("resnet_nano")
    with torch.no_grad():
        for value in encoder.state_dict().values():
            value.add_(torch.ones((), dtype=value.dtype))
    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "encoder.pth")
    model = c4("resnet_nano", 3)
    models_detection.load_encoder(model, str(tmp_path / "encoder.pth"))
    loaded = {**model.backbone.state_dict(), **model.roi_head.shared_head.state_dict()}  # type: ignore[union-attr]
    for name, value in encoder.state_dict().items():
        assert torch.equal(loaded[name], value), name
    assert (loaded["norm.weight"] == 1).all()
    with pytest.raises(UserError, match="is not this encoder"):
        models_detection.load_encoder(MODELS["mask_rcnn_vit_nano"](), str(tmp_path / "encoder.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_nano", "vit_nano"])
def test_four_images_are_learned_by_heart(name, tmp_path):
    torch.manual_seed(0)
    kwargs = {} if name == "resnet_nano" else {"drop_path_rate": 0.0}
    scores = detection.overfit(MODELS[f"mask_rcnn_{name}"](num_classes=6, **kwargs), tmp_path, 300, 1e-3)
    assert scores["box_AP"] > 90, scores
    assert scores["mask_AP"] > 90, scores
