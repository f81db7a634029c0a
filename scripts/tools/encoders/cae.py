"""CAE's encoders: the ViT of pre-training (both revisions), fine-tuning, probes, segmentation and detection."""

import math
from typing import Any

from torch import Tensor

from cae.augmentation import HALF
from cae.models_cae import MODELS as PRETRAINING
from cae.models_vit import MODELS, encoder_weights, load_pretrained
from common import datasets, distributed
from common.distributed import UserError
from scripts.tools.encoders.backbone import NO_NORM, Backbone, Source, dense_weights, linear_head, plain_norm
from scripts.tools.encoders.timm_form import TimmForm, beit_positions, vit_form, vit_names

# The encoders of pre-training networks.
ENCODERS = {name: name.removesuffix("_8k_vocab") for name in PRETRAINING if name not in MODELS}
ATTENTIVE = ("query_token", "attentive_blocks.", "fc_norm.running_", "fc_norm.num_batches_tracked", "head.")


def features(network: Any, imgs: Tensor, pool: str) -> Tensor:
    return network.forward_features(imgs, is_train=False)


VIT = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
VIT += ("blocks.0.attn.q_bias", "blocks.0.attn.v_bias")
NEEDED = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight")


def _keywords(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the weights say."""
    return {
        "patch_size": weights["patch_embed.proj.weight"].shape[-1],
        "in_chans": weights["patch_embed.proj.weight"].shape[1],
        "qkv_bias": "blocks.0.attn.q_bias" in weights,
        "init_values": float("blocks.0.gamma_1" in weights),
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in weights,
        "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in weights,
        "abs_pos_emb": "pos_embed" in weights,  # learned or sin-cos: the file has them
        "sin_pos_emb": False,
    }


def _encoder_part(found: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], bool, bool]:
    """The encoder's weights of a file, whether it is of a dense task, and of oblong images; notes: what is left out."""
    weights = encoder_weights(found)
    if dense := dense_weights(found):
        patches = dense["pos_embed"].shape[1] - 1
        oblong = math.isqrt(patches) ** 2 != patches
        notes.append("The pyramid and the heads of a dense task are left out.")
        return {k: value for k, value in dense.items() if not (oblong and k == "pos_embed")}, True, oblong
    if len(weights) < len(found):
        notes.append("The regressor, the decoder and the mask token of pre-training are left out.")
    return weights, False, False


def load_backbone(source: Source) -> Backbone:
    """The ViT of a checkpoint; an attentive probe's query and head are left out.

    Pooling token takes the class token after the final norm where the file has one, avg the patches' mean before that
    norm; default: a classifier's own, of dense tasks avg, else token, which linear probing reads. Positions are resized
    as there; those of detection, of oblong images, are computed anew.
    """
    path, args, notes = source.path, source.args, []
    found = source.weights()
    weights, dense, oblong = _encoder_part(found, notes)
    weights = distributed.fitted(weights, VIT)
    path += distributed.kind_of(found)
    with distributed.user_errors(f"{path or 'random weights'}: check METHOD, --model and --input_size"):
        lacking = [name for name in NEEDED if name not in weights]
        if path and lacking:
            shown = ", ".join(list(weights)[:4]) or "none"
            raise UserError(f"{path}: holds no encoder of CAE, {lacking[0]} is missing; its keys: {shown}")
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        name = source.name(MODELS, ENCODERS) or source.name_by_sizes(MODELS, weights["cls_token"].shape[-1], depth)
        attentive = "query_token" in weights
        if attentive:
            notes.append("The attentive probe's query and head, which timm cannot express, are left out.")
            weights = {k: value for k, value in weights.items() if not k.startswith(ATTENTIVE)}
        trained = "avg" if "fc_norm.weight" in weights or dense else "token"
        pool = source.pool or trained
        if dense and pool == "avg":
            weights |= plain_norm(weights["cls_token"].shape[-1])
            notes.append(NO_NORM)
        normed = not path or "norm.weight" in weights or "fc_norm.weight" in weights
        if pool == "avg" and not normed:
            raise UserError(f"--pool avg: {path} has no final norm, which the mean of the patches needs")
        keywords: dict[str, Any] = _keywords(weights) if path else {"init_values": 0.1}
        if oblong:
            keywords |= {"abs_pos_emb": False, "sin_pos_emb": True}
        if path or source.input_size is not None:
            keywords["img_size"] = source.image_side(weights, keywords.get("patch_size", 0))
        mean_pooling = pool == "avg" or not normed
        network: Any = MODELS[name](**keywords, num_classes=0, use_mean_pooling=mean_pooling, lin_probe=pool == "token")
        head = linear_head(weights) if pool == trained else None
        if path and not source.fresh:
            source.log_loaded(name, network, *load_pretrained(network, weights, resize_positions=True))
    # Fine-tuning and attentive probing choose the images' statistics and view, linear probing does not.
    tuned, size = (head is not None and "head.weight" in weights) or attentive, network.patch_embed.img_size
    imagenet = not tuned or args.get("imagenet_default_mean_and_std", True)
    mean, std = (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD) if imagenet else (HALF, HALF)
    return Backbone(
        network,
        features,
        name,
        input_size=size,
        patch_size=network.patch_embed.patch_size,
        embed_dim=network.embed_dim,
        pool="avg" if hasattr(network, "fc_norm") else "token",
        crop_pct=args.get("crop_pct") or (224 / 256 if size < 384 and (tuned or size <= 224) else 1.0),
        args=args,
        head=head,
        notes=notes,
        **source.channels(mean, std),
    )


def timm_form(backbone: Backbone) -> TimmForm:
    """timm's Beit; or its VisionTransformer where the class token is not normed.

    Raises:
        UserError: timm has no such network.
    """
    network, notes, width = backbone.network, list(backbone.notes), backbone.embed_dim
    block, size = network.blocks[0], "large" if len(network.blocks) > 12 else "base"
    if block.attn.qkv.out_features != 3 * width:
        raise UserError(f"timm's attention needs a width that {block.attn.num_heads} heads divide, not {width}")
    weights = {k: v for k, v in network.state_dict().items() if not k.endswith("relative_position_index")}
    tables = [k for k in weights if k.endswith("relative_position_bias_table")]
    if tables and not any(weights[k].any() for k in tables):  # a probe's, which did not learn
        notes.append("The relative position biases, all of which are 0, are left out.")
        weights = {k: v for k, v in weights.items() if k not in tables}
        tables = []
    arguments: dict[str, Any] = {
        "mlp_ratio": block.mlp.fc1.out_features / width,
        "qkv_bias": block.attn.q_bias is not None,
        "init_values": 0.1 if block.gamma_1 is not None else 0.0,
    }
    if hasattr(network, "norm") or hasattr(network, "fc_norm"):
        arguments |= beit_positions(weights)
        return vit_form(backbone, network.blocks, f"beit_{size}_patch16_224", weights, notes, **arguments)
    if tables:
        raise UserError(
            "timm's network with relative positions (Beit) norms the class token, which this probe does not; "
            "--format safetensors keeps it as it is"
        )
    notes.append("The class token is not normed, as in linear probing without --use_cls.")
    arguments |= {"final_norm": False, "pos_embed": "learn" if network.pos_embed is not None else "none"}
    return vit_form(backbone, network.blocks, f"vit_{size}_patch16_224", vit_names(weights), notes, **arguments)
