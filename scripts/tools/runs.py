"""What a run's folder holds: its log, progress, starts and checkpoints."""

import contextlib
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from common import distributed
from common.distributed.metrics import progress_name

Run = dict[int, dict[str, float]]  # values by epoch and name
LOGS = ("log.txt", "*.log.txt")
CHECKPOINTS = (
    "checkpoint.pth",
    "checkpoint_linear.pth",
    "checkpoint_attentive.pth",
    "latest.pth",
    "checkpoint.pth.tar",
    "*.temp.pth",
    "*.linear.pth",
)
METRICS = {  # by their names in logs; those of one stage share its cells
    **dict.fromkeys(("test_acc1", "val_head0_top1"), "top-1"),
    "val_mIoU": "mIoU",
    "test_box_AP": "box AP",
    "test_mask_AP": "mask AP",
    "test_J_and_F": "J&F",
}


def read_log(path: str) -> Run:
    """The finite numbers of a log.txt by epoch; torn lines are skipped, and of an epoch's lines the last one counts.

    Raises:
        UserError: the file cannot be read or has no line of a run.
    """
    file = Path(path)
    if file.is_dir():
        logs = logs_in(file)
        file = logs[0] if len(logs) == 1 else file / "log.txt"
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError as error:
        raise distributed.UserError(f"{file}: cannot be read ({error.strerror})") from error
    run: Run = {}
    for line in lines:
        try:
            values = json.loads(line)
            run[int(values["epoch"])] = {
                k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn, or no object with an epoch
    if not run:
        raise distributed.UserError(f"{file}: has no line with an epoch, expected the log.txt of a run")
    return dict(sorted(run.items()))


def logs_in(folder: Path) -> list[Path]:
    """The logs in a run's folder; SemAIM's are named after model and experiment."""
    return [path for pattern in LOGS for path in sorted(folder.glob(pattern))]


def read_progress(path: str) -> list[dict[str, float]]:
    """The lines of the progress.jsonl beside a log.txt; none if it is missing, and torn lines are skipped."""
    file, lines = Path(path).with_name(progress_name(Path(path).name)), []
    for text in file.read_text(errors="replace").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            lines.append({"at": line["epoch"] + line["step"] / line["steps"], **line})
    return lines


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts in a folder's run.json; none if it is missing or damaged."""
    try:
        starts = json.loads((folder / "run.json").read_text("utf-8"))["starts"]
        return [start for start in starts if isinstance(start.get("seconds"), int | float)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def epochs_done(state: dict[str, Any]) -> int | None:
    """Finished epochs of a checkpoint, of which some authors' files hold the number and others the last one's index."""
    meta = state.get("meta") if isinstance(state.get("meta"), dict) else {}
    counted = "epoch" in meta or "state_dict" in state or "student" in state or "teacher" in state  # type: ignore
    epoch = state.get("epoch", meta.get("epoch"))  # type: ignore[union-attr]
    return None if not isinstance(epoch, int) else epoch if counted else epoch + 1


def accuracy(folder: Path) -> float:
    """Last epoch's top-1 accuracy, percent."""
    last = list(read_log(str(folder)).values())[-1]
    return next(last[name] for name in METRICS if name in last)
