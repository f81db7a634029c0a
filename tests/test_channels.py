"""Every main on images of 1, 2, 4 and 13 channels, what reads its checkpoints, and mistakes with channels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import a2mim.main_fourier
import a2mim.main_interactions
import a2mim.main_visualize
import cae.main_pretrain
import cae.main_visualize
import saim.main_finetune
import saim.main_pretrain
import saim.visualize_attention
import saim.visualize_prediction
import semaim.main_knn
import semaim.main_pretrain
import semaim.main_visualize
import udi.main_knn
import udi.main_logistic_regression
import udi.main_video_segmentation
import udi.visualize_attention
from common import distributed
from scripts.tools import doctor, export, extract_features, knn, prepare_data, probe, shapes
from scripts.tools.encoders import load as encoders
from tests.support.channels import RUNS, checkpoint_of, images, train, train_with_a_break, weights_of, write
from tests.support.runs import mistake, run_main

CHANNELS = (1, 2, 4, 13)
FIRST = {method: next(iter(stages)) for method, stages in RUNS.items()}
# Two by default: grey of 16 bits pre-trains, and an encoder of photographs is fine-tuned on two channels.
CASES = [
    pytest.param(method, stage, chans, marks=() if (stage, chans) == (FIRST[method], 1) else pytest.mark.slow)
    for method, stages in RUNS.items()
    for stage in stages
    for chans in CHANNELS
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images of so many channels, and the checkpoint of a method's pre-training on them; each is made once."""
    root = tmp_path_factory.mktemp("channels")

    def of(chans: int) -> str:
        folder = root / f"images{chans}"
        return str(folder) if folder.exists() else images(folder, chans)

    def pretrained(method: str, chans: int) -> str:
        start = ""
        for stage in ("tokenizer", "pretrain"):
            folder = root / f"{method}{chans}{stage}"
            if stage in RUNS[method]:
                if not folder.exists():
                    train(method, stage, of(chans), folder, chans, start)
                start = checkpoint_of(folder)
        return start

    return of, pretrained


def start_of(method: str, stage: str, chans: int, pretrained) -> str:
    if stage in ("tokenizer", FIRST[method]):
        return ""
    if stage == "pretrain":  # CAE's, from the tokenizer beside its own result
        return str(Path(pretrained(method, chans)).parents[1] / f"{method}{chans}tokenizer" / "checkpoint.pth")
    return pretrained(method, chans)


@pytest.mark.parametrize(("method", "stage", "chans"), CASES)
def test_main(method, stage, chans, folders, tmp_path):
    """Two steps; a run that is broken off between them ends with the same weights."""
    of, pretrained = folders
    start = start_of(method, stage, chans, pretrained)
    train(method, stage, of(chans), tmp_path / "whole", chans, start)
    train_with_a_break(method, stage, of(chans), tmp_path / "broken", chans, start)
    whole, broken = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert [name for name, x in whole.items() if not torch.equal(x, broken[name])] == []
    first = next(x for name, x in whole.items() if x.ndim == 4 and "probe" not in name) if stage != "linprobe" else None
    assert first is None or first.shape[1] == chans


def train_on_photographs(method: str, data: str, folder: Path) -> str:
    """A file of three 8-bit channels, from a run without flags of channels."""
    if method == "cae":  # whose tokenizer is of no interest here
        network = cae.main_pretrain.build_model(
            cae.main_pretrain.get_args_parser().parse_args([*RUNS["cae"]["pretrain"][1], "--in_chans", "3"])
        )
        torch.save({"model": network.state_dict()}, folder / "cae.pth")
        return str(folder / "cae.pth")
    main, flags, _ = RUNS[method]["pretrain"]
    run_main(main, *flags, "--data_path", data, "--work_dir" if method == "a2mim" else "--output_dir", str(folder))
    return checkpoint_of(folder)


