"""A2MIM Fig. A3, A4: features of every layer, their relative log amplitude by frequency (fourier), their variance.

The encoder is one of a2mim/backbones.py, from a pre-training, encoder-only or fine-tuned checkpoint, or timm's. Files
in <save_path>/<exp_name>/<model_name>/<name>/:
    <exp_name>_latents.pt         statistics, not the latents themselves: see `measure`
    fft_features.png              fourier: amplitude by frequency, one curve per layer but the last
    high_freq_fft_features.png    fourier: that of the highest frequency by depth
    variance_features.png         variance: by depth
--summary FILE... draws the curves by depth of several <exp_name>_latents.pt into one figure in <save_path>/<exp_name>/.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from torch import Tensor
from torchvision import transforms

from a2mim.analysis import axes, fingerprint, load_file, patch_keywords, replacing, save_figure, timm_network
from a2mim.fourier import feature_variance, observed, relative_log_amplitude
from a2mim.models_a2mim import BACKBONES, build_classifier
from a2mim.openmixup import load_encoder
from common import datasets, distributed
from common.distributed import UserError

EXPERIMENTS = ("fourier", "variance")
BY_DEPTH = {"fourier": "high_freq_fft_features.png", "variance": "variance_features.png"}
LABELS = {"fourier": "Δ log amplitude at the highest frequency", "variance": "Feature map variance"}
# What the first letters of a summarised file's <name> say.
CLASSES = {"cl_": "contrastive", "mim_": "masked images", "ssl_": "self-supervised", "sl_": "supervised"}
DEAD = (
    *("test_image", "shuffle", "shuffle_size", "shuffle_h", "shuffle_w", "random_drop", "random_offset_drop"),
    *("cascade", "exp_count", "saliency", "saliency_box", "drop_count", "drop_best", "drop_lambda", "standard_box"),
    *("dino", "lesion", "block_index", "draw_plots", "select_im", "threshold", "pretrained_weights"),
    *("use_shape", "generate_images"),
)


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("Fourier analysis")
    g = distributed.flag_groups(p)
    g.output.add_argument("--exp_name", choices=EXPERIMENTS, help="what to measure; by default both, in one pass")
    g.output.add_argument(
        "--summary", nargs="+", default=[], metavar="FILE", help="draw *_latents.pt of several encoders"
    )
    # ---- encoder
    g.model.add_argument(
        "--model_name", default="deit_small_patch16_224", help=f"{', '.join(BACKBONES)}, or a name of timm's"
    )
    g.model.add_argument(
        "--patch_size", default=16, type=int, help="side of a patch in pixels, of ViTs of a2mim/backbones.py"
    )
    g.model.add_argument(
        "--pretrained_path", help="checkpoint with the weights: of this method, of OpenMixup, or of timm's"
    )
    g.unused.add_argument("--num_classes", type=int, help="the encoder alone is looked at")
    g.model.add_argument(
        "--rand_init", action="store_true", help="take random weights, whatever --pretrained_path says"
    )
    # ---- images
    g.data.add_argument("--test_dir", help="folder with val/<class>/<image>, <class>/<image> or <image>")
    g.data.add_argument("--test_list", help="file with lines '<image in test_dir> <class>'")
    datasets.add_channel_flags(p)  # default: those of the run that wrote the checkpoint
    g.data.add_argument("--scale_size", default=256, type=int, help="shorter side in pixels, before the central crop")
    g.data.add_argument("--img_size", default=224, type=int, help="side of the central crop in pixels")
    g.data.add_argument("--batch_size", default=256, type=int, help="images per batch")
    g.data.add_argument("--batches", default=26, type=int, help="number of full batches to look at")
    g.data.add_argument("--num_workers", default=4, type=int, help="loader processes")
    # ---- files, process
    g.output.add_argument("--save_path", help="folder of all results; default: report")
    g.output.add_argument("--name", help="name of this encoder in the results; default: file name of the checkpoint")
    g.output.add_argument("--overwrite", action="store_true", help="measure again what is there already")
    g.process.add_argument("--seed", default=0, type=int, help="seed of random weights")
    distributed.add_launch_flags(p)
    for name in DEAD:
        g.unused.add_argument(f"--{name}", nargs="*", help="the authors' program does not read it either")
    return p


def build_encoder(args: argparse.Namespace) -> Any:
    """timm's network of the flags, in evaluation mode."""
    path = None if args.rand_init else args.pretrained_path
    if not path:
        distributed.log("WARNING: no --pretrained_path, the encoder is random")
    torch.manual_seed(args.seed)
    if args.model_name not in BACKBONES:
        if args.in_chans not in (None, 3):
            raise UserError(f"--in_chans {args.in_chans}: timm's {args.model_name} takes 3 channels")
        return timm_network(args.model_name, 0, args.img_size, path).eval()
    with distributed.user_errors(f"--model_name {args.model_name}"):
        # Ours: the classes are not looked at.
        own = {"img_size": args.img_size, "in_chans": args.in_chans or 3, **patch_keywords(args, args.model_name)}
        model = build_classifier(args.model_name, 2, **own)
    if path:
        load_encoder(model, path)
    return model.net.eval()


