"""Command lines of the tools."""

import argparse
from typing import NoReturn

from common.distributed import UserError


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and raises a UserError, which is one line, for a wrong flag."""

    def __init__(self, title: str):
        super().__init__(title, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
