"""Python files read as syntax trees, never imported or executed: their flags, constructors and configurations."""

import argparse
import ast
import contextlib
import functools
import math
import operator
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.distributed import UserError

BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type, Callable] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
NUMBERS = {"math.inf": math.inf, "math.pi": math.pi, "np.inf": math.inf, "numpy.inf": math.inf, "torch.inf": math.inf}
CASTS: dict[str, Callable] = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": tuple}


class Source:
    """A Python file of the checkout as a syntax tree.

    Raises:
        UserError: it cannot be read or is no Python 3.
    """

    def __init__(self, root: Path, file: str):
        self.root, self.file = root, file
        try:
            self.tree = ast.parse((root / file).read_bytes())
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})") from error
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
            why = str(error).partition(" (")[0].partition("\n")[0] or "nested too deeply"
            raise UserError(f"{line}is no Python 3 ({why})") from error
        self.names: dict[str, list[ast.expr]] = {}
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                for target in targets:
                    if isinstance(target, ast.Name):
                        self.names.setdefault(target.id, []).append(node.value)

    def nodes(self, *kinds: type) -> list[Any]:
        """All nodes of these types, in the order of the text."""
        found: list[Any] = [node for node in ast.walk(self.tree) if isinstance(node, kinds)]
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of a literal or of simple arithmetic on literals; raises ValueError for anything else."""
        fold = functools.partial(self.value, depth=depth + 1)
        if depth > 40:
            raise ValueError("nested too deeply")
        match node:
            case ast.Constant():
                return node.value
            case ast.UnaryOp() if type(node.op) in UNARY:
                return UNARY[type(node.op)](fold(node.operand))
            case ast.BinOp() if type(node.op) in BINARY:
                left, right = fold(node.left), fold(node.right)
                numbers = isinstance(left, int | float) and isinstance(right, int | float)
                if not numbers and not (isinstance(node.op, ast.Add) and isinstance(left, str | list | tuple)):
                    raise ValueError("is no arithmetic on numbers")
                return BINARY[type(node.op)](left, right)
            case ast.BinOp(op=ast.Pow()):
                left, right = fold(node.left), fold(node.right)
                numbers = isinstance(left, int | float) and isinstance(right, int | float)
                if not numbers or abs(left) > 1e6 or abs(right) > 64:
                    raise ValueError("is no small power")
                return left**right
            case ast.List() | ast.Tuple() | ast.Set():
                values = [fold(item) for item in node.elts]
                return values if isinstance(node, ast.List) else tuple(values)
            case ast.Dict():
                return {fold(k): fold(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
            case ast.Call(func=ast.Name(id="dict"), args=[]):
                return {k.arg: fold(k.value) for k in node.keywords}
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in CASTS:
                return CASTS[name](fold(argument))
            case ast.Attribute() if ast.unparse(node) in NUMBERS:
                return NUMBERS[ast.unparse(node)]
            case ast.Name(id=name) if len(self.names.get(name, [])) == 1:
                return fold(self.names[name][0])
        raise ValueError("is no literal")


def fold(source: Source, node: ast.expr | None) -> tuple[bool, Any]:
    """Whether an expression has a known value, and the value or else the expression's text."""
    if node is None:
        return True, None
    try:
        return True, source.value(node)
    except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError):
        return False, shown_code(node)


