"""Write the ViT of a checkpoint under mmsegmentation's names, without class tokens: vit2mmseg.py SRC DST."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[5]))
from common import distributed
from udi.backbone import mmseg_name
from udi.dense_backbone import load_patches
from udi.files import write_weights


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI conversion for mmsegmentation")
    g = distributed.flag_groups(p)
    p.add_argument("src", help="checkpoint of a pre-training, or what was taken out of one")
    p.add_argument("dst", help="file to write")
    g.data.add_argument("--checkpoint_key", default="teacher", help="network of the checkpoint: teacher or student")
    return p


def main(args: argparse.Namespace) -> None:
    weights = load_patches(args.src, args.checkpoint_key)
    write_weights({mmseg_name(name): value for name, value in weights.items()}, Path(args.dst), "DST")
    distributed.log(f"{len(weights)} tensors of {args.src} are in {args.dst}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
