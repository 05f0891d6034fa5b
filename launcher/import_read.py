"""Settings files of other programs -> nodes that know their line: YAML (all of it), JSON, shell commands. Nothing is executed.

A recipe's own reader (recipe_yaml.py) is strict on purpose; here anchors, merge keys and yes/no are taken as those programs take them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import LaunchError, Problem, RecipeError
from .import_python import read_python
from .recipe_encoding import read_utf8
from .recipe_yaml import Node, Place, explain_syntax, resolve_scalar, shown

_LARGEST = 100_000
"""Most values that a YAML file may have with its aliases written out."""
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a shell script."""

    words: tuple[Node, ...]
    """Program and arguments, quotes resolved; each with its line."""
    environment: dict[str, Node]
    """NAME=VALUE before it, or exported earlier."""


def read_text(path: Path) -> str:
    """The file as UTF-8. Raises RecipeError when it is none, LaunchError when it is missing or a folder."""
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix in (".py", ".yaml", ".yml", ".json", ".sh"))[:5]
        raise LaunchError(f"{path} is a folder", f"Name a file in it: {', '.join(names)}" if names else "Name a file.")
    if not path.is_file():
        raise LaunchError(f"there is no file {path}", "Name a config: .py, .yaml, .json, or a script with the command.")
    text, problem = read_utf8(path, shown(path))
    if problem is not None or text is None:
        raise RecipeError([problem] if problem else [])
    return text


def start_of(path: Path) -> Place:
    """The first character of the file."""
    return Place(shown(path), 1, 1, Path(os.path.abspath(path)).parent)


def read_yaml(text: str, start: Place) -> Node:
    """The only document. Raises RecipeError with the line of what is not YAML."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        at = dataclasses.replace(start, line=line + 1, column=column + 1)
        raise RecipeError([Problem(str(at), *explain_syntax(text, line, e.problem or "", e.context or ""))]) from None
    except yaml.YAMLError as e:
        raise RecipeError([Problem(str(start), f"not valid YAML: {e}", "")]) from None
    except RecursionError:
        raise RecipeError([Problem(str(start), "lists or mappings lie too deep in each other", "")]) from None
    if root is None:
        raise RecipeError([Problem(str(start), "nothing is written here", "")])
    if _size(root, {}) > _LARGEST:
        raise RecipeError([Problem(str(start), f"aliases make more than {_LARGEST} values of this file", "")])
    return _from_yaml(root, start, None)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values there are with every alias written out; an alias inside its own value counts as too many."""
    if id(node) not in known:
        known[id(node)] = _LARGEST + 1
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = [part for pair in below for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in pairs)
    return known[id(node)]


def _from_yaml(node: yaml.Node, start: Place, key_at: Place | None) -> Node:
    at = dataclasses.replace(start, line=node.start_mark.line + 1, column=node.start_mark.column + 1)
    key_at = key_at or at
    if isinstance(node, yaml.MappingNode):
        return Node(_mapping(node, start), at, key_at)
    if isinstance(node, yaml.SequenceNode):
        return Node([_from_yaml(item, start, None) for item in node.value], at, key_at)
    assert isinstance(node, yaml.ScalarNode)
    if node.style is not None:
        return Node(node.value, at, key_at, node.value, quoted=True)
    return Node(scalar(node.value), at, key_at, node.value)


def _mapping(node: yaml.MappingNode, start: Place) -> dict[str, Node]:
    """Later keys win over earlier ones, and written ones over merged ones, as PyYAML has it."""
    merged: dict[str, Node] = {}
    written: dict[str, Node] = {}
    for key, value in node.value:
        at = dataclasses.replace(start, line=key.start_mark.line + 1, column=key.start_mark.column + 1)
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError([Problem(str(at), "a key must be a word, not a list or mapping", "")])
        if key.value == "<<" and key.style is None:
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in reversed(sources):
                if isinstance(source, yaml.MappingNode):
                    merged |= _mapping(source, start)
            continue
        written[key.value] = _from_yaml(value, start, at)
    return merged | written


def scalar(text: str) -> Any:
    """An unquoted scalar: numbers (2e-4 too), switches (yes/no/on/off too), null; else the text."""
    if text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    value, error = resolve_scalar(text)
    return text if error else value


