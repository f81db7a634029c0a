"""Configuration files: literal assignments of a script's flags, which the command line overrides."""

import argparse
import ast
import math
import re
import sys
from pathlib import Path
from typing import Any

from a2mim.files import STARTS
from common import distributed
from common.distributed import UserError

MAINS = {
    "a2mim": "main_pretrain.py",
    "simmim": "main_pretrain.py",
    "finetune": "main_finetune.py",
    "linear": "main_linprobe.py",
    "segmentation": "main_segmentation.py",
}
RANGES = {  # of this method's flags
    **dict.fromkeys(("save_every", "mask_patch_size", "train_size", "val_resize", "val_crop"), (1, math.inf)),
    "ema_update_interval": (1, math.inf),
    **dict.fromkeys(("save_recon_every", "recon_iters_per_epoch", "fft_weight", "mask_init"), (0, math.inf)),
    "ema_warmup_iters": (0, math.inf),
    **dict.fromkeys(("unmask_weight", "fft_unmask_weight", "ema", "warmup_ratio"), (0, 1)),
    **dict.fromkeys(("eps", "focal_alpha", "focal_gamma", "gamma"), (0, 1e9)),
    "mask_ratio": (1e-6, 1),
    "ra_level": (0, 10),
}
UPSTREAM_NAMES = {  # of --cfg-options, and the flags that say the same
    "data.imgs_per_gpu": "batch_per_gpu",
    "data.workers_per_gpu": "num_workers",
    "data.samples_per_gpu": "batch_size",
    "runner.max_epochs": "epochs",
    "runner.max_iters": "iters",
    "evaluation.interval": "eval_interval",
    "optimizer_config.update_interval": "accum",
    "lr_config.warmup_iters": "warmup_epochs",
    "model.backbone.depth": "backbone",
}


def boolean(text: str) -> bool:
    """Reads true or false (argparse type)."""
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text}: expected true or false")


def patterns(text: str) -> list[tuple[str, dict[str, float]]]:
    """Reads --paramwise (argparse type): a Python literal [("pattern", {"weight_decay": 0.0, "lr_mult": 0.1}), ...]."""
    try:
        rows = [(str(pattern), {str(k): float(v) for k, v in options.items()}) for pattern, options in literal(text)]
        if any(re.compile(pattern) and set(options) - {"weight_decay", "lr_mult", "lr"} for pattern, options in rows):
            raise ValueError("unknown option")
    except (ValueError, TypeError, AttributeError, re.error) as error:
        form = '[("pattern", {"weight_decay": 0.0, "lr_mult": 1.0}), ...]'
        raise argparse.ArgumentTypeError(f"{text}: expected {form}") from error
    return rows


def literal(text: str) -> Any:
    """The value of a Python literal; raises ValueError."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text}: is no Python literal") from error


def new_parser(title: str) -> argparse.ArgumentParser:
    """A parser of a script that takes a configuration, with what the authors' tools/train.py takes besides."""
    p = distributed.new_parser(title)
    p.usage = "%(prog)s [CONFIG] [flags], listed by --help"
    g = distributed.flag_groups(p)
    p.add_argument(
        "config", nargs="?", default="", help="file of literal assignments, name = value, of the flags below"
    )
    p.add_argument("--print_config", action="store_true", help="print the values of all flags as such a file, and exit")
    p.add_argument(
        "--cfg-options",
        "--options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="flags that win over the others: the authors' usual names, else the last part of a dotted name counts",
    )
    g.output.add_argument(
        "--work_dir",
        "--work-dir",
        "--output_dir",
        dest="output_dir",
        default=None,
        help="folder of the run's files; by default work_dirs/ and the path of the configuration",
    )
    g.process.add_argument("--resume_from", dest="resume", default=argparse.SUPPRESS, help="another name of --resume")
    g.unused.add_argument("--auto_resume", action="store_true", help="a run in --work_dir is always continued")
    g.model.add_argument("--pretrained", default="", help="checkpoint with the encoder to start from")
    g.model.add_argument("--load_checkpoint", default="", help="checkpoint with the whole network to start from")
    g.process.add_argument("--deterministic", action="store_true", help="use deterministic kernels on GPUs")
    g.unused.add_argument("--diff-seed", action="store_true", help="random draws always differ between processes")
    g.unused.add_argument("--launcher", default="none", help="the launcher is recognised by its environment")
    for flag in ("--gpus", "--gpu-id", "--port"):
        g.unused.add_argument(flag, type=int, help="the launcher decides")
    g.unused.add_argument("--gpu_ids", type=int, nargs="+", help="the launcher decides")
    return p


