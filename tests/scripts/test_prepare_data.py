"""Data sets as image folders, from archives made here, and subsets of them."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as maskUtils
from pycocotools.coco import COCO
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder, Imagenette

from common.datasets import image_dataset
from common.distributed import UserError, run
from scripts.tools import shapes
from scripts.tools.prepare_data import get_args_parser, main

RNG = np.random.default_rng(0)
CIFAR = RNG.integers(0, 256, (12, 3, 32, 32), np.uint8)  # ten for training, two for validation
STL = RNG.integers(0, 256, (3, 3, 96, 96), np.uint8)
STL_CLASSES = ["airplane", "bird"]


def prepare(*argv: object) -> None:
    main(get_args_parser().parse_args([str(word) for word in argv]))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def marker(out: Path) -> dict:
    return json.loads((out / ".prepared.json").read_text())


# ---- digits


@pytest.fixture(scope="module")
def all_digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "new" / "digits"
    prepare("digits", out)
    return out


def test_digits__every_image_reads_back(all_digits):
    data: Any = load_digits()
    seen = {}
    for split in ("train", "val"):
        folder = ImageFolder(str(all_digits / split))
        assert folder.classes == [str(i) for i in range(10)]
        for path, label in folder.samples:
            index = int(Path(path).stem)
            assert index not in seen and (index % 5 == 0) == (split == "val")
            assert label == data.target[index]
            seen[index] = np.asarray(Image.open(path))
    assert len(seen) == 1797 and sum(i % 5 == 0 for i in seen) == 360
    pixels = np.stack([seen[i] for i in range(1797)])
    assert pixels.shape == (1797, 8, 8) and pixels.dtype == np.uint8
    expected = np.floor(data.images * 255 / 16 + 0.5)
    assert np.array_equal(pixels, expected)
    assert marker(all_digits) == {"name": "digits", "arguments": {}, "counts": {"train": 1437, "val": 360}}


def test_digits__is_left_alone_when_complete(all_digits, capsys):
    before = {path: path.stat().st_mtime_ns for path in all_digits.rglob("*")}
    prepare("digits", all_digits)
    assert "already there, train 1,437, val 360, total 1,797 images" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in all_digits.rglob("*")}


def test_digits__into_an_empty_folder(tmp_path, capsys):
    prepare("digits", tmp_path)
    assert len(files(tmp_path)) == 1798
    assert "train 1,437, val 360, total 1,797 images" in capsys.readouterr().out


# ---- archives


def tar(path: Path, members: dict[str, bytes]) -> str:
    """Write a .tar.gz and return its md5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def fake_cifar(monkeypatch, kind, path: Path) -> list[str]:
    """An archive in the layout of CIFAR; image i is of class i % 10 (of the first ten)."""
    classes = [f"class_{c:02d}" for c in range(100 if kind is CIFAR100 else 10)]
    key = "fine_labels" if kind is CIFAR100 else "labels"
    rows = CIFAR.reshape(12, -1)

    def batch(first: int, last: int) -> bytes:
        return pickle.dumps({"data": rows[first:last], key: [i % 10 for i in range(first, last)]})

    step = 10 // len(kind.train_list)
    members = {name: batch(i * step, (i + 1) * step) for i, (name, _) in enumerate(kind.train_list)}
    members |= {kind.test_list[0][0]: batch(10, 12), kind.meta["filename"]: pickle.dumps({kind.meta["key"]: classes})}
    digest = tar(path / kind.filename, {f"{kind.base_folder}/{name}": content for name, content in members.items()})
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    monkeypatch.setattr(kind, "tgz_md5", digest)
    monkeypatch.setattr(kind, "train_list", [[name, md5[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, md5[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5[kind.meta["filename"]]})
    return classes


@pytest.mark.parametrize(("name", "kind"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar__from_an_archive_put_there_by_hand(name, kind, tmp_path, monkeypatch):
    out = tmp_path / "out"
    classes = fake_cifar(monkeypatch, kind, out / "download")
    prepare(name, out)
    assert {path.name for path in out.iterdir()} == {"train", "val", "download", ".prepared.json"}
    assert [path.name for path in (out / "download").iterdir()] == [kind.filename]  # not ours to remove
    for split, first, last in (("train", 0, 10), ("val", 10, 12)):
        for i in range(first, last):
            path = out / split / classes[i % 10] / f"{i - first:06d}.png"
            assert np.array_equal(np.asarray(Image.open(path)), CIFAR[i].transpose(1, 2, 0))
    assert marker(out)["counts"] == {"train": 10, "val": 2}
    prepare(name, out)  # again: left alone, with its download folder


@pytest.mark.parametrize("keep", [False, True])
def test_cifar__downloads(keep, tmp_path, monkeypatch):
    fake_cifar(monkeypatch, CIFAR10, tmp_path / "site")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "site"))

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
        out = tmp_path / "out"
        (out / "download").mkdir(parents=True)
        (out / "download" / CIFAR10.filename).write_bytes(b"half of it")  # of a killed run
        prepare("cifar10", out, *["--keep_download"] * keep)
        server.shutdown()
    assert marker(out)["counts"] == {"train": 10, "val": 2}
    assert (out / "download" / CIFAR10.filename).exists() == (out / "download").exists() == keep
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_stl10__unlabelled_images_can_be_pretrained_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    columns = STL.transpose(0, 1, 3, 2)  # the archive holds images by column
    labels = np.array([2, 1], np.uint8)  # counted from one
    members = {
        "train_X.bin": columns[:2].tobytes(),
        "train_y.bin": labels.tobytes(),
        "unlabeled_X.bin": columns.tobytes(),
        "test_X.bin": columns[2:].tobytes(),
        "test_y.bin": labels[:1].tobytes(),
        "class_names.txt": "\n".join(STL_CLASSES).encode(),
    }
    digest = tar(out / "download" / STL10.filename, {f"stl10_binary/{name}": data for name, data in members.items()})
    monkeypatch.setattr(STL10, "tgz_md5", digest)
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    prepare("stl10", out)
    expected = {"train/bird/000000": 0, "train/airplane/000001": 1, "val/bird/000000": 2}
    expected |= {f"unlabeled/{i:06d}": i for i in range(3)}
    for name, i in expected.items():
        assert np.array_equal(np.asarray(Image.open(out / f"{name}.png")), STL[i].transpose(1, 2, 0))
    assert sum(marker(out)["counts"].values()) == len(expected) == len(list(out.rglob("*.png")))
    assert f"--data_path {out / 'unlabeled'}" in capsys.readouterr().out
    assert len(image_dataset(str(out / "unlabeled"), train=True, labelled=False)) == 3


def test_imagenette__keeps_the_jpegs(tmp_path, monkeypatch):
    out = tmp_path / "out"
    members = {
        f"{split}/{wnid}/{wnid}_1.JPEG": f"{split} {wnid}".encode() for split in ("train", "val") for wnid in "ab"
    }
    listing = {f"imagenette2-160/{name}": content for name, content in members.items()}
    digest = tar(out / "download" / "imagenette2-160.tgz", {**listing, "imagenette2-160/noisy_imagenette.csv": b""})
    monkeypatch.setattr(Imagenette, "_ARCHIVES", {"160px": ("http://nowhere/imagenette2-160.tgz", digest)})
    prepare("imagenette", out, "--size", "160px")
    written = files(out)
    assert {name: written[name] for name in members} == members
    assert set(written) - set(members) == {".prepared.json", "download/imagenette2-160.tgz"}
    with pytest.raises(UserError, match="160px"):
        prepare("imagenette", out, "--size", "320px")


def test_download__without_network_is_one_line(tmp_path, monkeypatch, capsys):
    for name, value in {
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
    }.items():
        monkeypatch.setenv(name, value)  # nobody listens there
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(main, get_args_parser().parse_args(["cifar10", "out"]))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f": cifar10: {CIFAR10.url} cannot be downloaded (" in line
    assert line.endswith(f"put {CIFAR10.filename} into {tmp_path / 'out' / 'download'} and run this again")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "download"]


# ---- subset


@pytest.fixture
def source(tmp_path) -> Path:
    """Three classes of 20, 30 and 5 training images, some in nested folders, and 4 validation images each."""
    root = tmp_path / "source"
    for split, sizes in (("train", {"cat": 20, "dog": 30, "eel": 5}), ("val", {"cat": 4, "dog": 4, "eel": 4})):
        for name, size in sizes.items():
            for i in range(size):
                path = root / split / name / ("deep/er" if i % 2 else "") / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4), (i, len(name), size)).save(path)
            (root / split / name / "notes.txt").touch()
    return root


