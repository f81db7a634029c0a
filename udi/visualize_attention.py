"""Attention of a class token in the last block, a picture per head, as in the README's Fig. 3.

Legend: h heads, c class tokens, G_h x G_w patches, p patch side.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor
from torchvision import transforms
from torchvision.utils import make_grid

from common import datasets, distributed
from udi.backbone import build_backbone, load_backbone
from udi.flags import ARCHS, add_checkpoint_flags
from udi.models_udi import VisionTransformer

TINT = (1.0, 0.15, 0.1)  # of the attended part


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI attention maps")
    g = distributed.flag_groups(p)
    g.model.add_argument("--arch", default="vit_small", choices=ARCHS, help="backbone")
    add_checkpoint_flags(p)
    g.output.add_argument(
        "--query", default=0, type=int, help="class token whose attention is drawn: 0, or 1 where there are two"
    )
    g.data.add_argument("--image_path", default=None, nargs="+", help="image files, must be given")
    g.data.add_argument(
        "--image_size", default=[480, 480], type=int, nargs="+", help="height and width that the image is resized to"
    )
    g.output.add_argument(
        "--output_dir",
        default=".",
        help="folder of overview.png, img.png, attn-head<j>.png and mask_th<threshold>_head<j>.png; "
        "of several images in a folder for each",
    )
    g.output.add_argument(
        "--threshold", default=None, type=float, help="share of the attention that masks show; default: no masks"
    )
    g.process.add_argument("--device", default="auto", help="auto (CUDA if present, else cpu), cpu, cuda or cuda:N")
    p.set_defaults(patch_size=8, pretrained_weights="")
    return p


def read_image(
    path: str | None,
    size: list[int],
    patch_size: int,
    in_chans: int | None = None,
    mean=datasets.IMAGENET_MEAN,
    std=datasets.IMAGENET_STD,
) -> Tensor:
    """An image (1, C, H, W), normalised, resized to `size` and cut to multiples of the patch side.

    Raises:
        distributed.UserError: there is none, or it is smaller than a patch.
    """
    if path is None:
        raise distributed.UserError("--image_path is missing: name an image file; nothing is downloaded")
    if len(size) not in (1, 2) or min(size) < patch_size:
        raise distributed.UserError(
            f"--image_size {' '.join(map(str, size))}: expected height and width of at least {patch_size}, one patch"
        )
    resize = transforms.Resize((size[0], size[-1]))
    try:
        steps = transforms.Compose([resize, *datasets.tensor_and_normalize(mean, std, in_chans)])
        image = steps(datasets.read_image(path, in_chans))
    except Exception as error:  # Pillow raises many types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise distributed.UserError(f"--image_path {path}: unreadable image ({reason})") from error
    height, width = (n - n % patch_size for n in image.shape[-2:])
    return image[None, :, :height, :width]


@torch.inference_mode()
def attention_maps(model: VisionTransformer, image: Tensor, query: int = 0) -> Tensor:
    """Attention (h, G_h, G_w) of class token `query` to the patches of an image (1, 3, H, W), in the last block.

    What the class tokens receive is left out.
    """
    attention = model.get_last_selfattention(image)[0, :, query, model.num_class_token :]
    return attention.unflatten(1, (image.shape[-2] // model.patch_size, image.shape[-1] // model.patch_size))


def attended(maps: Tensor, threshold: float) -> Tensor:
    """The patches that attract most: the fewest with a share of about `threshold`; (h, G_h, G_w) -> same, bool."""
    flat = maps.flatten(1)
    values, order = flat.sort(dim=1)
    largest = (values / values.sum(dim=1, keepdim=True)).cumsum(dim=1) > 1 - threshold
    return torch.zeros_like(largest).scatter(1, order, largest).view_as(maps)


def enlarge(maps: Tensor, factor: int) -> Tensor:
    """Repeat every entry of (h, G_h, G_w) factor x factor times."""
    return maps.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def to_pixels(image: Tensor) -> Tensor:
    """The first three channels, or the first one, of an image (1, C, H, W), stretched to 0 to 1: (3, H, W)."""
    return make_grid(image[:, : 3 if image.shape[1] > 2 else 1], normalize=True, scale_each=True)


def tinted(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (3, H, W) with the mask (H, W) coloured and the rest darkened, (H, W, 3)."""
    colour = pixels.new_tensor(TINT)[:, None, None]
    return torch.where(mask, 0.5 * pixels + 0.5 * colour, 0.6 * pixels).permute(1, 2, 0)


