"""The command line of a program: flags that all have, their ranges, and how main() ends."""

import argparse
import contextlib
import difflib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch.distributed as dist
import yaml  # which timm needs, too

from common.distributed.exits import Exit, UserError, stop_signal
from common.distributed.process import rank, world_size
from common.distributed.scalars import check_wandb

Ranges = dict[str, tuple[float, float]]  # smallest and largest value by flag; NaN fits nowhere


RANGES: Ranges = {  # of flags that several methods have
    **dict.fromkeys(["batch_size", "batch_size_per_gpu", "epochs", "accum_iter", "update_freq"], (1, math.inf)),
    **dict.fromkeys(["input_size", "patch_size", "save_freq", "recount", "in_chans"], (1, math.inf)),
    **dict.fromkeys(("num_workers", "start_epoch", "warmup_epochs", "saveckp_freq"), (0, math.inf)),
    **dict.fromkeys(("lr", "blr", "min_lr", "weight_decay", "weight_decay_end", "mixup", "cutmix"), (0, 1e9)),
    **dict.fromkeys(("drop_path", "drop_path_rate"), (0, 1 - 1e-9)),
    **dict.fromkeys(["momentum", "model_ema_decay", "smoothing", "reprob", "mixup_prob", "mixup_switch_prob"], (0, 1)),
    **dict.fromkeys(("clip_grad", "temperature"), (1e-12, math.inf)),
    "layer_decay": (1e-12, 1),
    "nb_classes": (0, 1e7),
    "seed": (0, 2**32 - 1),
}


def check_ranges(args, ranges: Ranges = RANGES) -> None:
    """Raise UserError for a flag outside of its range; flags that are None are not set."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"--{name} {value}: expected {expected}")
    minmax = getattr(args, "cutmix_minmax", None)
    if minmax is not None and not (len(minmax) == 2 and 0 <= minmax[0] < minmax[1] <= 1):
        raise UserError(f"--cutmix_minmax {' '.join(map(str, minmax))}: expected two shares, 0 to 1, increasing")


def run(main: Callable, args) -> None:
    """Check the flags' ranges and call main(args); an `Exit` becomes one line and its exit status.

    Args:
        args: the flags, or what makes them.
    """
    try:
        args = args() if callable(args) else args
        check_ranges(args)
        check_wandb(getattr(args, "wandb", ""))
        if getattr(args, "verbose", False) and os.environ.get("RANK", "0") == "0":
            print(vars(args), flush=True)
        main(args)
    except Exit as end:
        if rank() > 0:  # an error that all ranks share is printed by rank 0, whose end takes the others along
            time.sleep(2)
        if rank() == 0 or not stop_signal():
            where = f"[rank {rank()}] " if world_size() > 1 else ""
            line = f"{where}{Path(sys.argv[0]).name}: {end}"
            print(line, file=sys.stderr, flush=True)
            if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends with a traceback and this line
                about = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
                Path(file).write_text(json.dumps({"message": about}))
        sys.exit(end.status)
    except KeyboardInterrupt:  # what is worth saving was saved at the first one
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(130)
    except RuntimeError as error:
        if world_size() == 1 or "Connection closed by peer" not in str(error):
            raise
        print(f"[rank {rank()}] another process ended; see its message", file=sys.stderr, flush=True)
        sys.exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's text, unless there is none or the text itself says what holds by default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.nargs == 0 or action.default in (None, "") or "default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


# The argument groups of a program's flags by name, in the order in which --help shows their titles.
GROUPS = {
    "data": "images",
    "model": "network and loss",
    "optimizer": "optimizer and schedule",
    "augmentation": "augmentation and regularization",
    "output": "output and evaluation",
    "process": "device, precision and resuming",
    "unused": "without effect, accepted so that the authors' command lines work",
}


NOT_IN_FILES = ("help", "config", "config_file", "print_config", "cfg_options")  # what a configuration cannot set


class Flags(argparse.Namespace):
    """Parsed flags, and the names of those that were given; `vars` are the flags alone."""

    __slots__ = ("given",)

    def __reduce__(self) -> tuple:
        """Pickled, as in a checkpoint, they are a plain namespace, which files may hold."""
        return argparse.Namespace, (), dict(vars(self))


class _Parser(argparse.ArgumentParser):
    preset: frozenset[str] = frozenset()  # flags that a configuration file gave

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        for word, after in zip(words, [*words[1:], ""], strict=False):
            option, _, file = word.partition("=")
            if option == "--config" and "--config" in self._option_string_actions and (file := file or after):
                try:
                    _apply(self, file)
                except UserError as error:
                    self.exit(error.status, f"{Path(sys.argv[0]).name}: --config {error}\n")
        flags, rest = super().parse_known_args(words, namespace or Flags())
        vars(flags).pop("config_file", None)
        names = {word.split("=")[0] for word in words}
        if isinstance(flags, Flags):
            given = {a.dest for option, a in self._option_string_actions.items() if option in names}
            flags.given = (given | self.preset) - {"config_file"}
        return flags, rest


class _Value(argparse.ArgumentParser):
    """Reads the value of one flag of another parser."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def is_given(args: argparse.Namespace, name: str) -> bool:
    """Whether a flag was given and is no default; values that no command line was read for count as given."""
    return name in getattr(args, "given", (name,))


