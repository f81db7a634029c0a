"""Images of other than three 8-bit channels: files of all kinds, their statistics, and what transforms make of them."""

import argparse
import json
import random
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from common import datasets, distributed
from common.datasets import channels
from common.distributed import UserError
from scripts.tools import prepare_data
from tests.support.runs import run_main

RNG = np.random.default_rng(0)
GREY16 = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)


def png16(values: np.ndarray) -> bytes:
    """A PNG file of 16 bits a sample, (H, W, C), which Pillow cannot write."""
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(values: np.ndarray) -> bytes:
    """A TIFF file of one strip, (H, W) or (H, W, C) of any type; of several bands none is a colour."""
    height, width, *bands = values.shape
    count, kind = (bands or [1])[0], {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    short, long = (3, "H"), (4, "I")
    data, bits = values.tobytes(), [8 * values.dtype.itemsize] * count
    tags = [(256, long, [width]), (257, long, [height]), (258, short, bits), (259, short, [1]), (262, short, [1])]
    tags += [(273, long, [0]), (277, short, [count]), (278, long, [height]), (279, long, [len(data)])]
    tags += [(338, short, [0] * (count - 1))] * (count > 1) + [(339, short, [kind] * count)]
    start, extra, entries = 8 + 2 + 12 * len(tags) + 4, b"", []
    for tag, (number, letter), numbers in tags:
        packed = struct.pack(f"<{len(numbers)}{letter}", *numbers)
        if len(packed) > 4:
            packed, extra = struct.pack("<I", start + len(extra)), extra + packed
        entries.append((tag, number, len(numbers), packed.ljust(4, b"\0")))
    place = struct.pack("<I", start + len(extra))
    body = b"".join(struct.pack("<HHI", *e[:3]) + (place if e[0] == 273 else e[3]) for e in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + extra + data


def read(name: str, data: bytes, chans: int) -> torch.Tensor:
    return channels.to_channels(channels.read(data, name, chans), chans)


def npy(values: np.ndarray, folder: Path) -> bytes:
    np.save(folder / "x.npy", values)
    return (folder / "x.npy").read_bytes()


# ---- conversion


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 51, 255], np.uint8), [0, 0.2, 1]),
        (np.array([0, 13107, 65535], np.uint16), [0, 0.2, 1]),
        (np.array([-32768, 32767], np.int16), [0, 1]),
        (np.array([-5, 0, 2**31 - 1], np.int32), [0, 0, 1]),
        (np.array([0, 2**32 - 1], np.uint32), [0, 1]),
        (np.array([0.25, np.nan, -0.5, 1.5, np.inf], np.float64), [0.25, 0, 0, 1, 1]),
        (np.array([True, False]), [1, 0]),
        (np.array([0, 13107], ">u2"), [0, 0.2]),
    ],
    ids=lambda x: str(x.dtype) if isinstance(x, np.ndarray) else "",
)
def test_types_are_scaled_by_their_range(values, expected):
    found = channels.scaled(values)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_floats_of_another_range_are_refused():
    with pytest.raises(ValueError, match="floats from 0 to 255, expected 0 to 1"):
        channels.scaled(np.array([0.0, 255.0]))


