"""A tiny pre-training checkpoint, as udi/main_pretrain.py writes it."""

from pathlib import Path

import torch

from udi import main_pretrain

NANO = ["--arch", "vit_nano", "--patch_size", "8"]
SIXTEEN = ["--patch_size", "4", "--global_size", "16", "--local_size", "8", "--out_dim", "32"]  # pixels


def pretrained(folder: Path, *flags: str) -> str:
    """A checkpoint of networks for 32 pixels with two class tokens and 64 prototypes, unless flags say otherwise.

    Student and teacher differ.
    """
    own = [*NANO, "--global_size", "32", "--local_size", "16", "--out_dim", "64", *flags]
    args = main_pretrain.get_args_parser().parse_args(own)
    torch.manual_seed(0)
    student, other = (main_pretrain.build_model(args) for _ in range(2))
    state = {
        "student": main_pretrain.Prefixed(student).state_dict(),
        "teacher": main_pretrain.build_teacher(other).state_dict(),
        "optimizer": {},
        "epoch": 1,
        "args": vars(args),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "checkpoint.pth")
    return str(folder / "checkpoint.pth")
