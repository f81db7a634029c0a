"""Data: what is read, in which order, with which random draws, and what users are told."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torchvision import transforms

from common import datasets
from common.datasets import Loader
from common.datasets.loader import _ignore_signals
from common.distributed import Position, UserError
from saim.main_pretrain import pretrain_transform
from tests.support.helpers import assert_close, golden_files, load_golden

CPU = torch.device("cpu")
SIZE = 16


def image_of(ref) -> Any:  # the transforms are typed to return what they are given
    return Image.fromarray(ref["in/image"].numpy())


@golden_files("saim", "transforms")
def test_eval_transforms(path):
    ref = load_golden(path)
    for name in [k.removeprefix("out/") for k in ref.arrays if k.startswith("out/val/") and not k.endswith("/mean")]:
        size = int(name.split("/")[1])
        out = datasets.eval_transform(size)(image_of(ref))
        step = 9 if size >= 64 else 1
        ref.check(f"out/{name}", out[:, ::step, ::step], rtol=0, atol=2e-2, what=name)
        ref.check(f"out/{name}/mean", out.mean(dim=(1, 2)), rtol=0, atol=2e-2, what=name)
    out = datasets.eval_transform(224)(image_of(ref))
    ref.check("out/linprobe_val", out[:, ::8, ::8], rtol=0, atol=2e-2)
    ref.check("out/linprobe_val/mean", out.mean(dim=(1, 2)), rtol=0, atol=2e-2)


@golden_files("saim", "transforms")
def test_one_attempt_crop(path):
    ref = load_golden(path)
    for seed, *box in ref.get("out/linprobe_crop", torch.empty(0)).tolist():
        torch.manual_seed(seed)
        got = datasets.RandomResizedCrop.get_params(image_of(ref), [0.08, 1], [3 / 4, 4 / 3])
        assert list(got) == box, seed


@golden_files("saim", "transforms")
def test_train_transforms(path):
    import random

    ref = load_golden(path)
    makers = {
        "pretrain": pretrain_transform,
        "linprobe_train": datasets.probe_transform,
        "finetune_train": datasets.finetune_transform,
    }
    seen = set()
    for key in [k for k in ref.arrays if "_seed" in k]:
        stage, seed = key.removeprefix("out/").split("_seed")
        expected = ref[key]
        torch.manual_seed(int(seed))
        random.seed(int(seed))
        np.random.seed(int(seed))  # noqa: NPY002
        assert_close(makers[stage](expected.shape[-1])(image_of(ref)), expected, rtol=0, atol=2e-2, what=key)
        seen.add(stage)
    assert seen == set(makers)


def test_posterize_to_zero_bits_gives_black():
    steps = datasets.finetune_transform(24, aa="rand-m10-inc1").transforms
    ops = [op for step in steps for op in getattr(step, "ops", []) if isinstance(op, AugmentOp)]
    (posterize,) = [op for op in ops if op.name.startswith("Posterize")]
    image = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    assert np.asarray(posterize.aug_fn(image, 0)).max() == 0
    assert np.asarray(posterize.aug_fn(image, 1)).max() == 128
    posterize.prob = 1.0
    posterize.magnitude = 10
    posterize.magnitude_std = 0
    assert np.asarray(posterize(image)).max() == 0


# ---- the loader


def loader(root: str, **kwargs) -> Loader:
    train = kwargs.setdefault("train", True)
    images = datasets.image_dataset(root, train)
    transform = datasets.finetune_transform(SIZE) if train else datasets.eval_transform(SIZE)
    return Loader(images, transform, kwargs.pop("batch_size", 8), CPU, **kwargs)


def epoch_of(loader: Loader, epoch: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader.batches(epoch, start))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def test_batches_depend_on_seed_epoch_and_index_only(digits):
    """Equal for 0, 2 and 8 workers and whatever was drawn before; different in another epoch or with another seed."""
    reference = [epoch_of(loader(digits, num_workers=0), epoch) for epoch in (0, 1)]
    for workers in (2, 8):
        other = loader(digits, num_workers=workers)
        torch.rand(7)
        for epoch in (1, 0):
            images, targets = epoch_of(other, epoch)
            assert torch.equal(images, reference[epoch][0])
            assert torch.equal(targets, reference[epoch][1])
    assert not torch.equal(reference[0][0], reference[1][0])
    assert not torch.equal(epoch_of(loader(digits, num_workers=0, seed=1), 0)[0], reference[0][0])


def test_epoch_can_be_entered_inside(digits):
    whole = epoch_of(loader(digits, num_workers=0), 3)
    rest = epoch_of(loader(digits, num_workers=2), 3, start=4)
    assert torch.equal(whole[0][32:], rest[0])
    assert torch.equal(whole[1][32:], rest[1])


def test_batches_are_normalised_on_the_device__with_the_same_bits(digits):
    """Loader processes hand over uint8; the network gets what torchvision's transforms make of each image."""
    images, transform = datasets.image_dataset(digits, True), datasets.probe_transform(SIZE)
    data = Loader(images, transform, 8, CPU, num_workers=0)
    samples: Any = data.loader.dataset
    assert samples[(0, 0)].image.dtype == torch.uint8
    batch, _ = next(data.batches(2))
    data.sampler.first = 0
    for image, (epoch, index) in zip(batch, data.sampler, strict=False):
        with datasets.seeded(0, epoch, index):
            assert torch.equal(image, transform(images[index][0]))
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 7, 256)
    normalize = transforms.Normalize(datasets.IMAGENET_MEAN, datasets.IMAGENET_STD)
    expected = normalize(transforms.ToTensor()(np.asarray(levels.permute(1, 2, 0))))
    own = datasets.Normalize(datasets.IMAGENET_MEAN, datasets.IMAGENET_STD)
    assert torch.equal(own(levels[None])[0], expected)
    assert torch.equal(own(levels.float() / 255), expected)  # floats from 0 to 1


