"""UDI's network for semantic segmentation: its ViT, a feature pyramid and the head of Semantic FPN.

All four maps of the ViT have one size. The head gives logits at that resolution; the loss and the evaluation resize
them. Batch norms become synchronised ones in the main program.

Legend: B batch, H W pixels, C width of a feature map, D channels of the head, K classes.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch.nn.functional as F
from torch import Tensor, nn

from udi.dense_backbone import build_segmentation_backbone
from udi.detection_heads import FPN


# same as cae/models_segmentation.py
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


# same as cae/models_segmentation.py
def resize(x: Tensor, like: Tensor) -> Tensor:
    """Resize maps (B, D, h, w) to the height and width of others, bilinear."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


# same as cae/models_segmentation.py
def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """The last layer of a head, (B, D, h, w) -> (B, K, h, w)."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class FPNHead(nn.Module):
    """Head of Semantic FPN: every map is enlarged to the first one's size in steps of two, and the results are added.

    As upstream: the maps count as if of strides 4, 8, 16 and 32. All have one size, so that a later one is enlarged
    and then reduced again.
    Args:
        in_channels: C of each map.
        feature_strides: of the maps; a map of s times the first one's stride passes log2(s) stages, at least one.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        feature_strides: Sequence[int] = (4, 8, 16, 32),
        dropout: float = 0.1,
    ):
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for width, stride in zip(in_channels, feature_strides, strict=True):
            steps = int(math.log2(stride / feature_strides[0]))
            layers: list[nn.Module] = [ConvUnit(width, channels, 3)]
            for i in range(steps):
                layers += [ConvUnit(channels, channels, 3)] if i else []
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, h, w) -> logits (B, K, h, w)."""
        first, *others = (head(x) for head, x in zip(self.scale_heads, maps, strict=True))
        return self.conv_seg(self.dropout(sum((resize(x, first) for x in others), first)))


class SegmentationNetwork(nn.Module):
    """Backbone, pyramid and decode head; there is no auxiliary one."""

    def __init__(self, backbone: nn.Module, neck: nn.Module, decode_head: nn.Module):
        super().__init__()
        self.backbone, self.neck, self.decode_head = backbone, neck, decode_head
        self.auxiliary_head = None

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> logits (B, K, h, w), the only entry of a list."""
        return [self.decode_head(self.neck(self.backbone(images)))]


def semantic_fpn(
    num_classes: int = 150, fpn_channels: int = 256, head_channels: int = 128, dropout: float = 0.1, **kwargs
) -> SegmentationNetwork:
    """Semantic FPN on UDI's ViT; kwargs: as in `build_segmentation_backbone`."""
    backbone = build_segmentation_backbone(**kwargs)
    maps = len(backbone.out_indices)
    neck = FPN([backbone.embed_dim] * maps, fpn_channels, maps)
    return SegmentationNetwork(
        backbone, neck, FPNHead([fpn_channels] * maps, head_channels, num_classes, dropout=dropout)
    )
