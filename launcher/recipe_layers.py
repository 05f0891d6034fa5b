"""Layers of a recipe: each file of an `extends` chain is one, all --set flags together are another.

A layer is first brought into full form (`shape`), then laid over the ones before it (`overlay`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import Problem
from .recipe_fields import fields, keys_of, pattern
from .recipe_messages import not_a_section, null_value, unknown_key
from .recipe_schema import ITEM_SHORT_FORMS, NULLABLE, SHORT_FORMS
from .recipe_yaml import Node, Place

# Keys that a method has no use for.
METHOD_KEYS_WITHOUT_USE: dict[str, tuple[str, ...]] = {
    "full": ("rank", "alpha", "dropout", "targets", "double_quant"),
    "lora": ("double_quant",),
    "qlora": (),
}


@dataclass
class Findings:
    """What was noticed while a recipe was read."""

    problems: list[Problem] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    """Dotted paths that have a problem already: nothing more is said about them."""
    notes: list[str] = field(default_factory=list)
    incomplete: bool = False
    """A layer could not be read, so nothing can be said about what is missing."""

    def add(self, at: Place, message: str, hint: str = "", path: str = "") -> None:
        self.problems.append(Problem(str(at), message, hint))
        if path:
            self.bad.add(path)

    def is_bad(self, path: str) -> bool:
        """There is a problem at `path`, above it or below it."""
        return any(path == bad or path.startswith(f"{bad}.") or bad.startswith(f"{path}.") for bad in self.bad)


def shape(node: Node, path: str, found: Findings) -> Node | None:
    """`node` at dotted `path` with short forms written out, unknown keys and nulls removed (and reported).

    None when nothing usable is left. Types of values are not looked at.
    """
    if node.value is None:
        if pattern(path) in NULLABLE:
            return node
        found.add(node.key_at, *null_value(path), path=path)
        return None
    if keys_of(pattern(path)):
        return _shape_section(node, path, found)
    spec = fields().get(pattern(path))
    if spec and spec.section and not isinstance(node.value, list):
        node = Node([node], node.at, node.key_at)
    if isinstance(node.value, list):
        items = [shape(item, f"{path}.{i}", found) for i, item in enumerate(node.value)]
        return node.with_value([item for item in items if item is not None])
    return node


def _shape_section(node: Node, path: str, found: Findings) -> Node | None:
    if not isinstance(node.value, dict):
        short = SHORT_FORMS.get(path) or ITEM_SHORT_FORMS.get(pattern(path).removesuffix(".*"))
        if short is None or _lacks_space(node, path):
            found.add(node.at, *not_a_section(path, node), path=path)
            return None
        node = Node({short: node}, node.at, node.key_at)
    here = keys_of(pattern(path))
    kept: dict[str, Node] = {}
    for key, child in node.value.items():
        below = f"{path}.{key}" if path else key
        if key not in here:
            sentence = pattern(path).endswith("*") and " " in key
            found.add(child.key_at, *unknown_key(path, key, child), path=path if sentence else "")
        elif shaped := shape(child, below, found):
            kept[key] = shaped
    return node.with_value(kept)


def _lacks_space(node: Node, path: str) -> bool:
    """`model:\\n  source:x`: a key of this section whose colon has no space after it."""
    key, colon, rest = node.text.partition(":")
    return bool(colon and rest) and not node.quoted and key in keys_of(pattern(path))


def overlay(base: Node, over: Node, found: Findings) -> Node:
    """`over` laid on `base`: mappings merge deep, lists and scalars replace; both are in full form."""
    return merge(_displace(base, over, found), over)


def merge(base: Node, over: Node) -> Node:
    """As `overlay`, but nothing is displaced: contradictions stay, to be reported."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return over.with_value(merged)


def _displace(base: Node, over: Node, found: Findings) -> Node:
    """`base` without the values that contradict what a later layer says: the later layer means to replace them."""
    for reason, gone in _displaced(over):
        node, cause = get(base, gone), get(over, reason)
        if node is None or cause is None or get(over, gone) is not None:
            continue
        section, _, key = gone.rpartition(".")
        parent = base.value[section]
        rest = {k: v for k, v in parent.value.items() if k != key}
        base = base.with_value({**base.value, section: parent.with_value(rest)})
        found.notes.append(
            f"{gone} ({node.key_at.origin}) no longer holds: replaced by {reason} ({cause.key_at.origin})"
        )
    return base


def _displaced(over: Node) -> Iterator[tuple[str, str]]:
    """(path set by `over`, path that it replaces in earlier layers)."""
    yield "train.epochs", "train.max_steps"
    yield "train.max_steps", "train.epochs"
    yield "data.held_out", "data.held_out_files"
    yield "data.held_out_files", "data.held_out"
    yield "model.source", "model.revision"
    method = get(over, "method.name")
    if method is not None and isinstance(method.value, str):
        for key in METHOD_KEYS_WITHOUT_USE.get(method.value, ()):
            yield "method.name", f"method.{key}"


def get(tree: Node, path: str) -> Node | None:
    """The node at a dotted path ("data.files.0.path"), or None."""
    node: Node | None = tree
    for part in path.split("."):
        value = node.value if node is not None else None
        if isinstance(value, dict):
            node = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            node = value[int(part)]
        else:
            return None
    return node


def walk(tree: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """(dotted path, node) of everything below `tree`, in the order written."""
    children = tree.value.items() if isinstance(tree.value, dict) else ()
    if isinstance(tree.value, list):
        children = ((str(i), item) for i, item in enumerate(tree.value))
    for key, node in children:
        below = f"{path}.{key}" if path else key
        yield below, node
        yield from walk(node, below)
