"""Command lines of the tools."""

import argparse
import contextlib
import os
from types import ModuleType
from typing import Any, NoReturn

from common.distributed import UserError


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and raises a UserError, which is one line, for a wrong flag."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def arguments(program: ModuleType, words: list[str]) -> Any:
    """A program's flags as its command line reads them; a method with a `config` reads configuration files, too."""
    parser, config = program.get_args_parser(), getattr(program, "config", None)
    return config.parse_args(parser, words) if config else parser.parse_args(words)


def run_quietly(program: ModuleType, args: Any) -> None:
    """Run a program in this process, without what it prints."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        program.main(args)
