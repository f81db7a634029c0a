"""Autoregression orders and the maps behind them, as in the README's figure "Visualization" (upstream has no code).

One row per image: (a) the input, then three panels for each order (b) to (e), drawn by the encoder that was pre-trained
with this order: the class token's attention in the last block, the similarity map, and the order, first patches in
warm colours. Maps come from the pass without masks, as in pre-training. Maps of one encoder that several orders share
are drawn once.

Legend: N images, G x G = L patches, p patch side, D width.
"""

import argparse
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from common import datasets, distributed
from common.distributed import UserError
from semaim.models_semaim import ATTENTIONS, MODELS, AimViT
from semaim.models_vit import load_pretrained


class Group(NamedTuple):
    label: str
    rules: tuple[str, ...]  # permutation types that encoders of this group were trained with, the usual one first


GROUPS = {  # by flag
    "raster": Group("(b) raster order", ("zigzag", "raster")),  # row by row, and the snake that upstream calls raster
    "stochastic": Group("(c) stochastic order", ("stochastic",)),
    "similarity": Group("(d) similarity order", ("attention",)),
    "semantic": Group("(e) semantic-aware order", ("attention_center",)),
}
FORMATS = (".png", ".jpg", ".pdf", ".svg")
PANELS = ("self-attention", "similarity", "order")  # of each group, from left to right


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("SemAIM orders")
    g = distributed.flag_groups(p)
    for name, (_, rules) in GROUPS.items():
        text = f"checkpoint pre-trained with --permutation_type {rules[0]}; without one this order is left out"
        g.model.add_argument(f"--{name}", default="", help=text)
    g.model.add_argument("--checkpoint", default="", help="encoder of every order that has no checkpoint of its own")
    g.model.add_argument(
        "--random", action="store_true", help="one encoder of random weights for every order without a checkpoint"
    )
    g.model.add_argument(
        "--checkpoint_key", default="state_dict", help="where checkpoints keep the weights; also: ema_state_dict"
    )
    stored = "by default as stored in the checkpoint, else"
    g.model.add_argument("--model", help=f"network, one of {', '.join(MODELS)}; {stored} aim_base")
    g.model.add_argument("--input_size", type=int, help=f"side of an image in pixels; {stored} 224")
    g.model.add_argument("--patch_size", type=int, help=f"side of a patch in pixels; {stored} that of --model")
    g.model.add_argument(
        "--attention_type",
        default="cls",
        help="map that the orders (d) and (e) follow: similarity (cls or gap) or self",
    )
    g.data.add_argument("--images", nargs="+", default=[], help="image files, and folders with images or class folders")
    g.data.add_argument(
        "--num_images", default=5, type=int, help="largest number of images of each folder, spread over its classes"
    )
    g.output.add_argument(
        "--output", default="orders.png", help="file of the figure; <stem>_panels/ beside it gets the panels and maps"
    )
    g.process.add_argument("--device", default="auto", help="auto (CUDA if present, else cpu), cpu, cuda or cuda:N")
    g.process.add_argument(
        "--seed", default=0, type=int, help="seed of the noise of the orders, random weights and the choice of images"
    )
    return p


# ---- images


# same as saim/figures.py
def spread(samples: list[tuple[str, int]], number: int, seed: int) -> list[str]:
    """Draw `number` paths of (path, class) samples, from every class in turn; sorted."""
    seen: Counter[int] = Counter()
    turns = []
    for path, target in random.Random(seed).sample(samples, len(samples)):
        turns.append((seen[target], path))
        seen[target] += 1
    turns.sort(key=lambda turn: turn[0])  # stable: classes in random order
    return sorted(path for _, path in turns[:number])


def chosen_images(given: list[str], number: int, seed: int, in_chans: int | None = None) -> list[str]:
    """The given files, and up to `number` images of each given folder, or of its val/.

    Args:
        in_chans: as in `read_images`; in folders also .npy and .dcm files are then images.
    Raises:
        UserError: there are none.
    """
    if not given or not all(given):
        raise UserError("--images: expected image files or folders")
    if number < 1:
        raise UserError(f"--num_images {number}: expected at least 1")
    files, endings = [], datasets.endings(in_chans)
    for path in given:
        if Path(path).is_file():
            files.append(path)
            continue
        folder = Path(path, "val") if Path(path, "val").is_dir() else Path(path)
        try:
            classes = [folder, *sorted(entry for entry in folder.iterdir() if entry.is_dir())]
            found = [[str(f) for f in sorted(c.iterdir()) if f.suffix.lower() in endings] for c in classes]
        except OSError as error:
            raise UserError(f"--images {path}: cannot be read ({error.strerror})") from error
        samples = [(f, i) for i, own in enumerate(found[:1] if found[0] else found) for f in own]
        if not samples:
            raise UserError(f"--images {path}: expected images in {folder}, or in class folders of it")
        files += spread(samples, number, seed)
    return files


