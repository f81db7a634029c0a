"""Views that the device makes, against those of Pillow after the same draws."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import functional as tf

from common import datasets, distributed
from tests.common.test_device import photograph, photographs_in, pixels
from tests.support.device_waits import NoWaiting, on_fake_gpu
from udi import main_pretrain
from udi.udi_augmentation import Photometric
from udi.views_on_device import CHANGES, DrawnPhotometric, blur, luma, photometric

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> str:
    return photographs_in(tmp_path_factory.mktemp("photographs"), 6, 70, 130)


def loader_of(folder: str, *flags: str) -> datasets.Loader:
    words = "--arch vit_nano --patch_size 8 --global_size 48 --local_size 32 --batch_size 6 --num_workers 0"
    args = main_pretrain.get_args_parser().parse_args([*words.split(), "--data_path", folder, *flags])
    return main_pretrain.build_loader(args, CPU)


def seed(k: int) -> None:
    random.seed(k)
    torch.manual_seed(k)


ADJUST: Any = (tf.adjust_brightness, tf.adjust_contrast, tf.adjust_saturation, tf.adjust_hue)


@pytest.mark.parametrize("which", range(4))
def test_change__is_pillows_but_for_rounding(which):
    """Hues have 8 bits, one of which may be 6 levels of a colour; others are equal but for one level."""
    image: Any = photograph(40, 50)
    found, expected = [], []
    for amount in (-0.1, 0.03, 0.1) if which == 3 else (0.6, 0.97, 1.4):
        expected.append(pixels(ADJUST[which](image, amount)))
        found.append(CHANGES[which](pixels(image).float()[None], torch.full((1, 1, 1, 1), amount))[0])
    difference = (torch.stack(found) - torch.stack(expected)).abs()
    assert difference.max() <= (6 if which == 3 else 1)
    assert (difference > 0).float().mean() < 0.01
    assert torch.equal(luma(pixels(image).float()[None])[0, 0], pixels_of_grey(image))


def pixels_of_grey(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("L"))).float()


def test_blur__is_pillows_but_for_a_level():
    image, radii = photograph(40, 40), [0.1, 0.4, 0.9, 1.3, 2.0]
    found = blur(pixels(image).float().expand(5, -1, -1, -1), np.array(radii))
    expected = torch.stack([pixels(image.filter(ImageFilter.GaussianBlur(radius))) for radius in radii])
    assert (found - expected).abs().max() <= 2
    assert (found - expected).abs().mean() < 0.02


def test_photometric__all_changes_as_drawn():
    """The same draws in the same order, and the generators stand where the views of Pillow leave them."""
    image, views, drawn, expected = photograph(48, 48), [], [], []
    for k in range(40):
        for made, augment in ((expected, Photometric()), (drawn, DrawnPhotometric())):
            seed(k)
            made.append(augment(image if made is expected else [0.0] * 6))
            views.append((random.random(), torch.rand(1).item()))
    assert views[::2] == views[1::2]
    found = photometric(pixels(image).float().expand(40, -1, -1, -1).clone(), np.array(drawn))
    difference = (found - torch.stack([pixels(view) for view in expected])).abs()
    assert difference.mean() < 0.2
    assert difference.amax(dim=(1, 2, 3)).median() <= 3


def test_views__are_those_of_pillow(photographs):
    """Twelve crops of the same places in the same colours, and the same correspondence maps."""
    flags = ("--local_crops_number", "10")
    (found, _), (expected, _) = (
        next(loader_of(photographs, *flags, *f).batches(2)) for f in (("--augment", "device"), ())
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found.keys() - {"crops"})
    assert len(found["crops"]) == 12
    for a, b in zip(found["crops"], expected["crops"], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = a.float(), b.float()
        assert (a - b).abs().mean() < 0.5
        assert ((a - b).abs() > 8).float().mean() < 0.01
        assert (a.mean(dim=(0, 2, 3)) - b.mean(dim=(0, 2, 3))).abs().max() < 0.3
        assert (a.std(dim=(0, 2, 3)) - b.std(dim=(0, 2, 3))).abs().max() < 0.3


def test_views__by_statistics_of_ones_own_and_without_local_crops(photographs):
    statistics = ["--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2"]
    flags = ["--augment", "device", "--local_crops_number", "0", *statistics]
    found, _ = next(loader_of(photographs, *flags).batches())
    assert [crop.dtype for crop in found["crops"]] == [torch.float32] * 2
    assert -2.51 < found["crops"][0].min() < 0 < found["crops"][0].max() < 2.51


def test_making_views__the_host_never_waits(photographs):
    loader = loader_of(photographs, "--augment", "device", "--local_crops_number", "1")
    inner: Any = loader.loader
    batch = inner.collate_fn([inner.dataset[(0, index)] for index in range(2)])[0]
    distributed.constant.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = on_fake_gpu(batch)
        with NoWaiting("cuda"):
            made = loader._finish(batch)
    assert {crop.device.type for crop in made["crops"]} == {"cuda"}
