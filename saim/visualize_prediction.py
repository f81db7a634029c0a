"""What a pre-trained SAIM network predicts: image | order | prediction after 25, 50, 75, 100 % of the patches | target.

Every patch is predicted from its true predecessors in the order, never from earlier predictions, in one pass. A network
trained with --norm_pix_loss predicts patches of mean 0 and deviation 1: they are drawn with the mean and deviation of
the target patch.

Legend: N images, C channels, p patch side, G x G = L patches, P = C p² pixels per patch.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from common import datasets, distributed
from saim import figures, main_pretrain
from saim.models_saim import MODELS, SaimViT

SHARES = (0.25, 0.5, 0.75, 1.0)
GREY = 128


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("SAIM predictions")
    g = distributed.flag_groups(p)
    g.model.add_argument(
        "--checkpoint", default="./pretrain/saim_base/checkpoint.pth", help="checkpoint of main_pretrain.py"
    )
    g.model.description = "What is not given is read from the checkpoint."
    g.model.add_argument("--model", choices=MODELS, help="size of the network")
    g.model.add_argument("--input_size", type=int, help="side of the images in pixels")
    g.model.add_argument("--patch_size", type=int, help="side of a patch in pixels")
    g.model.add_argument("--query_depth", type=int, help="number of decoder blocks")
    g.model.add_argument(
        "--share_weight", action="store_true", default=None, help="the decoder uses the encoder's blocks"
    )
    g.model.add_argument("--prediction_head_type", help="layer that predicts the pixels: MLP or LINEAR")
    g.model.add_argument("--gaussian_kernel_size", type=int, help="side of the Gaussian that blurs the target, odd")
    g.model.add_argument("--gaussian_sigma", type=float, help="width of the Gaussian that blurs the target")
    g.model.add_argument(
        "--norm_pix_loss", action="store_true", default=None, help="patches are predicted with mean 0 and variance 1"
    )
    g.model.add_argument("--order", choices=["random", "raster"], help="order in which the patches are predicted")
    figures.add_flags(p)
    p.set_defaults(num_images=6)
    g.data.add_argument("--seed", default=0, type=int, help="seed of the orders and of the choice of images")
    return p


def model_flags(state: dict[str, Any], given: argparse.Namespace) -> argparse.Namespace:
    """The flags of a checkpoint's run: main_pretrain.py's defaults, under those stored, under those given."""
    flags = main_pretrain.get_args_parser().parse_args([])
    for source in (distributed.flags_of(state), vars(given)):
        flags.__dict__.update({k: v for k, v in source.items() if v is not None})
    return flags


def load_model(args: argparse.Namespace) -> tuple[SaimViT, argparse.Namespace]:
    """The network of --checkpoint with its weights, and its flags.

    Raises:
        UserError: the file cannot be read, or is no pre-training checkpoint of this architecture.
    """
    state = distributed.load(args.checkpoint)
    weights = distributed.weights_of(state, args.checkpoint)
    flags = model_flags(state, args)
    if flags.model not in MODELS:
        raise distributed.UserError(f"{args.checkpoint}: holds {flags.model}, expected a pre-training checkpoint")
    model = main_pretrain.build_model(flags)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split()).split(": ", 1)[-1][:150]  # without "Error(s) in loading ..."
        hint = "; check --model, --patch_size, --input_size and the other flags of main_pretrain.py"
        raise distributed.UserError(f"{args.checkpoint}: does not fit {flags.model} ({reason}){hint}") from error
    return model.eval(), flags


def draw_noise(model: SaimViT, number: int, seed: int) -> Tensor:
    """Noise (number, L) whose increasing order is the order of prediction, alike on every device."""
    length = model.patch_embed.num_patches
    if model.token_order == "raster":
        return (torch.arange(length) / length).expand(number, -1)
    return torch.rand(number, length, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def predict(model: SaimViT, imgs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Predict every patch from its true predecessors.

    Args:
        imgs: (N, 3, H, W), normalised. noise: (N, L), the patch with the smallest noise comes first.
    Returns:
        prediction and target, (N, 3, H, W), normalised like imgs; the target is blurred if the model's is.
    """
    target = model.patchify(imgs if model.gaussian_blur is None else model.gaussian_blur(imgs))  # (N, L, P)
    pred = model.forward_saim(imgs, noise)
    if model.norm_pix_loss:
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean  # undoes make_target
    return model.unpatchify(pred), model.unpatchify(target)


def draw(image: np.ndarray, pred: np.ndarray, target: np.ndarray, rank: np.ndarray, blurred: bool, note: str) -> Figure:
    """One row per image.

    Args:
        image, pred, target: (N, H, W, 3) uint8. rank: (N, G, G), each patch's place in the order, from 0.
        note: printed below.
    """
    length, p = rank[0].size, image.shape[1] // rank.shape[1]
    place = rank.repeat(p, axis=1).repeat(p, axis=2)[..., None]  # (N, H, W, 1)
    so_far = [np.where(place < round(share * length), pred, GREY) for share in SHARES]
    panels = [image, rank + 1, *so_far, target]
    titles = ["image", "order", *(f"{share:.0%} predicted" for share in SHARES)]
    titles.append("blurred target" if blurred else "target")
    fig = Figure(figsize=(1.4 * len(panels), 1.4 * len(image) + 0.8), layout="constrained", dpi=160)
    axes = fig.subplots(len(image) + 1, len(panels), height_ratios=[1.0] * len(image) + [0.06])
    for ax in axes.flat:
        ax.axis("off")
    for column, title, panel in zip(axes.T, titles, panels, strict=True):
        column[0].set_title(title, fontsize=9)
        for ax, own in zip(column, panel, strict=False):
            ax.imshow(own)
    bar = axes[-1, 1]  # the last row holds the colour bar of the order only
    bar.axis("on")
    fig.colorbar(axes[0, 1].images[0], cax=bar, orientation="horizontal", ticks=[1, length])
    bar.tick_params(labelsize=8)
    fig.supxlabel(note, fontsize=8)
    return fig


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    # ---- model
    model, flags = load_model(args)
    distributed.log(f"{flags.model} from {args.checkpoint}, {model.token_order} order")
    model.to(device)
    # ---- data
    channels = datasets.stored_channels(vars(flags))
    paths = figures.chosen_images(args, flags.in_chans)
    imgs = figures.read_images(paths, flags.input_size, *channels).to(device)
    # ---- picture
    noise = draw_noise(model, len(imgs), args.seed).to(device)
    grid = model.patch_embed.grid_size
    rank = model.generate_order(imgs, noise).argsort(dim=1).unflatten(1, (grid, grid))  # type: ignore[union-attr]
    image, pred, target = (figures.to_pixels(x, *channels) for x in (imgs, *predict(model, imgs, noise)))
    note = "Each patch is predicted from its true predecessors in the order"
    note += ", and drawn with the mean and deviation of the target patch." if model.norm_pix_loss else "."
    note += f" {figures.shown(flags.in_chans)}." if flags.in_chans else ""
    with figures.writing(args.output_dir) as folder:
        fig = draw(image, pred, target, rank.cpu().numpy(), model.gaussian_blur is not None, note)
        fig.savefig(folder / "predictions.png")
    distributed.log(f"wrote {folder / 'predictions.png'}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
