"""The pre-training network against the authors' numbers, and its properties."""

import ast
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from saim.blocks import sincos_pos_embed
from saim.models_saim import MODELS, GaussianConv2d, SaimViT, saim_base
from tests.support.helpers import assert_close, assert_gradients, golden_files, load_golden


def build(ref, **kwargs) -> SaimViT:
    model = SaimViT(**{**ref.kwargs, **kwargs})
    model.load_state_dict(ref.weights)
    return model.train(ref.meta.get("mode") == "train")


def has_ties(noise) -> bool:
    return any(len(row.unique()) < len(row) for row in noise)


def impls(noise) -> list[str]:
    """Ties are followed exactly by the mask formulation only."""
    return ["mask"] if has_ties(noise) else ["mask", "causal"]


@golden_files("saim", "pretrain_")
def test_forward_and_gradients(path):
    ref = load_golden(path)
    for impl in impls(ref["in/noise"]):
        model = build(ref, attn_impl=impl)
        pred = model.forward_saim(ref["in/imgs"], noise=ref["in/noise"])
        ref.check("out/target", model.make_target(ref["in/imgs"]), rtol=1e-4, atol=2e-5)
        if "out/pred" in ref:
            expected = ref["out/pred"]
            assert_close(pred, expected[:, -pred.shape[1] :], rtol=1e-4, atol=2e-5, what=impl)
            ref.check("out/loss", model.forward_loss(ref["in/imgs"], expected), rtol=1e-5, atol=0)
        loss = model(ref["in/imgs"], noise=ref["in/noise"])
        ref.check("out/loss", loss, rtol=1e-5, atol=0, what=impl)
        loss.backward()
        assert_gradients(model, ref.group("out/grad"), ref.meta.get("params_without_grad", ()))
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        ref.check("out/grad_norm_total", norm, rtol=1e-4, atol=0)


def record_streams(model: SaimViT) -> dict[str, list]:
    """Outputs of every block call; a call with keys from another stream belongs to the query stream."""
    streams = {"content": [], "query": []}

    def record(_module, args, out):
        streams["query" if len(args) > 1 else "content"].append(out)

    for block in {*model.blocks, *model.query_blocks}:
        block.register_forward_hook(record)
    return streams


@golden_files("saim", "pretrain_")
def test_masks_and_streams(path):
    ref = load_golden(path)
    for impl in impls(ref["in/noise"]):
        model = build(ref, attn_impl=impl)
        content, query = model.generate_attention_mask(model.patch_embed(ref["in/imgs"]), noise=ref["in/noise"])
        ref.equal("out/mask_content", content[:, 0] < 0)
        ref.equal("out/mask_query", query[:, 0] < 0)
        streams = record_streams(model)
        model.forward_saim(ref["in/imgs"], noise=ref["in/noise"])
        order = ref["in/noise"].argsort(dim=1, stable=True)
        for stream, outputs in streams.items():
            assert outputs
            for i, out in enumerate(outputs):
                if f"out/{stream}/{i}" not in ref:
                    continue
                expected = ref[f"out/{stream}/{i}"]
                if impl == "causal":  # sorted rows; the content stream drops the last patch, the query stream cls
                    rows = order + 1 if stream == "query" else torch.nn.functional.pad(order[:, :-1] + 1, (1, 0))
                    expected = expected.gather(1, rows[..., None].expand(-1, -1, expected.shape[-1]))
                assert_close(out, expected, rtol=1e-4, atol=2e-5, what=f"{impl} {stream}/{i}")


@golden_files("saim", "pretrain_")
def test_seeded_loss(path):
    ref = load_golden(path)
    if "seeded" not in ref.meta:
        pytest.skip("the file holds no seed")
    for impl in impls(ref.get("out/noise_seeded", ref["in/noise"])):
        model = build(ref, attn_impl=impl)
        torch.manual_seed(ref.meta["seeded"]["seed"])
        ref.check("out/loss_seeded", model(ref["in/imgs"]), rtol=1e-5, atol=0, what=impl)


@golden_files("saim", "pretrain_raster")
def test_raster_order_needs_no_noise(path):
    ref = load_golden(path)
    for impl in ("mask", "causal"):
        model = build(ref, attn_impl=impl, token_order="raster")
        state = torch.get_rng_state()
        ref.check("out/loss", model(ref["in/imgs"]), rtol=1e-5, atol=0, what=impl)
        assert torch.equal(state, torch.get_rng_state())