def overview(images: list[dict[str, Tensor]], names: list[str], in_chans: int | None = None) -> Figure:
    """A row per image, a column per picture; below, which of --in_chans the images show.

    Args:
        images: pictures (H, W, 3) or maps (H, W) by title, of each image. names: of the images.
    """
    columns = len(images[0])
    height, width = next(iter(images[0].values())).shape[:2]
    size = (1.6 * columns, (1.6 * height / width + 0.05) * len(images) + 0.3)
    fig = Figure(figsize=size, layout="constrained", dpi=160)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore[union-attr]
    axes = fig.subplots(len(images), columns, squeeze=False)
    for line, (row, pictures, name) in enumerate(zip(axes, images, names, strict=True)):
        for ax, (title, picture) in zip(row, pictures.items(), strict=True):
            ax.imshow(picture.numpy())
            ax.set_xticks([])
            ax.set_yticks([])
            if line == 0:
                ax.set_title(title, fontsize=8)
        row[0].set_ylabel(name if len(name) <= 16 else f"{name[:6]}...{name[-7:]}", fontsize=7)
    if in_chans:
        shown = "channels 1, 2, 3" if in_chans > 2 else "channel 1"
        fig.supxlabel(f"of {in_chans} channels: {shown}, stretched", fontsize=7)
    return fig


def draw(args: argparse.Namespace, model: VisionTransformer, path: str, device: torch.device) -> dict[str, Tensor]:
    """The pictures of an image by the names of their files."""
    p = model.patch_size
    image = read_image(path, args.image_size, p, *datasets.stored_channels(vars(args)))
    maps = attention_maps(model, image.to(device), args.query).cpu()
    pixels = to_pixels(image)
    files = {"img.png": pixels.permute(1, 2, 0)}
    files |= {f"attn-head{j}.png": heat for j, heat in enumerate(enlarge(maps, p))}
    if args.threshold is not None:
        masks = enlarge(attended(maps, args.threshold), p)
        files |= {f"mask_th{args.threshold}_head{j}.png": tinted(pixels, mask) for j, mask in enumerate(masks)}
    return files


def title(file: str, threshold: float | None) -> str:
    """What a file shows, for the overview."""
    if file == "img.png":
        return "image"
    head = int(file.split("head")[1].removesuffix(".png")) + 1
    return f"head {head}" if file.startswith("attn") else f"{threshold:.0%} of head {head}"


def build_model(args: argparse.Namespace) -> VisionTransformer:
    """The backbone of the flags with the weights of its checkpoint."""
    weights = None
    if args.pretrained_weights:
        state = distributed.load(args.pretrained_weights)
        args.in_chans, args.mean, args.std = datasets.stored_channels(distributed.flags_of(state))
        weights = load_backbone(state, args.checkpoint_key, args.class_tokens, args.pretrained_weights)
    else:
        distributed.log("WARNING: no --pretrained_weights, the backbone is random")
    model = build_backbone(args.arch, args.patch_size, weights).eval()
    if not 0 <= args.query < model.num_class_token:
        raise distributed.UserError(f"--query {args.query}: the backbone has {model.num_class_token} class tokens")
    return model


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise distributed.UserError(f"--threshold {args.threshold}: expected 0 to 1")
    paths = args.image_path or []
    if not paths:
        read_image(None, args.image_size, args.patch_size)  # before weights are loaded
    torch.manual_seed(0)  # of random weights
    model = build_model(args)
    model.to(device)
    images = [draw(args, model, path, device) for path in paths]
    shown = [{title(name, args.threshold): picture for name, picture in files.items()} for files in images]
    out = Path(args.output_dir)
    try:
        for path, files in zip(paths, images, strict=True):
            folder = out / Path(path).stem if len(images) > 1 else out
            folder.mkdir(parents=True, exist_ok=True)
            for name, picture in files.items():
                imsave(str(folder / name), picture.numpy())
        overview(shown, [Path(path).name for path in paths], getattr(args, "in_chans", None)).savefig(
            out / "overview.png"
        )
    except OSError as error:
        raise distributed.UserError(f"--output_dir {args.output_dir}: cannot be written ({error.strerror})") from error
    distributed.log(f"wrote overview.png and {', '.join(images[0])} to {args.output_dir}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