def test_changed_colours__draws_and_values_are_torchvisions():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))
    for strengths in ((0.4, 0.4, 0.2, 0.1), (0.4, 0.4, 0.4), (0.9, 0.9, 0.9, 0.5)):
        jitter = transforms.RandomApply([transforms.ColorJitter(*strengths)], 0.8)
        colour = transforms.Compose([jitter, transforms.RandomGrayscale(0.2)])
        for seed in range(25):
            found = []
            for step in (colour, partial(datasets.change_colours, colour)):
                torch.manual_seed(seed)
                found.append((step(noise).tobytes(), torch.rand(1)))
            assert found[0] == found[1]


def test_order_is_the_distributed_samplers(digits):
    images = datasets.image_dataset(digits, True)
    sampler = torch.utils.data.DistributedSampler(images, 1, 0, shuffle=True, seed=0)
    sampler.set_epoch(2)
    expected = [images.samples[i][1] for i in sampler][:48]
    assert epoch_of(loader(digits, num_workers=0), 2)[1].tolist() == expected


def test_loading_leaves_the_models_generators_alone(digits):
    data = loader(digits, num_workers=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(data.batches(0))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_sees_each_image_once_in_order(digits, monkeypatch):
    whole = loader(digits, train=False, num_workers=0)
    images, targets = epoch_of(whole, 0)
    assert len(images) == 20 and len(whole) == 3
    shards = []
    for rank in range(3):
        monkeypatch.setattr("common.datasets.loader.rank", lambda rank=rank: rank)
        monkeypatch.setattr("common.datasets.loader.world_size", lambda: 3)
        shards.append(epoch_of(loader(digits, train=False, num_workers=0), 0)[1])
    assert [len(s) for s in shards] == [7, 7, 6]
    assert sorted(torch.cat(shards).tolist()) == sorted(targets.tolist())


def test_joint_transforms_see_image_and_target(digits):
    """A target that is no class index, such as a mask, takes part in the transform's draws."""

    def flip(image: Any, target: int) -> tuple[torch.Tensor, dict[str, Any]]:
        turn = torch.rand(()) < 0.5
        pixels = transforms.ToTensor()(image)
        return pixels.flip(-1) if turn else pixels, {"class": target, "flipped": bool(turn)}

    def collate(pairs: list) -> tuple[torch.Tensor, list]:
        return torch.stack([image for image, _ in pairs]), [target for _, target in pairs]

    images = datasets.image_dataset(digits, train=True)
    runs = [Loader(images, flip, 8, CPU, num_workers=n, joint=True, collate=collate) for n in (0, 1)]
    (first, targets), (again, same) = (next(iter(run.batches(1, 2))) for run in runs)
    assert torch.equal(first, again) and targets == same and len(targets) == 8
    assert {target["flipped"] for target in targets} == {True, False}


def test_resume_position(digits):
    data = loader(digits, num_workers=0, accum_iter=2)
    meters = {"loss": [3.0, 2.0]}
    starts = [data.start(Position(0, images, [meters])) for images in (0, 8, 16, 24, 33, 48, 64)]
    assert [step for step, _ in starts] == [0, 0, 2, 2, 4, 6, 4]
    assert [bool(sums) for _, sums in starts] == [False, False, True, False, False, True, False]
    leftover = loader(digits, num_workers=0, accum_iter=4)  # 6 batches: the last two make no update
    assert leftover.start(Position(0, 48, [meters])) == (6, meters)


def listed(folder: Path, split: str, prefix: str = "") -> list[str]:
    """Write the list file of a split, in reverse order; returns its lines."""
    paths = sorted((folder / split).glob("*/*.png"), reverse=True)
    lines = [f"{prefix}{path.parent.name}/{path.name} {9 - int(path.parent.name)}" for path in paths]
    (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return lines


@pytest.mark.parametrize("prefix", ["", "val/"])
def test_list_files_count_only_where_both_exist(folder, prefix):
    def target() -> int:
        return datasets.image_dataset(str(folder), train=False, lists=True)[0][1]

    lines = listed(folder, "val", prefix)
    assert target() == 0
    listed(folder, "train", prefix and "train/")
    assert datasets.image_dataset(str(folder), train=False)[0][1] == 0
    images = datasets.image_dataset(str(folder), train=False, lists=True)
    assert [f"{prefix}{'/'.join(path.split('/')[-2:])} {label}" for path, label in images.samples] == lines
    datasets.check_classes(images, images, 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: expected '<path> <class index>'"),
        ("0/0000.png 0\n0/0010.png\n", "line 2: expected '<path> <class index>'"),
        ("0/0000.png x", "line 1: expected"),
        ("nowhere.png 0", "nowhere.png is not in"),
    ],
)
def test_bad_list_files_are_named(folder, text, words):
    listed(folder, "val")
    (folder / "train.txt").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        datasets.image_dataset(str(folder), train=True, lists=True)
    assert str(folder / "train.txt") in str(error.value)


# ---- what users are told


def test_greyscale_data_sets_become_colour():
    data = Loader([(Image.new("L", (20, 20)), 1)] * 4, datasets.probe_transform(SIZE), 4, CPU, num_workers=0)
    assert epoch_of(data, 0)[0].shape == (4, 3, SIZE, SIZE)


@pytest.fixture
def folder(tmp_path, digits) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "images"))


