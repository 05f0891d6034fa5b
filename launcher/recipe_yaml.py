"""YAML to plain values that know where they stand. Only the small part of YAML that a recipe needs.

Mappings, lists and scalars; one document; no anchors, aliases, merge keys or tags. Of YAML 1.1's conversions only
the harmless ones are kept: true/false, null, whole numbers and decimal numbers (`2e-4` too). yes/no/on/off, 017,
1_000, 12:30:00 and dates stay strings, and the typed schema says what to write instead.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from .errors import Problem
from .recipe_encoding import read_utf8

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CONSTANTS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written."""

    source: str
    """The file as shown to people, or the whole flag ("--set train.epochs=2")."""
    line: int
    """From 1; 0 for a flag."""
    column: int
    """From 1; 0 for a flag."""
    folder: Path
    """Relative paths written here start here: the recipe's folder, or the current one for a flag."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    @property
    def origin(self) -> str:
        """ "file:line" or "--set"."""
        return f"{self.source}:{self.line}" if self.line else "--set"


@dataclass(frozen=True)
class Node:
    """A value, and where it and its key stand."""

    value: Any
    """str | int | float | bool | None | dict[str, Node] | list[Node]."""
    at: Place
    key_at: Place
    """Place of the key; of the value where there is no key."""
    text: str = ""
    """A scalar as written, without quotes."""
    quoted: bool = False

    def plain(self) -> Any:
        """The value without positions."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def with_value(self, value: Any) -> Node:
        return dataclasses.replace(self, value=value)


