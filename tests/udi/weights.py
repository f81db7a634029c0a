"""A tiny pre-training checkpoint, as udi/main_pretrain.py writes it."""

from pathlib import Path

import torch

from udi import main_pretrain

NANO = ["--arch", "vit_nano", "--patch_size", "8"]


def pretrained(folder: Path, tokens: int = 2, seed: int = 0) -> str:
    """A checkpoint of networks for 32 pixels with 64 prototypes; student and teacher differ."""
    flags = [*NANO, "--global_size", "32", "--local_size", "16", "--out_dim", "64", "--number_cls_token", str(tokens)]
    args = main_pretrain.get_args_parser().parse_args(flags)
    torch.manual_seed(seed)
    student, other = (main_pretrain.build_model(args) for _ in range(2))
    teacher = main_pretrain.build_teacher(other)
    state = {
        "student": main_pretrain.Prefixed(student).state_dict(),
        "teacher": teacher.state_dict(),
        "epoch": 1,
        "args": vars(args),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "checkpoint.pth")
    return str(folder / "checkpoint.pth")
