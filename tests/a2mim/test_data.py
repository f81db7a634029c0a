"""Masks, mixed batches, order and augmentation of images."""

import argparse
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, to_tensor

from a2mim import data, main_finetune, main_pretrain, mix
from a2mim.engine_pretrain import reconstruct
from a2mim.masking_generator import BlockwiseMaskGenerator, fill_mean
from a2mim.openmixup import resize_pos_embed
from common import datasets
from common.distributed import UserError
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.runs import CPU

SIZES = ("input_size", "mask_patch_size", "model_patch_size", "mask_ratio")


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the generator that is drawn from
    torch.manual_seed(value)


# ---- goldens


@golden_files("a2mim", "mask_generator")
def test_masks_match_upstream(path):
    ref = load_golden(path)
    assert ref.meta["cases"]
    for i, case in enumerate(ref.meta["cases"]):
        generator = BlockwiseMaskGenerator(**{k: case[k] for k in SIZES}, mask_color="mean")
        assert (generator.num_masked, generator.side, generator.scale) == tuple(
            case[k] for k in ("mask_count", "rand_size", "scale")
        )
        img = ref.group(f"in/{i}").get("img")
        seed(case["seed"])
        drawn = generator(img)
        given = generator(img, ref[f"in/{i}/perm"].numpy())
        for filled, mask in (drawn, given):
            ref.equal(f"out/{i}/mask", mask)
            if img is not None:
                ref.check(f"out/{i}/filled", filled, rtol=1e-4, atol=2e-5, what=f"case {i}")


@golden_files("a2mim", "mask_generator")
def test_fillings_of_pixels_match_upstream(path):
    """An image of uint8, twice with one generator: one draw per image."""
    ref = load_golden(path)
    case, img = ref.meta["pil"], ref["in/pil/img"].numpy()
    generator = BlockwiseMaskGenerator(**{k: case[k] for k in SIZES}, mask_color="mean")
    for view in (img, Image.fromarray(img)):
        seed(case["seed"])
        for i in (1, 2):
            filled, mask = generator(view)
            ref.equal(f"out/pil/mask{i}", mask)
            assert np.asarray(filled).dtype == np.uint8
            ref.check(f"out/pil/filled{i}", filled, rtol=0, atol=0)


@golden_files("a2mim", "mix_batch")
def test_mixed_batches_match_upstream(path):
    ref = load_golden(path)
    x, y = ref["in/x"], ref["in/y"]
    assert ref.meta["cases"]
    for i, case in enumerate(ref.meta["cases"]):
        draws = {"lam": ref[f"in/{i}/lam0"].item(), "perm": ref[f"in/{i}/perm"]}
        draws |= {k: ref[f"in/{i}/{k}"].item() for k in ("cx", "cy") if f"in/{i}/{k}" in ref}
        call = getattr(mix, case["mode"])
        np.random.seed(case["np_seed"])  # noqa: NPY002
        torch.manual_seed(case["torch_seed"])
        for mixed, (ya, yb, lam) in (call(x, y, case["alpha"]), call(x, y, case["alpha"], **draws)):
            ref.check(f"out/{i}/x", mixed, rtol=1e-5, atol=1e-6, what=f"case {i}")
            assert torch.equal(ya, y)
            ref.equal(f"out/{i}/yb", yb)
            ref.check(f"out/{i}/lam", lam, rtol=1e-9, atol=0)