def first_image(folder: Path) -> Path:
    return sorted((folder / "train" / "3").iterdir())[0]


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        datasets.image_dataset(str(tmp_path / "nowhere"), True)


def test_folder_without_train(folder):
    shutil.rmtree(folder / "train")
    with pytest.raises(UserError, match="has no folder train/"):
        datasets.image_dataset(str(folder), True)


def test_no_classes(tmp_path):
    (tmp_path / "train").mkdir()
    for labelled in (True, False):
        with pytest.raises(UserError, match="no class folders and no images"):
            datasets.image_dataset(str(tmp_path), True, labelled=labelled)


def test_empty_class(folder):
    (folder / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="train/empty: class folder without images"):
        datasets.image_dataset(str(folder), True)


def test_unlabelled_images_serve_pretraining_only(tmp_path, folder):
    for target in (tmp_path / "flat", tmp_path / "nested" / "train"):
        target.mkdir(parents=True)
        for image in sorted((folder / "train").rglob("*.png"))[:9]:
            shutil.copy(image, target)
    for root in (tmp_path / "flat", tmp_path / "nested"):
        images = datasets.image_dataset(str(root), True, labelled=False)
        assert len(images) == 9
        data = Loader(images, datasets.probe_transform(SIZE), 4, CPU, num_workers=0)
        assert epoch_of(data, 0)[1].tolist() == [0] * 8
    with pytest.raises(UserError, match="9 images but no class folders"):
        datasets.image_dataset(str(tmp_path / "nested"), True)


def test_too_few_images_for_a_batch(digits):
    with pytest.raises(UserError, match="--batch_size 64: 48 training images"):
        loader(digits, batch_size=64)
    with pytest.raises(UserError, match="--accum_iter 7"):
        loader(digits, accum_iter=7)


