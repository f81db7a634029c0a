"""The pre-training network against the authors' numbers, and its properties."""

import ast
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semaim import orders
from semaim.blocks import sincos_pos_embed
from semaim.models_semaim import (
    ATTENTIONS,
    FEATURES,
    MODELS,
    AimViT,
    GaussianConv2d,
    calculate_similarity,
)
from tests.support.helpers import (
    assert_close,
    golden_files,
    load_golden,
    without_key_bias,
)

EXACT = ("mask", "auto", "authors")  # with gradients on a CPU, ties or not; FlexAttention has none there
DRAWN_ORDERS = [p for p in orders.ORDERS if p not in ("zigzag", "raster", "attention")]


def has_ties(ranks: Tensor) -> bool:
    return bool((ranks.sort(dim=1).values.diff(dim=1) == 0).any())


# ---- goldens


def build(ref, **kwargs) -> AimViT:
    model = AimViT(**{**ref.kwargs, **kwargs})
    model.load_state_dict(ref.weights)
    return model.train(ref.meta.get("mode") == "train")


def rule_of(case: str) -> str:
    """The order of a case: its name, or the longest that its name begins with (attention_ties: attention)."""
    return max((rule for rule in orders.ORDERS if case.startswith(rule)), key=len)


def inputs(ref, case: str = "") -> dict[str, Tensor]:
    """Maps, noise and features to predict that a golden (or a case of it) holds for the network's forward."""
    found = {name: ref[f"in/{name}"] for name in ("tokens", "attention_maps", "noise") if f"in/{name}" in ref}
    if case and rule_of(case) in orders.MAP_ORDERS:
        found["attention_maps"] = ref[re.findall(r"out/\w+", ref.meta["attention_maps_for_attention_cases"])[0]]
    own = {k: ref[f"in/{case}/{k}"] for k in ("attention_maps", "noise", "center_noise") if f"in/{case}/{k}" in ref}
    if ref.kwargs.get("predict_feature", "none") != "none" and "tokens" not in found:
        names = [name for name in ("out/tokens", "out/enc_tokens") if name in ref]
        found["tokens"] = ref[names[0]] if names else build(ref).eval().semantic_pass(ref["in/imgs"], features=True)[0]
    return found | own


def assert_ranks(permutation: Tensor, expected: Tensor, case: str) -> None:
    assert permutation.dtype == expected.dtype, case
    exact = rule_of(case) not in orders.MAP_ORDERS
    assert_close(permutation, expected, rtol=0, atol=0 if exact else 1e-6, what=case)


@golden_files("semaim", "pretrain_orders")
def test_orders_and_masks(path):
    ref = load_golden(path)
    for case in ref.meta["cases"]:
        model, given = build(ref, permutation_type=rule_of(case)), inputs(ref, case)
        given.pop("tokens", None)
        content, query, permutation = model.generate_attention_mask(model.patch_embed(ref["in/imgs"]), **given)
        assert_ranks(permutation, ref[f"out/{case}/permutation"], case)
        n, tokens = len(permutation), permutation.shape[1] + 1
        for mask, stream in ((content, "content"), (query, "query")):
            packed = ref[f"out/{case}/{stream}_visible"].numpy()
            visible = torch.from_numpy(np.unpackbits(packed, axis=-1, count=tokens)).bool()
            assert mask.shape == (n, 1, tokens, tokens)
            assert torch.equal(mask[:, 0], torch.zeros(n, tokens, tokens).masked_fill(~visible, -math.inf)), case


@golden_files("semaim", "pretrain_orders")
@pytest.mark.parametrize("impl", [*EXACT, "flex"])
def test_losses_of_every_order(path, impl):
    ref = load_golden(path)
    tol, imgs = ref.meta["tol"], ref["in/imgs"]
    for case in ref.meta["cases"]:
        model, given = build(ref, permutation_type=rule_of(case), attn_impl=impl), inputs(ref, case)
        with torch.no_grad():
            loss, permutation, loss_map = model(imgs, **given)
        assert_ranks(permutation, ref[f"out/{case}/permutation"], case)
        assert_close(loss, ref[f"out/{case}/loss"][0], rtol=tol["loss"], atol=0, what=case)
        assert_close(loss_map, ref[f"out/{case}/loss_map"], rtol=tol["others"], atol=tol["others"], what=case)


