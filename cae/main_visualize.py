"""What a pre-trained CAE sees and predicts: image | masked | tokenizer's own picture | picture of the predicted tokens.

The visible patches keep their true visual tokens; the masked ones get the most likely tokens that the model predicts.

Legend: B images, N = G² patches, p patch side.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from cae import figures, main_pretrain
from cae.models_cae import ContextAutoencoderViT
from common import distributed

GREY = 0.5


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("CAE predictions")
    g = distributed.flag_groups(p)
    g.model.add_argument("--checkpoint", required=True, help="checkpoint of main_pretrain.py")
    # ---- flags of main_pretrain.py
    stored = "; default: as stored in the checkpoint"
    g.model.add_argument("--model", help=f"name of the network{stored}")
    g.model.add_argument("--input_size", type=int, help=f"side of the encoder's images in pixels{stored}")
    g.model.add_argument("--patch_size", type=int, help=f"side of a patch in pixels{stored}")
    g.model.add_argument("--discrete_vae_type", help=f"tokenizer: dall-e or customized{stored}")
    g.model.add_argument("--discrete_vae_weight_path", help=f"the tokenizer's weights, with its decoder{stored}")
    g.model.add_argument("--second_input_size", type=int, help=f"side of the tokenizer's images in pixels{stored}")
    g.model.add_argument("--mask_generator", help=f"kind of masks: block or random{stored}")
    g.model.add_argument("--num_mask_patches", type=int, help=f"masked patches of an image, in block masks{stored}")
    g.model.add_argument("--ratio_mask_patches", type=float, help=f"share of masked patches, in random masks{stored}")
    # ---- images, files, process
    figures.add_flags(p)
    p.set_defaults(num_images=6)
    g.process.add_argument("--seed", default=0, type=int, help="seed of the masks and of the choice of images")
    return p


def pretrain_flags(state: dict[str, Any], given: argparse.Namespace) -> argparse.Namespace:
    """The flags of a checkpoint's run: main_pretrain.py's defaults, under those stored, under those given."""
    flags = main_pretrain.get_args_parser().parse_args([])
    for source in (distributed.flags_of(state), vars(given)):
        flags.__dict__.update({k: v for k, v in source.items() if v is not None})
    if isinstance(flags.patch_size, (tuple, list)):  # as the authors' files have it
        flags.patch_size = flags.patch_size[0]
    return flags


def load_model(path: str, args: argparse.Namespace) -> tuple[ContextAutoencoderViT, argparse.Namespace]:
    """The network of a checkpoint with its weights, and the flags of its run.

    Raises:
        UserError: the file cannot be read, or is no pre-training checkpoint of this architecture.
    """
    state = distributed.load(path)
    flags = pretrain_flags(state, args)
    model = main_pretrain.build_model(flags)
    with distributed.user_errors(f"{path}: does not fit {flags.model}; check the flags of main_pretrain.py"):
        model.load_state_dict(distributed.weights_of(state, path))
    return model.eval(), flags


@torch.inference_mode()
def predict(model: ContextAutoencoderViT, imgs: Tensor, masks: Tensor, ids: Tensor) -> tuple[Tensor, float]:
    """Fill the masked patches with the most likely tokens.

    Args:
        imgs: (B, 3, H, W), normalised. masks: (B, N) bool, True = masked. ids: (B, ...), the N true tokens.
    Returns:
        tokens, shaped like ids, and the share of the masked ones that is right.
    """
    logits, _, _ = model(imgs, masks)
    filled = ids.flatten(1).clone()
    filled[masks] = logits.argmax(dim=1)  # both walk the masked patches image by image, in order
    right = (filled == ids.flatten(1))[masks].float().mean().item()
    return filled.view_as(ids), right


def to_pixels(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8."""
    return (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def draw(columns: dict[str, np.ndarray], note: str = "") -> Figure:
    """One row per image, one column per title, the note below."""
    rows = len(next(iter(columns.values())))
    fig = Figure(figsize=(1.6 * len(columns), 1.6 * rows + 0.3), layout="constrained", dpi=160)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore[union-attr]
    axes = fig.subplots(rows, len(columns), squeeze=False)
    for column, (title, panels) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for ax, panel in zip(column, panels, strict=True):
            ax.imshow(panel)
            ax.axis("off")
    if note:
        fig.supxlabel(note, fontsize=7)
    return fig


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    random.seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002 - the mask generators draw from the global ones
    # ---- model
    model, flags = load_model(args.checkpoint, args)
    model.to(device)
    tokenizer = main_pretrain.build_tokenizer(flags, with_decoder=True).to(device)
    # ---- data
    chans, statistics = flags.in_chans, main_pretrain.mean_and_std(flags)
    paths = figures.chosen_images(args, chans)
    pixels = figures.read_images(paths, flags.input_size, chans, mean=(0.0,), std=(1.0,))
    normalize = transforms.Normalize(*statistics)
    imgs = normalize(pixels).to(device)
    size = [flags.second_input_size] * 2
    small = TF.resize(pixels, size, TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    ids = tokenizer.get_codebook_indices(main_pretrain.tokenizer_view(tokenizer)(small).to(device))
    masking = main_pretrain.build_masking(flags)
    masks = torch.from_numpy(np.stack([masking() for _ in paths])).flatten(1).bool()
    # ---- picture
    filled, right = predict(model, imgs, masks.to(device), ids)
    grid, p = model.encoder.patch_embed.grid_size, model.encoder.patch_embed.patch_size
    hidden = masks.view(-1, 1, grid, grid).repeat_interleave(p, 2).repeat_interleave(p, 3)
    grey = torch.tensor(statistics[0])[:, None, None] if chans else torch.tensor(GREY)
    pictures = {
        "image": pixels,
        "masked": torch.where(hidden, grey, pixels),
        "tokenizer": tokenizer.pictures(ids).cpu(),
        "predicted tokens": tokenizer.pictures(filled).cpu(),
    }
    columns = {name: figures.to_pixels(normalize(x), chans) if chans else to_pixels(x) for name, x in pictures.items()}
    with figures.writing(args.output_dir) as folder:
        draw(columns, figures.shown(chans)).savefig(folder / "reconstruction.png")
    distributed.log(f"{right:.1%} of the masked tokens are right; wrote {folder / 'reconstruction.png'}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
