"""How a program ends early: with one line and an exit status; stop signals wait until there is something to save."""

import contextlib
import signal
import sys
from collections.abc import Iterator

import torch.distributed as dist


class Exit(Exception):
    """Ends the program with one line on stderr and `status`; training saves its position first."""

    status = 1


class UserError(Exit):
    """A mistake in the command line, the data or a file: the line names the value and what was expected."""

    status = 2


@contextlib.contextmanager
def user_errors(flag: str) -> Iterator[None]:
    """Turn a complaint about a value (ValueError, or what libraries raise for one) into a UserError on `flag`."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        reason = reason or "not understood"
        raise UserError(f"{flag}: {reason}") from error


class NonFinite(Exit):
    """A loss or gradient norm is not finite; no update was made from `step` (of the epoch) on."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(f"{name} is {value}, stopping training before the update of step {step}")
        self.step = step


class Stopped(Exit):
    """A signal asked for the end of the program."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


# Windows has no SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_received: list[int] = []  # the first stop signal, if any


def _on_signal(signum: int, _frame) -> None:
    if signum == signal.SIGINT and _received:
        raise KeyboardInterrupt
    _received[:] = _received or [signum]
    if not dist.is_initialized() or dist.get_rank() == 0:
        name = signal.Signals(signum).name
        print(f"{name}: saving after this step (Ctrl-C again quits at once)", file=sys.stderr, flush=True)


def catch_signals() -> None:
    """Let SIGTERM, SIGINT and SIGUSR1 wait until a loader's next batch (`stop_signal`, `agree`)."""
    for signum in SIGNALS:
        signal.signal(signum, _on_signal)


def stop_signal() -> int:
    """The stop signal that this process received, 0 if none."""
    return _received[0] if _received else 0
