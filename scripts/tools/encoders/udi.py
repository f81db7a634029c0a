"""UDI's encoders: the ViT of pre-training, extracted weights, fine-tuning, semi-supervised and transfer learning,
segmentation and detection."""

from typing import Any

import torch
from torch import Tensor, nn

from common import distributed
from common.distributed import UserError
from scripts.tools.encoders.backbone import (
    NO_NORM,
    Backbone,
    Source,
    dense_weights,
    grid_side,
    linear_head,
    plain_norm,
)
from scripts.tools.encoders.timm_form import TimmForm, beit_names, beit_positions, vit_form, vit_named, vit_names
from udi import models_finetune
from udi.backbone import ALIASES, PARTS, build_backbone, vit_weights
from udi.main_finetune import HALF
from udi.models_eval import ClassProjHead, EvaluationViT
from udi.models_udi import MODELS, VisionTransformer

FineTuned = models_finetune.VisionTransformer


def features(network: VisionTransformer | FineTuned, imgs: Tensor, pool: str) -> Tensor:
    """Of a pre-trained ViT the normalised first class token, or the mean of the normalised patches, as its linear probe
    can add; of an evaluation's network what its head sees."""
    if isinstance(network, FineTuned):
        return network.forward_features(imgs)
    if isinstance(network, EvaluationViT):
        return network.all_tokens(imgs)[:, 0]
    if pool == "token":
        return network(imgs)[:, 0]
    return network.get_intermediate_layers(imgs)[0][:, network.num_class_token :].mean(dim=1)


def _head(weights: dict[str, Tensor]) -> nn.Module | None:
    """The trained head among weights: a linear layer, or layers of the projection head and a linear layer."""
    state = {key.removeprefix("head."): x for key, x in weights.items() if key.startswith("head.")}
    if not {"cls_head.weight", "mlp.0.weight"} <= set(state):
        return linear_head(weights)
    layers = [state[key] for key in ("mlp.0.weight", "mlp.2.weight", "mlp.4.weight") if key in state]
    head = ClassProjHead(
        in_dim=layers[0].shape[1],
        out_dim=state["last_layer.weight_v"].shape[0] if len(layers) == 3 else 1,
        cls_dim=state["cls_head.weight"].shape[0],
        hidden_dim=layers[0].shape[0],
        bottleneck_dim=layers[-1].shape[0],
        finetune_layer=len(layers),
    )
    head.load_state_dict(state)
    return head


def _finetuned(source: Source, name: str, weights: dict[str, Tensor], sizes: dict[str, Any], pool: str) -> FineTuned:
    """The network of a fine-tuning checkpoint without its head; its weights and flags say which positions it has."""
    args = source.args
    positions: dict[str, Any] = dict(beit_positions(weights))
    if not args and not any(positions.values()):
        raise UserError(f"{source.path}: has neither positions nor flags ('args') that say whether they are fixed")
    learned = positions.pop("use_abs_pos_emb")
    network = models_finetune.MODELS[name](
        **sizes,
        **positions,
        num_classes=0,
        init_values=float("blocks.0.gamma_1" in weights),
        use_abs_pos_emb=learned or args.get("abs_pos_emb", False),
        use_learned_abs_pos_emb=learned,
        use_mean_pooling=pool == "avg",
        num_class_token=weights["cls_token"].shape[1],
    )
    missing, unexpected = models_finetune.load_pretrained(network, weights)
    lacking = [key for key in missing if not (key.startswith("fc_norm.") or key.endswith("relative_position_index"))]
    if lacking:
        raise ValueError(f"{lacking[0]} is missing")
    source.log_loaded(name, network, missing, unexpected)
    return network


