"""A Python config read as syntax, never run: names, constants, arithmetic on them, dict(...), lists, simple `if`.

What would have to be run to be known becomes Unreadable, with its text: an error only where the value is needed.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import Problem, RecipeError
from .recipe_yaml import Node, Place

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "round": round,
    "min": min,
    "max": max,
}
_JOINS = frozenset({"os.path.join", "osp.join", "path.join", "join"})
_LARGEST = 100_000
"""Longest text or list that arithmetic may make, and most values that one may hold, all in all."""
_MOST_BITS = 4096
"""Longest number that arithmetic may make."""


@dataclass(frozen=True)
class Symbol:
    """Something imported, by its dotted name: torch.float16, PROMPT_TEMPLATE.qwen_chat, AdamW."""

    name: str

    @property
    def last(self) -> str:
        """The part after the last dot."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Unreadable:
    """A value that only running the file would give."""

    text: str


@dataclass(frozen=True)
class PythonConfig:
    """What a config assigns at its left margin."""

    variables: dict[str, Node]
    used: frozenset[str]
    """Names that something in the file reads."""
    inherits: tuple[Node, ...]
    """Other configs it builds on (`_base_`, `read_base`): not followed."""
    imports: frozenset[str]
    """Names of modules and of what is imported from them."""


def read_python(text: str, start: Place) -> PythonConfig:
    """Reads assignments in order. Raises RecipeError with the line of a syntax error."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        line, column = (getattr(e, "lineno", None) or 1), (getattr(e, "offset", None) or 1)
        at = dataclasses.replace(start, line=line, column=column)
        raise RecipeError([Problem(str(at), f"not Python: {getattr(e, 'msg', e)}", "")]) from None
    reader = _Reader(start)
    reader.run(tree.body)
    used = frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return PythonConfig(reader.variables, used, tuple(reader.inherits), frozenset(reader.imports))


class _Reader:
    def __init__(self, start: Place) -> None:
        self.start = start
        self.variables: dict[str, Node] = {}
        self.inherits: list[Node] = []
        self.imports: set[str] = set()
        self.sizes: dict[int, tuple[int, Any]] = {}
        """Of lists and dicts, by identity: how many values they hold all in all, and they themselves, to be kept alive."""

    def run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Assign):
            for target in s.targets:
                self.assign(target, self.value(s.value))
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            self.assign(s.target, self.value(s.value))
        elif isinstance(s, ast.AugAssign) and isinstance(s.target, ast.Name):
            both = ast.BinOp(ast.Name(s.target.id, ast.Load()), s.op, s.value)
            self.assign(s.target, self.value(ast.copy_location(both, s)))
        elif isinstance(s, ast.If):
            test = self.value(s.test).value
            if isinstance(test, Unreadable | Symbol):
                self.spoil(s)
            else:
                self.run(s.body if test else s.orelse)
        elif isinstance(s, ast.With):
            if any("read_base" in ast.unparse(item.context_expr) for item in s.items):
                self.inherits += [self.node(ast.unparse(inner), inner) for inner in s.body]
            else:
                self.run(s.body)
        elif isinstance(s, ast.Import | ast.ImportFrom):
            self.imports |= {s.module or ""} if isinstance(s, ast.ImportFrom) else set()
            self.imports |= {a.name for a in s.names}
        elif isinstance(s, ast.For | ast.While | ast.Try):
            self.spoil(s)
        elif isinstance(s, ast.Expr):
            self.changed_in_place(s.value)

    def assign(self, target: ast.expr, value: Node) -> None:
        if isinstance(target, ast.Name):
            at = self.place(target)
            self.variables[target.id] = dataclasses.replace(value, key_at=at)
            if target.id == "_base_":
                self.inherits.append(value)
        elif isinstance(target, ast.Tuple | ast.List):
            items = value.value if isinstance(value.value, list) else []
            for i, part in enumerate(target.elts):
                item = items[i] if len(items) == len(target.elts) else self.node(Unreadable(value.text), part)
                self.assign(part, item)
        elif isinstance(target, ast.Subscript | ast.Attribute):
            inner = self.value(target.value).value
            key = self.value(target.slice).value if isinstance(target, ast.Subscript) else target.attr
            if isinstance(inner, dict) and isinstance(key, str):
                inner[key] = dataclasses.replace(copy.deepcopy(value), key_at=self.place(target))
            else:
                self.spoil_names(target)

    def changed_in_place(self, e: ast.expr) -> None:
        """`hooks.append(x)`, `cfg.update(a=1)`; another method of a variable makes it unreadable."""
        if not (isinstance(e, ast.Call) and isinstance(e.func, ast.Attribute)):
            return
        target, args = self.value(e.func.value).value, [self.value(a) for a in e.args]
        if e.func.attr == "append" and isinstance(target, list) and len(args) == 1:
            target.append(copy.deepcopy(args[0]))
        elif e.func.attr == "extend" and isinstance(target, list) and args and isinstance(args[0].value, list):
            target.extend(copy.deepcopy(args[0].value))
        elif e.func.attr == "update" and isinstance(target, dict):
            for found in args:
                target.update(copy.deepcopy(found.value) if isinstance(found.value, dict) else {})
            target.update({k.arg: copy.deepcopy(self.keyword(k)) for k in e.keywords if k.arg})
        else:
            self.spoil_names(e.func.value)

    def spoil(self, s: ast.stmt) -> None:
        """Everything that a statement assigns is unknown."""
        for inner in ast.walk(s):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                self.variables[inner.id] = self.node(Unreadable(ast.unparse(s).splitlines()[0]), inner)

    def spoil_names(self, e: ast.expr) -> None:
        for inner in ast.walk(e):
            if isinstance(inner, ast.Name) and inner.id in self.variables:
                self.variables[inner.id] = self.node(Unreadable(ast.unparse(e)), e)

    def value(self, e: ast.expr) -> Node:
        value = self.evaluate(e)
        if isinstance(value, dict | list) and self.size(value) > _LARGEST:
            value = Unreadable(ast.unparse(e))
        return self.node(value, e)

    def size(self, value: Any) -> int:
        """How many values it holds all in all: lists of the same list grow without growing the file."""
        if not isinstance(value, dict | list):
            return 1
        below = value.values() if isinstance(value, dict) else value
        total = 1 + sum(self.sizes.get(id(node.value), (1, None))[0] for node in below)
        self.sizes[id(value)] = (total, value)
        return total

    def evaluate(self, e: ast.expr) -> Any:
        unknown = Unreadable(ast.unparse(e))
        if isinstance(e, ast.Constant):
            return e.value if isinstance(e.value, str | int | float | bool | None) else unknown
        if isinstance(e, ast.Name):
            return self.variables[e.id].value if e.id in self.variables else Symbol(e.id)
        if isinstance(e, ast.Attribute):
            inner = self.evaluate(e.value)
            if isinstance(inner, dict) and e.attr in inner:
                return inner[e.attr].value
            return Symbol(f"{inner.name}.{e.attr}") if isinstance(inner, Symbol) else unknown
        if isinstance(e, ast.List | ast.Tuple | ast.Set):
            return [self.value(item) for item in e.elts]
        if isinstance(e, ast.Dict):
            keys = [self.evaluate(k) if k is not None else None for k in e.keys]
            if not all(isinstance(k, str) for k in keys):
                return unknown
            return {str(k): self.value(v) for k, v in zip(keys, e.values, strict=True)}
        if isinstance(e, ast.Call):
            return self.call(e, unknown)
        if isinstance(e, ast.IfExp):
            test = self.evaluate(e.test)
            return unknown if isinstance(test, Unreadable | Symbol) else self.evaluate(e.body if test else e.orelse)
        return self.computed(e, unknown)

    def computed(self, e: ast.expr, unknown: Unreadable) -> Any:
        """Arithmetic, comparisons, and what stands at an index."""
        if isinstance(e, ast.BinOp):
            left, right = self.evaluate(e.left), self.evaluate(e.right)
            return _calculated(_ARITHMETIC.get(type(e.op)), left, right, unknown)
        if isinstance(e, ast.UnaryOp):
            inner = self.evaluate(e.operand)
            if isinstance(e.op, ast.Not) and not isinstance(inner, Unreadable | Symbol):
                return not inner
            return -inner if isinstance(e.op, ast.USub) and isinstance(inner, int | float) else unknown
        if isinstance(e, ast.BoolOp):
            values = [self.evaluate(v) for v in e.values]
            if any(isinstance(v, Unreadable | Symbol) for v in values):
                return unknown
            return all(values) if isinstance(e.op, ast.And) else any(values)
        if isinstance(e, ast.Compare) and len(e.ops) == 1:
            left, right = self.evaluate(e.left), self.evaluate(e.comparators[0])
            return _calculated(_COMPARISONS.get(type(e.ops[0])), left, right, unknown)
        if isinstance(e, ast.Subscript):
            inner, key = self.evaluate(e.value), self.evaluate(e.slice)
            if isinstance(inner, dict) and key in inner:
                return inner[key].value
            if isinstance(inner, list) and isinstance(key, int) and -len(inner) <= key < len(inner):
                return inner[key].value
        if isinstance(e, ast.JoinedStr):
            parts = [self.evaluate(p.value if isinstance(p, ast.FormattedValue) else p) for p in e.values]
            plain = all(isinstance(p, str | int | float) for p in parts)
            formats = any(isinstance(p, ast.FormattedValue) and (p.format_spec or p.conversion != -1) for p in e.values)
            text = "".join(map(str, parts)) if plain and not formats else ""
            return text if plain and not formats and len(text) <= _LARGEST else unknown
        return unknown

    def call(self, e: ast.Call, unknown: Unreadable) -> Any:
        name = ast.unparse(e.func)
        if name in ("dict", "ConfigDict") and len(e.args) <= 1:
            first = self.evaluate(e.args[0]) if e.args else {}
            if not isinstance(first, dict):
                return unknown
            result = dict(first)
            for k in e.keywords:
                if k.arg is None:
                    more = self.evaluate(k.value)
                    result |= (
                        more if isinstance(more, dict) else {"**": self.node(Unreadable(ast.unparse(k.value)), k.value)}
                    )
                else:
                    result[k.arg] = self.keyword(k)
            return result
        args = [self.evaluate(a) for a in e.args]
        if name in _JOINS and args and all(isinstance(a, str) for a in args) and not e.keywords:
            import posixpath

            return posixpath.join(*args)
        if name in _FUNCTIONS and args and all(isinstance(a, str | int | float) for a in args) and not e.keywords:
            try:
                return _FUNCTIONS[name](*args)
            except (ValueError, TypeError, OverflowError):
                return unknown
        return unknown

    def keyword(self, k: ast.keyword) -> Node:
        """The value, with the place of its key."""
        at = dataclasses.replace(self.start, line=k.lineno, column=k.col_offset + 1)
        return dataclasses.replace(self.value(k.value), key_at=at)

    def node(self, value: Any, e: ast.AST) -> Node:
        at = self.place(e)
        text = value.name if isinstance(value, Symbol) else value.text if isinstance(value, Unreadable) else str(value)
        return Node(value, at, at, text if not isinstance(value, dict | list) else "", isinstance(value, str))

    def place(self, e: ast.AST) -> Place:
        line, column = getattr(e, "lineno", self.start.line), getattr(e, "col_offset", 0)
        return dataclasses.replace(self.start, line=line, column=column + 1)


def _calculated(function: Callable[[Any, Any], Any] | None, left: Any, right: Any, unknown: Unreadable) -> Any:
    if function is None or isinstance(left, Unreadable | Symbol) or isinstance(right, Unreadable | Symbol):
        return unknown
    if function not in _COMPARISONS.values() and not _stays_small(function, left, right):
        return unknown
    try:
        return function(left, right)
    except (ArithmeticError, TypeError):
        return unknown


def _stays_small(function: Callable[[Any, Any], Any], left: Any, right: Any) -> bool:
    """Whether the result exists and stays small: a config must not be able to fill the memory."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        factor = abs(right) if function is operator.pow else 1
        return _bits(left) * factor + _bits(right) <= _MOST_BITS
    if function is operator.mul and isinstance(left, str | list) and isinstance(right, int):
        return right * len(left) <= _LARGEST
    if (isinstance(left, str) and isinstance(right, str)) or (isinstance(left, list) and isinstance(right, list)):
        return function is operator.add and len(left) + len(right) <= _LARGEST
    return False


def _bits(number: int | float) -> int:
    return number.bit_length() if isinstance(number, int) else 64
