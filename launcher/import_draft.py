"""A recipe in the making from another program's settings: what was written, what was left, what a person must choose."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import Problem
from .import_python import Symbol, Unreadable
from .import_table import Table
from .recipe_docs import plain_text
from .recipe_fields import fields
from .recipe_yaml import Node, Place

_SECRET = re.compile(r"(hub|auth|swanlab|access)_token|secret|api_key|password|webhook", re.IGNORECASE)


@dataclass(frozen=True)
class Mapped:
    """A setting that became one of ours."""

    where: str
    """file:line, or "" for a default of the program."""
    key: str
    value: str
    ours: str
    written: str
    note: str = ""


@dataclass(frozen=True)
class Left:
    """A setting without a counterpart."""

    where: str
    key: str
    value: str
    why: str
    matters: bool
    """Whether the recipe trains otherwise because of it."""


@dataclass
class Draft:
    """Settings of one file, and what has been made of them so far."""

    table: Table
    settings: list[tuple[str, Node]]
    """Its keys as the table spells them, in the order of the file; the same key may occur several times."""
    start: Place
    values: dict[str, Any] = field(default_factory=dict)
    """Our dotted key -> value."""
    mapped: list[Mapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    choices: list[Problem] = field(default_factory=list)
    """What only a person can decide."""
    problems: list[Problem] = field(default_factory=list)
    """Mistakes in the file."""
    facts: set[str] = field(default_factory=set)
    """What decides which silent differences apply."""
    taken: set[str] = field(default_factory=set)
    """Keys that were looked at."""

    def all_of(self, role: str) -> list[tuple[str, Node]]:
        """Every (key, value) that plays `role`; null and what only running the file would tell are left out."""
        keys = {key for key, part in self.table.becomes.items() if part == role}
        self.taken |= keys
        found = [(key, node) for key, node in self.settings if key in keys]
        for key, node in found:
            if isinstance(node.value, Unreadable):
                self.problem(node, f"{key}: `{node.text}` cannot be known without running the file", "Write its value.")
        return [(key, node) for key, node in found if node.value is not None and not isinstance(node.value, Unreadable)]

    def one(self, role: str) -> tuple[str, Node] | None:
        """The first of them; others that differ are named as lost."""
        found = self.all_of(role)
        for key, node in found[1:]:
            if node.plain() != found[0][1].plain():
                self.leave(
                    key, node, f"a recipe has one value for all: that of {found[0][1].key_at.origin}", matters=True
                )
        return found[0] if found else None

    def is_on(self, role: str) -> bool:
        """Whether it is written and not off."""
        found = self.one(role)
        return found is not None and bool(found[1].value) and str(found[1].value).lower() not in ("false", "no", "none")

    def number(self, role: str, whole: bool = False) -> float | int | None:
        """Its value as a number, also where it was written as a text; a problem when it is none."""
        found = self.one(role)
        if found is None:
            return None
        key, node = found
        value = node.value
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                value = None
        if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value != int(value)):
            self.problem(node, f"{key}: {shown_value(node)}; expected {'a whole number' if whole else 'a number'}", "")
            return None
        return int(value) if whole or (isinstance(value, float) and value.is_integer() and abs(value) >= 1) else value

    def write(self, ours: str, value: Any, role: str = "", note: str = "") -> None:
        """Sets our key, and notes every setting of `role` (default: the key itself) that led to it."""
        self.values[ours] = value
        found = self.all_of(role or ours)
        for key, node in found[:1]:
            self.note(key, node, ours, value, note)
        if not found:
            self.mapped.append(Mapped("", "", "", ours, one_line(value), note))

    def note(self, key: str, node: Node, ours: str, value: Any = None, note: str = "") -> None:
        """One setting that became (part of) ours. `value` None: it is told where the whole is."""
        hidden = "(hidden)" if _SECRET.search(key) else shown_value(node)
        self.mapped.append(
            Mapped(node.key_at.origin, key, hidden, ours, "" if value is None else one_line(value), note)
        )

    def write_default(self, ours: str, value: Any) -> None:
        """Writes out what the program does by itself, where a recipe would do otherwise."""
        if value is None or ours in self.values or fields()[ours].default == value:
            return
        self.values[ours] = value
        own = fields()[ours].default
        note = f"{self.table.program}'s default; a recipe's own is {one_line(own)}" if own is not None else ""
        self.mapped.append(Mapped("", "", "", ours, plain_text(value), note or f"{self.table.program}'s default"))

    def leave(self, key: str, node: Node, why: str, matters: bool) -> None:
        """Notes a setting that the recipe does not take over."""
        hidden = "(hidden)" if _SECRET.search(key) else shown_value(node)
        self.left.append(Left(node.key_at.origin, key, hidden, why, matters))

    def leave_all(self, roles: Iterable[str], why: str, matters: bool) -> None:
        """`leave` for every setting of these roles."""
        for role in roles:
            for key, node in self.all_of(role):
                self.leave(key, node, why, matters)

    def choose(self, node: Node | None, message: str, hint: str) -> None:
        """Notes what a person must decide."""
        where = node.key_at.origin if node is not None else self.start.source
        self.choices.append(Problem(where, message, hint))

    def problem(self, node: Node, message: str, hint: str) -> None:
        """Notes a mistake in the file."""
        found = Problem(str(node.key_at), message, hint)
        if found not in self.problems:
            self.problems.append(found)


def word(node: Node) -> str:
    """A text or an imported name, as it is compared: the last part of a dotted one."""
    return node.value.last if isinstance(node.value, Symbol) else str(node.value)


def shown_value(node: Node) -> str:
    """A value for people, at most 60 characters."""
    text = node.text if isinstance(node.value, Symbol | Unreadable) else one_line(_plain(node))
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(value: Any) -> str:
    """A value as YAML would have it on one line."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ", ".join(one_line(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {one_line(v)}" for k, v in value.items()) + "}"
    return plain_text(value).replace("\n", "\\n")


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {k: _plain(v) for k, v in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(v) for v in node.value]
    return node.text if isinstance(node.value, Symbol | Unreadable) else node.value
