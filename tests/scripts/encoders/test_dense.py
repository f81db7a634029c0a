"""Checkpoints of segmentation and detection as encoders: their features, timm's form, and the whole network's file."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import a2mim.main_segmentation
import cae.main_segmentation
from a2mim import models_detection as a2mim_detectors
from cae import models_detection as cae_detectors
from common import distributed
from scripts.tools import export
from scripts.tools.encoders.load import load_backbone, timm_form
from tests.support.runs import arguments
from udi import models_detection as udi_detectors
from udi import models_segmentation as udi_segmentation


def upernet(main: Any, model: str) -> Any:
    return main.build_model(arguments(main, "--model", model, "--input_size", "64", "--nb_classes", "5"))


SIZE, BOXES = {"input_size": 64}, {"train_json": "x"}  # flags by which a run is known
NETWORKS = {
    "cae-segmentation": (SIZE, lambda: upernet(cae.main_segmentation, "upernet_cae_nano")),
    "cae-detection": (BOXES, lambda: cae_detectors.mask_rcnn_cae_nano(num_classes=5)),
    "a2mim-segmentation": (SIZE, lambda: upernet(a2mim.main_segmentation, "upernet_vit_nano")),
    "a2mim-detection": (BOXES, a2mim_detectors.mask_rcnn_vit_nano),
    "a2mim-resnet": (BOXES, a2mim_detectors.mask_rcnn_resnet_nano),
    "a2mim-c4": (BOXES, lambda: a2mim_detectors.c4("resnet_nano")),
    "udi-segmentation": (
        {**SIZE, "arch": "vit_nano"},
        lambda: udi_segmentation.semantic_fpn(5, 64, 32, arch="vit_nano", img_size=64),
    ),
    "udi-detection": ({**BOXES, "arch": "vit_nano"}, lambda: udi_detectors.mask_rcnn(5, 64, 64, arch="vit_nano")),
}


@pytest.fixture
def written(request, tmp_path) -> tuple[str, Path, Any]:
    """Method, checkpoint and network, whose weights are no defaults."""
    flags, build = NETWORKS[request.param]
    torch.manual_seed(0)
    network = build().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": network.state_dict(), "args": flags, "epoch": 0}, path)
    return request.param.split("-")[0], path, network


@pytest.mark.parametrize("written", NETWORKS, indirect=True)
@torch.inference_mode()
def test_timm_gives_the_same_features(written):
    method, path, _ = written
    backbone = load_backbone(method, str(path), input_size=64)
    imgs, form = torch.randn(2, 3, 64, 64), timm_form(method, backbone)
    model: Any = timm.create_model(form.architecture, num_classes=0, **form.model_args)
    model.load_state_dict(form.weights)
    features = model.eval().forward_head(model.forward_features(imgs), pre_logits=True)
    assert torch.allclose(features, backbone(imgs), rtol=1e-4, atol=1e-5)
    assert any("dense task" in note for note in form.notes)


@pytest.mark.parametrize("written", [name for name in NETWORKS if "segmentation" in name], indirect=True)
@torch.inference_mode()
def test_features_are_the_last_blocks_patches(written):
    method, path, network = written
    seen: list[Any] = []
    network.backbone.blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    imgs = torch.randn(2, 3, 64, 64)
    network.backbone(imgs)
    patches = seen[0] if method == "udi" else seen[0][:, 1:]
    steps = [lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6), lambda x: x.mean(dim=1)]
    for step in steps if method == "udi" else reversed(steps):  # which is first
        patches = step(patches)
    assert torch.allclose(load_backbone(method, str(path))(imgs), patches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("written", ["cae-segmentation", "udi-detection"], indirect=True)
def test_the_whole_network_as_safetensors(written, tmp_path, capsys):
    method, path, network = written
    out = tmp_path / "whole.safetensors"
    export.main(export.get_args_parser().parse_args([method, str(path), str(out), "--format", "safetensors"]))
    task = "segmentation" if method == "cae" else "detection"
    assert f"{method}/main_{task}.py evaluates it" in capsys.readouterr().out
    stored = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict({name: value + 1 for name, value in stored.items()})
    distributed.load_weights(network, str(out))
    assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())
    assert load_backbone(method, str(out)).embed_dim == load_backbone(method, str(path)).embed_dim


@pytest.mark.parametrize("written", ["udi-segmentation"], indirect=True)
def test_a_vit_without_a_class_token_has_none_to_pool(written):
    with pytest.raises(distributed.UserError, match="--pool token: .* has no class token"):
        load_backbone("udi", str(written[1]), pool="token")
