"""CAE's segmentation network and its heads against the authors' numbers and those of the heads' library."""

import pytest
import torch
from torch import nn

from cae.engine_segmentation import resized, segmentation_loss
from cae.models_segmentation import MODELS, ConvUnit, FCNHead, UPerHead, upernet
from tests.support.helpers import assert_close, golden_files, load_golden, tolerance


def heads_of(meta: dict) -> dict[str, UPerHead | FCNHead]:
    """The heads that a golden's settings describe, by name."""
    heads = {}
    for name in ("decode_head", "auxiliary_head"):
        settings = meta.get(name)
        if settings is None:
            continue
        kwargs = {key: settings[key] for key in ("in_channels", "channels", "num_classes")}
        kwargs["dropout"] = settings["dropout_ratio"]
        if settings["type"] == "UPerHead":
            heads[name] = UPerHead(**kwargs, pool_scales=settings["pool_scales"])
        else:
            heads[name] = FCNHead(**kwargs, num_convs=settings["num_convs"], concat_input=settings["concat_input"])
    return heads


def inputs_of(settings: dict, maps: list[torch.Tensor]):
    index = settings["in_index"]
    return [maps[i] for i in index] if isinstance(index, list) else maps[index]


@golden_files("cae", "seg_upernet")
def test_network(path):
    ref = load_golden(path)
    network = upernet(**ref.kwargs)
    network.load_state_dict(ref.weights)
    network.eval()
    assert network.auxiliary_head is not None
    maps = network.backbone(ref["in/x"])
    ref.check("out/decode_logits", network.decode_head(maps), **tolerance(ref), what="decode head")
    auxiliary = network.auxiliary_head(maps[network.auxiliary_index])
    ref.check("out/aux_logits", auxiliary, **tolerance(ref), what="auxiliary head")
    (logits,) = network(ref["in/x"])
    ref.check("out/decode_logits", logits, **tolerance(ref))


@golden_files("cae", "seg_loss")
def test_heads(path):
    """Losses and gradients with the batch's statistics, then logits with the running ones."""
    ref = load_golden(path)
    tol = tolerance(ref)
    maps = [ref[f"in/feat{i}"].requires_grad_() for i in range(len(ref.group("in")) - 1)]
    heads = heads_of(ref.meta)
    modules = nn.ModuleDict(heads)
    modules.load_state_dict(ref.weights)
    weights = {name: ref.meta[name]["loss_decode"]["loss_weight"] for name in heads}
    assert weights["decode_head"] == 1
    outputs = [head(inputs_of(ref.meta[name], maps)) for name, head in heads.items()]
    losses = segmentation_loss(outputs, ref["in/labels"], weights.get("auxiliary_head", 0))
    ref.check("out/loss/total", losses["loss"], **tol)
    ref.check("out/loss/decode.loss_ce", losses["loss_decode"], **tol)
    ref.check("out/loss/decode.acc_seg", losses["pixel_acc"], **tol)
    if len(outputs) > 1:
        auxiliary = weights["auxiliary_head"] * losses["loss_auxiliary"]
        ref.check("out/loss/aux.loss_ce", auxiliary, **tol)
        ref.check("out/loss/aux.acc_seg", segmentation_loss(outputs[1:], ref["in/labels"])["pixel_acc"], **tol)
    losses["loss"].backward()
    for name, gradient in ref.group("out/grad").items():
        assert_close(modules.get_parameter(name).grad, gradient, **tol, what=name)
    for i, x in enumerate(maps):
        ref.check(f"out/grad_feat{i}", x.grad, **tol, what=f"map {i}")
    modules.load_state_dict(ref.weights)
    modules.eval()
    outputs = [head(inputs_of(ref.meta[name], maps)) for name, head in heads.items()]
    for name, logits in zip(("out/logits", "out/aux_logits"), outputs, strict=False):
        ref.check(name, logits, **tol)
    ref.check("out/logits_full", resized(outputs[0], ref["in/labels"].shape[1:]), **tol)


@pytest.mark.parametrize(
    ("name", "parameters", "parts"),
    [
        ("upernet_cae_base", 163_868_012, (94_095_936, 67_963_542, 1_808_534)),
        ("upernet_cae_large", 441_448_236, None),
    ],
)
def test_parameters_of_the_published_sizes(name, parameters, parts):
    with torch.device("meta"):
        network = MODELS[name]()
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in network.named_children()}
    assert sum(counts.values()) == parameters
    if parts:
        assert tuple(counts.values()) == parts


def test_initial_weights():
    torch.manual_seed(0)
    network = upernet(7, 64, 32, img_size=32, embed_dim=16, depth=4, num_heads=2, out_indices=(0, 1, 2, 3))
    for module in network.modules():
        if isinstance(module, ConvUnit):
            weight = module.conv.weight
            fan_out = weight.shape[0] * weight[0, 0].numel()
            assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    for head in ("decode_head", "auxiliary_head"):
        assert network.get_parameter(f"{head}.conv_seg.weight").std().item() == pytest.approx(0.01, rel=0.2)
        assert not network.get_parameter(f"{head}.conv_seg.bias").any()
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout2d)] == [0.1, 0.1]


def test_training_mode_adds_the_auxiliary_logits():
    network = upernet(5, 8, 6, img_size=64, embed_dim=16, depth=4, num_heads=2, out_indices=(0, 1, 2, 3))
    imgs = torch.rand(2, 3, 64, 64)
    assert [tuple(x.shape) for x in network.train()(imgs)] == [(2, 5, 16, 16), (2, 5, 4, 4)]
    assert [tuple(x.shape) for x in network.eval()(imgs)] == [(2, 5, 16, 16)]
