"""Reading a text file that ought to be UTF-8, and saying which encoding it seems to be when it is not."""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path

from .errors import Problem

# Narrowest first: nearly every Chinese text file that is not UTF-8 fits GB2312, and Big5 text hardly ever does.
_CANDIDATES = (("gb2312", "GBK"), ("big5", "BIG5"), ("gb18030", "GB18030"))


def read_utf8(path: Path, name: str) -> tuple[str, Problem | None]:
    """(text, None), or ("", why not). `name` is how the file is shown to people. A byte-order mark is dropped."""
    try:
        data = path.read_bytes()
    except OSError as e:
        return "", Problem(name, f"cannot be read: {e.strerror}", "Check the path and its permissions.")
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as e:
        bad = e.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
    line = data.count(b"\n", 0, bad) + 1
    start = data.rfind(b"\n", 0, bad) + 1
    column = len(data[start:bad].decode("utf-8", "replace")) + 1
    guess = guess_encoding(data)
    return "", Problem(
        f"{name}:{line}:{column}",
        f"the file is not UTF-8 (byte 0x{data[bad]:02X}); it seems to be {guess}",
        f"Convert it: iconv -f {guess} -t UTF-8 {shlex.quote(name)} > utf8.tmp && mv utf8.tmp {shlex.quote(name)}",
    )


def guess_encoding(data: bytes) -> str:
    """A name that iconv knows, for bytes that are not UTF-8. A guess: the first candidate that can decode them all."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    for codec, name in _CANDIDATES:
        try:
            data.decode(codec)
        except UnicodeDecodeError:
            continue
        return name
    return "WINDOWS-1252"
