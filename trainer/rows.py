"""Rows of training data: json and jsonl files, whatever their format (see row_formats.py), become one shape.

Standard library only.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .row_formats import FORMATS, SHAPES, Message, RowError, describe, detect, matching
from .spec import DataFile, TrainError

MAX_PROBLEMS = 20
BOM_UTF8, BOMS_UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
BINARY = (b"PAR1", b"\x1f\x8b", b"PK\x03\x04", b"ARROW1", b"\x28\xb5\x2f\xfd")
"""How parquet, gzip, zip (xlsx), Arrow and zstd files begin."""
ONE_ROW_PER_LINE = "A .jsonl file holds one JSON value per line; a .json file holds one array: [row, row, ...]."


@dataclass(frozen=True)
class Row:
    """Either `messages` (which end with an assistant turn) or `text`."""

    messages: tuple[Message, ...]
    text: str | None
    path: str
    line: int
    """1-based line of the file on which the row begins."""

    @property
    def source(self) -> str:
        """The row as path:line."""
        return f"{self.path}:{self.line}"


def read_rows(files: tuple[DataFile, ...], max_rows: int) -> Iterator[Row]:
    """Rows of all files in order, at most `max_rows` (0: all). Prints the format of each file.

    Raises TrainError that lists up to 20 problems. After the first problem rows are still checked, but not yielded.
    """
    problems: list[str] = []
    hints: dict[str, None] = {}
    num_read = 0
    for file in files:
        reader = _FileReader(file)
        for line, value in reader.values():
            if max_rows and num_read >= max_rows:
                break
            num_read += 1
            try:
                if isinstance(value, RowError):
                    raise value
                messages, text = reader.parse(value)
            except RowError as e:
                problems.append(f"{file.path}:{line}: {e.message}")
                hints.setdefault(e.hint)
                unknown_shape = not reader.format and not isinstance(value, RowError)
                if unknown_shape or len(problems) >= MAX_PROBLEMS:
                    break
                continue
            if not problems:
                yield Row(messages, text, file.path, line)
        if len(problems) >= MAX_PROBLEMS or (max_rows and num_read >= max_rows):
            break
    if problems:
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"(reading stopped after {MAX_PROBLEMS} problems)")
        raise TrainError("\n".join(problems), "\n".join(h for h in hints if h))


class _FileReader:
    """One data file: how it is laid out, and which format its rows have ("" until the first row says so)."""

    def __init__(self, file: DataFile) -> None:
        self.path = Path(file.path)
        self.format = "" if file.format == "auto" else file.format
        self.decided_by = f"the recipe says format: {file.format}" if self.format else ""

    def values(self) -> Iterator[tuple[int, Any]]:
        """(line, JSON value or RowError) of every row. Raises TrainError when the file itself cannot be read."""
        path = self.path
        head = read_head(path)
        if head.startswith(BOMS_UTF16) or head[:64].count(0) > 8:
            raise _encoding_error(path, 1)
        num_rows = 0
        for item in _array_values(path) if _is_array(path, head) else _line_values(path):
            num_rows += 1
            yield item
        if num_rows == 0:
            raise TrainError(
                f"data file {path} holds no rows", "Give a file with at least one row, or remove it from data.files."
            )

    def parse(self, value: Any) -> tuple[tuple[Message, ...], str | None]:
        """(messages, text) of a row. The first row decides the format of a file read as `auto`."""
        if not self.format:
            self.format = detect(value)
            self.decided_by = "its first row says so"
        if self.format not in matching(value):
            raise RowError(
                f"the row has {describe(value)}, but the file is read as `{self.format}` ({self.decided_by})",
                f"Put rows of different formats into different files.\n{SHAPES}",
            )
        parsed = FORMATS[self.format].parse(value)
        if self.decided_by:
            print(f"{self.path}: rows are read as `{self.format}` ({self.decided_by})", flush=True)
            self.decided_by = ""
        return parsed


def read_head(path: Path) -> bytes:
    """The first 64 KB. Raises TrainError when there is no such file, or nothing in it, or it is no text."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise TrainError(f"data file {path} {what}", "Check data.files; paths are relative to the recipe file.")
    with path.open("rb") as f:
        head = f.read(1 << 16)
    if not head.removeprefix(BOM_UTF8).strip():
        raise TrainError(
            f"data file {path} is empty", "Give a file with at least one row, or remove it from data.files."
        )
    if head.startswith(BINARY):
        raise TrainError(
            f"data file {path} is not json or jsonl but a binary file", "Convert (or unpack) it to jsonl first."
        )
    return head


def _is_array(path: Path, head: bytes) -> bool:
    """Whether the file is one JSON array. A .jsonl file may also begin with "[": then each line is a list of messages."""
    head = head.removeprefix(BOM_UTF8).lstrip()
    if not head.startswith(b"["):
        return False
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return True
    try:
        json.loads(head.split(b"\n", 1)[0])
    except (json.JSONDecodeError, UnicodeDecodeError):
        return b"\n" in head
    return False


def _line_values(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as f:
        for number, raw in enumerate(f, start=1):
            if number == 1:
                raw = raw.removeprefix(BOM_UTF8)
            if not raw.strip():
                continue
            try:
                value: Any = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError:
                raise _encoding_error(path, number) from None
            except json.JSONDecodeError as e:
                value = _json_error(e)
            yield number, value


def _array_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of one JSON array, each with the line on which it begins."""
    data = path.read_bytes().removeprefix(BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _encoding_error(path, data.count(b"\n", 0, e.start) + 1) from None
    del data
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _skip_space(text, text.index("[") + 1)
    while position < len(text) and text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
            yield line, value
            position = _skip_space(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' between rows", text, position)
        except json.JSONDecodeError as e:
            yield e.lineno, _json_error(e)
            return
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    if position >= len(text):
        yield text.count("\n") + 1, RowError("the array is not closed: ] is missing at the end", ONE_ROW_PER_LINE)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _json_error(e: json.JSONDecodeError) -> RowError:
    near = e.doc[max(0, e.pos - 20) : e.pos + 20].replace("\n", " ")
    return RowError(f"not valid JSON: {e.msg} at column {e.colno}, near {near!r}", ONE_ROW_PER_LINE)


def _encoding_error(path: Path, line: int) -> TrainError:
    """Says which encoding the file seems to have. Reads up to 256 MB of it."""
    with path.open("rb") as f:
        data = f.read(1 << 28)
    source, target = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(f".utf8{path.suffix}")))
    try:
        start = len(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        start = e.start
    if not data[:start].isascii() and not data.startswith(BOMS_UTF16):
        return TrainError(
            f"{path}:{line}: a byte that is not UTF-8, in a file that is UTF-8 so far",
            f"Repair that line, or drop such bytes: iconv -f UTF-8 -t UTF-8 -c {source} > {target}",
        )
    guess = _guess_encoding(data)
    return TrainError(
        f"{path}:{line}: the file is not UTF-8"
        + (f"; it looks like {guess}" if guess else ", and its encoding cannot be told"),
        f"Convert it{'' if guess else ', for example'}: iconv -f {guess or 'WINDOWS-1252'} -t UTF-8 {source} > {target}",
    )


def _guess_encoding(data: bytes) -> str | None:
    if data.startswith(BOMS_UTF16):
        return "UTF-16"
    if data[:64].count(0) > 8:
        return "UTF-16LE" if data[1:2] == b"\0" else "UTF-16BE"
    for cut in range(4):  # what was read may end inside a character
        try:
            data[: len(data) - cut].decode("gb18030")
        except UnicodeDecodeError:
            continue
        return "GBK"
    return None
