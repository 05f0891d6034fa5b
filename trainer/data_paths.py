"""What the path of a data source means: a file, a folder, a pattern, or a dataset of a hub. Standard library only."""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from .row_files import PACKED_SUFFIXES, READABLE, TABLE_SUFFIXES, TEXT_SUFFIXES, inner_suffix
from .spec import TrainError

_NAME = r"[A-Za-z0-9][\w.-]*"
_DATASET = re.compile(
    rf"(?P<scheme>modelscope:|hub:)?(?P<id>(?:{_NAME}/)?{_NAME})(:(?P<subset>[^:#\s]+))?(#(?P<rows>\d+))?"
)
_SUFFIXES = frozenset((*TEXT_SUFFIXES, *TABLE_SUFFIXES, *PACKED_SUFFIXES))
NOT_ROWS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files that say something about data, and are none."""
_OTHER_SPLIT = re.compile(r"(^|[-_./ ])(test|val|valid|validation|dev|eval)([-_./ 0-9]|$)", re.IGNORECASE)


class DatasetId(NamedTuple):
    """A dataset of a hub, as a recipe writes it: `ORG/NAME`, `ORG/NAME:SUBSET#ROWS`, `modelscope:ORG/NAME`."""

    kind: str
    """hub | modelscope."""
    name: str
    subset: str
    """"" for the dataset's own default."""
    max_rows: int
    """0: all."""
    named: bool
    """The hub is named, so it cannot be a path."""


def dataset_id(text: str) -> DatasetId | None:
    """`text` as a dataset of a hub; None where it can only be a path."""
    found = _DATASET.fullmatch(text)
    if not found:
        return None
    if not found["scheme"] and ("/" not in found["id"] or Path(found["id"]).suffix.lower() in _SUFFIXES):
        return None
    kind = "modelscope" if found["scheme"] == "modelscope:" else "hub"
    return DatasetId(kind, found["id"], found["subset"] or "", int(found["rows"] or 0), bool(found["scheme"]))


def is_pattern(path: str) -> bool:
    """Whether `path` stands for all files whose names match. A file of that very name wins."""
    return glob.has_magic(path) and not os.path.lexists(path)


def data_files(path: str, split: str = "train") -> list[Path]:
    """The files that an absolute `path` stands for, in the order in which they are read.

    A folder stands for all data files in and below it (.txt files are not: they may be anything); one that `datasets` wrote with save_to_disk for its `split`.
    Raises TrainError where there are none, or where a folder mixes splits.
    """
    if is_pattern(path):
        found = sorted(Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not found:
            raise TrainError(f"no file matches {path}", _nearest_folder(path))
        return found
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    return _saved_dataset(folder, split) or _files_below(folder)


def _nearest_folder(pattern: str) -> str:
    here = Path(pattern)
    while glob.has_magic(str(here)) or not here.is_dir():
        here = here.parent
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in here.iterdir())[:8]
    return f"{here} holds {', '.join(names)}" if names else f"{here} is empty."


def _files_below(folder: Path) -> list[Path]:
    if (folder / "config.json").is_file():
        raise TrainError(f"the folder {folder} holds a model, by its config.json", "Name a folder of data files.")
    inside = (p for p in sorted(folder.rglob("*")) if not any(s.startswith(".") for s in p.relative_to(folder).parts))
    found = [p for p in inside if inner_suffix(p) in _SUFFIXES - {".txt"} and p.name not in NOT_ROWS and p.is_file()]
    if not found:
        raise TrainError(f"the folder {folder} holds no data files", READABLE)
    others = [p for p in found if _OTHER_SPLIT.search(str(p.relative_to(folder)))]
    if others and len(others) < len(found):
        raise TrainError(
            f"the folder {folder} holds files of several splits: {others[0].relative_to(folder)} is not for training, by its name",
            "Name what is meant: a pattern such as train*.jsonl, or the files one by one; the others may go under held_out_files.",
        )
    return found


def _saved_dataset(folder: Path, split: str) -> list[Path]:
    """Files of `Dataset.save_to_disk` (state.json names them) or `DatasetDict.save_to_disk` (a folder for each split).

    Source: datasets 5.2, arrow_dataset.py and dataset_dict.py.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _json(splits).get("splits", [])
        if split not in names:
            raise TrainError(f"{folder} has no split `{split}`", f"It has: {', '.join(names)}. Write split: NAME.")
        return _saved_dataset(folder / split, split)
    state = folder / "state.json"
    if not state.is_file():
        return []
    named = [folder / Path(str(entry["filename"])).name for entry in _json(state).get("_data_files", [])]
    if not named or not all(p.is_file() for p in named):
        raise TrainError(f"{state} names files that are not there", "Copy the whole folder again.")
    return named


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise TrainError(f"{path} cannot be read: {e}", "Copy the whole folder again.") from None
    return found if isinstance(found, dict) else {}
