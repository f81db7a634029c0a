"""Weights to start a run from (--initial_checkpoint): the ViT of any program, and what of a file fits a network.

Legend: N patches, D width.
"""

import argparse
import hashlib
import math
import mmap
import re
from collections.abc import Callable, Collection

import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn

from common.distributed.exits import UserError, user_errors
from common.distributed.process import log
from common.distributed.weights import (
    adapt_channels,
    by_module,
    fitted,
    kind_of,
    load,
    local_file,
    prefix_of,
    timm_name,
    weights_of,
)

Weights = dict[str, Tensor]

LAYER_SCALE = r"\.ls([12])\.gamma$"  # of timm's ViTs; BEiT and CAE have gamma_1 and gamma_2
SCALED = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}  # layer scale, and the layer whose output it multiplies


def initial_weights(args: argparse.Namespace, resume: str) -> Weights:
    """The weights of --initial_checkpoint in float32; {} without the flag, and where a run continues a checkpoint.

    The file's SHA-256 becomes the flag `initial_sha256`, which run.json and the run's checkpoints keep.
    Args:
        resume: the checkpoint that the run continues, or ''.
    Raises:
        UserError: the file cannot be read or holds no weights.
    """
    path = args.initial_checkpoint
    if path and args.resume:
        log(f"--resume {args.resume} wins: nothing is taken from --initial_checkpoint {path}")
    if not path or resume:
        return {}
    found = weights_of(load(path), path, bare=True)
    with open(local_file(path), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        args.initial_sha256 = hashlib.sha256(content).hexdigest()
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _class_tokens(weights: Weights, most: int) -> Weights:
    """A ViT's weights with at most so many class tokens, timm's registers counted; each has a position (zero if none).

    pos_embed: (1, c + N, D) with c positions of class tokens or of others that stand in front of the patches; at least
    one in the result.
    """
    if "pos_embed" not in weights or weights["pos_embed"].ndim != 3:
        return weights
    pos = weights["pos_embed"]
    tokens = weights.get("cls_token", pos[:, :0])
    count, rows = tokens.shape[1], pos.shape[1]
    square = rows >= count and math.isqrt(rows - count) ** 2 == rows - count
    front = count if square else rows - math.isqrt(rows) ** 2
    if front > count and "reg_token" in weights:
        tokens = torch.cat([tokens, weights["reg_token"]], dim=1)
    kept = min(most, tokens.shape[1], max(front, 1))
    own = pos[:, : max(kept, 1)] if front else pos.new_zeros(1, 1, pos.shape[2])
    fitted_tokens = {"cls_token": tokens[:, :kept]} if kept else {}
    return weights | fitted_tokens | {"pos_embed": torch.cat([own, pos[:, front:]], dim=1)}


def _layer_scale(weights: Weights, own: Collection[str]) -> Weights:
    """A ViT's weights with layer scale as a network has it, and the same outputs.

    It is 1 where the file has none, and multiplied into the layer before it where the network has none.
    """
    weights = dict(weights)
    for gamma, layer in SCALED.items():
        wanted = any(name.endswith(gamma) for name in own)
        for name in [name for name in weights if re.fullmatch(rf"blocks\.\d+\.{layer}\.weight", name)]:
            stem = name.removesuffix(f"{layer}.weight")
            if wanted:
                weights.setdefault(stem + gamma, torch.ones(len(weights[name])))
            elif stem + gamma in weights:
                factor = weights.pop(stem + gamma)
                weights[name] = weights[name] * factor[:, None]
                bias = f"{stem}{layer}.bias"
                weights |= {bias: weights[bias] * factor} if bias in weights else {}
    return weights


def fitted_vit(weights: Weights, own: Collection[str], class_tokens: int = 1) -> tuple[Weights, Weights]:
    """The ViT among a file's weights under a network's names, and the file's other weights.

    The names, prefixes, layouts of queries, keys and values, and layer scales of all programs that `fitted` and
    `MM_NAMES` know; shapes stay as they are.
    Args:
        own: names of the network's ViT. class_tokens: how many of them it has.
    """
    weights = {re.sub(LAYER_SCALE, r".gamma_\1", timm_name(key)): value for key, value in weights.items()}
    prefix = prefix_of(weights, own)
    below = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    vit = _class_tokens(_layer_scale(fitted(below, own), own), class_tokens)
    others = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    others |= {prefix + key: value for key, value in vit.items() if key not in own}
    return {key: value for key, value in vit.items() if key in own}, others


def take_weights(
    network: nn.Module,
    found: Weights,
    others: Collection[str],
    path: str,
    encoder: str | tuple[str, ...],
    fits: str,
    resize: dict[str, Callable[[Tensor], Tensor]],
) -> None:
    """Put into a network what fits of a file's weights, and report it; the others keep their values.

    Projections of patches of another size are resampled by timm's `resample_patch_embed`, those of three channels are
    adapted to the network's.
    Args:
        found: weights of the file under the network's names. others: names of its other weights. path: of the file.
        encoder: what names of the network's encoder begin with. fits: what encoder would fit, for the error.
        resize: by the last part of a name, what brings such weights of the network's width to its shape.
    Raises:
        UserError: nothing of the encoder fits.
    """
    own, taken, resized = network.state_dict(), {}, []
    for name, value in adapt_channels(found, own).items():
        target = own.get(name)
        if target is None or bool(value.ndim) != bool(target.ndim):
            continue
        if value.squeeze().shape == target.squeeze().shape:  # a linear layer may be a convolution elsewhere
            value = value.reshape(target.shape)
        elif name.endswith("patch_embed.proj.weight") and value.shape[:2] == target.shape[:2]:
            value = resample_patch_embed(value, list(target.shape[2:]))
            resized.append(name)
        elif value.shape[-1] == target.shape[-1] and (fit := resize.get(name.split(".")[-1])):
            with user_errors(f"{path}: {name}"):
                value = fit(value)
            resized.append(name)
        if value.shape == target.shape:
            taken[name] = value
    whole = [name for name in own if name.startswith(encoder)]
    inside = [name for name in whole if name in taken]
    if not inside:
        odd = next((name for name in whole if name in found), "")
        why = f": {odd} is {tuple(found[odd].shape)}, expected {tuple(own[odd].shape)}" if odd else ""
        kind = "" if odd else kind_of([*found, *others])
        raise UserError(f"{path}{kind}: nothing of it fits this encoder{why}; {fits} fits")
    network.load_state_dict(taken, strict=False)
    shown = f", {len(resized)} of them resized ({resized[0]}{', ...' * (len(resized) > 1)})" if resized else ""
    new = [name for name, _ in network.named_parameters(remove_duplicate=False) if name not in taken]  # no constants
    unused = [name for name in (*found, *others) if name not in taken and not name.endswith("relative_position_index")]
    most = 2 * len(inside) >= len(whole)
    log(
        f"{'' if most else 'WARNING: '}{path}: {len(inside)} of the encoder's {len(whole)} tensors and "
        f"{len(taken) - len(inside)} others taken{shown}; new: {by_module(new)}; unused: {by_module(unused)}"
    )
