"""Small images of any number of channels, and small runs of every main on them."""

import signal
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import a2mim.main_finetune
import a2mim.main_linprobe
import a2mim.main_pretrain
import cae.main_attentive
import cae.main_finetune
import cae.main_linprobe
import cae.main_pretrain
import cae.main_tokenizer
import saim.main_finetune
import saim.main_linprobe
import saim.main_pretrain
import semaim.main_finetune
import semaim.main_linprobe
import semaim.main_pretrain
import udi.main_finetune
import udi.main_linprobe
import udi.main_pretrain
import udi.main_semi_supervised
import udi.main_transfer
from common import distributed
from tests.support.runs import run_main

SIDE = 20


def write(path: Path, values: np.ndarray) -> None:
    """An image (H, W) or (H, W, N) of 16 bits as TIFF, PNG of 8 bits, or .npy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values if path.suffix == ".tif" else (values >> 8).astype(np.uint8)).save(path)


def images(folder: Path, chans: int, count: int = 4) -> str:
    """train/ and val/ with `count` images of 16 bits (RGBA: 8) in each of 2 classes, in the usual kind of file."""
    rng = np.random.default_rng(0)
    ending, shape = {1: (".tif", ()), 3: (".png", (3,)), 4: (".png", (4,))}.get(chans, (".npy", (chans,)))
    for split in ("train", "val"):
        for i in range(2 * count):
            values = rng.integers(0, 30_000 * (1 + i % 2), (SIDE, SIDE, *shape), dtype=np.uint16)
            values = values.transpose(2, 0, 1) if chans == 2 else values  # (N, H, W) is the other way to store them
            write(folder / split / "ab"[i % 2] / f"{i}{ending}", values)
    (folder / "labelled.txt").write_text("".join(f"{i}{ending}\n" for i in range(2 * count)))
    return str(folder)


ANY = ["--num_workers", "0", "--device", "cpu", "--epochs", "1", "--batch_size", "4"]
SIZE = [*ANY, "--input_size", "16", "--patch_size", "8", "--warmup_epochs", "0"]
CLASSES = ["--nb_classes", "2"]
VIT = [*SIZE, "--model", "vit_nano_patch16", *CLASSES]
CODES = ["--num_tokens", "12", "--num_layers", "2", "--codebook_dim", "4", "--hidden_dim", "8", "--input_size", "8"]
CAE = [*SIZE, "--model", "cae_nano"]
NARROW = ["--decoder_embed_dim", "12", "--decoder_num_heads", "3", "--regressor_depth", "1", "--decoder_depth", "1"]
MASKS = ["--mask_generator", "random", "--ratio_mask_patches", "0.5", "--second_input_size", "8"]
OWN = ["--discrete_vae_type", "customized", "--decoder_num_classes", "12"]
A2MIM = [*ANY, "--backbone", "vit_nano", "--patch_size", "8", "--warmup_epochs", "0", "--fft_weight", "0.1"]
TUNE = ["--backbone", "vit_nano", "--patch_size", "8", "--train_size", "16", "--val_resize", "16", "--val_crop", "16"]
UDI = [
    *ANY,
    "--arch",
    "vit_nano",
    "--patch_size",
    "8",
    "--warmup_epochs",
    "0",
    "--global_size",
    "16",
    "--local_size",
    "8",
]
VIEWS = ["--out_dim", "32", "--local_crops_number", "1", "--global_sampling_window_size", "1"]
VIEWS += ["--local_sampling_window_size", "1"]
DEIT = [*ANY, "--arch", "vit_nano", "--patch_size", "8", "--input_size", "16", "--warmup_epochs", "0"]
# Each method's mains in the order in which they run: flags besides those of the data, and that of the earlier file.
RUNS: dict[str, dict[str, tuple[ModuleType, list[str], str]]] = {
    "saim": {
        "pretrain": (saim.main_pretrain, [*SIZE, "--model", "saim_nano"], ""),
        "finetune": (saim.main_finetune, [*VIT, "--mixup", "0.8"], "--finetune"),
        "linprobe": (saim.main_linprobe, VIT, "--finetune"),
    },
    "semaim": {
        "pretrain": (semaim.main_pretrain, [*SIZE, "--model", "aim_nano", "--log_dir", ""], ""),
        "finetune": (semaim.main_finetune, [*VIT, "--log_dir", ""], "--finetune"),
        "linprobe": (semaim.main_linprobe, [*VIT, "--log_dir", ""], "--finetune"),
    },
    "cae": {
        "tokenizer": (cae.main_tokenizer, [*ANY, *CODES], ""),
        "pretrain": (
            cae.main_pretrain,
            [*CAE, *NARROW, *MASKS, *OWN, "--color_jitter", "0.4"],
            "--discrete_vae_weight_path",
        ),
        "finetune": (cae.main_finetune, CAE, "--finetune"),
        "linprobe": (cae.main_linprobe, [*CAE, *CLASSES], "--finetune"),
        "attentive": (
            cae.main_attentive,
            [*CAE, "--enable_linear_eval", "--linear_type", "attentive"],
            "--finetune",
        ),
    },
    "a2mim": {
        "pretrain": (a2mim.main_pretrain, [*A2MIM, "--input_size", "16", "--mask_patch_size", "8"], ""),
        "finetune": (a2mim.main_finetune, [*ANY, *TUNE, *CLASSES, "--warmup_epochs", "0"], "--pretrained"),
        "linprobe": (a2mim.main_linprobe, [*ANY, *TUNE, *CLASSES, "--warmup_epochs", "0"], "--pretrained"),
    },
    "udi": {
        "pretrain": (udi.main_pretrain, [*UDI, *VIEWS], ""),
        "finetune": (udi.main_finetune, [*SIZE, "--model", "vit_nano", *CLASSES, "--abs_pos_emb"], "--finetune"),
        "linprobe": (
            udi.main_linprobe,
            [*ANY, "--arch", "vit_nano", "--patch_size", "8", "--input_size", "16", *CLASSES],
            "--pretrained_weights",
        ),
        "semi_supervised": (udi.main_semi_supervised, [*DEIT, "--class_num", "2"], "--finetune"),
        "transfer": (udi.main_transfer, [*DEIT, "--data_set", "image_folder", "--no-repeated-aug"], "--finetune"),
    },
}
LATEST = (
    "checkpoint_bak.pth",
    "checkpoint.pth",
    "latest.pth",
    "*.temp.pth",
    "*.linear.pth",
    "checkpoint_*.pth",
    "checkpoint.pth.tar",
)


def checkpoint_of(folder: Path) -> str:
    """The latest checkpoint of a run."""
    return str(next(path for name in LATEST for path in sorted(folder.glob(name)) if "previous" not in path.name))


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All weights in a run's checkpoint."""
    state = distributed.load(checkpoint_of(folder))
    keys = ("model", "state_dict", "student", "teacher")
    return {f"{key}/{name}": x for key in keys if isinstance(state.get(key), dict) for name, x in state[key].items()}


def train(method: str, stage: str, data: str, folder: Path, chans: int, start: str = "", *further: str) -> None:
    """Two steps of a main; start: the file of an earlier stage."""
    main, flags, takes = RUNS[method][stage]
    own = ["--in_chans", str(chans), "--mean", *["0.25"] * chans, "--std", *["0.2"] * chans, "--data_path", data]
    place = ["--work_dir" if method == "a2mim" else "--output_dir", str(folder)]
    named = ["--target_list_path", f"{data}/labelled.txt"] if stage == "semi_supervised" else []
    run_main(main, *flags, *own, *place, *named, *([takes, start] if takes else []), *further)


def train_with_a_break(method: str, stage: str, data: str, folder: Path, chans: int, start: str = "") -> None:
    """The same run, which a signal ends after its first step, and that goes on from there."""
    calls: list[bool] = []

    def agree(fatal: bool) -> tuple[int, bool]:
        calls.append(fatal)
        return (signal.SIGTERM if len(calls) == 2 else 0), fatal

    with mock.patch("common.datasets.loader.agree", agree), pytest.raises(SystemExit) as end:
        train(method, stage, data, folder, chans, start)
    assert end.value.code == 128 + signal.SIGTERM
    train(method, stage, data, folder, chans, start)
