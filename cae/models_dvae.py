"""The small discrete VAE of --discrete_vae_type customized, which `main_tokenizer.py` trains, and `load_tokenizer`.

Its encoder gives each 2^n x 2^n pixels logits over V codes; its decoder paints the picture from the codes' vectors.

Legend: B batch, s image side, n layers, g = s / 2^n side of the code grid, V codes, E width of their vectors.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae.convert_dalle import URL, load_dalle
from cae.models_dalle import DalleTokenizer
from common import distributed
from common.distributed import UserError

MEAN = STD = (0.5, 0.5, 0.5)  # of the images it is trained on and tokenises: [0, 1] becomes [-1, 1]


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions and a 1 x 1 one around a skip."""

    def __init__(self, dim: int):
        super().__init__()
        three, again, one = (nn.Conv2d(dim, dim, side, padding=side // 2) for side in (3, 3, 1))
        self.net = nn.Sequential(three, nn.ReLU(), again, nn.ReLU(), one)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> the same shape."""
        return x + self.net(x)


class Reconstruction(NamedTuple):
    loss: Tensor  # (), error + kl_weight * kl
    error: Tensor  # (), mean squared error of the normalised pixels
    kl: Tensor  # (), of the batch's codes to uniform use, in nats; log V if all are the same
    indices: Tensor  # (B, g, g), most likely codes


class DiscreteVAE(nn.Module):
    """Discrete VAE with the state-dict keys of upstream's.

    mean, std: by which pixels from 0 to 1 are normalised.
    Raises:
        ValueError: image_size is not a multiple of 2^num_layers.
    """

    def __init__(
        self,
        image_size: int = 112,
        num_tokens: int = 8192,
        codebook_dim: int = 512,
        num_layers: int = 3,
        hidden_dim: int = 256,
        in_chans: int = 3,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ):
        super().__init__()
        if image_size % 2**num_layers:
            raise ValueError(f"image size {image_size} is not a multiple of 2^{num_layers} pixels, a code's")
        self.image_size = image_size
        self.in_chans, self.mean, self.std = in_chans, tuple(mean), tuple(std)
        self.num_tokens = num_tokens
        self.grid_size = image_size // 2**num_layers
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        down = [nn.Conv2d(hidden_dim if i else in_chans, hidden_dim, 4, 2, 1) for i in range(num_layers)]
        up = [nn.ConvTranspose2d(hidden_dim, hidden_dim, 4, 2, 1) for _ in range(num_layers)]
        self.encoder = nn.Sequential(
            *(nn.Sequential(conv, nn.ReLU()) for conv in down),
            *(ResBlock(hidden_dim) for _ in range(2)),
            nn.Conv2d(hidden_dim, num_tokens, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook_dim, hidden_dim, 1),
            *(ResBlock(hidden_dim) for _ in range(2)),
            *(nn.Sequential(conv, nn.ReLU()) for conv in up),
            nn.Conv2d(hidden_dim, in_chans, 1),
        )

    def logits(self, imgs: Tensor) -> Tensor:
        """Normalised images (B, 3, s, s) -> logits of codes (B, V, g, g).

        Raises:
            ValueError: the images have another size.
        """
        if imgs.shape[-2:] != (self.image_size, self.image_size):
            h, w = imgs.shape[-2:]
            raise ValueError(f"images are {h}x{w}, the tokenizer was built for {self.image_size}x{self.image_size}")
        return self.encoder(imgs)

    @torch.no_grad()
    def get_codebook_indices(self, imgs: Tensor) -> Tensor:
        """Normalised images (B, 3, s, s) -> codes (B, g * g), row by row; outside of the caller's autocast."""
        with torch.autocast(imgs.device.type, enabled=False):
            return self.logits(imgs).argmax(dim=1).flatten(1)

    def decode(self, indices: Tensor) -> Tensor:
        """Codes (B, g * g) -> normalised images (B, 3, s, s)."""
        vectors = self.codebook(indices).unflatten(1, (self.grid_size, self.grid_size))  # (B, g, g, E)
        return self.decoder(vectors.permute(0, 3, 1, 2))

    @torch.no_grad()
    def pictures(self, indices: Tensor) -> Tensor:
        """Codes (B, g * g) -> pictures (B, 3, s, s) in [0, 1]."""
        decoded = self.decode(indices)
        mean, std = (decoded.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (std * decoded + mean).clamp(0, 1)

    def forward(
        self, imgs: Tensor, temperature: float = 1.0, kl_weight: float = 0.0, noise: Tensor | None = None
    ) -> Reconstruction:
        """Reconstruct images from codes drawn by the Gumbel-softmax relaxation (arXiv 2102.12092, sec. 2.1).

        Args:
            imgs: (B, 3, s, s), normalised.
            temperature: temperature of the relaxation; towards 0 the draws become one-hot.
            noise: (B, V, g, g) standard Gumbel draws, made here by default.
        """
        logits = self.logits(imgs).float()
        if noise is None:
            noise = -torch.empty_like(logits).exponential_().log()
        drawn = ((logits + noise) / temperature).softmax(dim=1)
        recon = self.decoder(torch.einsum("bvhw,ve->behw", drawn, self.codebook.weight))
        error = F.mse_loss(recon.float(), imgs)  # ours: the paper has a logit-Laplace likelihood of [0, 1] pixels
        # ours: the paper's KL is each position's, which also makes the choice of a code less sure; that of the batch's
        # mean only keeps the codebook in use. Digits, 5 epochs: 19 of 512 codes without it, 430 with it, equal error.
        use = logits.softmax(dim=1).mean(dim=(0, 2, 3))  # (V,)
        kl = math.log(self.num_tokens) - torch.special.entr(use).sum()
        return Reconstruction(error + kl_weight * kl, error, kl, logits.argmax(dim=1))


# ---- tokenizers of pre-training

UNSUPPORTED = {
    "clip": "is CAE v2, which is not implemented",
    "vqgan_gumbel_f8_8192": "does not run in the authors' code either",
    "to_tensor": "does not run in the authors' code either",
}


def _from_checkpoint(path: str, image_size: int, num_layers: int) -> DiscreteVAE:
    """Sizes as in the file's flags; a file without them is upstream's, where all but the layers are fixed."""
    state = distributed.load(path)
    args = state.get("args")
    args = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    names = ("num_tokens", "codebook_dim", "num_layers", "hidden_dim", "in_chans", "mean", "std")
    sizes: dict[str, Any] = {"num_layers": num_layers} | {name: args[name] for name in names if args.get(name)}
    weights = distributed.weights_of(state, path, ("model",))
    with distributed.user_errors(f"{path}: is no discrete VAE of {sizes} for {image_size}-pixel images"):
        with torch.device("meta"):
            model = DiscreteVAE(image_size, **sizes)
        model.load_state_dict(weights, assign=True)
    return model.float().eval().requires_grad_(False)


def load_tokenizer(
    kind: str,
    path: str | None,
    image_size: int,
    num_layers: int = 3,
    with_decoder: bool = False,
    fp32: bool = False,
) -> DalleTokenizer | DiscreteVAE:
    """The frozen tokenizer of --discrete_vae_type and --discrete_vae_weight_path, in float32 on the CPU.

    Args:
        kind: "dall-e" or "customized".
        path: dall-e: folder with the official encoder.pkl, or with what `convert_dalle.py` made of it; customized: a
            checkpoint of `main_tokenizer.py` or of upstream.
        image_size: side of the images to tokenise, --second_input_size.
        num_layers: layers of a customized tokenizer whose file does not say it.
        with_decoder: load dall-e's decoder, too, which makes pictures of tokens. fp32: dall-e in float32 on a GPU, too.
    Raises:
        distributed.UserError: the kind is not supported; a file is missing, damaged or holds something else.
    """
    if kind not in ("dall-e", "customized"):
        why = UNSUPPORTED.get(kind, "is unknown")
        raise UserError(f"--discrete_vae_type {kind}: {why}; expected dall-e or customized")
    if not path:
        what = {
            "dall-e": f"the folder with {URL.format(part='encoder')} (and, for pictures, {URL.format(part='decoder')})",
            "customized": "a checkpoint of main_tokenizer.py",
        }
        raise UserError(f"--discrete_vae_type {kind}: name {what[kind]} with --discrete_vae_weight_path")
    if kind == "dall-e" and image_size % 8:
        raise UserError(f"--second_input_size {image_size}: expected a multiple of 8, a DALL-E code's pixels")
    try:
        if kind == "customized":
            return _from_checkpoint(path, image_size, num_layers)
        return load_dalle(path, with_decoder, fp32)
    except UserError as error:
        raise UserError(f"--discrete_vae_weight_path {error}") from error
