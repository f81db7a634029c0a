"""What all encoders have in common: a network from images to features, and what a checkpoint says of its network.

Legend: N images, D width of the features, K classes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common import datasets, distributed
from common.distributed import UserError
from scripts.tools.flags import network_of


@dataclass(frozen=True)
class Source:
    """A checkpoint file, and what is asked of it.

    Args:
        path: file or https address; '' stands for random weights.
        model: name of the network; '': as the file says.
        input_size: image side in pixels, to which positions are resized; None: as the file says.
        key: under which the file holds the weights; '': that of the network that goes on training.
        pool: token (the class token) or avg (the mean of the patches); '': as the method's own evaluations.
        state: the file's content. args: the flags of the run that wrote it.
        fresh: take the file's network with new random weights.
    """

    path: str
    model: str = ""
    input_size: int | None = None
    key: str = ""
    pool: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False

    def weights(self) -> dict[str, Tensor]:
        """The weights under --key, else those of the network that goes on training; {} for random weights."""
        if not self.path:
            return {}
        keys = (self.key,) if self.key else distributed.WEIGHT_KEYS
        return distributed.weights_of(self.state, self.path, keys, bare=not self.key)

    def name(self, models: Iterable[str], aliases: dict[str, str]) -> str:
        """The network's name in `models`: the one asked for, else that of the run's flags; '' if that is none.

        Args:
            aliases: {other name: name in `models`}.
        Raises:
            UserError: the name asked for is unknown, or random weights come without one.
        """
        stored = network_of(self.args)
        name = self.model or str(stored)
        name = aliases.get(name, name)
        if name in models:
            return name
        if self.model or not self.path:
            given = f" {self.model}" if self.model else ""
            raise UserError(f"--model{given}: expected one of {', '.join([*models, *aliases])}")
        return ""

    def name_by_sizes(self, models: Mapping[str, Callable[..., Any]], width: int, depth: int = 0) -> str:
        """The first of `models` of this width and, unless it is 0, number of blocks; raises UserError if none is."""
        for name, build in models.items():
            with torch.device("meta"):
                if build(depth=1).embed_dim == width and depth in (0, len(build().blocks)):
                    return name
        blocks = f" and {depth} blocks" if depth else ""
        raise UserError(f"{self.path}: --model must be given, no known model has {width} channels{blocks}")

    def image_side(self, weights: dict[str, Tensor], patch_size: int) -> int:
        """In pixels: what is asked for, else as the run's flags say, else as the positions do, else 224, which also
        stands for the sizes of detection."""
        stored = [self.args.get(flag) for flag in ("input_size", "val_crop")]
        known = next((size for size in stored if isinstance(size, int)), 224 if "train_json" in self.args else 0)
        return self.input_size or known or patch_size * grid_side(weights) or 224

    def channels(self, mean: tuple = datasets.IMAGENET_MEAN, std: tuple = datasets.IMAGENET_STD) -> dict[str, Any]:
        """Keywords of `Backbone`: channels, mean and deviation of the run's flags; else, of three channels, the given.

        Raises:
            UserError: the flags do not say them for the file's channels.
        """
        in_chans, own = self.args.get("in_chans"), {name: self.args.get(name) for name in ("mean", "std")}
        if (in_chans or 3) != 3 and not all(own.values()):
            raise UserError(f"{self.path}: is of {in_chans} channels, and its flags say no mean and std")
        mean, std = (tuple(own[name] or usual) for name, usual in (("mean", mean), ("std", std)))
        return {"in_chans": in_chans, "mean": mean, "std": std}

    def log_loaded(self, name: str, network: nn.Module, missing: list[str], unexpected: list[str]) -> None:
        """Say how much of the checkpoint is in the network."""
        matched = len(network.state_dict()) - len(missing)
        distributed.log(f"{self.path}: {name}, {distributed.load_report(matched, missing, unexpected)}")


class Backbone(nn.Module):
    """An encoder in eval mode: images (N, C, H, W), normalised by mean and std, -> features (N, D).

    Args:
        features: (network, images, pool) -> features (N, D), as the method's evaluations read them.
        head: features -> logits (N, K), where the checkpoint is a classifier of these features.
        crop_pct: share of the resized image's side that evaluations see. args: flags of the checkpoint's run.
        in_chans: C, of images of any depth; None: three of 8 bits.
        notes: sentences on what the checkpoint holds and the encoder does not.
        state_dict_of: the network's weights under the names of the method's checkpoints.
    """

    def __init__(
        self,
        network: nn.Module,
        features: Callable[[Any, Tensor, str], Tensor],
        model_name: str,
        *,
        input_size: int,
        patch_size: int,
        embed_dim: int,
        pool: str,
        crop_pct: float,
        args: dict[str, Any],
        head: nn.Module | None = None,
        mean: tuple[float, ...] = datasets.IMAGENET_MEAN,
        std: tuple[float, ...] = datasets.IMAGENET_STD,
        in_chans: int | None = None,
        interpolation: str = "bicubic",
        notes: Iterable[str] = (),
        state_dict_of: Callable[[Any], dict[str, Tensor]] = nn.Module.state_dict,
    ):
        super().__init__()
        self.network: Any = network
        self.head, self.features, self.state_dict_of = head, features, state_dict_of
        self.model_name, self.pool, self.args, self.notes = model_name, pool, args, list(notes)
        self.input_size, self.patch_size, self.embed_dim, self.crop_pct = input_size, patch_size, embed_dim, crop_pct
        self.mean, self.std, self.in_chans, self.interpolation = mean, std, in_chans, interpolation
        self.eval()

    def forward(self, imgs: Tensor) -> Tensor:
        return self.features(self.network, imgs, self.pool)

    def weights(self) -> dict[str, Tensor]:
        """All weights under the method's own names; a file that has them under 'model' is a checkpoint."""
        apart = self.head is not None and self.head is not getattr(self.network, "head", None)
        head = self.head.state_dict(prefix="head.") if self.head is not None and apart else {}
        return {**self.state_dict_of(self.network), **head}


