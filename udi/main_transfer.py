"""Fine-tuning of a UDI backbone on CIFAR, iNaturalist, Flowers or Cars.

Learning rates of the authors' README with 768 images per update (8 x 96), for --epochs 1000, iNaturalist 360:
CIFAR-10 5e-6 and CIFAR-100 7.5e-6, both with --reprob 0.1; iNaturalist 2018 3e-5, 2019 5e-5; Flowers, Cars 7.5e-5.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import distributed
from udi import data, engine_deit
from udi.flags import CATEGORIES, add_deit_flags
from udi.models_eval import EvaluationViT, linear_head


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI transfer")
    g = distributed.flag_groups(p)
    add_deit_flags(p)
    g.augmentation.add_argument(
        "--repeated-aug",
        "--repeated_aug",
        action="store_true",
        default=True,
        help="an epoch shows three copies of a third of the images (default)",
    )
    g.augmentation.add_argument(
        "--no-repeated-aug",
        "--no_repeated_aug",
        action="store_false",
        dest="repeated_aug",
        help="an epoch shows each image once",
    )
    g.data.add_argument(
        "--data_path", default="/home/aiops/zhoupan/code/dataset/flowers", help="folder of the data set"
    )
    g.data.add_argument(
        "--data_set", default="flowers", choices=data.DATA_SETS, help="data set; IMNET, image_folder: train/ and val/"
    )
    g.data.add_argument("--download", action="store_true", help="download Flowers; CIFAR is always fetched if missing")
    g.data.add_argument(
        "--inat-category", "--inat_category", default="name", choices=CATEGORIES, help="what iNaturalist's classes are"
    )
    p.set_defaults(lr=5e-4, teacher_model="regnety_160", local_rank=0)
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
    train, val = (data.transfer_set(args, split and not args.eval) for split in (True, False))

    def add_head(model: EvaluationViT, _path: str, _key: str) -> None:
        model.head = classifier = linear_head(model.embed_dim, len(train.classes))
        engine_deit.scale_classifier(classifier, args.init_scale)

    def sampler():
        if not args.repeated_aug:
            return None
        return data.RepeatSampler(train, distributed.world_size(), distributed.rank())

    files = engine_deit.DeitFiles(latest="checkpoint_bak.pth")
    engine_deit.run(args, device, results_folder(args), add_head, (train, val), files, sampler)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
