"""The encoder of any checkpoint, as one network from images to features, and as a timm model.

Legend: B images, C width, K classes, G side of the patch grid.
"""

import argparse
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cae.augmentation import HALF
from cae.main_linprobe import add_probe
from cae.models_vit import MODELS, VisionTransformer, encoder_weights, load_pretrained, named_weights
from common import datasets, distributed
from common.distributed import UserError

ATTENTIVE = ("query_token", "attentive_blocks.", "fc_norm.running_", "fc_norm.num_batches_tracked", "head.")


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

    def __init__(
        self,
        net: VisionTransformer,
        name: str,
        args: dict[str, Any],
        imagenet: bool,
        crop_pct: float,
        notes: list[str],
    ):
        super().__init__()
        self.net = net
        self.model_name, self.args, self.notes = name, args, notes
        self.input_size, self.patch_size = net.patch_embed.img_size, net.patch_embed.patch_size
        self.embed_dim, self.pool = net.embed_dim, "avg" if hasattr(net, "fc_norm") else "token"
        mean, std = (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD) if imagenet else (HALF, HALF)
        self.mean, self.std = tuple(args.get("mean", mean)), tuple(args.get("std", std))
        self.crop_pct, self.interpolation = crop_pct, "bicubic"
        self.eval()

    @property
    def head(self) -> nn.Module | None:
        """Features -> logits (B, K), if the checkpoint is a classifier of these features."""
        return None if isinstance(self.net.head, nn.Identity) else self.net.head

    def forward(self, imgs: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, C)."""
        return self.net.forward_features(imgs, is_train=False)

    def weights(self) -> dict[str, Tensor]:
        """Encoder and head under the names that `load_backbone` reads."""
        return self.net.state_dict()


@functools.cache
def _sizes() -> dict[str, tuple[int, int]]:
    """Width and number of blocks of every model."""
    with torch.device("meta"):
        nets = {name: build(num_classes=0) for name, build in MODELS.items()}
    return {name: (net.embed_dim, len(net.blocks)) for name, net in nets.items()}


def _name(model: str, args: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """--model, or the one of the stored flags, or the first one with the weights' shapes."""
    name = (model or str(args.get("model", ""))).removesuffix("_8k_vocab")  # of pre-training
    if name in MODELS:
        return name
    if model or not weights:
        raise UserError(f"--model{f' {model}' if model else ''}: expected one of {', '.join(MODELS)}")
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    size = weights["cls_token"].shape[-1], len(blocks)
    for name, own in _sizes().items():
        if own == size:
            return name
    raise ValueError(f"width {size[0]} and {size[1]} blocks are of no known model")


def _input_size(args: dict[str, Any], weights: dict[str, Tensor], patch_size: int) -> int:
    """Image side in pixels: of the stored flags, else of the positions, else 224."""
    tables = [value for key, value in weights.items() if key.endswith("relative_position_bias_table")]
    if isinstance(args.get("input_size"), int):
        return args["input_size"]
    if "pos_embed" in weights:
        return patch_size * round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return patch_size * (round((len(tables[0]) - 3) ** 0.5) + 1) // 2 if tables else 224


def load_backbone(
    checkpoint: str, model: str = "", input_size: int | None = None, key: str = "", pool: str = ""
) -> Backbone:
    """The encoder of a checkpoint in eval mode, from (B, 3, H, W) normalised images to (B, C) features.

    Args:
        checkpoint: file or https address of pre-training, fine-tuning or a probe, ours or the authors'; '' gives
            random weights of `model`.
        model: name in `models_vit.MODELS`; default: what the checkpoint's flags say, else what its shapes say.
        input_size: image side in pixels; default: the checkpoint's. Positions are resized as in linear probing.
        key: of the weights in the file, such as model_ema; default: model, module or state_dict.
        pool: token, after the final norm where the file has one, or avg, the patches' mean before that norm; default:
            a classifier's own; else token, which linear probing reads.
    Returns:
        the network; besides what its constructor sets it has `head`, `args` (the run's flags) and `weights()`. An
        attentive probe's query and head are left out.
    Raises:
        UserError: the file cannot be read, holds no encoder, or does not fit the flags.
    """
    if pool not in ("", "token", "avg"):
        raise UserError(f"--pool {pool}: expected token or avg")
    state = distributed.load(checkpoint) if checkpoint else {}
    args = state.get("args") or {}
    args = dict(vars(args) if isinstance(args, argparse.Namespace) else args)
    found = distributed.weights_of(state, checkpoint, (key,)) if key else {}
    found = found or named_weights(state, checkpoint) if checkpoint else {}
    weights, notes = encoder_weights(found), []
    if len(weights) < len(found):
        notes.append("The regressor, the decoder and the mask token of pre-training are left out.")
    where = f"{checkpoint or 'random weights'}: check --model and --input_size"
    with distributed.user_errors(where):
        lacking = [
            name for name in ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight") if name not in weights
        ]
        if checkpoint and lacking:
            raise UserError(f"{checkpoint}: holds no encoder of CAE, {lacking[0]} is missing; {_shown(weights)}")
        name, attentive = _name(model, args, weights), "query_token" in weights
        if attentive:
            notes.append("The attentive probe's query and head, which timm cannot express, are left out.")
            weights = {k: value for k, value in weights.items() if not k.startswith(ATTENTIVE)}
        own_pool = "avg" if "fc_norm.weight" in weights else "token"
        pool = pool or own_pool
        normed = not checkpoint or "norm.weight" in weights or "fc_norm.weight" in weights
        if pool == "avg" and not normed:
            raise UserError(f"--pool avg: {checkpoint} has no final norm, which the mean of the patches needs")
        classifier = next((w for w in ("head.weight", "head.1.weight") if w in weights and pool == own_pool), "")
        keywords = _keywords(args, weights) if checkpoint else {"init_values": 0.1}
        if input_size is not None:
            keywords["img_size"] = input_size
        net = MODELS[name](
            **keywords,
            num_classes=len(weights[classifier]) if classifier else 0,
            use_mean_pooling=pool == "avg" or not normed,
            lin_probe=pool == "token",
        )
        if classifier == "head.1.weight":
            add_probe(net)
        if checkpoint:
            missing, unexpected = load_pretrained(net, weights, resize_positions=True)
            matched = len(net.state_dict()) - len(missing)
            distributed.log(f"{name} from {checkpoint}: {distributed.load_report(matched, missing, unexpected)}")
    # Fine-tuning and attentive probing choose the images' statistics and view, linear probing does not.
    tuned, size = classifier == "head.weight" or attentive, net.patch_embed.img_size
    imagenet = not tuned or args.get("imagenet_default_mean_and_std", True)
    crop_pct = args.get("crop_pct") or (224 / 256 if size < 384 and (tuned or size <= 224) else 1.0)
    return Backbone(net, name, args, imagenet, crop_pct, notes)