@golden_files("semaim", "pretrain_orders")
def test_breaking_ties_by_index_is_another_network(path):
    """attn_impl="causal" gives the authors' numbers where no ranks tie, and others where many do."""
    ref = load_golden(path)
    tol = ref.meta["tol"]
    for case in ref.meta["cases"]:
        model = build(ref, permutation_type=rule_of(case), attn_impl="causal")
        with torch.no_grad():
            loss, permutation, loss_map = model(ref["in/imgs"], **inputs(ref, case))
        if not has_ties(permutation):
            assert_close(loss, ref[f"out/{case}/loss"][0], rtol=tol["loss"], atol=0, what=case)
            assert_close(loss_map, ref[f"out/{case}/loss_map"], rtol=tol["others"], atol=tol["others"], what=case)
        elif "ties" in case:
            assert abs(loss - ref[f"out/{case}/loss"][0]) > 10 * tol["loss"], case


@golden_files("semaim", "pretrain_orders")
def test_encoder_pass(path):
    ref = load_golden(path)
    tol, model = ref.meta["tol"]["others"], build(ref)
    with torch.no_grad():
        tokens, similarity, attention = model(ref["in/imgs"], forward_encoder=True)
        for name, value in (("enc_tokens", tokens), ("feature_attention", similarity), ("self_attention", attention)):
            assert_close(value, ref[f"out/{name}"], rtol=tol, atol=tol, what=name)
        assert_close(calculate_similarity(tokens), ref["out/similarity_minmax"], rtol=tol, atol=tol)
        maps = {"gap": ref["out/feature_attention_gap"], "self": ref["out/self_attention"]}
        own = model.attention_type
        for kind, expected in ({own: ref["out/feature_attention"]} | maps).items():
            model.attention_type = kind
            for features in (False, True):
                tokens, found = model.semantic_pass(ref["in/imgs"], features)
                assert_close(found, expected, rtol=tol, atol=tol, what=kind)
                if features:
                    assert_close(tokens, ref["out/enc_tokens"], rtol=tol, atol=tol, what=kind)


@golden_files("semaim", "pretrain_grad")
@pytest.mark.parametrize("impl", [*EXACT, "causal"])
def test_predictions_and_gradients(path, impl):
    ref = load_golden(path)
    tol, imgs, given = ref.meta["tol"], ref["in/imgs"], inputs(ref)
    if impl == "causal" and has_ties(ref["out/permutation"]):
        pytest.skip("ranks tie")
    model = build(ref, attn_impl=impl)
    sources = {name: value for name, value in given.items() if name != "tokens"}
    pred, permutation = model.forward_aim(imgs, **sources)
    assert_ranks(permutation, ref["out/permutation"], model.permutation_type)
    assert_close(pred, ref["out/pred"][:, -pred.shape[1] :], rtol=tol["pred"], atol=tol["pred"])
    if model.predict_feature == "none":
        assert_close(model.make_target(imgs), ref["out/target"], rtol=tol["pred"], atol=tol["pred"])
    loss, permutation, loss_map = model(imgs, **given)
    assert_close(loss, ref["out/loss"][0], rtol=tol["loss"], atol=0)
    assert_close(loss_map, ref["out/loss_map"], rtol=tol["pred"], atol=tol["pred"])
    loss.backward()
    assert_golden_gradients(model, ref)


