"""A2MIM's encoders for dense tasks: the ViT, whose maps a pyramid brings to four scales, and the ResNet.

B batch, N patches, D width, H W pixels, p patch side, h w grid of patches or of features.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.nn.functional as F
from timm.models.beit import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from a2mim.backbones import BACKBONES, Backbone, init_pretraining
from a2mim.openmixup import VIT_NAMES, renamed, resize_pos_embed, tensors
from common import distributed
from common.distributed import UserError

# Blocks, counted from 0, whose outputs are taken. 12: the authors' configurations; others: ours.
TAPS = {4: (0, 1, 2, 3), 8: (1, 3, 5, 7), 12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}


# ---- positions


# same as cae/models_vit.py
def _spline(knots: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Matrix (targets, knots) of not-a-knot cubic interpolation; targets beyond the knots take the outermost value."""
    from scipy.interpolate import make_interp_spline  # here, because importing it takes 0.4 s

    spline = make_interp_spline(knots, np.eye(len(knots)), k=3)
    return spline(targets.clip(knots[0], knots[-1]))


# same as cae/models_vit.py
def resize_relative_positions(table: Tensor, grid_size: int) -> Tensor:
    """Resize a table of relative position biases ((2G-1)² + 3, h) to another grid; the last 3 rows are kept.

    Old distances are placed in geometric progression, dense in the middle, and interpolated by cubic splines. The
    bisection ends at its last midpoint (as upstream).
    """
    source, target = math.isqrt(len(table) - 3), 2 * grid_size - 1
    if source == target:
        return table
    low, high, q = 1.01, 1.5, 1.01
    while high - low > 1e-6:  # bisection for the ratio at which the old distances span the new grid
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (source // 2)) / (1 - q) > target // 2 else (q, high)
    distances = np.cumsum(q ** np.arange(source // 2))
    knots = np.concatenate([-distances[::-1], [0.0], distances])
    weights = _spline(knots, np.arange(target, dtype=np.float64) - target // 2)
    old = table[:-3].double().numpy().reshape(source, source, -1)  # (2G-1, 2G-1, h) of the old grid
    new = np.einsum("ai,bj,ijh->abh", weights, weights, old).reshape(target**2, -1)
    return torch.cat([torch.from_numpy(new).to(table.dtype), table[-3:]])


def relative_index(grid: Sequence[int], side: int, device: torch.device) -> Tensor:
    """(1 + N, 1 + N): for each pair of tokens of a grid (h, w), its row in the table of a grid side x side at least as
    large. The table's last 3 rows are those from the class token, to it, and to itself."""
    rows = (2 * side - 1) ** 2
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    dy, dx = ((z.flatten()[:, None] - z.flatten() + side - 1) for z in (y, x))
    index = F.pad(dy * (2 * side - 1) + dx, (1, 0, 1, 0), value=rows + 1)
    index[0] = rows
    index[0, 0] = rows + 2
    return index


class _Attention(Attention):
    """timm's attention for grids of several sizes; `index` is that of the images at hand."""

    index: Tensor

    def _get_rel_pos_bias(self) -> Tensor:
        assert self.relative_position_bias_table is not None
        bias = self.relative_position_bias_table[self.index.flatten()].view(*self.index.shape, -1)
        return bias.permute(2, 0, 1)[None].contiguous()


# ---- backbones


class DenseViT(nn.Module):
    """Maps of a ViT after several of its blocks, all of stride p.

    The names of its weights are OpenMixup's, which are also those of mmseg's BEiT (layers.0.ln1.weight, ...).
    Args:
        name: a ViT of `backbones.BACKBONES` with relative positions.
        img_size: side of the largest images in pixels. Relative positions are stored for it, and smaller images take a
            part of them; absolute ones are resized for other images.
        out_indices: blocks, counted from 0; default `TAPS`.
        use_abs_pos_emb: add absolute positions, too.
        final_norm: apply the encoder's norm to the last of the maps.
        use_checkpoint: compute what is inside the blocks again in the backward pass, which saves memory.
        kwargs: of `backbones.vit`.
    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        name: str = "vit_base",
        img_size: int = 512,
        out_indices: Sequence[int] | None = None,
        use_abs_pos_emb: bool = False,
        final_norm: bool = False,
        use_checkpoint: bool = False,
        **kwargs,
    ):
        super().__init__()
        net: Backbone = BACKBONES[name](img_size=img_size, **kwargs)
        init_pretraining(net)
        self.out_indices = tuple(out_indices or TAPS[len(net.blocks)])
        if sorted(self.out_indices) != list(self.out_indices) or not 0 <= self.out_indices[-1] < len(net.blocks):
            raise ValueError(f"out_indices {self.out_indices}: expected some of the {len(net.blocks)} blocks, rising")
        self.embed_dim, self.img_size = net.embed_dim, img_size
        self.side = net.patch_embed.grid_size[0]
        self.use_checkpoint = use_checkpoint
        self.cls_token = net.cls_token
        self.pos_embed = net.pos_embed if use_abs_pos_emb else None
        self.patch_embed, self.blocks = net.patch_embed.proj, net.blocks
        self.norm = net.norm if final_norm else None
        for block in self.blocks:
            del block.attn.relative_position_index  # a large buffer that every process would send at every step
            block.attn.__class__ = _Attention
        self._index: tuple[Any, Tensor] | None = None  # of the last images: (grid and device, index)
        self.official = {
            renamed(k.replace("patch_embed.", "patch_embed.proj."), VIT_NAMES): k for k in self.state_dict()
        }
        self.register_state_dict_post_hook(_official_names)
        self.register_load_state_dict_pre_hook(_own_names)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps (B, D, h, w), of h = H // p rows and w = W // p columns of patches.

        Raises:
            ValueError: the images are larger than `img_size`.
        """
        x = self.patch_embed(images)  # (B, D, h, w)
        grid, key = x.shape[-2:], (x.shape[-2:], x.device)
        if max(grid) > self.side:
            shape = "x".join(map(str, images.shape[-2:]))
            raise ValueError(f"images are {shape}, the model was built for at most {self.img_size}x{self.img_size}")
        if self._index is None or self._index[0] != key:
            self._index = key, relative_index(grid, self.side, x.device)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + N, D)
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, grid, (self.side, self.side))
        maps = []
        for i, block in enumerate(self.blocks):
            block.attn.index = self._index[1]
            recompute = self.use_checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)  # (B, 1 + N, D)
            if i in self.out_indices:
                tokens = self.norm(x) if self.norm is not None and i == self.out_indices[-1] else x
                maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid))
        return maps