# same as saim/figures.py
def read_images(
    paths: list[str],
    input_size: int,
    in_chans: int | None = None,
    mean=datasets.IMAGENET_MEAN,
    std=datasets.IMAGENET_STD,
) -> Tensor:
    """Images through the validation transform, (N, C, input_size, input_size); C is 3, or in_chans.

    Raises:
        UserError: a file is no image.
    """
    transform = datasets.eval_transform(input_size, None, mean, std, in_chans)
    images = []
    for path in paths:
        try:
            images.append(transform(datasets.read_image(path, in_chans)))
        except Exception as error:  # Pillow raises many types for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path}: unreadable image ({reason})") from error
    return torch.stack(images)


# same as saim/figures.py
def to_pixels(
    imgs: Tensor, in_chans: int | None = None, mean=datasets.IMAGENET_MEAN, std=datasets.IMAGENET_STD
) -> np.ndarray:
    """Undo the normalisation: (N, C, H, W) -> (N, H, W, 3) uint8; with in_chans as `shown` says."""
    if in_chans:
        imgs, mean, std = imgs[:, : 3 if in_chans > 2 else 1], (0.5,), (0.2,)
    mean, std = (imgs.new_tensor(x)[:, None, None] for x in (mean, std))
    pixels = (imgs * std + mean).clamp(0, 1) * 255
    return pixels.round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


# same as saim/figures.py
def shown(in_chans: int | None) -> str:
    """What `to_pixels` shows of images of --in_chans, to be printed below them; '' for photographs."""
    if not in_chans:
        return ""
    channels = "Channels 1, 2, 3 of {} as red, green, blue" if in_chans > 2 else "Channel 1 of {} as grey"
    return f"{channels.format(in_chans)}, from 2.5 deviations below the mean to 2.5 above it"


# ---- maps


def build_encoder(args: argparse.Namespace, path: str) -> tuple[AimViT, str, tuple]:
    """The encoder of a checkpoint, or a random one for "", the permutation type it was trained with, if known, and its
    images' channels as `read_images` takes them.

    Raises:
        UserError: the file cannot be read, or is no checkpoint of the model.
    """
    state: dict[str, Any] = distributed.load(path) if path else {}
    weights = distributed.weights_of(state, path, (args.checkpoint_key,)) if path else {}
    flags = {"model": state.get("model"), "input_size": None, "patch_size": None, "permutation_type": ""}
    flags |= distributed.flags_of(state)
    flags |= {name: value for name, value in vars(args).items() if value is not None}
    name = flags["model"] if isinstance(flags["model"], str) else "aim_base"
    if name not in MODELS:
        what = f"--model {name}" if args.model else f"{path}: is of the model {name}; --model"
        raise UserError(f"{what}: expected one of {', '.join(MODELS)}")
    sizes = {} if flags["patch_size"] is None else {"patch_size": flags["patch_size"]}
    channels = datasets.stored_channels(flags)
    sizes |= {"img_size": flags["input_size"] or 224, "in_chans": channels[0] or 3}
    torch.manual_seed(args.seed)
    with distributed.user_errors(f"--model {name}"):
        model = MODELS[name](**sizes, query_depth=1, attention_type=args.attention_type).eval()
    del model.query_blocks, model.prediction_head  # what is left has a plain ViT's keys
    if path:
        with distributed.user_errors(f"{path}: check --model, --patch_size and --input_size"):
            _, unexpected = load_pretrained(model, weights)  # type: ignore[arg-type]
        distributed.log(f"{name} from {path}: {distributed.load_report(len(model.state_dict()), [], unexpected)}")
    return model, flags["permutation_type"], channels


