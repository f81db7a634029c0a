"""Reconstruction losses: the authors' numbers, and the written-down formulas with two full transforms."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from a2mim.losses import PIXEL_LOSSES, MIMLoss, pixel_loss
from tests.support.helpers import assert_close, golden_files, load_golden

L1 = {"type": "RegressionLoss", "mode": "l1_loss", "loss_weight": 1.0, "reduction": "none"}
FOCAL_L1 = {**L1, "mode": "focal_l1_loss", "activate": "sigmoid", "alpha": 0.2, "gamma": 1.0, "residual": False}


@golden_files("a2mim", "losses")
def test_heads_match_upstream(path):
    ref = load_golden(path)
    default = {"fwd": {"rtol": 1e-4, "atol": 2e-5}, "grad": {"rtol": 2e-3, "atol": 2e-6}}
    given = ref.meta.get("tolerance", {})
    tol = {part: values | given.get(part, {}) for part, values in default.items()}
    assert ref.meta["heads"]
    for name, head in ref.meta["heads"].items():
        identical = name == "identical"
        pred = (ref["in/target"] if identical else ref["in/pred"]).clone().requires_grad_()
        loss = MIMLoss(**head)(ref["in/target"], pred, ref["in/mask"])["loss"]
        ref.check(f"out/{name}/loss", loss, **tol["fwd"], what=name)
        loss.backward()
        assert pred.grad is not None
        assert pred.grad.isfinite().all(), name
        if identical:
            continue
        limit = tol["grad"]["rtol"] * pred.grad[..., ::2, ::2].abs().max().item() + tol["grad"]["atol"]
        ref.check(f"out/{name}/grad", pred.grad[..., ::2, ::2], rtol=0, atol=limit)
        total = pred.grad.double().abs().sum().item()
        ref.check(f"out/{name}/grad_sum", pred.grad.double().sum(), rtol=0, atol=tol["grad"]["rtol"] * total, what=name)


# ---- formulas, as upstream computes them


def as_image(mask: Tensor, x: Tensor) -> Tensor:
    """(B, h, w) -> (B, 1, H, W)."""
    return torch.kron(mask.double(), torch.ones(x.shape[2] // mask.shape[1], x.shape[3] // mask.shape[2]).double())[
        :, None
    ]


def literal_pixel(d: Tensor, mode: str, activate="sigmoid", alpha=0.2, gamma=1.0, residual=False, **_) -> Tensor:
    plain = {"l1": d.abs(), "mse": d**2, "smooth_l1": torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)}
    kind = mode.removesuffix("_loss")
    if not kind.startswith("focal_"):
        return plain[kind]
    weight = torch.tanh(alpha * d.abs()) if activate == "tanh" else 2 / (1 + torch.exp(-alpha * d.abs())) - 1
    loss = plain[kind.removeprefix("focal_")]
    return loss * weight**gamma + (loss if residual else 0)


def literal(head: dict[str, Any], x: Tensor, p: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Spatial and spectral loss of float64 images, with a whole complex spectrum of both."""
    options = {"mode": "l1_loss", **head.get("loss", {})}
    m = as_image(mask, x)
    spatial = m + (1 - m) * head.get("unmask_weight", 0)
    scale = options.get("loss_weight", 1.0)
    first = (scale * literal_pixel(p - x, **options) * spatial).sum() / (spatial.sum() + 1e-5) / 3
    u = head.get("fft_unmask_weight", 0)
    share = m + (1 - m) * u
    replace = {
        "mixed": 0.5 * p.detach() + 0.5 * x,
        "target": x,
        "prediction": p.detach(),
        "mean": x.mean(dim=(2, 3), keepdim=True).expand_as(x),
    }[head.get("fft_unmask_replace") or "target"]
    q = p if u == 1 else p * share + replace * (1 - share)
    if head.get("fft_focal"):
        spectra = [torch.fft.fft2(v, norm="ortho").mean(dim=0, keepdim=True) for v in (q, x)]
        delta = (spectra[0] - spectra[1]).abs()
        size = torch.log(delta.detach() + 1)
        weight = (size / size.max()).nan_to_num(0).clamp(0, 1)
        return first, (weight * delta**2).mean()
    delta = (torch.fft.fft2(q, norm="ortho") - torch.fft.fft2(x, norm="ortho")).abs()
    loss = scale * literal_pixel(delta, **options)
    return first, (loss.detach() * loss if head.get("fft_reweight") else loss).mean()