@golden_files("a2mim", "mix_batch")
def test_choice_of_the_mix_matches_upstream(path, monkeypatch):
    ref = load_golden(path)
    if "mode_choice" not in ref.meta:
        pytest.skip("the file holds no choice")
    chosen: list[int] = []

    def record(kind: int):
        def call(x, y, alpha):
            chosen.append(kind)
            return x, (y, y, 1.0)

        return call

    monkeypatch.setattr(mix, "mixup", record(0))
    monkeypatch.setattr(mix, "cutmix", record(1))
    mixing = mix.Mix(0.8, 1.0)
    random.seed(int(re.findall(r"random\.seed\((\d+)\)", ref.meta["mode_choice"])[0]))
    for _ in ref.get("out/mode_choices", ()):
        mixing(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
    ref.check("out/mode_choices", chosen, rtol=0, atol=0)


@golden_files("a2mim", "data_misc")
def test_samplers_match_upstream(path):
    ref = load_golden(path)
    meta = ref.meta
    ranks = {name: expected for name, expected in ref.group("out").items() if "_rank" in name}
    for name, expected in ranks.items():
        kind, rank = name.split("_rank")
        images: Any = range(meta["N"])
        if kind == "dist":
            sampler: Any = data.ChunkSampler(images, meta["world"], int(rank), seed=meta["seed"])
        else:
            sampler = data.RepeatSampler(images, meta["world"], int(rank), num_repeats=meta["num_repeats"])
        sampler.set_epoch(meta["epoch"])
        found = [index if kind == "dist" else index[0] for index in sampler]
        assert found == expected.tolist(), name
        assert len(sampler) == len(found) == meta.get("lengths", {}).get(name, len(found))


@golden_files("a2mim", "data_misc")
def test_positions_match_upstream(path):
    ref = load_golden(path)
    if "pos" not in ref.meta:  # a file of samplers alone
        return
    if "out/pos/src" not in ref:
        return
    resized = resize_pos_embed(ref["out/pos/src"], ref.meta["pos"]["dst"], ref.meta["pos"]["src"])
    ref.check("out/pos/dst", resized, rtol=1e-4, atol=2e-5)


# ---- masks


@pytest.mark.parametrize(("size", "stride", "masked"), [(224, 16, 30), (192, 32, 22), (64, 4, 3), (96, 8, 6)])
def test_masks_are_blocks(size, stride, masked):
    generator = BlockwiseMaskGenerator(size, 32, stride, 0.6)
    seed(0)
    first, second = generator.mask(), generator.mask()
    assert first.shape == (size // stride, size // stride)
    assert first.dtype == np.int64
    blocks = first.reshape(size // 32, 32 // stride, size // 32, 32 // stride)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert blocks[:, 0, :, 0].sum() == masked == generator.num_masked
    assert (first != second).any()
    generator.mask(perm := np.arange((size // 32) ** 2))
    assert generator.mask(perm).reshape(-1)[0] == 1


@pytest.mark.parametrize("keywords", [{"mask_color": "zero"}, {"mask_color": "mean", "mask_only": True}])
def test_masks_alone_leave_the_image(keywords):
    img = torch.rand(3, 64, 64)
    out, mask = BlockwiseMaskGenerator(64, 32, 16, **keywords)(img)
    assert out is img
    assert mask.sum() > 0
    assert BlockwiseMaskGenerator(64, 32, 16, mask_color="mean")(None)[0] is None


def test_filling_is_the_mean_of_all_pixels():
    """The masked ones included, of each image and channel by itself; visible pixels stay."""
    imgs, mask = torch.randn(2, 3, 8, 8), torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 1]]])
    before = imgs.clone()
    for kind in (torch.int64, torch.uint8, torch.bool):
        filled = fill_mean(imgs, mask.to(kind))
        hidden = F.interpolate(mask[:, None].float(), (8, 8), mode="nearest").bool().expand_as(imgs)
        assert torch.equal(filled[~hidden], imgs[~hidden])
        assert torch.equal(filled[hidden], imgs.mean(dim=(2, 3), keepdim=True).expand_as(imgs)[hidden])
    assert torch.equal(imgs, before)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"input_size": 200}, "input_size 200, mask_patch_size 32"),
        ({"mask_patch_size": 24, "input_size": 240}, "expected each to be a multiple of the next"),
        ({"mask_color": "red"}, "mask_color red: expected mean or zero"),
    ],
)
def test_mask_generator__user_errors(keywords, words):
    with pytest.raises(ValueError, match=words):
        BlockwiseMaskGenerator(**keywords)


# ---- mixing


def test_mixup_is_linear():
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    perm = torch.tensor([1, 2, 3, 0])
    mixed, target = mix.mixup(x, y, 0.8, lam=0.3, perm=perm)
    assert_close(mixed, 0.3 * x + 0.7 * x.roll(-1, 0), rtol=1e-6, atol=1e-7)
    assert torch.equal(target[0], y)
    assert torch.equal(target[1], y.roll(-1))
    assert target[2] == 0.3