def assert_golden_gradients(model: AimViT, ref) -> None:
    tol, grads = ref.meta["tol"]["grad"], {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, expected in ref.group("out/grad").items():
        grad = grads[name]
        assert grad is not None, name
        actual, expected = (without_key_bias(name, g) for g in (grad, expected))
        if expected.numel():  # the golden's tolerance, but for a gradient that is small as a whole: 1 % of it
            atol = min(tol, 0.01 * expected.abs().max().item())
            assert_close(actual, expected, rtol=tol, atol=atol, what=name)
    if "params_without_grad" in ref.meta:
        assert {n for n, grad in grads.items() if grad is None} == set(ref.meta["params_without_grad"])
    if "out/grad_norm" in ref:
        norm = torch.nn.utils.get_total_norm([grad for grad in grads.values() if grad is not None])
        assert_close(norm, ref["out/grad_norm"][0], rtol=1e-4, atol=0)


@golden_files("semaim", "gaussian_blur")
def test_blur(path):
    ref = load_golden(path)
    for size, sigma in ref.meta["cases"]:
        blur, name = GaussianConv2d(3, size, sigma), f"out/k{size}_s{sigma}"
        assert_close(blur.weight, ref[f"{name}/weight"], rtol=0, atol=ref.meta["tol"])
        assert_close(blur(ref["in/imgs"]), ref[f"{name}/blurred"], rtol=0, atol=ref.meta["tol"])


@golden_files("semaim", "pos_embed")
def test_sincos_tables(path):
    ref = load_golden(path)
    names = [name for name in ref.arrays if name.startswith("out/sincos_")]
    assert names
    for name in names:
        dim, grid = map(int, name.split("_")[1:])
        assert_close(sincos_pos_embed(dim, grid, cls_token=True), ref[name], rtol=0, atol=ref.meta["tol"], what=name)


def keywords_of(preset: str) -> dict[str, Any]:
    """The constructor's keywords in a preset's name, such as aim_base[query_depth=12,MLP,blur 9/1]."""
    found: dict[str, Any] = {}
    for part in re.findall(r"\[(.*)\]", preset)[0].split(","):
        if "=" in part:
            name, value = part.split("=")
            numeric = re.fullmatch(r"[\d.]+|True|False|None", value)
            found[name] = ast.literal_eval(value) if numeric else value
        elif part.startswith("blur "):
            size, sigma = part.removeprefix("blur ").split("/")
            found |= {"gaussian_kernel_size": int(size), "gaussian_sigma": float(sigma)}
        else:
            assert part in ("MLP", "LINEAR"), part
            found["prediction_head_type"] = part
    return found


@golden_files("semaim", "manifest", ".json")
def test_presets_have_upstreams_keys_and_sizes(path):
    presets = {k: v for k, v in load_golden(path)["presets"].items() if k.split("[")[0] in MODELS}
    assert presets
    for name, preset in presets.items():
        with torch.device("meta"):
            model = MODELS[name.split("[")[0]](**keywords_of(name))
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        assert list(shapes.items()) == [(k, list(v)) for k, v in dict(preset["state_dict"]).items()], name
        assert sum(p.numel() for p in model.parameters()) == preset["params"], name
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == preset["trainable"], name


# ---- one network, five ways to compute it


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention without the compilation per shape that torch puts around it on a CPU, too."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


def small(**kwargs) -> AimViT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "query_depth": 2,
        "permutation_type": "stochastic",
    }
    model = AimViT(**{**sizes, **kwargs}).eval()
    for p in model.parameters():  # zero biases would hide mistakes
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=p[0].item(), std=0.1)
    return model


def sources(model: AimViT, n: int = 3, levels: int = 0, seed: int = 1) -> dict[str, Tensor]:
    """Noise and maps for n images, drawn from `levels` values if that is not 0."""
    length = model.patch_embed.num_patches
    draw = torch.Generator().manual_seed(seed)
    maps, noise = torch.rand(2, n, length, generator=draw)
    if levels:
        maps, noise = ((x * levels).floor() / levels for x in (maps, noise))
    return {"attention_maps": maps, "noise": noise, "center_noise": torch.rand(2, n, generator=draw)}


def images(model: AimViT, n: int = 3, seed: int = 2) -> Tensor:
    side = model.patch_embed.img_size
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


