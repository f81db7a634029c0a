"""Names, shapes and sizes of the networks of full size, and initial weights."""

import argparse
import ast
import math
import re
from typing import Any

import pytest
import timm
import torch
from timm.layers.norm import LayerNorm, LayerNorm2d
from timm.models.beit import Beit
from torch import nn

from a2mim import config, main_finetune, main_pretrain
from a2mim.backbones import BACKBONES, is_vit
from a2mim.losses import MIMLoss
from a2mim.models_a2mim import (
    build_from_openmixup,
    build_masked,
)
from a2mim.openmixup import (
    official_names,
    to_openmixup_state_dict,
)
from tests.support.a2mim_networks import (
    CONFIGS,
    NANO,
    assert_constant,
    assert_normal,
    assert_uniform,
    classifier,
    full_classifier,
    full_encoder,
    masked,
    on_meta,
    seeded,
    shapes,
)
from tests.support.helpers import golden_files, load_golden

# ---- goldens: names, shapes and numbers of parameters, networks of full size


def flags_of(name: str) -> tuple[Any, argparse.Namespace]:
    """The main and the flags of a configuration of ours."""
    main = main_pretrain if name.startswith("pretrain/") else main_finetune
    return main, config.parse_args(main.get_args_parser(), [str(CONFIGS / f"{name}.py")])


def count(model: Any, prefix: str = "") -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefix))


@golden_files("a2mim", "manifest", ".json")
def test_encoders_have_upstreams_keys(path):
    backbones = load_golden(path)["backbones"]
    assert backbones
    for name, expected in backbones.items():
        state = to_openmixup_state_dict(full_encoder(name))
        state = {k: v for k, v in state.items() if k.startswith("backbone.")}
        assert shapes({k.removeprefix("backbone."): v for k, v in state.items()}) == expected, name


@golden_files("a2mim", "manifest", ".json")
def test_pretraining_configurations_have_upstreams_keys_and_sizes(path):
    ref = load_golden(path)
    assert ref["presets"]
    for name, preset in ref["presets"].items():
        main, args = flags_of(name)
        model = on_meta(lambda main=main, args=args: main.build_model(args))
        state = to_openmixup_state_dict(model)
        assert args.backbone == preset["backbone"], name
        assert list(state)[: len(preset["first_keys"])] == preset["first_keys"], name
        encoder = [[f"backbone.{key}", shape] for key, shape in ref["backbones"][preset["backbone"]]]
        found = shapes(state)
        assert [row for row in found if row in encoder] == encoder, name
        assert [row for row in found if row not in encoder] == preset["other_keys"], name
        assert count(model) == preset["params_total"], name
        assert count(model, "encoder.") == preset["params_backbone"], name
        assert count(model, "decoder.") == preset["params_neck"], name
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == preset["trainable"], name


@golden_files("a2mim", "manifest", ".json")
def test_classifiers_have_upstreams_keys_and_sizes(path):
    ref = load_golden(path)
    assert ref["finetune"]
    for name, preset in ref["finetune"].items():
        main, args = flags_of(name)
        state = to_openmixup_state_dict(model := on_meta(lambda main=main, args=args: main.build_model(args)))
        assert args.backbone == preset["backbone"], name
        head = {k: v for k, v in state.items() if not k.startswith("backbone.")}
        assert shapes(head) == preset["head"], name
        own = {k.removeprefix("backbone."): v for k, v in state.items() if k not in head}
        pretrained = [key for key, _ in ref["backbones"][preset["backbone"]]]
        missing = {k: v for k, v in own.items() if k not in pretrained}
        assert shapes(missing) == preset["missing_in_pretrained"], name
        assert [key for key in pretrained if key not in own] == preset["unused_from_pretrained"], name
        assert count(model) == preset["params_total"], name


