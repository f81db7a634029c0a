"""A2MIM Fig. 1, 5, A1, A2: how strongly cells of an image interact in a classifier, by the size of their context.

Five stages, each of which skips what it finds done: sampler (choose images), pairs (draw pairs of cells and contexts),
logits (evaluate the network), compute (interactions), draw (strength J by order). All is kept in
<output_dir>/<output_dirname>_INTER_pixel_CLASS_random_GRID_<G>x<G>_seed<s>/MODEL_<arch>_DATA_<dataset>/:
    settings.json                                         with chosen: [[<img>, index in the data set, class], ...]
    pairs.npy                                             (images, pairs, 2)
    players/ratio<r>/<img>.npy                            (pairs, contexts, m), r = 100 * ratio
    interactions_logit/ratio<r>/<img>.pth                 by softmax_type: (pairs, 4 * contexts), the class's rewards
    interactions_out_gt_softmax_<type>/ratio<r>/<img>.npy (pairs, contexts)
    figures/<save_name>.npy, .png                         (orders,), and its curve
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch import Tensor, nn
from torchvision import transforms

from a2mim.analysis import axes, fingerprint, load_file, patch_keywords, progress, replacing, save_figure, timm_network
from a2mim.config import boolean
from a2mim.data import list_file
from a2mim.interactions import REWARDS, gen_contexts, gen_pairs, interactions, order_of, presence, rewards, strength
from a2mim.models_a2mim import BACKBONES, build_classifier
from a2mim.openmixup import load_classifier
from common import datasets, distributed
from common.distributed import UserError

FIRST = "run --stage {} first, with the same flags"
OUT = "interactions_out_gt_softmax_{}"
STAGES = ("sampler", "pairs", "logits", "compute", "draw")
ARCHS = {
    "resnet": "resnet50",
    "vit": "deit_small_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
    "mlpmixer": "mixer_s16_224",
    "convnext": "convnext_tiny",
    "convmixer": "convmixer_768_32",
    "poolformer": "poolformer_s24",
}
# A2MIM@ccca6dc analysis_tools/representation_bottleneck: config_cifar10.yaml and config_imagenet.yaml
CIFAR = {"pairs": 200, "contexts": 100, "images": 50, "image_size": 32}
IMAGENET = {"pairs": 50, "contexts": 50, "images": 500, "image_size": 224}
RATIOS = [0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1]


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("Interactions")
    g = distributed.flag_groups(p)
    g.output.add_argument("--stage", default="all", choices=[*STAGES, "all"], help="the part of the study to compute")
    # ---- network
    g.model.add_argument("--arch", default="vit", help=f"network: {', '.join(ARCHS)}, or a name of timm's")
    g.model.add_argument(
        "--backbone", default="", choices=["", *BACKBONES], help="network of main_finetune.py, in place of --arch"
    )
    g.model.add_argument("--patch_size", default=16, type=int, help="side of a patch in pixels, of a ViT of --backbone")
    g.model.add_argument(
        "--checkpoint_path", help="weights of the network: of main_finetune.py or OpenMixup, or with timm's names"
    )
    g.model.add_argument("--checkpoint_name", help="file in --checkpoint_path, where that is a folder")
    g.model.add_argument(
        "--pretrained",
        default=False,
        type=boolean,
        nargs="?",
        const=True,
        help="weights that timm downloads for --arch",
    )
    g.model.add_argument("--class_number", type=int, help="number of classes, by default that of the images")
    # ---- images
    g.data.add_argument(
        "--dataset", default="cifar10", help="cifar10, imagenet, or a data set of timm's: torch/cifar10, ..."
    )
    g.data.add_argument(
        "--data_path",
        default="./data",
        help="folder with val/<class>/<image> or <class>/<image>, or of timm's data set",
    )
    g.data.add_argument("--image_size", type=int, help="side of the images in pixels; default 224, CIFAR 32")
    g.data.add_argument("--images", type=int, help="number of images; default 500, CIFAR 50, or all if there are fewer")
    g.data.add_argument(
        "--chosen_class", default="random", choices=["random"], help="images are drawn from all classes"
    )
    # ---- interactions
    g.data.add_argument(
        "--grid_size",
        default=16,
        type=int,
        help="G: cells per side of an image; authors' configuration for ImageNet: 14",
    )
    g.data.add_argument("--pairs", type=int, help="pairs of cells per image; default 50, CIFAR 200")
    g.data.add_argument("--contexts", type=int, help="contexts per pair and order; default 50, CIFAR 100")
    g.data.add_argument(
        "--stride", default=2, type=int, help="largest distance of the two cells of a pair, in rows and in columns"
    )
    g.data.add_argument(
        "--ratios", default=RATIOS, nargs="+", type=float, help="orders, as shares of the G*G - 2 cells outside a pair"
    )
    g.model.add_argument(
        "--softmax_type",
        default="modified",
        choices=REWARDS,
        help="reward of a class: log p, log p / (1 - p), or logit",
    )
    g.data.add_argument("--inter_type", default="pixel", choices=["pixel"], help="what interacts: cells of pixels")
    g.model.add_argument("--out_type", default="gt", choices=["gt"], help="whose reward counts: the true class's")
    # ---- files, process
    g.output.add_argument("--output_dir", default="results", help="folder of all results")
    g.output.add_argument("--output_dirname", default="result", help="beginning of the name of the folder in it")
    g.output.add_argument("--save_name", default="default", help="name of the files of the curve")
    g.process.add_argument("--cal_batch", default=100, type=int, help="masked images per forward pass")
    g.process.add_argument(
        "--allow_tf32", action="store_true", help="faster matrix products on GPUs; differences of rewards lose digits"
    )
    g.process.add_argument("--gpu_id", type=int, help="the same as --device cuda:<gpu_id>, where there is CUDA")
    g.process.add_argument("--no_cuda", action="store_true", help="the same as --device cpu")
    g.process.add_argument("--seed", default=0, type=int, help="seed of all random draws")
    distributed.add_launch_flags(p)
    return p


# ---- network


def build_network(args: argparse.Namespace, classes: int) -> nn.Module:
    """The classifier of the flags, in evaluation mode."""
    path = args.checkpoint_path
    if path and args.checkpoint_name and Path(path).is_dir():
        path = str(Path(path) / args.checkpoint_name)
    if args.pretrained and (path or args.backbone):
        raise UserError("--pretrained: takes timm's weights of --arch; leave out --checkpoint_path and --backbone")
    if not path and not args.pretrained:
        distributed.log("WARNING: no --checkpoint_path, the network is random")
    channels = (distributed.flags_of(distributed.load(path)).get("in_chans") or 3) if path else 3
    if channels != 3:
        raise UserError(f"{path}: takes {channels} channels; interactions are those of photographs, of 3")
    torch.manual_seed(args.seed)
    size, name = args.image_size, args.backbone or ARCHS.get(args.arch) or args.arch
    try:
        if args.backbone:
            with distributed.user_errors(f"--backbone {name}"):
                model: nn.Module = build_classifier(name, classes, img_size=size, **patch_keywords(args, name))
            if path:
                load_classifier(model, path)
        else:
            model = timm_network(name, classes, size, path, args.pretrained)
        with distributed.user_errors(name), torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size))
    except UserError as error:
        raise UserError(f"{error}; the images have {classes} classes and {size} pixels") from error
    return model


# ---- images


def open_images(args: argparse.Namespace) -> Any:
    """The data set of the flags: a list file of upstream with a flat val/, folders of classes, or one of timm."""
    root, name = Path(args.data_path), args.dataset if "/" in args.dataset else ""
    if args.dataset not in ("cifar10", "imagenet") and not name:
        raise UserError(f"--dataset {args.dataset}: expected cifar10, imagenet, or timm's, such as torch/cifar10")
    lists = list_file(root, "val_labeled.txt")
    if args.dataset == "imagenet" and lists.is_file():
        return datasets.ListedImages(lists, root / "val", root)
    folders = (root / "val").is_dir() or any(p.suffix.lower() in datasets.ENDINGS for p in root.glob("*/*"))
    if args.dataset == "cifar10" and not folders:
        name = "torch/cifar10"
    return datasets.image_dataset(args.data_path, train=False, name=name, direct=not (root / "val").is_dir())


def read(images: Any, index: int, size: int) -> tuple[Tensor, int]:
    """An image (3, size, size), normalised, and its class.

    Raises:
        UserError: it is unreadable.
    """
    try:
        image, label = images[index]
        image = datasets.to_rgb(image)
    except Exception as error:  # Pillow raises many types for damaged files
        where = images.samples[index][0] if hasattr(images, "samples") else f"image {index}"
        raise UserError(f"{where}: unreadable image ({' '.join(str(error).split())})") from error
    steps = [transforms.Resize(int(size / 0.875)), transforms.CenterCrop(size), *datasets.tensor_and_normalize()]
    return transforms.Compose(steps)(image), label


def choose(images: Any, number: int | None, default: int, seed: int, size: int) -> list[list]:
    """Different images, drawn from the sorted listing: [[name for files, index, class], ...].

    Raises:
        UserError: there are fewer than `number`.
    """
    if number and number > len(images):
        raise UserError(f"--images {number}: there are only {len(images)}")
    samples = getattr(images, "samples", None)
    chosen = []
    for k, i in enumerate(random.Random(seed).sample(range(len(images)), number or min(default, len(images)))):
        stem, label = (Path(samples[i][0]).stem, samples[i][1]) if samples else (str(i), read(images, i, size)[1])
        chosen.append([f"{k:05d}_{stem}", i, int(label)])
    return chosen


# ---- stages


class Study(NamedTuple):
    """One study's folder, ratios, and images: [file name, index, class]."""

    root: Path
    ratios: list[float]
    chosen: list[list]

    def path(self, kind: str, ratio: float, k: int, suffix: str = ".npy") -> Path:
        return self.root / kind / f"ratio{round(100 * ratio)}" / f"{self.chosen[k][0]}{suffix}"

    def to_do(self, kind: str, suffix: str = ".npy", share: int = 0, shares: int = 1) -> Iterator[tuple]:
        """Number, ratio and path of each file that is not there yet; with progress."""
        every = (
            (k, r, self.path(kind, r, k, suffix)) for k in range(share, len(self.chosen), shares) for r in self.ratios
        )
        yield from progress([entry for entry in every if not entry[-1].exists()], f"{kind}:")

    def claim(self, **settings: Any) -> None:
        """Store the settings that all files depend on; raises UserError if the folder was begun with others."""
        path = self.root / "settings.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        for name in [name for name, value in settings.items() if stored.get(name, value) != value]:
            change = "" if name == "chosen" else f" ({stored[name]}, now {settings[name]})"
            raise UserError(f"{self.root}: was begun with other {name}{change}; choose another --output_dirname")
        with replacing(path) as file:
            file.write(json.dumps(stored | settings).encode())