SHAPES = [
    pytest.param({}, id="default"),
    pytest.param({"query_depth": 4, "img_size": 20}, id="grid5,step1"),
    pytest.param({"query_depth": 1, "img_size": 8, "prediction_head_type": "LINEAR"}, id="grid2,step4,LINEAR"),
    pytest.param({"depth": 5, "img_size": 12, "loss_type": "L1", "norm_pix_loss": False}, id="grid3,idle block,L1"),
    pytest.param({"predict_feature": "inference", "prediction_head_type": "LINEAR"}, id="features,LINEAR"),
    pytest.param({"predict_feature": "clip", "out_dim": 6, "num_heads": 4}, id="features,MLP"),
    pytest.param({"gaussian_kernel_size": 3, "gaussian_sigma": 1}, id="blur"),
]
ORDERS = [
    *(pytest.param(rule, 0, id=rule) for rule in orders.ORDERS if rule not in orders.BOX_ORDERS),
    pytest.param("stochastic", 3, id="stochastic,ties"),
    pytest.param("attention", 2, id="attention,ties"),
    pytest.param("stochastic", 1, id="all equal"),
]


def assert_same_networks(kwargs: dict, rule: str, levels: int, gradients: bool = True) -> None:
    outputs = {}
    for impl in ("mask", "auto", "authors", "flex", "causal"):
        model = small(**kwargs, permutation_type=rule, attn_impl=impl).double()
        if model.gaussian_blur is not None:
            model.gaussian_blur.float()  # as the images that it blurs
        given, imgs = sources(model, levels=levels), images(model).double()
        if model.predict_feature != "none":
            size = model.prediction_head(torch.zeros(1, 16).double()).shape[-1]
            given["tokens"] = torch.randn(3, imgs.shape[-1] ** 2 // 16 + 1, size, generator=torch.Generator()).double()
        with torch.set_grad_enabled(impl != "flex" and gradients):
            loss, permutation, loss_map = model(imgs, **given)
        if impl == "causal" and has_ties(permutation):
            continue
        grads = None
        if loss.requires_grad:
            loss.backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
        outputs[impl] = (loss_map.detach(), grads)
    expected, expected_grads = outputs["mask"]
    for impl, (loss_map, grads) in outputs.items():
        assert_close(loss_map, expected, rtol=0, atol=1e-12, what=impl)
        for name, grad in (grads or {}).items():
            ref = expected_grads[name]
            assert (grad is None) == (ref is None), f"{impl} {name}"
            if grad is not None:
                assert_close(grad, ref, rtol=0, atol=1e-12, what=f"{impl} {name}")


@pytest.mark.parametrize("kwargs", SHAPES)
@pytest.mark.usefixtures("eager_flex")
def test_implementations_agree_on_every_shape(kwargs):
    assert_same_networks(kwargs, "stochastic", levels=0)
    assert_same_networks(kwargs, "attention_center", levels=4)


@pytest.mark.parametrize(("rule", "levels"), ORDERS)
@pytest.mark.usefixtures("eager_flex")
def test_implementations_agree_on_every_order(rule, levels):
    assert_same_networks({}, rule, levels)


@pytest.mark.parametrize("rule", orders.BOX_ORDERS)
@pytest.mark.usefixtures("eager_flex")
def test_implementations_agree_on_box_orders(rule):
    assert_same_networks({"img_size": 14, "patch_size": 1}, rule, levels=0, gradients=False)


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize("impl", [*EXACT, "flex"])
@pytest.mark.usefixtures("eager_flex")
def test_a_patch_informs_only_the_predictions_of_later_rank(impl, levels):
    """What tells a patch apart from its equals in rank are their contents, which no prediction of that rank sees."""
    model = small(attn_impl=impl, img_size=12)
    noise = sources(model, n=1, levels=levels)["noise"]
    imgs = images(model, n=1)
    streams: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _module, _args, out: streams.append(out[0]))
    with torch.no_grad():
        before = model.forward_aim(imgs, noise=noise)[0][0]
        for patch in range(9):
            changed = imgs.clone()
            r, c = divmod(patch, 3)
            changed[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] += 1
            after = model.forward_aim(changed, noise=noise)[0][0]
            moved = (after - before).abs().amax(dim=1) > 1e-6
            assert torch.equal(moved, noise[0] > noise[0, patch]), patch
            if impl in ("mask", "authors"):  # rows of the content stream in image order, class token first
                content = (streams[-1] - streams[0]).abs().amax(dim=1) > 1e-6
                assert not content[0], "the class token sees an image"
                assert torch.equal(content[1:], noise[0] >= noise[0, patch]), patch