def chosen(out: Path, split: str = "train") -> dict[str, set[str]]:
    return {
        folder.name: {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (out / split).iterdir()
    }


def sizes(out: Path, split: str = "train") -> dict[str, int]:
    return {name: len(paths) for name, paths in chosen(out, split).items()}


def test_subset__links_to_the_images(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare("subset", "out", "--source", "source", "--per_class", 5)
    out = tmp_path / "out"
    assert sizes(out) == {"cat": 5, "dog": 5, "eel": 5} and sizes(out, "val") == {"cat": 4, "dog": 4, "eel": 4}
    links = [path for path in out.rglob("*.png") if path.is_symlink()]
    assert len(links) == 15 + 12
    for link in links:
        assert os.readlink(link) == str(source / link.relative_to(out))
    assert any("deep" in path for path in chosen(out)["cat"])
    for split in ("train", "val"):
        data = ImageFolder(str(out / split))
        assert data.classes == ["cat", "dog", "eel"] and all(image.size == (4, 4) for image, _ in data)


def test_subset__depends_on_the_seed_alone(source, tmp_path, monkeypatch):
    def draw(name: str, *flags: object) -> dict[str, set[str]]:
        prepare("subset", tmp_path / name, "--source", source, *flags)
        return chosen(tmp_path / name)

    few = draw("few", "--per_class", 4)
    assert draw("other", "--per_class", 4, "--seed", 1) != few
    more = draw("more", "--per_class", 5)
    assert all(few[name] < more[name] for name in few)
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda *args, **kwargs: [(r, d[::-1], f[::-1]) for r, d, f in walk(*args, **kwargs)]
    )
    assert draw("again", "--per_class", 4) == few
    source.rename(tmp_path / "moved")
    source = tmp_path / "moved"
    assert draw("moved_too", "--per_class", 4) == few


def test_subset__percent_of_each_class(source, tmp_path):
    prepare("subset", tmp_path / "ten", "--source", source, "--percent", 10, "--val_per_class", 2)
    assert sizes(tmp_path / "ten") == {"cat": 2, "dog": 3, "eel": 1}
    assert sizes(tmp_path / "ten", "val") == {"cat": 2, "dog": 2, "eel": 2}
    prepare("subset", tmp_path / "all", "--source", source, "--percent", 100)
    assert sizes(tmp_path / "all") == {"cat": 20, "dog": 30, "eel": 5}


def test_subset__of_a_subset_links_to_the_images(source, tmp_path):
    prepare("subset", tmp_path / "one", "--source", source, "--per_class", 5)
    prepare("subset", tmp_path / "two", "--source", tmp_path / "one", "--per_class", 2)
    assert all(link.resolve() == Path(os.readlink(link)) for link in (tmp_path / "two").rglob("*.png"))
    assert sizes(tmp_path / "two") == {"cat": 2, "dog": 2, "eel": 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--per_class", 6], r"source/train/eel: has 5 images, fewer than 6"),
        (["--per_class", 5, "--val_per_class", 5], r"source/val/\w+: has 4 images, fewer than 5"),
        (["--per_class", 0], "--per_class 0: must be a positive number"),
        (["--percent", "nan"], "--percent nan"),
        (["--percent", 150], "fewer than"),
        (["--per_class", 1, "--val_per_class", -1], "--val_per_class -1"),
    ],
)
def test_subset__raises_on_numbers_that_do_not_fit(flags, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare("subset", tmp_path / "out", "--source", source, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_subset__raises_on_a_source_that_is_none(source, tmp_path):
    def message(root: Path) -> str:
        with pytest.raises(UserError) as caught:
            prepare("subset", tmp_path / "out", "--source", root, "--per_class", 1)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert str(tmp_path / "missing") in message(tmp_path / "missing")
    (source / "train").rename(tmp_path / "train")
    assert f"no folder {source / 'train'}" in message(source)
    (tmp_path / "train").rename(source / "train")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "val").mkdir()
    (source / "train" / "cat" / "0.png").rename(tmp_path / "flat" / "train" / "0.png")
    assert "no class folders" in message(tmp_path / "flat")


# ---- the folder as a whole


def test_out__that_is_foreign_is_refused(tmp_path, source):
    before = files(source)
    for name in ("digits", "cifar10"):
        with pytest.raises(UserError, match=f"{source}: is not empty and was not written by this script"):
            prepare(name, source)
    with pytest.raises(UserError, match="Not a directory"):
        prepare("digits", source / "train" / "cat" / "notes.txt")
    assert files(source) == before and [path.name for path in tmp_path.iterdir()] == ["source"]
    (tmp_path / "download").mkdir()
    with pytest.raises(UserError, match="not empty"):  # digits downloads nothing
        prepare("digits", tmp_path)


def test_out__that_holds_another_data_set_is_refused(all_digits, source, tmp_path):
    with pytest.raises(UserError, match='"name": "digits"'):
        prepare("cifar10", all_digits)
    out = tmp_path / "out"
    prepare("subset", out, "--source", source, "--per_class", 2)
    with pytest.raises(UserError, match='"per_class": 2'):
        prepare("subset", out, "--source", source, "--per_class", 3)
    next((out / "train" / "cat").rglob("*.png")).unlink()
    with pytest.raises(UserError, match="'train': 5"):  # no longer complete
        prepare("subset", out, "--source", source, "--per_class", 2)


def _killed(out: Path) -> None:
    save = Image.Image.save

    def save_or_die(image, path):
        if Path(path).name == "0123.png":
            os.kill(os.getpid(), signal.SIGKILL)
        save(image, path)

    Image.Image.save = save_or_die  # type: ignore[assignment]
    prepare("digits", out)


def test_out__does_not_appear_when_the_run_is_killed(tmp_path, all_digits):
    out = tmp_path / "digits"
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(out,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".digits.prepare_data"]
    (tmp_path / ".digits.prepare_data" / "train" / "0" / "stray.png").touch()
    prepare("digits", out)
    assert files(out) == files(all_digits) and [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.parametrize(
    ("failure", "status", "line"),
    [(OSError(errno.ENOSPC, "No space left on device"), 2, "No space left"), (KeyboardInterrupt(), 130, "SIGINT")],
)
def test_out__does_not_appear_when_the_run_fails(failure, status, line, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise failure

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(SystemExit) as end:
        run(main, get_args_parser().parse_args(["digits", str(tmp_path / "out")]))
    assert end.value.code == status and line in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_flags__raises_on_unknown_data_set():
    with pytest.raises(UserError, match="'mnist'.*'stl10'"):
        prepare("mnist", "out")


# ---- split


def test_split__links_every_image_once(source, tmp_path, capsys):
    prepare("split", tmp_path / "out", "--source", source / "train", "--val", 0.2)
    assert sizes(tmp_path / "out") == {"cat": 16, "dog": 24, "eel": 4}
    assert sizes(tmp_path / "out", "val") == {"cat": 4, "dog": 6, "eel": 1}
    train, val = chosen(tmp_path / "out"), chosen(tmp_path / "out", "val")
    assert all(not train[name] & val[name] for name in train)
    links = [path for path in (tmp_path / "out").rglob("*.png") if path.is_symlink()]
    assert len({path.resolve() for path in links}) == len(links) == 55
    prepare("split", tmp_path / "more", "--source", source / "train", "--val", 0.5)
    assert all(val[name] < chosen(tmp_path / "more", "val")[name] for name in val)


def test_split__and_subset_of_what_is_not_split(source, tmp_path):
    shutil.rmtree(source / "val")
    prepare("subset", tmp_path / "few", "--source", source, "--per_class", 2)
    assert [path.name for path in sorted((tmp_path / "few").iterdir())] == [".prepared.json", "train"]
    for words, line in (
        (("--source", source), "has a folder train/ already"),
        (("--source", source / "train", "--val", 1), "--val 1.0: expected a share between 0 and 1"),
        (("--source", source / "train" / "cat" / "deep" / "er"), "images but no class folders"),
    ):
        with pytest.raises(UserError, match=line):
            prepare("split", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


# ---- drawn shapes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    prepare("shapes", out, "--images", 20, "--size", 64)
    return out


def test_shapes__the_same_seed_draws_the_same_files(drawn, tmp_path):
    prepare("shapes", tmp_path / "again", "--images", 20, "--size", 64)
    assert files(drawn) == files(tmp_path / "again")
    prepare("shapes", tmp_path / "other", "--images", 2, "--size", 64, "--seed", 1)
    name = "coco/train2017/000000000100.jpg"
    assert (drawn / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_shapes__boxes_areas_and_labels_agree_with_the_masks(drawn):
    known = set()
    for split, year, count in (("training", "train2017", 16), ("validation", "val2017", 4)):
        coco: Any = COCO(drawn / f"coco/annotations/instances_{year}.json")
        assert len(coco.imgs) == count
        folders = [drawn / "ade20k" / kind / split for kind in ("images", "annotations")]
        pictures, masks = (sorted(folder.iterdir()) for folder in folders)
        assert [p.stem for p in pictures] == [p.stem for p in masks]
        for number, mask_file in zip(sorted(coco.imgs), masks, strict=True):
            image, labels = coco.imgs[number], np.asarray(Image.open(mask_file))
            assert labels.shape == (image["height"], image["width"])
            with Image.open(drawn / "coco" / year / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
            annotations = coco.loadAnns(coco.getAnnIds(number))
            known |= {"empty"} if not annotations else {"crowd"} if any(a["iscrowd"] for a in annotations) else set()
            for entry in annotations:
                known.add(type(entry["segmentation"]))
                mask = coco.annToMask(entry).astype(bool)
                assert abs(int(mask.sum()) - entry["area"]) <= 0.1 * entry["area"] + 8  # polygons: pixels of the edge
                assert np.abs(np.array(maskUtils.toBbox(coco.annToRLE(entry))) - entry["bbox"]).max() <= 2
                inside = labels[mask]
                wanted = 2 + list(shapes.CATEGORIES.values()).index(entry["category_id"])
                assert ((inside == wanted) | (inside == 0)).mean() > 0.9
    assert known == {"empty", "crowd", list, dict}
    assert (drawn / "ade20k/classes.txt").read_text().split() == ["background", *shapes.NAMES]


def test_shapes__objects_of_videos_keep_their_index_and_move(drawn):
    names = (drawn / "davis/ImageSets/2017/val.txt").read_text().split()
    assert len(names) == 3
    for name in names:
        frames = sorted((drawn / "davis/JPEGImages/480p" / name).iterdir())
        masks = [np.asarray(Image.open(p)) for p in sorted((drawn / "davis/Annotations/480p" / name).iterdir())]
        assert len(frames) == len(masks) == shapes.FRAMES
        assert Image.open(frames[0]).size == masks[0].shape[::-1]
        assert set(np.unique(masks[0])) == set(range(masks[0].max() + 1))  # all are seen at first
        assert all(mask.max() <= masks[0].max() for mask in masks)
        centres = [np.argwhere(mask == 1).mean(0) for mask in (masks[0], masks[1])]
        assert np.abs(centres[1] - centres[0]).max() < 8


@pytest.mark.parametrize("flag", ["--images=1", "--size=31", "--seed=-1"])
def test_shapes__raises_on_numbers_that_draw_nothing(flag, tmp_path):
    with pytest.raises(UserError, match="expected at least 2 images of at least 32 pixels, and no negative seed"):
        prepare("shapes", tmp_path / "out", flag)


# ---- shrink


def test_shrink__copies_of_the_same_names(tmp_path):
    for name, size in {"a/big.jpg": (400, 300), "a/b/small.png": (20, 30), "a/b/deep.bmp": (200, 100)}.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "red").save(tmp_path / "photos" / name)
    (tmp_path / "photos/a/broken.jpg").write_bytes(b"no image")
    prepare("shrink", tmp_path / "out", "--source", tmp_path / "photos", "--side", 64)
    sizes = {name: Image.open(tmp_path / "out" / name).size for name in files(tmp_path / "out") if name[0] != "."}
    assert sizes == {"a/big.jpg": (85, 64), "a/b/small.png": (20, 30), "a/b/deep.bmp.png": (128, 64)}
    assert marker(tmp_path / "out")["counts"] == {"images": 3}
    prepare("shrink", tmp_path / "out", "--source", tmp_path / "photos", "--side", 64)  # there already


def test_shrink__takes_from_every_folder_in_turn(tmp_path, all_digits):
    prepare("shrink", tmp_path / "out", "--source", all_digits, "--side", 8, "--most", 40)
    found = files(tmp_path / "out")
    assert len(found) == 41
    assert {name.rsplit("/", 1)[0] for name in found if "/" in name} == {
        f"{s}/{c}" for s in ("train", "val") for c in range(10)
    }
    assert all(found[name] for name in found)


def test_shrink__raises_where_no_image_can_be_read(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"has no image that can be read \(a.jpg: unreadable image"):
        prepare("shrink", tmp_path / "out", "--source", tmp_path / "photos", "--side", 64)
    assert not (tmp_path / "out").exists()


# ---- drawn fields


def test_fields__lawns_differ_in_the_infrared_alone(tmp_path):
    prepare("fields", tmp_path / "out", "--images", 60, "--size", 16)
    files = sorted((tmp_path / "out").rglob("*.npy"))
    assert len(files) == 60 and len([path for path in files if "val" in path.parts]) == 12
    pixels = {name: [] for name in shapes.MATERIALS}
    for path in files:
        image = np.load(path)
        assert (image.shape, image.dtype) == ((16, 16, 5), np.uint16)
        pixels[path.parent.name.split("_")[0]].append(image.mean((0, 1)) / 65535)
    grass, turf = (np.mean(values, axis=0) for values in pixels.values())
    np.testing.assert_allclose(grass[:3], turf[:3], atol=0.03)
    assert grass[3] > turf[3] + 0.05 and grass[4] < turf[4] - 0.03
    prepare("fields", tmp_path / "again", "--images", 60, "--size", 16)
    again = [tmp_path / "again" / path.relative_to(tmp_path / "out") for path in files]
    assert all(np.array_equal(np.load(a), np.load(b)) for a, b in zip(again, files, strict=True))