@pytest.mark.slow  # 96 networks
@golden_files("a2mim", "configs", ".json")
def test_constructors_are_the_configurations(path):
    """Upstream's nested dicts of full size build what our flags build."""
    cases = load_golden(path)["configs"]
    assert cases
    for name, case in cases.items():
        main, args = flags_of(name.removeprefix("configs/openmixup/").removesuffix(".py"))
        own = on_meta(lambda main=main, args=args: main.build_model(args))
        constructor = {"type": case["method"], **{k: case[k] for k in ("backbone", "neck", "head") if k in case}}
        model = on_meta(lambda constructor=constructor: build_from_openmixup(constructor))
        assert shapes(to_openmixup_state_dict(model)) == shapes(to_openmixup_state_dict(own)), name
        facts = ("mask_layer", "mask_mode", "mask_replace", "mask_detach", "residual", "method", "stride")
        for fact in facts if "neck" in case else ():
            assert getattr(model, fact) == getattr(own, fact), f"{name} {fact}"
        if "neck" in case:
            found, expected = vars(model.loss), vars(own.loss)
            names = ("unmask_weight", "fft_weight", "fft_focal", "fft_unmask_weight", "fft_unmask_replace")
            assert found["pixel"]["mode"] == expected["pixel"]["mode"], name
            live = names if expected["fft_weight"] else names[:2]
            assert {k: found[k] for k in live} == {k: expected[k] for k in live}, name
        rates = [[m.drop_prob for m in net.modules() if hasattr(m, "drop_prob")] for net in (model, own)]
        assert rates[0] == rates[1], name


@golden_files("a2mim", "keymap", ".json")
def test_names_are_mapped_to_timms(path):
    ref = load_golden(path)
    assert ref["pairs"]
    for backbone, pairs in ref["pairs"].items():
        model = full_classifier(backbone)
        found = {k.removeprefix("backbone."): v.removeprefix("net.") for k, v in official_names(model).items()}
        assert {k: found[k] for k in pairs} == pairs, backbone
        added = ref["verified"][backbone]["timm_keys_not_from_backbone"]
        assert sorted(set(found.values()) - set(pairs.values())) == sorted(added), backbone


@golden_files("a2mim", "keymap", ".json")
def test_networks_are_timms(path):
    ref = load_golden(path)
    assert ref["timm_constructors"]
    for backbone, text in ref["timm_constructors"].items():
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        constructor: Any = {"Beit": Beit, "create_model": timm.create_model}[call.func.id]
        words = [ast.literal_eval(node) for node in call.args]
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        official = on_meta(lambda c=constructor, w=words, o=options: c(*w, **o))
        model = full_classifier(backbone)
        state = model.net.state_dict()
        assert shapes(state) == shapes(official.state_dict()), backbone
        facts = ref["verified"][backbone]
        assert len(state) - len(facts["timm_keys_not_from_backbone"]) == facts["mapped"], backbone
        assert count(model) == facts["params"], backbone


# ---- sizes of the authors' networks

SIZES = {
    "vit_small": (48_056_832, 590_592, 48_825_832),
    "vit_base": (85_913_280, 590_592, 86_682_280),
    "vit_large": (303_607_296, 787_200, 304_632_296),
    "resnet50": (23_508_032, 6_294_528, 25_557_032),
    "resnet101": (42_500_160, 6_294_528, 44_549_160),
    "resnet152": (58_143_808, 6_294_528, 60_192_808),
    "resnet200": (62_624_832, 6_294_528, 64_673_832),
    "convnext_tiny": (27_820_128, 2_362_368, 28_589_128),
    "convnext_small": (49_454_688, 2_362_368, 50_223_688),
    "convnext_base": (87_566_464, 3_148_800, 88_591_464),
}


@pytest.mark.parametrize("name", SIZES)
def test_numbers_of_parameters(name):
    model = full_encoder(name)
    assert (count(model, "encoder."), count(model, "decoder."), count(full_classifier(name))) == SIZES[name]


@pytest.mark.parametrize("name", ["vit_small", "vit_large"])
def test_vit_is_beits_with_both_positions(name):
    net = on_meta(lambda: BACKBONES[name](num_classes=0, drop_path_rate=0.1))
    heads = {"vit_small": 8, "vit_large": 16}[name]
    assert net.pos_embed.shape == (1, 197, net.embed_dim)
    for block in net.blocks:
        assert block.attn.relative_position_bias_table.shape == (27**2 + 3, heads)
        assert block.attn.qkv.bias is None
        assert block.norm1.eps == 1e-6
        assert block.attn.scale == (net.embed_dim // heads) ** -0.5
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]
    assert rates == pytest.approx([0.1 * i / (len(rates) - 1) for i in range(len(rates))])


