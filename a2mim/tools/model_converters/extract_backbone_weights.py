"""Keep the encoder of a pre-training checkpoint: extract_backbone_weights.py CHECKPOINT OUTPUT.pth."""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import torch

from a2mim.openmixup import extract_encoder
from common import distributed


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("Extract an encoder", allow_abbrev=False)
    p.add_argument("checkpoint", help="checkpoint of a pre-training run, a file or https address")
    p.add_argument("output", help="file to write, ending in .pth")
    return p


def main(args: argparse.Namespace) -> None:
    target = Path(args.output)
    if target.suffix != ".pth":
        raise distributed.UserError(f"{target}: expected a name that ends in .pth")
    with distributed.user_errors(args.checkpoint):
        weights = extract_encoder(distributed.load(args.checkpoint))
    temporary = target.with_suffix(".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": weights, "author": "openmixup"}, temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        raise distributed.UserError(f"{target}: cannot be written ({str(error).splitlines()[0]})") from error
    print(f"{target}: {len(weights)} tensors")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
