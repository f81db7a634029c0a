"""SemAIM pre-training network: autoregression over image patches, from semantic ones to less semantic ones.

Two streams run through the network. The content stream h holds a class token and the patches; a patch sees those of
equal or earlier rank. The query stream g holds positions only; g_i cross-attends to the patches of strictly earlier
rank in h and predicts patch i: its pixels, or a teacher's features. All patches are predicted in one pass.

The ranks π come from one of eight rules (orders.py). Three of them follow a map that says how similar each patch is to
the whole image; without a teacher, the encoder itself draws it in an extra pass without masks and gradients
(`semantic_pass`). engine_pretrain.py: `Guide` decides which network draws the map and the features to predict.

Ranks may tie: float32 swallows the noise that should separate equal distances. Patches of equal rank see each other's
content and do not predict each other, exactly as the authors' masks have it. `attn_impl` says how that is computed.

Legend: N batch, H W pixels, p patch side, w grid side, L = w² patches, T = L + 1 tokens, D width, O outputs per patch.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from semaim import orders
from semaim.blocks import CAUSAL, Block, LayerNorm, PatchEmbed, QueryBlock, Visible, sincos_pos_embed

ATTENTIONS = ("cls", "gap", "self")
FEATURES = ("none", "inference", "ema", "dino", "clip")
ATTN_IMPLS = ("auto", "mask", "flex", "causal", "authors")


# same as saim/models_saim.py
class GaussianConv2d(nn.Module):
    """Depth-wise Gaussian blur with zero padding; the kernel is the buffer `weight` (channels, 1, k, k).

    Raises:
        ValueError: kernel_size is even (the output would grow by a pixel), or sigma is not positive.
    """

    def __init__(self, channels: int, kernel_size: int, sigma: float):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"gaussian kernel size {kernel_size} is not odd and positive")
        if sigma <= 0:
            raise ValueError(f"gaussian sigma {sigma} is not positive")
        offset = torch.arange(kernel_size, dtype=torch.float64) - (kernel_size - 1) // 2
        line = torch.exp(-(offset**2) / (2 * sigma**2))
        kernel = torch.outer(line, line)
        kernel = (kernel / kernel.sum()).float()
        self.register_buffer("weight", kernel.expand(channels, 1, -1, -1).contiguous())
        self.weight: Tensor

    def forward(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return F.conv2d(
            imgs, self.weight.to(imgs.dtype), padding=self.weight.shape[-1] // 2, groups=self.weight.shape[0]
        )


# same as saim/models_saim.py
def gather_rows(x: Tensor, order: Tensor | None) -> Tensor:
    """Sort x (N, L, D) by order (N, L); None leaves the raster order."""
    return x if order is None else x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def additive(visible: Tensor) -> Tensor:
    """Bool mask (N, Tq, Tk), True = visible -> (N, 1, Tq, Tk) of 0 and -inf."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -math.inf)[:, None]


