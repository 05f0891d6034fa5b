"""Data files as streams of rows: (line or row number, JSON value) one by one, whatever the file's size.

json (one array), jsonl, csv, tsv and txt (each line is a text) are read here with the standard library, packed by gzip too; parquet and Arrow files,
and zstd, by pyarrow, which is imported only for them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .row_values import RowError
from .spec import TrainError

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
PACKED_SUFFIXES = (".gz", ".zst")
TABLE_SUFFIXES = (".parquet", ".arrow")
BOM_UTF8, BOMS_UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
GZIP, ZSTD, PARQUET, ARROW_FILE, ARROW_STREAM = (
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"PAR1",
    b"ARROW1",
    b"\xff\xff\xff\xff",
)
"""How these files begin."""
BINARY = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"7z\xbc\xaf", b"%PDF", b"BZh", b"\xfd7zXZ", b"SQLite format 3")
ONE_ROW_PER_LINE = "A .jsonl file holds one JSON value per line; a .json file holds one array: [row, row, ...]."
READABLE = "json, jsonl, csv, tsv or txt (also .gz or .zst), parquet and Arrow files are read."
CHUNK = 1 << 20
"""Characters that are read at once of an array."""
NEAR_END = 16
"""An error this close to the end of what was read may be a row that goes on; no literal of JSON is longer."""


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, JSON value or RowError) of every row: the 1-based line on which it begins, or its number in a table.

    Raises TrainError when the file itself cannot be read, or holds no rows.
    """
    head = read_head(path)
    if head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        from .row_tables import table_values

        values = table_values(path, head)
    else:
        values = _text_values(path)
    num_rows = 0
    for item in values:
        num_rows += 1
        yield item
    if num_rows == 0:
        raise TrainError(
            f"data file {path} holds no rows", "Give a file with at least one row, or remove it from data.files."
        )


def read_head(path: Path) -> bytes:
    """The first 64 KB. Raises TrainError when there is no such file, or nothing in it, or it is nothing that is read here."""
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
            f"data file {path} is a binary file of a kind that is not read", f"Convert (or unpack) it first. {READABLE}"
        )
    return head


def inner_suffix(path: Path) -> str:
    """ ".jsonl" of rows.jsonl, rows.jsonl.gz and rows.JSONL.zst."""
    name = path.name.lower()
    for packed in PACKED_SUFFIXES:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _open(path: Path) -> IO[bytes]:
    """The file unpacked: what it begins with decides, not its name."""
    with path.open("rb") as f:
        head = f.read(4)
    if head == ZSTD:
        from .row_tables import open_zstd

        return open_zstd(path)
    return gzip.open(path, "rb") if head.startswith(GZIP) else path.open("rb")  # pyright: ignore[reportReturnType]


