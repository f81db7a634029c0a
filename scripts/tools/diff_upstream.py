"""Compare a checkout of the authors' repository with this project: files, flags, constructors, and a checkpoint.

Nothing of the checkout is imported or executed; its Python files are read as syntax trees. What it holds is read from
it, what is ours is read from our code. upstream/<method>.json names what belongs together and where the two differ on
purpose; upstream/README.md says how.

Exit status: 0, 1 if anything is unexpected, 2 for a user's mistake.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import Tensor, nn

from common import distributed
from common.distributed import UserError
from scripts.tools import flags, sources
from scripts.tools.differences import Dict, differences, read_record
from scripts.tools.encoders import load as encoders
from scripts.tools.flags import METHODS, network_of
from scripts.tools.sources import NO_DEFAULT, NO_KEYWORD, Expression, Flag, Source, equal, shown

ROOT = Path(__file__).resolve().parents[2]
SAME, MAPPED, PURPOSE, UNEXPECTED = "same", "mapped", "on purpose", "unexpected"
SKIPPED, UNJUDGED = "not compared", "not judged"
STATUSES = (SAME, MAPPED, PURPOSE, UNEXPECTED, SKIPPED, UNJUDGED)
ONLY_HERE, NO_FLAG = "only this project has it", "no such flag"


class Row(NamedTuple):
    """One thing compared: what it is, the file of the checkout, its name there, and what was found."""

    kind: str  # file, flag, definition, config, checkpoint
    where: str
    name: str
    status: str
    upstream: str = ""
    here: str = ""
    why: str = ""


def get_args_parser() -> argparse.ArgumentParser:
    p = flags.Parser("Compare with the authors' repository")
    p.add_argument("method", choices=METHODS, help="whose authors' repository it is")
    p.add_argument("--upstream", required=True, metavar="DIR", help="checkout of the authors' repository")
    p.add_argument("--checkpoint", default="", metavar="FILE", help="also compare this checkpoint, theirs or ours")
    p.add_argument("--flags", default="", help="flags of the checkpoint's network, for what the file does not say")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    p.add_argument("--all", action="store_true", help="also list what is the same, and every flag that is only ours")
    return p


# ---- the recorded differences


class Judge:
    """What is recorded about the differences of one part; `why` holds the texts of reasons that have an id."""

    def __init__(self, part: Dict, why: dict[str, str], read: list[str] | None = None):
        self.why, self.read = why, read
        differs = part.get("differs", {}).items()
        self.known = {name: (reason, theirs) for reason, names in differs for name, theirs in names.items()}

    def text(self, reason: str) -> str:
        return self.why.get(reason, reason)

    def __call__(self, name: str, theirs: str, text: str = "") -> tuple[str, str]:
        """Status and reason of a difference: on purpose if it is recorded and theirs is as recorded."""
        reason, recorded = next((v for k, v in self.known.items() if fnmatchcase(name, k)), ("", ""))
        if reason and recorded in (None, theirs):
            return PURPOSE, self.text(reason).removeprefix(f"`{name}`: ")
        if reason:
            return UNEXPECTED, f"the pinned commit has {recorded}"
        return (UNEXPECTED if self.read is None or name in self.read else UNJUDGED), text or "no reason is recorded"


# ---- flags, definitions, configuration files


def function(place: str, default: str = "") -> Callable:
    """Our function "folder/file.py:name"."""
    file, _, name = place.partition(":")
    return getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name or default)


@functools.cache
def our_flags(here: str) -> list[Flag]:
    """The flags of our files "file.py" or "file.py:function", several separated by ", "."""
    parsers = [function(place, "get_args_parser")() for place in here.split(", ") if place]
    return [flag for parser in parsers for flag in sources.effective(sources.parser_flags(parser))]


def compare_flags(file: str, part: Dict, source: Source, why: dict[str, str]) -> Iterator[Row]:
    """Each flag of one parser, theirs and ours."""
    judge, ours, told, names = Judge(part, why), our_flags(part.get("here", "")), set(), part.get("names", [])
    theirs = {flag.options: flag for flag in sources.effective(sources.source_flags(source))}
    present = {option for options in theirs for option in options}
    for name in names:
        if name not in present:
            mine = next((flag.summary() for flag in ours if name in flag.options), NO_FLAG)
            yield Row("flag", file, name, UNEXPECTED, "is gone", mine, "the pinned commit has it")
    for options, flag in theirs.items():
        mine = next((f for f in ours if set(f.options) & set(options)), None)
        name = next((option for option in options if option in names), ", ".join(options))
        # Flags of one destination have the default of the first, which is compared there.
        changes = flag.changes(mine, flag.dest in told) if mine else [NO_FLAG]
        told.add(flag.dest)
        if "why" in part:
            found = PURPOSE, judge.text(part["why"])
        elif name not in names:
            found = UNEXPECTED, "is new: the pinned commit has no such flag"
        elif changes:
            found = judge(name, flag.summary(), "; ".join(changes) if mine else "")
        elif "default" in flag.unknown:
            found = SKIPPED, f"its default is computed: {flag.default}"
        else:
            found = SAME, f"here one of {shown(mine.choices)}" if mine and mine.choices and not flag.choices else ""
        yield Row("flag", file, name, found[0], flag.summary(), mine.summary() if mine else NO_FLAG, found[1])
    for flag in ours:
        if not {*names, *present} & set(flag.options):
            yield Row("flag", file, flag.options[0], PURPOSE, NO_FLAG, flag.summary(), ONLY_HERE)


def compare_definition(name: str, part: Dict, source: Source, judge: Judge) -> Iterator[Row]:
    """One constructor or function: the keywords that it takes and passes on, theirs and ours."""
    row, here = functools.partial(Row, "definition", source.file), part["here"]
    theirs = sources.find_definition(source, name)
    our_file, _, our_name = here.partition(":")
    if theirs is None:
        yield row(name, UNEXPECTED, "is gone", here, "the pinned commit defines it")
    elif "why" in part:
        yield row(name, PURPOSE, name, here or "nothing", judge.text(part["why"]))
    elif (ours := sources.find_definition(our_source(our_file), our_name)) is None:
        yield row(name, UNEXPECTED, name, here, "is recorded here, but is not there")
    else:
        same, rows = 0, []
        for key in dict.fromkeys([*theirs.keywords, *ours.keywords]):
            a, b = theirs.get(key), ours.get(key)
            lacking = [side for side, value in ((theirs, a), (ours, b)) if value is NO_KEYWORD]
            if lacking and lacking[0].open:
                continue
            expressions = [isinstance(value, Expression) for value in (a, b)]
            if not lacking and (shown(a) == shown(b) or (not any(expressions) and equal(a, b))):
                same += 1
                continue
            neither = not {id(NO_KEYWORD), id(NO_DEFAULT)} & {id(a), id(b)}
            status, text = (SKIPPED, "an expression") if any(expressions) and neither else judge(key, shown(a))
            rows.append(row(f"{name}({key})", status, shown(a), shown(b), text))
        if same or not rows:
            yield row(name, SAME, f"{same} keywords", here)
        yield from rows
        if theirs.constants:
            a, b = (", ".join(map(shown, side.constants[:12])) for side in (theirs, ours))
            yield row(name, SKIPPED, a, b, "numbers in the body")


@functools.cache
def our_source(file: str) -> Source:
    return Source(ROOT, file)


@functools.cache
def our_config(file: str) -> Dict:
    """The assignments of one of our configuration files; a list of pairs is a dict."""
    values = {name: our_source(file).fold(nodes[-1]) for name, nodes in our_source(file).names.items()}
    return {k: dict(v) if isinstance(v, list) and v and isinstance(v[0], tuple) else v for k, v in values.items()}


def compare_config(here: str, values: Dict, source: Source, judge: Judge) -> Iterator[Row]:
    """The values of one configuration file of theirs, and ours."""
    row, ours, same, alone = functools.partial(Row, "config", source.file), our_config(here), 0, []
    for path, rule in values.items():
        name, words = (rule, {}) if isinstance(rule, str) else rule
        found, mine = sources.config_value(source, path.split(".")), at(ours, name)
        if found is NO_KEYWORD or mine is None:
            alone += [path] if found is not NO_KEYWORD else [name] if mine is not None else []
        elif isinstance(found, Expression):
            yield row(path, SKIPPED, found, f"{name} {shown(mine)}", "an expression")
        elif any(equal(one, mine) or near(one, mine) for one in words.get(str(found), [found])):
            same += 1
        else:
            status, text = judge(f"{source.file}: {path}", shown(found))
            yield row(path, status, shown(found), f"{name} {shown(mine)}", text)
    if alone:
        yield row("set on one side only", SKIPPED, ", ".join(alone), "", "by default on the other")
    yield row(f"{same} values", SAME, "", here)


def near(a: Any, b: Any) -> bool:
    """Equal numbers but for rounding: some of theirs are quotients."""
    return isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-12 * abs(b)


def at(state: Any, dotted: str) -> Any:
    """The entry of nested dicts under a dotted key; None if there is none."""
    for key in dotted.split(".") if dotted else []:
        state = vars(state) if isinstance(state, argparse.Namespace) else state
        state = state.get(key) if isinstance(state, dict) else None
    return state


# ---- the checkout


def config_pairs(folders: dict[str, str], files: list[str]) -> dict[str, str]:
    """Their configuration files and ours of the same name; the first folder that matches counts."""
    pairs = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        ours = next((here for pattern, here in folders.items() if matches(folder, pattern)), None)
        if ours and (ROOT / ours / name).is_file():
            pairs[file] = f"{ours}/{name}"
    return pairs


def files_of(root: Path) -> list[str]:
    """Python and shell files, relative, hidden folders left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        path = Path(folder).relative_to(root)
        found += [(path / name).as_posix() for name in sorted(names) if name.endswith((".py", ".sh"))]
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in found]


