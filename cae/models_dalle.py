"""The DALL-E tokenizer: OpenAI's discrete VAE (arXiv 2102.12092), whose codes CAE's decoder learns to predict.

Convolutional networks with the official state-dict keys; `convert_dalle.py` reads the official weight files.

Legend: B batch, s image side, g = s / 8 side of the code grid, V codes, n_hid width of the first group.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4


def map_pixels(imgs: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9], the range that the encoder was trained on."""
    return 0.8 * imgs + 0.1


def unmap_pixels(imgs: Tensor) -> Tensor:
    """[0.1, 0.9] -> [0, 1], clamped."""
    return ((imgs - 0.1) / 0.8).clamp(0, 1)


class Conv2d(nn.Module):
    """kw x kw convolution that keeps the size, computed in the type of its weights.

    Args:
        may_be_half: whether `half_precision` applies to it.
    """

    def __init__(self, n_in: int, n_out: int, kw: int, may_be_half: bool = True):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / (n_in * kw**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(n_out))
        self.may_be_half = may_be_half

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H, W)."""
        return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=self.w.shape[-1] // 2)


class ResidualBlock(nn.Module):
    """id(x) + gain * res(x), where res has four convolutions and a ReLU before each.

    Args:
        kernels: their sides.
    """

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        widths = [n_in, *[n_out // 4] * (len(kernels) - 1), n_out]
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kw in enumerate(kernels, 1):
            layers |= {f"relu_{i}": nn.ReLU(), f"conv_{i}": Conv2d(widths[i - 1], widths[i], kw)}
        self.res_path = nn.Sequential(layers)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H, W)."""
        return self.id_path(x) + self.gain * self.res_path(x)


def residual_groups(
    n_in: int, widths: list[int], n_blk: int, kernels: tuple[int, ...], resize: nn.Module
) -> OrderedDict[str, nn.Module]:
    """group_1 to group_4 of `n_blk` blocks each; all but the last end with `resize`."""
    groups: OrderedDict[str, nn.Module] = OrderedDict()
    gain = 1 / (len(widths) * n_blk) ** 2
    for g, width in enumerate(widths, 1):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for j in range(1, n_blk + 1):
            layers[f"block_{j}"] = ResidualBlock(n_in, width, kernels, gain)
            n_in = width
        if g < len(widths):
            layers["resize"] = resize
        groups[f"group_{g}"] = nn.Sequential(layers)
    return groups