def shown_code(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except RecursionError:
        return "<a deep expression>"


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples are lists."""
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain(v) for v in value]
    return {str(k): plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def equal(a: Any, b: Any) -> bool:
    """Equal as flags: 1 is 1.0 but not True."""
    a, b = plain(a), plain(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    return a == b


# ---- flags


class Flag(NamedTuple):
    """A command-line flag; `unknown` names the fields whose expressions have no known value."""

    options: tuple[str, ...]
    action: str = "store"
    type: str = ""  # none is a text
    default: Any = None
    dest: str = ""
    nargs: Any = None
    choices: Any = None
    unknown: tuple[str, ...] = ()


def normalized(flag: Flag) -> Flag:
    """With the default that argparse would take: converted by a numeric type, on or off for a switch."""
    default = flag.default
    if isinstance(default, str) and flag.type in ("int", "float") and "default" not in flag.unknown:
        with contextlib.suppress(ValueError):
            default = float(default)
    long = next((option for option in flag.options if option.startswith("--")), flag.options[0])
    dest = flag.dest or long.lstrip("-").replace("-", "_")
    return flag._replace(type="" if flag.type == "str" else flag.type, default=plain(default), dest=dest)


def effective(flags: list[Flag]) -> list[Flag]:
    """As argparse does, flags of one destination take the default of the first of them."""
    first: dict[str, Flag] = {}
    for flag in flags:
        first.setdefault(flag.dest, flag)
    shared = [first[flag.dest] for flag in flags]
    return [
        flag if flag.options == head.options else flag._replace(default=head.default, unknown=head.unknown)
        for flag, head in zip(flags, shared, strict=True)
    ]


def parser_flags(parser: argparse.ArgumentParser) -> list[Flag]:
    """The flags of one of our parsers."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(action).__name__.strip("_").removesuffix("Action")).lower()
        kind_of = action.type.__name__ if isinstance(action.type, type) else getattr(action.type, "__name__", "")
        options = tuple(action.option_strings) or (action.dest,)
        choices = (
            None if action.choices is None else [c if isinstance(c, int | float) else str(c) for c in action.choices]
        )
        nargs = action.nargs or None  # a switch has 0
        found.append(normalized(Flag(options, kind, kind_of, action.default, action.dest, nargs, choices)))
    return found


def source_flags(source: Source, depth: int = 0) -> list[Flag]:
    """The flags of every `add_argument` in a file, and in functions of the checkout that it imports and calls."""
    found: list[Flag] = []
    defaults: dict[str, tuple[bool, Any]] = {}
    for call in source.nodes(ast.Call):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            flag = source_flag(source, call, defaults)
            found += [flag] if flag else []
        elif isinstance(call.func, ast.Attribute) and call.func.attr == "set_defaults":
            new = {k.arg: fold(source, k.value) for k in call.keywords if k.arg}
            defaults |= new
            for i, flag in enumerate(found):
                if flag.dest in new:
                    known, value = new[flag.dest]
                    unknown = tuple({*flag.unknown, "default"} - ({"default"} if known else set()))
                    found[i] = normalized(flag._replace(default=value, unknown=unknown))
    called = {node.func.id for node in source.nodes(ast.Call) if isinstance(node.func, ast.Name)}
    for node in source.nodes(ast.ImportFrom) if depth < 2 else []:
        names = {alias.name for alias in node.names if (alias.asname or alias.name) in called}
        for file in imported_files(source, node) if names else []:
            with contextlib.suppress(UserError):
                other = Source(source.root, file)
                for function in other.tree.body:
                    if isinstance(function, ast.FunctionDef) and function.name in names:
                        other.tree = ast.Module([function], [])
                        found += source_flags(other, depth + 1)
                        other = Source(source.root, file)
    return found


def imported_files(source: Source, node: ast.ImportFrom) -> list[str]:
    """Files of the checkout that `from module import ...` may mean."""
    module = (node.module or "").replace(".", "/")
    here = Path(source.file).parent
    folders = [here, Path()] if not node.level else [Path(*here.parts[: len(here.parts) - node.level + 1])]
    files = [(folder / f"{module}.py").as_posix() for folder in folders if module]
    return [file for file in dict.fromkeys(files) if (source.root / file).is_file()]


def source_flag(source: Source, call: ast.Call, defaults: dict[str, tuple[bool, Any]]) -> Flag | None:
    """The flag of one add_argument call; None if its name is no literal."""
    options = []
    for argument in call.args:
        known, value = fold(source, argument)
        if not known or not isinstance(value, str):
            return None
        options.append(value)
    if not options:
        return None
    given = {k.arg: k.value for k in call.keywords if k.arg}
    fields: dict[str, Any] = {}
    unknown = [] if len(given) == len(call.keywords) else ["action", "type", "default", "nargs", "choices"]
    for key in ("action", "default", "dest", "nargs", "choices"):
        if key in given:
            known, fields[key] = fold(source, given[key])
            if key == "dest" and not isinstance(fields[key], str):
                del fields[key]
            elif key == "action" and not known:
                fields[key] = fields[key].split(".")[-1]  # a class
            elif not known:
                unknown.append(key)
    if "type" in given:
        text = shown_code(given["type"])
        fields["type"] = (
            "<lambda>" if isinstance(given["type"], ast.Lambda) else text.split(".")[-1].replace("None", "")
        )
    flag = Flag(tuple(options), **fields)
    if "default" not in fields:
        implied = {"store_true": False, "store_false": True}.get(flag.action)
        known, value = defaults.get(normalized(flag).dest, (True, implied))
        flag = flag._replace(default=value)
        unknown += [] if known else ["default"]
    return normalized(flag._replace(unknown=tuple(unknown)))


def shown(value: Any) -> str:
    try:
        return repr(plain(value))
    except ValueError:  # Python refuses to print very long integers
        return "<a huge number>"


def flag_changes(theirs: Flag, ours: Flag) -> list[str]:
    """What differs between a flag of theirs and ours, where both are known.

    Not a difference: choices of ours that theirs has not, and a side without a list.
    """
    changes = []
    for field in ("action", "type", "default", "nargs", "choices"):
        a, b = getattr(theirs, field), getattr(ours, field)
        if field in theirs.unknown or field in ours.unknown:
            continue
        if field == "choices" and (a is None or b is None or set(map(str, a)) <= set(map(str, b))):
            continue
        if not equal(a, b):
            changes.append(f"{field} {shown(a)}, here {shown(b)}")
    return changes


def summary(flag: Flag) -> str:
    """A flag's type and default, or the action of a switch."""
    if flag.action != "store":
        return flag.action
    return f"{flag.type or 'str'} {flag.default if 'default' in flag.unknown else shown(flag.default)}"


# ---- classes, functions, constructors

Value = tuple[bool, Any] | None  # (known, value or its text); None: a parameter without default


class Definition(NamedTuple):
    """A class's constructor or a function."""

    keywords: dict[str, Value]  # parameters with their defaults, and what the call that a function returns passes on
    inherited: dict[str, Value]  # parameters of the class of the same file that it calls
    open: bool  # takes any keyword, for a class that is defined elsewhere
    constants: list[Any]  # numbers in the bodies, apart from small whole ones

    def get(self, key: str) -> Value:
        return self.keywords[key] if key in self.keywords else self.inherited.get(key)

    def has(self, key: str) -> bool:
        return key in self.keywords or key in self.inherited


def find_definition(source: Source, name: str, depth: int = 0) -> Definition | None:
    """A class, function, `Class.method`, module-level name or `DICT.key` of a file; None if it is not there."""
    first, _, rest = name.partition(".")
    node = next((n for n in definitions_in(source.tree.body) if getattr(n, "name", "") == first), None)
    if node is None and first in source.names and depth < 5:
        value: Any = source.names[first][-1]
        value = config_item(value, rest) if rest else value
        if isinstance(value, ast.Name):
            return find_definition(source, value.id, depth + 1)
        return None if value is None else describe(source, value, {}, False, depth)
    if isinstance(node, ast.ClassDef):
        methods = {n.name: n for n in definitions_in(node.body) if isinstance(n, ast.FunctionDef)}
        method = methods.get(rest or "__init__")
        if rest and method is None:
            return None
        body: Any = method if rest else node
        found = parameters(source, method, skip_self=True) if method else {}
        return Definition(found, {}, takes_any(method), constants(body))
    if not isinstance(node, ast.FunctionDef) or rest:
        return None
    return describe(source, node, parameters(source, node, False), takes_any(node), depth)


def definitions_in(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Classes and functions, those inside `if` and `try`, too; the last definition of a name comes first."""
    left = list(body)
    while left:
        node = left.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            left += [*node.orelse, *node.body]


def takes_any(node: Any) -> bool:
    return node is not None and node.args.kwarg is not None


def parameters(source: Source, node: Any, skip_self: bool) -> dict[str, Value]:
    positional = [*node.args.posonlyargs, *node.args.args]
    first = [None] * (len(positional) - len(node.args.defaults))
    pairs = [*zip(positional, [*first, *node.args.defaults], strict=True)]
    pairs = pairs[1 if skip_self else 0 :] + [*zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return {argument.arg: None if default is None else fold(source, default) for argument, default in pairs}


def describe(source: Source, node: Any, own: dict[str, Value], open_: bool, depth: int) -> Definition:
    """A function with its own parameters, or an expression: with what it passes to the class that it calls."""
    results = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
    names = {n.id for n in results if isinstance(n, ast.Name)}
    results += [
        n.value
        for n in ast.walk(node)
        if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id in names for t in n.targets)
    ]
    call = next((n for n in [node, *results] if isinstance(n, ast.Call)), None)
    passed = keywords(source, call) if call else {}
    passed = {key: own.get(value[1]) or value if not value[0] else value for key, value in passed.items()}
    classes = {n.name for n in definitions_in(source.tree.body) if isinstance(n, ast.ClassDef)}
    named = [n.id for n in [call.func, *call.args[:1]] if isinstance(n, ast.Name)] if call else []
    target = next((name for name in named if name in classes), None)
    found = find_definition(source, target, depth + 1) if target else None
    inherited = found.keywords if found else {}
    numbers = [] if call else constants(node)  # what a factory passes on is compared
    return Definition({**own, **passed}, inherited, open_ and (found is None or found.open), numbers)


def keywords(source: Source, call: ast.Call) -> dict[str, tuple[bool, Any]]:
    """Keywords of a call, those of `**{...}` included."""
    found: dict[str, tuple[bool, Any]] = {}
    for keyword in call.keywords:
        if keyword.arg:
            found[keyword.arg] = fold(source, keyword.value)
        elif isinstance(keyword.value, ast.Dict):
            pairs = zip(keyword.value.keys, keyword.value.values, strict=True)
            found |= {str(k.value): fold(source, v) for k, v in pairs if isinstance(k, ast.Constant)}
    return found


def constants(node: ast.AST) -> list[Any]:
    """Fractions and numbers above 8 in a body, sorted: momenta, epsilons, widths."""
    signatures = [n.args for n in ast.walk(node) if isinstance(n, ast.FunctionDef)]
    defaults = {id(d) for a in signatures for tree in [*a.defaults, *a.kw_defaults] if tree for d in ast.walk(tree)}
    numbers: set[Any] = {
        n.value
        for n in ast.walk(node)
        if isinstance(n, ast.Constant) and type(n.value) in (int, float) and id(n) not in defaults
    }
    return sorted(n for n in numbers if n > 8 or n != int(n)) if all(map(math.isfinite, numbers)) else []


# ---- configuration files


def config_value(source: Source, path: list[str], seen: set[str] | None = None) -> tuple[bool, Any] | None:
    """The value at a dotted path of an mmcv configuration; None if neither it nor its `_base_` files have it."""
    seen = {source.file} if seen is None else seen
    node: Any = (source.names.get(path[0]) or [None])[-1]
    for key in path[1:]:
        alone = node is not None and config_item(node, "_delete_") is not None
        node = config_item(node, key) if node is not None else None
        if node is None and alone:
            return None  # nothing of the base files is merged into it
    if node is not None:
        known, value = fold(source, node)
        return known and "{{" not in str(value), value
    bases = fold(source, (source.names.get("_base_") or [None])[-1])[1]
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, list | tuple) else []:
        file = os.path.normpath(Path(source.file).parent / str(base))
        if file not in seen and not file.startswith(("..", "/")) and (source.root / file).is_file():
            seen.add(file)
            with contextlib.suppress(UserError):
                found = config_value(Source(source.root, file), path, seen)
                if found is not None:
                    return found
    return None


def config_item(node: ast.expr, key: str) -> ast.expr | None:
    if isinstance(node, ast.Call):
        return next((k.value for k in node.keywords if k.arg == key), None)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return next((v for k, v in pairs if isinstance(k, ast.Constant) and k.value == key), None)
    if isinstance(node, ast.List | ast.Tuple) and key.isdigit() and int(key) < len(node.elts):
        return node.elts[int(key)]
    return None
