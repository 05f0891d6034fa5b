"""Where another program's rows come from, and with which chat template, in our words. The only place that knows `data`'s keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.turn_templates import candidates

from .import_draft import Draft
from .recipe_fields import fields
from .recipe_yaml import Node

_SUFFIX = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt)(\.gz|\.zst)?$", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

FILE_KINDS = frozenset(("json", "jsonl", "csv", "parquet", "arrow", "text"))
"""Paths that are no path but say what kind of file follows."""


@dataclass(frozen=True)
class Source:
    """Rows of one place."""

    path: str
    """A file or folder as the program has it, or the id of a dataset of a hub."""
    node: Node
    """Where it is named."""
    hub: str = ""
    """"" for a file; hub or modelscope."""
    format: str = "auto"
    max_rows: int = 0
    subset: str = ""
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    """Part of a row -> the key that holds it (prompt, query, response, history, messages, system, tools)."""
    tags: dict[str, str] = field(default_factory=dict)
    """Names inside turns, as in LLaMA-Factory's dataset_info.json."""


def write_sources(d: Draft, role: str, ours: str, sources: list[Source]) -> None:
    """Sets data.files or data.held_out_files."""
    items = [_item(d, source) for source in sources if source.path]
    if not items:
        return
    short = all(list(item) == ["path"] for item in items)
    d.values[ours] = [item["path"] for item in items] if short else items
    for key, node in d.all_of(role):
        d.note(key, node, ours, d.values[ours])


def _item(d: Draft, source: Source) -> dict[str, Any]:
    """One item of the list; what the recipe has no key for is a choice to make."""
    item: dict[str, Any] = {"path": _path(d, source)}
    formats = fields()["data.files.*.format"].literals
    if source.format in formats and source.format != "auto":
        item["format"] = source.format
    elif source.format != "auto":
        d.choose(
            source.node, f"rows of the kind {source.format} are not read", f"One of: {', '.join(map(str, formats))}."
        )
    wanted = {
        "max_rows": source.max_rows,
        "split": source.split if source.hub and source.split != "train" else "",
        "columns": source.columns,
        "tags": source.tags,
    }
    for key, value in wanted.items():
        if not value:
            continue
        known = f"data.files.*.{key}" in fields()
        inner = isinstance(value, dict) and any(path.startswith(f"data.files.*.{key}.") for path in fields())
        if known or inner:
            item[key] = value
        else:
            names = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            name = key.replace("_", " ")
            hint = "Convert the rows: to a known format, such as {messages: [{role, content}, ...]}, or fewer of them."
            d.choose(source.node, f"{source.path}: the {name} ({names}) cannot be written for one file", hint)
    return item


def reads_hubs() -> bool:
    """Whether a data file may be the id of a dataset."""
    return "data.files.*.weight" in fields()


def _path(d: Draft, source: Source) -> str:
    if source.hub:
        name = f"{source.path}:{source.subset}" if source.subset else source.path
        name = f"modelscope:{name}" if source.hub == "modelscope" else name
        if not reads_hubs():
            hint = "Download it, and name its file (json or jsonl) in data.files."
            d.choose(source.node, f"{name} is a dataset of a hub; a recipe reads files", hint)
        return name
    found = find_file(d, source.path)
    if found is not None:
        return str(found)
    near = [str(p) for p in places(d, source.path)]
    looked = f"Looked for {', '.join(near[:3])}. Write where it is: data.files."
    d.choose(source.node, f"{source.path} is not there", looked)
    return source.path


def places(d: Draft, path: str, below: str = "") -> Iterator[Path]:
    """Where a relative path may lie: beside the file, in the current folder, in the folders above the file (the program's root)."""
    inner = Path(below) / Path(path).expanduser()
    if inner.is_absolute():
        yield inner
        return
    folders = [d.start.folder, Path.cwd(), *list(d.start.folder.parents)[:4]]
    yield from dict.fromkeys((folder / inner).resolve() for folder in folders)


def find_file(d: Draft, path: str, below: str = "") -> Path | None:
    """The first of `places` that exists, absolute."""
    return next((p for p in places(d, path, below) if p.exists()), None)


def is_file_name(d: Draft, text: str) -> bool:
    """Whether `text` means a file or folder rather than the id of a dataset."""
    return bool(_SUFFIX.search(text)) or not _HUB_ID.fullmatch(text) or find_file(d, text) is not None


def write_template(d: Draft, name: str, node: Node, key: str) -> None:
    """Sets data.template to the program's own template `name`, token for token, where we have it."""
    tool = "xtuner" if d.table.name == "xtuner" else "llamafactory"
    qualified = f"{tool}/{name}"
    if qualified in candidates(qualified):
        d.values["data.template"] = qualified
        d.note(key, node, "data.template", qualified)
        d.facts.add("tool_template")
        return
    hint = "The model's own is used now (data.template: model). Another: a .jinja file, or a name that is in the list."
    d.choose(node, f"{key}: there is no template {name} of {d.table.program} here", hint)


def write_model_template(d: Draft, key: str = "", node: Node | None = None, note: str = "") -> None:
    """The model's own chat template, which is what a recipe takes by itself."""
    d.facts.add("model_template")
    if node is not None:
        d.note(key, node, "data.template", "model", note)


def write_system(d: Draft, text: str, where: list[tuple[str, Node]]) -> None:
    """Sets data.system."""
    d.values["data.system"] = text
    for key, node in where:
        d.note(key, node, "data.system", text)


def map_system(d: Draft) -> None:
    """The system prompt for rows that bring none."""
    found = d.one("data.system")
    if found is not None and str(found[1].value):
        write_system(d, str(found[1].value), [found])