@pytest.mark.parametrize("stage", ["finetune", "linprobe"])
@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m == "saim" else pytest.mark.slow) for m in RUNS])
def test_a_file_of_photographs_starts_other_channels(method, stage, folders, tmp_path, capsys):
    of, _ = folders
    start = train_on_photographs(method, of(3), tmp_path)
    capsys.readouterr()
    train(method, stage, of(2), tmp_path / "out", 2, start)
    assert "of 3 channels, adapted to 2" in capsys.readouterr().out


# ---- what reads checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("chans", [1, 13])
@pytest.mark.parametrize("method", RUNS)
def test_tools_take_channels_from_the_checkpoint(method, chans, folders, tmp_path, capsys):
    of, pretrained = folders
    data, path = of(chans), pretrained(method, chans)
    place = ["--data_path", data, "--num_workers", "0", "--device", "cpu"]
    run_main(knn, method, path, *place, "--nb_knn", "3")
    assert "3-NN" in capsys.readouterr().out
    run_main(extract_features, method, path, *place, "--split", "val", "--out", str(tmp_path / "val.npy"))
    features, _, about = extract_features.read(str(tmp_path / "val.npy"))
    assert (len(features), about["in_chans"], about["mean"]) == (8, chans, [0.25] * chans)
    for out, form in (("folder", "timm"), ("file.safetensors", "safetensors")):
        run_main(export, method, path, str(tmp_path / out), "--format", form)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"][0] == config["model_args"]["in_chans"] == chans
    assert config["pretrained_cfg"]["mean"] == [0.25] * chans
    network: Any = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    imgs = torch.rand(2, chans, 16, 16)
    backbone = encoders.load_backbone(method, path)
    with torch.no_grad():
        own, timms = backbone(imgs), network.forward_head(network.forward_features(imgs), pre_logits=True)
    torch.testing.assert_close(own, timms, rtol=1e-4, atol=1e-4)
    for checkpoint in (tmp_path / "folder", tmp_path / "file.safetensors"):
        kind = "timm" if checkpoint.is_dir() else method
        run_main(
            extract_features, kind, str(checkpoint), *place, "--split", "val", "--out", str(tmp_path / "again.npy")
        )
        np.testing.assert_allclose(extract_features.read(str(tmp_path / "again.npy"))[0], features, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("chans", [1, 2, 13])
def test_pictures(chans, folders, tmp_path, capsys):
    of, pretrained = folders
    files = [str(path) for path in sorted(Path(of(chans), "val").rglob("*.*"))[:2]]
    images, out = ["--images", *files, "--device", "cpu"], str(tmp_path)
    for main, flag in ((saim.visualize_attention, "--checkpoint"), (saim.visualize_prediction, "--checkpoint")):
        run_main(main, flag, pretrained("saim", chans), *images, "--output_dir", out)
    run_main(cae.main_visualize, "--checkpoint", pretrained("cae", chans), *images, "--output_dir", out)
    orders = ["--checkpoint", pretrained("semaim", chans), "--output", f"{out}/orders.png", "--device", "cpu"]
    run_main(semaim.main_visualize, *orders, "--images", of(chans), "--num_images", "2")
    shown = ["--image_path", *files, "--image_size", "16", "--output_dir", out, "--device", "cpu", "--arch", "vit_nano"]
    run_main(udi.visualize_attention, "--pretrained_weights", pretrained("udi", chans), *shown)
    flags = [flag for flag in RUNS["a2mim"]["pretrain"][1] if flag not in ("--fft_weight", "0.1")]
    run_main(a2mim.main_visualize, *flags, "--resume", pretrained("a2mim", chans), *images[:-2], "--work_dir", out)
    for main, flags in (  # images of a folder
        (saim.visualize_attention, ["--checkpoint", pretrained("saim", chans), "--data_path", of(chans)]),
        (cae.main_visualize, ["--checkpoint", pretrained("cae", chans), "--data_path", of(chans)]),
    ):
        run_main(main, *flags, "--num_images", "2", "--device", "cpu", "--output_dir", f"{out}/folder")
    flags = [flag for flag in RUNS["a2mim"]["pretrain"][1] if flag not in ("--fft_weight", "0.1")]
    start = ["--resume", pretrained("a2mim", chans), "--data_path", of(chans), "--num_images", "2"]
    run_main(a2mim.main_visualize, *flags, *start, "--work_dir", f"{out}/folder")
    names = ("attention", "predictions", "reconstruction", "orders", "overview", "reconstruction/latest_0")
    assert all(Image.open(tmp_path / f"{name}.png").size[0] > 16 for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["semaim", "udi"])
def test_knn_of_a_method_takes_channels_from_the_checkpoint(method, folders, capsys):
    of, pretrained = folders
    main = {"semaim": semaim.main_knn, "udi": udi.main_knn}[method]
    name = ["--model", "vit_nano_patch16"] if method == "semaim" else ["--arch", "vit_nano"]
    flags = [*name, "--input_size", "16", "--patch_size", "8", "--nb_classes", "2", "--nb_knn", "3"]
    flags += ["--pretrained_weights", pretrained(method, 4), "--data_path", of(4), "--num_workers", "0"]
    run_main(main, *flags, "--device", "cpu")
    assert "3-NN" in capsys.readouterr().out


def test_the_check_before_a_run_and_the_probe_of_pixels_read_them(folders, capsys):
    of, _ = folders
    for chans, said in ((13, "8 readable"), (4, "8 unreadable: "), (None, "")):
        words = ["--data_path", of(13), *(["--in_chans", str(chans)] if chans else [])]
        sets = doctor.image_sets(saim.main_finetune.get_args_parser().parse_args(words), labelled=True, count=0)
        if chans:
            doctor.check_images(doctor.Report(), sets["val"], "val", "all", 16, False)
        out = capsys.readouterr().out
        assert said in out
        assert ("13 channels, expected --in_chans 4" in out) == (chans == 4)
        assert bool(sets) == bool(chans)  # without the flag .npy files are no images
    run_main(probe, "--pixels", "4", "--data_path", of(13), "--in_chans", "13")
    assert "8 training images: nearest 100.0 %, logistic 100.0 % of 8 validation images" in capsys.readouterr().out
    error = mistake(probe, "--pixels", "4", "--data_path", of(13), "--in_chans", "4", capsys=capsys)
    assert ".npy: unreadable image (13 channels, expected --in_chans 4)" in error


@pytest.mark.slow
def test_logistic_regression_takes_channels_from_the_checkpoint(folders, tmp_path, capsys):
    of, pretrained = folders
    flags = ["--arch", "vit_nano", "--patch_size", "8", "--input_size", "16", "--class_num", "2", "--device", "cpu"]
    flags += ["--pretrained_weights", pretrained("udi", 4), "--data_path", of(4), "--num_workers", "0"]
    flags += ["--target_list_path", f"{of(4)}/labelled.txt", "--output_dir", str(tmp_path), "--lr_lambd", "0.1"]
    run_main(udi.main_logistic_regression, *flags)
    assert "8 images, lambda 0.1: accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_analyses(folders, tmp_path, capsys):
    """Fourier's takes any channels; that of interactions, and UDI's video, say that they do not."""
    of, pretrained = folders
    path = pretrained("a2mim", 4)
    flags = ["--model_name", "vit_nano", "--patch_size", "8", "--img_size", "16", "--scale_size", "16"]
    flags += ["--pretrained_path", path, "--test_dir", of(4), "--batch_size", "4", "--num_workers", "0"]
    run_main(a2mim.main_fourier, *flags, "--save_path", str(tmp_path), "--device", "cpu")
    assert "mean of 8 images" in capsys.readouterr().out
    words = ["--backbone", "vit_nano", "--patch_size", "8", "--image_size", "16", "--grid_size", "2", "--no_cuda"]
    words += ["--checkpoint_path", path, "--data_path", of(4), "--dataset", "imagenet", "--pairs", "1"]
    error = mistake(a2mim.main_interactions, *words, "--output_dir", str(tmp_path / "study"), capsys=capsys)
    assert f"{path}: takes 4 channels; interactions are those of photographs, of 3" in error
    shapes.write_video(tmp_path / "davis", "one", np.random.default_rng(0), 64)
    (tmp_path / "davis/ImageSets/2017").mkdir(parents=True)
    (tmp_path / "davis/ImageSets/2017/val.txt").write_text("one\n")
    words = ["--arch", "vit_nano", "--patch_size", "8", "--short_side", "64", "--data_path", str(tmp_path / "davis")]
    words += ["--pretrained_weights", pretrained("udi", 4), "--output_dir", str(tmp_path / "masks"), "--device", "cpu"]
    error = mistake(udi.main_video_segmentation, *words, capsys=capsys)
    assert "takes 4 channels, frames of videos have 3" in error


# ---- mistakes


def saim_flags(data: str, folder: Path, *further: str) -> list[str]:
    flags = RUNS["saim"]["pretrain"][1]
    return [*flags, "--data_path", data, "--output_dir", str(folder), *further]


def test_missing_statistics_and_stored_ones(folders, tmp_path, capsys):
    of, _ = folders
    flags = saim_flags(of(2), tmp_path / "run", "--in_chans", "2")
    error = mistake(saim.main_pretrain, *flags, capsys=capsys)
    assert (
        f"--mean is missing: expected 2 numbers, one a channel; `python scripts/tools/prepare_data.py stats {of(2)}`"
        in error
    )
    run_main(prepare_data, "stats", of(2))
    try:
        run_main(saim.main_pretrain, *flags)
        stored = distributed.flags_of(distributed.load(str(tmp_path / "run" / "checkpoint.pth")))
        assert stored["mean"] == json.loads(Path(of(2), ".channel_stats.json").read_text())["mean"]
    finally:
        Path(of(2), ".channel_stats.json").unlink()
    capsys.readouterr()
    error = mistake(saim.main_pretrain, *saim_flags(of(2), tmp_path, "--in_chans", "0"), capsys=capsys)
    assert "--in_chans 0: expected at least 1" in error


def test_other_channels_than_said_and_mixed_folders(folders, tmp_path, capsys):
    of, _ = folders
    four = ["--in_chans", "4", "--mean", *["0.5"] * 4, "--std", *["0.5"] * 4]
    error = mistake(saim.main_pretrain, *saim_flags(of(13), tmp_path, *four), capsys=capsys)
    assert ".npy: unreadable image (13 channels, expected --in_chans 4); --bad_images skip goes on" in error
    assert list(tmp_path.glob("*.pth")) == []  # of a network of 4 channels, which the corrected command would continue
    for i in range(3):
        write(tmp_path / "mixed" / f"{i}.png", np.zeros((20, 20, 4), np.uint16))
    write(tmp_path / "mixed" / "odd.tif", np.zeros((20, 20), np.uint16))
    error = mistake(saim.main_pretrain, *saim_flags(str(tmp_path / "mixed"), tmp_path, *four), capsys=capsys)
    assert f"{tmp_path}/mixed/odd.tif: unreadable image (1 channel, expected --in_chans 4)" in error


def test_what_knows_three_channels_only(folders, tmp_path, capsys):
    of, pretrained = folders
    own = ["--in_chans", "2", "--mean", "0.5", "0.5", "--std", "0.5", "0.5", "--data_path", of(2)]
    own += ["--output_dir", str(tmp_path)]
    flags = [*RUNS["semaim"]["pretrain"][1], *own, "--predict_feature", "clip", "--teacher_path", "x.pt"]
    error = mistake(semaim.main_pretrain, *flags, capsys=capsys)
    assert "--in_chans 2: the teacher of --predict_feature clip takes 3 channels" in error
    flags = [*RUNS["cae"]["pretrain"][1], *own, "--discrete_vae_weight_path", "random"]
    error = mistake(cae.main_pretrain, *flags, capsys=capsys)
    assert (
        "--in_chans 2: the tokenizer takes 3 channels; one of main_tokenizer.py with the same --in_chans can" in error
    )
