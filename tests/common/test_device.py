"""Views that tensors or the device make, against those of Pillow after the same draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import default_collate

from a2mim.data import PretrainTransform
from a2mim.masking_generator import BlockwiseMaskGenerator
from cae.augmentation import PretrainAugmentation
from cae.masking_generator import MaskingGenerator
from cae.models_dalle import map_pixels
from common import datasets, distributed
from common.datasets import device
from common.distributed import UserError
from saim import main_pretrain as saim
from semaim import main_pretrain as semaim
from tests.support.device_waits import NoWaiting, on_fake_gpu

CPU = torch.device("cpu")


def photograph(height: int, width: int, seed: int = 0) -> Any:
    """Blobs of colour and noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8))


def photographs_in(folder: Path, number: int, height: int, width: int) -> str:
    """A folder with that many photographs, each 9 pixels higher and 7 narrower than the one before."""
    for i in range(number):
        photograph(height + 9 * i, width - 7 * i, i).save(folder / f"{i}.png")
    return str(folder)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("name", device.FILTERS)
def test_resizing__is_pillows_but_for_rounding(name, monkeypatch):
    """Images of several sizes, made larger and smaller, whole and in stacks of few."""
    images = [photograph(*size) for size in ((90, 70), (33, 40), (32, 20), (5, 64))]
    batch = device.collate_decoded([datasets.decoded(image, flip=i % 2 == 1) for i, image in enumerate(images)])
    resampling = Image.Resampling[name.upper()]
    expected = torch.stack([pixels(image.resize((32, 32), resampling)) for image in images])
    expected[1::2] = expected[1::2].flip(3)
    found = datasets.resize_batch(batch, 32, name)
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.02
    monkeypatch.setattr(device, "STACK", 3 * 90 * 72)
    assert [part for part, _ in device.stacks(batch)] == [slice(0, 1), slice(1, 4)]
    assert torch.equal(datasets.resize_batch(batch, 32, name), found)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> str:
    return photographs_in(tmp_path_factory.mktemp("photographs"), 8, 40, 100)


def transform_of(method: str, augment: str) -> Any:
    statistics = datasets.IMAGENET_MEAN, datasets.IMAGENET_STD
    if method == "cae":
        return PretrainAugmentation(48, 24, map_pixels, MaskingGenerator(6, 18, 4), on_device=augment == "device")
    if method == "a2mim":
        return PretrainTransform(BlockwiseMaskGenerator(64, 32, 8, 0.6), 64, (0.67, 1.0), augment=augment)
    return {"saim": saim, "semaim": semaim}[method].pretrain_transform(48, *statistics, augment=augment)


def loader_of(method: str, folder: str, augment: str = "pillow") -> datasets.Loader:
    images = datasets.image_dataset(folder, True, False)
    collate = datasets.collate_decoded if augment == "device" else default_collate
    return datasets.Loader(images, transform_of(method, augment), 8, CPU, num_workers=0, collate=collate)


METHODS = ("saim", "semaim", "a2mim", "cae")


@pytest.mark.parametrize(("method", "way"), [*((m, "device") for m in METHODS), *((m, "tensor") for m in METHODS[:3])])
def test_views__are_those_of_pillow_but_for_a_level(photographs, method, way):
    """The same crops, flips and masks, in order, whatever makes the views; means and deviations are alike."""
    (batch, _), (expected, _) = (next(loader_of(method, photographs, x).batches(3)) for x in (way, "pillow"))
    found, wanted = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (batch, expected))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.ndim < 4:  # masks
            assert torch.equal(a, b)
            continue
        a, b = a.float(), b.float()
        for channel in range(3):
            level = b[:, channel].unique().diff().min()  # of 255, however it is normalised
            difference = ((a - b)[:, channel] / level).abs()
            assert difference.max() < {"tensor": 12, "device": 2.1}[way]
            assert difference.mean() < {"tensor": 0.3, "device": 0.15}[way]
            assert abs(a[:, channel].mean() - b[:, channel].mean()) < 0.2 * level
            assert abs(a[:, channel].std() - b[:, channel].std()) < 0.2 * level


@pytest.mark.parametrize("way", ["tensor", "device"])
def test_draws__leave_the_generator_where_pillows_leave_it(way):
    after = []
    for augment in ("pillow", way):
        torch.manual_seed(1)
        assert transform_of("saim", augment)(photograph(60, 80)).shape == (3, 48, 48)
        after.append(torch.rand(1).item())
    assert after[0] == after[1]


@pytest.mark.parametrize("method", METHODS)
def test_making_views__the_host_never_waits(photographs, method):
    loader = loader_of(method, photographs, "device")
    inner: Any = loader.loader
    batch = inner.collate_fn([inner.dataset[(0, index)] for index in range(4)])[0]
    finish: Callable = loader._finish
    distributed.constant.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = on_fake_gpu(batch)
        finish(batch)  # constants are copied once
        with NoWaiting("cuda"):
            made = finish(batch)
    distributed.constant.cache_clear()
    assert (made if isinstance(made, torch.Tensor) else made[0]).device.type == "cuda"


def saims_loader(folder: str, *flags: str) -> datasets.Loader:
    words = "--model saim_nano --query_depth 4 --input_size 48 --patch_size 8 --batch_size 8 --num_workers 0"
    args = saim.get_args_parser().parse_args([*words.split(), "--data_path", folder, *flags])
    return saim.build_data(args, CPU)[0]


def test_flag__a_run_on_any_number_of_workers_sees_the_same(photographs):
    expected, _ = next(loader_of("saim", photographs, "device").batches(1))
    for workers in ("0", "1"):
        loader = saims_loader(photographs, "--augment", "device", "--num_workers", workers)
        assert torch.equal(next(loader.batches(1))[0], expected)
    one: Any = loader.one_image()
    assert one[0].shape == (1, 3, 48, 48)


@pytest.mark.parametrize("way", ["tensor", "device"])
def test_images_of_other_channels__are_refused(photographs, way):
    with pytest.raises(UserError, match=f"--augment {way}: is for 8-bit RGB images, without --in_chans"):
        saims_loader(photographs, "--augment", way, "--in_chans", "3")


def test_random_filter__is_refused_on_the_device():
    with pytest.raises(ValueError, match="interpolation random: expected another one with --augment device"):
        PretrainAugmentation(48, 24, map_pixels, MaskingGenerator(6, 18, 4), "random", on_device=True)
