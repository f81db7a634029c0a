"""Where evaluations leave their files, beside the weights that they evaluate, and weights under upstream's names."""

import argparse
import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from common import distributed


def folder_beside(weights: str, *parts: str) -> str:
    """A folder beside a file of weights; in the current one for an https address."""
    parent = Path() if weights.startswith(("http://", "https://")) else Path(weights).parent
    return str(parent.joinpath(*parts))


def write_weights(weights: dict[str, Tensor], path: Path, flag: str) -> None:
    """Write weights to a file, which is whole or not there; its folder is created.

    Args:
        flag: that named the file, for messages.
    Raises:
        distributed.UserError: it cannot be written.
    """
    weights = {name: value.clone() for name, value in weights.items()}  # not what they were views of
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(weights, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = " ".join(str(error).split())
        raise distributed.UserError(f"{flag} {path}: cannot be written ({reason})") from error


class TextLog:
    """Prints lines, and appends them to a file as `INFO:<line>`; rank 0 does both, and an error ends all ranks.

    Args:
        folder: is created; '' only prints.
    Raises:
        distributed.UserError: it cannot be written.
    """

    def __init__(self, folder: str, name: str):
        self.path = Path(folder) / name if folder else None

    def __call__(self, line: str) -> None:
        distributed.main_does(lambda: self.write(line))

    def write(self, line: str) -> None:
        """For rank 0 alone, when the others have ended."""
        distributed.log(line)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(f"INFO:{line}\n")
        except OSError as error:
            raise distributed.UserError(f"{self.path}: cannot be written ({error.strerror})") from error


class Prefixed:
    """A module's state under upstream's names: DistributedDataParallel puts `module.` in front."""

    def __init__(self, module: nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        return {f"module.{name}": value for name, value in self.module.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state_dict)


def default_folder(args: argparse.Namespace, stage: str = "pretrain") -> None:
    """Let a pre-training save in runs/udi_<arch> unless told where: the authors' default is the working directory.

    Other stages have folders of their own.
    """
    if stage == "pretrain" and not distributed.is_given(args, "output_dir"):
        args.output_dir = f"runs/udi_{args.arch}"
        distributed.log(f"no --output_dir: results go to {args.output_dir}")
