"""Texts for people: amounts, times, and tables in Markdown."""

from collections.abc import Iterable, Sequence


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", r"\|") for cell in line] for line in (head, *rows)]
    lines = ["".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in cells]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