def test_causal_lets_equals_see_each_other_by_index():
    model = small(attn_impl="causal", img_size=12)
    imgs, noise = images(model, n=1), torch.zeros(1, 9)
    with torch.no_grad():
        before = model.forward_aim(imgs, noise=noise)[0][0]
        changed = imgs.clone()
        changed[:, :, 4:8, 4:8] += 1  # patch 4
        moved = (model.forward_aim(changed, noise=noise)[0][0] - before).abs().amax(dim=1) > 1e-6
    assert moved.tolist() == [False] * 5 + [True] * 4


def test_auto_looks_for_ties():
    """A tie in one image of the batch is enough; without any the batch is sorted."""
    model = small(attn_impl="auto", img_size=8)
    ranks = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.3, 0.1, 0.2, 0.4]])
    assert model._plan(ranks)[1] == "causal"
    ranks[1, 0] = 0.1
    assert isinstance(model._plan(ranks)[1], Tensor)


# ---- orders


def ranks(rule: str, grid: int, n: int = 2, **given) -> Tensor:
    model = small(img_size=grid, patch_size=1, embed_dim=4, depth=1, query_depth=1, num_heads=1, permutation_type=rule)
    return model.permutation(torch.zeros(n, grid**2, 4), **given)


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 8, 14])
def test_raster_is_a_snake_and_zigzag_is_row_by_row(grid):
    zigzag, raster = ranks("zigzag", grid), ranks("raster", grid)
    assert (zigzag.dtype, raster.dtype) == (torch.int64, torch.float32)
    table = torch.arange(grid**2).view(grid, grid)
    assert torch.equal(zigzag, table.flatten().expand(2, -1))
    snake = [table[r] if r % 2 == 0 else table[r].flip(0) for r in range(grid)]
    assert torch.equal(raster, torch.cat(snake).float().expand(2, -1))


# From the authors' table: [first, end) of the boxes around a centre on the grid of 14.
BOUNDS = {
    0: ((0, 2), (0, 6), (0, 10)),
    1: ((0, 2), (0, 6), (0, 10)),
    2: ((0, 2), (0, 6), (0, 10)),
    3: ((2, 4), (0, 6), (0, 10)),
    4: ((3, 5), (1, 7), (0, 10)),
    5: ((4, 6), (2, 8), (0, 10)),
    6: ((5, 7), (3, 9), (1, 11)),
    7: ((6, 8), (4, 10), (2, 12)),
    8: ((7, 9), (5, 11), (3, 13)),
    9: ((8, 10), (6, 12), (3, 13)),
    10: ((9, 11), (7, 13), (3, 13)),
    11: ((11, 13), (7, 13), (3, 13)),
    12: ((11, 13), (7, 13), (3, 13)),
    13: ((11, 13), (7, 13), (3, 13)),
}


def boxes_at(row: int, column: int) -> Tensor:
    """How many boxes around a centre hold each patch, (196,)."""
    count = torch.zeros(14, 14)
    for (top, bottom), (left, right) in zip(BOUNDS[row], BOUNDS[column], strict=True):
        count[top:bottom, left:right] += 1
    return count.flatten()


def test_attention_guided__boxes_around_the_maximum():
    centres = range(14 * 14)
    maps = F.one_hot(torch.tensor(list(centres)), 196).float()
    found = ranks("attention_guided", 14, n=196, attention_maps=maps, noise=torch.zeros(196, 196))
    assert torch.equal(-found, torch.stack([boxes_at(*divmod(c, 14)) for c in centres]))