def check_default_file(args: argparse.Namespace, name: str) -> None:
    """Raise UserError if a flag was not given and its default, a path of the authors, is not there."""
    path = getattr(args, name)
    if path and not is_given(args, name) and not Path(path).exists():
        raise UserError(f"--{name}: expected a checkpoint; it is not given, and its default {path} does not exist")


# ---- configuration files


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags that a file may set, by each of their names and by the name under which run.json has them."""
    actions = [action for action in parser._actions if action.option_strings and action.dest not in NOT_IN_FILES]
    names = {option.lstrip("-").replace("-", "_"): action for action in actions for option in action.option_strings}
    return {action.dest: action for action in actions} | names


def _read(action: argparse.Action, name: str, value: Any) -> Any:
    """A flag's value as the command line would give it; raises UserError."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{name} {value}: expected True or False")
        turns_off = name != action.dest and (action.const is False or name.startswith("no_"))
        return value != turns_off
    if isinstance(value, list | tuple | dict) and action.nargs is None and action.type in (None, str):
        raise UserError(f"{name} {value}: expected a text")
    many = action.nargs is not None and isinstance(value, list | tuple)
    option = action.option_strings[0]
    parser = _Value(add_help=False, allow_abbrev=False)
    parser._add_action(action)
    return getattr(parser.parse_args([option, *map(str, value)] if many else [f"{option}={value}"]), action.dest)


