"""OpenMixup's names of weights, in which checkpoints are written and read, and ours (timm's)."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from a2mim.backbones import is_convnext, is_deit, is_vit
from a2mim.models_a2mim import Classifier, MaskedImageModel
from common import distributed
from common.distributed import UserError

Model = MaskedImageModel | Classifier

# timm's name -> OpenMixup's, applied in turn
VIT_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^blocks\.", "layers."),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"^norm\.", "ln1."),
)
CONVNEXT_NAMES = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"\.blocks\.", "."),
    (r"\.conv_dw\.", ".depthwise_conv."),
    (r"\.mlp\.fc1\.", ".pointwise_conv1."),
    (r"\.mlp\.fc2\.", ".pointwise_conv2."),
    (r"^head\.norm\.", "norm3."),
)
HEADS = ("head.fc.", "head.", "fc.")  # the classifier's last layer in timm's ConvNeXt, ViT and ResNet


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """The name after all replacements; a name of OpenMixup stays as it is."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def encoder_name(net: Any, name: str) -> str:
    """OpenMixup's name of a weight of a backbone."""
    return renamed(name, VIT_NAMES if is_vit(net) else CONVNEXT_NAMES if is_convnext(net) else ())


def _official_name(model: Model, name: str) -> str:
    """OpenMixup's name of a parameter or buffer of ours."""
    part, _, rest = name.partition(".")
    if part in ("mask_token", "mask_gamma"):
        return f"backbone.{name}"
    if part == "decoder":
        return f"neck.{'decoder' if model.method == 'simmim' else 'decoder_pred'}.0.{rest}"
    net: Any = model.encoder if isinstance(model, MaskedImageModel) else model.net
    head = next((h for h in HEADS if rest.startswith(h) and not rest.startswith("head.norm.")), None)
    if head:
        return f"head.{'layers.head' if is_deit(net) else 'fc'}.{rest.removeprefix(head)}"
    return f"backbone.{encoder_name(net, rest)}"


def _position(name: str) -> tuple[int, int]:
    """Sorts names as OpenMixup's modules stand: tensors of the backbone itself, down-sampling, blocks, neck, head."""
    own = ("cls_token", "pos_embed", "mask_token", "mask_gamma")
    part, _, rest = name.partition(".")
    if part != "backbone":
        return {"neck": 3, "head": 4}[part], 0
    if rest in own:
        return 0, own.index(rest)
    return (1 if rest.startswith("downsample_layers.") else 2), 0


def official_names(model: Model, parameters_only: bool = False) -> dict[str, str]:
    """{OpenMixup's name: ours} in OpenMixup's order."""
    ours = [n for n, _ in model.named_parameters()] if parameters_only else list(model.state_dict())
    names = {_official_name(model, name): name for name in ours}
    return {name: names[name] for name in sorted(names, key=_position)}


def to_openmixup_state_dict(model: Model) -> dict[str, Tensor]:
    """The weights under OpenMixup's names and in its order, with the buffers that only OpenMixup stores."""
    state = model.state_dict()
    net: Any = model.encoder if isinstance(model, MaskedImageModel) else model.net
    result = {}
    for name, own in official_names(model).items():
        result[name] = state[own]
        if name.endswith("relative_position_bias_table"):
            index = net.blocks[0].attn.relative_position_index  # equal in all blocks
            result[name.replace("bias_table", "index")] = index
    return result


def load_openmixup_state_dict(model: Model, sd: dict[str, Any]) -> None:
    """Load weights of OpenMixup's names strictly; averages (`ema_...`) are ignored.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    names, state = official_names(model), model.state_dict()
    given = {k: v for k, v in sd.items() if not k.startswith("ema_") and not k.endswith("relative_position_index")}
    missing, unexpected = sorted(set(names) - set(given)), sorted(set(given) - set(names))
    if missing or unexpected:
        raise ValueError(
            f"{len(missing)} tensors are missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(unexpected)} are unexpected ({', '.join(unexpected[:3]) or 'none'})"
        )
    for name, own in names.items():
        if given[name].shape != state[own].shape:
            raise ValueError(f"{name} is {tuple(given[name].shape)}, expected {tuple(state[own].shape)}")
    model.load_state_dict({own: given[name] for name, own in names.items()})


def load_classifier(model: Classifier, path: str) -> None:
    """Load a fine-tuned checkpoint strictly; averaged weights where it holds them.

    Raises:
        UserError: it cannot be read or is of another network.
    """
    weights = distributed.weights_of(distributed.load(path), path)
    with distributed.user_errors(path):
        load_openmixup_state_dict(model, weights)


def load_encoder(model: Model, path: str, head_std: float = 0.01, resize_rel_pos: bool = False) -> None:
    """Load an encoder from an extracted one, a pre-training checkpoint, or a file of timm's names, and report it.

    What a classifier adds starts anew: the last layer (normal, head_std; ConvNeXt, DeiT: truncated normal, 0.02) and
    the norm of a ViT in front of it. Positions of another grid are resized. DeiT takes no biases of queries and values.
    Args:
        resize_rel_pos: also resize tables of relative positions; else they start at zero (as upstream).
    Raises:
        UserError: the file cannot be read or holds another encoder.
    """
    weights = tensors(distributed.load(path))
    loaded, others = load_encoder_weights(model, weights, path, resize_rel_pos)
    net: Any = model.encoder if isinstance(model, MaskedImageModel) else model.net
    distributed.log(f"{path}: {distributed.load_report(len(loaded), sorted(set(net.state_dict()) - loaded), others)}")
    if isinstance(model, Classifier):
        truncated = is_convnext(net) or is_deit(net)
        init = nn.init.trunc_normal_ if truncated else nn.init.normal_
        init(model.head.weight, std=0.02 if truncated else head_std)
        nn.init.zeros_(model.head.bias)


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, or in a file of weights alone, without those of a momentum encoder."""
    keys = (*distributed.WEIGHT_KEYS, *distributed.FOREIGN_KEYS)
    found = next((state[key] for key in keys if isinstance(state.get(key), dict) and state[key]), state)
    found = {k: v for k, v in found.items() if isinstance(v, Tensor) and "momentum" not in k}
    return distributed.weights_of({"model": found}, "the file")


