"""A network that only timm knows: a folder that export.py wrote."""

import json
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from common import distributed
from common.distributed import UserError
from scripts.tools.encoders.backbone import Backbone


def features(network: Any, imgs: Tensor, pool: str) -> Tensor:
    return network.forward_head(network.forward_features(imgs), pre_logits=True)


def load_folder(folder: str, input_size: int | None = None) -> Backbone:
    """A timm model in a folder with config.json and model.safetensors, as export.py writes it.

    Raises:
        UserError: the folder holds no such model.
    """
    path = Path(folder)
    for name in ("config.json", "model.safetensors"):  # the only form of weights that cannot hold code
        if not (path / name).is_file():
            raise UserError(f"{path}: has no {name}, expected a folder written by scripts/tools/export.py")
    with distributed.user_errors(f"{path}"):
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
        sizes: dict[str, Any] = config["model_args"]
        resized: dict[str, Any] = {"img_size": input_size} if input_size and "img_size" in sizes else {}
        network: Any = timm.create_model(f"local-dir:{path}", pretrained=True, **resized)
        about: dict[str, Any] = network.pretrained_cfg
        return Backbone(
            network,
            features,
            config["architecture"],
            input_size=input_size or about["input_size"][-1],
            patch_size=sizes.get("patch_size", 0),
            embed_dim=network.num_features,
            pool=config.get("global_pool", ""),
            crop_pct=about["crop_pct"],
            args={},
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
            interpolation=about["interpolation"],
            in_chans=config.get("exported_from", {}).get("in_chans") or sizes.get("in_chans"),
        )
