"""Losses of masked image modelling: L1 on masked pixels, and A2MIM's spectrum loss (paper eq. 3 to 5)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mim.masking_generator import mask_to_pixels

PIXEL_LOSSES = ("l1_loss", "mse_loss", "smooth_l1_loss", "focal_l1_loss", "focal_mse_loss")


def pixel_loss(
    difference: Tensor, mode: str, activate: str = "sigmoid", alpha: float = 0.2, gamma: float = 1.0, residual=False
) -> Tensor:
    """Elementwise loss of a difference, as a tensor of its shape.

    Args:
        mode: one of PIXEL_LOSSES; the focal ones are weighted by (2 sigmoid(alpha |d|) - 1) ** gamma, with gradient.
        activate: sigmoid, or tanh for tanh(alpha |d|) ** gamma. residual: adds the unweighted loss.
    """
    size = difference.abs()
    if mode == "smooth_l1_loss":
        return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")
    loss = difference.square() if "mse" in mode else size
    if not mode.startswith("focal"):
        return loss
    weight = torch.tanh(alpha * size) if activate == "tanh" else 2 * torch.sigmoid(alpha * size) - 1
    weighted = loss * weight**gamma
    return weighted + loss if residual else weighted


class MIMLoss(nn.Module):
    """Loss of a prediction of masked pixels; keywords as upstream's heads.

    Args:
        type: SimMIMHead is the plain L1 loss on masked pixels and ignores the rest.
        loss: of a pixel, and of a spectrum's moduli: {"mode": one of PIXEL_LOSSES, "activate", "alpha", "gamma",
            "residual", "loss_weight"}.
        unmask_weight: weight of visible pixels in the spatial loss.
        fft_weight: of the spectrum loss; 0 leaves it out.
        fft_focal: focal frequency loss of the batch's mean spectrum, else `loss` of each image's moduli.
        fft_unmask_weight: share of the prediction in visible pixels before the transform, the rest is
        fft_unmask_replace: target, prediction (without gradient), mixed (the mean of both), or mean (of each channel).
        fft_reweight: weigh the moduli's losses by themselves.
    """

    def __init__(
        self,
        type: str = "A2MIMHead",
        loss: dict[str, Any] | None = None,
        unmask_weight: float = 0.0,
        fft_weight: float = 0.0,
        fft_focal: bool = False,
        fft_unmask_weight: float = 0.0,
        fft_unmask_replace: str | None = "target",
        fft_reweight: bool = False,
        encoder_in_channels: int = 3,
    ):
        super().__init__()
        if type not in ("A2MIMHead", "SimMIMHead"):
            raise ValueError(f"head {type}: expected A2MIMHead or SimMIMHead")
        simple = type == "SimMIMHead"
        options = {} if simple or loss is None else {k: v for k, v in loss.items() if k not in ("type", "reduction")}
        self.loss_weight = options.pop("loss_weight", 1.0)
        self.pixel = {"mode": "l1_loss", **options}
        if self.pixel["mode"] not in PIXEL_LOSSES:
            raise ValueError(f"loss {self.pixel['mode']}: expected one of {', '.join(PIXEL_LOSSES)}")
        self.unmask_weight = 0.0 if simple else unmask_weight
        self.fft_weight = 0.0 if simple else fft_weight
        self.fft_focal, self.fft_unmask_weight, self.fft_reweight = fft_focal, fft_unmask_weight, fft_reweight
        self.fft_unmask_replace = fft_unmask_replace or "target"
        if self.fft_unmask_replace not in ("target", "prediction", "mixed", "mean"):
            raise ValueError(f"fft_unmask_replace {fft_unmask_replace}: expected target, prediction, mixed or mean")
        self.channels = encoder_in_channels

    def forward(self, target: Tensor, pred: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Losses in float32.

        Args:
            target, pred: (B, 3, H, W). mask: (B, h, w), 1 = masked; H, W are multiples of h, w.
        Returns:
            loss: (), the sum of loss_spatial: () and fft_weight * loss_freq: ().
        """
        with torch.autocast(pred.device.type, enabled=False):
            target, pred = target.float(), pred.float()
            mask = _to_image(mask, target.shape[-2:]).float()
            spatial = self._spatial(pred - target, mask)
            freq = self._spectral(target, pred, mask) if self.fft_weight else spatial.new_zeros(())
        return {"loss": spatial + self.fft_weight * freq, "loss_spatial": spatial, "loss_freq": freq}

    def _pixel(self, difference: Tensor) -> Tensor:
        loss = pixel_loss(difference, **self.pixel)
        return loss if self.loss_weight == 1 else loss * self.loss_weight

    def _spatial(self, difference: Tensor, mask: Tensor) -> Tensor:
        weight = mask + (1 - mask) * self.unmask_weight if self.unmask_weight else mask
        return (self._pixel(difference) * weight).sum() / (weight.sum() + 1e-5) / self.channels

    def _spectral(self, target: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """By linearity the difference of two spectra is the spectrum of the difference: one transform."""
        difference = pred - target
        if self.fft_unmask_weight < 1:
            share = mask + (1 - mask) * self.fft_unmask_weight
            filling = {
                "target": lambda: 0.0,
                "prediction": lambda: difference.detach(),
                "mixed": lambda: 0.5 * difference.detach(),
                "mean": lambda: target.mean(dim=(2, 3), keepdim=True) - target,
            }[self.fft_unmask_replace]()
            difference = difference * share + filling * (1 - share)
        if self.fft_focal:
            spectrum = torch.fft.rfft2(difference.mean(dim=0), norm="ortho")
            power = spectrum.real.square() + spectrum.imag.square()
            size = (power.detach().sqrt() + 1).log()
            weight = (size / size.max()).nan_to_num(0.0).clamp(0, 1)
            loss = weight * power
        else:
            loss = self._pixel(torch.fft.rfft2(difference, norm="ortho").abs())
            if self.fft_reweight:
                loss = loss.detach() * loss
        return _spectrum_mean(loss, target.shape[-1])


def _to_image(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, h, w) -> (B, 1, H, W) by repetition."""
    if mask.shape[-1] > size[-1]:
        return F.interpolate(mask[:, None].float(), size, mode="nearest")
    return mask_to_pixels(mask, size)


def _spectrum_mean(half: Tensor, width: int) -> Tensor:
    """Mean over the whole spectrum, (), of a quantity (..., H, W // 2 + 1) on the half that rfft2 computes.

    Every column stands for itself and its mirror image, but the first one and, for an even width, the last one.
    """
    total = 2 * half.sum() - half[..., 0].sum()
    if width % 2 == 0:
        total = total - half[..., -1].sum()
    return total / (half.numel() // half.shape[-1] * width)
