"""`launch data replace`: a text replaced in every string of a json or jsonl file. Everything else stays, byte for byte.

Keys are not touched. A string that changes is written as it was: with escapes where it had some, else as plain UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import LaunchError, Problem, RecipeError
from .recipe_yaml import shown
from .run_dir import file_of_the_user

MAX_PROBLEMS = 20
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"(?P<colon>\s*:)?')


@dataclass
class Replaced:
    """What was done."""

    rows: int = 0
    """Lines of a jsonl file, elements of a json file."""
    changed_rows: int = 0
    replacements: int = 0


def replace(source: Path, out: Path, pairs: Sequence[tuple[str, str]]) -> Replaced:
    """Write `out`, which must not exist. `pairs`: (old, new), all at once, so that no new text is replaced again.

    Raises LaunchError, also where nothing would be replaced, and RecipeError naming every line that is no JSON. Then
    nothing is written.
    """
    _check(source, out, pairs)
    change = _replacer(pairs)
    with file_of_the_user(out) as f:
        found = _write_lines(source, f, change) if source.suffix == ".jsonl" else _write_whole(source, f, change)
        if not found.replacements:
            olds = ", ".join(repr(old) for old, _ in pairs)
            raise LaunchError(
                f"{shown(source)}: no string has {olds} in it", "Nothing was written. Keys are not searched."
            )
    return found


def _check(source: Path, out: Path, pairs: Sequence[tuple[str, str]]) -> None:
    if not source.is_file():
        raise LaunchError(f"{shown(source)} does not exist")
    if source.suffix not in (".json", ".jsonl"):
        raise LaunchError(f"{shown(source)}: is neither json nor jsonl", "Other files: launch data convert")
    if out.exists():
        raise LaunchError(f"{shown(out)} exists already", "Name a new file; nothing is overwritten.")
    if any(not old for old, _ in pairs):
        raise LaunchError("--old '': is empty", "Say what is to be replaced.")


def _replacer(pairs: Sequence[tuple[str, str]]) -> Callable[[str], tuple[str, int]]:
    """text of JSON -> (the text with its strings changed, number of replacements)."""
    news = dict(pairs)
    # The longest first: of `Ann` and `Anna` the one that is meant.
    olds = re.compile("|".join(re.escape(old) for old in sorted(news, key=len, reverse=True)))

    def change(text: str) -> tuple[str, int]:
        total = 0

        def one(match: re.Match[str]) -> str:
            nonlocal total
            if match["colon"] is not None:
                return match[0]
            value, count = olds.subn(lambda m: news[m[0]], json.loads(match[0]))
            total += count
            return json.dumps(value, ensure_ascii="\\u" in match[0]) if count else match[0]

        return _STRING.sub(one, text), total

    return change


def _write_lines(source: Path, f: IO[str], change: Callable[[str], tuple[str, int]]) -> Replaced:
    found, problems = Replaced(), []
    for number, line in _lines(source):
        if not line.strip():
            f.write(line)
            continue
        try:
            json.loads(line)
        except ValueError as e:
            problems.append(Problem(f"{shown(source)}:{number}", f"is no JSON: {e}"))
            if len(problems) == MAX_PROBLEMS:
                break
            continue
        text, count = change(line)
        found.rows += 1
        found.changed_rows += bool(count)
        found.replacements += count
        f.write(text)
    if problems:
        raise RecipeError(problems)
    return found


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    with open(source, encoding="utf-8", newline="") as f:
        try:
            yield from enumerate(f, start=1)
        except UnicodeDecodeError as e:
            raise LaunchError(f"{shown(source)}: is not UTF-8 ({e.reason})", "Save it as UTF-8.") from None


def _write_whole(source: Path, f: IO[str], change: Callable[[str], tuple[str, int]]) -> Replaced:
    text = "".join(line for _, line in _lines(source))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise RecipeError([Problem(f"{shown(source)}:{e.lineno}:{e.colno}", f"is no JSON: {e.msg}")]) from None
    rows = value if isinstance(value, list) else [value]
    changed = sum(bool(change(json.dumps(row, ensure_ascii=False))[1]) for row in rows)
    text, count = change(text)
    f.write(text)
    return Replaced(len(rows), changed, count)
