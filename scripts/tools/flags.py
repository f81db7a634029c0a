"""Command lines of the tools."""

import argparse
from typing import NoReturn

from common.distributed import UserError


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and raises a UserError, which is one line, for a wrong flag."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
