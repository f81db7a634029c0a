"""Generate the documents' tables of results and of differences from the authors' code; --check only compares.

A region `<!-- rows METHOD -->` ... `<!-- end -->` holds the rows of rows.json, by method {"metrics":
{metric: title}, "rows": [{"name", "script", "published": {metric: number}, "ours": {metric: number}, "note"}]}.
`<!-- differences METHOD -->` holds the section of upstream/<method>.json (form: upstream/README.md). A method without
such data keeps its region as it is. `<!-- gpu speed -->` holds what docs/gpu_check.jsonl, a result of
scripts/gpu_check.sh, says about speed; without that file the region stays as it is.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import distributed
from common.distributed import UserError
from scripts.tools.differences import TOOLS, read_record, shared_differences
from scripts.tools.flags import METHODS, Parser
from scripts.tools.texts import table

ROOT = TOOLS.parents[1]
REGION = re.compile(r"(<!-- (rows|differences|gpu) (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
WIDTH = 120


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Generate tables of the documents")
    p.add_argument("documents", nargs="*", metavar="DOCUMENT", help="file to rewrite; default: all that have a table")
    p.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the file would change")
    return p


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def differences(method: str) -> str:
    """The section on what differs from the authors' repository, from upstream/<method>.json."""
    record = read_record(method)
    parts = []
    preface = record.get("preface", "")
    topics = [row["topic"] for row in shared_differences(record)]
    if topics:
        preface += f"{' ' if preface else ''}As for SAIM: {', '.join(topics)}. And:"
    if preface:
        parts.append(paragraph(preface))
    rows = [[row["topic"], row["upstream"], row["here"]] for row in record["differences"]]
    parts.append(table(["", "upstream", "here"], rows))
    kept = f"Kept on purpose: {'; '.join(record['kept'])}." if record.get("kept") else ""
    notes = " ".join([kept, *record.get("notes", [])]).strip()
    return "\n\n".join([*parts, *([paragraph(notes)] if notes else [])])


def read_rows(method: str) -> dict[str, Any] | None:
    """The method's part of rows.json, None if it has none.

    Raises:
        UserError: it is not of the form {metrics, rows}.
    """
    path = TOOLS / "rows.json"
    try:
        data = json.loads(path.read_text("utf-8")).get(method)
        if data is None:
            return None
        for row in data["rows"]:
            unknown = {*row["published"], *row["ours"]} - set(data["metrics"])
            if unknown or not all(isinstance(row[key], str) for key in ("name", "script")):
                raise ValueError(f"row {row['name']}: {', '.join(unknown) or 'name and script'} is unknown")
            if not (ROOT / row["script"]).is_file():
                raise ValueError(f"row {row['name']}: there is no {row['script']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {method} is not of the form metrics, rows ({error!r})") from error
    return data


def number(value: float | str) -> str:
    """A percentage with at least one decimal; a text as it is."""
    return value if isinstance(value, str) else f"{value:g}" if value != round(value) else f"{value:.1f}"


def result_rows(method: str) -> str | None:
    """The table of results; None where rows.json has none."""
    data = read_rows(method)
    if data is None:
        return None
    metrics = data["metrics"]
    measured = any(row["ours"] for row in data["rows"])
    lines = []
    for row in data["rows"]:
        numbers = [number(row["published"][m]) if m in row["published"] else "–" for m in metrics]
        ours = ", ".join(f"{number(value)} {metrics[m]}" for m, value in row["ours"].items()) or "–"
        name = f"{row['name']} ({row['note']})" if row.get("note") else row["name"]
        lines.append([name, f"`{row['script']}`", *numbers, *([ours] if measured else [])])
    titles = [f"{name}, published" for name in metrics.values()]
    return table(["row", "script", *titles, *(["measured here"] if measured else [])], lines)


def gpu_speed() -> str | None:
    """The table of speeds on a GPU; None where they were not measured.

    Raises:
        UserError: docs/gpu_check.jsonl is not what scripts/gpu_check.sh writes.
    """
    path = ROOT / "docs" / "gpu_check.jsonl"
    if not path.exists():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        done = {tuple(line["item"]): line["result"] for line in lines if line["status"] == "ok"}
        about, peaks = done[("machine",)], done[("peaks",)]
        head = ["network", "way", "batch", "images/s", "ms/step", "peak GB", "of peak"]
        keys = ["batch", "images/s", "ms", "peak GB", "of peak"]
        names = {(): "from JPEG files", ("device",): "from JPEG files, `--augment device`"}
        rows = [
            [preset, names.get(tuple(way), "".join(way)), *(f"{found[key]:g}" if key in found else "" for key in keys)]
            for (item, preset, *way), found in ((words, r) for words, r in done.items() if len(words) > 1)
            if item in ("speed", "files")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not what scripts/gpu_check.sh writes ({error!r})") from error
    measured = ", ".join(f"{name} {value:g}" for name, value in peaks.items())
    preface = paragraph(f"{about['device']}, torch {about['torch']}; {measured}.")
    return f"{preface}\n\n{table(head, sorted(rows))}"


def generate(text: str) -> str:
    """A document with its regions filled.

    Raises:
        UserError: a region names no method, or its data are wrong; one without data stays as it is.
    """

    def fill(match: re.Match[str]) -> str:
        begin, kind, method, old, end = match.groups()
        if kind == "gpu":
            new = gpu_speed()
            return match[0] if new is None else f"{begin}{new}\n{end}"
        if method not in METHODS:
            raise UserError(f"region '{kind} {method}': expected one of {', '.join(METHODS)}")
        if kind == "differences":
            new = differences(method) if (TOOLS / "upstream" / f"{method}.json").exists() else None
        else:
            new = result_rows(method)
        return match[0] if new is None else f"{begin}{new}\n{end}"

    return REGION.sub(fill, text)


def documents() -> list[Path]:
    """The Markdown files that have a table to generate."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / method / "README.md" for method in METHODS)]
    return sorted(path for path in found if path.is_file() and REGION.search(path.read_text("utf-8")))


def main(args: argparse.Namespace) -> None:
    changed = False
    for path in [Path(name) for name in args.documents] or documents():
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        if not REGION.search(text):
            raise UserError(
                f"{path}: has no region <!-- rows METHOD -->, <!-- differences METHOD --> or <!-- gpu speed -->"
            )
        new = generate(text)
        if new == text:
            print(f"{path}: nothing to change")
        elif args.check:
            pairs = zip(REGION.finditer(text), REGION.finditer(new), strict=True)
            regions = ", ".join(f"{old[2]} {old[3]}" for old, now in pairs if old[0] != now[0])
            print(f"{path}: differs from the data in {regions}; python scripts/tools/readme.py rewrites it")
            changed = True
        else:
            path.write_text(new, "utf-8")
            print(f"wrote {path}")
    if changed:
        sys.exit(1)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