NO_NORM = "The encoder of a dense task has no final norm: one with weights 1 and biases 0 stands for it."


def dense_weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights among those of a segmentation network or detector, without its pyramid; else none.

    The last stage of a ResNet is in some detectors a part of the heads.
    """
    if not any(name.startswith(("decode_head.", "rpn_head.")) for name in found):
        return {}
    stage = distributed.part_of(found, "roi_head.shared_head.")
    weights = {name: value for name, value in stage.items() if name.startswith("layer4.")}
    weights |= distributed.part_of(found, "backbone.")
    return {name: value for name, value in weights.items() if not name.startswith("fpn")}


def plain_norm(width: int) -> dict[str, Tensor]:
    """What stands for the final norm that an encoder of a dense task lacks."""
    return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}


def grid_side(weights: dict[str, Tensor]) -> int:
    """Side of the grid of patches that absolute or relative positions are for; 0 where there are none."""
    if "pos_embed" in weights:
        tokens = weights["cls_token"].shape[1] if "cls_token" in weights else 1
        return round((weights["pos_embed"].shape[1] - tokens) ** 0.5)
    tables = [value for name, value in weights.items() if name.endswith("relative_position_bias_table")]
    return (round((len(tables[0]) - 3) ** 0.5) + 1) // 2 if tables else 0


def linear_head(weights: dict[str, Tensor]) -> nn.Module | None:
    """The trained head of fine-tuning (linear) or of a linear probe (batch norm and linear) among weights."""
    probe = "head.1.weight" in weights
    weight = weights.get("head.1.weight" if probe else "head.weight")
    if weight is None:
        return None
    classes, dim = weight.shape
    linear = nn.Linear(dim, classes)
    head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear) if probe else linear
    head.load_state_dict({name.removeprefix("head."): x for name, x in weights.items() if name.startswith("head.")})
    return head.eval()
