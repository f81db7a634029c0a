"""Transforms and Mixup as the flags of fine-tuning and attentive probing choose them."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from cae import main_attentive, main_finetune
from common import datasets, distributed
from tests.support.helpers import assert_close
from tests.support.runs import CPU


def finetune_transforms(*flags: str, main: ModuleType = main_finetune) -> tuple[list, list]:
    train, val = main_finetune.build_transforms(main.get_args_parser().parse_args(flags))
    return train.transforms, val.transforms


def kinds(steps: list) -> list[type]:
    return [type(step) for step in steps]


def test_fine_tuning_augments_by_default():
    train, val = finetune_transforms()
    assert [k for k in kinds(train) if k in (RandAugment, RandomErasing)] == [RandAugment, RandomErasing]
    assert not [k for k in kinds(train) if k is transforms.ColorJitter]
    assert kinds(val)[:2] == [transforms.Resize, transforms.CenterCrop]
    assert (val[0].size, tuple(val[1].size)) == (256, (224, 224))
    normalize = next(step for step in train if isinstance(step, transforms.Normalize))
    assert [round(float(x), 3) for x in normalize.mean] == [0.5, 0.5, 0.5]
    imagenet = finetune_transforms("--imagenet_default_mean_and_std")
    for steps in imagenet:
        normalize = next(step for step in steps if isinstance(step, transforms.Normalize))
        assert [round(float(x), 3) for x in normalize.mean] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(("size", "flags", "resized"), [(384, [], 384), (48, [], 54), (64, ["--crop_pct", "0.5"], 128)])
def test_evaluation_crops_by_size(size, flags, resized):
    _, val = finetune_transforms("--input_size", str(size), *flags)
    assert (val[0].size, tuple(val[1].size)) == (resized, (size, size))


def test_small_images_are_padded_instead_of_cropped():
    """After a resize, which leaves images of that size as they are: others would be cut to scraps, or be too small."""
    (resize, crop, *_), _ = finetune_transforms("--input_size", "32")
    assert isinstance(resize, transforms.Resize)
    assert isinstance(crop, transforms.RandomCrop)
    assert (resize.size, crop.padding, crop.size) == (32, 4, (32, 32))
    image: Any = Image.new("RGB", (32, 32))
    assert resize(image) is image
    for size in ((8, 8), (300, 200)):
        small: Any = Image.new("RGB", size)
        assert crop(resize(small)).size == (32, 32)


def test_attentive_probing_crops_and_flips_only():
    """Its recipe's --color_jitter 0 leaves a jitter that does nothing but draw, as upstream."""
    train, _ = finetune_transforms("--reprob", "0", "--color_jitter", "0", main=main_attentive)
    image: Any = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    own = [step for step in train if not isinstance(step, transforms.ColorJitter)]
    jitters = [step for step in train if isinstance(step, transforms.ColorJitter)]
    assert len(own) == 4
    for jitter in jitters:
        assert np.array_equal(np.asarray(jitter(image)), np.asarray(image))
    assert main_attentive.get_args_parser().parse_args([]).aa == ""


def test_mixup():
    parser = main_finetune.get_args_parser()
    small = ["--nb_classes", "3", "--batch_size", "4"]
    assert main_finetune.build_mixup(parser.parse_args(small)) is None
    for flags in (["--mixup", "0.8"], ["--cutmix", "1"], ["--cutmix_minmax", "0.2", "0.8"]):
        mixup = main_finetune.build_mixup(parser.parse_args([*small, "--smoothing", "0.2", *flags]))
        assert mixup is not None
        _, targets = mixup(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
        assert targets.shape == (4, 3)
        assert_close(targets.sum(dim=1), torch.ones(4), rtol=1e-5, atol=0)
        assert targets.min() == pytest.approx(0.2 / 3)
    with pytest.raises(distributed.UserError, match="--batch_size 5: Mixup and CutMix need an even number"):
        main_finetune.build_mixup(parser.parse_args(["--batch_size", "5", "--mixup", "0.8"]))


def test_attentive_probing_without_a_probe_is_fine_tuning_with_its_augmentation(monkeypatch):
    toy = ["--model", "cae_nano", "--input_size", "16", "--patch_size", "8", "--nb_classes", "5", "--device", "cpu"]
    seen: list[str] = []
    monkeypatch.setattr(main_finetune, "build_loaders", lambda args, *_: seen.append(args.aa))
    monkeypatch.setattr(main_finetune, "run", lambda *_, **__: None)
    for flags in ([], ["--enable_linear_eval"], ["--aa", "rand-m5"]):
        main_attentive.main(main_attentive.get_args_parser().parse_args([*toy, *flags]))
    assert seen == ["rand-m9-mstd0.5-inc1", "", "rand-m5"]


class Numbers(torch.utils.data.Dataset):
    """Images that know their number."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (1, 1)), index


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_attentive_evaluation_has_the_same_batches_on_any_number_of_processes(world, monkeypatch):
    """Those of 32 processes: r, r + 32, ... of each in turn, cut into full batches; every image once."""
    expected = [index for process in range(32) for index in range(process, 100, 32)]
    assert main_attentive.published_order(100) == expected
    assert sorted(expected) == list(range(100))
    batches: dict[int, list[int]] = {}
    for rank in range(world):
        monkeypatch.setattr("common.datasets.loader.world_size", lambda: world)
        monkeypatch.setattr("common.datasets.loader.rank", lambda rank=rank: rank)
        loader = datasets.Loader(
            Numbers(), transforms.ToTensor(), 6, CPU, False, num_workers=0, order=main_attentive.published_order
        )
        found = [targets.tolist() for _, targets in loader.batches()]
        assert len(found) == len(loader)
        batches |= {rank + i * world: batch for i, batch in enumerate(found)}
    assert [batches[i] for i in sorted(batches)] == [expected[i : i + 6] for i in range(0, 100, 6)]


@pytest.mark.parametrize(
    ("flags", "ordered"),
    [
        (["--enable_linear_eval", "--linear_type", "attentive"], True),
        (["--enable_linear_eval", "--linear_type", "attentive", "--eval_bn", "running"], False),
        (["--enable_linear_eval"], False),
    ],
)
def test_attentive_probing_orders_what_batch_statistics_see(flags, ordered, monkeypatch):
    orders = []
    monkeypatch.setattr(main_finetune, "build_loaders", lambda args, device, order=None: orders.append(order))
    monkeypatch.setattr(main_finetune, "run", lambda *_, **__: None)
    toy = ["--model", "cae_nano", "--input_size", "16", "--patch_size", "8", "--nb_classes", "5", "--device", "cpu"]
    main_attentive.main(main_attentive.get_args_parser().parse_args([*toy, *flags]))
    assert [order is main_attentive.published_order for order in orders] == [ordered]
