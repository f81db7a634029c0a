"""What the tools for all methods share: the network of a checkpoint, or of a folder that export.py wrote, by flags."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision import transforms

from common import datasets, distributed
from common.distributed import UserError

METHODS = ("saim", "semaim", "cae", "a2mim", "udi")


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


class TimmBackbone(nn.Module):
    """Features of a timm model in a folder with config.json and model.safetensors, as export.py writes it.

    Raises:
        UserError: the folder holds no such model.
    """

    def __init__(self, folder: str, input_size: int | None = None):
        super().__init__()
        path = Path(folder)
        for name in ("config.json", "model.safetensors"):  # the only form of weights that cannot hold code
            if not (path / name).is_file():
                raise UserError(f"{path}: has no {name}, expected a folder written by scripts/tools/export.py")
        with distributed.user_errors(f"{path}"):
            config: dict[str, Any] = json.loads((path / "config.json").read_text())
            resized: dict[str, Any] = (
                {} if input_size is None or "img_size" not in config["model_args"] else {"img_size": input_size}
            )
            self.network = timm.create_model(f"local-dir:{path}", pretrained=True, **resized)
            about: dict[str, Any] = self.network.pretrained_cfg  # type: ignore[assignment]
            self.model_name, self.pool = config["architecture"], config.get("global_pool", "")
            self.input_size = input_size or about["input_size"][-1]
            self.mean, self.std, self.interpolation = tuple(about["mean"]), tuple(about["std"]), about["interpolation"]
            self.crop_pct: float = about["crop_pct"]
            self.embed_dim: int = self.network.num_features  # type: ignore[assignment]
        self.eval()

    def forward(self, imgs: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        features = self.network.forward_features(imgs)  # type: ignore[operator]
        return self.network.forward_head(features, pre_logits=True)  # type: ignore[operator]


def load(args: argparse.Namespace) -> Any:
    """The network of the flags in eval mode, as `load_backbone` of every method describes it.

    Raises:
        UserError: the checkpoint or a flag does not fit.
    """
    if args.method == "timm" or Path(args.checkpoint).is_dir():
        given = [f"--{name}" for name in ("model", "key", "pool") if getattr(args, name)]
        if given:
            raise UserError(f"{given[0]}: {args.checkpoint} is no checkpoint but a folder with a network of its own")
        return TimmBackbone(args.checkpoint, args.input_size)
    load_backbone = importlib.import_module(f"scripts.tools.encoders.{args.method}").load_backbone
    if args.checkpoint != "random":
        return load_backbone(args.checkpoint, args.model, args.input_size, args.key, args.pool)
    if not args.model:
        raise UserError("--model: must be given for random weights")
    torch.manual_seed(0)
    return load_backbone("", args.model, args.input_size, args.key, args.pool)


def eval_transform(backbone: Any) -> transforms.Compose:
    """The evaluation transform of a network: shorter side, centre crop, normalisation."""
    size, mode = backbone.input_size, transforms.InterpolationMode(backbone.interpolation)
    resize = transforms.Resize(int(size / backbone.crop_pct), interpolation=mode)
    crop = transforms.CenterCrop(size)
    return transforms.Compose([resize, crop, *datasets.tensor_and_normalize(backbone.mean, backbone.std)])
