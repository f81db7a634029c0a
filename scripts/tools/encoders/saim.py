"""The encoder of any SAIM checkpoint, as one network from images to features, and as a timm model.

Legend: N batch, L patches, D width, K classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common import datasets, distributed
from common.distributed import UserError
from saim.models_vit import MODELS, VisionTransformer, load_pretrained

# The encoders of pre-training networks.
ENCODERS = {
    "saim_base": "vit_base_patch16",
    "saim_small": "vit_small_patch16",
    "saim_tiny": "vit_tiny_patch16",
    "saim_nano": "vit_nano_patch16",
    "vit_igpt_base": "vit_base_patch16",
}


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
    """An encoder in eval mode: images (N, 3, H, W), normalised by mean and std, -> features (N, D).

    Args:
        head: features -> logits (N, K), where the checkpoint is a classifier.
        crop_pct: share of the resized image's side that evaluations see.
        args: the checkpoint's flags.
    """

    mean, std, interpolation = datasets.IMAGENET_MEAN, datasets.IMAGENET_STD, "bicubic"

    def __init__(
        self, network: VisionTransformer, model_name: str, head: nn.Module | None, crop_pct: float, args: dict[str, Any]
    ):
        super().__init__()
        self.network, self.model_name, self.head, self.crop_pct, self.args = network, model_name, head, crop_pct, args
        self.input_size, self.patch_size = network.patch_embed.img_size, network.patch_embed.patch_size
        self.embed_dim, self.pool = network.embed_dim, "avg" if network.global_pool else "token"
        self.eval()

    def forward(self, imgs: Tensor) -> Tensor:
        return self.network.forward_features(imgs)

    def weights(self) -> dict[str, Tensor]:
        """All weights under the method's own names; a file that has them under 'model' is a checkpoint."""
        head = {} if self.head is None else self.head.state_dict(prefix="head.")
        return {**self.network.state_dict(), **head}


def model_of(checkpoint: str, model: str, args: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """The name in `MODELS` of an encoder: the one given, else that of the checkpoint's flags, else by its width.

    Raises:
        UserError: there is none.
    """
    name = model or args.get("model", "")
    name = ENCODERS.get(name, name)
    if name in MODELS:
        return name
    if model:
        raise UserError(f"--model {model}: expected one of {', '.join([*MODELS, *ENCODERS])}")
    width = weights["patch_embed.proj.weight"].shape[0]
    for name, build in MODELS.items():
        with torch.device("meta"):
            if build(depth=1).embed_dim == width:
                return name
    raise UserError(f"{checkpoint}: --model must be given, no known model has {width} channels")


def classifier(weights: dict[str, Tensor]) -> nn.Module | None:
    """The trained head of fine-tuning (linear) or of a linear probe (batch norm and linear) among weights."""
    probe = "head.1.weight" in weights
    weight = weights.get("head.1.weight" if probe else "head.weight")
    if weight is None:
        return None
    classes, dim = weight.shape
    linear = nn.Linear(dim, classes)
    head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear) if probe else linear
    head.load_state_dict({key.removeprefix("head."): x for key, x in weights.items() if key.startswith("head.")})
    return head.eval()


def load_backbone(
    checkpoint: str, model: str = "", input_size: int | None = None, key: str = "", pool: str = ""
) -> Backbone:
    """The encoder of a checkpoint, from images to features.

    Args:
        checkpoint: file or https address of pre-training, fine-tuning or probing; '' takes random weights.
        model: a name in `MODELS`, or of pre-training; default: as the checkpoint's flags or shapes say.
        input_size: in pixels; default: the checkpoint's. Positions are resized.
        key: the weights' key in the file; default: the first of `distributed.WEIGHT_KEYS`.
        pool: token (the normed class token) or avg (the mean of the patch tokens, normed by `fc_norm`; a pre-trained
            encoder has no weights of that norm); default: what the checkpoint classifies, of pre-training token.
    Raises:
        UserError: the file cannot be read or holds no such encoder, or an argument does not fit it.
    """
    state = distributed.load(checkpoint) if checkpoint else {}
    args = state.get("args") or {}
    args = dict(args if isinstance(args, dict) else vars(args))
    weights: dict[str, Tensor] = {}
    if checkpoint:
        plain = not key and "patch_embed.proj.weight" in state
        weights = state if plain else distributed.weights_of(state, checkpoint, *([(key,)] if key else []))
        if not {"patch_embed.proj.weight", "pos_embed"} <= set(weights):
            raise UserError(f"{checkpoint}: holds no ViT; its weights: {', '.join(list(weights)[:4]) or 'none'}, ...")
    name = model_of(checkpoint, model, args, weights)
    sizes: dict[str, Any] = {"img_size": input_size or 224}
    if weights:
        sizes["patch_size"] = patch = weights["patch_embed.proj.weight"].shape[-1]
        sizes["img_size"] = input_size or patch * round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    trained = "avg" if "fc_norm.weight" in weights else "token"
    pool = pool or trained
    with distributed.user_errors(f"{checkpoint or 'random weights'}: check --model, --input_size and --pool"):
        network = MODELS[name](**sizes, num_classes=0, global_pool=pool == "avg")
        head = classifier(weights) if pool == trained else None
        if weights:
            missing, unexpected = load_pretrained(network, weights)
            matched = len(network.state_dict()) - len(missing)
            distributed.log(f"{checkpoint}: {name}, {distributed.load_report(matched, missing, unexpected)}")
    return Backbone(network, name, head, 224 / 256 if network.patch_embed.img_size <= 224 else 1.0, args)


# ---- timm

TIMM = {192: "vit_tiny", 384: "vit_small", 1024: "vit_large"}  # the nearest name of a width; sizes are given besides


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
    """The encoder, with its head where there is one, as timm's VisionTransformer; its numbers agree to 1e-5."""
    network = backbone.network
    state, weights = network.state_dict(), fold(backbone.head)
    for name, value in state.items():
        if ".attn.q." in name:  # timm projects query, key and value at once
            parts = [state[name.replace(".q.", f".{part}.")] for part in "qkv"]
            weights[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            weights[name] = value
    model_args = {
        "img_size": backbone.input_size,
        "patch_size": backbone.patch_size,
        "embed_dim": backbone.embed_dim,
        "depth": len(network.blocks),
        "num_heads": network.blocks[0].attn.num_heads,  # type: ignore[union-attr]
        "global_pool": backbone.pool,
    }
    notes = []
    if isinstance(backbone.head, nn.Sequential):
        notes.append("The probe's batch norm is folded into its linear layer.")
    classes = len(weights["head.bias"]) if backbone.head is not None else 0
    architecture = f"{TIMM.get(backbone.embed_dim, 'vit_base')}_patch16_224"
    return TimmForm(architecture, classes, model_args, weights, backbone.pool, notes)
