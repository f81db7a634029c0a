"""The network of any method's checkpoint, or of a folder that export.py wrote, by flags."""

import argparse
import contextlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torchvision import transforms

from common import datasets, distributed
from common.distributed import UserError
from scripts.tools.encoders.backbone import Backbone, Source
from scripts.tools.encoders.timm_folder import load_folder
from scripts.tools.encoders.timm_form import TimmForm
from scripts.tools.flags import METHODS

# Flags that only one method's programs have, and what names of weights say where there are no flags.
OWN_FLAGS = {
    "a2mim": {"backbone"},
    "udi": {"arch", "class_tokens"},
    "semaim": {"permutation_type", "experiment"},
    "cae": {"discrete_vae_type", "sin_pos_emb"},
    "saim": {"order", "hflip"},
}
OWN_WEIGHTS = {
    r"(^|\.)layer1\.0\.|(^|\.)stages\.0\.|downsample_layers\.|layers\.\d+\.ln1\.": "a2mim",
    r"attn\.q_bias$|\.gamma_1$": "cae",
    r"relative_position_bias_table$": "a2mim",
    r"blocks\.0\.attn\.q\.": "saim",
    r"blocks\.0\.attn\.qkv\.": "udi",
}


def add_flags(p: argparse.ArgumentParser, timm: bool = True) -> None:
    """Add the flags that choose a network; timm: also one that only timm knows."""
    methods = [*METHODS, "timm"] if timm else METHODS
    folder = "a folder of export.py (its METHOD may be timm)" if timm else "safetensors file"
    p.add_argument("method", choices=methods, metavar="METHOD", help=", ".join(methods))
    p.add_argument("checkpoint", metavar="CHECKPOINT", help=f"file, https address, {folder}, or 'random' with --model")
    p.add_argument("--model", default="", help="name in the method's main_finetune.py; default: as the checkpoint says")
    p.add_argument("--input_size", default=None, type=int, help="image side in pixels; default: the checkpoint's")
    p.add_argument("--key", default="", help="the weights' key in the file: ema_state_dict, student, model_ema, ...")
    p.add_argument("--pool", default="", choices=["", "token", "avg"], help="default: as the method's own evaluations")


def _own(method: str) -> Any:
    """What a method's encoders do not share: `load_backbone(source)` and `timm_form(backbone)`."""
    return importlib.import_module(f"scripts.tools.encoders.{method}")


def method_of(checkpoint: str, state: dict[str, Any]) -> str:
    """Whose reader reads a checkpoint: by the command in the run.json beside it, by its flags, by its weights' names.

    Args:
        state: the file's content.
    Raises:
        UserError: nothing tells.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        command = json.loads(Path(checkpoint).with_name("run.json").read_text("utf-8"))["starts"][-1]["command"]
        found = re.search(rf"\b({'|'.join(METHODS)})[/.]main_", command)
        if found:
            return found[1]
    flags = distributed.flags_of(state)
    found = next((method for method, own in OWN_FLAGS.items() if own & set(flags)), "")
    if not found:
        with contextlib.suppress(UserError):
            names = distributed.weights_of(state, checkpoint, bare=True)
            fits = (m for pattern, m in OWN_WEIGHTS.items() if any(re.search(pattern, name) for name in names))
            found = next(fits, "")
    if not found:
        raise UserError(f"{checkpoint}: does not say which method it is of; name it with --method")
    return found


def load_backbone(
    method: str,
    checkpoint: str,
    model: str = "",
    input_size: int | None = None,
    key: str = "",
    pool: str = "",
    state: dict[str, Any] | None = None,
    fresh: bool = False,
) -> Backbone:
    """The encoder of a checkpoint, from images to features, with its head where it is a classifier of them.

    Args:
        checkpoint: file or https address of any stage, ours or the authors'; '' gives random weights of `model`.
        model, input_size, key, pool, fresh: as in `Source`.
        state: the file's content, where it is read already.
    Raises:
        UserError: the file cannot be read or holds no such encoder, or an argument does not fit it.
    """
    if pool not in ("", "token", "avg"):
        raise UserError(f"--pool {pool}: expected token or avg")
    if state is None:
        state = distributed.load(checkpoint) if checkpoint else {}
    args = distributed.flags_of(state)
    return _own(method).load_backbone(Source(checkpoint, model, input_size, key, pool, state, args, fresh))


def timm_form(method: str, backbone: Backbone) -> TimmForm:
    """An encoder as a network of timm's; raises UserError if timm has no such network."""
    form = _own(method).timm_form(backbone)
    if (backbone.in_chans or 3) != 3:
        form.model_args["in_chans"] = backbone.in_chans
    return form


def from_flags(args: argparse.Namespace) -> Backbone:
    """The network of the flags, as `load_backbone` gives it; random weights are the same every time.

    args.in_chans becomes that of the images that it takes.
    Raises:
        UserError: the checkpoint or a flag does not fit.
    """
    backbone = _from_flags(args)
    args.in_chans = backbone.in_chans
    return backbone


def _from_flags(args: argparse.Namespace) -> Backbone:
    if args.method == "timm" or Path(args.checkpoint).is_dir():
        given = [f"--{name}" for name in ("model", "key", "pool") if getattr(args, name)]
        if given:
            raise UserError(f"{given[0]}: {args.checkpoint} is no checkpoint but a folder with a network of its own")
        return load_folder(args.checkpoint, args.input_size)
    checkpoint = args.checkpoint
    if checkpoint == "random":
        if not args.model:
            raise UserError("--model: must be given for random weights")
        torch.manual_seed(0)
        checkpoint = ""
    return load_backbone(args.method, checkpoint, args.model, args.input_size, args.key, args.pool)


def eval_transform(backbone: Backbone) -> transforms.Compose:
    """The evaluation transform of a network: shorter side, centre crop, normalisation."""
    size, mode = backbone.input_size, transforms.InterpolationMode(backbone.interpolation)
    resize = transforms.Resize(int(size / backbone.crop_pct), interpolation=mode)
    crop = transforms.CenterCrop(size)
    last = datasets.tensor_and_normalize(backbone.mean, backbone.std, backbone.in_chans)
    return transforms.Compose([resize, crop, *last])
