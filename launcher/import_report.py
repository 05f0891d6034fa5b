"""What `launch recipes import` prints: what was mapped, what has no counterpart, what differs, what is to be decided."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from .errors import Problem
from .import_draft import Draft, Left, Mapped
from .import_recipe import Imported
from .recipe_yaml import shown

_WIDTH = 118


def report(imported: Imported, problems: list[Problem]) -> str:
    """The whole account. `problems`: what the checker says against the recipe."""
    d = imported.draft
    lines = [f"{shown(imported.source)}: {d.table.program} settings ({imported.foreign.how})", ""]
    lines += ["mapped", *_mapped(d), ""]
    lines += ["no counterpart", *_left(d), ""]
    lines += [f"what {d.table.program} did silently, and is otherwise now", *_differs(d)]
    decisions = [*d.choices, *(p for p in problems if not _is_known(p, d))]
    if decisions:
        lines += ["", "to decide"]
        for p in decisions:
            lines += _wrapped(f"{_short(p.where)}: {p.message}", "  ")
            lines += _wrapped(p.hint, "      ") if p.hint else []
    return "\n".join(lines)


def _is_known(problem: Problem, d: Draft) -> bool:
    """Whether the checker repeats what is listed as a choice already: a file or dataset that is not there."""
    if "data.files" not in d.values and problem.message in ("data is missing", "data.files is missing"):
        return True
    files = [f if isinstance(f, str) else f["path"] for f in d.values.get("data.files", [])]
    return bool(d.choices) and any(f in problem.message for f in files if f in " ".join(c.message for c in d.choices))


def _mapped(d: Draft) -> Iterator[str]:
    seen: set[Mapped] = set()
    for m in d.mapped:
        if m in seen:
            continue
        seen.add(m)
        note = f"   ({m.note})" if m.note else ""
        theirs = f"{_short(m.where)}: {m.key}: {m.value}" if m.key else "not written"
        yield f"  {theirs} -> {m.ours}{f': {m.written}' if m.written else ''}{note}"


def _left(d: Draft) -> Iterator[str]:
    """Losses first, one line each; the rest by reason."""
    losses = [entry for entry in d.left if entry.matters]
    if not d.left:
        yield "  nothing"
    for entry in losses:
        yield from _wrapped(f"{_short(entry.where)}: {entry.key}: {entry.value}   NOT TAKEN OVER: {entry.why}", "  ")
    by_reason: dict[str, list[Left]] = {}
    for entry in d.left:
        if not entry.matters:
            by_reason.setdefault(entry.why, []).append(entry)
    for why, entries in by_reason.items():
        keys = ", ".join(dict.fromkeys(f"{e.key}: {e.value}" for e in entries))
        yield from _wrapped(f"{keys}: {why}", "  ")


def _differs(d: Draft) -> Iterator[str]:
    for when, text in d.table.differs:
        if set(when.split()) <= d.facts | {"always"}:
            yield from _wrapped(f"- {text}", "  ")


def _short(where: str) -> str:
    """The file's name and line: its folder stands in the first line."""
    return where.rpartition("/")[2]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