def matches(path: str, pattern: str) -> bool:
    """* stays inside a folder, ** does not."""
    if "*" not in pattern:
        return path == pattern
    parts = (re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]") for part in pattern.split("**"))
    return re.fullmatch(".*".join(parts).replace(".*/", "(.*/)?"), path) is not None


def git(root: Path, *words: str) -> str:
    """What git says of a checkout; "" if it has no git folder or git cannot say it."""
    command = ["git", "-C", str(root), "-c", "core.fsmonitor=false", *words]  # starts no program of the checkout
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists():
            done = subprocess.run(command, capture_output=True, timeout=60, check=True)
            return done.stdout.decode("utf-8", "replace")
    return ""


def git_commit(root: Path) -> str:
    """The commit of a checkout; "" if it is not known."""
    return git(root, "rev-parse", "--verify", "--quiet", "HEAD").strip()


def recognise(record: Dict, root: Path, commit: str) -> Dict:
    """The repository that a folder is a checkout of; raises UserError if it is no folder, or none of them."""
    if not root.is_dir():
        what = "is no folder" if root.exists() else "no such folder"
        raise UserError(f"--upstream {root}: {what}, expected a checkout")

    def share(repository: Dict) -> float:
        paths = [p for p, f in repository["files"].items() if "*" not in p and "optional" not in f[2:]]
        return sum((root / path).is_file() for path in paths) / max(len(paths), 1)

    repositories = record["repositories"]
    missing = [[mark for mark in r["marks"] if not (root / mark).exists()] for r in repositories]
    found = [r for r in repositories if commit.startswith(r["commit"])]
    found += [r for r, lacking in zip(repositories, missing, strict=True) if not lacking]
    found += [r for r in [max(repositories, key=share)] if share(r) > 0.75]
    if not found:
        pairs = zip(repositories, missing, strict=True)
        names = " or ".join(f"{r['url']} (no {', '.join(lacking[:3])})" for r, lacking in pairs)
        raise UserError(f"--upstream {root}: is no checkout of {names}")
    return found[0]


