"""Files of weights: read without executing anything, whoever wrote them; and what fits a network."""

import argparse
import glob
import hashlib
import json
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from common.distributed.exits import UserError, user_errors
from common.distributed.process import is_main, log


class _Inert:
    """Stands for configuration classes in files: what is read in their place is a plain dict that executes nothing."""

    def __new__(cls, *args) -> Any:
        return OrderedDict(*args)


# What released checkpoints hold besides tensors and plain Python values: parsed flags, NumPy scalars, configurations.
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    bytes,  # empty ones
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"},  # no objects
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    (_Inert, "yacs.config.CfgNode"),  # SimMIM, Swin
    (_Inert, "lightning.fabric.utilities.data.AttributeDict"),
    (_Inert, "lightning_fabric.utilities.data.AttributeDict"),
    (_Inert, "pytorch_lightning.utilities.parsing.AttributeDict"),
]


# Keys under which the five methods' authors store the weights of the network that goes on training.
WEIGHT_KEYS = ("state_dict", "model", "module")
# Keys of others' files, of which the weights that they recommend for use come first.
FOREIGN_KEYS = ("teacher", "target_encoder", "model_state_dict", "model_ema", "ema_state_dict", "student", "encoder")
WRAPPERS = ("_orig_mod.", "model.", "net.")  # of torch.compile and Lightning, before every name

# Parts of a ViT's names in OpenMixup, MMPretrain and MMSegmentation, and timm's, in the order of replacement.
MM_NAMES = {
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
    r"(^|\.)layers\.(\d+)\.": r"\1blocks.\2.",
    r"(\.\d+)\.ln([12])\.": r"\1.norm\2.",
    r"(^|\.)ln1\.": r"\1norm.",
    r"\.attn\.attn\.in_proj_": ".attn.qkv.",
    r"\.attn\.attn\.out_proj\.": ".attn.proj.",
    r"(^|\.)patch_embed\.projection\.": r"\1patch_embed.proj.",
}


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def local_file(path: str) -> str:
    """A path as it is, or the local copy of an https address, downloaded once.

    Raises:
        UserError: the download failed.
    """
    if not path.startswith(("http://", "https://")):
        return path
    unique = hashlib.sha256(path.encode()).hexdigest()[:8]
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{unique}-{Path(path).name}"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(path, str(target), progress=is_main())
    except OSError as error:
        raise UserError(f"{path}: download failed ({error})") from error
    return str(target)


def _read(path: str) -> Any:
    """Content of a file of torch's, or of a .safetensors: its tensors under 'model', its flags under 'args'.

    The index of a file in several parts stands for them: their tensors under 'model'.
    """
    if path.endswith(".index.json"):
        parts = sorted(set(json.loads(Path(path).read_text("utf-8"))["weight_map"].values()))
        contents = [_read(str(Path(path).with_name(part))) for part in parts]
        return {"model": {name: value for part in contents for name, value in part.get("model", part).items()}}
    if Path(path).suffix != ".safetensors":
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    with open(path, "rb"), safe_open(path, "pt") as file:  # open() names what is wrong with a path
        args = json.loads((file.metadata() or {}).get("args", "{}"))
        return {"model": {name: file.get_tensor(name) for name in file.keys()}, "args": args}  # noqa: SIM118


