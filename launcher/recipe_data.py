"""Sources of rows that a recipe names: paths made absolute, datasets of hubs recognised, names in dataset_info.json looked up."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from trainer.data_paths import DatasetId, data_files, dataset_id, is_pattern
from trainer.rows import peek
from trainer.spec import DataFile, RowNames, TrainError

from .dataset_info import DatasetInfo, read_dataset_info
from .recipe_layers import Findings, get
from .recipe_paths import absolute, lies_in, nearest
from .recipe_schema import Data
from .recipe_schema import DataFile as RecipeFile
from .recipe_yaml import Node, Place

LISTS = ("data.files", "data.held_out_files")
SOURCES = (
    "A source is a file, a folder, a pattern (rows/*.jsonl), a dataset of the Hub (ORG/NAME, ORG/NAME:SUBSET, ORG/NAME#1000), "
    "or modelscope:ORG/NAME."
)


def resolve_data(tree: Node, found: Findings, elsewhere: Sequence[Path] = ()) -> Node:
    """`tree` with absolute paths of data and map files, and every source in full; what is missing is a problem.

    `elsewhere`: absolute folders of other machines, as `recipe_paths.resolve_paths` takes them. Names of
    data.dataset_info become what that file says of them, and the key itself goes.
    """
    data = get(tree, "data")
    if data is None or not isinstance(data.value, dict):
        return tree
    named = get(data, "dataset_info")
    info = read_dataset_info(named, found) if named is not None else None
    sections = {key: node for key, node in data.value.items() if key != "dataset_info"}
    used = False
    for path in LISTS:
        key = path.rpartition(".")[2]
        files = sections.get(key)
        if files is None or not isinstance(files.value, list):
            continue
        items = [_with_info(item, info, found) for item in files.value]
        used = used or any(item is not old for item, old in zip(items, files.value, strict=True))
        sections[key] = files.with_value([_resolved(item, found, elsewhere) for item in items])
    if info is not None and named is not None and info.entries and not used and not found.problems:
        names = ", ".join(sorted(info.entries)[:8])
        found.add(named.key_at, "data.dataset_info: none of its names is used", f"It has: {names}. Or remove the line.")
    return tree.with_value({**tree.value, "data": data.with_value(sections)})


def _with_info(item: Node, info: DatasetInfo | None, found: Findings) -> Node:
    """The item with what dataset_info.json says of its name; its own keys come first."""
    path = item.value.get("path") if isinstance(item.value, dict) else None
    if info is None or path is None or path.value not in info.entries:
        return item
    values = info.source(path.value, path.at, found)
    if values is None:  # said already; a path that exists keeps others from saying more
        return item.with_value({"path": path.with_value(str(info.path))})
    entry = _as_node(values, path.at)
    return item.with_value({**entry.value, **{k: v for k, v in item.value.items() if k != "path"}})


def _as_node(value: object, at: Place) -> Node:
    if isinstance(value, dict):
        return Node({key: _as_node(inner, at) for key, inner in value.items()}, at, at)
    return Node(value, at, at, str(value))


def _resolved(item: Node, found: Findings, elsewhere: Sequence[Path]) -> Node:
    if not isinstance(item.value, dict):
        return item
    changed = dict(item.value)
    path, split, code = (changed.get(key) for key in ("path", "split", "map"))
    if path is not None and isinstance(path.value, str) and path.value and not lies_in(path.value, elsewhere):
        split_name = split.value if split is not None and isinstance(split.value, str) else "train"
        changed["path"] = path.with_value(_resolve_path(path, split_name, found))
    if code is not None and isinstance(code.value, str) and not lies_in(code.value, elsewhere):
        changed["map"] = code.with_value(_resolve_map(code, found))
    return item.with_value(changed)


def as_dataset(text: str, folder: Path) -> DatasetId | None:
    """`text`, seen from `folder`, as a dataset of a hub; None where it is a path. A path that exists wins."""
    found = dataset_id(text)
    if found is None or found.named:
        return found
    here = Path(os.path.abspath(folder / text))
    return None if here.exists() or here.parent.is_dir() else found


def _resolve_path(node: Node, split: str, found: Findings) -> str:
    text: str = node.value
    if as_dataset(text, node.at.folder):
        return text
    if "://" in text:
        url = re.fullmatch(r"https?://[^/]+/datasets/([^/]+/[^/]+).*", text)
        hint = f"Write {url[1]}" if url else f"Download it first. {SOURCES}"
        found.add(node.at, f"the data source {text} is a web address", hint)
        return text
    path = absolute(text, node.at.folder)
    if path.is_dir() or is_pattern(str(path)):
        try:
            data_files(str(path), split)
        except TrainError as e:
            found.add(node.at, e.message, e.hint)
    elif not path.is_file():
        found.add(node.at, f"the data file {text} does not exist", _missing_hint(text, path, nearest(path, node)))
    return str(path)


def _missing_hint(text: str, path: Path, near: str) -> str:
    wanted = dataset_id(text)
    if wanted is not None and path.parent.is_dir():
        return f"{near}\nA dataset of the Hub of that name is written hub:{text}".strip()
    return near


def _resolve_map(node: Node, found: Findings) -> str:
    text, _, function = str(node.value).rpartition(":")
    if not text.endswith(".py"):
        return str(node.value)  # its form is wrong, and the schema says so
    path = absolute(text, node.at.folder)
    if not path.is_file():
        found.add(node.at, f"the map file {text} does not exist", nearest(path, node))
    return f"{path}:{function}"


def sources_of(files: Sequence[RecipeFile]) -> tuple[DataFile, ...]:
    """Sources of a checked recipe, as the plan has them."""
    return tuple(_source(file) for file in files)


def _source(file: RecipeFile) -> DataFile:
    names = {**file.columns.model_dump(), **file.tags.model_dump()}
    found = None if os.path.isabs(file.path) else dataset_id(file.path)
    limits = [limit for limit in (file.max_rows, found.max_rows if found else 0) if limit]
    return DataFile(
        path=found.name if found else file.path,
        format=file.format,
        kind=found.kind if found else "path",
        subset=found.subset if found else "",
        split=file.split,
        weight=file.weight,
        max_rows=min(limits, default=0),
        names=RowNames(**{key: value or "" for key, value in names.items()}),
        map=file.map or "",
    )


def local_files(data: Data) -> list[str]:
    """Absolute paths of every file on this machine that decides what is learnt: data and map files, and a template."""
    found: dict[str, None] = {}
    for source in sources_of([*data.files, *data.held_out_files]):
        if source.kind == "path":
            found.update(dict.fromkeys(str(p) for p in data_files(source.path, source.split)))
        if source.map:
            found.setdefault(source.map.rpartition(":")[0])
    return list(found)


def source_line(source: DataFile, elsewhere: Sequence[Path] = ()) -> str:
    """What the plan says of a source. Reads the first row of a file on this machine; never raises for what it says."""
    parts = [_read_as(source, source.kind != "path" or lies_in(source.path, elsewhere))]
    if source.split != "train" or source.kind != "path":
        parts.append(f"split {source.split}")
    if source.weight != 1:
        parts.append(f"weight {source.weight:g}: each row {source.weight:g} times an epoch")
    if source.max_rows:
        parts.append(f"its first {source.max_rows:,} rows")
    hub = {"hub": "Hub dataset ", "modelscope": "ModelScope dataset "}.get(source.kind, "")
    subset = f":{source.subset}" if source.subset else ""
    return f"{hub}{source.path}{subset} ({'; '.join(parts)})"


def _read_as(source: DataFile, is_elsewhere: bool) -> str:
    if source.format != "auto":
        return f"{source.format}, as the recipe says"
    if is_elsewhere:
        return "format by its first row, when it is prepared"
    try:
        files = data_files(source.path, source.split)
        found = peek(source, files[0])
    except TrainError as e:
        return f"its first row cannot be read: {e.message}"
    num = f"{len(files)} files, " if len(files) > 1 else ""
    if source.map:
        return f"{num}rows as {source.map} makes them"
    return f"{num}{found}, by its first row" if found else f"{num}format by its first row, when it is prepared"