def compare_files(repository: Dict, files: list[str], pairs: dict[str, str]) -> Iterator[Row]:
    """Each pattern with what it means here; then files that none matches, whole unknown folders in one line."""

    def row(where: str, status: str, upstream: str, here: str, why: str) -> Row:
        return Row("file", where, "", status, upstream, here or "nothing", why)

    yield from (row(file, MAPPED, "", here, "recipe") for file, here in pairs.items())
    patterns, configs = repository["files"], repository["configs"]
    match = {f: next((p for p in patterns if matches(f, p)), "") for f in files if f not in pairs}
    for pattern, (here, role, *word) in patterns.items():
        found, status = [f for f in match if match[f] == pattern], MAPPED if here else PURPOSE
        if found:
            many = [pattern + (f" ({len(found)} files)" if "*" in pattern else "")]
            yield from (row(where, status, "", here, role) for where in (found if word == ["each"] else many))
        elif "*" not in pattern and word != ["optional"] and pattern.endswith((".py", ".sh")):
            yield row(pattern, UNEXPECTED, "is gone", here, f"the pinned commit has it: {role}")
    for ours in configs.get("folders", {}).values():
        for path in sorted((ROOT / ours).glob("*.py")):
            file = f"{ours}/{path.name}"
            if file not in pairs.values() and not any(fnmatchcase(file, p) for p in configs.get("absent", [])):
                yield row(path.name, UNEXPECTED, "is gone", file, "the pinned commit has such a recipe")
    known = {str(p) for f in match if match[f] for p in Path(f).parents}
    known |= {str(p) for pattern in patterns if "*" not in pattern for p in Path(pattern).parents}
    groups: dict[str, list[str]] = {}
    for file in (f for f in match if not match[f] and Path(f).name != "__init__.py"):
        unknown = [f"{p}/" for p in Path(file).parents if str(p) not in known]
        groups.setdefault([file, *unknown][-1], []).append(file)
    for name, members in groups.items():
        where = members[0] if len(members) == 1 else f"{name} ({len(members)} files)"
        yield row(where, UNEXPECTED, "is new", "", "the pinned commit has no such file")


