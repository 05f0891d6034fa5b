"""The before/after table for a terminal: columns that line up, for Chinese too. Standard library only."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence

from .expectations import JudgedAnswer, PromptResult, tally_base, tally_tuned
from .spec import PromptSpec


def terminal_table(results: Sequence[PromptResult], width: int, max_lines: int = 12) -> str:
    """The before/after table as plain text of at most `width` columns, and how many expectations are met.

    A cell of more than `max_lines` lines is cut, saying so. Below 60 columns the answers stand one under the other.
    """
    has_base = any(r.base is not None for r in results)
    blocks = [_table_row(r, width, max_lines, has_base) for r in results]
    passed, total = tally_tuned(results)
    lines = [*_table_head(width, has_base), *(line for block in blocks for line in (*block, "-" * width))]
    if total:
        before = f"base {tally_base(results)[0]} of {total}, " if has_base else ""
        lines.append(f"expectations met: {before}tuned {passed} of {total}")
    return "\n".join(line.rstrip() for line in lines)


def _columns(width: int, has_base: bool) -> list[int]:
    """Widths of question, base and tuned, two spaces apart; one column in a narrow terminal."""
    if width < 60:
        return [width]
    question = width // (4 if has_base else 3)
    if not has_base:
        return [question, width - question - 2]
    answer = (width - question - 4) // 2
    return [question, answer, width - question - 4 - answer]


def _table_head(width: int, has_base: bool) -> list[str]:
    columns = _columns(width, has_base)
    if len(columns) == 1:
        return ["-" * width]
    names = ["question", "base", "tuned"] if has_base else ["question", "tuned"]
    return ["  ".join(pad(n, w) for n, w in zip(names, columns, strict=True)), "-" * width]


def _table_row(result: PromptResult, width: int, max_lines: int, has_base: bool) -> list[str]:
    columns = _columns(width, has_base)
    answers = [result.base, result.tuned] if has_base else [result.tuned]
    texts = [printable(result.prompt.user), *(_answer_text(result.prompt, a) for a in answers)]
    if len(columns) == 1:
        names = ["question", "base", "tuned"] if has_base else ["question", "tuned"]
        cells = [_cut(wrap(f"{n}: {t}", width), max_lines) for n, t in zip(names, texts, strict=True)]
        return [line for cell in cells for line in cell]
    cells = [_cut(wrap(t, w), max_lines) for t, w in zip(texts, columns, strict=True)]
    rows = itertools.zip_longest(*cells, fillvalue="")
    return ["  ".join(pad(c, w) for c, w in zip(row, columns, strict=True)) for row in rows]


def _answer_text(prompt: PromptSpec, answer: JudgedAnswer | None) -> str:
    if answer is None:
        return "(not asked)"
    mark = "" if not prompt.has_expectation else "✓ " if answer.passed else "✗ "
    remarks = "".join(f"\n({remark})" for remark in (*answer.unmet, *answer.notes))
    return printable(f"{mark}{answer.text.strip() or '(empty)'}{remarks}")


def _cut(lines: list[str], max_lines: int) -> list[str]:
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], "... (all in the report)"]


def printable(text: str) -> str:
    """`text` with control characters replaced, so that no answer can steer a terminal; tabs become spaces."""
    cleaned = text.replace("\r\n", "\n").expandtabs(4)
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c != "\n" else c for c in cleaned)


def display_width(text: str) -> int:
    """Terminal columns of one line: East Asian wide characters and emoji take 2, combining marks 0."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def pad(text: str, width: int) -> str:
    """`text` followed by spaces up to `width` terminal columns; a Chinese character takes two."""
    return text + " " * (width - display_width(text))


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns: broken at spaces, between wide characters, or inside a word longer than a line."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for piece in _pieces(paragraph, width):
            if line and display_width(line) + display_width(piece.rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += piece
        lines.append(line.rstrip())
    return lines


def _pieces(paragraph: str, width: int) -> Iterator[str]:
    """Parts of at most `width` columns (and trailing spaces) that a line may be broken between."""
    piece = ""
    for c in paragraph:
        if piece and (_may_break(piece[-1], c) or display_width(piece + c) > width):
            yield piece
            piece = ""
        piece += c
    if piece:
        yield piece


def _may_break(before: str, after: str) -> bool:
    """Between words and around wide characters, but never before a space, a mark or closing punctuation."""
    if after.isspace() or unicodedata.category(after) in ("Mn", "Me", "Cf", "Po", "Pe", "Pf"):
        return False
    return before.isspace() or "W" in (unicodedata.east_asian_width(before), unicodedata.east_asian_width(after))
