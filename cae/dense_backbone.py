"""CAE's ViT for dense tasks: feature maps of four scales, made from the tokens after four of its blocks.

Segmentation sees images of one size and adds relative positions to attention; detection sees images of any size and
resizes its table of positions for each.

Legend: B batch, H W pixels, p patch side, h = H / p and w = W / p patches, N = h w, C width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cae.blocks import sincos_pos_embed
from cae.models_vit import VisionTransformer, load_encoder

KEYS = ("state_dict", "model", "module")  # a file's first of these holds the weights, as in the authors' dense tasks


class DenseBackbone(VisionTransformer):
    """The encoder without its final norm, and a pyramid of its feature maps at strides p/4, p/2, p and 2p.

    Args:
        img_size: side of the images in pixels, or (height, width); with use_rel_pos_bias all images must have it, else
            positions are kept for it and resized for others.
        out_indices: blocks, counted from 0, whose tokens become the four maps, from the finest to the coarsest.
        use_checkpoint: forget what is inside the blocks and compute it again in the backward pass, to save memory.
        kwargs: as in `VisionTransformer`.
    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 512,
        patch_size: int = 16,
        out_indices: Sequence[int] = (3, 5, 7, 11),
        use_rel_pos_bias: bool = True,
        init_values: float = 0.1,
        use_checkpoint: bool = False,
        **kwargs,
    ):
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        rows, columns = height // patch_size, width // patch_size
        if use_rel_pos_bias and (height != width or height % patch_size):
            raise ValueError(f"images of {height}x{width}: relative positions need a square of whole patches")
        super().__init__(
            rows * patch_size,
            patch_size,
            num_classes=0,
            use_rel_pos_bias=use_rel_pos_bias,
            init_values=init_values,
            lin_probe=True,  # neither a final norm nor one of pooled features
            **kwargs,
        )
        if len(out_indices) != 4 or sorted(out_indices) != list(out_indices) or out_indices[-1] >= len(self.blocks):
            raise ValueError(
                f"out_indices {tuple(out_indices)}: expected four of the {len(self.blocks)} blocks, rising"
            )
        self.grid = (rows, columns)
        self.pos_embed = nn.Parameter(sincos_pos_embed(self.embed_dim, self.grid), requires_grad=False)
        self.any_size = not use_rel_pos_bias
        self.out_indices = tuple(out_indices)
        self.use_checkpoint = use_checkpoint
        dim = self.embed_dim
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(2, 2)
        self.register_load_state_dict_pre_hook(self._add_indices)

    def _add_indices(self, _module: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
        """Files may lack the index of the relative positions, which is no weight."""
        for name, buffer in self.named_buffers():
            if name.endswith("relative_position_index"):
                state.setdefault(prefix + name, buffer)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The table (1, 1 + N, C) for a grid of patches, bicubic where it is not the stored one.

        As upstream: the scale is (rows + 0.1) / the stored rows, and so for the columns, and resamples at that scale.
        """
        table = self.pos_embed
        assert table is not None
        if (rows, columns) == self.grid:
            return table
        patches = table[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)  # (1, C, h, w) of the stored grid
        scale = ((rows + 0.1) / self.grid[0], (columns + 0.1) / self.grid[1])
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, imgs: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens (B, 1 + N, C) with positions, before the first block.

        Raises:
            ValueError: the images do not have the size that relative positions need.
        """
        x = self.patch_embed.proj(imgs)  # (B, C, h, w)
        rows, columns = x.shape[-2:]
        if not self.any_size and tuple(imgs.shape[-2:]) != (self.patch_embed.img_size,) * 2:
            shape, side = "x".join(map(str, imgs.shape[-2:])), self.patch_embed.img_size
            raise ValueError(f"images are {shape}, the model was built for {side}x{side}")
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return self.pos_drop(x + self.positions(rows, columns))

    def forward(self, imgs: Tensor) -> list[Tensor]:  # type: ignore[override]
        """(B, 3, H, W) -> maps (B, C, 4h, 4w), (B, C, 2h, 2w), (B, C, h, w) and (B, C, h // 2, w // 2)."""
        height, width = imgs.shape[-2:]
        grid = height // self.patch_embed.patch_size, width // self.patch_embed.patch_size
        x, maps = self.embed(imgs), []
        for i, block in enumerate(self.blocks):
            recompute = self.use_checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)  # (B, 1 + N, C)
            if i in self.out_indices:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))  # type: ignore[index]
        return [f(x) for f, x in zip((self.fpn1, self.fpn2, self.fpn3, self.fpn4), maps, strict=True)]


def segmentation_backbone(img_size: int = 512, **kwargs) -> DenseBackbone:
    """With relative positions, for images of one size."""
    return DenseBackbone(img_size, use_rel_pos_bias=True, **kwargs)


def detection_backbone(img_size: Sequence[int] = (672, 1092), **kwargs) -> DenseBackbone:
    """Without relative positions; the stored table is that of 42 x 68 patches, whatever the images' size."""
    return DenseBackbone(img_size, use_rel_pos_bias=False, **kwargs)


def load_backbone(backbone: DenseBackbone, path: str) -> None:
    """Load the encoder of a pre-training, fine-tuning or dense task's file, and say what matched.

    Positions and relative tables of another grid are resized; a file without positions leaves the analytic ones.
    Raises:
        distributed.UserError: the file cannot be read or holds another architecture.
    """
    load_encoder(backbone, path, keys=KEYS, resize_positions=True)
