"""Data sets, templates and system prompts of LLaMA-Factory, ms-swift and TRL."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from .import_data import (
    FILE_KINDS,
    Source,
    find_file,
    is_file_name,
    map_system,
    places,
    write_model_template,
    write_sources,
    write_template,
)
from .import_draft import Draft
from .import_read import read_json, start_of
from .recipe_yaml import Node, shown

_LF_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
_LF_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
_LF_SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
_OTHER_STAGES = ("dpo", "kto", "ppo", "rm", "orpo", "simpo", "ipo", "grpo", "gdpo", "ebft")


def map_llamafactory(d: Draft) -> bool:
    """Names of dataset_info.json -> data.files. Returns whether rows are texts for continued pre-training."""
    stage = d.one("data.files:stage")
    kind = str(stage[1].value) if stage else "sft"
    if stage is not None and kind not in ("sft", "pt"):
        d.choose(
            stage[1],
            f"stage: {kind} is not offered",
            "A recipe does supervised fine-tuning (sft) and pre-training on texts (pt).",
        )
    elif stage is not None:
        d.note(*stage, "data.files[].format", "text" if kind == "pt" else "auto")
    info = _dataset_info(d)
    limit = int(d.number("data.max_rows", whole=True) or 0)
    names = d.one("data.files")
    sources = _registered(d, names[1], info, limit, kind == "pt") if names else []
    write_sources(d, "data.files", "data.files", _one_limit(d, sources))
    if "data.max_rows" in d.values:
        for key, node in d.all_of("data.max_rows"):
            d.note(key, node, "data.max_rows", d.values["data.max_rows"])
    else:
        for key, node in d.all_of("data.max_rows"):
            d.note(key, node, "data.files[].max_rows", limit)
    held = d.one("data.held_out_files")
    if held is not None:
        write_sources(d, "data.held_out_files", "data.held_out_files", _registered(d, held[1], info, 0, kind == "pt"))
    d.leave_all(
        ("data.files:mix", "data.files:weights"),
        "all rows of all data sets are read; weigh them with data.files[].weight",
        True,
    )
    template = d.one("data.template")
    if kind == "pt":
        d.leave_all(("data.template", "data.system"), "texts have no chat template", matters=False)
    elif template is None:
        d.facts.add("default_template")
    else:
        write_template(d, str(template[1].value), template[1], template[0])
    if kind != "pt":
        map_system(d)
    d.facts.add("texts" if kind == "pt" else "chat")
    return kind == "pt"


def _one_limit(d: Draft, sources: list[Source]) -> list[Source]:
    """Of a single source, its number of rows becomes data.max_rows."""
    if len(sources) != 1 or not sources[0].max_rows:
        return sources
    d.values["data.max_rows"] = sources[0].max_rows
    return [dataclasses.replace(sources[0], max_rows=0)]


def _dataset_info(d: Draft) -> tuple[dict[str, Node], Path] | None:
    """dataset_info.json in dataset_dir, or beside the file."""
    folder = d.one("data.files:dir")
    name = str(folder[1].value) if folder else "data"
    for path in (*places(d, "dataset_info.json", name), d.start.folder / "dataset_info.json"):
        if path.is_file():
            if folder is not None:
                d.note(*folder, "data.files", shown(path))
            root = read_json(path.read_text(encoding="utf-8-sig"), start_of(path))
            return (root.value, path.parent) if isinstance(root.value, dict) else None
    if folder is not None:
        d.note(*folder, "data.files", "no dataset_info.json there")
    return None


def _registered(
    d: Draft, names: Node, info: tuple[dict[str, Node], Path] | None, limit: int, texts: bool
) -> list[Source]:
    items = [str(i.value) for i in names.value] if isinstance(names.value, list) else str(names.value).split(",")
    sources = []
    folder = d.one("data.files:dir")
    online = folder is not None and str(folder[1].value) == "ONLINE"
    for name in (item.strip() for item in items if item.strip()):
        if online:
            sources.append(Source(name, names, "hub", "text" if texts else "auto", limit))
            continue
        if info is None or name not in info[0]:
            if is_file_name(d, name) and find_file(d, name):
                sources.append(Source(name, names, format="text" if texts else "auto", max_rows=limit))
                continue
            known = (
                f"There are: {', '.join(list(info[0])[:12])}" if info else "Looked in dataset_dir and beside the file."
            )
            d.choose(
                names,
                f"{name} is not registered: no dataset_info.json has it",
                f"{known} Write the file itself in data.files.",
            )
            continue
        sources.append(_lf_source(d, name, info[0][name].plain(), info[1], names, limit, texts))
    return sources


def _lf_source(d: Draft, name: str, entry: dict[str, Any], folder: Path, node: Node, limit: int, texts: bool) -> Source:
    if entry.get("ranking"):
        d.choose(
            node,
            f"{name} has ranked answers (ranking: true)",
            "Preference training is not offered: choose rows with one answer.",
        )
    columns = {k: v for k, v in (entry.get("columns") or {}).items() if k in _LF_COLUMNS}
    if unread := sorted(set(entry.get("columns") or {}) - set(_LF_COLUMNS)):
        d.choose(node, f"{name}: the columns {', '.join(unread)} are not read", "Texts with one answer are.")
    tags = dict(entry.get("tags") or {})
    format_, standard = "alpaca", _LF_ALPACA
    if entry.get("formatting") in ("sharegpt", "openai"):
        format_, standard = "sharegpt", _LF_SHAREGPT
        if entry["formatting"] == "openai" or (all(tags.get(k, v) == v for k, v in _OPENAI_TAGS.items()) and tags):
            format_, standard, tags = "messages", _LF_SHAREGPT | {"messages": "messages"}, {}
    if texts:
        format_, standard = "text", {"prompt": "text"}
        columns = {k: v for k, v in columns.items() if k == "prompt"}
    if all(standard.get(k) == v for k, v in columns.items()):
        columns = {}
    path, hub = "", ""
    if entry.get("hf_hub_url"):
        path, hub = entry["hf_hub_url"], "hub"
    elif entry.get("ms_hub_url"):
        path, hub = entry["ms_hub_url"], "modelscope"
    elif entry.get("file_name"):
        path = str(folder / entry["file_name"])
    else:
        d.choose(
            node,
            f"{name} comes from a script or a cloud folder",
            "Download the rows, and name their file in data.files.",
        )
    rows = int(entry.get("num_samples") or limit or 0)
    return Source(
        path,
        node,
        hub,
        format_ if not columns else "auto",
        rows,
        entry.get("subset") or "",
        entry.get("split") or "train",
        columns,
        tags,
    )


def map_swift(d: Draft) -> bool:
    """`dataset` and `val_dataset` with their #n, :subset, hf:: and ms::."""
    texts = "pt" in d.facts
    found, held = d.one("data.files"), d.one("data.held_out_files")
    sources = _one_limit(d, _swift_sources(d, found[1], texts) if found else [])
    write_sources(d, "data.files", "data.files", sources)
    if found is not None and "data.max_rows" in d.values:
        d.note(*found, "data.max_rows", d.values["data.max_rows"])
    if held is not None and held[1].value:
        write_sources(d, "data.held_out_files", "data.held_out_files", _swift_sources(d, held[1], texts))
    else:
        d.leave_all(("data.held_out_files",), "no file is held out", matters=False)
    d.leave_all(
        ("data.files:weights",),
        "rows are not drawn by probability; weigh sources with data.files[].weight",
        matters=True,
    )
    template = d.one("data.template")
    if template is not None:
        write_model_template(d, *template, "ms-swift's own for this family; the model's is used")
    d.facts.add("texts" if texts else "chat")
    if texts:
        d.leave_all(("data.system",), "texts have no system prompt", matters=False)
    else:
        map_system(d)
    return texts


