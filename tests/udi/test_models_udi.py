"""Networks, head and sampling against the authors' numbers; initial weights; names and sizes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.helpers import assert_close, golden_files, load_golden
from udi.models_udi import MODELS, DINOHead, DropPath, MaskedAttention, MultiCropWrapper, UDIWrapper, VisionTransformer


def tol(ref) -> dict[str, Any]:
    return {k: ref.meta["tolerance"][k] for k in ("rtol", "atol")}


def vit_of(config: dict, **keywords) -> VisionTransformer:
    """The ViT of a golden's configuration."""
    sizes = {"img_size": [config["gs"]], "patch_size": config["p"], "num_class_token": config["nct"]}
    sizes |= {"embed_dim": config["d"], "depth": config["depth"], "num_heads": config["h"]}
    return VisionTransformer(**{**sizes, **keywords})


def network_of(config: dict, include_patch: bool, norm_last_layer: bool, drop_path: float = 0.0) -> MultiCropWrapper:
    """Student or teacher of a golden's configuration."""
    vit = vit_of(config, drop_path_rate=drop_path)
    attn = MaskedAttention(config["d"], config["ah"], qkv_bias=True) if include_patch else None
    widths = {"hidden_dim": config["hid"], "bottleneck_dim": config["bot"]}
    head = DINOHead(config["d"], config["K"], norm_last_layer=norm_last_layer, **widths)
    return MultiCropWrapper(UDIWrapper(vit, attn, config["d"]), head, config["nl"], include_patch)


# ---- goldens


@golden_files("udi", "vit_")
def test_vit(path):
    ref = load_golden(path)
    model = vit_of(ref.meta["config"]).eval()
    model.load_state_dict(ref.weights)
    for i, size in enumerate(ref.meta["sizes"]):
        x, out = ref[f"in/x{i}"], f"out/x{i}"
        with torch.no_grad():
            ref.check(f"{out}/forward", model(x), **tol(ref))
            ref.check(f"{out}/tokens", model.embed(x), **tol(ref))
            ref.check(f"{out}/pos", model.positions(*size), **tol(ref))
            ref.check(f"{out}/last_attention", model.get_last_selfattention(x), **tol(ref))
            layers = model.get_intermediate_layers(x, ref.meta["n"])
        for k, layer in enumerate(layers):
            ref.check(f"{out}/intermediate{k}", layer, **tol(ref))


@golden_files("udi", "pos_embed")
def test_positions(path):
    ref = load_golden(path)
    side, patch = ref.meta["grid"], ref.meta["patch_size"]
    model = VisionTransformer([side * patch], patch, 3, ref.meta["num_class_token"], embed_dim=4, depth=1, num_heads=1)
    model.pos_embed.data = ref["in/pos_embed"]
    for size, expected in ref.group("out").items():
        assert_close(model.positions(*map(int, size.split("x"))), expected, **tol(ref))


@golden_files("udi", "masked_attention")
def test_masked_attention(path, monkeypatch):
    ref = load_golden(path)
    attend, seen = F.scaled_dot_product_attention, []

    def recorded(q, k, v):
        seen.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1))
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    model = MaskedAttention(ref.meta["dim"], ref.meta["num_heads"], qkv_bias=True)
    model.load_state_dict(ref.weights)
    x, maps = ref["in/x"].requires_grad_(), ref["in/map"]
    y = torch.stack([model(x, mix) for mix in maps])
    valid = maps.sum(-1) > 0
    if "out/attn" in ref:
        shown = valid[:, :, None].expand(torch.stack(seen).shape[:-1])
        assert_close(torch.stack(seen)[shown], ref["out/attn"][shown], **tol(ref))
    if "out/y" in ref:
        assert_close(y[valid], ref["out/y"][valid], **tol(ref))
    (y * ref["in/cotangent"] * valid[..., None]).sum().backward()
    params = dict(model.named_parameters()) | {"x": x}
    for name, expected in ref.group("out/grad").items():
        assert_close(params[name].grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-7, what=name)


