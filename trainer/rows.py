"""Rows of training data: sources of any kind (row_files.py) and format (row_formats.py) become one shape.

Standard library only, but for what tables and hubs need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .data_paths import data_files
from .row_files import TABLE_SUFFIXES, inner_suffix, read_values
from .row_formats import FORMATS, REFUSED_KEYS, Parsed, detect, fits, refuse_foreign
from .row_values import SHAPES, Message, RowError, describe, field
from .spec import DataFile, RowNames, TrainError

__all__ = ["Message", "OnProblem", "Row", "peek", "read_rows", "source_files"]

MAX_PROBLEMS = 20


class Row(NamedTuple):
    """Either `messages` (which end with an assistant turn), or `text`, or `input_ids`."""

    messages: tuple[Message, ...]
    text: str | None
    path: str
    line: int
    """1-based line of the file on which the row begins; of a table, the number of the row."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that the answers may call."""
    input_ids: tuple[int, ...] | None = None
    """Tokens that were made elsewhere."""
    supervised: tuple[int, ...] = ()
    """0 or 1 for each of `input_ids`."""
    source_number: int = 0
    """Which of the sources it comes from."""

    @property
    def source(self) -> str:
        """The row as path:line."""
        return f"{self.path}:{self.line}"


OnProblem = Callable[[str, RowError | TrainError], None]
"""Is told of a row (path:line) or a file (its path) that cannot be read."""


class _Problems:
    """What is wrong with rows, to be said all at once; or, with `on_problem`, one by one."""

    def __init__(self, on_problem: OnProblem | None) -> None:
        self.lines: list[str] = []
        self.hints: dict[str, None] = {}
        self.on_problem = on_problem

    def add(self, path: Path, line: int, e: RowError) -> None:
        if self.on_problem:
            self.on_problem(f"{path}:{line}", e)
            return
        self.lines.append(f"{path}:{line}: {e.message}")
        self.hints.setdefault(e.hint)

    @property
    def are_many(self) -> bool:
        return len(self.lines) >= MAX_PROBLEMS

    def error(self) -> TrainError:
        more = [f"(reading stopped after {MAX_PROBLEMS} problems)"] if self.are_many else []
        return TrainError("\n".join([*self.lines, *more]), "\n".join(h for h in self.hints if h))


def read_rows(sources: tuple[DataFile, ...], max_rows: int, on_problem: OnProblem | None = None) -> Iterator[Row]:
    """Rows of all sources in order, at most `max_rows` (0: all) and of each its own limit. Prints the format of each.

    Raises TrainError that lists up to 20 problems. After the first problem rows are still checked, but not yielded.
    With `on_problem` it is told of every problem instead, and all rows that can be read are yielded.
    """
    problems, num_read = _Problems(on_problem), 0
    for number, source in enumerate(sources):
        limits = [limit for limit in (max_rows and max_rows - num_read, source.max_rows) if limit]
        if max_rows and num_read >= max_rows:
            break
        reader = _SourceReader(source, number, min(limits, default=0))
        yield from reader.rows(problems)
        num_read += reader.num_read
        if problems.are_many:
            break
    if problems.lines:
        raise problems.error()


@functools.lru_cache(maxsize=64)
def source_files(source: DataFile) -> tuple[Path, ...]:
    """The local files of a source, in order; a dataset of a hub is fetched first. Raises TrainError."""
    if source.kind != "path":
        from .dataset_hub import fetch

        return tuple(fetch(source))
    return tuple(data_files(source.path, source.split))


def peek(source: DataFile, path: Path) -> str:
    """Format of a file of the source by its first row; "" where only reading it all the way can tell (tables, zstd, maps).

    Standard library only. Raises TrainError.
    """
    if source.map or inner_suffix(path) in TABLE_SUFFIXES or path.suffix.lower() == ".zst":
        return ""
    parser = _RowParser(source)
    line, value = next(read_values(path))
    try:
        if isinstance(value, RowError):
            raise value
        parser.parse(value)
    except RowError as e:
        raise TrainError(f"{path}:{line}: {e.message}", e.hint) from None
    return parser.format