@torch.inference_mode()
def encoder_maps(model: AimViT, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """The class token's attention in the last block, and each patch's similarity to the image.

    Args:
        imgs: (N, 3, H, W), normalised.
    Returns:
        (N, L) each, on the CPU.
    """
    passes = [model(batch, forward_encoder=True) for batch in imgs.split(16)]
    _, similarity, attention = (torch.cat(maps).cpu() for maps in zip(*passes, strict=True))
    return attention, similarity


def make_order(model: AimViT, rule: str, attention: Tensor, similarity: Tensor, seed: int) -> Tensor:
    """Rank of every patch in the order `rule`, the smaller the earlier: maps (N, L) each -> (N, L).

    The noise depends on the seed alone, so that all groups share it.
    """
    noise = torch.rand(attention.shape, generator=torch.Generator().manual_seed(seed))
    model.permutation_type = rule
    return model.permutation(attention, attention if model.attention_type == "self" else similarity, noise)


# ---- panels


def stretch(maps: Tensor) -> Tensor:
    """Shift and scale each map (N, L) to the range 0 to 1, up to the 1e-5 that keep a constant map finite."""
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    return (maps - low) / (high - low + 1e-5)


def heat(panel: str, values: Tensor) -> Tensor:
    """What is drawn of a map or an order (N, L), 0 to 1: of an order, the first patch is the warmest."""
    return 1 - stretch(values.float()) if panel == "order" else stretch(values)


def jet(levels: np.ndarray) -> np.ndarray:
    """OpenCV's JET, from blue to red: levels (...) uint8 -> (..., 3) uint8."""
    distance = np.abs(levels[..., None] * (4 / 255) - [3, 2, 1])
    return np.rint(255 * np.clip(1.5 - distance, 0, 1)).astype(np.uint8)


def overlay(values: Tensor, image: np.ndarray, weight: float = 0.3) -> np.ndarray:
    """Lay maps over images, one block of pixels per patch.

    Args:
        values: (N, L), 0 to 1. image: (N, H, W, 3) uint8.
        weight: of the colours; the default is that of upstream's colour-map function.
    Returns:
        (N, H, W, 3) uint8
    """
    grid = round(values.shape[1] ** 0.5)
    p = image.shape[1] // grid
    colours = jet(np.rint(255 * values.numpy()).astype(np.uint8)).reshape(-1, grid, grid, 3)
    colours = colours.repeat(p, axis=1).repeat(p, axis=2)
    return np.rint(np.clip(weight * colours + (1 - weight) * image, 0, 255)).astype(np.uint8)


def draw(blocks: dict[str, dict[str, np.ndarray]], note: str = "") -> Figure:
    """One row per image, dashed lines between blocks of columns, the note above.

    The letters of the authors' figure are there if there is more than one order; a single one's colours are explained.

    Args:
        blocks: images (N, H, W, 3) uint8, by title of the column, by group; the first is the input.
    """
    side, gap, split, head, foot = 0.9, 0.03, 0.16, 0.2, 0.36  # inches; split: between blocks
    rows = len(blocks["input"][""])
    width = sum(len(block) * (side + gap) - gap + split for block in blocks.values())
    height = head + rows * (side + gap) - gap + foot
    fig = Figure(figsize=(width, height), dpi=160)
    x = split / 2
    for group, block in blocks.items():
        if group != "input":
            fig.add_artist(Line2D([x / width - split / 2 / width] * 2, [0, 1], color="grey", ls="--", lw=1))
        label = GROUPS[group].label if group in GROUPS else {"input": "(a) input"}.get(group, group)
        if len(blocks) == 2:
            label = label.partition(") ")[2] + ("" if group == "input" else "\nred: high, first")
        middle = x + (len(block) * (side + gap) - gap) / 2
        label, size = (label, 10) if len(block) > 1 else (label.replace("-", "-\n").replace(" order", "\norder"), 7)
        fig.text(middle / width, foot / 2 / height, label, ha="center", va="center", fontsize=size)
        for title, panels in block.items():
            fig.text((x + side / 2) / width, 1 - head / 2 / height, title, ha="center", va="center", fontsize=8)
            for row, panel in enumerate(panels):
                bottom = height - head - row * (side + gap) - side
                ax = fig.add_axes((x / width, bottom / height, side / width, side / height))
                ax.imshow(panel)
                ax.axis("off")
            x += side + gap
        x += split - gap
    if note:
        fig.suptitle(note, fontsize=6, y=1.0, va="bottom")
    return fig


def without_repeats(
    blocks: dict[str, dict[str, np.ndarray]], paths: dict[str, str]
) -> dict[str, dict[str, np.ndarray]]:
    """The blocks with the maps of an encoder that several orders share in a block of their own, before these orders.

    Args:
        paths: of the encoder's checkpoint, by group.
    """
    shown, uses = {"input": blocks["input"]}, Counter(paths.values())
    for group, path in paths.items():
        if uses[path] == 1:
            shown[group] = blocks[group]
            continue
        maps = {panel: blocks[group][panel] for panel in PANELS[:2]}
        shown.setdefault(f"maps of {Path(path).stem or 'random weights'}", maps)
        shown[group] = {"order": blocks[group]["order"]}
    return shown


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for what does not depend on files."""
    if args.attention_type not in ATTENTIONS:
        raise UserError(f"--attention_type {args.attention_type}: expected one of {', '.join(ATTENTIONS)}")
    if args.random and args.checkpoint:
        raise UserError(f"--random: expected no --checkpoint {args.checkpoint} beside it")
    if not (args.random or args.checkpoint or any(getattr(args, name) for name in GROUPS)):
        flags = ", ".join(f"--{name}" for name in GROUPS)
        raise UserError(f"no order to draw: expected a checkpoint by {flags} or --checkpoint, or --random")
    if Path(args.output).suffix.lower() not in FORMATS:
        raise UserError(f"--output {args.output}: expected a file name that ends in {', '.join(FORMATS)}")


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    check_flags(args)
    path = next(filter(None, [args.checkpoint, *(getattr(args, name) for name in GROUPS)]), "")
    in_chans = datasets.stored_channels(distributed.flags_of(distributed.load(path)))[0] if path else None
    files = chosen_images(args.images, args.num_images, args.seed, in_chans)
    # ---- maps and panels
    encoders: dict[str, tuple[AimViT, str, np.ndarray, Tensor, Tensor]] = {}  # by checkpoint, "": random
    blocks: dict[str, dict[str, np.ndarray]] = {}
    paths: dict[str, str] = {}  # of the encoders, by group
    raw, note = {"images": np.array(files)}, ""
    for group, (_, rules) in GROUPS.items():
        path = getattr(args, group) or args.checkpoint
        if not (path or args.random):
            continue
        if path not in encoders:
            model, trained, channels = build_encoder(args, path)
            imgs = read_images(files, model.patch_embed.img_size, *channels)
            pixels = to_pixels(imgs, *channels)
            encoders[path] = model, trained, pixels, *encoder_maps(model.to(device), imgs.to(device))
            note = shown(channels[0])
        model, trained, pixels, attention, similarity = encoders[path]
        if not (attention.isfinite().all() and similarity.isfinite().all()):
            raise UserError(f"{path or '--random'}: the encoder's maps are not finite")
        if getattr(args, group) and trained and trained not in rules:
            distributed.log(f"WARNING: --{group} {path}: trained in {trained} order, expected {' or '.join(rules)}")
        order = make_order(model, trained if trained in rules else rules[0], attention, similarity, args.seed)
        maps = dict(zip(PANELS, (attention, similarity, order), strict=True))
        grid = model.patch_embed.grid_size
        raw |= {f"{group}/{panel}": values.unflatten(1, (grid, grid)).numpy() for panel, values in maps.items()}
        paths[group] = path
        blocks.setdefault("input", {"": pixels})
        blocks[group] = {panel: overlay(heat(panel, values), pixels) for panel, values in maps.items()}
    # ---- files
    folder = Path(args.output).with_name(f"{Path(args.output).stem}_panels")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draw(without_repeats(blocks, paths), note).savefig(args.output, bbox_inches="tight" if note else None)
        np.savez(folder / "maps.npz", **raw)  # type: ignore[arg-type]
        for group, block in blocks.items():
            for panel, images in block.items():
                for i, (file, image) in enumerate(zip(files, images, strict=True)):
                    name = "_".join(filter(None, (f"{i:02d}", Path(file).stem, group, panel)))
                    Image.fromarray(image).save(folder / f"{name}.png")
    except (OSError, ValueError) as error:  # ValueError: more pixels than the format takes
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"--output {args.output}: cannot be written ({reason})") from error
    distributed.log(f"wrote {args.output}: {len(files)} images; single panels and raw maps are in {folder}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
