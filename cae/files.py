"""Names of a run's files, as the authors chose them, and which of them a run continues."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cae.models_cae import name_today
from common import distributed

PROBES = ("linear", "attentive")  # stages that may share a folder with pre-training, as in the authors' scripts


def run_files(
    args: argparse.Namespace, every: int, prefix: str = "", phase: int = 1, stage: str = ""
) -> distributed.Files:
    """checkpoint.pth, and <prefix>checkpoint-<epoch>.pth; a probe has checkpoint_<stage>.pth and <stage>.log.txt.

    Args:
        every, phase: as in `distributed.Files`.
    Raises:
        distributed.UserError: the prefix is no part of a file name.
    """
    if "/" in prefix:
        raise distributed.UserError(f"--exp_name {args.exp_name}: expected a part of file names, without /")
    numbered = prefix.replace("{", "{{").replace("}", "}}") + "checkpoint-{epoch}.pth"
    own: dict[str, Any] = {"latest": f"checkpoint_{stage}.pth", "log": f"{stage}.log.txt"} if stage in PROBES else {}
    events = args.log_dir or ""
    return distributed.Files(
        **own, numbered=numbered, every=every, phase=phase, events=events, adapt=reorder_revision_a
    )


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


def stage_of(path: str) -> str:
    """The stage that wrote a checkpoint: pretrain, finetune, linear or attentive; '' if it cannot be read."""
    try:
        state = distributed.load(path)
        names = set(distributed.weights_of(state, path))
    except distributed.UserError:
        return ""
    flags = distributed.flags_of(state)
    if "discrete_vae_type" in flags or any(name.startswith(("encoder.", "pretext_neck.")) for name in names):
        return "pretrain"
    if "blr" in flags or "head.1.weight" in names:
        return "linear"
    return "attentive" if "linear_type" in flags or "query_token" in names else "finetune"


def resume_path(args: argparse.Namespace, stage: str = "pretrain") -> str:
    """The file of --resume; else, unless --no_auto_resume, the stage's newest checkpoint in --output_dir; else ''.

    A probe's is checkpoint_<stage>.pth. Numbered files, and the checkpoint.pth that earlier versions wrote for probes,
    too, are only taken where this stage wrote them.
    Raises:
        distributed.UserError: it is that of a finished probe of another encoder than --finetune.
    """
    if args.resume or not args.auto_resume or not args.output_dir:
        return args.resume
    folder, probe = Path(args.output_dir), stage in PROBES
    latest = folder / (f"checkpoint_{stage}.pth" if probe else "checkpoint.pth")
    numbered = {p: re.fullmatch(r"(?:.*_)?checkpoint-(\d+)\.pth", p.name) for p in folder.glob("*.pth")}
    epochs = {path: int(match[1]) for path, match in numbered.items() if match}
    others = [*([folder / "checkpoint.pth"] if probe else []), *sorted(epochs, key=lambda path: -epochs[path])]
    found = latest if latest.exists() else None
    for path in [] if found else [path for path in others if path.exists()]:
        own = stage_of(str(path))
        if probe and not own:
            distributed.log(f"WARNING: {path}: cannot be read; the {stage} probe does not continue it")
        if own == stage or not (own or probe):  # what cannot be read is met with an error where it is resumed
            found = path
            break
    if found and probe and args.finetune:
        _refuse_another_encoder(args, str(found))
    return str(found or "")


def _refuse_another_encoder(args: argparse.Namespace, path: str) -> None:
    state = distributed.load(path, (f"{Path(path).stem}-*.pth",))
    before = distributed.flags_of(state).get("finetune", "")
    finished = state.get("epoch") == args.epochs - 1 and not state.get("images")
    if finished and before and Path(before).resolve() != Path(args.finetune).resolve():
        raise distributed.UserError(
            f"--finetune {args.finetune}: {path} holds a finished probe of {before}; name another --output_dir"
        )


def default_folder(args: argparse.Namespace, stage: str = "pretrain") -> None:
    """Let a run save in runs/cae_<model>[_<stage>] unless it is told where: the authors' default is nowhere."""
    if not (distributed.is_given(args, "output_dir") or getattr(args, "eval", False)):
        end = "" if stage == "pretrain" else f"_{stage}"
        args.output_dir = f"runs/cae_{args.model.removeprefix('cae_')}{end}"
        distributed.log(f"no --output_dir: results go to {args.output_dir}")
