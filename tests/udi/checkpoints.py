"""Checkpoints of tiny pre-training runs for the tests of the evaluations."""

import argparse
from pathlib import Path

import torch

from udi import main_pretrain

FLAGS = ["--arch", "vit_nano", "--patch_size", "4", "--global_size", "16", "--local_size", "8", "--out_dim", "32"]


def pretraining_file(folder: Path, *flags: str) -> str:
    """A checkpoint.pth as upstream writes it, of random networks with two class tokens."""
    torch.manual_seed(0)
    args = main_pretrain.get_args_parser().parse_args([*FLAGS, *flags])
    student = main_pretrain.build_model(args)
    for param in student.parameters():
        param.data.add_(0.02 * torch.randn_like(param))
    teacher = main_pretrain.build_teacher(student)
    path = folder / "checkpoint.pth"
    state = {
        "student": main_pretrain.Prefixed(student).state_dict(),
        "teacher": teacher.state_dict(),
        "optimizer": {},
        "epoch": 1,
        "args": argparse.Namespace(**vars(args)),
    }
    torch.save(state, path)
    return str(path)
