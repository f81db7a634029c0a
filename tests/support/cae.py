"""Helpers of CAE's tests: small networks and batches, a tokenizer that knows the answers, the file of a small one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae.models_cae import ContextAutoencoderViT
from cae.models_dvae import DiscreteVAE
from cae.models_vit import VisionTransformer

CODES = 12  # of the small tokenizer

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2}
DECODER: dict[str, Any] = {"decoder_embed_dim": 8, "decoder_num_heads": 2, "decoder_num_classes": 5}
DECODER |= {"regressor_depth": 1, "decoder_depth": 1}


def autoencoder(**kwargs) -> ContextAutoencoderViT:
    torch.manual_seed(0)
    return ContextAutoencoderViT(**{**SIZES, **DECODER, **kwargs}).train()


def batches(steps: int = 4) -> tuple[list, Tensor, Tensor]:
    """Batches of the loader, their class labels, and the tokens of their patches."""
    torch.manual_seed(1)
    imgs = torch.rand(steps, 3, 3, 8, 8)
    masks = torch.stack([torch.stack([torch.randperm(16) < 6 for _ in range(3)]) for _ in range(steps)])
    return list(zip(imgs, imgs, masks, strict=True)), imgs, torch.randint(5, (steps, 3, 16))


def classifier(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZES, "num_classes": 3, **kwargs})


class Tokens:
    """A tokenizer that knows the answers, batch by batch."""

    def __init__(self, ids):
        self.ids = iter(ids)

    def get_codebook_indices(self, images: Tensor) -> Tensor:
        return next(self.ids)


def tokenizer_file(folder: Path) -> str:
    """A discrete VAE for 16 x 16 pixels whose tokens are 4 x 4 of 12, as `main_tokenizer.py` writes it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_tokens": CODES, "codebook_dim": 4, "num_layers": 2, "hidden_dim": 8}
    path = folder / "tokenizer.pth"
    torch.save({"model": DiscreteVAE(16, **sizes).state_dict(), "args": sizes}, path)
    return str(path)