@golden_files("udi", "dino_head")
def test_head(path):
    ref = load_golden(path)
    keywords = {k: ref.meta[k] for k in ("in_dim", "out_dim", "nlayers", "hidden_dim", "bottleneck_dim")}
    model = DINOHead(**keywords, norm_last_layer=ref.meta["norm_last_layer"])
    assert list(model.state_dict()) == list(ref.weights)
    model.load_state_dict(ref.weights)
    params = dict(model.named_parameters())
    ref.equal("requires_grad", {k: p.requires_grad for k, p in params.items()})
    x = ref["in/x"].requires_grad_()
    y = model(x)
    ref.check("out/y", y, **tol(ref))
    (y * ref["in/cotangent"]).sum().backward()
    for name, expected in ref.group("out/grad").items():
        grad = (x if name == "x" else params[name]).grad
        assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-7, what=name)


@golden_files("udi", "manifest", ".json")
def test_names_and_sizes(path):
    presets = load_golden(path)["presets"]
    checked = 0
    for name, preset in presets.items():
        if name.startswith("vit_"):
            arch, tokens = name.rstrip(")").split("(num_class_token=")
            with torch.device("meta"):
                model = MODELS[arch](num_class_token=int(tokens))
        elif name.startswith("pretrain:"):
            arch, *options = name.removeprefix("pretrain:").split(",")
            values = dict(option.split("=") for option in options)
            patches = values.get("include_patch", "true") == "true"
            with torch.device("meta"):
                vit = MODELS[arch](num_class_token=int(values["number_cls_token"]))
                attn = MaskedAttention(vit.embed_dim, 6, qkv_bias=True) if patches else None
                head = DINOHead(
                    vit.embed_dim, int(values["out_dim"]), norm_last_layer=values["norm_last_layer"] == "true"
                )
                model = MultiCropWrapper(UDIWrapper(vit, attn, vit.embed_dim), head, 10, patches)
        else:
            continue
        checked += 1
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        assert list(shapes.items()) == [(k, list(shape)) for k, shape in dict(preset["state_dict"]).items()], name
        assert sum(p.numel() for p in model.parameters()) == preset["params"]
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == preset["trainable"]
    assert checked >= 5


# ---- properties


def test_initial_weights():
    torch.manual_seed(0)
    vit: Any = VisionTransformer([32], 4, embed_dim=96, depth=2, num_heads=3, num_class_token=2)
    head: Any = DINOHead(96, 512, hidden_dim=128, bottleneck_dim=64)
    for weight in (vit.pos_embed, vit.blocks[0].attn.qkv.weight, head.mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert vit.patch_embed.proj.bias.abs().max() > 0  # PyTorch's own
    assert not any(p.abs().max() for n, p in vit.named_parameters() if n.endswith("bias") and "patch_embed" not in n)
    bound = 1 / math.sqrt(64)
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(bound, rel=1e-2)
    assert torch.equal(head.last_layer.weight_g, torch.ones(512, 1))


def test_drop_path__keeps_and_scales():
    torch.manual_seed(1)
    drop = DropPath(0.25).train()
    x = torch.ones(2000, 1, 3)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.04)
    assert torch.allclose(y[kept], x[kept] / 0.75)
    assert torch.equal(drop.eval()(x), x)
    draws = iter([torch.tensor([0.1, 0.3]).view(2, 1, 1)])
    assert drop.train()(x[:2], draws)[:, 0, 0].tolist() == pytest.approx([0.0, 4 / 3])


def test_patches_reach_all_class_tokens():
    model = VisionTransformer([16], 4, embed_dim=24, depth=2, num_heads=2, num_class_token=2).eval()
    x = torch.randn(1, 3, 16, 16)
    other = x.clone()
    other[..., -4:, -4:] += 1
    assert ((model(x) - model(other)).abs().amax(-1) > 1e-5).all()


def test_head__with_batch_norm():
    head = DINOHead(12, 16, use_bn=True, hidden_dim=8, bottleneck_dim=6)
    assert head(torch.randn(5, 3, 12)).shape == (5, 3, 16)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: VisionTransformer([30], 16), "30 pixels"),
        (lambda: VisionTransformer([32], 16, embed_dim=10, num_heads=3), "10 does not divide"),
        (lambda: MaskedAttention(10, 3), "10 does not divide"),
    ],
)
def test_networks__raise_on_sizes_that_do_not_divide(make, match):
    with pytest.raises(ValueError, match=match):
        make()
