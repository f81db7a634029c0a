"""The authors' command lines of segmentation and detection, `tools/train.py CONFIG ...`, as flags of our programs.

Their configurations are files of mmseg and mmdet and not here: the name of one says for which row it is.
"""

import re
from pathlib import Path
from types import ModuleType

from common import distributed

# (base or large, epochs of pre-training) -> flags; 0 epochs: the row of a name without a number.
Rows = dict[tuple[str, int], str]

OPTIONS = {  # of --options and --cfg-options, and the flags that say the same
    "model.pretrained": "finetune",
    "model.backbone.use_checkpoint": "use_checkpoint",
    "data.samples_per_gpu": "batch_size",
    "data.workers_per_gpu": "num_workers",
    "data_root": "data_path",
    "optimizer.lr": "lr",
    "runner.max_iters": "iters",
    "runner.max_epochs": "epochs",
    "evaluation.interval": "eval_interval",
}


def row_flags(config: str, rows: Rows) -> list[str]:
    """The flags of the row that a configuration's name stands for; a learning rate in the name wins.

    Raises:
        UserError: the name holds neither base nor large, or epochs that no row has.
    """
    name = Path(config).stem
    size = re.search(r"base|large", name)
    if not size:
        raise distributed.UserError(f"{config}: expected the name of a configuration with base or large in it")
    epochs = re.search(r"(?<!\d)(300|800|1600)(?!\d|k)", name)
    row = (size[0], int(epochs[1]) if epochs else 0)
    if row not in rows:
        known = ", ".join(str(number) for kind, number in rows if kind == row[0] and number)
        raise distributed.UserError(f"{config}: {row[1]} epochs of pre-training, expected {known} for {row[0]}")
    rate = re.search(r"(?<![\d.])\d(?:\.\d+)?e-\d+", name)
    return rows[row].split() + ([f"--lr={rate[0]}"] if rate else [])


def option_flag(option: str) -> list[str]:
    """A flag for NAME=VALUE of --options; raises UserError for a name that has none."""
    name, _, value = option.partition("=")
    if name not in OPTIONS:
        raise distributed.UserError(f"--options {option}: expected {', '.join(OPTIONS)}, or one of our own flags")
    if OPTIONS[name] == "use_checkpoint":
        return ["--use_checkpoint"] if value == "True" else []
    return [f"--{OPTIONS[name]}={value}"]


def translate(words: list[str], rows: Rows, test: bool = False) -> list[str]:
    """Flags of our program for the words after tools/train.py, or, with `test`, after tools/test.py.

    Flags of our program may stand among them. Raises UserError for what cannot be understood.
    """
    ranks = [word for word in words if re.match(r"--local[-_]rank=", word)]
    words = [word for word in words if word not in ranks]
    expected = ["CONFIG", "CHECKPOINT"][: 1 + test]
    places, words = words[: len(expected)], words[len(expected) :]
    if len(places) < len(expected) or any(place.startswith("-") for place in places):
        raise distributed.UserError(f"expected {' '.join(expected)} [flags]")
    p = distributed.new_parser("tools/test.py" if test else "tools/train.py", config=False)
    p.add_argument("--work-dir", default=f"work_dirs/{Path(places[0]).stem}")
    p.add_argument("--options", "--cfg-options", nargs="+", action="extend", default=[])
    p.add_argument("--resume-from", default="")
    p.add_argument("--eval", nargs="*")  # names of the metrics
    for ignored in ("--launcher", "--gpus", "--gpu-id"):  # the launcher's environment decides
        p.add_argument(ignored)
    p.add_argument("--gpu-ids", nargs="+")
    p.add_argument("--no-validate", action="store_true")  # the evaluations cost no more than the authors'
    found, own = p.parse_known_args(words)
    flags = [*row_flags(places[0], rows), f"--output_dir={found.work_dir}"]
    for option in found.options:
        flags += option_flag(option)
    if found.resume_from:
        flags.append(f"--resume={found.resume_from}")
    return [*flags, *(["--eval", f"--resume={places[1]}"] if test else []), *own, *ranks]


def start(main: ModuleType, words: list[str], test: bool = False) -> None:
    """Run a main program, which has `ROWS`, by the authors' command line; `test`: as in `translate`."""
    distributed.run(main.main, lambda: main.get_args_parser().parse_args(translate(words, main.ROWS, test)))