def _shown(weights: dict[str, Tensor]) -> str:
    return f"its keys: {', '.join(list(weights)[:4]) or 'none'}"


def _keywords(args: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the weights tell."""
    patch_size = weights["patch_embed.proj.weight"].shape[-1]
    return {
        "img_size": _input_size(args, weights, patch_size),
        "patch_size": patch_size,
        "qkv_bias": "blocks.0.attn.q_bias" in weights,
        "init_values": float("blocks.0.gamma_1" in weights),
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in weights,
        "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in weights,
        "abs_pos_emb": "pos_embed" in weights,  # learned or sin-cos: the file has them
        "sin_pos_emb": False,
    }


# ---- timm


def fold(head: nn.Module | None) -> dict[str, Tensor]:
    """Weight and bias of a head as one linear layer; {} without one."""
    if head is None:
        return {}
    norm, linear = head if isinstance(head, nn.Sequential) else (None, head)
    weight, bias = (linear.get_parameter(name).detach() for name in ("weight", "bias"))
    if isinstance(norm, nn.BatchNorm1d):  # in float64: the differences of large numbers
        assert norm.running_mean is not None and norm.running_var is not None
        mean, std = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
        scaled = weight.double() / std
        weight, bias = scaled.to(weight.dtype), (bias.double() - scaled @ mean).to(bias.dtype)
    return {"head.weight": weight, "head.bias": bias}


def timm_form(backbone: Backbone) -> TimmForm:
    """The same encoder under timm's names: its Beit; or its VisionTransformer where the class token is not normed.

    Raises:
        UserError: timm has no such network.
    """
    net, notes, size = backbone.net, list(backbone.notes), "large" if len(backbone.net.blocks) > 12 else "base"
    block: Any = net.blocks[0]
    if block.attn.qkv.out_features != 3 * net.embed_dim:
        raise UserError(f"timm's attention needs a width that {block.attn.num_heads} heads divide, not {net.embed_dim}")
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith("head.")}
    weights = {k: v for k, v in weights.items() if not k.endswith("relative_position_index")}
    tables = [k for k in weights if k.endswith("relative_position_bias_table")]
    if tables and not any(weights[k].any() for k in tables):  # a probe's, which did not learn
        notes.append("The relative position biases, all of which are 0, are left out.")
        weights = {k: v for k, v in weights.items() if k not in tables}
        tables = []
    model_args: dict[str, Any] = {
        "img_size": backbone.input_size,
        "patch_size": backbone.patch_size,
        "embed_dim": net.embed_dim,
        "depth": len(net.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / net.embed_dim,
        "qkv_bias": block.attn.q_bias is not None,
        "init_values": 0.1 if block.gamma_1 is not None else 0.0,
        "global_pool": backbone.pool,
    }
    if hasattr(net, "norm") or hasattr(net, "fc_norm"):
        architecture = f"beit_{size}_patch16_224"
        model_args |= {
            "use_abs_pos_emb": net.pos_embed is not None,
            "use_rel_pos_bias": any(k.startswith("blocks.") for k in tables),
            "use_shared_rel_pos_bias": any(k.startswith("rel_pos_bias.") for k in tables),
        }
    elif tables:
        raise UserError(
            "timm's network with relative positions (Beit) norms the class token, which this probe does not; "
            "--format safetensors keeps it as it is"
        )
    else:
        architecture = f"vit_{size}_patch16_224"
        model_args |= {"final_norm": False, "pos_embed": "learn" if net.pos_embed is not None else "none"}
        weights = _plain_names(weights)
        notes.append("The class token is not normed, as in linear probing without --use_cls.")
    if isinstance(backbone.head, nn.Sequential):
        notes.append("The linear probe's batch norm is folded into its linear layer.")
    weights |= fold(backbone.head)
    classes = len(weights["head.bias"]) if backbone.head is not None else 0
    return TimmForm(architecture, classes, model_args, weights, backbone.pool, notes)


def _plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of timm's VisionTransformer, whose keys have biases, too."""
    named = {}
    for key, value in weights.items():
        if key.endswith(".q_bias"):
            v_bias = weights[key.replace(".q_bias", ".v_bias")]
            named[key.replace(".q_bias", ".qkv.bias")] = torch.cat([value, torch.zeros_like(value), v_bias])
        elif not key.endswith(".v_bias"):
            named[key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")] = value
    return named