@golden_files("saim", "masks")
def test_attention_masks(path):
    ref = load_golden(path)
    for name in [k.removeprefix("in/noise") for k in ref.arrays if k.startswith("in/noise")]:
        noise = ref[f"in/noise{name}"]
        model = SaimViT(img_size=4, patch_size=2, embed_dim=8, depth=1, num_heads=1, query_depth=1)
        content, query = model.generate_attention_mask(torch.zeros(*noise.shape, 8), noise=noise)
        for mask, stream in ((content, "content"), (query, "query")):
            ref.equal(f"out/{stream}{name}", mask == -torch.inf)
            assert (mask[mask != -torch.inf] == 0).all()


@golden_files("saim", "gaussian_patchify")
def test_blur_and_patchify(path):
    ref = load_golden(path)
    for name, kernel in ref.group("out/kernel").items():
        size, sigma = name.split("_")
        blur = GaussianConv2d(3, int(size), float(sigma))
        assert_close(blur.weight, kernel, rtol=0, atol=1e-6)
        ref.check(f"out/blur/{name}", blur(ref["in/x"]), rtol=0, atol=1e-6)
    if "out/patchify" not in ref:
        return
    x, patches = ref["in/x"], ref["out/patchify"]
    patch_size = round((patches.shape[-1] / 3) ** 0.5)
    model = SaimViT(img_size=x.shape[-1], patch_size=patch_size, embed_dim=8, depth=1, num_heads=1, query_depth=1)
    assert_close(model.patchify(x), patches, rtol=0, atol=1e-6)
    assert torch.equal(model.unpatchify(model.patchify(x)), x)


@golden_files("saim", "pos_embed")
def test_sincos_tables(path):
    ref = load_golden(path)
    for name, table in ref.group("out/sincos").items():
        dim, grid = map(int, name.split("x"))
        assert_close(sincos_pos_embed(dim, grid, cls_token=True), table, rtol=0, atol=1e-9)
    for name, table in ref.group("out/sincos_nocls").items():
        dim, grid = map(int, name.split("x"))
        assert_close(sincos_pos_embed(dim, grid), table, rtol=0, atol=1e-9)


@golden_files("saim", "manifest", ".json")
def test_presets_have_upstreams_keys_and_sizes(path):
    presets = {k: v for k, v in load_golden(path)["presets"].items() if v["constructor"] in MODELS}
    assert presets
    for name, preset in presets.items():
        with torch.device("meta"):
            model = MODELS[preset["constructor"]](**preset["kwargs"])
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        assert list(shapes.items()) == list(preset["state_dict"].items()), name
        assert sum(p.numel() for p in model.parameters()) == preset["params_total"], name
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == preset["params_trainable"], name


