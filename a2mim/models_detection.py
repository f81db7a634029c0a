"""A2MIM's networks for object detection and instance segmentation: Mask R-CNN on its ResNet-50 and ViT.

C4: proposals from the third stage's map; the fourth stage is applied to each region. FPN: a feature pyramid.
Batch norms become synchronised ones in the main program.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torch import Tensor, nn

from a2mim.dense_backbone import DenseResNet, DenseViT, Pyramid, load_backbone
from a2mim.detection_heads import FPN, BoxHead, MaskHead, MaskRCNN, Matching, RoIHead, RPNHead
from common import distributed

NARROW = {"channels": 64, "fc_channels": 256, "num_regions": 64}  # ours, for images of 128 pixels on a CPU


class C4ResNet(DenseResNet):
    """The first three stages, of which the last one's map alone is used."""

    def __init__(self, name: str, in_chans: int = 3):
        super().__init__(name, stages=3, in_chans=in_chans)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the map (B, C, H / 16, W / 16), the only entry of a list."""
        return super().forward(images)[-1:]


class Stage5(nn.Module):
    """The ResNet's fourth stage ("res5") on the features of regions, and an extra norm (as MoCo adds it)."""

    def __init__(self, name: str):
        super().__init__()
        net = DenseResNet(name)
        self.layer4: nn.Module = net.layer4  # type: ignore[assignment]
        self.channels = net.channels[-1]
        self.norm = nn.BatchNorm2d(self.channels)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, 14, 14) -> (R, 2 C, 7, 7)"""
        return self.norm(self.layer4(x))


class ViTPyramid(FPN):
    """The ViT's four maps of one stride, brought to four, and the feature pyramid."""

    def __init__(self, dim: int, channels: int):
        super().__init__([dim] * 4, channels, num_outs=5)
        self.pyramid = Pyramid(dim)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, D, h, w) of stride 16 -> five of strides 4 to 64 (B, channels, ...)."""
        return super().forward(self.pyramid(maps))


def matching(num_regions: int, low_quality: float | None = 0.5) -> Matching:
    return Matching(0.5, 0.5, low_quality, number=num_regions, positive_fraction=0.25)


def c4(name: str, num_classes: int = 80, channels: int = 256, num_regions: int = 512, in_chans: int = 3) -> MaskRCNN:
    """Mask R-CNN without a pyramid on a ResNet; channels: of the mask head. There are no linear layers but the last."""
    backbone, stage5 = C4ResNet(name, in_chans=in_chans), Stage5(name)
    width = backbone.channels[-1]
    return MaskRCNN(
        backbone,
        None,
        RPNHead(
            width,
            width,
            strides=(16,),
            scales=(2, 4, 8, 16, 32),
            inside_only=True,
            train_proposals=(12000, 2000),
            test_proposals=(6000, 1000),
        ),
        RoIHead(
            BoxHead(stage5.channels, num_classes, avg_pool=True),
            MaskHead(stage5.channels, num_classes, num_convs=0, channels=channels),
            strides=(16,),
            box_size=14,
            mask_size=None,
            shared_head=stage5,
            matching=matching(num_regions, low_quality=None),
        ),
    )


def fpn(
    name: str,
    num_classes: int = 80,
    channels: int = 256,
    fc_channels: int = 1024,
    num_regions: int = 512,
    num_convs: int = 4,
    num_fcs: int = 1,
    in_chans: int = 3,
) -> MaskRCNN:
    """Mask R-CNN with a pyramid on a ResNet; norms after all convolutions but the RPN's.

    Args:
        channels: of the pyramid and of all heads. fc_channels: of the linear layers before classes and boxes.
        num_convs, num_fcs: layers before classes and boxes.
    """
    backbone = DenseResNet(name, in_chans=in_chans)
    layers: dict[str, Any] = {
        "num_convs": num_convs,
        "conv_channels": channels,
        "num_fcs": num_fcs,
        "fc_channels": fc_channels,
    }
    return MaskRCNN(
        backbone,
        FPN(backbone.channels, channels, num_outs=5, norm=True),
        RPNHead(channels, channels, train_proposals=(2000, 1000), test_proposals=(1000, 1000)),
        RoIHead(
            BoxHead(channels, num_classes, **layers, norm=True),
            MaskHead(channels, num_classes, channels=channels, norm=True),
            matching=matching(num_regions),
        ),
    )


def vit(
    name: str, num_classes: int = 80, channels: int = 256, fc_channels: int = 1024, num_regions: int = 512, **kwargs
) -> MaskRCNN:
    """Mask R-CNN with a pyramid on a ViT, and GIoU as box loss.

    As the authors' program cannot be run: ours is the pyramid of strides 4 to 32, which its anchors assume, and both
    kinds of positions are those of the pre-training, resized.
    Args:
        channels, fc_channels: as in `fpn`. kwargs: as in `DenseViT`; img_size is that of the largest padded image.
    """
    backbone = DenseViT(name, use_abs_pos_emb=True, final_norm=True, **kwargs)
    layers: Any = {"num_convs": 4, "conv_channels": channels, "num_fcs": 1, "fc_channels": fc_channels}
    return MaskRCNN(
        backbone,
        ViTPyramid(backbone.embed_dim, channels),
        RPNHead(channels, channels, train_proposals=(2000, 2000), test_proposals=(1000, 1000)),
        RoIHead(
            BoxHead(channels, num_classes, **layers, norm=True),
            MaskHead(channels, num_classes, channels=channels),
            matching=matching(num_regions),
            giou_weight=10.0,
        ),
    )


def mask_rcnn_r50_c4(**kwargs) -> MaskRCNN:
    return c4("resnet50", **kwargs)


def mask_rcnn_r50_fpn(**kwargs) -> MaskRCNN:
    return fpn("resnet50", **kwargs)


def mask_rcnn_r50_fpn_2fc(**kwargs) -> MaskRCNN:  # of the authors' configurations for detectron2
    return fpn("resnet50", **{"num_convs": 0, "num_fcs": 2, **kwargs})


def mask_rcnn_vit_base(**kwargs) -> MaskRCNN:
    return vit("vit_base", **{"img_size": 1344, "drop_path_rate": 0.2, **kwargs})


def mask_rcnn_resnet_nano(**kwargs) -> MaskRCNN:  # ours, as is the following
    return fpn("resnet_nano", **{**NARROW, **kwargs})


def mask_rcnn_vit_nano(**kwargs) -> MaskRCNN:
    return vit("vit_nano", **{"img_size": 192, **NARROW, **kwargs})


VITS = {f.__name__: f for f in (mask_rcnn_vit_base, mask_rcnn_vit_nano)}
RESNETS = {f.__name__: f for f in (mask_rcnn_r50_c4, mask_rcnn_r50_fpn, mask_rcnn_r50_fpn_2fc, mask_rcnn_resnet_nano)}
MODELS = {**VITS, **RESNETS}


def load_encoder(model: MaskRCNN, path: str) -> None:
    """Load the encoder of a file as `load_backbone` does; its fourth stage becomes the shared head of a C4 network.

    Raises:
        distributed.UserError: the file cannot be read or holds another encoder.
    """
    assert isinstance(model.backbone, (DenseViT, DenseResNet))
    weights = load_backbone(model.backbone, path)
    if model.roi_head.shared_head is None:
        return
    stage5 = distributed.part_of(weights, "layer4.")
    with distributed.user_errors(f"{path}: layer4 is not that of this encoder"):
        model.roi_head.shared_head.layer4.load_state_dict(stage5)  # type: ignore[union-attr]
    distributed.log(f"{path}: {len(stage5)} tensors of layer4 for the regions; the extra norm is fresh")