@pytest.mark.parametrize("kind", ["I;16 tif", "int16 tif", "uint32 tif", "float tif", "pages", "png", "pgm", "npy"])
def test_deep_grey_keeps_all_bits(kind, tmp_path):
    path, values, expected = tmp_path / f"x.{kind.split()[-1]}", GREY16, GREY16 / 65535
    if kind == "pages":
        path, pages = tmp_path / "x.tif", [Image.fromarray(GREY16 // (i + 1)) for i in range(4)]
        pages[0].save(path, save_all=True, append_images=pages[1:])
        expected = np.stack([GREY16 // (i + 1) for i in range(4)]) / 65535
    elif kind == "pgm":
        path.write_bytes(b"P5 7 5 65535\n" + GREY16.astype(">u2").tobytes())
    elif kind == "npy":
        np.save(path, values)
    elif kind == "int16 tif":
        values = (GREY16.astype(np.int32) - 32768).astype(np.int16)
        path.write_bytes(tiff(values))
    elif kind == "uint32 tif":
        path.write_bytes(tiff(GREY16.astype(np.uint32) * 65537))
    elif kind == "float tif":
        path.write_bytes(tiff((GREY16 / 65535).astype(np.float32)))
    else:
        Image.fromarray(GREY16).save(path)
    chans = 4 if kind == "pages" else 1
    found = datasets.read_image(path, chans)
    assert found.shape == (chans, 5, 7)
    torch.testing.assert_close(found.squeeze(0), torch.from_numpy(expected).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_deep_png_keeps_all_bits(bands):
    values = RNG.integers(0, 65536, (5, 7, bands), dtype=np.uint16)
    found = read("x.png", png16(values), bands)
    torch.testing.assert_close(found, torch.from_numpy(values / 65535).float().permute(2, 0, 1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_bands_that_pillow_does_not_read_are_tifffiles(dtype, monkeypatch):
    values = RNG.integers(0, 256, (5, 7, 3 if dtype == np.uint16 else 5)).astype(dtype)
    content = []
    monkeypatch.setitem(
        sys.modules, "tifffile", types.SimpleNamespace(imread=lambda file: content.append(file.read()) or values)
    )
    found = read("x.tif", tiff(values), values.shape[2])
    assert content == [tiff(values)]
    expected = torch.from_numpy(values / np.iinfo(dtype).max).float().permute(2, 0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match="tifffile"):
        read("x.tif", tiff(values), values.shape[2])


class Dicom(dict):
    """Stands for pydicom's data set: attributes, and values by keyword."""

    __getattr__ = dict.__getitem__


def test_dicom_is_seen_through_its_window(monkeypatch):
    stored = np.array([[0, 1000], [2000, 4095]], np.uint16)
    about = Dicom(pixel_array=stored, BitsStored=12, PixelRepresentation=0, PhotometricInterpretation="MONOCHROME2")
    monkeypatch.setitem(sys.modules, "pydicom", types.SimpleNamespace(dcmread=lambda file: about))
    torch.testing.assert_close(read("x.dcm", b"", 1)[0], torch.from_numpy(stored / 4095).float())
    about |= {"WindowCenter": [40, 400], "WindowWidth": [400, 2000], "RescaleSlope": 1, "RescaleIntercept": -1024}
    expected = (stored.astype(float) - 1024 - 40 + 200) / 400  # lung is dark, bone bright
    torch.testing.assert_close(read("x.DCM", b"", 1)[0], torch.from_numpy(expected.clip(0, 1)).float())
    about["PhotometricInterpretation"] = "MONOCHROME1"
    torch.testing.assert_close(read("x.dcm", b"", 1)[0], 1 - torch.from_numpy(expected.clip(0, 1)).float())
    about |= {"pixel_array": np.stack([stored] * 3, 2), "SamplesPerPixel": 3}
    assert read("x.dcm", b"", 3).shape == (3, 2, 2)


# ---- numbers of channels


def photo(mode: str) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (5, 7) if bands == 1 else (5, 7, bands)
    return Image.frombytes(mode, (7, 5), RNG.integers(0, 256, shape, dtype=np.uint8).tobytes())


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "P"])
def test_three_channels_of_8_bits_are_todays_images(mode, tmp_path):
    photo(mode).save(tmp_path / "x.tif")
    today, asked = datasets.read_image(tmp_path / "x.tif"), datasets.read_image(tmp_path / "x.tif", 3)
    assert isinstance(asked, Image.Image)
    assert (asked.mode, asked.tobytes()) == ("RGB", today.tobytes())


def test_grey_and_colours_become_each_other():
    grey, colour = photo("L"), photo("RGB")
    assert channels.to_channels(grey, 3).tobytes() == grey.convert("RGB").tobytes()
    luma = channels.to_channels(colour, 1)
    assert torch.equal(luma, TF.to_tensor(colour.convert("L")))
    deep = channels.arranged(np.asarray(colour).astype(np.uint16) * 257, 1)
    torch.testing.assert_close(deep, luma, rtol=0, atol=2 / 255)
    assert channels.arranged(GREY16, 3).shape == (3, 5, 7)
    clear = photo("RGBA")
    assert torch.equal(channels.to_channels(clear, 4), TF.to_tensor(clear))
    assert channels.to_channels(clear, 3).tobytes() == clear.convert("RGB").tobytes()


@pytest.mark.parametrize("shape", [(5, 7, 13), (13, 5, 7)])
def test_channels_come_first_or_last(shape, tmp_path):
    values = RNG.integers(0, 65536, shape, dtype=np.uint16)
    found = read("x.npy", npy(values, tmp_path), 13)
    expected = torch.from_numpy(values / 65535).float()
    torch.testing.assert_close(found, expected if shape[0] == 13 else expected.permute(2, 0, 1), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("found", "chans"), [(1, 2), (3, 4), (4, 3), (5, 1), (13, 12)])
def test_other_numbers_of_channels_are_an_error(found, chans, tmp_path):
    data = npy(np.zeros((20, 21, found), np.uint8), tmp_path)
    with pytest.raises(ValueError, match=f"^{found} channels?, expected --in_chans {chans}$"):
        read("x.npy", data, chans)


def test_a_file_of_other_channels_says_which_flag_fits(capsys):
    own = {"patch_embed.proj.weight": torch.zeros(4, 3, 2, 2), "other": torch.zeros(4, 3, 2, 2)}
    weights = {name: torch.ones(4, 5, 2, 2) for name in own}
    assert distributed.adapt_channels(weights, own) == weights
    out = capsys.readouterr().out
    assert "WARNING: patch_embed.proj.weight: of 5 channels, the network takes 3; --in_chans 5 would fit" in out
    assert out.count("\n") == 1


# ---- statistics


def flags(folder: Path, in_chans: int | None = None, mean=None, std=None) -> argparse.Namespace:
    return argparse.Namespace(data_path=str(folder), in_chans=in_chans, mean=mean, std=std)


def test_statistics_come_from_flags_then_from_the_folder_then_from_the_method(tmp_path):
    assert datasets.statistics(flags(tmp_path)) == (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD, None)
    assert datasets.statistics(flags(tmp_path, 3), (0.5,) * 3, (1.0,) * 3) == ((0.5,) * 3, (1.0,) * 3, 3)
    for in_chans, mean, std, words in (
        (2, None, None, "--mean is missing: expected 2 numbers"),
        (2, [0.1, 0.2], None, "--std is missing: expected 2 numbers above 0"),
        (2, [0.1], [1.0], "--mean 0.1: expected 2 numbers, one a channel"),
        (1, [0.1], [0.0], "--std 0.0: expected 1 numbers above 0"),
        (None, [0.1], [1.0], "--mean 0.1: expected 3 numbers"),
    ):
        with pytest.raises(UserError, match=f"^{words}") as error:
            datasets.statistics(flags(tmp_path, in_chans, mean, std))
        assert f"prepare_data.py stats {tmp_path}" in str(error.value)
    (tmp_path / channels.STATS).write_text(json.dumps({"mean": [0.1, 0.2], "std": [0.3, 0.4]}))
    args = flags(tmp_path, 2)
    assert datasets.statistics(args) == ((0.1, 0.2), (0.3, 0.4), 2)
    assert (args.mean, args.std) == ([0.1, 0.2], [0.3, 0.4])  # for the checkpoint
    assert datasets.statistics(flags(tmp_path))[0] == datasets.IMAGENET_MEAN  # photographs do not ask
    with pytest.raises(UserError, match="^--mean 0.1 0.2: expected 5 numbers"):
        datasets.statistics(flags(tmp_path, 5))


def test_stats_of_a_folder(tmp_path, capsys):
    values = RNG.integers(0, 40_000, (6, 2, 9, 9), dtype=np.uint16)
    values[:, 1] = 7
    for i, image in enumerate(values):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "train" / "a" / f"{i}.npy", image)
    (tmp_path / "train" / "a" / "broken.npy").write_bytes(b"no array")
    run_main(prepare_data, "stats", str(tmp_path))
    out = capsys.readouterr().out
    assert "2 channels of 6 images; left out: " in out
    assert "channel 2 has one value in all images" in out
    stored = json.loads((tmp_path / channels.STATS).read_text())
    np.testing.assert_allclose(stored["mean"], (values / 65535).mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(stored["std"], [(values[:, 0] / 65535).std(), 1], rtol=1e-5)
    assert f"--mean {stored['mean'][0]} {stored['mean'][1]}" in out
    assert len(datasets.image_dataset(str(tmp_path), True, False, in_chans=2)) == 7  # the file is none of the images
    (tmp_path / "train" / "a" / "broken.npy").unlink()
    with pytest.raises(UserError, match="2 channels, expected --in_chans 3"):
        prepare_data.main(prepare_data.get_args_parser().parse_args(["stats", str(tmp_path), "--in_chans", "3"]))


def test_only_runs_with_in_chans_list_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 4)))
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    assert len(datasets.image_dataset(str(tmp_path), True, False)) == 1
    assert len(datasets.image_dataset(str(tmp_path), True, False, in_chans=1)) == 2


# ---- transforms


def test_tensors_are_cropped_and_flipped_as_photographs_are():
    image = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)).resize((200, 160))
    statistics = (0.5,) * 3, (0.5,) * 3, 3
    for transform in (
        datasets.probe_transform(32, *statistics),
        datasets.eval_transform(32, None, *statistics),
        datasets.finetune_transform(32, aa=None, reprob=0, mean=(0.5,) * 3, std=(0.5,) * 3, in_chans=3),
    ):
        views = []
        for view in (image, TF.to_tensor(image)):
            torch.manual_seed(1)
            random.seed(1)
            views.append(transform(view))
        torch.testing.assert_close(views[0], views[1], rtol=0, atol=0.06)  # Pillow rounds to 8 bits, twice


@pytest.mark.parametrize("chans", [1, 3, 5])
def test_colours_of_tensors_stay(chans, capsys):
    transform = datasets.finetune_transform(
        16, color_jitter=0.4, reprob=0, mean=(0.0,) * chans, std=(1.0,) * chans, in_chans=chans
    )
    assert "left out" in capsys.readouterr().out
    flat = torch.full((chans, 20, 20), 0.3)
    torch.testing.assert_close(transform(flat), torch.full((chans, 16, 16), 0.3))


def test_a_step_of_colours_draws_alike_for_all():
    def step(image):
        torch.rand(1)
        return image

    states = []
    for image in (photo("RGB"), torch.rand(5, 4, 4)):
        torch.manual_seed(0)
        datasets.Colours(step)(image)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