def plain(text: str) -> Any:
    """A number or a boolean as such, anything else as text without quotes."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@golden_files("saim", "seeded_", ".json")
def test_seeded_initialisation(path):
    ref = load_golden(path)
    note = ref[
        "note"
    ]  # "torch.manual_seed(0) ..., then saim_base(query_depth=12, ...): ... x = torch.rand(1,3,224,224)"
    weights_seed, draw_seed = map(int, re.findall(r"manual_seed\((\d+)\)", note))
    constructor, arguments = re.findall(r"(\w+)\((\w+=.*?)\)", note)[0]
    kwargs = {name: plain(value) for name, value in re.findall(r"(\w+)=([^,]+)", arguments)}
    shape = map(int, re.findall(r"torch\.rand\((.*?)\)", note)[0].split(","))
    torch.manual_seed(weights_seed)
    model = MODELS[constructor](**kwargs).eval()
    state = model.state_dict()
    for name, (total, absolute, first) in ref["digest"].items():
        value = state[name].double()
        assert_close([value.sum(), value.abs().sum()], [total, absolute], rtol=1e-5, atol=1e-4, what=name)
        assert_close(value.flatten()[:3], first, rtol=1e-5, atol=1e-6, what=name)
    torch.manual_seed(draw_seed)
    with torch.no_grad():
        assert_close(model(torch.rand(*shape)), ref["loss"], rtol=1e-4, atol=0)


def small(**kwargs) -> SaimViT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 24,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "query_depth": 2,
    }
    return SaimViT(**{**sizes, **kwargs}).eval()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"query_depth": 4},
        {"query_depth": 2, "share_weight": True},
        {"depth": 5},
        {"prediction_head_type": "LINEAR", "loss_type": "L1", "norm_pix_loss": False},
        {"query_depth": 0, "token_order": "raster"},
        {"token_order": "raster"},
    ],
    ids=str,
)
def test_causal_equals_mask(kwargs):
    causal, mask = small(**kwargs).double(), small(**kwargs, attn_impl="mask").double()
    imgs = torch.rand(3, 3, 24, 24, dtype=torch.float64)
    noise = None if "token_order" in kwargs else torch.rand(3, 9, dtype=torch.float64)
    assert_close(causal.forward_saim(imgs, noise), mask.forward_saim(imgs, noise), rtol=0, atol=1e-12)
    for model in (causal, mask):
        model.forward_saim(imgs, noise).square().mean().backward()
    for (name, a), b in zip(causal.named_parameters(), mask.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert_close(a.grad, b.grad, rtol=0, atol=1e-12, what=name)


@pytest.mark.parametrize("impl", ["causal", "mask"])
def test_a_patch_informs_only_later_patches(impl):
    model = small(attn_impl=impl)
    imgs, noise = torch.rand(1, 3, 24, 24), torch.rand(1, 9)
    order = noise.argsort(dim=1)[0].tolist()
    before = model.forward_saim(imgs, noise)
    for t, patch in enumerate(order):
        changed = imgs.clone()
        r, c = divmod(patch, 3)
        changed[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] += 1
        moved = (model.forward_saim(changed, noise) - before).abs().amax(dim=(0, 2)) > 1e-6
        assert set(moved.nonzero().flatten().tolist()) == set(order[t + 1 :])


def test_query_depth_must_fit_depth():
    fitting = []
    for query_depth in range(1, 14):
        try:
            small(depth=12, query_depth=query_depth)
            fitting.append(query_depth)
        except ValueError as error:
            assert str(query_depth) in str(error)
    assert fitting == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"prediction_head_type": "mlp"}, "mlp"),
        ({"loss_type": "L3"}, "L3"),
        ({"attn_impl": "flash"}, "flash"),
        ({"token_order": "zigzag"}, "zigzag"),
        ({"query_depth": 0}, "raster"),
        ({"gaussian_kernel_size": 8, "gaussian_sigma": 1}, "8"),
        ({"gaussian_kernel_size": 9, "gaussian_sigma": 0}, "0"),
        ({"img_size": 25}, "25"),
        ({"num_heads": 3}, "3"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        small(**kwargs)


def test_wrong_image_size_is_named():
    with pytest.raises(ValueError, match="32x32"):
        small()(torch.rand(1, 3, 32, 32))


def test_targets_stay_float32_under_autocast():
    model = small(gaussian_kernel_size=3, gaussian_sigma=1)
    imgs = torch.randn(2, 3, 24, 24)
    plain = model.make_target(imgs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.make_target(imgs), plain)


def test_shared_blocks_are_one_list(monkeypatch):
    """Upstream's decoder list is the encoder's: all blocks have both names, and draw their initial weights once."""
    drawn: list[torch.Tensor] = []
    draw = nn.init.xavier_uniform_
    monkeypatch.setattr(nn.init, "xavier_uniform_", lambda weight: drawn.append(weight) or draw(weight))
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 4, "num_heads": 2}
    model = SaimViT(**sizes, query_depth=2, share_weight=True)
    keys = {key for key in model.state_dict() if key.startswith("blocks.")}
    assert {key for key in model.state_dict() if key.startswith("query_blocks.")} == {f"query_{key}" for key in keys}
    assert len(keys) == 4 * 16
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert [id(weight) for weight in drawn[1:]] == [id(weight) for weight in linears]  # the first is the convolution's


def test_igpt_has_no_decoder():
    with torch.device("meta"):
        igpt, shared = MODELS["vit_igpt_base"](), saim_base(share_weight=True)
    assert not any(k.startswith("query_blocks") for k in igpt.state_dict())
    assert sum(p.numel() for p in igpt.parameters()) == sum(p.numel() for p in shared.parameters()) == 90_521_088


def test_drop_path_rates_grow_linearly():
    model = small(drop_path_rate=0.3, depth=4, query_depth=4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in model.blocks]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3], atol=1e-6)
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in model.query_blocks] == rates
