"""Names of a run's files, as the authors chose them, and which of them a run continues."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cae.models_cae import name_today
from common import distributed


def run_files(args: argparse.Namespace, every: int, prefix: str = "", phase: int = 1) -> distributed.Files:
    """checkpoint.pth, and <prefix>checkpoint-<epoch>.pth; every, phase: as in `distributed.Files`.

    Raises:
        distributed.UserError: the prefix is no part of a file name.
    """
    if "/" in prefix:
        raise distributed.UserError(f"--exp_name {args.exp_name}: expected a part of file names, without /")
    numbered = prefix.replace("{", "{{").replace("}", "}}") + "checkpoint-{epoch}.pth"
    events = args.log_dir or ""
    return distributed.Files(numbered=numbered, every=every, phase=phase, events=events, adapt=reorder_revision_a)


def reorder_revision_a(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Bring the optimizer's state in a file of the authors' earlier revision into today's order, in place.

    States refer to parameters by their places in the optimizer's groups, which are in the order of the modules. That of
    the earlier revision is another one, the order of the file's weights; its attentive block has a norm more.
    Raises:
        ValueError: a group of the file does not hold the parameters that its weights name.
    """
    old = list(distributed.weights_of(state, "the file"))
    names = [re.sub(r"^(attentive_blocks\.\d+)\.norm1_", r"\1.norm_", name_today(name)) for name in old]
    if names == old:
        return
    own = {id(p): name for name, p in model.named_parameters()}
    groups = [[own[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    saved = state["optimizer"]["param_groups"]
    reordered = []
    for group, inside in zip(optimizer.param_groups, groups, strict=True):
        decayed = group["weight_decay"] > 0
        alike = [g for g in saved if (g["weight_decay"] > 0) == decayed] if len(saved) == len(groups) else []
        theirs = alike[0] if alike else {"params": []}
        lost = [] if decayed else [n for n in names if re.match(r"attentive_blocks\.\d+\.norm2_cross\.", n)]
        listed = [name for name in names if name in inside or name in lost]
        if len(listed) != len(theirs["params"]):
            raise ValueError(
                f"a group of the earlier revision has {len(theirs['params'])} parameters, not {len(listed)}"
            )
        places = dict(zip(listed, theirs["params"], strict=True))
        for name in lost:
            state["optimizer"]["state"].pop(places[name], None)
        reordered.append({**theirs, "params": [places[name] for name in inside]})
    state["optimizer"]["param_groups"] = reordered


def resume_path(args: argparse.Namespace) -> str:
    """The file of --resume; else, unless --no_auto_resume, the newest checkpoint of --output_dir; else ''."""
    if args.resume or not args.auto_resume or not args.output_dir:
        return args.resume
    found = distributed.find_checkpoint(args.output_dir, "")
    if found:
        return found
    numbered = {p: re.fullmatch(r"(?:.*_)?checkpoint-(\d+)\.pth", p.name) for p in Path(args.output_dir).glob("*.pth")}
    epochs = {str(path): int(match[1]) for path, match in numbered.items() if match}
    return max(epochs, key=lambda path: epochs[path], default="")
