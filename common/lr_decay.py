"""Which parameters are decayed, and how the learning rate differs between layers."""

from collections.abc import Callable, Collection

from torch import nn


def exempt(name: str, param: nn.Parameter, skip: Collection[str] = ()) -> bool:
    """Whether a parameter takes no weight decay: one dimension, a bias, or listed in skip."""
    return param.ndim == 1 or name.endswith(".bias") or name in skip


def decay_groups(model: nn.Module, weight_decay: float, skip: Collection[str] = ()) -> list[dict]:
    """Two optimizer groups of the trainable parameters: without decay, then with it."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if exempt(n, p, skip)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not exempt(n, p, skip)], "weight_decay": weight_decay},
    ]


def vit_layer_id(name: str, depth: int) -> int:
    """Layer of a ViT parameter: 0 tokens, positions and patch embedding, i + 1 block i, depth + 1 the rest."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def layer_groups(
    model: nn.Module,
    weight_decay: float,
    layer_of: Callable[[str], int],
    scale_of: Callable[[int], float],
    skip: Collection[str] = (),
) -> list[dict]:
    """Optimizer groups of the trainable parameters, one per (layer, decayed or not), with their `lr_scale`.

    Groups stand in the order in which named_parameters() first shows them: optimizer states count on it.
    Args:
        layer_of: layer of a parameter's name. scale_of: factor of a layer's learning rate.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        layer, plain = layer_of(name), exempt(name, param, skip)
        if (layer, plain) not in groups:
            decay = 0.0 if plain else weight_decay
            groups[layer, plain] = {"lr_scale": scale_of(layer), "weight_decay": decay, "params": []}
        groups[layer, plain]["params"].append(param)
    return list(groups.values())


def layer_decay_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float,
    num_layers: int,
    skip: Collection[str] = (),
    layer_id: Callable[[str, int], int] = vit_layer_id,
) -> list[dict]:
    """Optimizer groups with `lr_scale` = layer_decay ** (num_layers + 1 - layer), one per (layer, decayed or not).

    Args:
        num_layers: blocks; `layer_id(name, num_layers)` gives 0 (input) to num_layers + 1 (head).
    """
    return layer_groups(
        model,
        weight_decay,
        layer_of=lambda name: layer_id(name, num_layers),
        scale_of=lambda layer: layer_decay ** (num_layers + 1 - layer),
        skip=skip,
    )
