"""A tiny pre-training checkpoint of every method, with its flags and without a run.json."""

import importlib
from pathlib import Path
from typing import Any

import torch

from a2mim.openmixup import to_openmixup_state_dict
from tests.support.runs import arguments
from tests.support.udi_weights import pretrained

FLAGS = {
    "saim": "--model saim_nano --input_size 16 --patch_size 8 --query_depth 1",
    "semaim": "--model aim_nano --input_size 16 --patch_size 8 --query_depth 1",
    "cae": "--model cae_nano --input_size 16 --patch_size 8 --decoder_embed_dim 96 --decoder_num_heads 3",
    "a2mim": "--backbone resnet_nano --input_size 32 --mask_patch_size 16",
}


def checkpoint(method: str, folder: Path) -> str:
    if method == "udi":
        return pretrained(folder)
    main: Any = importlib.import_module(f"{method}.main_pretrain")
    args = arguments(main, *FLAGS[method].split())
    torch.manual_seed(7)
    model = main.build_model(args)
    weights = to_openmixup_state_dict(model) if method == "a2mim" else model.state_dict()
    key = "state_dict" if method in ("semaim", "a2mim") else "model"
    torch.save({key: weights, "args": dict(vars(args))}, folder / "checkpoint.pth")
    return str(folder / "checkpoint.pth")
