"""Small runs of A2MIM that its tests start, stop and compare."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from a2mim import main_finetune, main_pretrain
from a2mim.models_a2mim import Classifier, MaskedImageModel
from common import distributed

# 48 images: 6 steps of 8; or 7 steps of 7, the last one of 6 images and half an update.
SMALL = ["--epochs", "3", "--num_workers", "0", "--warmup_epochs", "1"]
VIT = ["--backbone", "vit_nano", "--patch_size", "8", "--batch_size", "8", "--drop_path", "0.2", "--clip_grad", "1"]
UNEVEN = ["--backbone", "resnet_nano", "--batch_size", "7", "--accum", "2"]
SIDE = ["--input_size", "32", "--mask_patch_size", "16"]
SPECTRUM = ["--loss", "focal_l1", "--fft_weight", "0.5", "--fft_unmask_weight", "1e-3"]
PARAMWISE = ["--paramwise", '[("bias", {"weight_decay": 0.0}), ("mask_", {"weight_decay": 0.0, "lr_mult": 0.1})]']
EVAL = ["--train_size", "32", "--val_resize", "36", "--val_crop", "32", "--nb_classes", "10"]
LAMB = ["--opt", "lamb", "--lr", "1e-2", "--bce", "true", "--by_epoch", "true", "--drop_path", "0.2", "--aug", "rsb"]
EMA = ["--ema", "0.9", "--ema_warmup_iters", "9", "--ema_update_interval", "2"]
MIX = ["--mixup", "0.1", "--cutmix", "1"]
CASES: dict[str, tuple[ModuleType, type, list[str]]] = {
    "vit": (main_pretrain, MaskedImageModel, [*SMALL, *VIT, *SIDE, *PARAMWISE]),
    "resnet": (
        main_pretrain,
        MaskedImageModel,
        [*SMALL, *UNEVEN, *SPECTRUM, *PARAMWISE, *SIDE, "--mask_layer", "3", "--mask_init", "1e-6"],
    ),
    # Repeated augmentation needs 256 images.
    "finetune": (main_finetune, Classifier, [*SMALL, *UNEVEN, *EVAL, *LAMB, *EMA, *MIX]),
    "finetune_vit": (main_finetune, Classifier, [*SMALL, *VIT, *EVAL, *MIX, "--layer_decay", "0.65", "--aug", "swin"]),
}
SCRIPTS = {name: f"a2mim/{Path(str(main.__file__)).name}" for name, (main, *_) in CASES.items()}


def state_of(folder: Path, name: str = "latest.pth") -> dict[str, Any]:
    return distributed.load(str(folder / name))


def flags_of(case: str, digits: str, folder: Path, *further: str) -> list[str]:
    return [*CASES[case][2], "--data_path", digits, "--work_dir", str(folder), "--device", "cpu", *further]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