def test_stochastic_center__boxes_around_a_drawn_centre():
    centre = torch.tensor([[0, 5, 12, 7], [12, 0, 3, 10]])
    center_noise = (centre + 0.5) / 13
    found = ranks("stochastic_center", 14, n=4, center_noise=center_noise, noise=torch.zeros(4, 196))
    assert torch.equal(-found, torch.stack([boxes_at(r, c) for r, c in centre.T.tolist()]))


@pytest.mark.parametrize("grid", [2, 5, 8, 14, 16])
def test_center2out__boxes_in_the_middle(grid):
    count = torch.zeros(grid, grid)
    for half in (1, 3, 5):
        low, high = max(grid // 2 - half, 0), grid // 2 + half
        count[low:high, low:high] += 1
    noise = torch.rand(2, grid**2)
    assert torch.equal(ranks("center2out", grid, noise=noise), noise - count.flatten())


@pytest.mark.parametrize("grid", [2, 3, 4, 5, 14, 16])
def test_attention_center__distance_to_the_maximum(grid):
    maps = torch.rand(2, grid**2)
    noise = torch.rand(2, grid**2)
    found = ranks("attention_center", grid, attention_maps=maps, noise=noise)
    assert found.dtype == torch.float32
    for image in range(2):
        row, column = divmod(int(maps[image].argmax()), grid)
        for patch in range(grid**2):
            r, c = divmod(patch, grid)
            distance = np.float32(np.float64((r - row) ** 2 + (c - column) ** 2) ** 0.5)
            expected = distance + np.float32(0.001) * noise[image, patch].numpy()
            assert found[image, patch].item() == expected


def test_attention__most_similar_first():
    maps = torch.rand(2, 9)
    found = ranks("attention", 3, attention_maps=maps)
    assert found.dtype == torch.float32
    assert torch.equal(found, 1 - maps)


@pytest.mark.parametrize("rule", orders.ORDERS)
def test_draws(rule):
    """What is drawn, from which generator, and in upstream's order: noise, centre's rows, centre's columns."""
    maps = torch.rand(2, 196) if rule in orders.MAP_ORDERS else None
    model = small(img_size=14, patch_size=1, permutation_type=rule)
    like = torch.zeros(2, 196, 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = model.permutation(like, maps)
    assert torch.equal(before, torch.get_rng_state()) == (rule not in DRAWN_ORDERS)
    torch.manual_seed(5)
    noise = torch.rand(2, 14, 14).flatten(1)
    center_noise = torch.stack([torch.rand(2), torch.rand(2)])
    assert torch.equal(drawn, model.permutation(like, maps, noise, center_noise))
    assert drawn.dtype == (torch.int64 if rule == "zigzag" else torch.float32)


@pytest.mark.parametrize("rule", orders.BOX_ORDERS)
def test_box_orders_need_the_grid_of_14(rule):
    with pytest.raises(ValueError, match=f"{rule} is defined for 14 x 14 patches, here are 4 x 4"):
        small(permutation_type=rule)


@pytest.mark.parametrize("rule", orders.MAP_ORDERS)
def test_missing_maps_are_named(rule):
    model = small(permutation_type=rule, img_size=14, patch_size=1)
    assert model.follows_map
    for call in (model, model.forward_aim):
        with pytest.raises(ValueError, match=f"permutation_type {rule} needs attention_maps"):
            call(images(model))


# ---- arguments


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"permutation_type": "saliency"}, "permutation_type is 'saliency', expected one of zigzag, raster, "),
        ({"permutation_type": "out2center"}, "'out2center'"),
        ({"attention_type": "mean"}, "attention_type is 'mean', expected one of cls, gap, self"),
        ({"prediction_head_type": "mlp"}, "'mlp', expected one of MLP, LINEAR"),
        ({"loss_type": "L3"}, "'L3', expected one of L1, L2"),
        ({"predict_feature": "mae"}, "'mae', expected one of none, inference, ema, dino, clip"),
        ({"attn_impl": "flash"}, "'flash', expected one of auto, mask, flex, causal, authors"),
        ({"share_weight": True}, "share_weight"),
        ({"query_depth": 0}, "query_depth 0 does not fit depth 4"),
        ({"query_depth": -1}, "query_depth -1 does not fit depth 4"),
        ({"query_depth": 3}, "query_depth 3 does not fit depth 4"),
        ({"query_depth": 5}, r"query_depth 5 does not fit depth 4; possible: \[1, 2, 4\]"),
        ({"gaussian_kernel_size": 8, "gaussian_sigma": 1}, "8 is not odd"),
        ({"gaussian_kernel_size": 9, "gaussian_sigma": 0}, "sigma 0"),
        ({"img_size": 25}, "25 is not a multiple of the patch size 4"),
        ({"num_heads": 3}, "16 is not a multiple of the number of heads 3"),
        ({"embed_dim": 18}, "18 is not a multiple of 4"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        small(**kwargs)


@pytest.mark.parametrize(
    ("depth", "fitting"),
    [(12, [1, 2, 3, 4, 6, 12]), (24, [1, 2, 3, 4, 6, 8, 12, 24]), (32, [1, 2, 3, 4, 5, 6, 8, 10, 16, 32])],
)
def test_query_depth_must_fit_depth(depth, fitting):
    possible = []
    for query_depth in range(depth + 2):
        try:
            model = small(depth=depth, query_depth=query_depth, embed_dim=4, num_heads=1)
            assert (len(model.query_blocks), model.step) == (query_depth, depth // query_depth)
            possible.append(query_depth)
        except ValueError as error:
            assert str(fitting) in str(error)
    assert possible == fitting


def test_blocks_after_the_last_decoder_block_are_idle():
    model = small(depth=5, query_depth=2)
    assert (model.step, model.idle_blocks) == (2, 1)
    model(images(model))[0].backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {f"blocks.4.{name}" for name, _ in model.blocks[4].named_parameters()}


@pytest.mark.parametrize("call", ["forward", "forward_aim", "semantic_pass", "make_target"])
def test_wrong_image_size_is_named(call):
    with pytest.raises(ValueError, match="images are 32x32, the model was built for 16x16"):
        getattr(small(), call)(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("feature", FEATURES)
def test_features_to_predict_are_given_where_they_are_needed(feature):
    model = small(predict_feature=feature, out_dim=6)
    imgs, size = images(model), {"none": 48, "clip": 6}.get(feature, 16)
    assert model.forward_aim(imgs)[0].shape == (3, 16, size)
    tokens = torch.randn(3, 17, size)
    given, withheld = (None, tokens) if feature == "none" else (tokens, None)
    loss, permutation, loss_map = model(imgs, tokens=given)
    assert (loss.shape, permutation.shape, loss_map.shape) == ((), (3, 16), (3, 16))
    assert_close(loss, loss_map.mean(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=f"'{feature}' {'takes no' if feature == 'none' else 'needs'} tokens"):
        model(imgs, tokens=withheld)


def test_feature_loss_compares_directions():
    model = small(predict_feature="clip", out_dim=6)
    pred, tokens = torch.randn(2, 16, 6), torch.randn(2, 17, 6)
    expected = 2 - 2 * F.cosine_similarity(pred, tokens[:, 1:], dim=-1)
    assert_close(model.feature_loss(pred, tokens), expected, rtol=0, atol=1e-5)
    assert_close(model.feature_loss(3 * pred, tokens.mul(0.1)), expected, rtol=0, atol=1e-5)
    assert_close(model.feature_loss(tokens[:, 1:], tokens), torch.zeros(2, 16), rtol=0, atol=1e-10)


def test_blur_needs_both_flags_and_pixels():
    assert small(gaussian_kernel_size=3, gaussian_sigma=1).gaussian_blur is not None
    for kwargs in ({"gaussian_kernel_size": 3}, {"gaussian_sigma": 1}):
        assert small(**kwargs).gaussian_blur is None
    for feature in FEATURES[1:]:
        model = small(gaussian_kernel_size=3, gaussian_sigma=1, predict_feature=feature)
        assert not any(key.startswith("gaussian") for key in model.state_dict())


def test_targets_and_losses_stay_float32_under_autocast():
    model = small(gaussian_kernel_size=3, gaussian_sigma=1)
    imgs = images(model)
    plain = model.make_target(imgs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.make_target(imgs), plain)
        loss, _, loss_map = model(imgs)
        features = small(predict_feature="inference")
        feature_loss, _, feature_map = features(imgs, tokens=torch.randn(3, 17, 16).bfloat16())
        _, similarity, attention = model(imgs, forward_encoder=True)
    for value in (loss, loss_map, feature_loss, feature_map, similarity):
        assert value.dtype == torch.float32
    assert attention.sum(dim=1).le(1.001).all()


def test_patches_are_row_column_channel():
    model = small()
    imgs = images(model)
    patches = model.patchify(imgs)
    assert torch.equal(patches[1, 6].view(4, 4, 3), imgs[1, :, 4:8, 8:12].permute(1, 2, 0))  # row 1, column 2
    assert torch.equal(model.unpatchify(patches), imgs)


def test_drop_path_rates_grow_linearly():
    model = small(drop_path_rate=0.3, depth=4, query_depth=4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in model.blocks]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3], atol=1e-6)
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in model.query_blocks] == rates


# ---- the pass that makes the order


def count_calls(model: AimViT) -> dict[str, list[int]]:
    """How often each block is called from here on."""
    calls = {"blocks": [0] * len(model.blocks), "query_blocks": [0] * len(model.query_blocks)}
    for name, counts in calls.items():
        for i, block in enumerate(getattr(model, name)):

            def count(*_, counts=counts, i=i):
                counts[i] += 1

            block.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_order_pass_runs_each_block_once_and_no_decoder(attention_type, features):
    model = small(attention_type=attention_type, permutation_type="attention_center")
    imgs = images(model)
    expected_tokens, similarity, attention = model(imgs, forward_encoder=True)
    calls = count_calls(model)
    tokens, found = model.semantic_pass(imgs, features)
    last = 1 if features or attention_type != "self" else 0  # the class token's attention needs no output
    assert calls == {"blocks": [1, 1, 1, last], "query_blocks": [0, 0]}
    assert_close(found, attention if attention_type == "self" else similarity, rtol=0, atol=1e-7)
    assert not found.requires_grad
    assert (tokens is not None) == (last == 1)
    assert tokens is None or torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("query_depth", [1, 2, 4])
def test_prediction_runs_each_block_once(query_depth):
    model = small(query_depth=query_depth)
    calls = count_calls(model)
    model(images(model))
    assert calls == {"blocks": [1] * 4, "query_blocks": [1] * query_depth}


@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_maps_by_their_formulas(attention_type):
    model = small(attention_type=attention_type).double()
    imgs = images(model).double()
    with torch.no_grad():
        tokens, similarity, attention = model(imgs, forward_encoder=True)
    whole = tokens[:, 1:].mean(dim=1, keepdim=True) if attention_type == "gap" else tokens[:, :1]
    expected = F.cosine_similarity(tokens[:, 1:], whole, dim=-1).softmax(dim=1)
    assert_close(similarity, expected, rtol=0, atol=1e-7)
    assert_close(similarity.sum(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    assert ((attention > 0) & (attention < 1)).all()
    assert (attention.sum(dim=1) < 1).all(), "the class token's own share is left out"


def test_similarity_is_stretched_to_0_and_1():
    tokens = torch.randn(3, 10, 8)
    found = calculate_similarity(tokens)
    assert_close(found.amin(dim=1), torch.zeros(3), rtol=0, atol=0)
    assert ((found.amax(dim=1) > 1 - 1e-5) & (found.amax(dim=1) <= 1)).all()
    cosines = F.cosine_similarity(tokens[:, 1:], tokens[:, :1], dim=-1)
    assert torch.equal(found.argsort(dim=1), cosines.argsort(dim=1))
    assert torch.isfinite(calculate_similarity(torch.ones(1, 5, 8))).all()