def read_json(text: str, start: Place) -> Node:
    """Any JSON value; keys have the line on which they first stand. Raises RecipeError with the line of an error."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        at = dataclasses.replace(start, line=e.lineno, column=e.colno)
        raise RecipeError([Problem(str(at), f"not valid JSON: {e.msg}", "")]) from None
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for key in re.findall(r'"((?:[^"\\]|\\.)*)"\s*:', line):
            lines.setdefault(key, number)
    return node_of(value, start, lines)


def node_of(value: Any, at: Place, lines: dict[str, int] | None = None) -> Node:
    """Plain data as a node; every key at its line of `lines`, else at `at`."""
    if isinstance(value, dict):
        places = {k: dataclasses.replace(at, line=(lines or {}).get(k, at.line)) for k in value}
        return Node({k: node_of(v, places[k], lines) for k, v in value.items()}, at, at)
    if isinstance(value, list):
        return Node([node_of(v, at, lines) for v in value], at, at)
    return Node(value, at, at, "" if value is None else str(value), quoted=isinstance(value, str))


def read_commands(text: str, start: Place) -> list[Command]:
    """The commands of a script: continuation lines joined, comments left out, NAME=VALUE and `export` kept for what follows.

    Variables are filled in from assignments in the same file; others stay as `$NAME`. Raises RecipeError on an open quote.
    """
    known: dict[str, Node] = {}
    exported: dict[str, Node] = {}
    commands = []
    lines = ((first, _calculated(joined, known, start)) for first, joined in _logical_lines(text))
    for words in (words for first, joined in lines for words in _split(joined, first, start)):
        places = [dataclasses.replace(start, line=number) for _, number in words]
        nodes = [Node(_filled(word, known), at, at, word) for (word, _), at in zip(words, places, strict=True)]
        own: dict[str, Node] = {}
        exports = bool(nodes) and nodes[0].value == "export"
        while nodes and (nodes[0].value == "export" or _ASSIGNMENT.fullmatch(nodes[0].value)):
            if found := _ASSIGNMENT.fullmatch(nodes[0].value):
                own[found[1]] = Node(found[2], nodes[0].at, nodes[0].at, found[2])
            nodes = nodes[1:]
        if nodes:
            commands.append(Command(tuple(nodes), exported | own))
        else:
            known |= own
            exported |= own if exports else {}
    return commands


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number of lines before it, text) of each line with the lines that continue it."""
    lines = text.splitlines()
    first = number = 0
    joined = ""
    while number < len(lines):
        line = lines[number]
        number += 1
        goes_on = line.rstrip().endswith("\\") and not line.lstrip().startswith("#")
        joined += line.rstrip()[:-1] if goes_on else line
        if number < len(lines) and (goes_on or _is_open(joined)):
            joined += " \n" if goes_on else "\n"
            continue
        # The space keeps the lexer from counting a word's line only after its line break.
        yield first, joined + " \n"
        first, joined = number, ""


def _calculated(line: str, known: dict[str, Node], start: Place) -> str:
    """`$((16 / N))` and `$(expr 16 / N)` of whole numbers, as the number."""

    def value(found: re.Match[str]) -> str:
        text = _filled(found[1] or found[2], known).replace("/", "//")
        if not re.fullmatch(r"[\d\s()+*%/-]+", text):
            return found[0]
        result = read_python(f"x = ({text})", start).variables["x"].value
        return str(result) if isinstance(result, int) else found[0]

    return re.sub(r"\$\(\((.*?)\)\)|\$\(expr ([^()]*)\)", value, line)


def _split(joined: str, first: int, start: Place) -> list[list[tuple[str, int]]]:
    """Words with their lines; `&&`, `;` and `|` end a command."""
    lexer = shlex.shlex(joined, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands: list[list[tuple[str, int]]] = [[]]
    try:
        for word in lexer:
            if set(word) <= set(";&|") and word:
                commands.append([])
            else:
                commands[-1].append((word, first + lexer.lineno))
    except ValueError as e:
        at = dataclasses.replace(start, line=first + 1)
        raise RecipeError([Problem(str(at), f"not a shell command: {e}", "Close the quote.")]) from None
    return [words for words in commands if words]


def _is_open(text: str) -> bool:
    """Whether a quote goes on over the end of the line."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def _filled(word: str, known: dict[str, Node]) -> str:
    def value(found: re.Match[str]) -> str:
        node = known.get(found[1] or found[2])
        return str(node.value) if node else found[0]

    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, word)
