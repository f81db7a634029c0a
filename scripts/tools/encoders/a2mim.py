"""A2MIM's encoders: ViTs, ResNets and ConvNeXts of any stage, under OpenMixup's names of weights or timm's."""

import math
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from a2mim import openmixup
from a2mim.backbones import BACKBONES, RESNET_BLOCKS, convnext, is_resnet, is_vit, plain_vit, resnet, vit
from a2mim.models_a2mim import Classifier, build_classifier
from a2mim.openmixup import HEADS, renamed
from common import distributed
from common.distributed import UserError
from scripts.tools.encoders.backbone import NO_NORM, Backbone, Source, dense_weights, grid_side, plain_norm
from scripts.tools.encoders.timm_form import TimmForm, vit_form

STEMS = ("conv1.weight", "downsample_layers.0.0.weight", "stem.0.weight")  # of ResNets and ConvNeXts
FIRST = ("cls_token", "layer1.0.conv1.weight", "downsample_layers.0.0.weight", "stem.0.weight")  # of each family


def features(network: Classifier, imgs: Tensor, pool: str) -> Tensor:
    return network.features(imgs)


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
    """Family and sizes of an encoder's weights; raises KeyError where a weight that says them is missing."""
    if "cls_token" in weights:
        weights = {renamed(k, openmixup.VIT_NAMES): v for k, v in weights.items()}
        family = vit if any(k.endswith("relative_position_bias_table") for k in weights) else plain_vit
        width, hidden = weights["cls_token"].shape[-1], len(weights["layers.0.ffn.layers.0.0.weight"])
        return family, width, _blocks(weights, "layers"), hidden
    if "layer1.0.conv1.weight" in weights:
        counts = tuple(_blocks(weights, f"layer{i}") for i in (1, 2, 3, 4))
        return resnet, "layer1.0.conv3.weight" in weights, counts, len(weights["layer1.0.conv1.weight"])
    weights = {renamed(k, openmixup.CONVNEXT_NAMES): v for k, v in weights.items()}
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


def _name_by_shapes(weights: dict[str, Tensor]) -> str:
    """The backbone with the weights' shapes; raises ValueError if there is none."""
    shape = _shape_of(weights)
    found = next((name for name, own in _shape_by_name().items() if own == shape), "")
    if not found:
        kind = {vit: "ViT", plain_vit: "ViT", resnet: "ResNet"}.get(shape[0], "ConvNeXt")
        raise ValueError(f"A2MIM has no {kind} of the file's width and blocks")
    return found


# ---- loading


def load_backbone(source: Source) -> Backbone:
    """The encoder of a checkpoint, whose moving average is under the normal names if it has one.

    A ViT pools token, after the final norm, or avg, the patches' mean before that norm; default: a classifier's own,
    of dense tasks avg, else token, which linear probing reads. CNNs have avg only. Relative positions are resized as by
    --resize_rel_pos.
    """
    path, args = source.path, source.args
    found = openmixup.tensors(source.weights() if source.key else source.state)
    dense = dense_weights(found)
    weights = _completed(dense) if dense else distributed.fitted(found, FIRST)
    with distributed.user_errors(f"{path or 'random weights'}: check --model and --input_size"):
        if path and not any(name in weights for name in FIRST):
            shown = ", ".join(map(str, list(found or source.state)[:4])) or "none"
            raise UserError(f"{path}: holds no ViT, ResNet or ConvNeXt; its keys: {shown}")
        name = source.name(BACKBONES, {}) or _name_by_shapes(weights)
        family = BACKBONES[name].func  # type: ignore[attr-defined]
        if path and _shape_of(weights) != _shape_by_name()[name]:
            raise UserError(f"{path}: is no {name}; check --model")
        has_token = family in (vit, plain_vit)
        trained = "token" if has_token and not dense and "fc_norm.weight" not in weights else "avg"
        pool = source.pool or trained
        if pool == "token" and not has_token:
            raise UserError(f"--pool token: {name} has no class token")
        keywords = _keywords(family, weights)
        if has_token:
            keywords["global_pool"] = pool
        size = source.image_side(weights, keywords.get("patch_size", 0))
        head = {k: found[h + k] for h in HEADS for k in ("weight", "bias") if h + k in found and pool == trained}
        network = build_classifier(name, num_classes=len(head["bias"]) if head else 1, img_size=size, **keywords)
        if path and not source.fresh:
            _load(network, weights, path, pool)
        if head:
            network.head.load_state_dict(head)
        else:
            network.net.reset_classifier(0)
    if path:
        classes = len(head["bias"]) if head else "no"
        distributed.log(f"{path}: {name}, {len(network.state_dict())} tensors, {classes} classes")
    return Backbone(
        network,
        features,
        name,
        input_size=size,
        patch_size=network.net.patch_embed.patch_size[0] if has_token else 32,  # the stride of a CNN
        embed_dim=network.net.num_features,
        pool=pool,
        crop_pct=args.get("crop_pct", _crop_pct(args)),
        args=args,
        head=None if isinstance(network.head, nn.Identity) else network.head,
        notes=_notes(found),
        **source.channels(),
        state_dict_of=openmixup.to_openmixup_state_dict,
    )


