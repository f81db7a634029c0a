"""Which files of a user's folder are read: all images for pre-training, class folders as torchvision lists them."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from common import datasets
from common.datasets import to_rgb
from common.distributed import UserError

GREY = Image.new("L", (4, 4), 100)


def draw(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch() if name.endswith((".txt", ".heic", ".db")) else GREY.save(root / name)
    return root


def read(root: Path, labelled: bool = False, **kwargs) -> list[str]:
    """The images' paths below root."""
    images = datasets.image_dataset(str(root), True, labelled, **kwargs)
    assert images[len(images) - 1][0].mode == "RGB"
    return [os.path.relpath(path, root) for path, _ in images.samples]


def test_class_tree__is_listed_as_by_torchvision(tmp_path):
    root = draw(tmp_path, *(f"train/{c}/{n}.png" for c in ("b", "a", "a-b", "B") for n in ("2", "10", "x/1", "x-y/1")))
    theirs = ImageFolder(str(root / "train"))
    for labelled in (True, False):
        ours = datasets.image_dataset(str(root), True, labelled)
        assert (ours.samples, ours.classes) == (theirs.samples, theirs.classes)


def test_pretraining_reads_all_images_below(tmp_path, capsys):
    hidden = (".thumbnails/9.png", "._1.png", "@eaDir/1.png", "holiday/.hidden.png", "__MACOSX/1.png")
    shown = ("1.png", "2.JPG", "3.gif", "holiday/4.jfif", "holiday/2020/5.png", "work/6.webp")
    root = draw(tmp_path, *shown, *hidden, "notes.txt", "7.heic", "holiday/8.heic")
    assert sorted(read(root)) == sorted(shown)
    assert f"{root}: 6 images, 8 left out (5 hidden, 2 .heic, 1 .txt)" in capsys.readouterr().out
    assert datasets.image_dataset(str(root), True, False)[5][1] == 0
    with pytest.raises(UserError, match="has no folder train/"):
        read(root, labelled=True)


def test_labelled__images_beside_class_folders_are_counted(tmp_path, capsys):
    root = draw(tmp_path, "train/a/1.png", "train/b/2.png", "train/3.png", "train/.thumbnails/4.png")
    assert read(root, labelled=True) == ["train/a/1.png", "train/b/2.png"]
    assert "2 images, 1 left out (1 images beside the class folders)" in capsys.readouterr().out
    shutil.rmtree(root / "train" / "a")
    shutil.rmtree(root / "train" / "b")
    with pytest.raises(UserError, match="has 1 images but no class folders"):
        read(root, labelled=True)


def test_links__are_followed_once(tmp_path):
    root = draw(tmp_path / "data", "train/a/1.png", "train/b/2.png")
    (root / "train" / "a" / "loop").symlink_to(root / "train")
    (root / "train" / "c").symlink_to(draw(tmp_path / "other", "3.png"))
    (root / "train" / "d").symlink_to(root / "train" / "b")
    assert [Path(path).name for path in read(root)] == ["1.png", "2.png", "3.png"]
    (root / "train" / "a" / "loop").unlink()
    assert read(root, labelled=True) == ["train/a/1.png", "train/b/2.png", "train/c/3.png", "train/d/2.png"]
    (root / "train" / "e").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="train/e: is a link to .*nowhere, which does not exist"):
        read(root, labelled=True)


def test_splits__in_any_case(tmp_path):
    root = draw(tmp_path, "Train/a/1.png", "Val/a/2.png", "Val/a/3.png")
    for labelled in (True, False):
        assert read(root, labelled) == ["Train/a/1.png"]
        assert len(datasets.image_dataset(str(root), False, labelled)) == 2


def test_output_folder_inside_the_images__is_not_read(tmp_path):
    root = draw(tmp_path, "train/a/1.png", "train/out/attention.png", "train/b/2.png")
    for labelled in (True, False):
        images = read(root, labelled, skip=str(root / "train" / "out"))
        assert images == ["train/a/1.png", "train/b/2.png"]


def test_nothing_readable__names_what_was_found(tmp_path):
    root = draw(tmp_path / "phone", "1.heic", "2.heic", "Thumbs.db")
    with pytest.raises(UserError, match=r"expected images that end in \.jpg, .*; 3 left out \(2 \.heic, 1 \.db\)"):
        read(root)
    root = draw(tmp_path / "classes", "train/a/1.png", "train/b/1.heic")
    with pytest.raises(
        UserError, match=r"train/b: class folder without images; 1 left out \(1 \.heic\), images end in \.jpg"
    ):
        read(root, labelled=True)
    assert read(root) == ["train/a/1.png"]


def test_list_file_with_a_byte_order_mark(tmp_path):
    root = draw(tmp_path, "train/a/1.png", "val/a/2.png")
    for split, name in (("train", "a/1.png"), ("val", "a/2.png")):
        (root / f"{split}.txt").write_text(f"{name} 3\n", "utf-8-sig")
    assert datasets.image_dataset(str(root), True, lists=True)[0][1] == 3


# ---- depth

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16  # 0 to 65,520


def pgm(values: np.ndarray, largest: int, path: Path) -> None:
    path.write_bytes(f"P5 64 64 {largest}\n".encode() + values.astype(">u2").tobytes())


@pytest.mark.parametrize("kind", ["png", "pgm", "pgm of 12 bits", "tif of 32 bits", "tif of floats"])
def test_deep_grey__keeps_its_levels(tmp_path, kind):
    path = tmp_path / f"image.{kind[:3]}"
    if kind == "png":
        Image.fromarray(RAMP).save(path)
    elif kind.startswith("pgm"):
        pgm(*((RAMP // 16, 4095) if "12" in kind else (RAMP, 65535)), path)
    elif "floats" in kind:
        Image.fromarray(RAMP.astype(np.float32) / 65535).save(path)
    else:
        Image.fromarray(RAMP.astype(np.int32) << 15).save(path)
    grey = np.asarray(datasets.read_image(path))
    assert grey.shape == (64, 64, 3)
    assert np.abs(grey[..., 0].astype(int) - (RAMP >> 8)).max() <= 1
    assert len(np.unique(grey)) == 256


def test_image_that_becomes_constant__is_named_once(tmp_path, capsys):
    path = tmp_path / "dark.png"
    Image.fromarray(RAMP // 4096).save(path)  # 4 of 16 bits
    for _ in range(2):
        assert np.asarray(datasets.read_image(path)).max() == 0
    out = capsys.readouterr().out
    assert out.count("dark.png (I;16) becomes a single grey, 0") == 1
    assert np.asarray(to_rgb(Image.new("F", (2, 2), 0.5))).max() == 128
    assert capsys.readouterr().out == ""


def test_jpeg__is_not_copied_and_messages_name_the_file(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    with Image.open(path) as image:
        expected = image.convert("RGB")
    found = datasets.read_image(path)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert np.array_equal(np.asarray(found.crop((3, 4, 20, 15))), np.asarray(expected.crop((3, 4, 20, 15))))
    path.write_bytes(b"no image")
    with pytest.raises(OSError, match=f"cannot identify image file '{path}'"):
        datasets.read_image(path)
