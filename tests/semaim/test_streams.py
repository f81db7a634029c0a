"""What the two streams see: losses of every order, and the ways to compute them, which agree with and without ties."""

import pytest
import torch
from torch import Tensor

from semaim import orders
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.semaim_networks import (
    BOX_ORDERS,
    EXACT,
    build,
    check_ranks,
    has_ties,
    images,
    inputs,
    rule_of,
    small,
    sources,
)


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention without the compilation per shape that torch puts around it on a CPU, too."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


@golden_files("semaim", "pretrain_orders")
@pytest.mark.parametrize("impl", [*EXACT, "flex"])
@pytest.mark.usefixtures("eager_flex")
def test_losses_of_every_order(path, impl):
    ref = load_golden(path)
    tol, imgs = ref.meta["tol"], ref["in/imgs"]
    for case in ref.meta["cases"]:
        model, given = build(ref, permutation_type=rule_of(case), attn_impl=impl), inputs(ref, case)
        with torch.no_grad():
            loss, permutation, loss_map = model(imgs, **given)
        check_ranks(ref, f"out/{case}/permutation", permutation, case)
        ref.check(f"out/{case}/loss", loss, rtol=tol["loss"], atol=0)
        ref.check(f"out/{case}/loss_map", loss_map, rtol=tol["others"], atol=tol["others"], what=case)


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
            ref.check(f"out/{case}/loss", loss, rtol=tol["loss"], atol=0)
            ref.check(f"out/{case}/loss_map", loss_map, rtol=tol["others"], atol=tol["others"], what=case)
        elif "ties" in case and f"out/{case}/loss" in ref:
            assert abs(loss - ref[f"out/{case}/loss"][0]) > 10 * tol["loss"], case


# ---- one network, five ways to compute it


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
    *(pytest.param(rule, 0, id=rule) for rule in orders.ORDERS if rule not in BOX_ORDERS),
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


@pytest.mark.parametrize("rule", BOX_ORDERS)
@pytest.mark.usefixtures("eager_flex")
def test_implementations_agree_on_box_orders(rule):
    assert_same_networks({"img_size": 14, "patch_size": 1}, rule, levels=0, gradients=False)


@pytest.mark.parametrize("levels", [0, pytest.param(1, marks=pytest.mark.slow), 4])
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
