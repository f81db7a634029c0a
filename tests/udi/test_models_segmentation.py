"""Semantic FPN: loss, gradients and logits of the heads' library, the sizes, fresh weights."""

import pytest
import torch
from torch import nn

from tests.support.helpers import assert_gradients, golden_files, load_golden, tolerance
from udi.detection_heads import FPN
from udi.engine_segmentation import resized, segmentation_loss
from udi.models_segmentation import FPNHead, semantic_fpn


@golden_files("udi", "seg_loss")
def test_heads(path):
    ref = load_golden(path)
    neck, head = ref.meta["neck"], ref.meta["decode_head"]
    assert head["in_index"] == list(range(neck["num_outs"]))
    sizes = (head["channels"], head["num_classes"], head["feature_strides"], head["dropout_ratio"])
    parts = {
        "neck": FPN(neck["in_channels"], neck["out_channels"], neck["num_outs"]),
        "decode_head": FPNHead(head["in_channels"], *sizes),
    }
    heads = nn.ModuleDict(parts)
    heads.load_state_dict(ref.weights)
    maps = [ref[f"in/feat{i}"].requires_grad_() for i in range(len(neck["in_channels"]))]
    losses = segmentation_loss([parts["decode_head"](parts["neck"](maps))], ref["in/labels"])
    ref.check("out/loss/total", losses["loss"], **tolerance(ref))
    ref.check("out/loss/decode.loss_ce", losses["loss_decode"], **tolerance(ref))
    ref.check("out/loss/decode.acc_seg", losses["pixel_acc"], **tolerance(ref))
    losses["loss"].backward()
    assert_gradients(heads, ref.group("out/grad"))
    for i, x in enumerate(maps):
        assert x.grad is not None
        ref.check(f"out/grad_feat{i}", x.grad, rtol=1e-4, atol=1e-4 * float(x.grad.abs().max()))
    heads.load_state_dict(ref.weights)
    heads.eval()
    with torch.no_grad():
        logits = parts["decode_head"](parts["neck"](maps))
    ref.check("out/logits", logits, **tolerance(ref))
    ref.check("out/logits_full", resized(logits, ref["in/labels"].shape[1:]), **tolerance(ref))


def test_sizes_of_the_authors_configuration():
    with torch.device("meta"):
        network = semantic_fpn()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    backbone = 12 * (12 * 384**2 + 13 * 384) + 16 * 16 * 3 * 384 + 384 + 32 * 32 * 384
    neck = 4 * (384 * 256 + 256 + 9 * 256 * 256 + 256)
    head = 4 * 9 * 256 * 128 + 3 * 9 * 128 * 128 + 7 * 2 * 128 + 150 * 129
    assert counts == {"backbone": backbone, "neck": neck, "decode_head": head}
    assert network.backbone.out_indices == (2, 5, 8, 11)
    rates = [block.drop_path.rate for block in network.backbone.blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert network.decode_head.dropout.p == 0.1  # type: ignore[union-attr]


def test_fresh_weights():
    torch.manual_seed(0)
    network = semantic_fpn(7, 64, 32, arch="vit_nano", patch_size=8, img_size=32)
    for name, p in network.named_parameters():
        if name.startswith("neck") or name.endswith("conv_seg.bias"):
            bound = (6 / (p.shape[0] + p.shape[1]) / p[0, 0].numel()) ** 0.5 if p.ndim > 1 else 0
            assert p.abs().max().item() == pytest.approx(bound, rel=0.02)
        elif name.startswith("decode_head") and p.ndim > 1:
            std = 0.01 if "conv_seg" in name else (2 / (p.shape[0] * p[0, 0].numel())) ** 0.5
            assert p.std().item() == pytest.approx(std, rel=0.1)


def test_logits_have_the_backbones_resolution():
    network = semantic_fpn(3, 16, 16, arch="vit_nano", patch_size=8, img_size=32)
    (logits,) = network(torch.randn(2, 3, 20, 33))
    assert logits.shape == (2, 3, 3, 5)
    assert network.auxiliary_head is None
    names = set(network.state_dict())
    assert {"backbone.layers.3.ffn.layers.1.bias", "neck.fpn_convs.3.conv.bias"} <= names
    assert {f"decode_head.scale_heads.3.{i}.conv.weight" for i in (0, 2, 4)} <= names
