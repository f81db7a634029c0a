"""The two losses of A2MIM (arXiv 2205.13943, Fig. 3): L_spa of masked pixels and L_freq, the Fourier loss.

L = L_spa + fft_weight * L_freq. SimMIM has the first alone, as plain L1.

L_spa: the mean over masked pixels of |d|, d = prediction - target. The recipes of CNNs prefer large ones (focal L1).
L_freq: the figure has the squared difference of two discrete Fourier transforms F. The authors' code differs, and this
file follows it: visible pixels of the prediction first give way to the mean of prediction and target, without gradient;
the difference is averaged over the images of one process; its |F(d)| ** 2 are weighed by log(1 + |F(d)|) / max, without
gradient ("focal"). The recipe of ResNet-101 takes the focal L1 of |F(d)| of every image instead.

No released recipe uses the other options: squared and smooth losses, tanh weights, `residual`, `unmask_weight` above 0,
fillings other than "mixed", `fft_reweight`.

B batch, C channels, H W pixels, h w grid of the mask.
"""

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
        mode: one of PIXEL_LOSSES; the focal ones are weighed by (2 sigmoid(alpha |d|) - 1) ** gamma, through which the
            gradient flows, too.
        activate: sigmoid, or tanh for tanh(alpha |d|) ** gamma. residual: adds the loss without its weight.
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
    """Loss of a prediction of masked pixels; keywords as of the authors' heads.

    Args:
        type: SimMIMHead is the plain L1 loss on masked pixels and ignores the rest.
        loss: of a pixel's difference, and of a frequency's without fft_focal: {"mode": one of PIXEL_LOSSES, "activate",
            "alpha", "gamma", "residual", "loss_weight"}.
        unmask_weight: weight of visible pixels in the spatial loss.
        fft_weight: weight of the Fourier loss; 0 leaves it out.
        fft_focal: the focal frequency loss of the batch's mean difference, else `loss` of every image's |F(d)|.
        fft_unmask_weight: share of the prediction that stays at visible pixels before the transform.
        fft_unmask_replace: what the rest is: target, prediction (without gradient), mixed (the mean of both, prediction
            without gradient), or mean (the image's mean colour).
        fft_reweight: without fft_focal, multiply every frequency's loss by its own value, without gradient.
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
            spatial = self._spatial_loss(pred - target, mask)
            freq = self._fourier_loss(target, pred, mask) if self.fft_weight else spatial.new_zeros(())
        return {"loss": spatial + self.fft_weight * freq, "loss_spatial": spatial, "loss_freq": freq}

    def _pixel(self, difference: Tensor) -> Tensor:
        loss = pixel_loss(difference, **self.pixel)
        return loss if self.loss_weight == 1 else loss * self.loss_weight

    def _spatial_loss(self, difference: Tensor, mask: Tensor) -> Tensor:
        """L_spa, (): of differences (B, 3, H, W) and a mask (B, 1, H, W)."""
        weight = mask + (1 - mask) * self.unmask_weight if self.unmask_weight else mask
        return (self._pixel(difference) * weight).sum() / (weight.sum() + 1e-5) / self.channels

    def _fourier_loss(self, target: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """L_freq, (). The difference of two spectra is the spectrum of the difference: one transform is enough.

        Args:
            target, pred: (B, 3, H, W). mask: (B, 1, H, W), 1 = masked.
        """
        difference = pred - target  # (B, 3, H, W)
        if self.fft_unmask_weight < 1:
            share = mask + (1 - mask) * self.fft_unmask_weight
            filling = {  # what the difference becomes where the prediction gives way
                "target": lambda: 0.0,
                "prediction": lambda: difference.detach(),
                "mixed": lambda: 0.5 * difference.detach(),
                "mean": lambda: target.mean(dim=(2, 3), keepdim=True) - target,
            }[self.fft_unmask_replace]()
            difference = difference * share + filling * (1 - share)
        if self.fft_focal:
            spectrum = torch.fft.rfft2(difference.mean(dim=0), norm="ortho")  # (3, H, W // 2 + 1), complex
            power = spectrum.real.square() + spectrum.imag.square()  # |F(d)|^2
            size = (power.detach().sqrt() + 1).log()  # the weights get no gradient
            weight = (size / size.max()).nan_to_num(0.0).clamp(0, 1)
            loss = weight * power
        else:
            loss = self._pixel(torch.fft.rfft2(difference, norm="ortho").abs())  # (B, 3, H, W // 2 + 1)
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
