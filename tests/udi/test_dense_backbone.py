"""The ViT as a backbone: the authors' maps, which weights of which file it takes, and positions of any size."""

from typing import Any

import pytest
import torch

from common.distributed import UserError
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.udi_weights import pretrained
from udi.backbone import load_backbone, mmseg_name, plain_name
from udi.dense_backbone import (
    SegmentationViT,
    ViTDeiT,
    build_detection_backbone,
    build_segmentation_backbone,
    load_patches,
    resize,
)

TINY: dict[str, Any] = {"embed_dim": 12, "depth": 4, "num_heads": 3, "out_indices": (0, 1, 2, 3)}


@golden_files("udi", "detection_backbone")
def test_detection_maps(path):
    ref = load_golden(path)
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "out_indices")
    model = ViTDeiT(**{name: ref.meta[name] for name in names}).eval()
    model.load_state_dict(ref.weights)
    with torch.no_grad():
        maps = model(ref["in/x"])
    assert len(maps) >= len(ref.group("out"))
    for i, found in enumerate(maps):
        ref.check(f"out/{i}", found, **ref.meta["tolerance"])


@pytest.mark.parametrize(("patch", "strides"), [(8, (4, 8, 16, 32)), (16, (4, 8, 16, 32))])
def test_pyramid_has_the_strides_of_any_patch(patch, strides):
    model = ViTDeiT(64, patch, **TINY)
    maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(found.shape[-2:]) for found in maps] == [(64 // s, 96 // s) for s in strides]
    assert ("fpn1.1.weight" in model.state_dict()) == (patch == 16)


def test_mistaken_networks():
    with pytest.raises(ValueError, match="patches of 32 pixels: expected 4 maps, 8 or 16 pixels"):
        ViTDeiT(64, 32, **TINY)
    with pytest.raises(ValueError, match="expected numbers from 0 to 3"):
        SegmentationViT(64, 16, **{**TINY, "out_indices": (2, 5, 8, 11)})


def test_stored_positions_are_for_square_images():
    """Of equal sides in pixels, as in the authors' program, not of equal sides in patches."""
    model = ViTDeiT(64, 16, **TINY)
    assert model.positions(64, 64) is model.pos_embed
    assert not model.positions(64, 79).equal(model.pos_embed)


def test_segmentation_pads_and_resizes():
    model = SegmentationViT(64, 16, **TINY).eval()
    assert model.positions(49, 64) is model.pos_embed, "4 x 4 patches, the last ones incomplete"
    assert model.positions(32, 128) is model.pos_embed, "as many patches"
    assert model.positions(64, 96).equal(resize(model.pos_embed, (4, 6)))
    x = torch.randn(2, 3, 50, 90)
    padded = torch.zeros(2, 3, 64, 96)
    padded[..., :50, :90] = x
    with torch.no_grad():
        maps, expected = model(x), model(padded)
    assert all(a.equal(b) for a, b in zip(maps, expected, strict=True))
    assert [tuple(found.shape) for found in maps] == [(2, 12, 4, 6)] * 4


def test_names_are_mmsegmentations():
    model = SegmentationViT(64, 16, **TINY)
    names = list(model.state_dict())
    assert names[:3] == ["pos_embed", "patch_embed.projection.weight", "patch_embed.projection.bias"]
    block = ["ln1", "attn.attn.in_proj_", "attn.attn.out_proj", "ln2", "ffn.layers.0.0", "ffn.layers.1"]
    expected = [f"layers.0.{part}{'' if part[-1] == '_' else '.'}{end}" for part in block for end in ("weight", "bias")]
    assert names[3:15] == expected
    assert [plain_name(name) for name in names] == [name for name, _ in model.named_parameters()]
    assert all(mmseg_name(plain_name(name)) == name for name in [*names, "ln1.weight"])
    outer = torch.nn.ModuleDict({"backbone": model})
    other = torch.nn.ModuleDict({"backbone": SegmentationViT(64, 16, **TINY)})
    other.load_state_dict(outer.state_dict())
    assert all(a.equal(b) for a, b in zip(outer.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.mark.parametrize("layout", ["pre-training", "mmsegmentation", "detection"])
def test_weights_of_any_file(layout, checkpoint, tmp_path, capsys):
    """Class tokens, whose number differs, and their positions are left out; student and teacher are told apart."""
    vit = load_backbone(checkpoint)
    file = str(tmp_path / "other.pth")
    if layout == "pre-training":
        file = checkpoint
    elif layout == "mmsegmentation":
        torch.save({"state_dict": {f"backbone.{mmseg_name(name)}": value for name, value in vit.items()}}, file)
    else:
        left_out = ("cls_token", "norm.weight", "norm.bias")
        kept = {f"backbone.{name}": value for name, value in vit.items() if name not in left_out}
        kept["backbone.pos_embed"] = vit["pos_embed"][:, 2:]
        torch.save({"state_dict": kept | {"neck.lateral_convs.0.conv.weight": torch.zeros(1)}}, file)
    weights = load_patches(file)
    assert weights["pos_embed"].equal(vit["pos_embed"][:, 2:])
    assert not {"cls_token", "norm.weight"} & set(weights)
    detector: Any = build_detection_backbone("vit_nano", 16, weights)
    assert detector.patch_size == 8
    assert detector.blocks[1].mlp.fc1.weight.equal(vit["blocks.1.mlp.fc1.weight"])
    segmenter: Any = build_segmentation_backbone("vit_nano", 8, weights, 64)
    assert segmenter.blocks[3].attn.qkv.bias.equal(vit["blocks.3.attn.qkv.bias"])
    assert_close(segmenter.pos_embed, resize(vit["pos_embed"][:, 2:], (8, 8)), rtol=0, atol=0)
    said = capsys.readouterr().out
    assert "the checkpoint has patches of 8 pixels" in said
    assert "backbone: 51 tensors matched; missing: fpn1 (2); unexpected: none" in said


def test_mistaken_weights(checkpoint, tmp_path):
    weights = load_patches(checkpoint)
    with pytest.raises(UserError, match="--arch vit_tiny: "):
        build_detection_backbone("vit_tiny", 8, weights)
    with pytest.raises(UserError, match="another ViT: 1 names differ, first blocks.0.gamma_1"):
        build_segmentation_backbone("vit_nano", 8, weights | {"blocks.0.gamma_1": torch.ones(96)})
    with pytest.raises(UserError, match="--arch vit_huge: expected one of vit_tiny"):
        build_segmentation_backbone("vit_huge")
    torch.save({"model": {"pos_embed": torch.zeros(1, 5, 3)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no ViT under 'teacher': patch_embed is missing"):
        load_patches(str(tmp_path / "other.pth"))
    odd = {"pos_embed": torch.zeros(1, 5, 3), "patch_embed.proj.weight": torch.zeros(1), "blocks.0.x": torch.zeros(1)}
    torch.save({"model": odd}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="5 positions of patches are no square"):
        load_patches(str(tmp_path / "other.pth"))
