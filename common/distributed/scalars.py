"""Curves of a run by tag, for TensorBoard and, where --wandb names a project, for Weights & Biases."""

from pathlib import Path
from typing import Any

from common.distributed.exits import UserError
from common.distributed.process import log


def check_wandb(project: str) -> None:
    """Raise UserError if a project is named and the package is missing."""
    if project:
        try:
            import wandb  # type: ignore[reportMissingImports]  # noqa: F401 - takes a second to import
        except ImportError as error:
            raise UserError(f"--wandb {project}: is not installed ({error}): pip install wandb") from error


class Scalars:
    """Writes scalars to a folder; for rank 0 alone.

    Args:
        start: where the curves continue; what TensorBoard has from then on is dropped. 0 also begins a new run of
            Weights & Biases, of which the folder keeps the identifier.
        flags: of the run, of which `wandb` is the project.
    Raises:
        UserError: Weights & Biases refuses the run.
    """

    def __init__(self, folder: str, start: float, flags: dict[str, Any]):
        self.board: Any = None
        self.wandb: Any = None
        try:
            from torch.utils.tensorboard.writer import SummaryWriter  # takes a second to import

            self.board = SummaryWriter(folder, purge_step=int(start) or None)
        except ImportError as error:
            log(f"WARNING: TensorBoard cannot be imported ({error}); no events are written")
        if project := flags.get("wandb"):
            import wandb  # type: ignore[reportMissingImports]

            file = Path(folder) / "wandb.id"
            known = file.read_text() if start and file.exists() else None
            try:  # create_new: a program may have several runs
                options = {"config": flags, "id": known, "resume": "allow", "reinit": "create_new"}
                self.wandb = wandb.init(project=project, dir=folder, **options)
            except wandb.Error as error:
                why = " ".join(str(error).split())
                raise UserError(f"--wandb {project}: {why}; WANDB_MODE=offline writes to {folder} alone") from error
            self.wandb.define_metric("*", step_metric="step")  # each tag counts in units of its own
            file.write_text(self.wandb.id)

    def write(self, values: dict[str, float], step: int) -> None:
        """Add a point to the curve of every tag."""
        if self.board is not None:
            for tag, value in values.items():
                self.board.add_scalar(tag, value, step)
        if self.wandb is not None:
            self.wandb.log({**values, "step": step})

    def flush(self) -> None:
        """Bring TensorBoard's file up to date; Weights & Biases does so by itself."""
        if self.board is not None:
            self.board.flush()