# ---- initial weights


NORMS = (nn.LayerNorm, nn.BatchNorm2d, LayerNorm, LayerNorm2d)


def assert_norms(model: nn.Module, zero: set[str]) -> None:
    found = {name: m for name, m in model.named_modules() if isinstance(m, NORMS)}
    assert found
    for name, norm in found.items():
        assert_constant(norm.weight, 0.0 if name in zero else 1.0, name)
        assert_constant(norm.bias, 0.0, name)


@pytest.mark.parametrize("method", ["a2mim", "simmim"])
def test_initial_weights__vit(method):
    model = masked("vit_tiny", method=method, mask_init=1e-6)
    for name, module in model.encoder.named_modules():
        if isinstance(module, nn.Linear):
            assert_normal(module.weight, 0.02, name)
            if module.bias is not None:
                assert_constant(module.bias, 0.0, name)
    for name, value in model.named_parameters():
        if name.endswith(("pos_embed", "cls_token", "mask_token", "decoder.weight")):
            assert_normal(value, 0.02, name)
        elif re.search(r"gamma_[12]$", name):
            assert_constant(value, 0.1, name)
        elif name.endswith(("relative_position_bias_table", "q_bias", "v_bias", "decoder.bias")):
            assert_constant(value, 0.0, name)
        elif name == "mask_gamma":
            assert_constant(value, 1e-6, name)
    for value in model.encoder.patch_embed.proj.parameters():  # PyTorch's own
        assert_uniform(value, 1 / math.sqrt(3 * 16 * 16), "patch embedding")
    assert_norms(model.encoder, set())


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_initial_weights__resnet(name, last):
    model = masked(name, mask_layer=3, mask_init=0.01)
    for path, module in model.encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            out, _, k, _ = module.weight.shape
            assert_normal(module.weight, math.sqrt(2 / (out * k * k)), path)
    blocks = {f"layer{i}.{j}" for i in range(1, 5) for j in range(len(model.encoder.get_submodule(f"layer{i}")))}
    assert_norms(model.encoder, {f"{block}.{last}" for block in blocks})
    assert_normal(model.mask_token, 0.02, "token")
    assert_constant(model.mask_gamma, 0.01, "gamma")
    assert_normal(model.decoder.weight, 0.02, "decoder")
    assert_constant(model.decoder.bias, 0.0, "decoder")


def test_initial_weights__convnext():
    model = masked("convnext_nano", mask_layer=3, mask_init=1e-6)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert_normal(module.weight, 0.02, name)
            assert module.bias is not None
            assert_constant(module.bias, 0.0, name)
    for name, value in model.encoder.named_parameters():
        if name.endswith("gamma"):
            assert_constant(value, 1e-6, name)
    assert_norms(model.encoder, set())
    assert_constant(model.mask_token, 0.0, "token, as upstream")
    assert_constant(model.mask_gamma, 1e-6, "gamma")


@pytest.mark.parametrize("name", [*NANO, "mae_vit_base", "deit_small"])
def test_initial_weights__classifier_from_scratch(name):
    """PyTorch's own, whatever timm does."""
    sizes = {"embed_dim": 96, "depth": 2, "num_heads": 3} if "mae" in name or "deit" in name else {}
    net = classifier(name, 500, **sizes).net
    for path, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for value in (module.weight, module.bias):
                if value is not None:
                    assert_uniform(value, bound, path)
    assert_norms(net, set())
    for path, value in net.named_parameters():
        if path.endswith(("pos_embed", "cls_token", "q_bias", "v_bias", "relative_position_bias_table")):
            assert_constant(value, 0.0, path)
        elif "gamma" in path:
            assert_constant(value, 0.1 if is_vit(net) else 1e-6, path)


def test_initial_weights__are_drawn_anew():
    first, same, other = (seeded(lambda: build_masked("resnet_nano", MIMLoss()), seed) for seed in (0, 0, 1))
    assert torch.equal(first.decoder.weight, same.decoder.weight)
    assert not torch.equal(first.decoder.weight, other.decoder.weight)
    assert not torch.equal(first.encoder.conv1.weight, other.encoder.conv1.weight)
