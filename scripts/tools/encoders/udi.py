"""The ViT of any UDI checkpoint, as one network from images to features, and as a timm model.

B batch, c class tokens, D width, K classes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common import datasets, distributed
from common.distributed import UserError
from udi import models_finetune
from udi.backbone import ALIASES as ENCODERS
from udi.backbone import PARTS, build_backbone
from udi.main_finetune import HALF
from udi.models_eval import ClassProjHead, EvaluationViT
from udi.models_udi import MODELS, VisionTransformer

FineTuned = models_finetune.VisionTransformer


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
    """A ViT in eval mode: images (B, 3, H, W), normalised by mean and std, -> features (B, D).

    Args:
        network: a pre-trained ViT, or one of the evaluations' with its own pooling.
        pool: token: the normalised first class token. avg: of a pre-trained ViT the mean of the normalised patches, as
            its linear probe can add; of an evaluation's the normalised mean.
        head: features -> logits (B, K), where the checkpoint is a classifier.
        args: the checkpoint's flags.
    """

    def __init__(
        self,
        network: VisionTransformer | FineTuned,
        model_name: str,
        patch_size: int,
        input_size: int,
        pool: str,
        head: nn.Module | None,
        args: dict[str, Any],
    ):
        super().__init__()
        self.network, self.model_name, self.head, self.pool, self.args = network, model_name, head, pool, args
        self.input_size, self.patch_size, self.embed_dim = input_size, patch_size, network.embed_dim
        self.mean, self.std = datasets.IMAGENET_MEAN, datasets.IMAGENET_STD
        self.crop_pct, self.interpolation = 224 / 256, "bicubic"
        if isinstance(network, FineTuned):  # as main_finetune.py evaluates
            self.crop_pct = args.get("crop_pct") or (224 / 256 if input_size < 384 else 1.0)
            self.interpolation = "bilinear"
            if not args.get("imagenet_default_mean_and_std", True):
                self.mean = self.std = HALF
        self.eval()

    def forward(self, imgs: Tensor) -> Tensor:
        network = self.network
        if isinstance(network, FineTuned):
            return network.forward_features(imgs)
        if isinstance(network, EvaluationViT):
            return network.all_tokens(imgs)[:, 0]
        if self.pool == "token":
            return network(imgs)[:, 0]
        return network.get_intermediate_layers(imgs)[0][:, network.num_class_token :].mean(dim=1)

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
    """The trained head among weights: a linear layer, or layers of the projection head and a linear layer."""
    state = {key.removeprefix("head."): x for key, x in weights.items() if key.startswith("head.")}
    if "weight" in state:
        head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
    elif "cls_head.weight" in state and "mlp.0.weight" in state:
        layers = [state[key] for key in ("mlp.0.weight", "mlp.2.weight", "mlp.4.weight") if key in state]
        head = ClassProjHead(
            in_dim=layers[0].shape[1],
            out_dim=state["last_layer.weight_v"].shape[0] if len(layers) == 3 else 1,
            cls_dim=state["cls_head.weight"].shape[0],
            hidden_dim=layers[0].shape[0],
            bottleneck_dim=layers[-1].shape[0],
            finetune_layer=len(layers),
        )
    else:
        return None
    head.load_state_dict(state)
    return head


def grid_of(weights: dict[str, Tensor]) -> int:
    """Side of the grid of patches that absolute or relative positions are for; 14 where there are none."""
    if "pos_embed" in weights:
        return math.isqrt(weights["pos_embed"].shape[1] - weights["cls_token"].shape[1])
    tables = [x for name, x in weights.items() if name.endswith("relative_position_bias_table")]
    return (math.isqrt(len(tables[0]) - 3) + 1) // 2 if tables else 14


def finetuned(
    checkpoint: str, name: str, weights: dict[str, Tensor], args: dict[str, Any], sizes: dict[str, Any], pool: str
) -> FineTuned:
    """The network of a fine-tuning checkpoint without its head; its positions are told by its weights and flags."""
    relative = "blocks.0.attn.relative_position_bias_table" in weights
    shared = "rel_pos_bias.relative_position_bias_table" in weights
    if not args and "pos_embed" not in weights and not (relative or shared):
        raise UserError(f"{checkpoint}: has neither positions nor flags ('args') that tell of fixed ones")
    network = models_finetune.MODELS[name](
        **sizes,
        num_classes=0,
        init_values=float("blocks.0.gamma_1" in weights),
        use_abs_pos_emb="pos_embed" in weights or args.get("abs_pos_emb", False),
        use_learned_abs_pos_emb="pos_embed" in weights,
        use_rel_pos_bias=relative,
        use_shared_rel_pos_bias=shared,
        use_mean_pooling=pool == "avg",
        num_class_token=weights["cls_token"].shape[1],
    )
    missing, unexpected = models_finetune.load_pretrained(network, weights)
    lacking = [key for key in missing if not (key.startswith("fc_norm.") or key.endswith("relative_position_index"))]
    if lacking:
        raise ValueError(f"{lacking[0]} is missing")
    matched = len(network.state_dict()) - len(missing)
    distributed.log(f"{checkpoint}: {name}, {distributed.load_report(matched, missing, unexpected)}")
    return network


def load_backbone(
    checkpoint: str, model: str = "", input_size: int | None = None, key: str = "", pool: str = ""
) -> Backbone:
    """The ViT of a checkpoint, from images to features.

    Args:
        checkpoint: file or https address of pre-training, extracted weights, fine-tuning, semi-supervised or transfer
            learning; '' takes random weights.
        model: a name in `MODELS`; default: as the checkpoint's flags or shapes say.
        input_size: in pixels; default: the checkpoint's. Positions are resized.
        key: the weights' key in the file: teacher (default) or student, model (default) or model_ema.
        pool: token or avg, as in `Backbone`; default: what the checkpoint classifies, of pre-training token.
    Raises:
        UserError: the file cannot be read or holds no such ViT, or an argument does not fit it.
    """
    if not checkpoint:
        name, size = model_of(checkpoint, model, {}, {}), input_size or 224
        with distributed.user_errors(f"random weights: check --input_size {size}"):
            network = MODELS[name](img_size=[size])
        return Backbone(network, name, network.patch_size, size, pool or "token", None, {})
    state = distributed.load(checkpoint)
    if key and not isinstance(state.get(key), dict):
        found = ", ".join(str(k) for k, value in state.items() if isinstance(value, dict)) or "none"
        raise UserError(f"--key {key}: not in {checkpoint}, whose keys are {found}")
    args = state.get("args") or {}
    args = dict(args if isinstance(args, dict) else vars(args))
    weights = models_finetune.read_weights(checkpoint, key or "teacher", key or "model|module", state=state)
    name = model_of(checkpoint, model, {"model": args.get("model") or args.get("arch", "")}, weights)
    known: Any = MODELS[name]
    width, depth = (
        weights["patch_embed.proj.weight"].shape[0],
        len({k.split(".")[1] for k in weights if "blocks." in k}),
    )
    if (width, depth) != (known.keywords["embed_dim"], known.keywords["depth"]):
        raise UserError(f"{checkpoint}: --model {name}: the file has {depth} blocks of {width} channels")
    patch, tokens = weights["patch_embed.proj.weight"].shape[-1], weights["cls_token"].shape[1]
    stored = patch * grid_of(weights)
    size = input_size or args.get("input_size") or stored
    trained = "avg" if "fc_norm.weight" in weights else "token"
    is_finetuned = "rel_pos_bias" in args or any("relative_position" in k or ".gamma_" in k for k in weights)
    head = classifier(weights)
    pool = pool or args.get("pool") or trained
    with distributed.user_errors(f"{checkpoint}: check --model, --input_size and --pool"):
        if is_finetuned or "pos_embed" not in weights:
            network = finetuned(checkpoint, name, weights, args, {"img_size": size, "patch_size": patch}, pool)
        elif trained == pool == "avg":  # has a norm of its own
            sizes = {"img_size": [stored], "patch_size": patch, "num_class_token": tokens}
            network = EvaluationViT(avgpool_patchtokens=1, **sizes, **known.keywords)
            network.load_state_dict({k: x for k, x in weights.items() if not k.startswith("head.")})
        else:
            plain = {k: x for k, x in weights.items() if k.startswith(PARTS)}
            network = build_backbone(name, patch, plain, size)
    return Backbone(network, name, patch, size, pool, head if pool == trained else None, args)


# ---- timm

TIMM = {192: "vit_tiny", 384: "vit_small", 1024: "vit_large"}  # the nearest name of a width; sizes are given besides


def beit_form(network: FineTuned, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and weights of timm's Beit. A bias of the keys shifts all logits of a query alike, to no effect."""
    weights = {}
    for name, value in state.items():
        if name.endswith("qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            weights[f"{stem}q_bias"], _, weights[f"{stem}v_bias"] = value.chunk(3)
        else:
            weights[name] = value
    if network.pos_embed is not None:
        weights["pos_embed"] = network.pos_embed
    own, shared = (f"{part}relative_position_bias_table" for part in ("blocks.0.attn.", "rel_pos_bias."))
    return {
        "use_abs_pos_emb": network.pos_embed is not None,
        "use_rel_pos_bias": own in state,
        "use_shared_rel_pos_bias": shared in state,
    }, weights


def vit_form(backbone: Backbone, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and weights of timm's VisionTransformer, to which further class tokens are registers."""
    network, arguments = backbone.network, {}
    weights = {key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): x for key, x in state.items()}
    positions = network.pos_embed
    if isinstance(network, VisionTransformer):
        positions = network.positions(backbone.input_size, backbone.input_size)
    if positions is None:
        arguments["pos_embed"] = "none"
    else:
        weights["pos_embed"] = positions
    if network.num_class_token > 1:
        arguments["reg_tokens"] = network.num_class_token - 1
        weights["cls_token"], weights["reg_token"] = network.cls_token[:, :1], network.cls_token[:, 1:]
    if backbone.pool == "avg" and "fc_norm.weight" not in weights:
        arguments["fc_norm"] = False
    return arguments, weights


def timm_form(backbone: Backbone) -> TimmForm:
    """The ViT, with a linear head where there is one, as timm's VisionTransformer; with relative positions as its Beit.

    Its numbers agree to 1e-5.
    """
    network, head, notes, classes = backbone.network, backbone.head, [], 0
    state = {name: x for name, x in network.state_dict().items() if not name.endswith("relative_position_index")}
    if isinstance(head, nn.Linear):
        classes = head.out_features
        state |= head.state_dict(prefix="head.")
    elif head is not None:
        notes.append("The classifier keeps layers of the projection head, which timm's ViT has not: it is left out.")
    if isinstance(network, FineTuned) and any(name.endswith("relative_position_bias_table") for name in state):
        architecture = f"beit_{'large' if backbone.embed_dim == 1024 else 'base'}_patch16_224"
        arguments, weights = beit_form(network, state)
        notes.append("Biases of the keys, which have no effect, are left out.")
    else:
        architecture = f"{TIMM.get(backbone.embed_dim, 'vit_base')}_patch16_224"
        arguments, weights = vit_form(backbone, state)
        if network.num_class_token > 1:
            notes.append("The second class token is a register token.")
    model_args = {
        "img_size": backbone.input_size,
        "patch_size": backbone.patch_size,
        "embed_dim": backbone.embed_dim,
        "depth": len(network.blocks),
        "num_heads": network.blocks[0].attn.num_heads,  # type: ignore[union-attr]
        "init_values": 1.0 if "blocks.0.gamma_1" in state else None,
        "global_pool": backbone.pool,
        **arguments,
    }
    weights = {name: x.detach().clone() for name, x in weights.items()}
    return TimmForm(architecture, classes, model_args, weights, backbone.pool, notes)