def _swift_sources(d: Draft, node: Node, texts: bool) -> list[Source]:
    items = (
        node.value if isinstance(node.value, list) else [Node(p, node.at, node.key_at) for p in str(node.value).split()]
    )
    hub = d.one("model.source:hub")
    default = "hub" if hub is not None and bool(hub[1].value) else "modelscope"
    sources = []
    for item in items:
        text, where = str(item.value), default
        if found := re.match(r"(hf|ms)::(.*)", text, re.IGNORECASE):
            where, text = ("hub" if found[1].lower() == "hf" else "modelscope"), found[2]
        rows = 0
        if find_file(d, text) is None and (found := re.fullmatch(r"(.*)#(\d+)", text)):
            text, rows = found[1], int(found[2])
        subset = ""
        if find_file(d, text) is None and ":" in text:
            text, _, subset = text.partition(":")
        kind = "text" if texts else "auto"
        sources.append(Source(text, item, "" if is_file_name(d, text) else where, kind, rows, subset))
    return sources


def map_trl(d: Draft) -> bool:
    """`dataset_name`, or the mixture of `datasets`; the model's own chat template."""
    found, mixture = d.one("data.files"), d.one("data.files:mixture")
    split, subset = d.one("data.files:split"), d.one("data.files:subset")
    split_name, subset_name = (str(f[1].value) if f else "" for f in (split, subset))
    sources: list[Source] = []
    if mixture is not None and isinstance(mixture[1].value, list):
        sources = [_trl_source(d, item) for item in mixture[1].value if isinstance(item.value, dict)]
        write_sources(d, "data.files:mixture", "data.files", sources)
        d.leave_all(("data.files",), "`datasets` goes before it there", matters=False)
    elif found is not None:
        path = str(found[1].value)
        hub = "" if is_file_name(d, path) else "hub"
        sources = [Source(path, found[1], hub, subset=subset_name, split=split_name or "train")]
        write_sources(d, "data.files", "data.files", sources)
    for part in ("path", "files", "subset", "split", "folder", "column"):
        for key, node in d.all_of(f"data.files:{part}"):
            if part == "column" and str(node.value) != "text":
                d.leave(key, node, "texts stand below `text`", matters=True)
            else:
                d.note(key, node, "data.files[]")
    if not any(key == "assistant_only_loss" and node.value for key, node in d.settings):
        d.facts.add("questions_learnt")
        d.write_default("data.learn", "all")
    template = d.one("data.template")
    if template is not None:
        path = find_file(d, str(template[1].value))
        if path is not None and path.is_file():
            d.values["data.template"] = str(path)
            d.note(*template, "data.template", str(path))
        else:
            d.choose(
                template[1],
                f"{template[0]}: the template of another model is not fetched: {template[1].value}",
                "Save it as my.jinja, and write data.template: my.jinja",
            )
    return False


def _trl_source(d: Draft, item: Node) -> Source:
    entry = item.plain()
    path, files = str(entry.get("path") or ""), entry.get("data_files")
    if isinstance(files, dict):
        files = files.get("train") or next(iter(files.values()), None)
    if isinstance(files, list):
        if len(files) > 1:
            d.choose(
                item,
                f"several files stand below one data set: {', '.join(map(str, files))}",
                "Name each in data.files.",
            )
        files = files[0] if files else None
    if files and path in FILE_KINDS:
        return Source(str(files), item)
    hub = "" if is_file_name(d, path) else "hub"
    return Source(path, item, hub, subset=str(entry.get("name") or ""), split=str(entry.get("split") or "train"))