def preset(
    parser: argparse.ArgumentParser, where: str, values: dict[str, Any], given: set[str] | None = None
) -> dict[str, Any]:
    """Give flags other values, as a file does, and return them as parsed: the command line wins over them.

    Args:
        where: begins the line of a mistake.
        values: by the flags' names; None where that is the default.
        given: names of those that count as given; None: all. Of a run's record, where any value may be None.
    Raises:
        UserError: there is no such flag, or it takes no such value.
    """
    known, found = _options(parser), {}
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UserError(f"{where}: {name} is no flag of this script, see --help{hint}")
    for name, value in values.items():
        action = known[name]
        default = parser.get_default(action.dest)
        if value is None and given is None and default is not None:
            raise UserError(f"{where}: {name} None: expected a value")
        is_default = name == action.dest and (type(value), value) == (type(default), default)
        try:
            found[action.dest] = value if value is None or is_default else _read(action, name, value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        action.required = False
    parser.set_defaults(**found)
    parser.preset |= set(found) if given is None else given & set(found)  # type: ignore[attr-defined]
    return found


def _content(path: str) -> Any:
    """What a JSON or YAML file holds; raises UserError."""
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text file") from error
    with contextlib.suppress(ValueError):
        return json.loads(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise UserError(f"{path}: line {line}: is neither YAML nor JSON") from error


def _apply(parser: argparse.ArgumentParser, path: str) -> None:
    """Preset the flags of a file: a mapping from names to values, or a run's run.json, of which its last start counts.

    From run.json come also the flags that were not given, such as the number of classes that the run found, but not
    the launcher's and others without effect, nor the checkpoint from which a stopped run went on.
    Raises:
        UserError: it cannot be read, or `preset` refuses it.
    """
    content = _content(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected flags and their values, name: value")
    if "starts" not in content:
        preset(parser, path, content)
        return
    try:
        first, last = content["starts"][0], content["starts"][-1]
        flags, given = {**last["flags"], "resume": first["flags"].get("resume", "")}, set(last.get("given", ()))
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: has no flags of a run") from error
    known = _options(parser)
    skipped = {action.dest for action in flag_groups(parser).unused._group_actions} | set(NOT_IN_FILES)
    flags = {name: v for name, v in flags.items() if name not in skipped and (name in known or name in given)}
    preset(parser, path, flags, given)


def new_parser(title: str, config: bool = True) -> _Parser:
    """A parser that takes no abbreviations, whose help shows the defaults, and whose flags know if they were given.

    config: whether it takes --config.
    """
    usage = "%(prog)s [flags], listed by --help"
    parser = _Parser(title, allow_abbrev=False, usage=usage, formatter_class=_Help)
    if config:
        files = "JSON or YAML file of flags, name: value, or the run.json of a run to repeat; the command line wins"
        parser.add_argument("--config", dest="config_file", default=argparse.SUPPRESS, metavar="FILE", help=files)
    return parser


def flag_groups(parser: argparse.ArgumentParser) -> SimpleNamespace:
    """The argument groups of a parser by their names in `GROUPS`; the first call makes them."""
    known = {group.title: group for group in parser._action_groups}
    groups = {name: known.get(title) or parser.add_argument_group(title) for name, title in GROUPS.items()}
    return SimpleNamespace(**groups)


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say on what a program runs."""
    g, launched = flag_groups(parser), "the launcher's environment decides"
    g.process.add_argument("--device", default="auto", help="auto (CUDA if present, else cpu), cpu, cuda or cuda:N")
    g.output.add_argument("--verbose", action="store_true", help="print the values of all flags at the start")
    g.unused.add_argument("--local_rank", "--local-rank", default=-1, type=int, help=launched)
    g.unused.add_argument("--dist_on_itp", action="store_true", help="OpenMPI is recognised by its environment")
    g.unused.add_argument("--dist_url", default="env://", help=launched)


def add_flags(parser: argparse.ArgumentParser, counts_epochs: bool = True, pretrains: bool = False) -> None:
    """Add the flags that say on what a training program runs, and how it resumes.

    Args:
        counts_epochs: False where the run counts updates and has no epoch to start at.
        pretrains: whether it may start from the weights of any program (`initial_weights`).
    """
    add_launch_flags(parser)
    g = flag_groups(parser)
    precision = "precision of forward passes; auto: fp32 on a CPU, on a GPU bf16 where it has it, else fp16"
    g.process.add_argument("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help=precision)
    g.process.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    g.process.add_argument("--seed", default=0, type=int, help="seed of all random draws")
    latest = "checkpoint to continue from; by default the latest one in --output_dir, if any"
    g.process.add_argument("--resume", default="", help=latest)
    if pretrains:
        start = "weights to start a new run from: of a pre-training, or an encoder of any program (docs/own_domain.md)"
        g.process.add_argument("--initial_checkpoint", default="", help=start)
        again = "save memory: the backward pass computes the insides of the blocks again, which takes more time"
        g.process.add_argument("--use_checkpoint", action="store_true", help=again)
    g.process.add_argument("--force", action="store_true", help="train even if the memory is estimated to be too small")
    project = "project of Weights & Biases that gets TensorBoard's scalars, too; WANDB_MODE=offline needs no account"
    g.output.add_argument("--wandb", default="", metavar="PROJECT", help=project)
    first = "epoch to start at when the checkpoint does not say it, counted from 0"
    if counts_epochs:
        g.process.add_argument("--start_epoch", default=0, type=int, help=first)
    g.unused.add_argument("--world_size", default=1, type=int, help="the launcher's environment decides")