HEADS: dict[str, dict[str, Any]] = {
    "focal frequency": {"fft_focal": True, "fft_unmask_replace": "mixed"},
    "focal frequency, share": {"loss": FOCAL_L1, "fft_focal": True, "fft_unmask_weight": 0.3},
    "focal frequency, no mask": {"fft_focal": True, "fft_unmask_weight": 1.0},
    "moduli": {"loss": FOCAL_L1, "fft_focal": False, "fft_unmask_weight": 0.1, "fft_unmask_replace": "mixed"},
    "moduli, reweighted": {"fft_focal": False, "fft_reweight": True, "fft_unmask_replace": "mean"},
    "target": {"fft_focal": False, "fft_unmask_replace": "target"},
    "prediction": {"fft_focal": True, "fft_unmask_replace": "prediction", "unmask_weight": 0.2},
    "mean": {"fft_focal": True, "fft_unmask_replace": "mean", "fft_unmask_weight": 0.01},
    "by default the target": {"fft_focal": True, "fft_unmask_replace": None},
    "mse": {"loss": {**L1, "mode": "mse_loss", "loss_weight": 2.0}, "fft_focal": False},
    "smooth": {"loss": {**L1, "mode": "smooth_l1_loss"}, "fft_focal": False},
    "focal mse": {"loss": {**FOCAL_L1, "mode": "focal_mse_loss", "gamma": 1.5, "residual": True}, "fft_focal": False},
    "tanh": {"loss": {**FOCAL_L1, "activate": "tanh", "alpha": 0.7}, "fft_focal": False},
}


