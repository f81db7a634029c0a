"""CAE's network for semantic segmentation: its ViT, the UPerNet decode head and the FCN auxiliary head.

The heads give logits at a quarter of the images' resolution (the auxiliary one: a sixteenth); the loss and the
evaluation resize them. Batch norms become synchronised ones in the main program.

Legend: B batch, H W pixels, C width of a feature map, D channels of a head, K classes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae.dense_backbone import segmentation_backbone


class ConvUnit(nn.Module):
    """Convolution without a bias, batch norm, ReLU; the map's size is kept."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H, W)"""
        return F.relu(self.bn(self.conv(x)))


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Resize maps (B, D, h, w) to the height and width of others, bilinear."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """The last layer of a head, (B, D, h, w) -> (B, K, h, w)."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class UPerHead(nn.Module):
    """UPerNet: the coarsest map is pooled to several grids, then maps are added from coarse to fine and concatenated.

    Args:
        in_channels: C of each map, from the finest to the coarsest.
        pool_scales: sides of the grids to which the coarsest map is averaged.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        *finer, coarsest = in_channels
        self.conv_seg = classifier(channels, num_classes)
        self.dropout = nn.Dropout2d(dropout)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvUnit(coarsest, channels, 1)) for side in pool_scales
        )
        self.bottleneck = ConvUnit(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvUnit(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvUnit(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvUnit(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, h, w), from the finest to the coarsest -> logits (B, K, h, w) of the finest one's size."""
        *finer, coarsest = maps
        pooled = [resize(module(coarsest), like=coarsest) for module in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in range(len(finer), 0, -1):  # from the coarsest level down
            levels[i - 1] = levels[i - 1] + resize(levels[i], like=levels[i - 1])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)] + levels[-1:]
        outputs = [outputs[0], *(resize(x, like=outputs[0]) for x in outputs[1:])]
        return self.conv_seg(self.dropout(self.fpn_bottleneck(torch.cat(outputs, dim=1))))


class FCNHead(nn.Module):
    """Fully convolutional head: 3 x 3 convolutions of one map.

    Args:
        concat_input: the map is concatenated with what the convolutions make of it, and convolved once more.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        num_convs: int = 1,
        concat_input: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.conv_seg = classifier(channels, num_classes)
        self.dropout = nn.Dropout2d(dropout)
        widths = [in_channels, *[channels] * num_convs]
        self.convs = nn.Sequential(*(ConvUnit(widths[i], channels, 3) for i in range(num_convs)))
        self.conv_cat = ConvUnit(in_channels + channels, channels, 3) if concat_input else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, K, h, w)"""
        y = self.convs(x)
        if self.conv_cat is not None:
            y = self.conv_cat(torch.cat([x, y], dim=1))
        return self.conv_seg(self.dropout(y))


class SegmentationNetwork(nn.Module):
    """Backbone, decode head and auxiliary head.

    Args:
        backbone: images (B, 3, H, W) -> maps, from the finest to the coarsest.
        auxiliary_index: the map that the auxiliary head sees.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module,
        auxiliary_head: nn.Module | None,
        auxiliary_index: int = 2,
    ):
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.auxiliary_index = auxiliary_index

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> logits (B, K, h, w) of the decode head; in training mode the auxiliary head's, too."""
        maps = self.backbone(images)
        logits = [self.decode_head(maps)]
        if self.auxiliary_head is not None and self.training:
            logits.append(self.auxiliary_head(maps[self.auxiliary_index]))
        return logits


def upernet(
    num_classes: int = 150, uper_channels: int = 768, aux_channels: int = 256, dropout: float = 0.1, **kwargs
) -> SegmentationNetwork:
    """UPerNet on CAE's ViT; kwargs: as in `DenseBackbone`."""
    backbone = segmentation_backbone(**kwargs)
    width = backbone.embed_dim
    return SegmentationNetwork(
        backbone,
        UPerHead([width] * 4, uper_channels, num_classes, dropout=dropout),
        FCNHead(width, aux_channels, num_classes, dropout=dropout),
    )


def upernet_cae_base(**kwargs) -> SegmentationNetwork:
    return upernet(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


def upernet_cae_large(**kwargs) -> SegmentationNetwork:
    sizes = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "out_indices": (7, 11, 15, 23), "uper_channels": 1024}
    return upernet(**{**sizes, **kwargs})


def upernet_cae_small(**kwargs) -> SegmentationNetwork:  # ours, as are the following
    return upernet(**{"embed_dim": 384, "depth": 12, "num_heads": 12, "uper_channels": 384, **kwargs})


def upernet_cae_tiny(**kwargs) -> SegmentationNetwork:
    return upernet(**{"embed_dim": 192, "depth": 12, "num_heads": 12, "uper_channels": 192, **kwargs})


def upernet_cae_nano(**kwargs) -> SegmentationNetwork:
    sizes = {"embed_dim": 96, "depth": 4, "num_heads": 3, "out_indices": (0, 1, 2, 3)}
    return upernet(**{**sizes, "uper_channels": 48, "aux_channels": 48, **kwargs})


MODELS = {
    f.__name__: f for f in (upernet_cae_base, upernet_cae_large, upernet_cae_small, upernet_cae_tiny, upernet_cae_nano)
}
