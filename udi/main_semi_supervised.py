"""Fine-tuning of a UDI backbone with few labels: the images of ImageNet that a list names, 1 % or 10 % of all."""

import argparse
import math
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import distributed
from udi import data, engine_deit
from udi.flags import CATEGORIES, add_deit_flags
from udi.models_eval import EvaluationViT, build_proj_head, linear_head, load_head


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI semi-supervised fine-tuning")
    g = distributed.flag_groups(p)
    unread = "unread by the authors' program, too"
    g.unused.add_argument("--distill_epochs", default=150, type=int, help=unread)
    add_deit_flags(p)  # README: --epochs 1000 --lr 5e-6
    g.unused.add_argument("--layer_decay", default=1.0, type=float, help=unread)
    g.unused.add_argument("--disable_weight_decay_on_cls_pos", action="store_true", help=unread)
    g.unused.add_argument("--disable_weight_decay_on_rel_pos_bias", action="store_true", help=unread)
    g.unused.add_argument("--layer_scale_init_value", default=0, type=float, help=unread)
    g.unused.add_argument("--enable_deepspeed", action="store_true", help=unread)
    g.unused.add_argument("--repeated-aug", "--repeated_aug", action="store_true", default=True, help=unread)
    g.unused.add_argument(
        "--no-repeated-aug", "--no_repeated_aug", action="store_false", dest="repeated_aug", help=unread
    )
    g.data.add_argument("--data_path", default="/dataset/imageNet/", help="folder with train/ and val/")
    g.unused.add_argument(
        "--inat-category", "--inat_category", default="name", choices=CATEGORIES, help="iNaturalist is not used here"
    )
    g.unused.add_argument("--gpu", default=0, type=int, help="--device names the GPU")
    g.model.add_argument(
        "--finetune_head_layer",
        default=0,
        type=int,
        help="layers of the projection head that stay under the classifier (README: 1)",
    )
    g.model.add_argument(
        "--random_head", action="store_true", help="those layers start with fresh weights, as upstream"
    )
    g.model.add_argument(
        "--out_dim", default=8192, type=int, help="prototypes of the head's last layer; the number of a checkpoint wins"
    )
    g.model.add_argument(
        "--class_num", default=1000, type=int, help="number of classes, the first of the class folders"
    )
    g.data.add_argument(
        "--target_list_path",
        default="./subset/1percent.txt",
        help="text file with the labelled images' names",
    )
    p.set_defaults(local_rank=0)
    return p


def results_folder(args: argparse.Namespace) -> str:
    """Where the results go, under the folder of the weights."""
    name = (
        f"{args.opt}_b_{args.batch_size}_lr_{args.lr:.2e}_wd_{args.weight_decay:.2e}_dp_{args.drop_path:.2f}"
        f"_ep_{args.epochs}_layer_{args.finetune_head_layer}"
    )
    return str(Path("semi_supervised_learning", Path(args.target_list_path).stem, name))


def main(args: argparse.Namespace) -> None:
    distributed.check_ranges(args, {"out_dim": (1, math.inf), "finetune_head_layer": (0, 3)})
    device = distributed.init(args.device)

    def add_head(model: EvaluationViT, path: str, key: str) -> None:
        layer = args.finetune_head_layer
        if layer == 0:
            model.head = classifier = linear_head(model.embed_dim, args.class_num)
        else:
            pretrained = path and not args.random_head
            weights = load_head(distributed.load(path), key, path) if pretrained else None
            model.head = head = build_proj_head(model.embed_dim, args.class_num, layer, args.out_dim, weights)
            classifier = head.cls_head
        engine_deit.scale_classifier(classifier, args.init_scale)

    sets = data.semi_supervised_sets(args)
    engine_deit.run(args, device, results_folder(args), add_head, sets, engine_deit.DeitFiles())


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