def _official_names(module: Any, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    for official, own in module.official.items():
        state[prefix + official] = state.pop(prefix + own)


def _own_names(module: Any, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Also leave out what is no weight, and take the biases of queries and values out of a joint one (mmseg's MAE)."""
    for name in [name for name in state if name.startswith(prefix)]:
        if name.endswith(".attn.relative_position_index"):
            del state[name]
        elif name.endswith(".attn.qkv.bias"):  # that of keys shifts all logits of a row alike: it does nothing
            query, _, value = state.pop(name).chunk(3)
            state |= {name.replace("qkv.bias", f"{x}_bias"): b for x, b in (("q", query), ("v", value))}
    for official, own in module.official.items():
        if prefix + official in state:
            state[prefix + own] = state.pop(prefix + official)


class Pyramid(nn.Module):
    """Four maps (B, D, h, w) of stride p -> strides p/4, p/2, p and 2 p, by transposed convolutions and pooling."""

    def __init__(self, dim: int):
        super().__init__()
        self.upsample_4x = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
        )
        self.upsample_2x = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        quarter, half, same, double = maps
        return [self.upsample_4x(quarter), self.upsample_2x(half), same, F.max_pool2d(double, 2)]


class DenseResNet(nn.Module):
    """Maps of a ResNet after each of its stages, (B, C, h, w), at strides 4, 8, 16 and 32.

    Args:
        name: a ResNet of `backbones.BACKBONES`.
        stages: how many of the four there are.
        kwargs: of `backbones.resnet`; output_stride=8 dilates the last two stages instead of striding.
    """

    def __init__(self, name: str = "resnet50", stages: int = 4, **kwargs):
        super().__init__()
        net: Backbone = BACKBONES[name](**kwargs)
        init_pretraining(net)
        self.conv1, self.bn1 = net.conv1, net.bn1
        self.stages = [f"layer{i + 1}" for i in range(stages)]
        self.channels = [info["num_chs"] for info in net.feature_info[1:]][:stages]
        for stage in self.stages:
            self.add_module(stage, getattr(net, stage))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the maps, from the finest to the coarsest."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        maps = []
        for stage in self.stages:
            x = getattr(self, stage)(x)
            maps.append(x)
        return maps


def load_backbone(backbone: DenseViT | DenseResNet, path: str) -> dict[str, Tensor]:
    """Load an encoder from an extracted one or a checkpoint of pre-training or fine-tuning, and report it.

    Positions of both kinds are resized to the backbone's grid; absolute ones are left out where it has none.
    Returns:
        all weights of the file, without the prefix `backbone.`.
    Raises:
        UserError: the file cannot be read or holds another encoder.
    """
    weights = distributed.part_of(tensors(distributed.load(path)), "backbone.")
    own, given = backbone.state_dict(), weights
    if isinstance(backbone, DenseViT):
        given = {renamed(name, VIT_NAMES): value for name, value in weights.items()}
        for name in [name for name in given if name in own and given[name].shape != own[name].shape]:
            if name == "pos_embed":
                given[name] = resize_pos_embed(given[name], (backbone.side, backbone.side))
            elif name.endswith("relative_position_bias_table"):
                given[name] = resize_relative_positions(given[name], backbone.side)
    given = distributed.adapt_channels(given, own)
    wrong = [f"{name} is missing" for name in own if name not in given]
    wrong += [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    if wrong:
        raise UserError(f"{path}: is not this encoder: {len(wrong)} of its {len(own)} tensors do not fit, {wrong[0]}")
    backbone.load_state_dict({name: given[name] for name in own})
    others = [name for name in given if name not in own and not name.endswith("relative_position_index")]
    distributed.log(f"{path}: {distributed.load_report(len(own), [], others)}")
    return weights
