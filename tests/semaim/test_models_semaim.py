"""The pre-training network against the authors' numbers, and its arguments."""

import ast
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from semaim.blocks import sincos_pos_embed
from semaim.models_semaim import FEATURES, MODELS, AimViT, GaussianConv2d
from tests.support.helpers import assert_close, golden_files, load_golden, without_key_bias
from tests.support.semaim_networks import EXACT, build, check_ranks, has_ties, images, inputs, small


@golden_files("semaim", "pretrain_grad")
@pytest.mark.parametrize("impl", [*EXACT, "causal"])
def test_predictions_and_gradients(path, impl):
    ref = load_golden(path)
    tol, imgs, given = ref.meta["tol"], ref["in/imgs"], inputs(ref)
    model = build(ref, attn_impl=impl)
    sources = {name: value for name, value in given.items() if name != "tokens"}
    pred, permutation = model.forward_aim(imgs, **sources)
    check_ranks(ref, "out/permutation", permutation, model.permutation_type)
    if impl == "causal" and has_ties(permutation):
        pytest.skip("ranks tie")
    if "out/pred" in ref:
        assert_close(pred, ref["out/pred"][:, -pred.shape[1] :], rtol=tol["pred"], atol=tol["pred"])
    if model.predict_feature == "none":
        ref.check("out/target", model.make_target(imgs), rtol=tol["pred"], atol=tol["pred"])
    loss, permutation, loss_map = model(imgs, **given)
    ref.check("out/loss", loss, rtol=tol["loss"], atol=0)
    ref.check("out/loss_map", loss_map, rtol=tol["pred"], atol=tol["pred"])
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
    norm = torch.nn.utils.get_total_norm([grad for grad in grads.values() if grad is not None])
    ref.check("out/grad_norm", norm, rtol=1e-4, atol=0)


@golden_files("semaim", "gaussian_blur")
def test_blur(path):
    ref = load_golden(path)
    for size, sigma in ref.meta["cases"]:
        blur, name = GaussianConv2d(3, size, sigma), f"out/k{size}_s{sigma}"
        ref.check(f"{name}/weight", blur.weight, rtol=0, atol=ref.meta["tol"])
        ref.check(f"{name}/blurred", blur(ref["in/imgs"]), rtol=0, atol=ref.meta["tol"])


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
