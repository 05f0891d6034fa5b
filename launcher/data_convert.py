"""`launch data convert`: rows of any format that training reads, written in another one."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trainer.row_files import read_values
from trainer.row_formats import FORMATS, fits, unread_keys
from trainer.row_values import RowError
from trainer.rows import Row, read_rows, source_files
from trainer.spec import DataFile

from .errors import LaunchError
from .recipe_yaml import shown
from .row_forms import FORMS
from .run_dir import file_of_the_user

MAX_PROBLEMS = 20


@dataclass
class Converted:
    """What was done."""

    rows: int = 0
    """Rows that were written."""
    left_out: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """What the format cannot hold -> in how many rows."""


def convert(source: str, out: Path, to: str, format: str = "auto", lossy: bool = False) -> Converted:
    """Write `out` (jsonl, or one array for .json), which must not exist. `source`: a file, a folder or a pattern.

    Raises LaunchError, listing up to 20 rows that `to` cannot hold unless `lossy`, and TrainError listing rows that cannot
    be read. Then nothing is written. Prints the format of each file, and its keys that are not read. Rows are streamed.
    """
    _check(source, out, to, format)
    files = (DataFile(os.path.abspath(source), format),)
    found = Converted()
    _tell_unread(files[0])
    with file_of_the_user(out) as f:
        _write(f, converted_rows(read_rows(files, 0), to, lossy, found), as_array=out.suffix == ".json")
        if not found.rows:
            raise LaunchError(f"{to} can hold none of the {found.left_out:,} rows of {source}", "Nothing was written.")
    return found


def _check(source: str, out: Path, to: str, format: str) -> None:
    """Raises LaunchError that lists everything wrong with the flags."""
    wrong = []
    if to not in FORMS:
        wrong.append(f"--to {to}: is not there; allowed: {', '.join(FORMS)}")
    if format != "auto" and format not in FORMATS:
        wrong.append(f"--from {format}: is not there; allowed: auto, {', '.join(FORMATS)}")
    if out.suffix not in (".json", ".jsonl"):
        wrong.append(f"{shown(out)}: is neither .jsonl nor .json by its name; one of these is written")
    if out.exists():
        wrong.append(f"{shown(out)} exists already; name a new file, nothing is overwritten")
    if not os.path.exists(source) and not any(c in source for c in "*?["):
        wrong.append(f"{source} does not exist; a dataset of a hub must be downloaded first")
    if wrong:
        raise LaunchError("\n".join(wrong))


def _tell_unread(source: DataFile) -> None:
    """Print which keys of the first row of each file no format of rows has: they are not written either."""
    for path in source_files(source):
        _, value = next(read_values(path))
        if isinstance(value, RowError):
            continue  # said once it is read for good
        name = source.format if source.format != "auto" else next((n for n in FORMATS if fits(n, value)), "")
        if unread := unread_keys(name, value) if name else []:
            print(f"{shown(path)}: keys that are not read, and so not written: {', '.join(unread)}")


def converted_rows(rows: Iterator[Row], to: str, lossy: bool, found: Converted) -> Iterator[dict[str, Any]]:
    """The rows that `to` can hold, counted. Raises LaunchError after all rows, or after 20 that it cannot."""
    problems: list[str] = []
    for row in rows:
        value, losses = FORMS[to](row)
        kinds = list(dict.fromkeys(loss.what for loss in losses))
        if losses and not lossy:
            problems.append(f"{row.source}: {to} cannot hold {', '.join(kinds)}")
            if len(problems) == MAX_PROBLEMS:
                problems.append(f"(reading stopped after {MAX_PROBLEMS} such rows)")
                break
            continue
        found.lost.update(kinds)
        if value is None:
            found.left_out += 1
        elif not problems:
            found.rows += 1
            yield value
    if problems:
        others = "" if to in ("messages", "text") else " --to messages holds every conversation."
        hint = f"Nothing was written. --lossy writes what {to} can hold, and counts the rest.{others}"
        raise LaunchError("\n".join(problems), hint)


def _write(f: IO[str], values: Iterator[dict[str, Any]], as_array: bool) -> None:
    for number, value in enumerate(values):
        before = ("[\n" if number == 0 else ",\n") if as_array else ""
        f.write(before + json.dumps(value, ensure_ascii=False) + ("" if as_array else "\n"))
    if as_array:
        f.write("\n]\n")
