"""The ViT of a checkpoint, whoever wrote it: what every evaluation starts from."""

from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.distributed import UserError, log
from common.distributed.weights import restore
from udi.models_udi import MODELS, VisionTransformer

ALIASES = {"deit_tiny": "vit_tiny", "deit_small": "vit_small", "deit_base": "vit_base"}
PARTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
FIRST = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.projection.weight")
ATTENTION = ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias")
# Parts of a ViT's names: ours, and mmsegmentation's, in the order in which the latter are to be replaced.
MMSEG_NAMES = (
    ("mlp.fc1.", "ffn.layers.0.0."),
    ("mlp.fc2.", "ffn.layers.1."),
    ("attn.qkv.", "attn.attn.in_proj_"),
    ("attn.proj.", "attn.attn.out_proj."),
    ("patch_embed.proj.", "patch_embed.projection."),
    (".norm1.", ".ln1."),
    (".norm2.", ".ln2."),
    ("blocks.", "layers."),
)


def mmseg_name(name: str) -> str:
    """The name in mmsegmentation's ViT, as the authors' vit2mmseg.py writes it, of a weight of ours."""
    name = f"ln1.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
    for own, other in MMSEG_NAMES:
        name = name.replace(own, other)
    return name


def plain_name(name: str) -> str:
    """Our name of a weight of mmsegmentation's ViT; names of ours stay."""
    name = f"norm.{name.removeprefix('ln1.')}" if name.startswith("ln1.") else name
    for own, other in MMSEG_NAMES:
        name = name.replace(other, own)
    return name


def own_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ViT with queries, keys and values in one, and timm's register tokens as further class tokens."""
    weights = distributed.fitted(weights, ATTENTION)
    if "reg_token" in weights:
        weights["cls_token"] = torch.cat([weights["cls_token"], weights.pop("reg_token")], dim=1)
    return weights


def vit_weights(
    state: dict[str, Any], checkpoint_key: str, path: str, parts: tuple[str, ...] = PARTS
) -> dict[str, Tensor]:
    """The weights of the ViT in a checkpoint's content, under their plain names; what was left out is logged.

    Args:
        checkpoint_key, path: as in `load_backbone`. parts: beginnings of the names that are to be there.
    Raises:
        UserError: it holds no ViT.
    """
    keys = [checkpoint_key, "model", "state_dict"]
    keys += [key for key in distributed.FOREIGN_KEYS if key not in ("teacher", "student")]
    found = next((state[key] for key in keys if isinstance(state.get(key), dict) and state[key]), state)
    named = distributed.weights_of({"model": found}, path)
    prefix, weights, left = distributed.prefix_of(named, FIRST), {}, []
    kept = (*PARTS, "reg_token", "rel_pos_bias.")
    for key, value in named.items():
        name = plain_name(key.removeprefix(prefix))
        # The sampling module's own norm1 and attn begin no name of a ViT.
        if isinstance(value, Tensor) and key.startswith(prefix) and name.startswith(kept):
            weights[name] = value
        else:
            left.append(key)
    weights = own_layout(weights)
    missing = [part for part in parts if not any(name.startswith(part) for name in weights)]
    if missing:
        shown = ", ".join(map(str, list(found)[:4])) or "none"
        raise UserError(
            f"{path}{distributed.kind_of(named)}: holds no ViT under '{checkpoint_key}': "
            f"{missing[0].rstrip('.')} is missing; its keys: {shown}"
        )
    log(f"{path}: {distributed.load_report(len(weights), [], left)}")
    return weights


def load_backbone(
    checkpoint: str | dict[str, Any],
    checkpoint_key: str = "teacher",
    class_tokens: str = "all",
    path: str = "checkpoint",
) -> dict[str, Tensor]:
    """The weights of a checkpoint's ViT under their plain names.

    Args:
        checkpoint: a file, https address or its content: of our or the authors' pre-training, what their or our
            extraction wrote, or a plain ViT (DINO's, say).
        checkpoint_key: whose weights, teacher or student; a file without that key is taken as it is.
        class_tokens: first leaves out what belongs to further class tokens.
        path: names a content in messages.
    Raises:
        UserError: the file cannot be read or holds no ViT.
    """
    path = checkpoint if isinstance(checkpoint, str) else path
    state = distributed.load(checkpoint) if isinstance(checkpoint, str) else checkpoint
    weights = vit_weights(state, checkpoint_key, path)
    tokens = weights["cls_token"].shape[1]
    if class_tokens == "first" and tokens > 1:
        pos = weights["pos_embed"]
        weights["cls_token"] = weights["cls_token"][:, :1]
        weights["pos_embed"] = torch.cat([pos[:, :1], pos[:, tokens:]], dim=1)
    return weights


def build_backbone(
    arch: str, patch_size: int, weights: dict[str, Tensor] | None = None, img_size: int = 224, **keywords
) -> VisionTransformer:
    """A ViT for evaluations; its class tokens, patch size and positions are those of the weights, if given.

    Weights of three channels are adapted to in_chans, if that is among the keywords; else the file's channels count.

    Raises:
        UserError: the weights are of another ViT.
    """
    if ALIASES.get(arch, arch) not in MODELS:
        raise UserError(f"--arch {arch}: expected one of {', '.join([*MODELS, *ALIASES])}")
    size = img_size
    if weights is not None:
        found = weights["patch_embed.proj.weight"].shape[-1]
        if found != patch_size:
            log(f"--patch_size {patch_size}: the checkpoint has patches of {found} pixels, which are taken")
        patch_size = found
        keywords["num_class_token"] = weights["cls_token"].shape[1]
        keywords.setdefault("in_chans", weights["patch_embed.proj.weight"].shape[1])
        img_size = patch_size * round((weights["pos_embed"].shape[1] - keywords["num_class_token"]) ** 0.5)
    if weights is not None and size % patch_size:
        raise UserError(f"--input_size {size}: is no multiple of {patch_size} pixels")
    with distributed.user_errors(f"--arch {arch}"):
        model = MODELS[ALIASES.get(arch, arch)](img_size=[img_size], patch_size=patch_size, **keywords)
        if weights is not None:
            weights = distributed.adapt_channels(weights, model.state_dict())
            restore(model, weights, f"--arch {arch}", "checkpoint")
    return model
