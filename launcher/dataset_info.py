"""LLaMA-Factory's dataset_info.json, read as it is: what it says of a name, in the words of a recipe.

Source: LLaMA-Factory 0.9.5, data/README.md and data/parser.py (`DatasetAttr.join`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .recipe_encoding import read_utf8
from .recipe_layers import Findings
from .recipe_paths import absolute, nearest
from .recipe_yaml import Node, Place, shown

FILE_NAME = "dataset_info.json"
_PLACES = ("file_name", "hf_hub_url", "ms_hub_url")
_REFUSED = {
    "script_url": "a dataset's own script would have to be run; convert its rows to jsonl",
    "cloud_file_name": "download it first, and name the file",
    "om_hub_url": "download it from OpenMind first, and name the file",
    "folder": "name the files of that folder by themselves",
}
_KNOWN = frozenset((*_PLACES, *_REFUSED, "formatting", "ranking", "subset", "split", "num_samples", "columns", "tags"))
_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
_RANKING, _MEDIA = ("chosen", "rejected", "kto_tag"), ("images", "videos", "audios")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
_OPENAI = {
    "role_tag": ("role",), "content_tag": ("content",), "user_tag": ("user",), "assistant_tag": ("assistant",),
    "observation_tag": ("tool",), "function_tag": ("assistant", "function_call", "function"), "system_tag": ("system", "developer"),
}  # fmt: skip
"""Tags with which rows are OpenAI's own messages."""


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset_info.json."""

    path: Path
    text: str
    entries: dict[str, Any]
    """Name -> what the file says of it."""

    def source(self, name: str, at: Place, found: Findings) -> dict[str, Any] | None:
        """Keys of a recipe's source for one name; None, with a problem, where it cannot be trained on."""
        entry, where = self.entries[name], f"{shown(self.path)}:{self._line(name)}: {name}"
        problem = _problem(entry)
        if problem:
            found.add(at, f"{where}: {problem[0]}", problem[1])
            return None
        for key in (key for key in entry if key not in _KNOWN):
            found.notes.append(f"{where}: `{key}` is not read; LLaMA-Factory does not read it either")
        values: dict[str, Any] = {"path": self._place(entry), **_names(entry)}
        if entry.get("num_samples"):
            values["max_rows"] = entry["num_samples"]
            found.notes.append(
                f"{where}: num_samples {entry['num_samples']}: the first rows are taken; LLaMA-Factory draws them at random"
            )
        if entry.get("split") and entry["split"] != "train":
            values["split"] = entry["split"]
        return values

    def _place(self, entry: dict[str, Any]) -> str:
        subset = f":{entry['subset']}" if entry.get("subset") else ""
        if "hf_hub_url" in entry:
            return f"hub:{entry['hf_hub_url']}{subset}"
        if "ms_hub_url" in entry:
            return f"modelscope:{entry['ms_hub_url']}{subset}"
        return str(self.path.parent / entry["file_name"])

    def _line(self, name: str) -> int:
        at = re.search(rf"^\s*{re.escape(json.dumps(name, ensure_ascii=False))}\s*:", self.text, re.MULTILINE)
        return self.text.count("\n", 0, at.end()) + 1 if at else 1


def read_dataset_info(node: Node, found: Findings) -> DatasetInfo | None:
    """The file (or the one in the folder) that `data.dataset_info` names; None, with a problem, where it cannot be read."""
    if not isinstance(node.value, str) or not node.value:
        return None
    path = absolute(node.value, node.at.folder)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        found.add(node.at, f"data.dataset_info: there is no {shown(path)}", nearest(path, node))
        return None
    text, problem = read_utf8(path, shown(path))
    if problem is not None:
        found.problems.append(problem)
        return None
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as e:
        found.add(
            node.at,
            f"data.dataset_info: {shown(path)}:{e.lineno}:{e.colno}: not valid JSON: {e.msg}",
            "Repair it there.",
        )
        return None
    if not isinstance(entries, dict):
        found.add(
            node.at, f"data.dataset_info: {shown(path)} holds no names", 'It is written {"NAME": {"file_name": ...}}.'
        )
        return None
    return DatasetInfo(path, text, entries)


def _problem(entry: Any) -> tuple[str, str] | None:
    """(message, hint) for an entry that cannot be used."""
    if not isinstance(entry, dict):
        return "is no object", 'It is written {"file_name": "rows.json"}.'
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if not isinstance(columns, dict) or not isinstance(tags, dict):
        return "`columns` and `tags` are objects", "Each names keys of the rows."
    ranking = [key for key in _RANKING if columns.get(key)]
    if entry.get("ranking") or ranking:
        why = "ranking: true" if entry.get("ranking") else f"columns.{ranking[0]}"
        hint = "Preference training (DPO, KTO, reward models) is not supported; keep the good answers as a file of their own."
        return f"holds ranking rows ({why})", hint
    media = [key for key in _MEDIA if columns.get(key)]
    if media:
        return f"has columns.{media[0]}", "Only text can be learnt."
    has_place = any(isinstance(entry.get(key), str) for key in _PLACES)
    refused = [key for key in _REFUSED if entry.get(key) and (key == "folder" or not has_place)]
    if refused:
        return f"`{refused[0]}` is not supported", f"{_REFUSED[refused[0]]}.".capitalize()
    if not has_place:
        return "says not where its rows are", f"One of {', '.join(_PLACES)} is needed."
    if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt", "openai"):
        return f"formatting {entry['formatting']!r}", "It may be alpaca, sharegpt or openai."
    for what, names, allowed in (("columns", columns, (*_COLUMNS, *_RANKING, *_MEDIA)), ("tags", tags, _TAGS)):
        wrong = [key for key in names if key not in allowed]
        if wrong:
            return f"`{wrong[0]}` in {what} is unknown", f"Allowed: {', '.join(allowed)}."
    if entry.get("formatting") == "openai" and (other := [k for k, v in tags.items() if v not in _OPENAI[k]]):
        return f"formatting openai with {other[0]} {tags[other[0]]!r}", "Write formatting sharegpt: its tags are free."
    return None


def _names(entry: dict[str, Any]) -> dict[str, Any]:
    """Format, columns and tags. Without `columns` LLaMA-Factory's defaults are those of the format itself."""
    columns = {key: value for key, value in (entry.get("columns") or {}).items() if value and key in _COLUMNS}
    tags = {key: value for key, value in (entry.get("tags") or {}).items() if value}
    formatting = entry.get("formatting", "alpaca")
    if formatting == "alpaca":
        return {"columns": columns} if columns else {"format": "alpaca"}
    if columns or formatting == "openai":
        columns.setdefault("messages", "conversations")
    names: dict[str, Any] = {"columns": columns} if columns else {}
    if formatting == "openai":
        return {"format": "messages", **names}
    return {"format": "sharegpt", **names, **({"tags": tags} if tags else {})}
