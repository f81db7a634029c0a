"""An extracted ResNet under detectron2's names, or one of detectron2's under ours.

Usage: python a2mim/det_detectron2/convert_backbone.py SRC DST [--back]
DST is for detectron2's MODEL.WEIGHTS (.pth, or .pkl: a pickle of arrays); with --back SRC is such a file (.pth).
"""

import argparse
import pickle
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import Tensor

from a2mim.openmixup import tensors
from common import distributed

PLACES = (  # of ours and of detectron2's: the convolutions' norms are parts of them there
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^conv1\.", "stem.conv1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def to_detectron2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ResNet under detectron2's names; mask token, classifier and counters of norms are left out."""
    result = {}
    for name, value in weights.items():
        if not name.startswith(("conv1.", "bn1.", "layer")) or name.endswith("num_batches_tracked"):
            continue
        for pattern, new in PLACES:
            name = re.sub(pattern, new, name)
        result[name] = value
    return result


def from_detectron2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, also of a detector's weights, whose encoder is `backbone.bottom_up` or `backbone`.

    C4 detectors keep res5 in `roi_heads`.
    """
    result = {}
    for name, value in weights.items():
        name = re.sub(r"^(backbone\.(bottom_up\.)?|roi_heads\.(?=res5))", "", name)
        if not name.startswith(("stem.", "res")) or name.startswith("res5.norm."):
            continue
        name = re.sub(r"^stem\.conv1\.norm\.", "bn1.", name).removeprefix("stem.")
        name = re.sub(r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}.", name)
        name = re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name)
        name = name.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")
        result[name] = value
    return result


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("src", help="checkpoint to convert")
    p.add_argument("dst", help="file to write")
    p.add_argument("--back", action="store_true", help="from detectron2's names to ours")
    return p


def main(args: argparse.Namespace) -> None:
    if args.back and args.src.endswith(".pkl"):
        raise distributed.UserError(
            f"{args.src}: a pickle can do anything when it is read; save its content by torch.save"
        )
    state = distributed.load(args.src)
    if args.back:
        found = {k: torch.as_tensor(v) for k, v in (state.get("model") or state).items()}
        converted = from_detectron2(found)
        content = {"state_dict": converted, "author": "openmixup"}
    else:
        converted = to_detectron2(distributed.part_of(tensors(state), "backbone."))
        content = {"model": converted, "__author__": "OpenMixup", "matching_heuristics": True}
    if not converted:
        raise distributed.UserError(f"{args.src}: holds no weights of a ResNet")
    try:
        if args.dst.endswith(".pkl"):
            arrays = {name: value.numpy() for name, value in converted.items()}
            Path(args.dst).write_bytes(pickle.dumps({**content, "model": arrays}))
        else:
            torch.save(content, args.dst)
    except (OSError, RuntimeError) as error:
        raise distributed.UserError(f"{args.dst}: cannot be written ({error})") from error
    distributed.log(f"{args.dst}: {len(converted)} tensors")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
