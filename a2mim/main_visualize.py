"""Pictures of a pre-trained network's reconstructions: main_visualize.py [CONFIG] [flags of main_pretrain.py]
--resume CHECKPOINT --images FILE ..."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

from a2mim import config, data, main_pretrain
from a2mim.engine_pretrain import reconstruct
from a2mim.openmixup import load_openmixup_state_dict
from a2mim.pictures import save_reconstructions
from common import datasets, distributed

PER_PICTURE = 4  # images, as during pre-training


def get_args_parser() -> argparse.ArgumentParser:
    p = main_pretrain.get_args_parser()
    p.prog = "A2MIM pictures"
    g = distributed.flag_groups(p).data
    g.add_argument("--images", nargs="+", default=[], help="image files; default: validation images of --data_path")
    g.add_argument("--num_images", default=8, type=int, help="number of images of --data_path, spread over it")
    return p


def _image_of(dataset: Any, index: int) -> Any:
    return dataset[index][0]


def chosen_images(args: argparse.Namespace) -> list[Any]:
    """Images of the flags, of PIL or with --in_chans tensors; raises UserError for one that cannot be read."""
    read: Callable[[Any], Any] = partial(datasets.read_image, in_chans=args.in_chans)
    names: list[Any] = args.images
    if not names:
        dataset = data.images(args, train=False, labelled=False)
        dataset.in_chans = args.in_chans
        count = min(args.num_images, len(dataset))
        if count < 1:
            raise distributed.UserError(f"--num_images {args.num_images}: expected at least 1")
        names = [int(i) for i in np.linspace(0, len(dataset) - 1, count)]

        read = partial(_image_of, dataset)
    images = []
    for name in names:
        try:
            image = read(name)
            images.append(datasets.to_channels(image, args.in_chans) if args.in_chans else datasets.to_rgb(image))
        except Exception as error:  # Pillow raises many types for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise distributed.UserError(f"{name}: unreadable image ({reason})") from error
    return images


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    if not args.resume:
        raise distributed.UserError("--resume: name the checkpoint of the pre-training run")
    # ---- data
    state = distributed.load(args.resume)
    datasets.follow_channels(args, distributed.flags_of(state))
    view = data.eval_transform(round(args.input_size * 256 / 224), args.input_size, *data.own_statistics(args))
    pixels = torch.stack([view(image) for image in chosen_images(args)])
    masking, rng = main_pretrain.build_masking(args), np.random.default_rng(args.seed)
    masks = torch.stack([torch.from_numpy(masking.mask(rng.permutation(masking.side**2))) for _ in pixels])
    # ---- model
    model = main_pretrain.build_model(args)
    with distributed.user_errors(args.resume):
        load_openmixup_state_dict(model, distributed.weights_of(state, args.resume))
    model.to(device).eval()
    # ---- pictures
    context = main_pretrain.view_of(args)
    title, channels = main_pretrain.TITLES[args.method], datasets.stored_channels(vars(args))
    for i, start in enumerate(range(0, len(pixels), PER_PICTURE)):
        part = slice(start, start + PER_PICTURE)
        batch = ([pixels[part].to(device), masks[part].to(device)], torch.empty(0))
        out = reconstruct(model, batch, **context)
        path = Path(args.output_dir, "reconstruction", f"{Path(args.resume).stem}_{i}.png")
        try:
            save_reconstructions(path, out["target"], out["pred"], out["mask"], title, *channels)
        except OSError as error:
            raise distributed.UserError(f"{path}: cannot be written ({error.strerror})") from error
        distributed.log(f"{path}: loss of its images {float(out['loss']):.4f}")


if __name__ == "__main__":
    distributed.run(main, lambda: config.parse_args(get_args_parser()))