def compare_checkout(
    method: str, record: Dict, root: Path, commit: str, edited: Iterable[str] = ()
) -> tuple[Dict, list[Row]]:
    """The repository that `root` is, and everything compared with it.

    Args:
        commit: of the checkout; "" if it is not known.
        edited: its files that are locally modified.
    Raises:
        UserError: `root` is no checkout of the authors' repositories.
    """
    repository, files = recognise(record, root, commit), files_of(root)
    why = {row["id"]: f"{row['topic']}: {row['here'] or 'not here'}" for row in differences(record)}
    configs = repository["configs"]
    pairs = config_pairs(configs.get("folders", {}), files)
    rows = list(compare_files(repository, files, pairs))  # what is gone is a row here, and not again below

    @functools.cache
    def parsed(file: str) -> list[Source]:
        try:
            return [Source(root, file)] if file in files else []
        except UserError as error:
            status = SKIPPED if file in repository.get("unparsable", []) else UNEXPECTED
            rows.append(Row("file", file, "", status, str(error), "", "cannot be parsed there"))
            return []

    for file, part in repository["flags"].items():
        for source in parsed(file):
            rows += compare_flags(file, part, source, why)
    for place, names in repository["definitions"].items():
        places = [file for pattern in place.split(", ") for file in files if matches(file, pattern)]
        known = [source for file in places for source in parsed(file)]
        for name, part in names.items() if known else ():
            source = next((source for source in known if sources.find_definition(source, name)), known[0])
            judge = Judge(part, why, part.get("read", repository.get("read")))
            rows += compare_definition(name, part, source, judge)
    for file, here in pairs.items():
        for source in parsed(file):
            rows += compare_config(here, record["values"], source, Judge(configs, why))
    if repository.get("unread"):
        rows = [row._replace(status=UNJUDGED) if row.status == UNEXPECTED else row for row in rows]
    return repository, [r._replace(why=f"locally modified; {r.why}") if r.where in edited else r for r in rows]


