"""Images and batches: files (of folders), images (data sets), transforms, loader (repeatable batches)."""

from common.datasets.files import ENDINGS, ImageFiles, ListedImages, read_image, to_rgb
from common.datasets.images import check_classes, follow_classes, image_dataset
from common.datasets.loader import (
    Loader,
    add_flags,
    add_loader_flags,
    build_loader,
    pretrain_loader,
    seeded,
    supervised_loaders,
)
from common.datasets.memory import check_memory
from common.datasets.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RandomResizedCrop,
    eval_transform,
    finetune_transform,
    probe_transform,
    repair_posterize,
    tensor_and_normalize,
)