def load(path: str, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a checkpoint file or https address as tensors and plain values.

    Args:
        others: patterns of the names of a run's checkpoints, of which an error names the newest one; by default that of
            the file which this one replaced.
    Raises:
        UserError: it is missing, damaged, not a checkpoint, or needs code to be executed.
    """
    path = local_file(path)
    try:
        state = _read(path)
    except FileNotFoundError as error:
        missing = Path(error.filename or path).name
        what = "no such checkpoint file" if Path(path).name == missing else f"its part {missing} is missing"
        raise UserError(f"{path or repr(path)}: {what}") from error
    except IsADirectoryError as error:
        names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        inside = next((f", such as {Path(path, name)}" for name in names if Path(path, name).is_file()), "")
        raise UserError(f"{path}: is a folder, expected a checkpoint file{inside}") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it") from error
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it would execute {code[1]}; refused" if code else "not a checkpoint"
        raise UserError(f"{path}: {why}{_newest(path, others)}") from error
    except Exception as error:  # torch reports a damaged file by many types
        if "TorchScript" in str(error):
            way = f"torch.save(torch.jit.load('{path}').state_dict(), 'weights.pth') keeps its weights alone"
            raise UserError(f"{path}: is a TorchScript program, expected a checkpoint; {way}") from error
        raise UserError(f"{path}: truncated or not a checkpoint{_newest(path, others)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a checkpoint")
    return state


def _newest(path: str, patterns: tuple[str, ...]) -> str:
    """Names the newest other checkpoint of the same run beside a damaged one."""
    patterns = patterns or (f"{glob.escape(Path(path).stem)}-previous.pth",)
    found = (other for pattern in patterns for other in Path(path).parent.glob(pattern))
    others = [other for other in found if other != Path(path) and other.stat().st_size]
    newest = max(others, key=lambda other: other.stat().st_mtime, default=None)
    return f"; the newest other checkpoint is {newest}" if newest else ""


def by_module(names: list[str]) -> str:
    """Names of weights, shortened to their modules and how many are of each: "blocks (24), norm"; "none"."""
    modules = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{m} ({n})" if n > 1 else m for m, n in modules.items()) or "none"


def load_report(loaded: int, missing: list[str], unexpected: list[str]) -> str:
    """One line on a non-strict load: how many tensors matched, and the others by module."""
    return f"{loaded} tensors matched; missing: {by_module(missing)}; unexpected: {by_module(unexpected)}"


def weights_of(
    state: dict[str, Any], path: str, keys: tuple[str, ...] = WEIGHT_KEYS, bare: bool = False
) -> dict[str, Tensor]:
    """The network's weights in a checkpoint read from path, without the prefix `module.` of DistributedDataParallel.

    Args:
        keys: the first of these that the file has holds the weights.
        bare: of a file that has none of the keys `FOREIGN_KEYS` are tried, and a dict of tensors is taken as it is.
    Raises:
        UserError: no key holds weights.
    """
    found = next((state[k] for k in (*keys, *FOREIGN_KEYS * bare) if isinstance(state.get(k), dict)), None)
    if found is None and bare and state and all(isinstance(value, Tensor) for value in state.values()):
        found = state
    if found is None:
        shown = ", ".join(map(str, list(state)[:8])) or "none"
        raise UserError(f"{path}: holds no weights under {' or '.join(map(repr, keys))}; its keys: {shown}")
    found = {name.replace("module.", ""): value for name, value in found.items()}
    while wrapper := next((w for w in WRAPPERS if found and all(name.startswith(w) for name in found)), ""):
        found = {name.removeprefix(wrapper): value for name, value in found.items()}
    return found


def prefix_of(weights: Collection[str], own: Collection[str]) -> str:
    """What stands in a file before the names of a network (backbone., encoder., trunk., ...), '' if nothing does.

    Args:
        weights: the file's names. own: the network's, or some of them.
    """
    prefixes = {key.removesuffix(name) for key in weights for name in own if key.endswith(name)}
    counts = {prefix: sum(prefix + name in weights for name in own) for prefix in sorted(prefixes)}
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def timm_name(name: str) -> str:
    """timm's name of a weight of a ViT, from that among `MM_NAMES`."""
    for pattern, replacement in MM_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def fitted(weights: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The weights of a network among those of a file, under the network's own names.

    Args:
        weights: may stand below a prefix, have queries, keys and values in another layout, and `MM_NAMES`.
        own: the network's names; those in front of its blocks and of one block suffice.
    """
    odd = re.compile(r"(^|\.)layers\.\d+\.ln1\.")
    if any(map(odd.search, weights)) and not any(map(odd.search, own)):
        weights = {timm_name(name): value for name, value in weights.items()}
    weights = part_of(weights, prefix_of(weights, own))
    names = {name.split(".attn.")[1] for name in own if ".attn." in name}
    for stem in {name.split(".attn.")[0] + ".attn." for name in weights if ".attn." in name}:
        for kind in ("weight", "bias"):
            # In one (timm, MAE), apart (SAIM), or without biases of the keys, which have no effect (BEiT).
            layouts = [f"qkv.{kind}"], [f"{x}.{kind}" for x in "qkv"], [f"{x}_{kind}" for x in "qv"]
            found = next((layout for layout in layouts if all(stem + name in weights for name in layout)), [])
            wanted = next((layout for layout in layouts if names.issuperset(layout)), [])
            if not found or not wanted or found == wanted:
                continue
            parts = [weights.pop(stem + name) for name in found]
            if len(parts) == 2:
                parts.insert(1, torch.zeros_like(parts[0]))
            parts = list(torch.cat(parts).chunk(3))  # of queries, keys, values
            parts = {1: [torch.cat(parts)], 2: parts[::2], 3: parts}[len(wanted)]
            weights |= zip((stem + name for name in wanted), parts, strict=True)
    return weights


def adapt_channels(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file, whose convolutions of three-channel images become those of a network of other channels.

    Their sum over the channels stays what it was, by timm's `adapt_input_conv`; the other sizes are as in the file.
    Of a file of other channels, which does not fit, a line says what would.
    Args:
        own: the network's weights by the same names.
    """
    adapted = {}
    for name, value in weights.items():
        if value.ndim == 4 and name in own and own[name].ndim == 4:
            found, chans = value.shape[1], own[name].shape[1]
            if found == 3 != chans and len(value) == len(own[name]):
                adapted[name] = adapt_input_conv(chans, value)
                log(f"{name}: of 3 channels, adapted to {chans}")
            elif found != chans and "patch_embed" in name:
                log(f"WARNING: {name}: of {found} channels, the network takes {chans}; --in_chans {found} would fit")
    return {**weights, **adapted}


# What the names of foreign weights say about them, and where they can be used.
KINDS = {
    r"embeddings\.patch_embeddings\.": "the library transformers; timm has most of its ViTs, and "
    "torch.save(timm.create_model(NAME, pretrained=True).state_dict(), FILE) writes a file that is read here",
    r"\.ls1\.gamma$": "DINOv2, or another ViT with LayerScale",
    r"^visual\.": "CLIP",
    r"^conv_proj\.": "torchvision's ViT",
    r"relative_position_bias_table$": "a network with relative positions, such as BEiT, SimMIM, A2MIM, CAE or Swin",
    r"\.gamma_1$": "a network with LayerScale, such as BEiT or CAE",
    r"(^|\.)layers\.\d+\.ln1\.": "OpenMixup or MMPretrain, as A2MIM's",
    r"^(query_blocks|decoder_blocks)\.": "a pre-training network, such as SAIM's, SemAIM's or MAE's",
    r"(^|\.)layer1\.0\.": "a ResNet",
    r"(^|\.)stages\.0\.": "a ConvNeXt",
    r"(^|\.)blocks\.0\.attn\.qkv\.": "a ViT, as timm's, MAE's, DINO's or UDI's",
    r"(^|\.)blocks\.0\.attn\.q\.": "a ViT, as SAIM's or SemAIM's",
}


def kind_of(weights: Collection[str]) -> str:
    """What kind of network weights are of, by their names: " (weights of a ResNet)"; '' if they do not say it."""
    found = (kind for pattern, kind in KINDS.items() if any(re.search(pattern, name) for name in weights))
    kind = next(found, "")
    return f" (weights of {kind})" if kind else ""


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with prefix, without it; all of them if none does."""
    part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return part or weights


def flags_of(state: dict[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint keeps, ours or the authors'; none without."""
    args = state.get("args")
    return dict(args) if isinstance(args, dict) else dict(getattr(args, "__dict__", {}))


def load_weights(
    model: Stateful, path: str, keys: tuple[str, ...] = WEIGHT_KEYS, others: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Load the weights of a checkpoint strictly, and return all of it; keys as in `weights_of`, others in `load`.

    Raises:
        UserError: the file is damaged or its weights are not the model's.
    """
    state = load(path, others)
    restore(model, weights_of(state, path, keys), path, "model")
    return state


def restore(part: Stateful, state: dict[str, Any], path: str, key: str) -> None:
    with user_errors(f"{path}: '{key}' does not fit this run"):
        try:
            part.load_state_dict(state)
        except RuntimeError as error:
            if not isinstance(part, nn.Module):
                raise
            own = part.state_dict()
            missing, others = [name for name in own if name not in state], [name for name in state if name not in own]
            odd = [name for name in own if name in state and own[name].shape != getattr(state[name], "shape", None)]
            lists = {"are missing": missing, "are not of this network": others, "have other shapes": odd}
            what = ", ".join(f"{len(names)} weights {words} ({names[0]})" for words, names in lists.items() if names)
            if not what:
                raise
            raise UserError(f"{path}: {key!r} does not fit this run: {what}{kind_of(state)}; check --model") from error
