"""The ViT of CAE's dense tasks against the authors' numbers, its positions, and the loading of encoders from files."""

import pytest
import torch
import torch.nn.functional as F

from cae.blocks import DropPath, sincos_pos_embed
from cae.dense_backbone import DenseBackbone, detection_backbone, load_backbone, segmentation_backbone
from cae.models_cae import ContextAutoencoderViT
from cae.models_vit import VisionTransformer, interpolate_pos_embed, resize_relative_positions
from common.distributed import UserError
from tests.support.helpers import golden_files, load_golden, tolerance

TINY = {"embed_dim": 16, "num_heads": 2, "depth": 4, "out_indices": (0, 1, 2, 3)}


@golden_files("cae", "det_backbone")
def test_detection_backbone(path):
    ref = load_golden(path)
    tol = tolerance(ref)
    backbone = detection_backbone(**ref.kwargs).eval()
    ref.check("out/constructor_sincos", backbone.pos_embed, **tol, what="analytic positions")
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in ref.weights.items()})
    ref.check("out/tokens0", backbone.embed(ref["in/x"]), **tol, what="tokens")
    maps = backbone(ref["in/x"])
    assert len(maps) >= sum(name.startswith("out/feat") for name in ref.arrays)
    for i, x in enumerate(maps):
        ref.check(f"out/feat{i}", x, **tol, what=f"map {i}")


@golden_files("cae", "seg_upernet")
def test_segmentation_backbone(path):
    ref = load_golden(path)
    kwargs = {k: v for k, v in ref.kwargs.items() if k not in ("uper_channels", "num_classes", "aux_channels")}
    backbone = segmentation_backbone(**kwargs).eval()
    weights = {k.removeprefix("backbone."): v for k, v in ref.weights.items() if k.startswith("backbone.")}
    backbone.load_state_dict(weights)
    for i, x in enumerate(backbone(ref["in/x"])):
        ref.check(f"out/feat{i}", x, **tolerance(ref), what=f"map {i}")


def test_parameters_of_the_published_sizes():
    with torch.device("meta"):
        base = segmentation_backbone(embed_dim=768, depth=12, num_heads=12)
        detection = detection_backbone(embed_dim=768, depth=12, num_heads=12)
    assert sum(p.numel() for p in base.parameters()) == 94_095_936
    assert sum(p.numel() for p in detection.parameters()) == 94_930_944
    frozen = [name for name, p in base.named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed"]
    dropped = DenseBackbone(32, **TINY, drop_path_rate=0.3)
    rates = [module.drop_prob for module in dropped.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_stored_positions_are_used_as_they_are_at_their_own_size():
    backbone = detection_backbone((32, 48), **TINY)
    assert backbone.positions(2, 3) is backbone.pos_embed
    patches = backbone.pos_embed[:, 1:].reshape(1, 2, 3, 16).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, scale_factor=(4.1 / 2, 5.1 / 3), mode="bicubic")  # 4 x 5 patches
    assert torch.equal(backbone.positions(4, 5)[:, 1:], resized.flatten(2).transpose(1, 2))


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    backbone = segmentation_backbone(64, **TINY, drop_path_rate=0.5)
    imgs, gradients = torch.randn(3, 3, 64, 64), []
    for backbone.use_checkpoint in (False, True):
        torch.manual_seed(1)
        backbone.zero_grad()
        torch.stack([x.square().mean() for x in backbone(imgs)]).sum().backward()
        gradients.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(backbone.parameters())) - 1
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_load_backbone__pre_training(tmp_path, key, capsys):
    """The encoder alone is taken, its positions resized; relative positions start at zero."""
    pretrained = ContextAutoencoderViT(
        img_size=64, embed_dim=16, depth=4, num_heads=2, init_values=0.1, decoder_embed_dim=16, decoder_num_heads=2
    )
    path = tmp_path / "file.pth"
    torch.save({key: pretrained.state_dict()}, path)
    backbone = segmentation_backbone(128, **TINY)
    load_backbone(backbone, str(path))
    encoder = pretrained.encoder.state_dict()
    own = backbone.state_dict()
    for name in ("cls_token", "patch_embed.proj.weight", "blocks.3.mlp.fc2.weight", "blocks.0.gamma_1"):
        assert torch.equal(own[name], encoder[name])
    assert torch.equal(own["pos_embed"], interpolate_pos_embed(encoder["pos_embed"], 8))
    assert not torch.allclose(own["pos_embed"], sincos_pos_embed(16, (8, 8)), atol=0.1)
    assert not own["blocks.2.attn.relative_position_bias_table"].any()
    printed = capsys.readouterr().out
    assert "missing: blocks (4), fpn1 (8), fpn2 (2); unexpected: norm (2)" in printed


def test_load_backbone__keys_come_in_order(tmp_path):
    states = [segmentation_backbone(64, **TINY).state_dict() for _ in range(3)]
    torch.save({"module": states[2], "model": states[1], "state_dict": states[0]}, tmp_path / "file.pth")
    backbone = segmentation_backbone(64, **TINY)
    load_backbone(backbone, str(tmp_path / "file.pth"))
    assert torch.equal(backbone.state_dict()["cls_token"], states[0]["cls_token"])


def test_load_backbone__fine_tuned_and_dense_files(tmp_path):
    """Relative tables and positions are resized to the new grid; a dense task's file gives its backbone."""
    tuned = VisionTransformer(img_size=64, embed_dim=16, depth=4, num_heads=2, init_values=0.1, use_rel_pos_bias=True)
    table = "blocks.1.attn.relative_position_bias_table"
    torch.nn.init.normal_(tuned.get_parameter(table))
    path = str(tmp_path / "file.pth")
    torch.save({"model": tuned.state_dict()}, path)
    backbone = segmentation_backbone(128, **TINY)
    load_backbone(backbone, path)
    assert torch.equal(backbone.state_dict()[table], resize_relative_positions(tuned.state_dict()[table], 8))
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"state_dict": {**state, "decode_head.conv_seg.bias": torch.zeros(3)}}, path)
    again = segmentation_backbone(128, **TINY)
    load_backbone(again, path)
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in again.state_dict().items())


def test_load_backbone__detection_resizes_positions_by_size(tmp_path):
    state = segmentation_backbone(64, **TINY).state_dict()
    del state["blocks.0.attn.relative_position_index"]
    torch.save({"model": state}, tmp_path / "file.pth")
    backbone = detection_backbone((96, 128), **TINY)
    load_backbone(backbone, str(tmp_path / "file.pth"))
    assert torch.equal(backbone.pos_embed, interpolate_pos_embed(state["pos_embed"], (6, 8)))
    torch.save({"model": detection_backbone((96, 128), **TINY).state_dict()}, tmp_path / "other.pth")
    load_backbone(backbone, str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="48 positions, expected those of a square grid"):
        load_backbone(segmentation_backbone(64, **TINY), str(tmp_path / "other.pth"))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="images are 64x32, the model was built for 64x64"):
        segmentation_backbone(64, **TINY)(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match="64x72: relative positions need a square of whole patches"):
        DenseBackbone((64, 72), **TINY)
    with pytest.raises(ValueError, match="expected four of the 4 blocks"):
        DenseBackbone(64, **{**TINY, "out_indices": (0, 1, 2, 4)})