def images(size: tuple[int, int], batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, p = (torch.randn(batch, 3, *size, generator=generator).double() for _ in range(2))
    return x, 2 * p


@pytest.mark.parametrize(("size", "grid"), [((16, 16), (4, 4)), ((15, 9), (5, 3)), ((12, 9), (3, 3)), ((9, 8), (3, 4))])
@pytest.mark.parametrize("name", HEADS)
def test_one_transform_is_as_good_as_two(name, size, grid):
    """Loss and gradient in float64, for even and odd sizes; the public call rounds to float32."""
    x, p = images(size)
    mask = (torch.rand(3, *grid, generator=torch.Generator().manual_seed(4)) < 0.6).long()
    head = {"fft_weight": 0.4, **HEADS[name]}
    p.requires_grad_()
    spatial, freq = literal(head, x, p, mask)
    (expected,) = torch.autograd.grad(spatial + 0.4 * freq, p)
    loss, m = MIMLoss(**head), as_image(mask, x)
    own = loss._spatial_loss(p - x, m), loss._fourier_loss(x, p, m)
    (grad,) = torch.autograd.grad(own[0] + 0.4 * own[1], p)
    assert_close(own[0], spatial, rtol=1e-12, atol=0)
    assert_close(own[1], freq, rtol=1e-12, atol=0)
    assert_close(grad, expected, rtol=1e-9, atol=1e-12 * expected.abs().max().item())
    out = loss(x, p, mask)
    for key, value in (("loss_spatial", spatial), ("loss_freq", freq), ("loss", spatial + 0.4 * freq)):
        assert out[key].dtype == torch.float32
        assert_close(out[key], value, rtol=1e-5, atol=0, what=key)


def test_spectrum_is_that_of_the_batchs_mean():
    """Differences that cancel over the batch do not count: upstream averages before everything else."""
    x = torch.randn(1, 3, 8, 8)
    d = torch.randn(1, 3, 8, 8)
    head = {"fft_weight": 1.0, "fft_focal": True, "fft_unmask_weight": 1.0}
    out = MIMLoss(**head)(x.expand(2, -1, -1, -1), torch.cat([x + d, x - d]), torch.ones(2, 2, 2))
    assert out["loss_freq"] < 1e-10
    assert out["loss_spatial"] > 0.1


@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("replace", ["mixed", "target", "prediction"])
def test_identical_images_have_no_loss(focal, replace):
    x = torch.randn(2, 3, 8, 8)
    pred = x.clone().requires_grad_()
    head = {"fft_weight": 0.5, "fft_focal": focal, "fft_unmask_replace": replace}
    out = MIMLoss(loss=FOCAL_L1, **head)(x, pred, torch.ones(2, 2, 2))
    assert all(value == 0 for value in out.values())
    out["loss"].backward()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()


def test_nothing_masked():
    x, pred = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
    out = MIMLoss(fft_weight=0.5, fft_focal=True)(x, pred, torch.zeros(2, 2, 2))
    assert out["loss"] == 0
    out["loss"].backward()
    assert pred.grad is not None
    assert not pred.grad.any()


@pytest.mark.parametrize("focal", [False, True])
def test_visible_pixels_have_no_gradient(focal):
    """Neither in the spatial loss nor, with a share of 0, in the spectrum."""
    x, pred = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
    mask = torch.tensor([[[1, 0], [0, 1]]]).expand(2, 2, 2)
    head = {"fft_weight": 0.5, "fft_focal": focal, "fft_unmask_replace": "mixed"}
    MIMLoss(**head)(x, pred, mask)["loss"].backward()
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(x).bool()
    assert pred.grad is not None
    assert not pred.grad[~hidden].any()
    assert pred.grad[hidden].all()


def test_weight_of_zero_leaves_the_spectrum_out(monkeypatch):
    monkeypatch.setattr(torch.fft, "rfft2", lambda *_, **__: pytest.fail("a transform"))
    x, pred = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    out = MIMLoss(fft_weight=0.0, fft_focal=True)(x, pred, torch.ones(2, 2, 2))
    assert out["loss_freq"] == 0
    assert out["loss"] == out["loss_spatial"]


def test_simmim_is_the_mean_absolute_error_of_masked_pixels():
    """Whatever else it is told."""
    x, pred = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.tensor([[[1, 0], [0, 0]], [[1, 1], [0, 1]]])
    hidden = as_image(mask, x).bool().expand_as(x)
    expected = F.l1_loss(pred[hidden], x[hidden])
    out = MIMLoss(type="SimMIMHead", loss=FOCAL_L1, unmask_weight=0.5, fft_weight=1.0)(x, pred, mask)
    assert_close(out["loss"], expected, rtol=1e-5, atol=0)
    assert_close(MIMLoss()(x, pred, mask)["loss"], expected, rtol=1e-5, atol=0)


def test_finer_masks_are_sampled():
    """A mask finer than the image: the nearest cell counts."""
    x, pred = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    fine = (torch.rand(1, 8, 8) < 0.5).long()
    out = MIMLoss()(x, pred, fine)
    assert_close(out["loss"], MIMLoss()(x, pred, fine[:, ::2, ::2])["loss"], rtol=1e-6, atol=0)


def test_losses_are_float32():
    x, pred, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.ones(2, 2, 2)
    loss = MIMLoss(loss=FOCAL_L1, fft_weight=0.5, fft_focal=True)
    expected = loss(x.bfloat16().float(), pred.bfloat16().float(), mask)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(x.bfloat16(), pred.bfloat16(), mask)
    assert out["loss"].dtype == torch.float32
    assert_close(out["loss"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", PIXEL_LOSSES)
def test_pixel_loss(mode):
    d = torch.linspace(-4, 4, 33).double()
    cases: list[dict[str, Any]] = [{}, {"alpha": 1.3, "gamma": 2.0}, {"activate": "tanh"}, {"residual": True}]
    for options in cases:
        expected = literal_pixel(d, mode, **options)
        assert_close(pixel_loss(d, mode, **options), expected, rtol=1e-12, atol=1e-15, what=str(options))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"type": "MAEHead"}, "head MAEHead: expected A2MIMHead or SimMIMHead"),
        ({"loss": {"mode": "l3_loss"}}, "loss l3_loss: expected one of l1_loss, mse_loss"),
        ({"fft_unmask_replace": "noise"}, "fft_unmask_replace noise: expected target, prediction, mixed or mean"),
    ],
)
def test_unknown_values(head, words):
    with pytest.raises(ValueError, match=words):
        MIMLoss(**head)


def test_forward__refuses_masks_of_another_size():
    with pytest.raises(ValueError, match=r"mask of \(3, 3\) cells does not divide an image of \(8, 8\) pixels"):
        MIMLoss()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 3))
