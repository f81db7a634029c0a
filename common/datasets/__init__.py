"""Images and batches: channels (beyond 8-bit RGB), files, images (data sets), transforms, seeds, loader, device."""

from common.datasets.channels import add_channel_flags, follow_channels, statistics, stored_channels, to_channels
from common.datasets.device import add_augment_flag, collate_decoded, crop_and_flip, decoded, resize_batch
from common.datasets.files import ENDINGS, ImageFiles, ListedImages, endings, read_image, to_rgb
from common.datasets.images import add_flags, add_loader_flags, check_classes, follow_classes, image_dataset
from common.datasets.loader import (
    Loader,
    build_loader,
    pretrain_loader,
    supervised_loaders,
)
from common.datasets.memory import check_memory
from common.datasets.seeds import seeded
from common.datasets.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Colours,
    Normalize,
    RandomResizedCrop,
    change_colours,
    eval_transform,
    finetune_transform,
    floats,
    halves,
    photos_only,
    probe_transform,
    repair_posterize,
    tensor_and_normalize,
    unchanged,
)