# ---- a checkpoint


def recognise_checkpoint(kinds: list[Dict], state: Dict, path: str) -> tuple[Dict, dict[str, Tensor]]:
    """The first known format of a checkpoint, and its weights; raises UserError if there is none."""
    for kind in kinds:
        holds = all(at(state, key) is not None for key in kind.get("holds", []))
        for found in [at(state, key) for key in kind.get("weights", [""])] if holds else []:
            items = found.items() if isinstance(found, dict) else ()
            weights = {str(k).removeprefix("module."): v for k, v in items if isinstance(v, Tensor)}
            prefix = kind.get("prefix", "")
            if any(k.startswith(prefix) for k in weights):
                weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            marked = all(any(k.startswith(mark) for k in weights) for mark in kind["marks"])
            if weights and marked and not any(k.startswith(tuple(kind.get("without", ()))) for k in weights):
                for old, new in kind.get("rename", {}).items():
                    weights = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in weights.items()}
                return kind, weights
    keys = ", ".join(map(str, list(state)[:6])) or "none"
    known = ", ".join(kind["kind"] for kind in kinds) or "none"
    raise UserError(f"{path}: is no checkpoint of a kind that is known here ({known}); its keys: {keys}")


def inferred(rule: Dict, weights: dict[str, Tensor]) -> Any:
    """A flag's value read from the weights; None if they do not say it."""
    if "blocks" in rule:
        stack = rule["blocks"] + "."
        return len({k.removeprefix(stack).split(".")[0] for k in weights if k.startswith(stack)}) or None
    if "size" in rule:
        key, axis = rule["size"]
        size = weights[key].shape[axis] if key in weights and weights[key].ndim > axis else None
        return rule["names"].get(str(size)) if "names" in rule else size
    return rule.get("yes" if any(k.startswith(rule["has"]) for k in weights) else "no")


def network_flags(kind: Dict, state: Dict, weights: dict[str, Tensor], given: str) -> argparse.Namespace:
    """The flags that describe a checkpoint's network: its own, read from it, or given."""
    parser = function(kind["flags"], "get_args_parser")()
    args = parser.parse_args([])
    method = kind["flags"].split("/")[0]
    recipe = at(state, kind["recipe"]) if "recipe" in kind else None
    for file in sorted((ROOT / method / "configs").rglob(Path(str(recipe)).name)) if recipe else []:
        args = importlib.import_module(f"{method}.config").parse_args(parser, [str(file)])
    stored = at(state, "args")
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored if isinstance(stored, dict) else {}
    for name, rule in {} if recipe else kind.get("infer", {}).items():
        value = inferred(rule, weights)
        if value is not None and name not in stored:
            setattr(args, name, value)
    for name, value in stored.items():
        if isinstance(value, list | tuple) and len(set(value)) == 1 and str(name).endswith("_size"):
            value = value[0]  # upstream keeps a side as (height, width)
        if hasattr(args, str(name)):
            setattr(args, str(name), value)
    known = {name: at(state, key) for name, key in kind.get("set", {}).items()}
    known = {name: value for name, value in known.items() if isinstance(value, str | int | float)}
    vars(args).update({**known, **kind.get("fixed", {})})

    def error(message: object) -> None:
        raise UserError(f"--flags {given}: {message}")

    try:
        parser.error = error  # type: ignore[method-assign]
        return parser.parse_args(shlex.split(given), args)
    except ValueError as wrong:
        raise UserError(f"--flags {given}: {wrong}") from wrong


