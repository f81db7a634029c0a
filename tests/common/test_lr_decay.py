"""Layer ids, the no-decay rule and the order of the groups."""

import re

import pytest
from torch import nn

from common.lr_decay import decay_groups, layer_decay_groups, vit_layer_id
from saim.models_vit import VisionTransformer
from tests.support.helpers import golden_files, load_golden


@golden_files("cae", "layer_decay_base", ".json")
def test_layer_ids__cae(path):
    ref = load_golden(path)
    depth = ref["kwargs"]["depth"]
    for name, expected in ref["params"].items():
        scale = ref["layer_decay"] ** (depth + 1 - vit_layer_id(name, depth))
        assert scale == pytest.approx(expected["lr_scale"], rel=1e-12), name


@golden_files("semaim", "layer_decay", ".json")
def test_layer_ids__semaim(path):
    for case, ref in load_golden(path).items():
        decay = float(re.findall(r"\.ld(\d+(?:\.\d+)?)", case)[0])
        depth = 1 + max(int(n.split(".")[1]) for n in ref["param"] if n.startswith("blocks."))
        for name, expected in ref["param"].items():
            scale = decay ** (depth + 1 - vit_layer_id(name, depth))
            assert scale == pytest.approx(expected["lr_scale"], rel=1e-12), name


def model() -> VisionTransformer:
    return VisionTransformer(img_size=8, patch_size=4, num_classes=3, embed_dim=8, depth=3, num_heads=2)


def test_groups_hold_every_trainable_parameter_once():
    net = model()
    net.cls_token.requires_grad_(False)
    trainable = [p for p in net.parameters() if p.requires_grad]
    for groups in (decay_groups(net, 0.1), layer_decay_groups(net, 0.1, 0.5, 3, net.no_weight_decay())):
        grouped = [p for group in groups for p in group["params"]]
        assert sorted(map(id, grouped)) == sorted(map(id, trainable))


def test_scales_shrink_towards_the_input():
    groups = layer_decay_groups(model(), 0.1, 0.5, 3, {"pos_embed", "cls_token"})
    assert sorted({g["lr_scale"] for g in groups}) == [0.0625, 0.125, 0.25, 0.5, 1.0]


def test_biases_and_vectors_are_exempt():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    exempt, decayed = decay_groups(net, 0.3)
    assert [len(exempt["params"]), len(decayed["params"])] == [3, 1]
    assert (exempt["weight_decay"], decayed["weight_decay"]) == (0.0, 0.3)