def _completed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a dense task with what a ViT lacks there: the final norm, and in segmentation absolute positions."""
    if "cls_token" not in weights:
        return weights
    width, tokens = weights["cls_token"].shape[-1], 1 + grid_side(weights) ** 2
    norm = {} if "ln1.weight" in weights else plain_norm(width)
    return {"pos_embed": torch.zeros(1, tokens, width), **weights, **norm}


def _keywords(family: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Keywords of a backbone that its weights say."""
    if "cls_token" not in weights:
        first = next((w for k, w in weights.items() if k in STEMS), None)
        return {} if first is None else {"in_chans": first.shape[1]}
    _, chans, _, side = next(v for k, v in weights.items() if k.startswith("patch_embed.") and v.ndim == 4).shape
    if family is vit:
        scaled = any(k.endswith(".gamma_1") for k in weights)
        return {"patch_size": side, "in_chans": chans, "init_values": 0.1 if scaled else None}
    return {"patch_size": side, "in_chans": chans, "qkv_bias": any(k.endswith(".qkv.bias") for k in weights)}


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
    openmixup.load_encoder_weights(net, weights, path, resize_rel_pos=True)


def _notes(found: dict[str, Tensor]) -> list[str]:
    """What of a checkpoint does not belong to the encoder."""
    sentences = {
        "neck.": "The mask token and the decoder of pre-training are left out.",
        "ema_": "The weights are the run's moving average; the live ones are left out.",
    }
    if dense := dense_weights(found):
        lacks = "cls_token" in dense and "ln1.weight" not in dense
        return ["The pyramid and the heads of a dense task are left out."] + [NO_NORM] * lacks
    return [sentence for prefix, sentence in sentences.items() if any(k.startswith(prefix) for k in found)]


# ---- timm


def timm_form(backbone: Backbone) -> TimmForm:
    """The same network, which is timm's already, by the name of a registered one and what differs from that."""
    net: Any = backbone.network.net
    if is_vit(net):
        block, arguments = net.blocks[0], {"mlp_ratio": net.blocks[0].mlp.fc1.out_features / net.embed_dim}
        size = "large" if net.embed_dim > 768 else "base"
        if isinstance(net, Beit):
            scale = 0.1 if block.gamma_1 is not None else 0.0
            arguments |= {"init_values": scale, "use_abs_pos_emb": True, "use_rel_pos_bias": True}
        else:
            arguments["qkv_bias"] = block.attn.qkv.bias is not None
        name = f"{'beit' if isinstance(net, Beit) else 'vit'}_{size}_patch16_224"
        return vit_form(backbone, net.blocks, name, net.state_dict(), backbone.notes, **arguments)
    keywords = BACKBONES[backbone.model_name].keywords  # type: ignore[attr-defined]
    if is_resnet(net):
        name, arguments = f"resnet{keywords['depth']}", {}
        if "block_counts" in keywords:
            channels = [keywords["base_channels"] * 2**i for i in range(4)]
            arguments = {"layers": list(keywords["block_counts"]), "channels": channels}
    else:
        name = backbone.model_name if backbone.model_name in ("convnext_small", "convnext_base") else "convnext_tiny"
        arguments = {"depths": list(keywords["depths"]), "dims": list(keywords["dims"])}
    arguments = {"global_pool": backbone.pool, **arguments}
    classes = 0 if backbone.head is None else net.num_classes
    return TimmForm(name, classes, arguments, net.state_dict(), backbone.pool, backbone.notes)