class DalleEncoder(nn.Module):
    """Images to logits of codes, one per 8 x 8 pixels."""

    def __init__(self, n_hid: int = 256, n_blk_per_group: int = 2, input_channels: int = 3, vocab_size: int = 8192):
        super().__init__()
        widths = [n_hid * 2**g for g in range(GROUPS)]
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(input_channels, n_hid, 7))
        layers |= residual_groups(n_hid, widths, n_blk_per_group, (3, 3, 3, 1), nn.MaxPool2d(2))
        head = Conv2d(widths[-1], vocab_size, 1, may_be_half=False)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head))
        self.blocks = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Mapped pixels (B, 3, s, s) -> logits (B, V, g, g) float32."""
        return self.blocks(x)


class DalleDecoder(nn.Module):
    """Codes to the statistics of a logit-Laplace distribution of the mapped pixels: three means, three log-scales."""

    def __init__(
        self,
        n_init: int = 128,
        n_hid: int = 256,
        n_blk_per_group: int = 2,
        output_channels: int = 3,
        vocab_size: int = 8192,
    ):
        super().__init__()
        widths = [n_hid * 2**g for g in reversed(range(GROUPS))]
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(vocab_size, n_init, 1, may_be_half=False))
        layers |= residual_groups(n_init, widths, n_blk_per_group, (1, 3, 3, 3), nn.Upsample(scale_factor=2))
        head = Conv2d(n_hid, 2 * output_channels, 1)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head))
        self.blocks = nn.Sequential(layers)

    def forward(self, z: Tensor) -> Tensor:
        """One-hot codes, or probabilities, (B, V, g, g) -> (B, 6, s, s) float32."""
        return self.blocks(z).float()


def half_precision(network: nn.Module) -> None:
    """Give its convolutions half-precision weights, but for the two that upstream computes in float32."""
    for conv in network.modules():
        if isinstance(conv, Conv2d) and conv.may_be_half:
            conv.w.data, conv.b.data = conv.w.data.half(), conv.b.data.half()


class DalleTokenizer(nn.Module):
    """Frozen encoder and, for pictures, decoder.

    On a GPU it runs channels last and in half precision but for the encoder's last and the decoder's first convolution,
    as upstream; on a CPU in float32. State-dict keys are the official ones after `encoder.` and `decoder.`.
    Args:
        decoder_n_init: width after the decoder's first convolution. with_decoder: False leaves the decoder out.
        fp32: float32 on a GPU, too.
    """

    def __init__(
        self,
        n_hid: int = 256,
        vocab_size: int = 8192,
        n_blk_per_group: int = 2,
        decoder_n_init: int = 128,
        with_decoder: bool = True,
        fp32: bool = False,
    ):
        super().__init__()
        self.num_tokens = vocab_size
        self.fp32 = fp32
        self.encoder = DalleEncoder(n_hid, n_blk_per_group, vocab_size=vocab_size)
        self.decoder = None
        if with_decoder:
            self.decoder = DalleDecoder(decoder_n_init, n_hid, n_blk_per_group, vocab_size=vocab_size)
        self.eval().requires_grad_(False)

    def _apply(self, fn, recurse: bool = True):
        """Wherever it is moved, the weights get the type and layout of that device."""
        super()._apply(fn, recurse)
        for value in self.parameters():
            value.data = value.data.float()
            if value.is_cuda and value.ndim == 4:
                value.data = value.data.contiguous(memory_format=torch.channels_last)
        if next(self.parameters()).is_cuda and not self.fp32:
            half_precision(self)
        return self

    def train(self, mode: bool = True):
        """Stays in evaluation mode."""
        return super().train(False)

    @contextlib.contextmanager
    def _exact(self, x: Tensor) -> Iterator[None]:
        """Outside of autograd and of the caller's autocast."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            yield

    def logits(self, imgs: Tensor) -> Tensor:
        """Mapped pixels (B, 3, s, s) float32 -> logits of codes (B, V, g, g) float32.

        Raises:
            ValueError: s is not a multiple of 8, or the images are not float32.
        """
        if imgs.shape[-1] % 8 or imgs.shape[-2] % 8:
            raise ValueError(f"images of {imgs.shape[-2]}x{imgs.shape[-1]} pixels, expected multiples of 8")
        if imgs.dtype != torch.float32:
            raise ValueError(f"images are {imgs.dtype}, expected torch.float32")
        with self._exact(imgs):
            return self.encoder(imgs.contiguous(memory_format=torch.channels_last) if imgs.is_cuda else imgs)

    def get_codebook_indices(self, imgs: Tensor) -> Tensor:
        """Mapped pixels (B, 3, s, s) float32 -> codes (B, g, g)."""
        return self.logits(imgs).argmax(dim=1)

    def decode(self, indices: Tensor) -> Tensor:
        """Codes (B, g, g) -> pictures (B, 3, s, s) in [0, 1].

        Raises:
            ValueError: built without a decoder.
        """
        if self.decoder is None:
            raise ValueError("the tokenizer has no decoder; it needs the weights of decoder.pkl")
        with self._exact(indices):
            one_hot = F.one_hot(indices, self.num_tokens).permute(0, 3, 1, 2).float()  # (B, V, g, g)
            return unmap_pixels(self.decoder(one_hot)[:, :3].sigmoid())

    pictures = decode  # the name that all tokenizers share
