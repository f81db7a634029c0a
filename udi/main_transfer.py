"""Fine-tuning of a UDI backbone on CIFAR, iNaturalist, Flowers or Cars.

Learning rates of the paper's runs with 768 images per update (8 x 96), for --epochs 1000, iNaturalist 360:
CIFAR-10 5e-6 and CIFAR-100 7.5e-6, both with --reprob 0.1; iNaturalist 2018 3e-5, 2019 5e-5; Flowers, Cars 7.5e-5.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import distributed
from udi import data, engine_deit
from udi.models_eval import EvaluationViT, linear_head


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("UDI transfer", allow_abbrev=False, usage="%(prog)s [flags], listed by --help")
    p.add_argument("--batch-size", "--batch_size", default=128, type=int, help="images per process and micro-step")
    p.add_argument("--epochs", default=300, type=int, help="paper: 1000 or 360")
    p.add_argument("--lr", default=5e-4, type=float, help="of 512 images per update; it grows with them")
    # ---- model, optimizer, augmentation
    engine_deit.add_model_flags(p)
    engine_deit.add_optimizer_flags(p)
    engine_deit.add_augmentation_flags(p)
    p.add_argument(
        "--repeated-aug", "--repeated_aug", action="store_true", default=True, help="three copies of images (default)"
    )
    p.add_argument("--no-repeated-aug", "--no_repeated_aug", action="store_false", dest="repeated_aug")
    # ---- data, files, process
    p.add_argument("--data_path", default="/home/aiops/zhoupan/code/dataset/flowers", type=str, help="folder of it")
    p.add_argument("--data_set", default="flowers", choices=data.DATA_SETS, help="IMNET, image_folder: train/ and val/")
    p.add_argument("--download", action="store_true", help="fetch flowers; CIFAR is fetched where it is missing")
    p.add_argument(
        "--inat-category", "--inat_category", default="name", choices=engine_deit.CATEGORIES, help="what is a class"
    )
    engine_deit.add_process_flags(p)
    p.set_defaults(teacher_model="regnety_160")
    return p


def results_folder(args: argparse.Namespace) -> str:
    """Where the results go, under the folder of the weights."""
    name = (
        f"{args.opt}_b_{args.batch_size}_lr_{args.lr:.2e}_wd_{args.weight_decay:.2e}_dr-{args.drop_path:.2f}"
        f"-ep_{args.epochs}"
    )
    return str(Path("transfer_learning", args.data_set, name))


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    distributed.log(f"{Path(__file__).name} {vars(args)}")
    train, val = (data.transfer_set(args, split) for split in (True, False))

    def add_head(model: EvaluationViT, _path: str, _key: str) -> None:
        model.head = classifier = linear_head(model.embed_dim, len(train.classes))
        engine_deit.scale_classifier(classifier, args.init_scale)

    def sampler():
        if not args.repeated_aug:
            return None
        return data.RepeatSampler(train, distributed.world_size(), distributed.rank(), shuffle=True)

    files = engine_deit.DeitFiles(latest="checkpoint_bak.pth")
    engine_deit.run(args, device, results_folder(args), add_head, (train, val), files, sampler)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
