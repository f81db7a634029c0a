"""The encoder of any checkpoint, as one network from images to features, and as a timm model.

B images, D width of the features, K classes.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Any

from timm.models.beit import Beit
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from a2mim.backbones import BACKBONES, RESNET_BLOCKS, convnext, is_resnet, is_vit, plain_vit, resnet, vit
from a2mim.models_a2mim import Classifier, build_classifier
from a2mim.openmixup import (
    CONVNEXT_NAMES,
    HEADS,
    VIT_NAMES,
    encoder_tensors,
    load_encoder_weights,
    renamed,
    tensors,
    to_openmixup_state_dict,
)
from common import datasets, distributed
from common.distributed import UserError

FIRST = ("cls_token", "layer1.0.conv1.weight", "downsample_layers.0.0.weight", "stem.0.weight")  # of each family


@dataclass(frozen=True)
class TimmForm:
    """A network under timm's names.

    timm.create_model(architecture, num_classes=num_classes, **model_args) takes `weights` strictly and gives logits
    (N, K), without classes the features (N, D). notes: sentences on what is left out or changed.
    """

    architecture: str
    num_classes: int
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    pool: str
    notes: list[str]


class Backbone(nn.Module):
    """An encoder with what its images and its users need to know: see `load_backbone`."""

    def __init__(self, net: Classifier, name: str, input_size: int, args: dict[str, Any], notes: list[str]):
        super().__init__()
        self.net = net
        self.model_name, self.args, self.notes = name, args, notes
        self.input_size, self.embed_dim = input_size, net.net.num_features
        self.patch_size = net.net.patch_embed.patch_size[0] if is_vit(net.net) else 32  # the stride of a CNN
        self.pool = net.net.global_pool if is_vit(net.net) else "avg"
        self.mean, self.std = datasets.IMAGENET_MEAN, datasets.IMAGENET_STD
        self.crop_pct, self.interpolation = args.get("crop_pct", _crop_pct(args)), "bicubic"
        self.eval()

    @property
    def head(self) -> nn.Module | None:
        """Features -> logits (B, K), if the checkpoint is a classifier of these features."""
        return None if isinstance(self.net.head, nn.Identity) else self.net.head

    def forward(self, imgs: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, D)."""
        return self.net.features(imgs)

    def weights(self) -> dict[str, Tensor]:
        """Encoder and head under OpenMixup's names, as every main reads them."""
        return to_openmixup_state_dict(self.net)


def _crop_pct(args: dict[str, Any]) -> float:
    """Share of the resized side that a stored run's evaluation sees, such that side / share is that side again."""
    crop, side = args.get("val_crop", 224), args.get("val_resize", 256)
    share = crop / side
    return share if int(crop / share) == side else math.nextafter(share, 0)


# ---- which backbone


def _blocks(weights: dict[str, Tensor], stage: str) -> int:
    """How many blocks a stage has, whose names begin with `stage`, a dot and their number."""
    numbers = {k.removeprefix(f"{stage}.").split(".")[0] for k in weights if k.startswith(f"{stage}.")}
    return sum(number.isdecimal() for number in numbers)


def _shape_of(weights: dict[str, Tensor]) -> tuple[Any, ...]:
    """Family and sizes of an encoder's weights; raises KeyError where one is missing that tells them."""
    if "cls_token" in weights:
        weights = {renamed(k, VIT_NAMES): v for k, v in weights.items()}
        family = vit if any(k.endswith("relative_position_bias_table") for k in weights) else plain_vit
        width, hidden = weights["cls_token"].shape[-1], len(weights["layers.0.ffn.layers.0.0.weight"])
        return family, width, _blocks(weights, "layers"), hidden
    if "layer1.0.conv1.weight" in weights:
        counts = tuple(_blocks(weights, f"layer{i}") for i in (1, 2, 3, 4))
        return resnet, "layer1.0.conv3.weight" in weights, counts, len(weights["layer1.0.conv1.weight"])
    weights = {renamed(k, CONVNEXT_NAMES): v for k, v in weights.items()}
    stages = [f"stages.{i}" for i in range(4)]
    dims = tuple(len(weights[f"{stage}.0.depthwise_conv.weight"]) for stage in stages)
    return convnext, tuple(_blocks(weights, stage) for stage in stages), dims