def make_pairs(args: argparse.Namespace, study: Study) -> None:
    def seed(k: int, more: int) -> None:
        random.seed(1000 * k + more + args.seed)
        np.random.seed(1000 * k + more + args.seed)  # noqa: NPY002 - as upstream: the global generator

    every = []
    with distributed.user_errors("--pairs"):
        for k in range(len(study.chosen)):
            seed(k, 0)
            every.append(gen_pairs(args.grid_size, args.pairs, args.stride))
    with replacing(study.root / "pairs.npy") as file:
        np.save(file, np.stack(every))
    for k, ratio, path in study.to_do("players"):
        order = order_of(args.grid_size, ratio)
        seed(k, order + 1)
        contexts = gen_contexts(every[k], args.grid_size, order, args.contexts)
        with replacing(path) as file:
            np.save(file, contexts.astype(np.min_scalar_type(args.grid_size**2 - 1)))


def evaluate(args: argparse.Namespace, study: Study, images: Any, classes: int, device: torch.device) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    model = build_network(args, classes)
    distributed.main_does(lambda: study.claim(weights=fingerprint(model)))
    model.to(device)
    pairs = load_file(study.root / "pairs.npy", FIRST.format("pairs"))
    share = distributed.rank(), distributed.world_size()
    for k, ratio, path in study.to_do("interactions_logit", ".pth", *share):
        _, index, label = study.chosen[k]
        image = read(images, index, args.image_size)[0].to(device)
        masks = presence(pairs[k], load_file(study.path("players", ratio, k), FIRST.format("pairs")), args.grid_size)
        values = rewards(model, image, label, masks, args.cal_batch)
        if not all(value.isfinite().all() for value in values.values()):
            raise UserError(f"{study.chosen[k][0]}: the network's answers are not finite")
        with replacing(path) as file:
            torch.save(values, file)