@pytest.mark.parametrize("center", [(0, 0), (4, 6), (7, 11), (3, 0)])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.75, 1.0])
def test_cutmix_pastes_a_box(center, lam):
    """The share of the labels is that of the pixels that are left."""
    x, y = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 12).clone(), torch.arange(4)
    given = x.clone()
    mixed, target = mix.cutmix(x, y, 1.0, lam=lam, perm=torch.tensor([1, 2, 3, 0]), cx=center[0], cy=center[1])
    assert torch.equal(x, given)
    own = (mixed == x).float()
    assert target[2] == pytest.approx(own.mean().item())
    assert torch.equal(mixed[own == 0], x.roll(-1, 0)[own == 0])
    rows, columns = (int(side * (1 - lam) ** 0.5) // 2 for side in (8, 12))
    pasted = 1 - own[0, 0]
    box = pasted[max(center[0] - rows, 0) : center[0] + rows, max(center[1] - columns, 0) : center[1] + columns]
    assert box.sum() == pasted.sum()
    assert box.numel() == box.sum()


def test_cutmix_avoids_fixed_points(monkeypatch):
    """Ten more tries; the last draw is kept whatever it is."""
    x, y = torch.rand(3, 3, 8, 8), torch.arange(3)
    tries = iter([torch.tensor(p) for p in ([0, 2, 1], [2, 1, 0], [1, 2, 0])])
    monkeypatch.setattr(torch, "randperm", lambda _n: next(tries))
    assert mix.cutmix(x, y, 1.0)[1][1].tolist() == [1, 2, 0]
    calls = []
    monkeypatch.setattr(torch, "randperm", lambda n: calls.append(n) or torch.arange(n))
    assert mix.cutmix(x, y, 1.0)[1][1].tolist() == [0, 1, 2]
    assert len(calls) == 11


def test_mix_with_one_of_both():
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    for alphas, name in (((0.8, 0.0), "mixup"), ((0.0, 1.0), "cutmix")):
        seed(5)
        mixed, (_, yb, lam) = mix.Mix(*alphas)(x, y)
        seed(5)
        random.random()
        expected, (_, other, share) = getattr(mix, name)(x, y, max(alphas))
        assert torch.equal(mixed, expected)
        assert torch.equal(yb, other)
        assert lam == share


def test_ft_loss():
    logits, ya, yb, lam = torch.randn(4, 6), torch.tensor([0, 1, 2, 3]), torch.tensor([5, 1, 0, 3]), 0.3

    def smoothed(y: Tensor) -> Tensor:
        target = 0.9 * F.one_hot(y, 6) + 0.1 / 6
        return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()

    found = mix.ft_loss(logits, (ya, yb, lam), "label_smooth")
    assert_close(found, lam * smoothed(ya) + (1 - lam) * smoothed(yb), rtol=1e-5, atol=0)
    assert_close(mix.ft_loss(logits, ya, "label_smooth"), smoothed(ya), rtol=1e-5, atol=0)
    plain = mix.ft_loss(logits, (ya, yb, lam), "label_smooth", smoothing=0.0)
    expected = lam * F.cross_entropy(logits, ya) + (1 - lam) * F.cross_entropy(logits, yb)
    assert_close(plain, expected, rtol=1e-5, atol=0)
    share = lam * F.one_hot(ya, 6) + (1 - lam) * F.one_hot(yb, 6)
    probability = logits.sigmoid()
    terms = -(share * probability.log() + (1 - share) * (1 - probability).log())
    assert_close(mix.ft_loss(logits, (ya, yb, lam), "bce"), terms.sum() / 4, rtol=1e-5, atol=0)
    assert mix.ft_loss(logits.bfloat16(), ya, "bce").dtype == torch.float32
    with pytest.raises(ValueError, match="loss mse: expected label_smooth or bce"):
        mix.ft_loss(logits, ya, "mse")


# ---- order of images


@pytest.mark.parametrize(("images", "world"), [(10, 4), (8, 2), (3, 8), (7, 1)])
def test_chunks_are_contiguous(images, world):
    """Of the epoch's permutation, padded from its beginning."""
    own = []
    for rank in range(world):
        sampler = data.ChunkSampler(range(images), world, rank, seed=3)  # type: ignore[arg-type]
        sampler.set_epoch(2)
        own.append(list(sampler))
        assert len(own[-1]) == len(sampler) == -(-images // world)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(5)).tolist()
    everything = sum(own, [])
    assert everything == (order * world * 2)[: len(everything)]
    sampler = data.ChunkSampler(range(images), world, 0, seed=3)  # type: ignore[arg-type]
    other = list(sampler)
    assert images <= 3 or other != own[0], "epochs differ"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_repeats_tell_their_copies(world):
    """Each image thrice in a row over the ranks, as copies 0, 1 and 2; an epoch sees a third of the images."""
    ranks = []
    for rank in range(world):
        sampler = data.RepeatSampler(range(512), world, rank)  # type: ignore[arg-type]
        sampler.set_epoch(1)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == 512 // world
    seen = [item for items in zip(*ranks, strict=True) for item in items]
    assert len(set(seen)) == len(seen)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1)).tolist()
    assert seen == [(order[i // 3], i % 3) for i in range(512)]


class Noise(torch.utils.data.Dataset):
    """Images of one constant gradient, by index."""

    samples: list = []

    def __init__(self, n: int = 12):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        ramp = np.linspace(0, 200, 64)[:, None, None] + np.linspace(0, 50, 64)[None, :, None]
        return Image.fromarray(np.uint8(ramp * np.ones(3))), index


def loader_args(*flags: str) -> argparse.Namespace:
    return main_finetune.get_args_parser().parse_args(["--num_workers", "0", "--batch_size", "4", *flags])


def test_repeats_of_few_images__with_the_oldest_timm(monkeypatch):
    """Its sampler counts whole rounds of selected_round images, unless that is 0."""

    plain = data.RepeatAugSampler.__init__

    def oldest(self, dataset, num_replicas, rank, num_repeats=3, selected_round=256):
        plain(self, dataset, num_replicas, rank, num_repeats=num_repeats, selected_round=selected_round)
        taken = len(dataset) // selected_round * selected_round if selected_round else len(dataset)
        self.num_selected_samples = taken // num_replicas

    monkeypatch.setattr(data.RepeatAugSampler, "__init__", oldest)
    assert len(list(data.RepeatSampler(range(100), 2, 0))) == 50  # type: ignore[arg-type]


@pytest.mark.parametrize("repeated", [False, True])
def test_batches(repeated):
    """Copies of an image are augmented each in its own way; the last batch of an epoch is smaller; epochs repeat."""
    transform = data.finetune_transform("plain", 32)
    loader = data.train_loader(loader_args("--seed", "7"), Noise(10), transform, CPU, repeated=repeated)
    batches = list(loader.batches(1))
    assert [len(targets) for _, targets in batches] == [4, 4, 2]
    assert len(loader) == 3
    imgs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1 if repeated else 7 + 1)).tolist()
    assert targets.tolist() == ([order[i // 3] for i in range(10)] if repeated else order)
    assert len({img.numpy().tobytes() for img in imgs}) == len(imgs), "of equal images, every crop is another"
    for (first, _), (second, _) in zip(batches, loader.batches(1), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(next(loader.batches(2))[0], batches[0][0])
    rest = list(loader.batches(1, start=1))
    assert torch.equal(rest[0][0], batches[1][0]), "an epoch can be entered"


# ---- which images


@pytest.fixture
def listed(tmp_path) -> Path:
    """data/ImageNet with upstream's list files in data/meta/ImageNet: flat validation images, others not listed."""
    root, meta = tmp_path / "data" / "ImageNet", tmp_path / "data" / "meta" / "ImageNet"
    meta.mkdir(parents=True)
    for split in ("train/n01", "train/n02", "val"):
        (root / split).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(root / split / f"{i}.png")
    (meta / "train_full.txt").write_text("n01/0.png\nn02/1.png\n")
    (meta / "train_labeled_full.txt").write_text("n01/0.png 0\nn02/1.png 1\nn02/2.png 1\n")
    (meta / "val_labeled.txt").write_text("2.png 1\n0.png 0\n")
    return root


def test_list_files(listed):
    args = loader_args("--data_path", str(listed))
    found = {
        key: [(Path(path).relative_to(listed).as_posix(), label) for path, label in data.images(args, *key).samples]
        for key in ((True, False), (True, True), (False, True))
    }
    assert found[True, False] == [("train/n01/0.png", 0), ("train/n02/1.png", 0)]
    assert found[True, True] == [("train/n01/0.png", 0), ("train/n02/1.png", 1), ("train/n02/2.png", 1)]
    assert found[False, True] == [("val/2.png", 1), ("val/0.png", 0)]
    image, label = data.images(args, False, True)[0]
    assert (image.size, label) == ((8, 8), 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n01/0.png\nn02/1.png 1\n", "line 1: expected '<path> <class index>'"),
        ("n01/0.png 0\nn02/1.png one\n", "line 2: expected '<path> <class index>'"),
        ("", "line 1: expected '<path> <class index>'"),
        ("nowhere.png 0\n", "nowhere.png is not in "),
    ],
)
def test_list_files__user_errors(listed, text, words):
    lists = listed.parent / "meta" / "ImageNet" / "train_labeled_full.txt"
    lists.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        data.images(loader_args("--data_path", str(listed)), True, True)
    assert str(error.value).startswith(str(lists))
    assert "\n" not in str(error.value)


def test_folders_without_lists(listed):
    for lists in (listed.parent / "meta" / "ImageNet").iterdir():
        lists.unlink()
    args = loader_args("--data_path", str(listed))
    assert [label for _, label in data.images(args, True, True).samples] == [0, 0, 0, 1, 1, 1]
    assert len(data.images(args, True, False)) == 6
    with pytest.raises(UserError, match="but no class folders"):
        data.images(args, False, True)


def test_digits_are_folders(digits):
    args = loader_args("--data_path", digits)
    assert len(data.images(args, True, False)) == len(data.images(args, True, True)) == 48
    assert len(data.images(args, False, True)) == 20


# ---- transforms


def photo(side: tuple[int, int] = (90, 70)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(side, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("stride", [4, 16, 32])
def test_pretraining_views(stride):
    transform: Any = data.PretrainTransform(BlockwiseMaskGenerator(64, 32, stride), 64, (0.67, 1.0))
    seed(0)
    pixels, mask = transform(photo())
    assert (pixels.shape, pixels.dtype) == ((3, 64, 64), torch.uint8)
    assert (mask.shape, mask.dtype) == ((64 // stride, 64 // stride), torch.uint8)
    assert mask.sum() == 3 * (32 // stride) ** 2
    again = transform(photo())
    assert not torch.equal(again[0], pixels)
    crop, flip, _ = transform.augment.transforms
    assert (crop.scale, crop.ratio, crop.interpolation) == ((0.67, 1.0), (3 / 4, 4 / 3), InterpolationMode.BILINEAR)
    assert flip.p == 0.5


def test_pretraining_draws_in_upstreams_order():
    """Crop and flip from torch's generator; the mask from NumPy's, one permutation per image."""
    generator = BlockwiseMaskGenerator(64, 32, 16)
    transform = data.PretrainTransform(generator, 64, (0.8, 1.0))
    seed(3)
    pixels, mask = transform(photo())
    seed(3)
    crop = transforms.RandomResizedCrop(64, (0.8, 1.0), interpolation=InterpolationMode.BILINEAR)
    expected = transforms.RandomHorizontalFlip()(crop(photo()))
    assert torch.equal(pixels, pil_to_tensor(expected))
    assert torch.equal(mask, generator(perm=np.random.permutation(4))[1])  # noqa: NPY002


def test_normalize_is_to_tensor_and_normalize():
    imgs = [photo((32, 32)), photo((32, 32)).rotate(90)]
    plain: Any = transforms.Compose([transforms.ToTensor(), *datasets.tensor_and_normalize()[1:]])
    expected = torch.stack([plain(img) for img in imgs])
    pixels = torch.stack([pil_to_tensor(img) for img in imgs])
    assert_close(data.normalize(pixels), expected, rtol=1e-5, atol=1e-6)
    assert data.normalize(expected) is expected
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert_close(expected[0], (to_tensor(imgs[0]) - mean) / std, rtol=1e-5, atol=1e-6)


def test_swin_augmentation_is_timms():
    transform = data.finetune_transform("swin", 64)
    crop, flip, policy, *_, erasing = transform.transforms
    assert tuple(crop.scale) == (0.08, 1.0)
    assert crop.interpolation == InterpolationMode.BICUBIC
    assert flip.p == 0.5
    assert isinstance(policy, RandAugment)
    assert (policy.num_layers, policy.ops[0].magnitude, policy.ops[0].hparams["magnitude_std"]) == (2, 9, 0.5)
    assert isinstance(erasing, RandomErasing)
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.25, "pixel", 1)
    seed(0)
    views = torch.stack([transform(photo()) for _ in range(8)])
    assert (views.shape, views.dtype) == ((8, 3, 64, 64), torch.float32)
    assert torch.equal(data.normalize(views), views)


@pytest.mark.parametrize("level", [6, 7])
def test_rsb_augmentation(level):
    transform = data.finetune_transform("rsb", 64, level)
    crop, flip, policy, _ = transform.transforms
    assert (tuple(crop.scale), crop.interpolation, flip.p) == ((0.08, 1.0), InterpolationMode.BICUBIC, 0.5)
    assert isinstance(policy, RandAugment)
    assert (policy.num_layers, len(policy.ops)) == (2, 15)
    for op in policy.ops:
        assert (op.magnitude, op.prob, op.hparams["magnitude_std"]) == (level, 0.5, 0.5)
        assert op.kwargs["fillcolor"] == (104, 116, 124)  # as upstream, blue, green and red of ImageNet
        assert op.kwargs["resample"] == Image.Resampling.BICUBIC
    seed(0)
    views = torch.stack([transform(photo()) for _ in range(8)])
    assert (views.shape, views.dtype) == ((8, 3, 64, 64), torch.uint8)
    assert not torch.equal(views[0], views[1])


def test_plain_augmentation():
    transform = data.finetune_transform("plain", 64)
    seed(2)
    view = transform(photo())
    seed(2)
    crop = transforms.RandomResizedCrop(64, interpolation=InterpolationMode.BICUBIC)
    expected = transforms.RandomHorizontalFlip()(crop(photo()))
    assert torch.equal(view, pil_to_tensor(expected))


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="aug a2: expected swin, rsb or plain"):
        data.finetune_transform("a2", 224)


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (236, 224), (40, 32)])
def test_evaluation_views(resize, crop):
    img = photo((300, 400))
    steps = [transforms.Resize(resize, InterpolationMode.BICUBIC), transforms.CenterCrop(crop)]
    view: Any = data.eval_transform(resize, crop)(img)
    assert torch.equal(view, pil_to_tensor(transforms.Compose(steps)(img)))
    assert view.shape == (3, crop, crop)


# ---- what the network is given


class Spy(torch.nn.Module):
    def forward(self, img, mask, target):
        return {"loss": img.sum(), "img": img, "given": target, "seen_mask": mask}


@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize("filled_target", [False, True])
def test_network_is_given_filled_images(fills, filled_target):
    """A2MIM: filled images, and whole ones to reconstruct; SimMIM: whole ones, masked inside of the network."""
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mask = torch.stack([torch.from_numpy(BlockwiseMaskGenerator(64, 32, 16).mask()) for _ in range(2)]).to(torch.uint8)
    out = reconstruct(Spy(), ([pixels, mask], torch.zeros(2)), fills=fills, filled_target=filled_target)
    imgs = data.normalize(pixels)
    filled = BlockwiseMaskGenerator(64, 32, 16, mask_color="mean")
    expected = torch.stack([fill_mean(img, one) for img, one in zip(imgs, mask, strict=True)])
    assert filled.fills
    assert_close(out["img"], expected if fills else imgs, rtol=1e-5, atol=1e-6)
    assert torch.equal(out["given"], out["img"] if filled_target else imgs)
    assert torch.equal(out["seen_mask"], mask)


@pytest.mark.parametrize(
    ("flags", "context"),
    [
        (["--method", "a2mim", "--mask_color", "mean"], (True, False)),
        (["--method", "simmim", "--mask_color", "zero"], (False, False)),
        (["--method", "simmim", "--mask_color", "mean"], (True, True)),
    ],
)
def test_pretraining_batches(flags, context, digits):
    own = ["--data_path", digits, "--input_size", "64", "--batch_size", "20", "--num_workers", "0"]
    args = main_pretrain.get_args_parser().parse_args([*flags, *own, "--backbone", "resnet_nano", "--mask_layer", "3"])
    loader, given = main_pretrain.build_data(args, CPU)
    assert given == {"fills": context[0], "filled_target": context[1]}
    batches = list(loader.batches())
    assert [len(targets) for _, targets in batches] == [20, 20, 8]
    (pixels, mask), _ = batches[0]
    assert (pixels.shape, mask.shape) == ((20, 3, 64, 64), (20, 4, 4))
    assert (pixels.dtype, mask.dtype) == (torch.uint8, torch.uint8)
    assert len({m.numpy().tobytes() for m in mask}) > 1
