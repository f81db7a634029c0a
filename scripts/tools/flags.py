"""Command lines of the tools, and of the methods' programs inside a tool."""

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NoReturn

from common.distributed import UserError

METHODS = ("saim", "semaim", "cae", "a2mim", "udi")
NETWORK = ("model", "arch", "backbone")  # flags that name a network


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and raises a UserError, which is one line, for a wrong flag."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def arguments(program: ModuleType, words: list[str]) -> Any:
    """A program's flags as its command line reads them; A2MIM's read configuration files and recipes, too."""
    if hasattr(program, "parse_args"):
        return program.parse_args(words)
    parser, config = program.get_args_parser(), getattr(program, "config", None)
    return config.parse_args(parser, words) if config else parser.parse_args(words)


def network_of(flags: Mapping[str, Any]) -> str:
    """Name of the network in a run's flags; '' without one."""
    return next((str(flags[name]) for name in NETWORK if flags.get(name)), "")


@contextlib.contextmanager
def writing(what: str, *further: type[Exception]) -> Iterator[None]:
    """Turn what a full or forbidden disk causes, and what `further` causes, into a UserError on a flag or argument."""
    try:
        yield
    except (OSError, *further) as error:
        raise UserError(f"{what}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def run_quietly(program: ModuleType, args: Any) -> None:
    """Run a program in this process, without what it prints."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        program.main(args)
