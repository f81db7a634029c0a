"""A2MIM Fig. A3, A4: amplitudes by frequency of the output of every residual block, and its variance over space.

Legend: B images, C channels, h w sides of a feature map, N = hw tokens.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timm.models import beit, vision_transformer
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import Tensor, nn


def as_map(latent: Tensor) -> Tensor:
    """Patch tokens (B, N, C) of a square image, or a map (B, C, h, w) -> (B, C, h, w).

    Raises:
        ValueError: N is no square.
    """
    if latent.ndim == 4:
        return latent
    side = round(latent.shape[1] ** 0.5)
    if side**2 != latent.shape[1]:
        raise ValueError(f"{latent.shape[1]} tokens are no square map")
    return latent.transpose(1, 2).unflatten(2, (side, side))


def relative_log_amplitude(latent: Tensor) -> Tensor:
    """Mean over images and channels of log(|FFT| + 1e-6) along the diagonal of frequencies, minus that of frequency 0.

    Args:
        latent: (B, N, C) or (B, C, h, h).
    Returns:
        (h - h // 2,), at frequencies 0, 2π/h, 4π/h, ...: below π.
    """
    x = as_map(latent).float()
    half = x.shape[-1] - x.shape[-1] // 2
    diagonal = torch.fft.rfft2(x).diagonal(dim1=-2, dim2=-1)[..., :half]  # the rest mirrors it
    curve = (diagonal.abs() + 1e-6).log().mean(dim=(0, 1))
    return curve - curve[0]


def feature_variance(latent: Tensor) -> Tensor:
    """Unbiased variance over the positions, averaged over images and channels: (B, N, C) or (B, C, h, w) -> ().

    A single position has variance 0.
    """
    x = as_map(latent).float().flatten(2)
    return x.var(dim=2, correction=min(1, x.shape[2] - 1)).mean()


def taps(net: nn.Module) -> list[tuple[str, nn.Module, bool, int]]:
    """Where the latents of a network are: [(name, module, is it its input, number of extra tokens), ...].

    ResNet, ConvNeXt: after the stem and every block. ViT: the embedding, then the residual stream after every attention
    and every MLP, so that layer-scale is included.
    Raises:
        ValueError: it is of another kind.
    """
    if isinstance(net, ResNet):
        stack: Any = (net.layer1, net.layer2, net.layer3, net.layer4)
        layers = [(f"layer{i}", layer) for i, layer in enumerate(stack, 1)]
        blocks = [(f"{name}.{i}", block, False, 0) for name, layer in layers for i, block in enumerate(layer)]
        return [("stem", net.maxpool, False, 0), *blocks]
    if isinstance(net, ConvNeXt):
        stages: Any = net.stages
        blocks = [
            (f"stages.{s}.{i}", b, False, 0) for s, stage in enumerate(stages) for i, b in enumerate(stage.blocks)
        ]
        return [("stem", net.stem, False, 0), *blocks]
    stack = getattr(net, "blocks", ())
    if not len(stack) or not all(isinstance(b, beit.Block | vision_transformer.Block) for b in stack):
        raise ValueError(f"{type(net).__name__}: latents are known of ResNet, ConvNeXt and pre-norm ViTs")
    extra: Any = net.num_prefix_tokens
    points: list[tuple[str, nn.Module, bool, int]] = [("embedding", stack[0], True, extra)]
    for i, block in enumerate(stack):
        points += [(f"blocks.{i}.attn", block.norm2, True, extra), (f"blocks.{i}.mlp", block, False, extra)]
    return points


@contextlib.contextmanager
def observed(net: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[dict[str, Any]]:
    """Apply function to every latent of the forward passes inside; yields its latest results by name, in order."""
    seen: dict[str, Any] = {}

    def see(name: str, extra: int, _module: nn.Module, inputs: Any, output: Tensor | None = None) -> None:
        x = inputs[0] if output is None else output
        seen[name] = function(x[:, extra:] if x.ndim == 3 else x)

    handles = []
    for name, module, is_input, extra in taps(net):
        register = module.register_forward_pre_hook if is_input else module.register_forward_hook
        handles.append(register(partial(see, name, extra)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
