"""CAE's network for object detection and instance segmentation: its ViT, a feature pyramid and Mask R-CNN.

Batch norms become synchronised ones in the main program.
"""

from cae.dense_backbone import detection_backbone
from cae.detection_heads import FPN, BoxHead, MaskHead, MaskRCNN, Matching, RoIHead, RPNHead


def mask_rcnn(
    num_classes: int = 80, channels: int = 256, fc_channels: int = 1024, num_regions: int = 512, **kwargs
) -> MaskRCNN:
    """Mask R-CNN as in the authors' configurations: 4 convolutions and a linear layer before classes and boxes, GIoU.

    Args:
        channels: of the pyramid and of all heads. fc_channels: of the linear layer.
        num_regions: drawn of an image for the loss of the heads.
        kwargs: as in `DenseBackbone`.
    """
    backbone = detection_backbone(**kwargs)
    box_head = BoxHead(
        channels, num_classes, num_convs=4, conv_channels=channels, num_fcs=1, fc_channels=fc_channels, norm=True
    )
    return MaskRCNN(
        backbone,
        FPN([backbone.embed_dim] * 4, channels, num_outs=5),
        RPNHead(channels, channels, train_proposals=(2000, 2000), test_proposals=(1000, 1000)),
        RoIHead(
            box_head,
            MaskHead(channels, num_classes, channels=channels),
            matching=Matching(0.5, 0.5, low_quality=0.5, number=num_regions, positive_fraction=0.25),
            giou_weight=10.0,
        ),
    )


def mask_rcnn_cae_base(**kwargs) -> MaskRCNN:
    return mask_rcnn(**{"embed_dim": 768, "depth": 12, "num_heads": 12, "drop_path_rate": 0.2, **kwargs})


def mask_rcnn_cae_large(**kwargs) -> MaskRCNN:
    sizes = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "out_indices": (7, 11, 15, 23)}
    return mask_rcnn(**{**sizes, "init_values": 1e-5, "drop_path_rate": 0.2, **kwargs})


def mask_rcnn_cae_small(**kwargs) -> MaskRCNN:  # ours, as are the following
    return mask_rcnn(**{"embed_dim": 384, "depth": 12, "num_heads": 12, **kwargs})


NARROW = {"channels": 64, "fc_channels": 256, "num_regions": 64}  # for images of 128 pixels on a CPU


def mask_rcnn_cae_tiny(**kwargs) -> MaskRCNN:
    return mask_rcnn(**{"embed_dim": 192, "depth": 12, "num_heads": 12, **NARROW, **kwargs})


def mask_rcnn_cae_nano(**kwargs) -> MaskRCNN:
    return mask_rcnn(**{"embed_dim": 96, "depth": 4, "num_heads": 3, "out_indices": (0, 1, 2, 3), **NARROW, **kwargs})


MODELS = {
    f.__name__: f
    for f in (mask_rcnn_cae_base, mask_rcnn_cae_large, mask_rcnn_cae_small, mask_rcnn_cae_tiny, mask_rcnn_cae_nano)
}
