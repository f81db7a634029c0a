"""UDI's network for object detection and instance segmentation: its ViT, a feature pyramid and Mask R-CNN.

Batch norms become synchronised ones in the main program.
"""

import sys
from pathlib import Path

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from udi.dense_backbone import build_detection_backbone
from udi.detection_heads import FPN, BoxHead, MaskHead, MaskRCNN, Matching, RoIHead, RPNHead

HEADS = {  # their widths: the authors', and ours for images of 128 pixels on a CPU
    "wide": {"channels": 256, "fc_channels": 1024, "num_regions": 512},
    "narrow": {"channels": 64, "fc_channels": 256, "num_regions": 64},
}


def mask_rcnn(
    num_classes: int = 80, channels: int = 256, fc_channels: int = 1024, num_regions: int = 512, **kwargs
) -> MaskRCNN:
    """Mask R-CNN as in the authors' configuration: two linear layers before classes and boxes.

    Args:
        channels: of the pyramid, the RPN and the mask head. fc_channels: of the linear layers.
        num_regions: drawn of an image for the loss of the heads.
        kwargs: as in `build_detection_backbone`.
    """
    backbone = build_detection_backbone(**kwargs)
    return MaskRCNN(
        backbone,
        FPN([backbone.embed_dim] * 4, channels, num_outs=5),
        RPNHead(channels, channels, train_proposals=(2000, 1000), test_proposals=(1000, 1000)),
        RoIHead(
            BoxHead(channels, num_classes, num_fcs=2, fc_channels=fc_channels),
            MaskHead(channels, num_classes, channels=channels),
            matching=Matching(0.5, 0.5, low_quality=0.5, number=num_regions, positive_fraction=0.25),
        ),
    )
