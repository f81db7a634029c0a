"""Views, their geometry and correspondence against the authors' numbers, and what training makes of them."""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from common import datasets
from common.distributed import Position
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.udi.test_models_udi import tol
from udi.udi_augmentation import DataAugmentation, Photometric, RandomCropCoord, collate, expand

RATIO = (3 / 4, 4 / 3)


def augmentation_of(ref) -> DataAugmentation:
    """The augmentation of a golden."""
    c = ref.meta["config"]
    scales = tuple(c["gscale"]), tuple(c["lscale"])
    sizes = c["nl"], c["gs"], c["ls"], c["wg"], c["wl"], c["p"]
    return DataAugmentation(*scales, *sizes, horizontal_flip=ref.meta["horizontal_flip"])


def seed(value: int) -> None:
    random.seed(value)
    torch.manual_seed(value)


@golden_files("udi", "augmentation")
def test_sampling_masks(path):
    ref = load_golden(path)
    augment, c = augmentation_of(ref), ref.meta["config"]
    sizes: dict[str, Any] = {
        "sampling_mask/g": (c["gs"] // c["p"], c["wg"]),
        "sampling_mask/l": (c["ls"] // c["p"], c["wl"]),
    }
    sizes |= {n: tuple(map(int, n.split("_")[2:])) for n in {k.split("/")[1] for k in ref.arrays if "mask_" in k}}
    for name, (features, window) in sizes.items():
        for k, expected in ref.group(f"out/{name}").items():
            seed(ref.meta["seed"] + int(k))
            assert_close(augment._sampling_mask(features, window), expected, 0, 0, what=f"{name} {k}")


@golden_files("udi", "augmentation")
def test_crops(path):
    ref = load_golden(path)
    c = ref.meta["config"]
    scales = (tuple(c["gscale"]), tuple(c["lscale"]))
    crop = RandomCropCoord(c["gs"], scales[0])
    for with_reference, name in ((False, "crop_params"), (True, "crop_params_ref")):
        for row, values in enumerate(ref.get(f"out/{name}", np.empty(0)).tolist()):
            width, height, number, scale, *expected = map(int, values)
            img = Image.new("RGB", (width, height))
            random.seed(number)
            if with_reference:
                found = crop.get_params_ref(img, scales[scale], RATIO, ref[f"in/ref/{row:02d}"].numpy())
            else:
                found = crop.get_params(img, scales[scale], RATIO)
            assert list(found) == [*expected, height, width], (name, row)


@golden_files("udi", "augmentation")
def test_maps(path):
    ref = load_golden(path)
    augment = augmentation_of(ref)
    cases = sorted({k.split("/")[2] for k in ref.arrays if k.startswith("in/map/")})
    assert cases
    for case in cases:
        given, out = ref.group(f"in/map/{case}"), f"out/map/{case}"
        src_crop, tgt_crop, mask = (given[k].numpy() for k in ("src_crop", "tgt_crop", "mask"))
        src, tgt = augment._create_map(src_crop, tgt_crop, mask.astype(bool))
        ref.check(f"{out}/src_maps", src, **tol(ref))
        ref.check(f"{out}/tgt_maps", tgt, **tol(ref))
        ref.check(f"{out}/isec", augment._crop_intersection(src_crop, tgt_crop), **tol(ref))


@golden_files("udi", "augmentation")
def test_whole_calls(path):
    ref = load_golden(path)
    augment = augmentation_of(ref)
    normal = transforms.Compose(datasets.tensor_and_normalize())
    offset = int(re.findall(r"seed\(seed\+(\d+)\+k\)", ref.meta["call"])[0])
    for k, image in ref.group("in/image").items():
        seed(ref.meta["seed"] + offset + int(k))
        views, coords, pairs = augment.views(Image.fromarray(image.numpy()))
        out = f"out/call/{k}"
        for i, crop in enumerate(coords):
            ref.check(f"{out}/coords/{i}", crop, **tol(ref))
        for i, view in enumerate(views):
            ref.check(f"{out}/crops/{i}", normal(view), rtol=0, atol=0.05)
        maps = [augment._create_map(coords[source], coords[target], mask) for source, target, mask in pairs]
        sources = [src for src, _ in maps]
        for i, src in enumerate([*sources[:2], *sources[2::2], *sources[3::2]]):  # all to view 1, then all to view 0
            ref.check(f"{out}/src_maps/{i}", src, **tol(ref))
        for i, (_, tgt) in enumerate(maps):
            ref.check(f"{out}/tgt_maps/{i}", tgt, **tol(ref))


def test_correspondence__decides_at_the_border_as_upstream():
    """What lies strictly inside the other view, by the float32 values of torch.linspace, for 10,000 pairs of boxes."""
    augment = DataAugmentation((0.25, 1.0), (0.05, 0.25), 0)
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(0, (375, 500), (2, 10_000, 2, 2)), axis=2)  # first and last row and column
    crops = (ends / (374, 499)).astype(np.float32).reshape(2, 10_000, 4)
    crops[:, ::2] = crops[:, ::2, [0, 3, 2, 1]]  # flipped
    first, second = torch.from_numpy(crops)[:, :, None]
    line = torch.linspace(0, 1, 14)
    grid = torch.cartesian_prod(line, line)  # (196, 2)
    place = first[..., :2] + grid * (first[..., 2:] - first[..., :2])
    low, high = torch.minimum(second[..., :2], second[..., 2:]), torch.maximum(second[..., :2], second[..., 2:])
    shown = ((place > low) & (place < high)).all(dim=2)
    found = augment.correspondence(crops[0], crops[1], np.ones(196, bool))
    assert found.count.tolist() == shown.sum(dim=1).tolist()
    assert found.token[found.token >= 0].tolist() == shown.nonzero()[:, 1].tolist()


# ---- batches


def picture(size: tuple[int, int] = (60, 50)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.mark.parametrize("nl", [0, 3])
def test_batches_hold_the_dense_maps(nl):
    """Compact correspondence, expanded on the device, equals the maps of every image."""
    augment = DataAugmentation((0.25, 1.0), (0.05, 0.25), nl, 28, 16, 3, 2, 4)
    images, batch = [picture(), picture((40, 70)), picture((33, 33))], []
    expected_src, expected_tgt = [], []
    for k, img in enumerate(images):
        seed(k)
        _, coords, pairs = augment.views(img)
        maps = [augment._create_map(coords[a], coords[b], mask) for a, b, mask in pairs]
        expected_src.append([src for src, _ in maps[:2]])
        expected_tgt.append([np.concatenate([tgt for _, tgt in maps[view::2]]) for view in (0, 1)])
        seed(k)
        batch.append(augment(img))
    found = expand(collate(batch), 4)
    assert [tuple(x.shape) for x in found["crops"]] == [(3, 3, 28, 28)] * 2 + [(3, 3, 16, 16)] * nl
    for view in (0, 1):
        assert_close(found["src_maps"][view], np.stack([src[view] for src in expected_src]), 0, 0)
        assert_close(found["tgt_maps"][view], np.stack([tgt[view] for tgt in expected_tgt]), 1e-6, 1e-7)
    sums = torch.cat(found["src_maps"]).sum(-1).flatten()
    assert torch.equal(found["rows"][0], sums.nonzero()[:, 0])
    assert torch.equal(found["rows"][1], torch.cat(found["tgt_maps"]).sum(-1).flatten().nonzero()[:, 0])


def test_matched_patches_show_the_same_pixels():
    """A patch that is sampled in one view lies in the other where the bilinear weights say (no photometric changes)."""
    gradient = np.linspace(0, 255, 120)
    pixels = np.stack([np.tile(gradient, (120, 1)), np.tile(gradient[:, None], (1, 120)), np.zeros((120, 120))], -1)
    img = Image.fromarray(pixels.astype(np.uint8))
    augment = DataAugmentation((0.3, 0.8), (0.05, 0.25), 0, 56, 16, 1, 2, 4)
    augment.photometric = lambda view: view  # type: ignore[assignment]
    checked = 0
    for k in range(6):
        seed(k)
        views, coords, pairs = augment.views(img)
        values = [np.asarray(v, float) for v in views]
        # Patch (i, j) stands for the point (i, j) / 13 of the view, not for the middle of its pixels.
        points = [v[np.ix_(*[np.rint(np.linspace(0, 55, 14)).astype(int)] * 2)].reshape(196, 3) for v in values]
        src, tgt = augment._create_map(coords[0], coords[1], pairs[0][2])
        n = int(src.sum())
        checked += n
        assert np.abs(src[:n] @ points[0] - tgt[:n] @ points[1]).max(initial=0) < 8
    assert checked > 50


def test_local_crops_overlap_the_views():
    """Every local crop shares a quarter of its area with the box around both views (in steps of a pixel)."""
    augment = DataAugmentation(
        (0.25, 1.0), (0.05, 0.25), 8, 28, 16, 3, 2, 4, horizontal_flip=0, fix_crop_reference=True
    )
    for k in range(20):
        seed(k)
        _, coords, _ = augment.views(picture((100, 100)))
        box = augment._crop_intersection(*coords[:2])
        for crop in coords[2:]:
            sides = np.minimum(crop[2:], box[2:]) - np.maximum(crop[:2], box[:2])
            assert (sides >= 0.5 * np.minimum(crop[2:] - crop[:2], box[2:] - box[:2]) - 0.03).all()


def test_photometric__solarisation_is_pillows():
    img = picture((40, 30)).convert("RGB")
    assert Photometric.solarize(img).tobytes() == ImageOps.solarize(img).tobytes()


def test_photometric__draws_also_where_a_blur_is_certain():
    """One draw for the branch, one for the strength, one for the blur and one for its radius."""
    img = picture((16, 16)).convert("RGB")
    photometric = Photometric()
    photometric.colour = lambda view: view  # type: ignore[assignment]
    counts = set()
    for k in range(50):
        random.seed(k)
        photometric(img)
        after = random.random()
        random.seed(k)
        draws = [random.random() for _ in range(8)]
        counts.add(draws.index(after))
    assert counts <= {3, 4}


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((30, 16, 3, 2, 4), "30 and 16 pixels"),
        ((28, 16, 8, 2, 4), "windows of 8"),
        ((28, 16, 3, 0, 4), "and 0 patches"),
    ],
)
def test_augmentation__raises_on_sizes(sizes, match):
    with pytest.raises(ValueError, match=match):
        DataAugmentation((0.25, 1.0), (0.05, 0.25), 2, *sizes)


def test_tiny_images_are_cropped():
    augment = DataAugmentation((0.25, 1.0), (0.05, 0.25), 2, 28, 16, 3, 2, 4)
    for size in ((1, 1), (1, 40), (8, 3)):
        for k in range(5):
            seed(k)
            collate([augment(picture(size))])


def test_loader__order_and_views_depend_on_seed_epoch_and_index_only(digits):
    """Two loaders, one of them entered inside the epoch."""
    augment = DataAugmentation((0.25, 1.0), (0.05, 0.25), 2, 28, 16, 3, 2, 4)
    images = datasets.image_dataset(digits, True, False)
    loaders = [datasets.Loader(images, augment, 8, torch.device("cpu"), num_workers=n, collate=collate) for n in (0, 1)]
    whole, tail = list(loaders[0].batches(3)), list(loaders[1].batches(3, 4))
    assert loaders[0].start(Position(3, 32, [{}]))[0] == 4
    for (a, _), (b, _) in zip(whole[4:], tail, strict=True):
        assert torch.equal(a["crops"][0], b["crops"][0])
        assert torch.equal(a["rows_t"], b["rows_t"])
