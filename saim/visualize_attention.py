"""Attention maps of SAIM encoders: image | map of --compare | map of --checkpoint, as in the README's figure.

A map is one query's row of a block's attention matrix over the patches, without masks, stretched to its own range.
During pre-training the class token attends to itself only, so its row then shows what training left unconstrained.

Legend: N images, H heads, G x G patches, T = 1 + G² tokens, p patch side.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from common import datasets, distributed
from saim import figures
from saim.models_vit import MODELS, VisionTransformer, load_encoder


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("SAIM attention maps")
    g = distributed.flag_groups(p)
    told = "default: the checkpoint's, where it says it"
    g.model.add_argument("--model", choices=MODELS, help=f"size of the network; {told}, else vit_base_patch16")
    g.model.add_argument(
        "--checkpoint", default="./pretrain/saim_base/checkpoint.pth", help="checkpoint of any program of this folder"
    )
    g.model.add_argument(
        "--compare", default="", help="a second checkpoint, whose map is drawn left of the first one's"
    )
    g.output.add_argument(
        "--names", nargs="+", default=[], help="titles of the maps from left to right; default: the files' names"
    )
    g.model.add_argument("--input_size", type=int, help=f"side of the images in pixels; {told}, else 224")
    g.model.add_argument("--patch_size", type=int, help=f"side of a patch; {told}, else that in the model's name")
    g.output.add_argument(
        "--layer", default=-1, type=int, help="block whose attention is drawn, from 0, or from the end: -1 is the last"
    )
    g.output.add_argument(
        "--query", default="cls", help="whose attention: cls, mean (over all patches), or a patch's index from 0"
    )
    g.output.add_argument("--heads", default="mean", help="which heads: mean (over all), or a head's index from 0")
    g.output.add_argument(
        "--save_npy", action="store_true", help="also save the maps before they are stretched, an array per image"
    )
    g.output.add_argument("--columns", default=3, type=int, help="images side by side in the overview")
    figures.add_flags(p)
    g.data.add_argument("--seed", default=0, type=int, help="seed of the choice of images")
    p.set_defaults(in_chans=None, mean=None, std=None)  # the checkpoint's (`fill_sizes`)
    return p


def _index(name: str, value: str | int, size: int, words: str) -> int:
    try:
        return range(size)[int(value)]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{name} {value}: expected {words} or an index from 0 to {size - 1}") from error


def attention_map(attention: Tensor, query: str | int = "cls", heads: str | int = "mean") -> Tensor:
    """The attention that a query pays to every patch.

    Args:
        attention: (N, H, T, T), softmax over the last axis, class token first.
        query: "cls", "mean" (over the patches as queries), or a patch's index.
        heads: "mean", or a head's index.
    Returns:
        (N, G, G), row by row; what the class token receives is left out.
    Raises:
        ValueError: there is no such query or head.
    """
    if heads == "mean":
        attention = attention.mean(dim=1)
    else:
        attention = attention[:, _index("heads", heads, attention.shape[1], "mean")]
    if query == "cls":
        row = attention[:, 0, 1:]
    elif query == "mean":
        row = attention[:, 1:, 1:].mean(dim=1)
    else:
        row = attention[:, 1 + _index("query", query, attention.shape[1] - 1, "cls, mean"), 1:]
    return row.unflatten(1, (round(row.shape[1] ** 0.5), -1))


def stretch(maps: Tensor) -> Tensor:
    """Shift and scale each map (N, G, G) to the range 0 to 1; a constant map becomes 0."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def fill_sizes(args: argparse.Namespace) -> None:
    """Give the sizes that the flags leave open the values of --checkpoint's run, of whatever stage; channels, too."""
    stored = distributed.flags_of(distributed.load(args.checkpoint))
    size = str(stored.get("model", "base")).split("_patch")[0].rpartition("_")[2]  # saim_nano, vit_nano_patch16: nano
    own = next((name for name in MODELS if name.startswith(f"vit_{size}_")), "vit_base_patch16")
    args.model, args.input_size = args.model or own, args.input_size or stored.get("input_size", 224)
    args.patch_size = args.patch_size or stored.get("patch_size")
    args.in_chans, args.mean, args.std = datasets.stored_channels(stored)


