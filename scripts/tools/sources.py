"""Python files read as syntax trees, never imported or executed: their flags, constructors and configurations."""

import argparse
import ast
import contextlib
import math
import operator
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.distributed import UserError

OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
NUMBERS = {"math.inf": math.inf, "math.pi": math.pi, "np.inf": math.inf, "numpy.inf": math.inf, "torch.inf": math.inf}
CASTS: dict[str, Callable] = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": tuple}


class Expression(str):
    """The text of an expression whose value is not known."""


NO_DEFAULT, NO_KEYWORD = Expression("no default"), Expression("no such keyword")


class Source:
    """A Python file of a checkout as a syntax tree.

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
        self.names: dict[str, list[ast.expr]] = defaultdict(list)
        for node in self.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in [*getattr(node, "targets", []), getattr(node, "target", None)]:
                    if isinstance(target, ast.Name):
                        self.names[target.id].append(node.value)

    def last(self, name: str) -> ast.expr | None:
        """What is assigned last to a name of the module."""
        return self.names[name][-1] if name in self.names else None

    def calls(self) -> list[ast.Call]:
        """In the order of the text."""
        found = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def fold(self, node: ast.expr | None) -> Any:
        """The value of a literal or of simple arithmetic on literals; else the Expression."""
        try:
            return None if node is None else self._value(node)
        except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError):
            with contextlib.suppress(RecursionError):
                return Expression(ast.unparse(node))  # type: ignore[arg-type]
            return Expression("<a deep expression>")

    def _value(self, node: ast.expr) -> Any:
        value = self._value
        match node:
            case ast.Constant():
                return node.value
            case ast.UnaryOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](value(node.operand))
            case ast.BinOp() if type(node.op) in OPERATORS:
                a, b = value(node.left), value(node.right)
                small = not isinstance(node.op, ast.Pow) or (abs(a) <= 1e6 and abs(b) <= 64)
                numbers = isinstance(a, int | float) and isinstance(b, int | float)
                if (numbers and small) or (isinstance(node.op, ast.Add) and isinstance(a, str | list | tuple)):
                    return OPERATORS[type(node.op)](a, b)
            case ast.List() | ast.Tuple() | ast.Set():
                return (list if isinstance(node, ast.List) else tuple)(map(value, node.elts))
            case ast.Dict():
                return {value(k): value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
            case ast.Call(func=ast.Name(id="dict"), args=[]):
                return {k.arg: value(k.value) for k in node.keywords}
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in CASTS:
                return CASTS[name](value(argument))
            case ast.Attribute() if ast.unparse(node) in NUMBERS:
                return NUMBERS[ast.unparse(node)]
            case ast.Name(id=name) if len(self.names.get(name, [])) == 1:
                return value(self.names[name][0])
        raise ValueError("is no literal")


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
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def shown(value: Any) -> str:
    try:
        return str(value) if isinstance(value, Expression) else repr(plain(value))
    except ValueError:  # Python refuses to print very long integers
        return "<a huge number>"


# ---- flags


class Flag(NamedTuple):
    """A command-line flag; a field whose value is not known is an Expression."""

    options: tuple[str, ...]
    action: str
    type: str  # "" is a text
    default: Any
    dest: str
    nargs: Any
    choices: Any

    @property
    def unknown(self) -> tuple[str, ...]:
        return tuple(name for name, value in self._asdict().items() if isinstance(value, Expression))

    def changes(self, ours: "Flag", told: bool = False) -> list[str]:
        """What differs in our flag, where both are known; told: its default has been compared already.

        Not a difference: choices of ours that theirs has not, and a side without a list.
        """
        changes = []
        for field in ("action", "type", "default", "nargs", "choices"):
            a, b = getattr(self, field), getattr(ours, field)
            if field in self.unknown or field in ours.unknown or (told and field == "default"):
                continue
            if field == "choices" and (a is None or b is None or set(map(str, a)) <= set(map(str, b))):
                continue
            if not equal(a, b):
                changes.append(f"{field} {shown(a)}, here {shown(b)}")
        return changes

    def summary(self) -> str:
        """Type and default, or the action of a switch."""
        return f"{self.type or 'str'} {shown(self.default)}" if self.action == "store" else self.action


def as_flag(options: tuple[str, ...], given: dict[str, Any], defaults: dict[str, Any]) -> Flag:
    """The flag that argparse makes of `add_argument(*options, **given)` after `set_defaults(**defaults)`."""
    long = next((option for option in options if option.startswith("--")), options[0])
    dest = given["dest"] if type(given.get("dest")) is str else long.lstrip("-").replace("-", "_")
    action = str(given.get("action", "store")).split(".")[-1]
    kind = str(given.get("type") or "str")
    kind = "<lambda>" if kind.startswith("lambda") else kind.split(".")[-1]
    default = given.get("default", defaults.get(dest, {"store_true": False, "store_false": True}.get(action)))
    if type(default) is str and kind in ("int", "float"):
        with contextlib.suppress(ValueError):
            default = float(default)
    kind = "" if kind == "str" else kind
    return Flag(options, action, kind, plain(default), dest, given.get("nargs"), given.get("choices"))


def effective(flags: list[Flag]) -> list[Flag]:
    """As argparse does, flags of one destination take the default of the first of them."""
    first: dict[str, Flag] = {}
    heads = [(flag, first.setdefault(flag.dest, flag)) for flag in flags]
    return [flag if flag.options == head.options else flag._replace(default=head.default) for flag, head in heads]


def parser_flags(parser: argparse.ArgumentParser) -> list[Flag]:
    """The flags of one of our parsers."""
    found = []
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            name = type(action).__name__.strip("_").removesuffix("Action")
            given = {"action": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(), "dest": action.dest}
            given |= {"type": getattr(action.type, "__name__", ""), "default": action.default}
            given |= {"nargs": action.nargs or None}  # a switch has 0
            given |= {"choices": None if action.choices is None else list(action.choices)}
            found.append(as_flag(tuple(action.option_strings) or (action.dest,), given, {}))
    return found


def source_flags(source: Source, depth: int = 0) -> list[Flag]:
    """The flags of every `add_argument` in a file, and in functions of the checkout that it imports and calls.

    A flag whose name is no literal is left out; the default of one that takes `**others` is not known.
    """
    found: list[Flag] = []
    defaults: dict[str, Any] = {}
    for call in source.calls():
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if method in ("add_argument", "set_defaults"):
            given = {k.arg or "default": source.fold(k.value) for k in call.keywords}
            options = tuple(map(source.fold, call.args))
            if method == "set_defaults":
                defaults |= given
                found = [flag._replace(default=plain(given.get(flag.dest, flag.default))) for flag in found]
            elif options and all(type(option) is str for option in options):
                found.append(as_flag(options, given, defaults))
    called = {call.func.id for call in source.calls() if isinstance(call.func, ast.Name)}
    imports = [node for node in ast.walk(source.tree) if isinstance(node, ast.ImportFrom)] if depth < 2 else []
    for node in imports:
        names = {alias.name for alias in node.names if (alias.asname or alias.name) in called}
        for file in imported_files(source, node) if names else []:
            with contextlib.suppress(UserError):
                other = Source(source.root, file)
                for function in other.tree.body:
                    if isinstance(function, ast.FunctionDef) and function.name in names:
                        part = Source(source.root, file)
                        part.tree = ast.Module([function], [])
                        found += source_flags(part, depth + 1)
    return found


def imported_files(source: Source, node: ast.ImportFrom) -> list[str]:
    """Files of the checkout that `from module import ...` may mean."""
    here = Path(source.file).parent
    folders = [here, Path()] if not node.level else [Path(*here.parts[: len(here.parts) - node.level + 1])]
    module = (node.module or "").replace(".", "/")
    files = [(folder / f"{module}.py").as_posix() for folder in folders if module]
    return [file for file in dict.fromkeys(files) if (source.root / file).is_file()]


# ---- classes, functions, constructors


class Definition(NamedTuple):
    """A class's constructor or a function; a default that is not known is an Expression."""

    keywords: dict[str, Any]  # parameters with their defaults, and what the call that a function returns passes on
    inherited: dict[str, Any]  # parameters of the class of the same file that it calls
    open: bool  # takes any keyword, for a class that is defined elsewhere
    constants: list[Any]  # numbers in the bodies, apart from small whole ones

    def get(self, key: str) -> Any:
        return {**self.inherited, **self.keywords}.get(key, NO_KEYWORD)


