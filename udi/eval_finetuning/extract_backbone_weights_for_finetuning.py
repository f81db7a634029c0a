"""Take the backbone out of a pre-training checkpoint, for fine-tuning or elsewhere."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from torch import Tensor

from common import distributed
from udi.backbone import load_backbone
from udi.files import write_weights


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI backbone extraction")
    g = distributed.flag_groups(p)
    g.data.add_argument("--checkpoint", help="checkpoint of a pre-training, must be given")
    g.output.add_argument("--output", help="file to write, .pth, must be given")
    g.data.add_argument("--checkpoint_key", default="state_dict", help="network of the checkpoint (README: teacher)")
    g.output.add_argument(
        "--raw", action="store_true", help="names as upstream: backbone.<name in the ViT>, with the sampling module"
    )
    return p


def raw_weights(path: str, checkpoint_key: str) -> dict[str, Tensor]:
    """What the official script extracts: all weights under backbone., once without that prefix.

    Raises:
        distributed.UserError: there are none.
    """
    state = distributed.load(path)
    found = state.get(checkpoint_key)
    if not isinstance(found, dict):
        raise distributed.UserError(f"{path}: has no key '{checkpoint_key}'; its keys: {', '.join(map(str, state))}")
    names = {key: key.removeprefix("module.") for key in found}
    weights = {
        name.removeprefix("backbone."): found[key] for key, name in names.items() if name.startswith("backbone.")
    }
    if not weights:
        raise distributed.UserError(f"{path}: holds no backbone under '{checkpoint_key}'")
    return weights


def main(args: argparse.Namespace) -> None:
    if not args.checkpoint or not args.output:
        raise distributed.UserError(f"--{'output' if args.checkpoint else 'checkpoint'}: must be given")
    output = Path(args.output)
    if output.suffix != ".pth":
        raise distributed.UserError(f"--output {output}: expected a file that ends in .pth")
    if args.raw:
        weights = raw_weights(args.checkpoint, args.checkpoint_key)
    else:
        weights = load_backbone(args.checkpoint, args.checkpoint_key)
    write_weights(weights, output, "--output")
    distributed.log(f"{len(weights)} tensors of '{args.checkpoint_key}' of {args.checkpoint} are in {output}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
