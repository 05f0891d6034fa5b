"""Conversations laid out without rendering: what a chat template writes around contents depends on their roles alone, mostly.

For each sequence of roles the template is rendered once, with marks as contents; a row then only fills the places. Where a
template looks into contents (reasoning blocks, trimming, lengths), or a row's content is one that it would look for, the row
is rendered as ever. So is a sequence of roles for which filling does not give what rendering does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import nodes

from .rows import Message
from .spec import TrainError
from .turn_templates import Piece

Laid = tuple[list[Piece], bool]
"""Pieces of a conversation, and whether an earlier answer is shown rewritten."""
Render = Callable[[Sequence[Message], str], Laid]

NUM_COMPARED = 8
"""Rows of each sequence of roles that are both filled and rendered."""
MAX_SHAPES = 512
REASONING = ("<think>", "</think>")
"""What layouts look for themselves, beside the template."""
_PLAIN_FILTERS = frozenset(
    ("trim", "string", "safe", "default", "d", "list", "tojson", "join", "map", "select", "selectattr")
)
_TRIMMING = frozenset(("strip", "lstrip", "rstrip"))


def _marks(number: int) -> tuple[str, str]:
    """Two contents that no template knows: letters alone, and one that trips whatever escapes, trims lines or changes case."""
    return f"Qz{number}plainzQ", f'qZ{number} "it\'s" <b> & 中文\n\n  Ünï {{{{x}}}} zq{number}'


@dataclass(frozen=True)
class _Place:
    """Where the content of a message stands in a piece."""

    message: int


@dataclass
class _Shape:
    """What is known of one sequence of roles."""

    pieces: list[tuple[list[str | _Place], bool]] | None
    """Parts of each piece, and whether it is learnt; None: rows of this shape are rendered."""
    rewritten: bool = False
    num_compared: int = 0


class Skeletons:
    """Filled pieces for the rows of one template. `text`: its Jinja source; `special`: tokens that contents may not hold."""

    def __init__(self, text: str, special: re.Pattern[str], render: Render) -> None:
        self._render, self._special, self._looked_for = render, special, looked_for(text)
        self._shapes: dict[tuple[tuple[str, bool | None], ...], _Shape] = {}

    def pieces(self, messages: Sequence[Message], source: str) -> Laid:
        """What `render` gives. Raises what it raises."""
        if self._looked_for is None or not all(self._is_plain(message, self._looked_for) for message in messages):
            return self._render(messages, source)
        key = tuple((message.role, message.supervised) for message in messages)
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= MAX_SHAPES:
                return self._render(messages, source)
            shape = self._shapes[key] = _study(messages, self._render)
        if shape.pieces is None:
            return self._render(messages, source)
        filled = _filled(shape.pieces, messages)
        if shape.num_compared < NUM_COMPARED:
            shape.num_compared += 1
            rendered = self._render(messages, source)
            if rendered != (filled, shape.rewritten):
                shape.pieces = None
            return rendered
        return filled, shape.rewritten

    def _is_plain(self, message: Message, decides: LookedFor) -> bool:
        """Whether the template can do nothing with this content but show it."""
        content = message.content
        if message.tool_calls or message.role == "tool" or not content or content[0].isspace() or content[-1].isspace():
            return False
        if content in decides.equal or any(content in text for text in decides.around):
            return False
        return not (decides.inside.search(content) or self._special.search(content))


@dataclass(frozen=True)
class LookedFor:
    """Constants of a template by which it may decide on contents."""

    equal: frozenset[str]
    """A content is compared with them."""
    around: frozenset[str]
    """A content may be looked for in them."""
    inside: re.Pattern[str]
    """They may be looked for in a content."""


def looked_for(text: str) -> LookedFor | None:
    """None for a template that may measure or cut contents in ways that its constants do not tell."""
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(text))
    except jinja2.TemplateError:
        return None
    equal, around, inside = set[str](), set[str](), set[str](REASONING)
    for node in _walk(tree):
        if isinstance(node, nodes.Filter) and not _is_plain_filter(node):
            return None
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice) and not _is_list(node.node):
            return None
        if isinstance(node, nodes.Compare):
            for operand in node.ops:
                if operand.op in ("in", "notin"):
                    inside |= _constants(node.expr)
                    around |= _constants(operand.expr)
                else:
                    equal |= _constants(node.expr) | _constants(operand.expr)
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            if node.node.attr not in _TRIMMING:
                inside.update(*map(_constants, node.args))
        elif isinstance(node, nodes.Test):
            equal.update(*map(_constants, node.args or ()))
        elif isinstance(node, nodes.Filter) and node.name not in ("default", "d", "join", "trim"):
            inside.update(*map(_constants, node.args))
        elif isinstance(node, nodes.Assign) and isinstance(node.node, nodes.Const):
            inside |= _constants(node.node)  # under its name it may be looked for
    words = sorted(filter(None, inside), key=len, reverse=True)
    return LookedFor(frozenset(equal), frozenset(around), re.compile("|".join(map(re.escape, words))))


def _without_generation(text: str) -> str:
    """transformers' own tag says which part is an answer; it shows what stands inside."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _walk(child)


def _is_plain_filter(node: nodes.Filter) -> bool:
    return node.name in _PLAIN_FILTERS or (node.name in ("length", "count") and _is_list(node.node))


def _is_list(node: nodes.Node | None) -> bool:
    """Whether this is the list of messages, or of tools, and no content."""
    return isinstance(node, nodes.Name) and ("messages" in node.name or "tools" in node.name)


def _constants(node: nodes.Node) -> set[str]:
    """The strings in an expression; not the keys by which it looks things up."""
    if isinstance(node, nodes.Const):
        return {node.value} if isinstance(node.value, str) else set()
    inner = [node.node] if isinstance(node, nodes.Getitem) else node.iter_child_nodes()
    return {c for child in inner for c in _constants(child)}


def _study(messages: Sequence[Message], render: Render) -> _Shape:
    """The pieces of this sequence of roles with places for contents; none where contents are not merely shown."""
    plain, hard = ([message._replace(content=_marks(k)[kind]) for k, message in enumerate(messages)] for kind in (0, 1))
    try:
        (pieces, rewritten), other = render(plain, "a probe"), render(hard, "a probe")
    except TrainError:  # the row itself meets it again, and says it with its place
        return _Shape(None)
    skeleton = [(_parts(piece.text, plain), piece.supervised) for piece in pieces]
    places = [part.message for parts, _ in skeleton for part in parts if isinstance(part, _Place)]
    all_once = sorted(places) == list(range(len(messages)))
    if not all_once or any(p != Piece(p.text, p.supervised) for p in pieces):
        return _Shape(None)
    return _Shape(skeleton if (_filled(skeleton, hard), rewritten) == other else None, rewritten)


def _parts(text: str, messages: Sequence[Message]) -> list[str | _Place]:
    number_of = {message.content: k for k, message in enumerate(messages)}
    marks = re.compile("(" + "|".join(map(re.escape, number_of)) + ")")
    found: list[str | _Place] = [
        _Place(number_of[part]) if part in number_of else part for part in marks.split(text) if part
    ]
    return found


def _filled(skeleton: Sequence[tuple[list[str | _Place], bool]], messages: Sequence[Message]) -> list[Piece]:
    return [
        Piece("".join([p if isinstance(p, str) else messages[p.message].content for p in parts]), supervised)
        for parts, supervised in skeleton
    ]