def compute(args: argparse.Namespace, study: Study) -> None:
    for k, ratio, path in study.to_do(OUT.format(args.softmax_type)):
        values = load_file(study.path("interactions_logit", ratio, k, ".pth"), FIRST.format("logits"))
        with replacing(path) as file:
            np.save(file, interactions(values[args.softmax_type]).numpy())


def draw(args: argparse.Namespace, study: Study) -> None:
    numbers, kind, advice = range(len(study.chosen)), OUT.format(args.softmax_type), FIRST.format("compute")
    found = np.array([[load_file(study.path(kind, r, k), advice) for k in numbers] for r in study.ratios])
    if not found.any():
        raise UserError("all interactions are 0: the network's answers do not depend on the image")
    curve = strength(found)
    path = study.root / "figures" / f"{args.save_name}.npy"
    with replacing(path) as file:
        np.save(file, curve)
    fig, ax = axes("Order", "Interaction Strength")
    ax.plot(study.ratios, curve, marker="o", markersize=4, label=args.backbone or args.arch)
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "0.2n", "0.4n", "0.6n", "0.8n", "1.0n"])
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    save_figure(fig, path.with_suffix(".png"))
    distributed.log("J by order: " + "  ".join(f"{r:g}n: {j:.4f}" for r, j in zip(study.ratios, curve, strict=True)))