def test_classes_must_agree(folder):
    train = datasets.image_dataset(str(folder), True)
    with pytest.raises(UserError, match="--nb_classes 9"):
        datasets.check_classes(train, datasets.image_dataset(str(folder), False), 9)
    (folder / "val" / "3").rename(folder / "val" / "three")
    with pytest.raises(UserError, match="differ from the training ones, first 3"):
        datasets.check_classes(train, datasets.image_dataset(str(folder), False), 10)


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_stops_and_is_named(folder, damage, workers):
    image = first_image(folder)
    data = image.read_bytes()
    image.write_bytes({"text": b"no image", "truncated": data[: len(data) // 2], "empty": b""}[damage])
    with pytest.raises(UserError) as error:
        list(loader(str(folder), num_workers=workers).batches(0))
    assert str(image) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_counted(folder, workers, capsys):
    image = first_image(folder)
    image.write_bytes(b"no image")
    data = loader(str(folder), num_workers=workers, bad_images="skip")
    assert len(epoch_of(data, 0)[0]) == 48
    assert len(epoch_of(data, 1)[0]) == 48
    assert len(data.bad) == 1 and str(image) in data.bad[0]
    assert capsys.readouterr().out.count("skipped, 1 so far") == 1


def test_evaluation_leaves_unreadable_images_out(folder):
    for image in sorted((folder / "val").rglob("*.png"))[:2]:
        image.write_bytes(b"no image")
    assert len(epoch_of(loader(str(folder), train=False, num_workers=0, bad_images="skip"), 0)[0]) == 18


def test_skipping_gives_up_when_nothing_is_readable(folder):
    for image in (folder / "train").rglob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match="unreadable"):
        list(loader(str(folder), num_workers=0, bad_images="skip").batches(0))


# ---- timm's data sets


def test_unknown_timm_data_set(tmp_path):
    for name in ("torch/nothing", "nothing", "folder/x", "tfds/mnist"):
        with pytest.raises(UserError, match=f"--dataset {name}"):
            datasets.image_dataset(str(tmp_path), True, name=name)


def fake_cifar10(root: Path) -> None:
    """CIFAR-10's on-disk layout with 5 x 4 training images."""
    import pickle

    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        entry = {"data": np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
        (base / name).write_bytes(pickle.dumps(entry))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))


def test_torchvision_data_set_by_name(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    fake_cifar10(tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    monkeypatch.setattr(CIFAR10, "download", lambda self: None)
    images = datasets.image_dataset(str(tmp_path), True, name="torch/cifar10")
    data = Loader(images, datasets.probe_transform(SIZE), 5, CPU, num_workers=0)
    assert len(images) == 20
    assert sorted(epoch_of(data, 0)[1].tolist()) == sorted([0, 1, 2, 3] * 5)
    assert len(datasets.image_dataset(str(tmp_path), False, name="torch/cifar10")) == 4


@pytest.mark.slow
def test_an_abandoned_epoch_ends_with_the_interpreter(digits, run_script, tmp_path):
    script = tmp_path / "abandon.py"
    script.write_text(
        "import sys, torch\n"
        "from common import datasets\n"
        "images = datasets.image_dataset(sys.argv[1], True)\n"
        "loader = datasets.Loader(images, datasets.probe_transform(16), 8, torch.device('cpu'), num_workers=2)\n"
        "batches = loader.batches()\n"
        "next(batches)\n"
        "raise RuntimeError('a bug')\n"
    )
    run_script(str(script), digits, status=1, timeout=60, PYTHONPATH=str(Path(__file__).parents[2]))


def test_workers_ignore_terminal_signals():
    import os
    import signal

    pid = os.fork()
    if pid == 0:
        _ignore_signals(0)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), signum)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_transforms_keep_three_channels(tmp_path):
    for mode in ("L", "RGBA", "CMYK", "1", "P"):
        folder = tmp_path / mode / "train"
        folder.mkdir(parents=True)
        Image.new(mode, (20, 30)).save(folder / ("a.tiff" if mode == "CMYK" else "a.png"))
        image, _ = datasets.image_dataset(str(tmp_path / mode), True, labelled=False)[0]
        assert transforms.ToTensor()(image).shape == (3, 30, 20)


def test_images_of_every_kind_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey).save(tmp_path / "0.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 255).save(tmp_path / "1.png")  # 16 bits
    Image.fromarray(np.stack([grey] * 3 + [grey // 2], axis=-1), "RGBA").save(tmp_path / "2.png")
    images = datasets.image_dataset(str(tmp_path), train=True, labelled=False)
    for i in range(3):
        assert images[i][0].mode == "RGB"
        assert np.array_equal(np.asarray(images[i][0]), np.stack([grey] * 3, axis=-1)), i


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_exif_orientation_is_followed_where_asked(ending, tmp_path):
    """A picture that is bright at the top, stored lying on its side."""
    upright = Image.fromarray(np.repeat(np.array([[200], [20]], np.uint8), 24, axis=0).repeat(32, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees to show it
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"a.{ending}", exif=exif)
    images = datasets.image_dataset(str(tmp_path), True, labelled=False)
    for turn, shape in ((False, (3, 32, 48)), (True, (3, 48, 32))):
        loader = Loader(images, transforms.ToTensor(), 1, CPU, num_workers=0, exif_transpose=turn)
        ((batch, _),) = list(loader.batches())
        assert batch[0].shape == shape
    assert batch[0, :, :20].mean() > 0.7 > 0.2 > batch[0, :, 28:].mean()