def load_encoder_weights(
    model: Model, found: dict[str, Tensor], path: str, resize_rel_pos: bool = False
) -> tuple[set[str], list[str]]:
    """As `load_encoder`, from the encoder's weights in the file at path, and without starting anything anew.

    Returns:
        names in the network of what was loaded, and names in the file of what was not.
    """
    net: Any = model.encoder if isinstance(model, MaskedImageModel) else model.net
    own = {k: v for k, v in net.state_dict().items() if not k.startswith(HEADS) or k.startswith("head.norm.")}
    own = {k: v for k, v in own.items() if not k.startswith("fc_norm.")}
    ours = {encoder_name(net, name): name for name in own} | {name: name for name in own}
    found = distributed.fitted(found, ours)
    tables = [k for k in own if k.endswith("relative_position_bias_table")]
    shared = found.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:  # of all blocks, in SimMIM's and BEiT's pre-training, which have no absolute positions
        found |= dict.fromkeys(tables, shared)
        found.setdefault("pos_embed", torch.zeros_like(own["pos_embed"]))
    of_cae = any(k.endswith("gamma_1") for k in found) and not any("relative_position" in k for k in found)
    if tables and of_cae:
        distributed.log(f"{path}: has no relative positions, as CAE; they start at zero, which has no effect")
        found |= {k: torch.zeros_like(own[k]) for k in tables}
    left = ("head.", "lm_head.", "fc.", "neck.", "norm.", "ln1.", "fc_norm.", "mask_", "ema_", "decoder")
    if is_deit(net):  # as upstream, whose ViTs are pre-trained with them
        left += tuple(k for k in found if k.endswith((".q_bias", ".v_bias")))
    loaded = {ours[k]: v for k, v in found.items() if k in ours}
    unexpected = [k for k in found if k not in ours and not k.startswith(left) and "relative_position_index" not in k]
    missing = sorted(set(own) - set(loaded))
    if missing or unexpected:
        raise UserError(
            f"{path}: is not this encoder: {len(missing)} of its {len(own)} tensors are "
            f"missing ({', '.join(missing[:2]) or 'none'}), {len(unexpected)} are unexpected "
            f"({', '.join(unexpected[:2]) or 'none'}){distributed.kind_of(found)}"
        )
    loaded = distributed.adapt_channels(loaded, own)
    _resize(net, loaded, own, resize_rel_pos)
    odd = next((k for k, v in loaded.items() if v.shape != own[k].shape), None)
    if odd:
        raise UserError(f"{path}: {odd} is {tuple(loaded[odd].shape)}, expected {tuple(own[odd].shape)}")
    net.load_state_dict(loaded, strict=False)
    return set(loaded), [k for k in found if k not in ours and "position_index" not in k]


def resize_pos_embed(pos: Tensor, grid: Sequence[int], own_grid: Sequence[int] | None = None) -> Tensor:
    """Positions (1, 1 + n, D), class token first, of own_grid or square -> (1, 1 + h w, D) of grid (h, w), bicubic."""
    old = list(own_grid) if own_grid else None
    return resample_abs_pos_embed(pos, list(grid), old, num_prefix_tokens=1, interpolation="bicubic", antialias=False)


def _resize(net: Any, loaded: dict[str, Tensor], own: dict[str, Tensor], resize_rel_pos: bool) -> None:
    for name in [k for k, v in loaded.items() if k in own and v.shape != own[k].shape]:
        grid = net.patch_embed.grid_size if is_vit(net) else (0, 0)
        if name == "pos_embed":
            loaded[name] = resize_pos_embed(loaded[name], grid)
        elif name.endswith("relative_position_bias_table"):
            zeros = torch.zeros_like(own[name])
            resized = resize_rel_pos_bias_table(loaded[name], grid, own[name].shape) if resize_rel_pos else zeros
            loaded[name] = resized
            if name.startswith("blocks.0."):
                distributed.log(
                    f"relative positions of another grid {'resized' if resize_rel_pos else 'start at zero'}"
                )


def extract_encoder(state: dict[str, Any]) -> dict[str, Tensor]:
    """The encoder's weights of a checkpoint, by names without the prefix that says so (upstream's converter).

    Raises:
        ValueError: it holds none.
    """
    weights = state.get("state_dict", state)
    found = {}
    for key, value in weights.items():
        name = key.removeprefix("module.")
        if "momentum" in key:
            continue
        stripped = name
        for prefix in ("backbone", "encoder", "encoder_q", "base_encoder", "timm_model"):
            # Upstream makes `q.x` of `encoder_q.x`.
            if stripped.startswith(prefix) and not (prefix == "encoder" and stripped.startswith("encoder_q")):
                stripped = stripped[len(prefix) + 1 :]
        if stripped != name:
            found[stripped] = value
    if not found:
        raise ValueError(
            "holds no encoder: no key begins with backbone, encoder, encoder_q, base_encoder or timm_model"
        )
    return found