def _shape_by_name() -> dict[str, tuple[Any, ...]]:
    """What `_shape_of` gives for every backbone."""
    shapes: dict[str, tuple[Any, ...]] = {}
    for name, build in BACKBONES.items():
        family, keywords = build.func, build.keywords  # type: ignore[attr-defined]
        if family in (vit, plain_vit):
            width = keywords["embed_dim"]
            shapes[name] = family, width, keywords["depth"], int(width * keywords.get("mlp_ratio", 4))
        elif family is resnet:
            block, counts = RESNET_BLOCKS[keywords["depth"]]
            counts = keywords.get("block_counts", counts)
            shapes[name] = resnet, block is Bottleneck, counts, keywords.get("base_channels", 64)
        else:
            shapes[name] = convnext, keywords["depths"], keywords["dims"]
    return shapes


def _name(model: str, args: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """--model, or the one of the stored flags, or the one with the weights' shapes."""
    name = model or args.get("model") or args.get("backbone")
    if name in BACKBONES:
        return name
    if model or not weights:
        raise UserError(f"--model{f' {model}' if model else ''}: expected one of {', '.join(BACKBONES)}")
    shape = _shape_of(weights)
    found = next((name for name, own in _shape_by_name().items() if own == shape), "")
    if not found:
        raise ValueError(f"its {shape[0].__name__} is of no known size")
    return found


# ---- loading


def load_backbone(
    checkpoint: str, model: str = "", input_size: int | None = None, key: str = "", pool: str = ""
) -> Backbone:
    """The encoder of a checkpoint in eval mode, from (B, 3, H, W) normalised images to (B, D) features.

    Args:
        checkpoint: file or https address of pre-training, fine-tuning, a linear probe or an extracted encoder, under
            OpenMixup's names or timm's; '' gives random weights of `model`.
        model: name in `backbones.BACKBONES`; default: what the checkpoint's flags say, else what its shapes say.
        input_size: image side in pixels; default: the checkpoint's. A ViT's positions are resized, the relative ones as
            by --resize_rel_pos.
        key: of the weights in the file; default: state_dict, model or module. A file with averaged weights has them
            there.
        pool: of a ViT: token, after the final norm, or avg, the patches' mean before that norm; default: a
            classifier's own; else token, which linear probing reads. CNNs have avg only.
    Returns:
        the network; besides what its constructor sets it has `head`, `args` (the run's flags) and `weights()`.
    Raises:
        UserError: the file cannot be read, holds no encoder, or does not fit the flags.
    """
    if pool not in ("", "token", "avg"):
        raise UserError(f"--pool {pool}: expected token or avg")
    state = distributed.load(checkpoint) if checkpoint else {}
    args = state.get("args") or {}
    args = dict(vars(args) if isinstance(args, argparse.Namespace) else args)
    found = tensors(distributed.weights_of(state, checkpoint, (key,)) if key else state)
    weights = encoder_tensors(found)
    with distributed.user_errors(f"{checkpoint or 'random weights'}: check --model and --input_size"):
        if checkpoint and not any(name in weights for name in FIRST):
            shown = ", ".join(map(str, list(found or state)[:4])) or "none"
            raise UserError(f"{checkpoint}: holds no ViT, ResNet or ConvNeXt; its keys: {shown}")
        name = _name(model, args, weights)
        family = BACKBONES[name].func  # type: ignore[attr-defined]
        if checkpoint and _shape_of(weights) != _shape_by_name()[name]:
            raise UserError(f"{checkpoint}: is no {name}; check --model")
        is_token = family in (vit, plain_vit) and not any(k.startswith("fc_norm.") for k in weights)
        own_pool = "token" if is_token else "avg"
        pool = pool or own_pool
        if pool == "token" and family not in (vit, plain_vit):
            raise UserError(f"--pool token: {name} has no class token")
        keywords = {"img_size": input_size or _input_size(args, weights), **_keywords(family, weights)}
        if family in (vit, plain_vit):
            keywords["global_pool"] = pool
        head = {k: found[h + k] for h in HEADS for k in ("weight", "bias") if h + k in found and pool == own_pool}
        net = build_classifier(name, num_classes=len(head["bias"]) if head else 1, **keywords)
        if checkpoint:
            _load(net, weights, checkpoint, pool)
        if head:
            net.head.load_state_dict(head)
        else:
            net.net.reset_classifier(0)
    count = len(net.state_dict())
    if checkpoint:
        distributed.log(f"{name} from {checkpoint}: {count} tensors, {len(head['bias']) if head else 'no'} classes")
    return Backbone(net, name, keywords["img_size"], args, _notes(found))


def _input_size(args: dict[str, Any], weights: dict[str, Tensor]) -> int:
    """Image side in pixels: of the stored flags, else of a ViT's positions, else 224."""
    for flag in ("input_size", "val_crop"):
        if isinstance(args.get(flag), int):
            return args[flag]
    if "pos_embed" not in weights:
        return 224
    return _patch_size(weights) * round((weights["pos_embed"].shape[1] - 1) ** 0.5)


def _patch_size(weights: dict[str, Tensor]) -> int:
    return next(v.shape[-1] for k, v in weights.items() if k.startswith("patch_embed.") and k.endswith(".weight"))


def _keywords(family: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Keywords of a backbone that its weights tell."""
    if "cls_token" not in weights:
        return {}
    if family is vit:
        scaled = any(k.endswith(".gamma_1") for k in weights)
        return {"patch_size": _patch_size(weights), "init_values": 0.1 if scaled else None}
    return {"patch_size": _patch_size(weights), "qkv_bias": any(k.endswith(".qkv.bias") for k in weights)}


def _load(net: Classifier, weights: dict[str, Tensor], path: str, pool: str) -> None:
    """Load an encoder; a ViT's final norm becomes the one that its pooling has."""
    if is_vit(net.net):
        norms = ("fc_norm.", "norm.", "ln1.")
        norm = {k: weights[n + k] for n in reversed(norms) for k in ("weight", "bias") if n + k in weights}
        weights = {k: v for k, v in weights.items() if not k.startswith(norms)}
        if not norm:
            raise UserError(f"{path}: has no final norm")
        if pool == "avg":
            net.net.fc_norm.load_state_dict(norm)
        else:
            weights |= {f"norm.{k}": v for k, v in norm.items()}
    load_encoder_weights(net, weights, path, resize_rel_pos=True)


def _notes(found: dict[str, Tensor]) -> list[str]:
    """What of a checkpoint does not belong to the encoder."""
    notes = []
    if any(k.startswith("neck.") for k in found):
        notes.append("The mask token and the decoder of pre-training are left out.")
    if any(k.startswith("ema_") for k in found):
        notes.append("The weights are the run's moving average; the live ones are left out.")
    return notes


# ---- timm


def timm_form(backbone: Backbone) -> TimmForm:
    """The same network, which is timm's already, by the name of a registered one and what differs from that."""
    net: Any = backbone.net.net
    args: dict[str, Any] = {"global_pool": backbone.pool}
    if is_vit(net):
        block = net.blocks[0]
        args |= {
            "img_size": backbone.input_size,
            "patch_size": backbone.patch_size,
            "embed_dim": net.embed_dim,
            "depth": len(net.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / net.embed_dim,
        }
        size = "large" if net.embed_dim > 768 else "base"
        if isinstance(net, Beit):
            architecture = f"beit_{size}_patch16_224"
            args |= {"init_values": 0.1 if block.gamma_1 is not None else 0.0}
            args |= {"use_abs_pos_emb": True, "use_rel_pos_bias": True}
        else:
            architecture = f"vit_{size}_patch16_224"
            args["qkv_bias"] = block.attn.qkv.bias is not None
    else:
        build: Any = BACKBONES[backbone.model_name]
        if is_resnet(net):
            architecture = f"resnet{build.keywords['depth']}"
            if "block_counts" in build.keywords:
                channels = [build.keywords["base_channels"] * 2**i for i in range(4)]
                args |= {"layers": list(build.keywords["block_counts"]), "channels": channels}
        else:
            known = backbone.model_name in ("convnext_small", "convnext_base")
            architecture = backbone.model_name if known else "convnext_tiny"
            args |= {"depths": list(build.keywords["depths"]), "dims": list(build.keywords["dims"])}
    classes = 0 if backbone.head is None else net.num_classes
    return TimmForm(architecture, classes, args, net.state_dict(), backbone.pool, list(backbone.notes))