def find_definition(source: Source, name: str, depth: int = 0) -> Definition | None:
    """A class, function, `Class.method`, module-level name or `DICT.key` of a file; None if it is not there."""
    first, _, rest = name.partition(".")
    node: Any = next((n for n in definitions_in(source.tree.body) if n.name == first), None)
    if isinstance(node, ast.ClassDef):
        methods = {n.name: n for n in definitions_in(node.body) if isinstance(n, ast.FunctionDef)}
        method = methods.get(rest or "__init__")
        if method is None:
            return None if rest else Definition({}, {}, False, constants(node))
        own = parameters(source, method)
        own.pop(next(iter(own), ""), None)  # self
        return Definition(own, {}, method.args.kwarg is not None, constants(method if rest else node))
    if isinstance(node, ast.FunctionDef) and not rest:
        return describe(source, node, parameters(source, node), node.args.kwarg is not None, depth)
    value = source.last(first) if node is None and depth < 5 else None
    value = config_item(value, rest) if rest else value
    if isinstance(value, ast.Name):
        return find_definition(source, value.id, depth + 1)
    return None if value is None else describe(source, value, {}, False, depth)


def definitions_in(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """Classes and functions, those inside `if` and `try`, too; the last definition of a name comes first."""
    left = list(body)
    while left:
        node = left.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            left += [*node.orelse, *node.body]


def parameters(source: Source, node: ast.FunctionDef) -> dict[str, Any]:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + [*args.defaults, *args.kw_defaults]
    pairs = zip([*positional, *args.kwonlyargs], defaults, strict=True)
    return {argument.arg: NO_DEFAULT if default is None else source.fold(default) for argument, default in pairs}


def describe(source: Source, node: ast.AST, own: dict[str, Any], open_: bool, depth: int) -> Definition:
    """A function with its own parameters, or an expression: with what it passes to the class that it calls."""
    nodes = list(ast.walk(node))
    results = [n.value for n in nodes if isinstance(n, ast.Return) and n.value is not None]
    names = {n.id for n in results if isinstance(n, ast.Name)}
    results += [
        n.value for n in nodes if isinstance(n, ast.Assign) and names & {getattr(t, "id", "") for t in n.targets}
    ]
    call = next((n for n in [node, *results] if isinstance(n, ast.Call)), None)
    if call is None:
        return Definition(own, {}, open_, constants(node))
    passed = {}
    for keyword in call.keywords:
        if keyword.arg:
            passed[keyword.arg] = source.fold(keyword.value)
        elif isinstance(keyword.value, ast.Dict):  # **{...}
            pairs = zip(keyword.value.keys, keyword.value.values, strict=True)
            passed |= {str(k.value): source.fold(v) for k, v in pairs if isinstance(k, ast.Constant)}
    for key, value in passed.items():  # a parameter that is passed on
        if isinstance(value, Expression) and own.get(value, NO_DEFAULT) is not NO_DEFAULT:
            passed[key] = own[value]
    classes = {n.name for n in definitions_in(source.tree.body) if isinstance(n, ast.ClassDef)}
    named = [n.id for n in [call.func, *call.args[:1]] if isinstance(n, ast.Name)]
    target = next((name for name in named if name in classes), None)
    found = find_definition(source, target, depth + 1) if target else None
    # What a factory passes on is compared; other numbers in it are left out.
    return Definition({**own, **passed}, found.keywords if found else {}, open_ and (not found or found.open), [])


def constants(node: ast.AST) -> list[Any]:
    """Fractions and numbers above 8 in a body, sorted: momenta, epsilons, widths."""
    nodes = list(ast.walk(node))
    signatures = [n.args for n in nodes if isinstance(n, ast.FunctionDef)]
    defaults = {id(d) for a in signatures for tree in [*a.defaults, *a.kw_defaults] if tree for d in ast.walk(tree)}
    found = [n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in defaults]
    numbers: set[Any] = {value for value in found if type(value) in (int, float)}
    return sorted(n for n in numbers if n > 8 or n != int(n)) if all(map(math.isfinite, numbers)) else []


# ---- configuration files


def config_value(source: Source, path: list[str], seen: frozenset[str] = frozenset()) -> Any:
    """The value at a dotted path of an mmcv configuration; NO_KEYWORD if neither it nor its `_base_` files have it."""
    node = source.last(path[0])
    for key in path[1:]:
        alone = config_item(node, "_delete_") is not None
        node = config_item(node, key)
        if node is None and alone:
            return NO_KEYWORD  # nothing of the base files is merged into it
    if node is not None:
        value = source.fold(node)
        return Expression(value) if "{{" in str(value) else value
    bases = source.fold(source.last("_base_"))
    seen |= {source.file}
    for base in [bases] if isinstance(bases, str) else bases or []:
        file = os.path.normpath(Path(source.file).parent / str(base))
        if file not in seen and not file.startswith(("..", "/")) and (source.root / file).is_file():
            with contextlib.suppress(UserError):
                found = config_value(Source(source.root, file), path, seen)
                if found is not NO_KEYWORD:
                    return found
    return NO_KEYWORD


def config_item(node: ast.expr | None, key: str) -> ast.expr | None:
    """The entry of a dict, of keyword arguments or of a list."""
    if isinstance(node, ast.Call):
        return next((k.value for k in node.keywords if k.arg == key), None)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return next((v for k, v in pairs if isinstance(k, ast.Constant) and k.value == key), None)
    if isinstance(node, ast.List | ast.Tuple) and key.isdigit() and int(key) < len(node.elts):
        return node.elts[int(key)]
    return None