def build(places: list[str], args: argparse.Namespace, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """The network of the flags, and of the weights where its builder takes them; each further function changes it."""
    builder, *changes = map(function, places)
    takes_weights = weights is not None and "weights" in inspect.signature(builder).parameters
    model = builder(args, weights=weights) if takes_weights else builder(args)
    for change in changes:
        change(model)
    return model


def our_network(kind: Dict, args: argparse.Namespace, weights: dict[str, Tensor], path: str) -> nn.Module:
    """Our network of a checkpoint's flags, without memory where its initialisation allows; raises UserError."""
    why = ""
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), contextlib.redirect_stdout(io.StringIO()):
                return build(kind["build"], args, weights)
        except (Exception, SystemExit) as error:  # whatever flags that do not fit together raise
            why = str(error).partition("\n")[0] if isinstance(error, UserError | RuntimeError) else repr(error)
    raise UserError(f"{path}: its flags make no network here: {why}; --flags overrides them")


def compare_checkpoint(method: str, record: Dict, path: str, given: str) -> list[Row]:
    """What a checkpoint holds, and what our network and our loader take of it.

    Raises:
        UserError: the file is missing, damaged, or of no known kind; or its flags describe no network of ours.
    """
    row = functools.partial(Row, "checkpoint", path)
    state = distributed.load(path)
    kind, weights = recognise_checkpoint(record.get("checkpoints", []), state, path)
    args = network_flags(kind, state, weights, given)
    network = ", ".join(filter(None, (kind["build"][0], network_of(vars(args)))))
    rows = [row("format", SAME, f"{kind['kind']}, {len(weights)} tensors", network)]
    model = our_network(kind, args, weights, path)
    part = model.get_submodule(kind.get("part", ""))
    own = function(kind["names"])(part) if "names" in kind else part.state_dict()
    own = {key: value for key, value in own.items() if isinstance(value, Tensor)}
    whole = part is model and set(own) <= set(weights)
    own, weights = (
        {key: value for key, value in tensors.items() if not any(fnmatchcase(key, p) for p in kind.get("ignore", []))}
        for tensors in (own, weights)
    )
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    matched = len(own) - len(missing) - len(shapes)
    rows.append(row("matched", SAME, f"{matched} of {len(own)} tensors, by name and shape"))
    for what, keys in (("missing", missing), ("not in our network", unexpected), ("of another shape", shapes)):
        first = ", ".join(f"{k} {tuple(weights[k].shape)}" if k in weights else k for k in keys[:4])
        first += f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        here = ", ".join(f"{k} {tuple(own[k].shape)}" for k in keys[:2]) if keys is shapes else ""
        rows += [row(f"{len(keys)} {what}", UNEXPECTED, first, here)] if keys else []
    if whole and not unexpected and not shapes:
        rows.append(row("loads", SAME, "strictly", "a run continues from it with --resume"))
    return rows + ([encoder_row(method, path)] if kind.get("encoder") else [])


def encoder_row(method: str, path: str) -> Row:
    """What fine-tuning, probes and tools take of a pre-training checkpoint, by loading it."""
    row = functools.partial(Row, "checkpoint", path, "encoder")
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            backbone = encoders.load_backbone(method, path)
    except UserError as error:
        return row(UNEXPECTED, str(error))
    said = out.getvalue().strip().rpartition("\n")[2]
    return row(
        SAME, said.split(": ", 1)[-1], f"scripts/tools/encoders/{method}.py:load_backbone, {backbone.model_name}"
    )


# ---- output

SECTIONS = {
    PURPOSE: 'different on purpose, see README "Differences"',
    UNJUDGED: "differs, but what the pinned commit has was not known when the differences were written down",
    SKIPPED: "not compared",
    SAME: "same",
}