def check(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on the data set; raises UserError for impossible values."""
    settings = CIFAR if "cifar" in args.dataset else IMAGENET
    for name in ("pairs", "contexts", "image_size"):
        setattr(args, name, settings[name] if getattr(args, name) is None else getattr(args, name))
    least = {"pairs": 1, "contexts": 1, "images": 1, "stride": 1, "cal_batch": 1, "grid_size": 2, "class_number": 2}
    for name, low in {**least, "image_size": args.grid_size}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name} {value}: expected at least {low}")
    if not all(0 <= r <= 1 and abs(100 * r - round(100 * r)) < 1e-9 for r in args.ratios):
        raise UserError(f"--ratios {' '.join(map(str, args.ratios))}: expected shares from 0 to 1, in hundredths")


def main(args: argparse.Namespace) -> None:
    if args.gpu_id is not None and args.device == "auto" and torch.cuda.is_available():
        args.device = f"cuda:{args.gpu_id}"
    device = distributed.init("cpu" if args.no_cuda else args.device)
    distributed.catch_signals()
    check(args)
    # ---- images
    images = open_images(args)
    found = len(getattr(images, "classes", ()))
    classes: int = args.class_number or found
    if not classes:
        raise UserError(f"--class_number: is needed, as --dataset {args.dataset} does not say it")
    if found and found != classes:
        raise UserError(f"--class_number {classes}: the images have {found} classes")
    # ---- study
    grid, network = args.grid_size, args.backbone or args.arch
    run = f"{args.output_dirname}_INTER_{args.inter_type}_CLASS_{args.chosen_class}_GRID_{grid}x{grid}_seed{args.seed}"
    root = Path(args.output_dir) / run / f"MODEL_{network}_DATA_{args.dataset}".replace("/", "_")
    number = (CIFAR if "cifar" in args.dataset else IMAGENET)["images"]
    chosen = choose(images, args.images, number, args.seed, args.image_size)
    study = Study(root, sorted(set(args.ratios)), chosen)
    settings = {name: getattr(args, name) for name in ("pairs", "contexts", "stride", "image_size")}
    stages: dict[str, Callable[[], None]] = {
        "sampler": lambda: distributed.log(f"{len(chosen)} images of {args.image_size} pixels; {root}"),
        "pairs": lambda: make_pairs(args, study),
        "logits": lambda: evaluate(args, study, images, classes, device),
        "compute": lambda: compute(args, study),
        "draw": lambda: draw(args, study),
    }
    distributed.main_does(lambda: study.claim(**settings, classes=classes, images=len(chosen), chosen=chosen))
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if stage == "logits":  # the only one that is shared among the processes
            stages[stage]()
            distributed.agree()  # all are done
        else:
            distributed.main_does(stages[stage])


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