def load_backbone(source: Source) -> Backbone:
    """The ViT of a checkpoint, of pre-training the teacher unless --key says student.

    Default of the pooling: what the checkpoint classifies, of pre-training token. Positions are resized.
    """
    path, state, key, args = source.path, source.state, source.key, source.args
    if not path:
        name, size = source.name(MODELS, ALIASES), source.input_size or 224
        with distributed.user_errors(f"random weights: check --input_size {size}"):
            return _backbone(source, MODELS[name](img_size=[size]), name, size, source.pool or "token", None)
    if key and not isinstance(state.get(key), dict):
        found = ", ".join(str(k) for k, value in state.items() if isinstance(value, dict)) or "none"
        raise UserError(f"--key {key}: not in {path}, whose keys are {found}")
    dense = any(dense_weights(part) for part in map(state.get, ("state_dict", "model")) if isinstance(part, dict))
    if dense:  # the ViT has no class token
        weights = vit_weights(state, "state_dict", path, ("pos_embed", "patch_embed.", "blocks."))
        width = weights["pos_embed"].shape[-1]
        weights |= plain_norm(width) | {"cls_token": torch.zeros(1, 0, width)}
    else:
        weights = models_finetune.read_weights(path, key or "teacher", key or "model|module", state=state)
    name = source.name(MODELS, ALIASES) or source.name_by_sizes(MODELS, len(weights["patch_embed.proj.weight"]))
    known: Any = MODELS[name]
    (width, chans, _, patch), tokens = weights["patch_embed.proj.weight"].shape, weights["cls_token"].shape[1]
    depth = len({k.split(".")[1] for k in weights if "blocks." in k})
    if (width, depth) != (known.keywords["embed_dim"], known.keywords["depth"]):
        raise UserError(f"{path}: --model {name}: the file has {depth} blocks of {width} channels")
    size = source.image_side(weights, patch)
    trained = "avg" if "fc_norm.weight" in weights or dense else "token"
    if dense and source.pool == "token":
        raise UserError(f"--pool token: {path} is of a dense task, whose ViT has no class token")
    is_finetuned = "rel_pos_bias" in args or any("relative_position" in k or ".gamma_" in k for k in weights)
    head = _head(weights)
    pool = source.pool or args.get("pool") or trained
    with distributed.user_errors(f"{path}: check --model, --input_size and --pool"):
        if source.fresh:
            network = known(img_size=[size], patch_size=patch, num_class_token=tokens, in_chans=chans)
        elif is_finetuned or "pos_embed" not in weights:
            sizes = {"img_size": size, "patch_size": patch, "in_chans": chans}
            network = _finetuned(source, name, weights, sizes, pool)
        elif trained == pool == "avg" and not dense:  # has a norm of its own
            sizes = {"img_size": [patch * grid_side(weights)], "patch_size": patch, "num_class_token": tokens}
            sizes["in_chans"] = chans
            network = EvaluationViT(avgpool_patchtokens=1, **sizes, **known.keywords)
            network.load_state_dict({k: x for k, x in weights.items() if not k.startswith("head.")})
        else:
            network = build_backbone(name, patch, {k: x for k, x in weights.items() if k.startswith(PARTS)}, size)
    return _backbone(source, network, name, size, pool, head if pool == trained else None)


def _backbone(
    source: Source, network: VisionTransformer | FineTuned, name: str, size: int, pool: str, head: nn.Module | None
) -> Backbone:
    """The network with the images' statistics and view of its evaluation: main_finetune.py chooses its own."""
    tuned, args = isinstance(network, FineTuned), source.args
    half = tuned and not args.get("imagenet_default_mean_and_std", True)
    return Backbone(
        network,
        features,
        name,
        input_size=size,
        patch_size=network.patch_embed.proj.kernel_size[0],
        embed_dim=network.embed_dim,
        pool=pool,
        crop_pct=(args.get("crop_pct") or (224 / 256 if size < 384 else 1.0)) if tuned else 224 / 256,
        args=args,
        head=head,
        **source.channels(*((HALF, HALF) if half else ())),
        interpolation="bilinear" if tuned else "bicubic",
    )


# ---- timm


def timm_form(backbone: Backbone) -> TimmForm:
    """timm's VisionTransformer, to which further class tokens are registers; with relative positions its Beit.

    Its numbers agree to 1e-5.
    """
    network, notes, large = backbone.network, [], backbone.embed_dim == 1024
    weights = {name: x for name, x in network.state_dict().items() if not name.endswith("relative_position_index")}
    positions = network.pos_embed
    if isinstance(network, VisionTransformer):
        positions = network.positions(backbone.input_size, backbone.input_size)
    if positions is not None:
        weights["pos_embed"] = positions
    if isinstance(backbone.head, ClassProjHead):
        notes.append("The classifier keeps layers of the projection head, which timm's ViT has not: it is left out.")
    arguments: dict[str, Any] = {"init_values": 1.0 if "blocks.0.gamma_1" in weights else None}
    if any(name.endswith("relative_position_bias_table") for name in weights):
        notes.append("Biases of the keys, which have no effect, are left out.")
        arguments |= beit_positions(weights)
        architecture = f"beit_{'large' if large else 'base'}_patch16_224"
        return vit_form(backbone, network.blocks, architecture, beit_names(weights), notes, **arguments)
    if positions is None:
        arguments["pos_embed"] = "none"
    if network.num_class_token == 0:
        arguments["class_token"] = False
        weights.pop("cls_token")
        notes += ["The heads of a dense task are left out.", NO_NORM]
    if network.num_class_token > 1:
        arguments["reg_tokens"] = network.num_class_token - 1
        weights["cls_token"], weights["reg_token"] = network.cls_token[:, :1], network.cls_token[:, 1:]
        notes.append("The second class token is a register token.")
    if backbone.pool == "avg" and "fc_norm.weight" not in weights:
        arguments["fc_norm"] = False
    return vit_form(backbone, network.blocks, vit_named(backbone), vit_names(weights), notes, **arguments)