def build_loader(args: argparse.Namespace, device: torch.device) -> datasets.Loader:
    """Batches of the images of the flags, in the order of their listing."""
    if not args.test_dir:
        raise UserError("expected --test_dir FOLDER")
    if args.test_list:
        with distributed.user_errors(f"--test_list {args.test_list}"):
            if not Path(args.test_list).is_file():
                raise ValueError("no such file")
            images: Any = datasets.ListedImages(Path(args.test_list), Path(args.test_dir))
    else:
        images = datasets.image_dataset(args.test_dir, train=False, labelled=False, in_chans=args.in_chans)
    images.in_chans = args.in_chans
    statistics = datasets.statistics(argparse.Namespace(**vars(args), data_path=args.test_dir))
    steps = [transforms.Resize(args.scale_size), transforms.CenterCrop(args.img_size)]
    transform = transforms.Compose([*steps, *datasets.tensor_and_normalize(*statistics)])
    return datasets.Loader(images, transform, args.batch_size, device, train=False, num_workers=args.num_workers)


@torch.inference_mode()
def measure(net: Any, loader: datasets.Loader, batches: int) -> dict[str, Any]:
    """Statistics of every latent over the first full batches (the first one, where none is full).

    Returns:
        names: of the latents, from the stem on. fourier: for each, (h - h // 2,) float32, relative log amplitude at the
        frequencies 0 to π. variance: for each, () float32. images: how many they are averaged over.
    """
    count = max(1, min(batches, loader.images // loader.batch_size))
    sums: dict[str, list[Tensor]] = {}
    log = distributed.EpochLog("Latents:", count, loader.batch_size, loader.device)
    images = 0
    with observed(net, lambda x: [relative_log_amplitude(x), feature_variance(x)]) as seen:
        for _, (imgs, _) in log.steps(batch for batch, _ in zip(loader.batches(), range(count), strict=False)):
            net.forward_features(imgs)
            images += len(imgs)
            for name, values in seen.items():
                sums[name] = [a + b for a, b in zip(sums[name], values, strict=True)] if name in sums else values
    means = {name: [(value / count).cpu() for value in values] for name, values in sums.items()}
    if not all(bool(value.isfinite().all()) for values in means.values() for value in values):
        raise UserError("the encoder's features are not finite")
    return {
        "names": list(means),
        "fourier": [curve for curve, _ in means.values()],
        "variance": [variance for _, variance in means.values()],
        "images": images,
    }


def by_depth(exp: str, found: dict[str, Any]) -> tuple[np.ndarray, list[float]]:
    """Normalised depth of each latent, and its variance or amplitude at the highest frequency."""
    values = [float(value.flatten()[-1]) for value in found[exp]]
    return np.linspace(0, 1, len(values)), values


def draw(exp: str, found: dict[str, Any], folder: Path) -> None:
    """The figures of one encoder."""
    colours, depth = colormaps["viridis"], by_depth(exp, found)[0]
    if exp == "fourier":  # Plot A
        fig, ax = axes("Frequency", "Δ log amplitude")
        for d, curve in list(zip(depth, found[exp], strict=True))[:-1]:  # as upstream: without the last layer
            ax.plot(np.linspace(0, 1, len(curve)), curve, color=colours(d))  # as upstream: from 0 to π, whatever h
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25π", "0.5π", "0.75π", "π"])
        fig.colorbar(ScalarMappable(cmap=colours), ax=ax, label="Normalised depth")
        save_figure(fig, folder / "fft_features.png")
    fig, ax = axes("Normalised depth", LABELS[exp])
    x, y = by_depth(exp, found)  # Plot B
    ax.plot(x, y, color="0.7", zorder=1)
    ax.scatter(x, y, c=x, cmap=colours, s=22, zorder=2)
    save_figure(fig, folder / BY_DEPTH[exp])


def summarise(files: list[str], exp: str | None, folder: Path) -> None:
    """One figure of the curves by depth of several saved files; one kind of line for each class of `CLASSES`."""
    found = {path: load_file(Path(path), "expected a file <exp_name>_latents.pt") for path in files}
    for path, content in found.items():
        if not isinstance(content, dict) or not {"exp_name", "name"} <= set(content):
            raise UserError(f"{path}: expected a file <exp_name>_latents.pt")
    kinds = {content["exp_name"] for content in found.values()} | ({exp} if exp else set())
    if len(kinds) > 1:
        raise UserError(f"--summary: expected files of one experiment, found {' and '.join(sorted(kinds))}")
    (kind,) = kinds
    fig, ax = axes("Normalised depth", LABELS[kind])
    styles = dict(zip(CLASSES, ("-", "--", "-.", ":"), strict=True))
    several = len({content["model_name"] for content in found.values()}) > 1
    for content in found.values():
        prefix = next((p for p in CLASSES if content["name"].startswith(p)), "")
        label = f"{content['model_name']}: " * several + content["name"].removeprefix(prefix)
        label += f" ({CLASSES[prefix]})" if prefix else ""
        x, y = by_depth(kind, content)
        ax.plot(x, y, styles.get(prefix, "-"), marker="o", markersize=3, label=label)
    ax.legend(frameon=False, fontsize=8)
    save_figure(fig, folder / kind / BY_DEPTH[kind])


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    root = Path(args.save_path or "report")
    if args.summary:
        summarise(args.summary, args.exp_name, root)
        return
    if distributed.world_size() > 1:
        raise UserError("expected one process")
    for name in ("batches", "img_size", "scale_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    # ---- encoder
    if args.pretrained_path and not args.rand_init:
        datasets.follow_channels(args, distributed.flags_of(distributed.load(args.pretrained_path)))
    net = build_encoder(args)
    with distributed.user_errors(f"--model_name {args.model_name}"), torch.inference_mode(), observed(net, len):
        net.forward_features(torch.zeros(1, args.in_chans or 3, args.img_size, args.img_size))  # of a known kind, size
    name = args.name or ("random" if args.rand_init or not args.pretrained_path else Path(args.pretrained_path).stem)
    experiments = (args.exp_name,) if args.exp_name else EXPERIMENTS
    paths = {exp: root / exp / args.model_name.replace("/", "_") / name / f"{exp}_latents.pt" for exp in experiments}
    flags = ("model_name", "test_dir", "test_list", "scale_size", "img_size", "batch_size", "batches")
    flags += ("in_chans", "mean", "std")
    origin = {"name": name, "weights": fingerprint(net), **{flag: getattr(args, flag) for flag in flags}}
    # ---- statistics
    found = {}
    for exp, path in paths.items():
        if path.exists() and not args.overwrite:
            found[exp] = load_file(path, "run again")
            odd = [key for key, value in origin.items() if found[exp].get(key) != value]
            if odd:
                raise UserError(f"{path}: is of other {', '.join(odd)}; choose another --name, or --overwrite it")
    if len(found) < len(paths):
        statistics = measure(net.to(device), build_loader(args, device), args.batches)
    for exp, path in paths.items():
        if exp not in found:
            values = {key: statistics[key] for key in ("names", exp, "images")}
            found[exp] = {"exp_name": exp, **origin, **values}
            with replacing(path) as file:
                torch.save(found[exp], file)
        # ---- figures
        distributed.log(f"{exp}: {len(found[exp]['names'])} latents, mean of {found[exp]['images']} images")
        draw(exp, found[exp], path.parent)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
