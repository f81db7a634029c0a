"""A2MIM's encoders for dense tasks against timm's networks, and the files that they are loaded from."""

from typing import Any

import pytest
import torch
from torch import nn

from a2mim.backbones import BACKBONES
from a2mim.dense_backbone import (
    DenseResNet,
    DenseViT,
    Pyramid,
    load_backbone,
    relative_index,
    resize_pos_embed,
    resize_relative_positions,
)
from a2mim.losses import MIMLoss
from a2mim.models_a2mim import MaskedImageModel
from a2mim.openmixup import extract_encoder, load_encoder_weights, to_openmixup_state_dict
from common.distributed import UserError
from tests.support.a2mim_networks import randomised
from tests.support.helpers import assert_close

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_maps_are_those_of_timms_vit():
    net = randomised(BACKBONES["vit_nano"](img_size=32, patch_size=8)).eval()
    dense = DenseViT("vit_nano", 32, (1, 3), use_abs_pos_emb=True, final_norm=True, patch_size=8).eval()
    dense.load_state_dict(
        {k: v for k, v in net.state_dict().items() if not k.startswith("patch_embed")}
        | {"patch_embed.weight": net.patch_embed.proj.weight, "patch_embed.bias": net.patch_embed.proj.bias}
    )
    first, last = dense(IMAGES)
    tokens = net.pos_drop(torch.cat([net.cls_token.expand(2, -1, -1), net.patch_embed(IMAGES)], 1) + net.pos_embed)
    for i, block in enumerate(net.blocks):
        tokens = block(tokens)
        if i == 1:
            assert_close(first, tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), 1e-5, 1e-5)
    assert_close(last, net.norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), 1e-5, 1e-5)
    dense.train()
    dense.use_checkpoint = True
    again = dense(IMAGES)
    again[1].sum().backward()
    assert torch.equal(again[1], last) and dense.blocks[0].attn.relative_position_bias_table.grad is not None


def test_smaller_images_take_a_part_of_the_relative_positions():
    """Pairs of patches at a distance meet the same bias in any grid."""
    large, small = relative_index((3, 5), 6, torch.device("cpu")), relative_index((2, 4), 6, torch.device("cpu"))
    assert large.shape == (16, 16) and large[0].unique().tolist() == [121, 123] and large[5, 0] == 122
    kept = [1 + 5 * y + x for y in range(2) for x in range(4)]
    assert torch.equal(small[1:, 1:], large[kept][:, kept])
    dense = randomised(DenseViT("vit_nano", 32, patch_size=8, use_abs_pos_emb=True)).eval()
    assert [tuple(m.shape) for m in dense(IMAGES[..., :17])] == [(2, 96, 4, 2)] * 4
    with pytest.raises(ValueError, match="images are 32x40, the model was built for at most 32x32"):
        dense(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match="expected some of the 4 blocks, rising"):
        DenseViT("vit_nano", 32, (1, 4), patch_size=8)


def test_pyramid():
    maps = Pyramid(8)([torch.zeros(2, 8, 4, 6)] * 4)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    names = {name.rsplit(".", 1)[0] for name in Pyramid(8).state_dict()}
    assert names == {"upsample_4x.0", "upsample_4x.1", "upsample_4x.3", "upsample_2x.0"}


def test_maps_are_those_of_timms_resnet():
    net = randomised(BACKBONES["resnet_nano"]()).eval()
    dense = DenseResNet("resnet_nano").eval()
    dense.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("fc.")})
    maps = dense(IMAGES)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8), (2, 32, 4, 4), (2, 64, 2, 2), (2, 128, 1, 1)]
    assert dense.channels == [16, 32, 64, 128]
    assert_close(maps[-1], net.forward_features(IMAGES), 1e-5, 1e-6)
    assert [name for name, _ in DenseResNet("resnet_nano", stages=3).named_children()][-1] == "layer3"
    dilated = DenseResNet("resnet50", output_stride=8)
    convs: list[Any] = [block.conv2 for stage in (dilated.layer3, dilated.layer4) for block in stage]  # type: ignore[union-attr]
    assert [c.dilation[0] for c in convs] == [1, *[2] * 5, 2, 4, 4] and {c.stride[0] for c in convs} == {1}
    assert sum(p.numel() for p in dilated.parameters()) == 23_508_032