class _SourceReader:
    """One source: which files, which format ("" until the first row of a file says so), which names."""

    def __init__(self, source: DataFile, number: int, max_rows: int) -> None:
        self.source, self.number, self.max_rows = source, number, max_rows
        self.num_read = 0
        self._told: set[str] = set()
        self._map: Callable[[Any], list[Any]] | None = None
        if source.map:
            from .row_map import load_map

            self._map = load_map(source.map)

    def rows(self, problems: _Problems) -> Iterator[Row]:
        """Rows of all files; nothing after the first problem."""
        for path in source_files(self.source):
            if self.max_rows and self.num_read >= self.max_rows:
                return
            try:
                yield from self._rows_of_file(path, problems)
            except TrainError as e:
                if problems.on_problem is None:
                    raise
                problems.on_problem(str(path), e)
            if problems.are_many:
                return

    def _rows_of_file(self, path: Path, problems: _Problems) -> Iterator[Row]:
        parser, shown = _RowParser(self.source), str(path)
        for line, value in read_values(path):
            if self.max_rows and self.num_read >= self.max_rows:
                return
            self.num_read += 1
            try:
                if isinstance(value, RowError):
                    raise value
                made = [parser.parse(v) for v in self._map(value)] if self._map else (parser.parse(value),)
            except RowError as e:
                problems.add(path, line, e)
                unknown_shape = not parser.format and not isinstance(value, RowError)
                if (unknown_shape and problems.on_problem is None) or problems.are_many:
                    return
                continue
            if parser.format not in self._told:
                self._tell(path, parser)
            if not problems.lines:
                for p in made:
                    yield Row(p.messages, p.text, shown, line, p.tools, p.input_ids, p.supervised, self.number)

    def _tell(self, path: Path, parser: _RowParser) -> None:
        if not parser.format:
            return
        self._told.add(parser.format)
        unread = f"; keys that are not read: {', '.join(parser.unread)}" if parser.unread else ""
        print(f"{path}: rows are read as `{parser.format}` ({parser.decided_by}){unread}", flush=True)


class _RowParser:
    """Values of one file -> messages, text or tokens."""

    def __init__(self, source: DataFile) -> None:
        self.format = "" if source.format == "auto" else source.format
        self.decided_by = f"the recipe says format: {source.format}" if self.format else ""
        self.unread: list[str] = []
        self._names = source.names
        self._columns = source.names.columns

    def parse(self, value: Any) -> Parsed:
        """What a row says. The first row decides the format of a file read as `auto`. Raises RowError."""
        if isinstance(value, dict) and not REFUSED_KEYS.isdisjoint(value):
            refuse_foreign(value)
        if self._columns:
            value = self._renamed(value)
        if not self.format:
            self.format = detect(value)
            self.decided_by = "columns and its first row say so" if self._columns else "its first row says so"
        if not fits(self.format, value):
            raise RowError(
                f"the row has {describe(value)}, but the file is read as `{self.format}` ({self.decided_by})",
                f"Put rows of different formats into different files.\n{SHAPES}",
            )
        return FORMATS[self.format].parse(value, self._names)

    def _renamed(self, value: Any) -> dict[str, Any]:
        """The row under our names: the columns that are named, and nothing else."""
        if not isinstance(value, dict):
            raise RowError(f"the row has {describe(value)}, and `columns` names keys", SHAPES)
        names = self._names
        if not self.decided_by or not self.unread:
            self.unread = [str(key) for key in value if key not in self._columns.values()]
        kept = {ours: value.get(theirs) for ours, theirs in self._columns.items() if ours not in _TURNED}
        if names.messages:
            turns = field(value, names.messages, "the row")
            return {_messages_key(turns, names, self.format): turns, **kept}
        asked = {"instruction": _asked(value, names)}
        if not names.response:
            return {"text": asked["instruction"]}
        return {**asked, "output": field(value, names.response, "the row"), **kept}


_TURNED = frozenset({"prompt", "query", "response", "messages"})


def _asked(row: dict[str, Any], names: RowNames) -> Any:
    """LLaMA-Factory's question: prompt and query, with a line end between them where there are both."""
    parts = [field(row, name, "the row") for name in (names.prompt, names.query) if name]
    if not parts:
        raise RowError(
            "`columns` names neither prompt, query nor messages", "Write columns: {prompt: NAME, response: NAME}"
        )
    return parts[0] if len(parts) == 1 else "\n".join(str(part) for part in parts if part)


def _messages_key(turns: Any, names: RowNames, format: str) -> str:
    if format in ("messages", "sharegpt"):
        return "messages" if format == "messages" else "conversations"
    has_tags = any((names.role_tag, names.content_tag, names.user_tag, names.assistant_tag))
    first = turns[0] if isinstance(turns, list) and turns else None
    plain = isinstance(first, dict) and "role" in first and "content" in first
    return "messages" if plain and not has_tags else "conversations"