def block_mask(last: Tensor, keys: int) -> BlockMask:
    """FlexAttention's mask of rows that each see the keys 0 to last (N, Tq)."""
    n, rows = last.shape
    return create_block_mask(lambda b, h, q, k: k <= last[b, q], n, None, rows, keys, device=last.device.type)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of a (N, L, D) and b, broadcast: (N, L), float32 under autocast, too."""
    return (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(dim=-1)


def calculate_similarity(tokens: Tensor) -> Tensor:
    """The map of a CLIP or DINO teacher, used by `Guide` (the encoder's own is `AimViT.feature_attention`).

    Cosine between the class token and each patch of tokens (N, T, D), stretched to 0..1 per image: (N, L).
    """
    similarity = cosine(tokens[:, 1:], tokens[:, :1])
    low, high = similarity.amin(dim=1, keepdim=True), similarity.amax(dim=1, keepdim=True)
    return (similarity - low) / (high - low + 1e-6)


CHOICES = {
    "permutation_type": orders.ORDERS,
    "attention_type": ATTENTIONS,
    "prediction_head_type": ("MLP", "LINEAR"),
    "loss_type": ("L1", "L2"),
    "predict_feature": FEATURES,
    "attn_impl": ATTN_IMPLS,
}


def check_arguments(depth: int, query_depth: int, share_weight: bool, **choices: str) -> None:
    """Raise ValueError for arguments of `AimViT` that are unknown or do not fit together."""
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(CHOICES[name])}")
    if share_weight:
        raise ValueError("share_weight: the two streams' blocks have different weights here, nothing can be shared")
    if query_depth < 1 or depth // max(depth // query_depth, 1) != query_depth:
        fitting = [q for q in range(1, depth + 1) if depth // (depth // q) == q]
        raise ValueError(f"query_depth {query_depth} does not fit depth {depth}; possible: {fitting}")


class AimViT(nn.Module):
    """SemAIM with a ViT encoder (content stream) and a cross-attending decoder (query stream).

    Args:
        out_dim: width of the features that predict_feature="clip" regresses.
        permutation_type: rule of the order, a name of `orders.ORDERS`.
        attention_type: what the similarity is measured from: "cls" (class token), "gap" (mean of the patches), or
            "self" (the class token's attention in the last block).
        query_depth: decoder blocks; block j runs after encoder block (j + 1) * (depth // query_depth) - 1.
        prediction_head_type: "MLP" or "LINEAR".
        gaussian_kernel_size, gaussian_sigma: blur of the target; both or no blur.
        loss_type: "L2" or "L1"; of pixels only.
        predict_feature: "none" (pixels), "clip", "dino", or the encoder's own tokens: "inference", or "ema".
        norm_pix_loss: standardise each target patch (unbiased variance).
        attn_impl: "mask" gives a bool mask to SDPA; "flex" sorts the patches and gives their limits to FlexAttention;
            "causal" sorts and breaks ties by index, the one that is not exact; "authors" builds softmax matrices with
            additive masks. "auto" is causal where no rank ties, else mask.
    Raises:
        ValueError: an argument has none of the values above, or they do not fit together.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        drop_path_rate: float = 0.0,
        out_dim: int = 768,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        permutation_type: str = "center2out",
        attention_type: str = "cls",
        query_depth: int = 12,
        share_weight: bool = False,
        prediction_head_type: str = "MLP",
        gaussian_kernel_size: int | None = None,
        gaussian_sigma: float | None = None,
        loss_type: str = "L2",
        predict_feature: str = "none",
        norm_pix_loss: bool = True,
        attn_impl: str = "auto",
    ):
        super().__init__()
        choices = {"permutation_type": permutation_type, "attention_type": attention_type, "loss_type": loss_type}
        choices |= {"prediction_head_type": prediction_head_type, "predict_feature": predict_feature}
        check_arguments(depth, query_depth, share_weight, attn_impl=attn_impl, **choices)
        self.step = depth // query_depth
        self.permutation_type, self.attention_type = permutation_type, attention_type
        self.loss_type, self.norm_pix_loss = loss_type, norm_pix_loss
        self.predict_feature, self.attn_impl = predict_feature, attn_impl

        # Construction order is that of the state-dict keys.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        grid_size = self.patch_embed.grid_size
        if permutation_type in orders.BOX_ORDERS and grid_size != orders.BOX_GRID:
            raise ValueError(
                f"permutation_type {permutation_type} is defined for {orders.BOX_GRID} x {orders.BOX_GRID} patches, "
                f"here are {grid_size} x {grid_size}"
            )
        self.pos_embed = nn.Parameter(torch.zeros(1, grid_size**2 + 1, embed_dim), requires_grad=False)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate, norm_layer) for rate in rates)
        self.query_blocks = nn.ModuleList(
            QueryBlock(embed_dim, num_heads, mlp_ratio, rate, norm_layer) for rate in rates[:query_depth]
        )
        self.norm = norm_layer(embed_dim)
        outputs = {"none": in_chans * patch_size**2, "clip": out_dim}.get(predict_feature, embed_dim)
        hidden = int(embed_dim * mlp_ratio) if prediction_head_type == "MLP" else 0
        self.prediction_head = Mlp(embed_dim, hidden, outputs) if hidden else nn.Linear(embed_dim, outputs)
        self.gaussian_blur = None
        if gaussian_kernel_size is not None and gaussian_sigma is not None and predict_feature == "none":
            self.gaussian_blur = GaussianConv2d(in_chans, gaussian_kernel_size, gaussian_sigma)

        self.pos_embed.data.copy_(sincos_pos_embed(embed_dim, grid_size, cls_token=True))
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # a view: fills the convolution's weight
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def idle_blocks(self) -> int:
        """Trailing encoder blocks after the last decoder step: no output depends on them (paper models have none)."""
        return len(self.blocks) - self.step * len(self.query_blocks)

    @property
    def follows_map(self) -> bool:
        """Whether the order needs attention maps."""
        return self.permutation_type in orders.MAP_ORDERS

    # ---- targets and losses

    def patchify(self, imgs: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, L, 3p²), inner order (row, column, channel)."""
        patches = self.patch_embed.unfold(imgs).unflatten(-1, (imgs.shape[1], -1))  # (N, L, C, p*p)
        return patches.transpose(-2, -1).flatten(-2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(N, L, 3p²) -> (N, 3, H, W), the inverse of `patchify`."""
        g, p = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = patches.reshape(len(patches), g, g, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, g * p, g * p)

    @torch.no_grad()
    def make_target(self, imgs: Tensor) -> Tensor:
        """Pixels to predict, (N, 3, H, W) -> (N, L, 3p²) float32: blurred, patchified, standardised if asked for."""
        with torch.autocast(imgs.device.type, enabled=False):  # a blur in half precision would round the targets
            imgs = imgs.float()
            target = self.patchify(imgs if self.gaussian_blur is None else self.gaussian_blur(imgs))
            if self.norm_pix_loss:
                var, mean = torch.var_mean(target, dim=-1, keepdim=True)
                target = (target - mean) / (var + 1e-6).sqrt()
        return target

    def pixel_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Mean error of every patch's pixels: (N, L, 3p²) each -> (N, L)."""
        error = pred.float() - target
        return (error.abs() if self.loss_type == "L1" else error.square()).mean(dim=-1)

    def feature_loss(self, pred: Tensor, tokens: Tensor) -> Tensor:
        """Loss of CLIP, DINO and own features: squared distance of unit vectors, 2 - 2 cos (SemAIM* predicts CLIP's).

        Args:
            pred: (N, L, O). tokens: (N, T, O), class token first, which is left out.
        Returns:
            (N, L) float32
        """
        pred, target = F.normalize(pred.float(), dim=-1), F.normalize(tokens[:, 1:].float(), dim=-1)
        return (pred - target).square().sum(dim=-1)

    # ---- order

    def permutation(
        self,
        x: Tensor,
        attention_maps: Tensor | None = None,
        noise: Tensor | None = None,
        center_noise: Tensor | None = None,
    ) -> Tensor:
        """Rank of every patch for a batch like x (N, L, ...) by this model's rule; the rest as `orders.permutation`."""
        return orders.permutation(self.permutation_type, x, attention_maps, noise, center_noise)

    def generate_attention_mask(
        self,
        x: Tensor,
        attention_maps: Tensor | None = None,
        noise: Tensor | None = None,
        center_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Additive masks of the content and the query stream, and the permutation; arguments as `permutation`.

        Returns:
            two (N, 1, T, T) tensors of 0 and -inf, index 0 = class token, and (N, L).
        """
        permutation = self.permutation(x, attention_maps, noise, center_noise)
        content, query = orders.visibility(permutation)
        query = torch.cat([content[:, :1], query], dim=1)
        return additive(content), additive(query), permutation

    def _plan(self, permutation: Tensor) -> tuple[Tensor | None, Visible, Visible]:
        """The order in which to sort the patches (None: image order), and what the two streams may see then."""
        impl = self.attn_impl
        if impl == "auto":  # a look at the ranks is free on a CPU; a GPU would have to wait for it
            unique = self.permutation_type in orders.TOTAL_ORDERS
            unique = unique or (permutation.device.type == "cpu" and not orders.has_ties(permutation))
            impl = "causal" if unique else "mask"
        if impl in ("mask", "authors"):
            seen = orders.visibility(permutation)
            content, query = (additive(mask) if impl == "authors" else mask[:, None] for mask in seen)
            return None, content, query
        order = permutation.argsort(dim=1, stable=True)
        if impl == "causal":
            return order, CAUSAL, CAUSAL
        content, query = (block_mask(last, order.shape[1] + 1) for last in orders.sorted_limits(permutation, order))
        return order, content, query

    # ---- network

    def _tokens(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded patches (N, L, D) and class token (N, 1, D), positions added."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(imgs), -1, -1)
        return self.patch_embed(imgs) + self.pos_embed[:, 1:], cls

    def forward_aim(
        self,
        imgs: Tensor,
        attention_maps: Tensor | None = None,
        noise: Tensor | None = None,
        center_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict every patch from those of earlier rank.

        Args:
            imgs: (N, 3, H, W) float, normalised by the data set's mean and std. Others as `permutation`.
        Returns:
            (N, L, O) in image order, and the permutation (N, L).
        """
        patches, cls = self._tokens(imgs)
        permutation = self.permutation(patches, attention_maps, noise, center_noise)
        order, content, query = self._plan(permutation)
        patches = gather_rows(patches, order)
        if content == CAUSAL:
            # Sorted by π, both visibilities are one lower triangle: row r sees cls, π_1 ... π_r. In the content stream
            # it is the token π_r itself (row 0: cls); in the query stream, which has no cls row, it predicts π_{r+1}.
            patches = patches[:, :-1]  # the last patch of the order informs no other
        h = torch.cat([cls, patches], dim=1)  # (N, T, D), or without the last patch
        g = self.pos_embed[0, 1:]  # (L, D): the first decoder block projects one table for all samples
        for i, block in enumerate(self.blocks[: self.step * len(self.query_blocks)]):
            h = block(h, content)
            if (i + 1) % self.step == 0:
                g = self.query_blocks[i // self.step](g, h, query, order)  # (N, L, D)
        pred = self.prediction_head(self.norm(g))  # (N, L, O), sorted by the order
        return pred if order is None else gather_rows(pred, order.argsort(dim=1)), permutation

    def feature_attention(self, tokens: Tensor) -> Tensor:
        """The map S of the encoder's own tokens, used by `semantic_pass` (teachers: `calculate_similarity`).

        Softmax over the patches of their cosine with the class token, or with the mean of the patches if
        attention_type is "gap": (N, T, D) -> (N, L).
        """
        tokens = tokens.float()
        whole = tokens[:, 1:].mean(dim=1, keepdim=True) if self.attention_type == "gap" else tokens[:, :1]
        return cosine(tokens[:, 1:], whole).softmax(dim=-1)

    def _before_last_block(self, imgs: Tensor) -> Tensor:
        patches, cls = self._tokens(imgs)
        h = torch.cat([cls, patches], dim=1)
        for block in self.blocks[:-1]:
            h = block(h)
        return h

    def _class_attention(self, h: Tensor) -> Tensor:
        """Attention of the class token to each patch in the last block, mean over the heads: (N, T, D) -> (N, L)."""
        last = self.blocks[-1]
        return last.attn.matrix(last.norm1(h), rows=slice(0, 1)).mean(dim=1)[:, 0, 1:]  # type: ignore[union-attr]

    @torch.no_grad()
    def semantic_pass(self, imgs: Tensor, features: bool = False) -> tuple[Tensor | None, Tensor]:
        """Run the encoder without masks, for the map that an order follows and for features to predict.

        Args:
            imgs: (N, 3, H, W). features: whether the tokens are needed; a "self" map alone stops before the last block.
        Returns:
            tokens (N, T, D) after the final norm, and the map (N, L) of this model's attention_type.
        """
        h = self._before_last_block(imgs)
        own = self._class_attention(h) if self.attention_type == "self" else None
        if own is not None and not features:
            return None, own
        tokens = self.norm(self.blocks[-1](h))
        return tokens, self.feature_attention(tokens) if own is None else own

    def forward(
        self,
        imgs: Tensor,
        tokens: Tensor | None = None,
        attention_maps: Tensor | None = None,
        forward_encoder: bool = False,
        noise: Tensor | None = None,
        center_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean error of all predictions.

        Args:
            imgs: (N, 3, H, W) float, normalised by the data set's mean and std.
            tokens: (N, T, O), features to predict; None: pixels.
            forward_encoder: only run the encoder, without masks. Others as `permutation`.
        Returns:
            loss () float32, permutation (N, L), and each patch's error (N, L); or, with forward_encoder, the tokens
            (N, T, D), their similarity to the image's token and the class token's attention, (N, L) each.
        Raises:
            ValueError: the images are not of the size the model was built for, or tokens do not fit predict_feature.
        """
        if forward_encoder:
            h = self._before_last_block(imgs)
            z = self.norm(self.blocks[-1](h))
            return z, self.feature_attention(z), self._class_attention(h)
        if (tokens is None) != (self.predict_feature == "none"):
            raise ValueError(
                f"predict_feature {self.predict_feature!r} {'needs' if tokens is None else 'takes no'} tokens"
            )
        pred, permutation = self.forward_aim(imgs, attention_maps, noise, center_noise)
        errors = self.pixel_loss(pred, self.make_target(imgs)) if tokens is None else self.feature_loss(pred, tokens)
        return errors.mean(), permutation, errors


def aim_base(**kwargs) -> AimViT:
    """ViT-B/16 encoder."""
    return AimViT(**{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


def aim_large(**kwargs) -> AimViT:
    """ViT-L/16 encoder."""
    return AimViT(**{"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **kwargs})


def aim_huge(**kwargs) -> AimViT:
    """ViT-H/16 encoder; takes query_depth 16, not the flag's default 12."""
    return AimViT(**{"patch_size": 16, "embed_dim": 1280, "depth": 32, "num_heads": 16, **kwargs})


def aim_small(**kwargs) -> AimViT:  # ours: for 64-128 pixel images on one GPU
    return AimViT(**{"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


def aim_tiny(**kwargs) -> AimViT:  # ours: for 32-64 pixel images
    return AimViT(**{"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


def aim_nano(**kwargs) -> AimViT:  # ours: for digits on a CPU
    return AimViT(**{"patch_size": 16, "embed_dim": 96, "depth": 4, "num_heads": 3, **kwargs})


MODELS = {f.__name__: f for f in (aim_base, aim_large, aim_huge, aim_small, aim_tiny, aim_nano)}
MODELS["saim_base"] = aim_base  # upstream's default name, for which upstream has no constructor