def build_model(args: argparse.Namespace) -> VisionTransformer:
    """The encoder of the flags; raises UserError for values that do not fit together."""
    with distributed.user_errors(f"--model {args.model}"):
        return MODELS[args.model](
            img_size=args.input_size,
            in_chans=args.in_chans or 3,
            num_classes=0,
            global_pool=True,  # attention needs no final norm, and checkpoints of pooling models have none
            **({} if args.patch_size is None else {"patch_size": args.patch_size}),
        ).eval()


@torch.inference_mode()
def encoder_maps(model: VisionTransformer, imgs: Tensor, layer: int, query: str, heads: str) -> Tensor:
    """Maps (N, G, G) of images (N, 3, H, W), on the CPU; raises UserError if there is no such layer, query or head."""
    try:
        maps = [attention_map(model.attention(batch, layer), query, heads).cpu() for batch in imgs.split(16)]
    except IndexError as error:
        raise distributed.UserError(f"--layer {layer}: the model has {len(model.blocks)} blocks") from error
    except ValueError as error:
        raise distributed.UserError(f"--{error}") from error
    return torch.cat(maps)


def overview(rows: list[list[np.ndarray]], titles: list[str], columns: int, note: str = "") -> Figure:
    """All images with their maps; `columns` images side by side, the note below."""
    columns = min(columns, len(rows))
    lines, width = -(-len(rows) // columns), len(titles) + 0.15  # a narrow empty column between images
    ratios = ([1.0] * len(titles) + [0.15]) * columns
    fig = Figure(figsize=(1.4 * (width * columns - 0.15), 1.4 * lines + 0.3), layout="constrained", dpi=160)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore[union-attr]
    axes = fig.subplots(lines, len(ratios) - 1, squeeze=False, width_ratios=ratios[:-1])
    for ax in axes.flat:
        ax.axis("off")
    for i, panels in enumerate(rows):
        line, first = i // columns, i % columns * (len(titles) + 1)
        for ax, panel, title in zip(axes[line, first:], panels, titles, strict=False):
            ax.imshow(panel)
            if line == 0:
                ax.set_title(title, fontsize=9)
    if note:
        fig.supxlabel(note, fontsize=7)
    return fig


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    checkpoints = [path for path in (args.compare, args.checkpoint) if path]
    names = args.names or [f"{Path(path).parent.name}/{Path(path).stem}" for path in checkpoints]
    if len(names) != len(checkpoints):
        raise distributed.UserError(f"--names {' '.join(names)}: expected {len(checkpoints)}, one per checkpoint")
    if args.columns < 1:
        raise distributed.UserError(f"--columns {args.columns}: expected at least 1")
    fill_sizes(args)
    # ---- data
    channels = args.in_chans, args.mean, args.std
    paths = figures.chosen_images(args, args.in_chans)
    imgs = figures.read_images(paths, args.input_size, *channels)
    # ---- model
    model = build_model(args).to(device)
    maps = []
    for path in checkpoints:
        load_encoder(model, path)
        maps.append(encoder_maps(model, imgs.to(device), args.layer, args.query, args.heads))
    # ---- pictures
    p = model.patch_embed.patch_size
    colours = [colormaps["viridis"](stretch(m).numpy(), bytes=True)[..., :3] for m in maps]  # (N, G, G, 3) each
    rows = [
        [image, *(figures.enlarge(colour, p) for colour in own)]
        for image, *own in zip(figures.to_pixels(imgs, *channels), *colours, strict=True)
    ]
    with figures.writing(args.output_dir) as folder:
        for i, (path, panels) in enumerate(zip(paths, rows, strict=True)):
            name = f"{i:02d}_{Path(path).stem}"
            figures.save_row(folder / f"{name}.png", panels)
            if args.save_npy:
                np.save(folder / f"{name}.npy", torch.stack([m[i] for m in maps]).numpy())
        fig = overview(rows, ["image", *names], args.columns, figures.shown(args.in_chans))
        fig.savefig(folder / "attention.png")
    distributed.log(f"wrote {len(rows)} rows and the overview attention.png to {folder}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