def shown(path: Path) -> str:
    """A path as people like to read it: relative when it lies below the current folder."""
    try:
        return str(Path(os.path.abspath(path)).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def parse_file(path: Path) -> tuple[Node | None, list[Problem]]:
    """The top-level mapping of a recipe file, with everything that is wrong in it as YAML. Never raises for content.

    The node is None when nothing could be read.
    """
    name = shown(path)
    text, problem = read_utf8(path, name)
    if problem is not None:
        return None, [problem]
    loader = _Loader(text, Place(name, 1, 1, Path(os.path.abspath(path)).parent))
    node = loader.read()
    if node is None:
        return None, loader.problems
    if not isinstance(node.value, dict):
        loader.problems.append(_not_a_mapping(node, text))
        return None, loader.problems
    return node, loader.problems


def parse_flag_value(text: str, at: Place) -> tuple[Node | None, list[Problem]]:
    """The value of `--set key=TEXT`: quoted text, [a, list], {a: mapping}, or else one scalar as it stands."""
    stripped = text.strip()
    if not stripped.startswith(("[", "{", '"', "'")):
        value, error = resolve_scalar(stripped)
        if error:
            return None, [Problem(str(at), error, 'To mean the text itself, put it in quotes: key="..."')]
        return Node(value, at, at, stripped), []
    loader = _Loader(stripped, at)
    return loader.read(), loader.problems


def resolve_scalar(text: str) -> tuple[Any, str]:
    """(value, error) of an unquoted scalar. The error is "" unless it is a number that is not finite."""
    if text in _CONSTANTS:
        return _CONSTANTS[text], ""
    if text in _NULLS:
        return None, ""
    if _INT.fullmatch(text):
        return int(text), ""
    if _FLOAT.fullmatch(text):
        number = float(text)
        return (number, "") if math.isfinite(number) else (None, f"{text} is too large a number")
    if _NOT_FINITE.fullmatch(text):
        return None, f"{text} is not a finite number"
    return text, ""


class _Loader(yaml.BaseLoader):
    """Composes nodes by PyYAML's own scanner and parser; collects what a recipe may not contain."""

    def __init__(self, text: str, start: Place) -> None:
        self.start = start
        self.text = text
        self.problems: list[Problem] = []

    def read(self) -> Node | None:
        """The only document, or None when there is none or its syntax is wrong (see `problems`)."""
        try:
            super().__init__(self.text)
            node = self.get_single_node()
        except ReaderError as e:
            before = self.text[: e.position]
            at = self._place_at(before.count("\n"), len(before) - before.rfind("\n") - 1)
            self._refuse(at, f"the character U+{ord(self.text[e.position]):04X} is not allowed in YAML", "Delete it.")
            return None
        except yaml.MarkedYAMLError as e:
            self.problems.append(self._syntax_problem(e))
            return None
        if node is None:
            self._refuse(self.start, "nothing is written here", "A recipe needs at least model, method and data.")
            return None
        return self._convert(node, None)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML's, but anchors, aliases and tags become problems and are otherwise passed over."""
        event = self.peek_event()
        at = self._place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            self._refuse(at, f"the alias *{event.anchor} is not allowed in a recipe", "Write the value out. " + _STAR)
            return yaml.ScalarNode("alias", "", event.start_mark, event.end_mark)
        if event.anchor is not None:
            self._refuse(at, f"the anchor &{event.anchor} is not allowed in a recipe", "Write the value out. " + _STAR)
            event.anchor = None
        if event.tag is not None:
            self._refuse(at, f"the tag {event.tag} is not allowed in a recipe", "Delete it. " + _STAR)
            event.tag = None
        return super().compose_node(parent, index)

    def _convert(self, node: yaml.Node, key_at: Place | None) -> Node | None:
        """None for a value that was refused (the problem is noted)."""
        at = self._place(node.start_mark)
        key_at = key_at or at
        if isinstance(node, yaml.MappingNode):
            return Node(self._convert_mapping(node), at, key_at)
        if isinstance(node, yaml.SequenceNode):
            items = [self._convert(item, None) for item in node.value]
            return Node([item for item in items if item is not None], at, key_at)
        if node.tag == "alias" or not isinstance(node, yaml.ScalarNode):
            return None
        if node.style is not None:
            return Node(node.value, at, key_at, node.value, quoted=True)
        value, error = resolve_scalar(node.value)
        if error:
            self._refuse(at, error, f'Write a finite number, or "{node.value}" in quotes if you mean the text.')
            return None
        return Node(value, at, key_at, node.value)

    def _convert_mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        result: dict[str, Node] = {}
        first: dict[str, Place] = {}
        for key_node, value_node in node.value:
            key_at = self._place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "alias":
                if isinstance(key_node, yaml.CollectionNode):
                    self._refuse(key_at, "a key must be a word, not a list or mapping", "Write `key: value`.")
                continue
            key = key_node.value
            if key == "<<" and key_node.style is None:
                self._refuse(key_at, "the merge key << is not allowed in a recipe", "Use `extends: other.yaml`.")
                continue
            if key in first:
                message = f"the key {key} is given twice; the first is at {first[key]}"
                self._refuse(key_at, message, "Keep one of the two.")
                continue
            first[key] = key_at
            value = self._convert(value_node, key_at)
            if value is not None:
                result[key] = value
        return result

    def _syntax_problem(self, error: yaml.MarkedYAMLError) -> Problem:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        if isinstance(error, ComposerError):
            hint = "Keep one of them in this file: a recipe is one document, without `---` between parts."
            return Problem(str(self._place_at(line, column)), "a second document starts here", hint)
        context = error.context or ""
        if error.context_mark and any(word in context for word in ("quoted scalar", "flow", "simple key")):
            line, column = error.context_mark.line, error.context_mark.column
        lines = self.text.splitlines()
        for number in (line, line - 1):
            if 0 <= number < len(lines) and (found := _look_alike(lines[number])):
                return Problem(str(self._place_at(number, 0)), *found)
        message, hint = explain_syntax(self.text, line, error.problem or "", context)
        return Problem(str(self._place_at(line, column)), message, hint)

    def _refuse(self, at: Place, message: str, hint: str) -> None:
        self.problems.append(Problem(str(at), message, hint))

    def _place(self, mark: yaml.Mark) -> Place:
        return self._place_at(mark.line, mark.column)

    def _place_at(self, line: int, column: int) -> Place:
        if not self.start.line:
            return self.start
        return dataclasses.replace(self.start, line=line + 1, column=column + 1)


_STAR = "A text that starts with *, & or ! needs quotes."


def explain_syntax(text: str, line: int, problem: str, context: str) -> tuple[str, str]:
    """(message, hint) for a PyYAML syntax error on the 0-based `line`."""
    lines = text.splitlines()
    here = lines[line] if line < len(lines) else ""
    if "'\\t'" in problem:
        return "a tab stands here; YAML wants spaces", "Indent with two spaces per level."
    if "quoted scalar" in context:
        return "this quote is never closed", "Close it, or remove it."
    if "mapping values are not allowed" in problem:
        return (
            "a second `: ` on one line, or a line indented too far",
            'Put a text that contains a colon in quotes: key: "one: two". Keys of one section start in the same column.',
        )
    if "could not find expected ':'" in problem:
        return "a line without `key: value`", "Write a colon and a space after the key: `learning_rate: 2e-4`."
    if "cannot start any token" in problem:
        character = here[here.find(problem.split("'")[1])] if "'" in problem else "this"
        return f"a text cannot start with {character}", f'Put it in quotes: "{character}..."'
    if "block" in context:
        return (
            "the indentation does not fit the lines above",
            "Keys of one section start in the same column; items of one list too.",
        )
    if "flow" in context:
        return "this [list] or {mapping} is not closed, or lacks a comma", "Write [a, b] or {key: value, key: value}."
    return f"not valid YAML: {problem}", "Check quotes, colons and indentation around this line."


def _not_a_mapping(node: Node, text: str) -> Problem:
    message = "a recipe is made of `key: value` lines"
    hint = "For example:\nmodel: Qwen/Qwen2.5-7B-Instruct\nmethod: qlora\ndata: my.jsonl"
    if isinstance(node.value, list):
        return Problem(str(node.at), f"{message}; here is a list", hint)
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _look_alike(line):
            return Problem(f"{node.at.source}:{number}:1", *found)
    if re.match(r"[A-Za-z_.]+:\S", node.text):
        hint = "Write a space after the colon: `model: ...`"
    return Problem(str(node.at), f"{message}; here is a single text", hint)


def _look_alike(line: str) -> tuple[str, str] | None:
    """Characters that look like YAML's own: common with Chinese input methods and text copied from web pages."""
    if re.match(r"\s*[\w.-]+\s*：", line):
        return "a full-width colon ： stands after the key", "Write the ASCII colon and a space: `key: value`."
    if re.match(r"[ \t]*[\u00a0\u3000]", line):
        return "the indentation holds a space that is not the ASCII space", "Retype it with the space bar (ASCII)."
    return None