@pytest.mark.parametrize("form", ["pre-training", "extracted", "timm"])
def test_loading_resizes_both_kinds_of_positions(tmp_path, capsys, form):
    model = MaskedImageModel(randomised(BACKBONES["vit_nano"](img_size=32, patch_size=8)), MIMLoss())
    randomised(model)
    state: dict[str, Any] = {"state_dict": to_openmixup_state_dict(model)}
    if form == "extracted":
        state = {"state_dict": extract_encoder(state)}
    elif form == "timm":
        state = {"model": model.encoder.state_dict()}
    torch.save(state, tmp_path / "file.pth")
    dense = DenseViT("vit_nano", 48, patch_size=8, use_abs_pos_emb=True)
    load_backbone(dense, str(tmp_path / "file.pth"))
    assert "missing: none" in capsys.readouterr().out
    own, table = dense.state_dict(), model.encoder.blocks[1].attn.relative_position_bias_table.detach()
    assert torch.equal(own["layers.1.attn.relative_position_bias_table"], resize_relative_positions(table, 6))
    assert torch.equal(own["pos_embed"], resize_pos_embed(model.encoder.pos_embed, (6, 6)))
    assert torch.equal(own["layers.2.ffn.layers.1.bias"], model.encoder.blocks[2].mlp.fc2.bias)
    without = DenseViT("vit_nano", 32, patch_size=8)
    load_backbone(without, str(tmp_path / "file.pth"))
    assert without.pos_embed is None and "unexpected" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"\d+ tensors do not fit, patch_embed.projection.weight is \("):
        load_backbone(DenseViT("vit_nano", 32, patch_size=4), str(tmp_path / "file.pth"))
    with pytest.raises(UserError, match=r"is not this encoder: \d+ of its \d+ .* conv1.weight is missing"):
        load_backbone(DenseResNet("resnet_nano"), str(tmp_path / "file.pth"))


def test_names_are_openmixups():
    """What a dense task's file holds of the encoder is what pre-training's holds, and reads back."""
    dense = DenseViT("vit_nano", 32, patch_size=8, use_abs_pos_emb=True, final_norm=True)
    model = MaskedImageModel(BACKBONES["vit_nano"](img_size=32, patch_size=8), MIMLoss())
    official = {k.removeprefix("backbone.") for k in to_openmixup_state_dict(model) if k.startswith("backbone.")}
    assert set(dense.state_dict()) == {k for k in official if "index" not in k and k != "mask_token"}
    whole = nn.ModuleDict({"backbone": randomised(dense)})
    state = whole.state_dict()
    assert all(k.startswith("backbone.") for k in state)
    loaded, others = load_encoder_weights(model, {k.removeprefix("backbone."): v for k, v in state.items()}, "file")
    assert len(loaded) == len(state) and not others
    joint = {k: v for k, v in state.items() if not k.endswith(("q_bias", "v_bias"))}
    for i in range(4):  # as mmseg's ViT of MAE
        q, v = (state[f"backbone.layers.{i}.attn.{x}_bias"] for x in "qv")
        joint[f"backbone.layers.{i}.attn.qkv.bias"] = torch.cat([q, torch.ones_like(q), v])
        joint[f"backbone.layers.{i}.attn.relative_position_index"] = torch.zeros(2)
    fresh = nn.ModuleDict({"backbone": DenseViT("vit_nano", 32, patch_size=8, use_abs_pos_emb=True, final_norm=True)})
    fresh.load_state_dict(joint)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
