"""The authors' command lines of segmentation and detection, `tools/train.py CONFIG ...`, as flags of our programs.

Their configurations are files of mmsegmentation and mmdetection and not here: the name of one says which row it is.
"""

import re
from pathlib import Path
from types import ModuleType

from common import distributed

OPTIONS = {  # of --options and --cfg-options, and the flags that say the same
    "model.pretrained": "pretrained",
    "data.samples_per_gpu": "batch_size",
    "data.workers_per_gpu": "num_workers",
    "data_root": "data_path",
    "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay",
    "runner.max_iters": "iters",
    "runner.max_epochs": "epochs",
    "evaluation.interval": "eval_interval",
}


def row_flags(config: str, rows: dict[str, str]) -> list[str]:
    """The flags of the first row whose pattern is in a configuration's name, whatever its folder.

    Raises:
        UserError: it is not the name of one.
    """
    found = [flags for pattern, flags in rows.items() if re.search(pattern, Path(config).stem)]
    if not found:
        raise distributed.UserError(f"{config}: expected the name of one of the authors' configurations")
    return found[0].split()


def option_flag(option: str) -> str:
    """The flag for NAME=VALUE of --options; raises UserError for a name that has none."""
    name, _, value = option.partition("=")
    if name not in OPTIONS:
        raise distributed.UserError(f"--options {option}: expected {', '.join(OPTIONS)}, or one of our own flags")
    return f"--{OPTIONS[name]}={value}"


def translate(words: list[str], rows: dict[str, str], test: bool = False) -> list[str]:
    """Flags of our program for the words after tools/train.py, or, with `test`, after tools/test.py.

    Args:
        words: flags of our program may stand among them.
        rows: flags of a row, but for the defaults, as `row_flags` finds them.
    Raises:
        UserError: they cannot be understood.
    """
    # The launcher puts the rank in front of what it was given.
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
    p.add_argument("--load-from", default="")
    p.add_argument("--aug-test", action="store_true")
    p.add_argument("--eval", nargs="*")  # names of the scores
    for ignored in ("--launcher", "--gpus", "--gpu-id"):  # the launcher's environment decides
        p.add_argument(ignored)
    p.add_argument("--gpu-ids", nargs="+")
    # Runs resume by themselves, and the evaluations cost no more than the authors'.
    for ignored in ("--no-validate", "--auto-resume", "--diff_seed", "--diff-seed"):
        p.add_argument(ignored, action="store_true")
    found, own = p.parse_known_args(words)
    flags = [*row_flags(places[0], rows), f"--output_dir={found.work_dir}", *map(option_flag, found.options)]
    flags += [f"--{OPTIONS['model.pretrained']}={found.load_from}"] if found.load_from else []
    flags += [f"--resume={found.resume_from}"] if found.resume_from else []
    flags += ["--tta"] if found.aug_test else []
    return [*flags, *(["--eval", f"--resume={places[1]}"] if test else []), *own, *ranks]


def start(main: ModuleType, words: list[str], test: bool = False) -> None:
    """Run a main program, which has `ROWS` and `parse_args`, by the authors' command line; `test`: see `translate`."""
    asked = bool({"-h", "--help"} & set(words))
    distributed.run(main.main, lambda: main.parse_args(["-h"] if asked else translate(words, main.ROWS, test)))