def _text_values(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with _open(path) as f:
            head = f.read(1 << 16)
        with _open(path) as f:
            if head.startswith(BOMS_UTF16) or head[:64].count(0) > 8:
                raise _encoding_error(path, 1)
            if inner_suffix(path) == ".txt":
                yield from _plain_lines(path, f)
            elif inner_suffix(path) in (".csv", ".tsv"):
                yield from _csv_values(path, f)
            elif _is_array(path, head):
                yield from _array_values(path, f)
            else:
                yield from _line_values(path, f)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise damaged(path, e) from e


def damaged(path: Path, error: Exception) -> TrainError:
    """The error for a packed or binary file that breaks off or has wrong bytes."""
    return TrainError(f"data file {path} is damaged: {error}", "Copy or download it again.")


def _is_array(path: Path, head: bytes) -> bool:
    """Whether the file is one JSON array. A .jsonl file may also begin with "[": then each line is a list of messages."""
    head = head.removeprefix(BOM_UTF8).lstrip()
    if not head.startswith(b"["):
        return False
    if inner_suffix(path) not in (".jsonl", ".ndjson"):
        return True
    try:
        json.loads(head.split(b"\n", 1)[0])
    except (json.JSONDecodeError, UnicodeDecodeError):
        return b"\n" in head
    return False


def _line_values(path: Path, f: IO[bytes]) -> Iterator[tuple[int, Any]]:
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


def _plain_lines(path: Path, f: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for number, raw in enumerate(f, start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise _encoding_error(path, number) from None
        if text.strip():
            yield number, {"text": text}


def _csv_values(path: Path, f: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Each line after the header as an object of texts. A quoted field may hold line ends."""
    csv.field_size_limit(1 << 30)
    text = io.TextIOWrapper(f, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter="\t" if inner_suffix(path) == ".tsv" else ",", strict=True)
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError:
            raise _encoding_error(path, line) from None
        except csv.Error as e:
            yield (
                line,
                RowError(
                    f"not valid CSV: {e}", "Quote a field that holds commas, quotes or line ends; double its quotes."
                ),
            )
            return
        if not fields:
            continue
        if not names:
            names = _csv_names(path, fields)
        elif len(fields) != len(names):
            hint = "Each line has one field for each name of the first line; quote a field that holds a comma."
            yield line, RowError(f"{len(fields)} fields, and the first line names {len(names)}", hint)
        else:
            yield line, dict(zip(names, fields, strict=True))


def _csv_names(path: Path, fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    if len(set(names)) < len(names) or "" in names:
        raise TrainError(
            f"{path}:1: the first line is no list of different names: {', '.join(fields)[:80]}",
            "The first line of a csv file names its columns.",
        )
    return names


class _Window:
    """The part of a text file that is being looked at."""

    def __init__(self, path: Path, f: IO[bytes]) -> None:
        self.path, self.text, self.at_end = path, "", False
        self._f = io.TextIOWrapper(f, encoding="utf-8-sig", newline="")
        self._line, self._counted = 1, 0

    def line_at(self, position: int) -> int:
        """The 1-based line of the file in which `text[position]` stands. Positions must not go down."""
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def more(self, drop: int) -> None:
        """Forget `drop` characters, and read as many as are left, but a chunk at least."""
        line = self.line_at(drop)
        rest = self.text[drop:]
        try:
            new = self._f.read(max(CHUNK, len(rest)))
        except UnicodeDecodeError:
            raise _encoding_error(self.path, line) from None
        self.text, self.at_end, self._counted = rest + new, not new, 0


def _array_values(path: Path, f: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Elements of one JSON array, each with the line on which it begins. No more than a few are in memory."""
    window, decode = _Window(path, f), json.JSONDecoder().raw_decode
    window.more(0)
    end = window.text.index("[") + 1  # where the previous element is over
    separator = ""
    while True:
        text = window.text
        try:
            start = _next_element(text, end, separator)
            if start < 0:
                break
            value, after = decode(text, start)
            # A number may go on: -2.5 and e-7.
            needed = NEAR_END if isinstance(value, int | float) else 1
            if after > len(text) - needed and not window.at_end:
                raise json.JSONDecodeError("Expecting ',' or ']' between rows", text, after)
        except json.JSONDecodeError as e:
            unfinished = e.pos >= len(text) - NEAR_END or e.msg.startswith("Unterminated string")
            if unfinished and not window.at_end:
                window.more(end)
                end = 0
                continue
            if text[end:].strip(" \t\r\n,"):
                yield window.line_at(e.pos), _json_error(e)
            else:
                message = "the array is not closed: ] is missing at the end"
                yield window.line_at(len(text)), RowError(message, ONE_ROW_PER_LINE)
            return
        yield window.line_at(start), value
        end, separator = after, ","
    yield from _after_array(window, _skip_space(window.text, end) + 1)


def _next_element(text: str, end: int, separator: str) -> int:
    """Where the next element begins, behind `separator`; -1 where the array is over. Raises JSONDecodeError."""
    position = _skip_space(text, end)
    if text.startswith("]", position):
        return -1
    if not text.startswith(separator, position):
        raise json.JSONDecodeError("Expecting ',' or ']' between rows", text, position)
    return _skip_space(text, position + len(separator))


def _after_array(window: _Window, position: int) -> Iterator[tuple[int, Any]]:
    """A RowError where something follows the array's end."""
    while not window.text[position:].strip() and not window.at_end:
        window.more(len(window.text))
        position = 0
    start = _skip_space(window.text, position)
    if start < len(window.text):
        hint = f"{ONE_ROW_PER_LINE} Rows that are lists of messages, one a line, need a name that ends in .jsonl."
        yield window.line_at(start), RowError("something follows the end of the array", hint)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _json_error(e: json.JSONDecodeError) -> RowError:
    near = e.doc[max(0, e.pos - 20) : e.pos + 20].replace("\n", " ")
    return RowError(f"not valid JSON: {e.msg} at column {e.colno}, near {near!r}", ONE_ROW_PER_LINE)


def _encoding_error(path: Path, line: int) -> TrainError:
    """Says which encoding the file seems to have. Reads up to 256 MB of it."""
    with _open(path) as f:
        data = f.read(1 << 28)
    source, target = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(f".utf8{path.suffix}")))
    try:
        start = len(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        start = e.start
        line = data.count(b"\n", 0, start) + 1
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
