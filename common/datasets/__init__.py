"""Images and batches: channels (other than 8-bit RGB), files (of folders), images (data sets), transforms, loader."""

from common.datasets.channels import add_channel_flags, follow_channels, statistics, stored_channels, to_channels
from common.datasets.files import ENDINGS, ImageFiles, ListedImages, read_image, to_rgb
from common.datasets.images import add_flags, add_loader_flags, check_classes, follow_classes, image_dataset
from common.datasets.loader import (
    Loader,
    build_loader,
    pretrain_loader,
    seeded,
    supervised_loaders,
)
from common.datasets.memory import check_memory
from common.datasets.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Colours,
    RandomResizedCrop,
    eval_transform,
    finetune_transform,
    photos_only,
    probe_transform,
    repair_posterize,
    tensor_and_normalize,
)
