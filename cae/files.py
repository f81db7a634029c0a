"""Names of a run's files, as the authors chose them, and which of them a run continues."""

import argparse
import re
from pathlib import Path

from common import distributed


def run_files(args: argparse.Namespace, every: int, prefix: str = "", phase: int = 1) -> distributed.Files:
    """checkpoint.pth, and <prefix>checkpoint-<epoch>.pth; every, phase: as in `distributed.Files`.

    Raises:
        distributed.UserError: the prefix is no part of a file name.
    """
    if "/" in prefix:
        raise distributed.UserError(f"--exp_name {args.exp_name}: expected a part of file names, without /")
    numbered = prefix.replace("{", "{{").replace("}", "}}") + "checkpoint-{epoch}.pth"
    return distributed.Files(numbered=numbered, every=every, phase=phase, events=args.log_dir or "")


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