def table(rows: list[Row]) -> list[str]:
    """Rows as lines, below each file: the name, both sides, the reason."""
    cells, lines, where = [], [], ""
    for row in rows:
        if row.kind == "file":
            cells.append((f"  {row.where}", f"{row.upstream or '->'}  {row.here}", row.why))
        else:
            cells.append((f"    {row.name}", f"{row.upstream} | {row.here}" if row.here else row.upstream, row.why))
    widths = [min(max(map(len, column)), 60) for column in zip(*cells, strict=True)]
    for row, (name, sides, why) in zip(rows, cells, strict=True):
        lines += [f"  {row.where}"] if row.where != where and row.kind != "file" else []
        where = row.where
        lines.append(f"{name:<{widths[0]}}  {sides:<{widths[1]}}  {why}".rstrip())
    return lines


def report(head: list[str], behaviour: list[str], rows: list[Row], everything: bool) -> str:
    """All rows by status, as text; the differences in behaviour stand below the flags."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    counts = Counter((row.kind, row.status) for row in rows)
    lines = [*head, "", " " * 14 + "".join(f"{status:>14}" for status in STATUSES)]
    lines += [f"{kind + 's':<14}" + "".join(f"{counts[kind, status]:>14}" for status in STATUSES) for kind in kinds]
    bad = [row for row in rows if row.status == UNEXPECTED]
    for kind in kinds:
        part = [row for row in rows if row.kind == kind and row.status != UNEXPECTED]
        own: dict[str, list[str]] = {}
        if kind in ("file", "checkpoint"):
            found = table(part) if part else []
        else:
            for row in part if not everything else []:
                if row.why == ONLY_HERE:
                    own.setdefault(row.where, []).append(row.name)
            part = [row for row in part if everything or row.status != SAME and row.why != ONLY_HERE]
            found = []
            for status, title in SECTIONS.items():
                some = [row for row in part if row.status == status]
                found += [f" {title}", *table(some)] if some else []
        found += [" only here (--all lists their defaults)"] if own else []
        found += [f"  {file}: {', '.join(names)}" for file, names in own.items()]
        sides = "what plays their role here" if kind == "file" else "theirs | ours, and why"
        lines += ["", f"{kind.capitalize()}s: {sides}", *found] if found else []
        lines += ["", "Behaviour: theirs | ours", *behaviour] if kind == "flag" or kinds == ["file"] else []
    return "\n".join([*lines, "", f"Unexpected: {len(bad) or 'none'}", *(table(bad) if bad else [])])


def say(text: str) -> None:
    """Print; quietly if the reader, such as `head`, has enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor at the end of the program


def main(args: argparse.Namespace) -> None:
    root, record = Path(args.upstream), read_record(args.method)
    commit = git_commit(root)
    edited = [name for name in git(root, "diff", "--name-only", "-z", "HEAD").split("\0") if name]
    repository, rows = compare_checkout(args.method, record, root, commit, edited)
    if args.checkpoint:
        rows += compare_checkpoint(args.method, record, args.checkpoint, args.flags)
    elif args.flags:
        raise UserError(f"--flags {args.flags}: describe the network of a --checkpoint, which is not given")
    counts = Counter(row.status for row in rows)
    if args.json:
        result = {
            "method": args.method,
            "repository": {key: repository[key] for key in ("name", "url", "commit", "licence")},
            "checkout": {"folder": str(root), "commit": commit or None, "locally modified": edited},
            "counts": {status: counts[status] for status in STATUSES},
            "rows": [row._asdict() for row in rows],
        }
        say(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        pinned = repository["commit"]
        is_pinned = commit.startswith(pinned)
        verb = "is" if is_pinned else "against"
        head = [f"{args.method}: {root} {verb} {repository['url']} at commit {pinned[:12]}"]
        if not commit:
            head.append("NOTE: the checkout's commit is not known (no git folder)")
        elif not is_pinned:
            head.append(f"NOTE: the checkout is at commit {commit[:12]}, this project was made from {pinned[:12]}")
        head += [f"NOTE: locally modified: {', '.join(edited)}"] if edited else []
        behaviour = [f"  {d['topic']}: {d['upstream']} | {d['here'] or 'not here'}" for d in differences(record)]
        say(report(head, behaviour, rows, args.all))
    if counts[UNEXPECTED]:
        sys.exit(1)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