def read(path: str) -> dict[str, Any]:
    """The assignments of a configuration file; nothing is executed.

    Raises:
        UserError: it cannot be read, or a line is no literal assignment to one name.
    """
    try:
        tree = ast.parse(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{path}: line {line}: expected assignments, name = value") from error
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        try:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = ast.literal_eval(value)
                case _:
                    raise ValueError("no assignment to one name")
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: line {node.lineno}: expected name = value, a number, text, list ...") from error
    return values


def _cfg_options(options: list[str]) -> dict[str, Any]:
    """name=value pairs: the authors' usual names, else the last part of a dotted name."""
    values = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals:
            raise UserError(f"--cfg-options {option}: expected name=value")
        try:
            value = literal(text)
        except ValueError:
            value = text
        if name == "model.backbone.depth":
            value = f"resnet{value}"
        values[UPSTREAM_NAMES.get(name, name.split(".")[-1])] = value
    return values


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command line on top of those of its configuration. Prints them and exits for --print_config.

    Raises:
        UserError: the configuration cannot be read or names an unknown flag or value, or one is out of range.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.config:
        distributed.preset(parser, args.config, read(args.config))
        args = parser.parse_args(argv)
    if args.cfg_options:
        found = distributed.preset(parser, "--cfg-options", _cfg_options(args.cfg_options))
        args.given |= set(found)  # type: ignore[attr-defined]
        vars(args).update(found)
    starts = [f"--{name}" for name in STARTS if getattr(args, name, "")]
    if len(starts) > 1:
        raise UserError(f"{' and '.join(starts)}: expected one of them")
    if args.output_dir is None:
        args.output_dir = work_dir(args.config or args.method, args.pretrained)
    if args.print_config:
        print(to_text(parser, args), end="")
        raise SystemExit(0)
    distributed.check_ranges(args, RANGES)
    return args


def work_dir(config: str, pretrained: str = "") -> str:
    """Folder for the runs of a configuration: work_dirs/<its second folder>/<its name>[/<folder of weights>/<file>]."""
    parts, weights = Path(config).with_suffix("").parts, Path(pretrained).parts[-2:]
    return str(Path("work_dirs", *parts[1:2] if len(parts) > 2 else (), *parts[-1:], *weights))


def to_text(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The values of all flags that have an effect, as a configuration file."""
    shown: dict[str, str] = {}  # name by destination
    unused = distributed.flag_groups(parser).unused._group_actions
    for action in parser._actions:
        effective = action not in unused and action.default is not argparse.SUPPRESS
        if action.option_strings and effective and action.dest not in distributed.NOT_IN_FILES:
            shown.setdefault(action.dest, action.option_strings[0].lstrip("-"))
    return "".join(f"{name} = {getattr(args, dest)!r}\n" for dest, name in shown.items())


def script(argv: list[str]) -> str:
    """Path of the main that a command line is for, by `method` in its configuration; ends with one line if there is
    none."""
    path = next((word for word in argv if word.endswith(".py")), "")
    try:
        if not path:
            raise UserError("expected a configuration, such as configs/openmixup/pretrain/a2mim/imagenet/....py")
        method = read(path).get("method")
        if method not in MAINS:
            raise UserError(f"{path}: method {method}: expected one of {', '.join(MAINS)}")
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    return str(Path(__file__).with_name(MAINS[method]))
