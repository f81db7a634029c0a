"""SAIM pre-training network: autoregression over image patches in random order.

Two streams run through the network (arXiv 2212.01610, Fig. 1). The content stream h, the encoder, holds a class token
and the patches; a patch sees the class token, itself and the patches before it in the order. The query stream g, the
decoder, begins as positions without pixels; each sees the class token and the patches before its own one in h, and
predicts the pixels of its own patch. All patches are predicted in one pass.

The code has this twice, with equal results. `_predict_masked` is the paper's formulation: patches stay in image order,
two masks hide what comes later. `_predict_sorted`, the default, sorts patches, positions and targets by the order once.
Then both masks are the same lower triangle, plain causal attention, and no mask is made.

Legend: N batch, H W pixels, p patch side, L patches, T = L + 1 tokens, D width, P = 3 p² pixels per patch,
pi_1 .. pi_L the patches in the order of prediction.
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

from saim.blocks import Block, LayerNorm, PatchEmbed, sincos_pos_embed


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


def gather_rows(x: Tensor, order: Tensor | None) -> Tensor:
    """Sort x (N, L, D) by order (N, L); None leaves the raster order."""
    return x if order is None else x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


CHOICES = {
    "prediction_head_type": ("MLP", "LINEAR"),
    "loss_type": ("L1", "L2"),
    "attn_impl": ("causal", "mask"),
    "token_order": ("random", "raster"),
}


def check_arguments(depth: int, query_depth: int, **choices: str) -> None:
    """Raise ValueError for arguments of `SaimViT` that are unknown or do not fit together."""
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(CHOICES[name])}")
    if query_depth == 0 and choices["token_order"] == "random":
        raise ValueError("query_depth 0 (one stream) cannot tell which patch comes next; it needs token_order 'raster'")
    if query_depth < 0 or (query_depth and depth // max(depth // query_depth, 1) != query_depth):
        fitting = [q for q in range(1, depth + 1) if depth // (depth // q) == q]
        raise ValueError(f"query_depth {query_depth} does not fit depth {depth}; possible: {fitting}")


class SaimViT(nn.Module):
    """SAIM: a ViT encoder (content stream), and a decoder (query stream) that reads the encoder's blocks.

    Args:
        query_depth: number of decoder blocks. As many as encoder blocks (Fig. 1b): decoder block i takes keys and
            values from encoder block i. Fewer: from every (depth // query_depth)-th one. 0: no decoder, the ViT-iGPT
            baseline, where row t of the encoder predicts patch t + 1.
        share_weight: the decoder's list of blocks is the encoder's; query_depth of them serve as decoder blocks.
        prediction_head_type: "MLP" or "LINEAR".
        gaussian_kernel_size, gaussian_sigma: blur of the target; both or no blur.
        loss_type: "L2" or "L1".
        norm_pix_loss: standardise each target patch (unbiased variance).
        attn_impl: "causal" (sorted tokens, no mask) or "mask" (the authors' formulation; the only one that follows ties
            of the noise exactly).
        token_order: "random" (paper) or "raster".
    Raises:
        ValueError: an argument has none of the values above, or query_depth does not fit depth.
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
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        query_depth: int = 12,
        share_weight: bool = False,
        prediction_head_type: str = "MLP",
        gaussian_kernel_size: int | None = None,
        gaussian_sigma: float | None = None,
        loss_type: str = "L2",
        norm_pix_loss: bool = True,
        attn_impl: str = "causal",
        token_order: str = "random",
    ):
        super().__init__()
        choices = {"loss_type": loss_type, "attn_impl": attn_impl, "token_order": token_order}
        check_arguments(depth, query_depth, prediction_head_type=prediction_head_type, **choices)
        self.query_depth = query_depth
        self.step = depth // query_depth if query_depth else 0
        self.loss_type = loss_type
        self.norm_pix_loss = norm_pix_loss
        self.attn_impl = attn_impl
        self.token_order = token_order

        # Construction order is upstream's: seeds give the same weights, and state-dict keys the same order.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        num_patches, grid_size = self.patch_embed.num_patches, self.patch_embed.grid_size
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, embed_dim), requires_grad=False)
        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()

        def block(i: int) -> Block:
            return Block(embed_dim, num_heads, mlp_ratio, True, drop_path=drop_path[i], norm_layer=norm_layer)

        self.blocks = nn.ModuleList(block(i) for i in range(depth))
        # As upstream, shared blocks are one list: all of them have both names, and are initialised once.
        shared = share_weight and query_depth
        self.query_blocks = self.blocks if shared else nn.ModuleList(block(i) for i in range(query_depth))
        self.norm = norm_layer(embed_dim)
        patch_pixels = in_chans * patch_size**2
        if prediction_head_type == "MLP":
            self.prediction_head = Mlp(embed_dim, int(embed_dim * mlp_ratio), patch_pixels)
        else:
            self.prediction_head = nn.Linear(embed_dim, patch_pixels)
        self.gaussian_blur = None
        if gaussian_kernel_size is not None and gaussian_sigma is not None:
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
        """Encoder blocks after the last decoder step, on which no output depends; the authors' sizes have none."""
        return len(self.blocks) - self.step * self.query_depth if self.query_depth else 0

    # ---- targets and loss

    def patchify(self, imgs: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, L, P), inner order (row, column, channel)."""
        patches = self.patch_embed.unfold(imgs).unflatten(-1, (imgs.shape[1], -1))  # (N, L, C, p*p)
        return patches.transpose(-2, -1).flatten(-2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(N, L, P) -> (N, 3, H, W), the inverse of `patchify`."""
        g, p = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = patches.reshape(len(patches), g, g, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, g * p, g * p)

    @torch.no_grad()
    def make_target(self, imgs: Tensor) -> Tensor:
        """Pixels to predict, (N, 3, H, W) -> (N, L, P) float32.

        The whole image is blurred by a Gaussian, then cut into patches, then each patch is standardised; blur and
        standardisation only where the constructor was asked for them.
        """
        with torch.autocast(imgs.device.type, enabled=False):  # a blur in half precision would round the targets
            imgs = imgs.float()
            target = self.patchify(imgs if self.gaussian_blur is None else self.gaussian_blur(imgs))
            if self.norm_pix_loss:
                var, mean = torch.var_mean(target, dim=-1, keepdim=True)
                target = (target - mean) / (var + 1e-6).sqrt()
        return target

    def _loss(self, pred: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), target) if self.loss_type == "L2" else F.l1_loss(pred.float(), target)

    def forward_loss(self, imgs: Tensor, pred: Tensor) -> Tensor:
        """Error of pred (N, L, P), in image order, averaged over all N * L * P pixels -> ().

        Every patch counts alike, also pi_1, which is predicted from the class token alone. Rows in front of the last L
        (upstream's row of the class token) do not count.
        """
        return self._loss(pred[:, -self.patch_embed.num_patches :], self.make_target(imgs))

    # ---- order

    def _draw_noise(self, like: Tensor) -> Tensor:
        """One float32 draw (N, L) per forward, as upstream; the patch with the smallest noise comes first."""
        n, length = len(like), self.patch_embed.num_patches
        if self.token_order == "raster":
            return (torch.arange(length, device=like.device) / length).expand(n, -1)
        return torch.rand(n, length, device=like.device)

    def generate_order(self, x: Tensor, noise: Tensor | None = None) -> Tensor | None:
        """Patch indices pi_1 .. pi_L, (N, L), an order per image of a batch like x; None stands for raster order."""
        if noise is None and self.token_order == "raster":
            return None
        noise = self._draw_noise(x) if noise is None else noise
        return noise.argsort(dim=1, stable=True)

    def generate_attention_mask(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Additive masks of the content and the query stream for a batch like x (Fig. 1a).

        Patch a sees patch b if noise_b <= noise_a (content: itself and those before it) or noise_b < noise_a (query:
        those before it). The class token sees only itself and is seen by all (the figure leaves it out).
        Returns:
            two (N, 1, T, T) tensors of 0 and -inf, index 0 = class token.
        """
        noise = self._draw_noise(x) if noise is None else noise
        query, key = noise[:, :, None], noise[:, None, :]  # (N, L, 1), (N, 1, L)

        def additive(hidden: Tensor) -> Tensor:
            hidden = F.pad(hidden, (0, 0, 1, 0), value=True)  # class token as query: no patch
            hidden = F.pad(hidden, (1, 0), value=False)  # class token as key: always
            return torch.zeros(hidden.shape, device=x.device).masked_fill(hidden, -math.inf)[:, None]

        return additive(query < key), additive(query <= key)

    # ---- network

    def _predict_sorted(self, imgs: Tensor, order: Tensor | None) -> Tensor:
        """Predictions (N, L, P) of pi_1 .. pi_L in this order, by causal attention over sorted tokens.

        The rule, rows counted from 0: row r of h is cls (r = 0) or patch pi_r, row r of g is the position of pi_{r+1}.
        Row r of both sees rows 0 .. r of h, that is cls, pi_1 .. pi_r: up to and with itself in h, strictly before
        itself in g.
        """
        n, length = len(imgs), self.patch_embed.num_patches
        pos = self.pos_embed[0, 1:]  # (L, D)
        patches = gather_rows(self.patch_embed.unfold(imgs), order)
        sorted_pos = pos.expand(n, -1, -1) if order is None else F.embedding(order, pos)
        # pi_L comes before no patch: it is never embedded.
        tokens = self.patch_embed.embed(patches[:, :-1]) + sorted_pos[:, :-1]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1)
        h = torch.cat([cls, tokens], dim=1)  # (N, L, D): cls, pi_1 .. pi_{L-1}
        if not self.query_depth:
            for block in self.blocks:
                h = block(h, is_causal=True)
            return self.prediction_head(self.norm(h))
        g = pos  # (L, D), all images' in image order: the first decoder block projects it once, and sorts it then
        table_order = torch.arange(length, device=imgs.device).expand(n, -1) if order is None else order
        for i, block in enumerate(self.blocks[: self.step * self.query_depth]):
            h = block(h, is_causal=True)
            if (i + 1) % self.step == 0:
                g = self.query_blocks[i // self.step](g, h, is_causal=True, order=table_order if g is pos else None)
        return self.prediction_head(self.norm(g))  # row r saw cls, pi_1 .. pi_r and predicts pi_{r+1}

    def _predict_masked(self, imgs: Tensor, noise: Tensor | None) -> Tensor:
        """Predictions (N, L, P) in image order, by the two masks (Fig. 1)."""
        tokens = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        content_mask, query_mask = self.generate_attention_mask(tokens, noise)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(imgs), -1, -1)
        h = torch.cat([cls, tokens], dim=1)  # (N, T, D)
        g = self.pos_embed.expand(len(imgs), -1, -1)  # (N, T, D): positions alone; row 0 is never read
        for i, block in enumerate(self.blocks):
            h = block(h, mask=content_mask)
            if self.query_depth and (i + 1) % self.step == 0:  # keys and values: the encoder block's output
                g = self.query_blocks[i // self.step](g, h, query_mask)
        rows = g[:, 1:] if self.query_depth else h[:, :-1]  # one stream: row t predicts patch t + 1
        return self.prediction_head(self.norm(rows))

    def forward_saim(self, imgs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Predict every patch from its predecessors.

        Args:
            imgs: (N, 3, H, W) float, normalised by the data set's mean and std.
            noise: (N, L) float, replaces the draw of the order.
        Returns:
            (N, L, P) in image order.
        """
        if self.attn_impl == "mask":
            return self._predict_masked(imgs, noise)
        order = self.generate_order(imgs, noise)
        pred = self._predict_sorted(imgs, order)
        return pred if order is None else gather_rows(pred, order.argsort(dim=1))

    def forward(self, imgs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mean error of all predictions; arguments as `forward_saim`.

        Returns:
            loss: (), float32.
        Raises:
            ValueError: the images are not of the size the model was built for.
        """
        if self.attn_impl == "mask":
            return self.forward_loss(imgs, self.forward_saim(imgs, noise))
        order = self.generate_order(imgs, noise)
        return self._loss(self._predict_sorted(imgs, order), gather_rows(self.make_target(imgs), order))


def saim_base(**kwargs) -> SaimViT:
    """ViT-B/16 encoder."""
    return SaimViT(**{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


def saim_small(**kwargs) -> SaimViT:  # ours: for 64-128 pixel images on one GPU
    return SaimViT(**{"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


def saim_tiny(**kwargs) -> SaimViT:  # ours: for 32-64 pixel images
    return SaimViT(**{"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


def saim_nano(**kwargs) -> SaimViT:  # ours: for digits on a CPU
    return SaimViT(**{"patch_size": 16, "embed_dim": 96, "depth": 4, "num_heads": 3, **kwargs})


def vit_igpt_base(**kwargs) -> SaimViT:
    """ViT-iGPT, ViT-B/16: one stream, raster order. Ours: the authors published no recipe for this row."""
    return saim_base(**{**kwargs, "query_depth": 0, "share_weight": False, "token_order": "raster"})


MODELS = {f.__name__: f for f in (saim_base, saim_small, saim_tiny, saim_nano, vit_igpt_base)}
