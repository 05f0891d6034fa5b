"""Data sets, templates and system prompts of LLaMA-Factory, Axolotl, ms-swift and TRL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .import_data import Source, find_file, is_file_name, places, write_model_template, write_sources, write_system, write_template
from .import_draft import Draft
from .import_read import read_json, start_of
from .recipe_yaml import Node, shown

_LF_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
_LF_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
_LF_SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
_OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
_OTHER_STAGES = ("dpo", "kto", "ppo", "rm", "orpo", "simpo", "ipo", "grpo", "gdpo", "ebft")
_AXOLOTL_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "pretrain": "text", "chat_template": "messages"}
_AXOLOTL_TEMPLATES = {"chatml": "chatml", "llama3": "llama3", "gemma": "gemma", "alpaca": "alpaca", "phi_3": "phi", "phi_4": "phi4", "deepseek_v3": "deepseek3"}
_FILE_KINDS = frozenset(("json", "jsonl", "csv", "parquet", "arrow", "text"))


def map_llamafactory(d: Draft) -> bool:
    """Names of dataset_info.json -> data.files. Returns whether rows are texts for continued pre-training."""
    stage = d.one("data.files:stage")
    kind = str(stage[1].value) if stage else "sft"
    if stage is not None and kind not in ("sft", "pt"):
        d.choose(stage[1], f"stage: {kind} is not offered", "A recipe does supervised fine-tuning (sft) and pre-training on texts (pt).")
    elif stage is not None:
        d.note(*stage, "data.files[].format", "text" if kind == "pt" else "auto")
    info = _dataset_info(d)
    limit = int(d.number("data.max_rows", whole=True) or 0)
    names = d.one("data.files")
    sources = _registered(d, names[1], info, limit, kind == "pt") if names else []
    write_sources(d, "data.files", "data.files", sources)
    if limit and len(sources) == 1:
        d.write("data.max_rows", limit)
        d.values["data.files"] = _without_limits(d.values["data.files"])
    held = d.one("data.held_out_files")
    if held is not None:
        write_sources(d, "data.held_out_files", "data.held_out_files", _registered(d, held[1], info, 0, kind == "pt"))
    d.leave_all(("data.files:mix", "data.files:weights"), "all rows of all data sets are read; weigh them with data.files[].weight", True)
    template = d.one("data.template")
    if kind == "pt":
        d.leave_all(("data.template", "data.system"), "texts have no chat template", matters=False)
    elif template is None:
        d.facts.add("default_template")
    else:
        write_template(d, str(template[1].value), template[1], template[0])
    if kind != "pt":
        _map_system(d)
    d.facts |= {"alpaca"} if any(s.format == "alpaca" for s in sources) else set()
    return kind == "pt"


def _without_limits(files: list[Any]) -> list[Any]:
    trimmed = [{k: v for k, v in f.items() if k != "max_rows"} if isinstance(f, dict) else f for f in files]
    return [f["path"] if isinstance(f, dict) and list(f) == ["path"] else f for f in trimmed]


def _map_system(d: Draft) -> None:
    found = d.one("data.system")
    if found is not None and str(found[1].value):
        write_system(d, str(found[1].value), [found])


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


def _registered(d: Draft, names: Node, info: tuple[dict[str, Node], Path] | None, limit: int, texts: bool) -> list[Source]:
    items = [str(i.value) for i in names.value] if isinstance(names.value, list) else str(names.value).split(",")
    sources = []
    for name in (item.strip() for item in items if item.strip()):
        if info is None or name not in info[0]:
            if is_file_name(d, name) and find_file(d, name):
                sources.append(Source(name, names, format="text" if texts else "auto", max_rows=limit))
                continue
            known = f"There are: {', '.join(list(info[0])[:12])}" if info else "Looked in dataset_dir and beside the file."
            d.choose(names, f"{name} is not registered: no dataset_info.json has it", f"{known} Write the file itself in data.files.")
            sources.append(Source(f"{name}.json", names, format="text" if texts else "auto", max_rows=limit))
            continue
        sources.append(_lf_source(d, name, info[0][name].plain(), info[1], names, limit, texts))
    return sources


def _lf_source(d: Draft, name: str, entry: dict[str, Any], folder: Path, node: Node, limit: int, texts: bool) -> Source:
    if entry.get("ranking"):
        d.choose(node, f"{name} has ranked answers (ranking: true)", "Preference training is not offered: choose rows with one answer.")
    columns = {k: v for k, v in (entry.get("columns") or {}).items() if k in _LF_COLUMNS}
    if unread := sorted(set(entry.get("columns") or {}) - set(_LF_COLUMNS)):
        d.choose(node, f"{name}: the columns {', '.join(unread)} are not read", "Texts with one answer are.")
    tags = dict(entry.get("tags") or {})
    format_, standard = "alpaca", _LF_ALPACA
    if entry.get("formatting") in ("sharegpt", "openai"):
        format_, standard = "sharegpt", _LF_SHAREGPT
        if entry["formatting"] == "openai" or all(tags.get(k, v) == v for k, v in _OPENAI_TAGS.items()) and tags:
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
        d.choose(node, f"{name} comes from a script or a cloud folder", "Download the rows, and name their file in data.files.")
        path = str(entry.get("script_url") or entry.get("cloud_file_name") or name)
    rows = int(entry.get("num_samples") or limit or 0)
    return Source(path, node, hub, format_ if not columns else "auto", rows, entry.get("subset") or "", entry.get("split") or "train", columns, tags)


def map_axolotl(d: Draft) -> bool:
    """`datasets`, `pretraining_dataset`, `test_datasets`, `chat_template`."""
    stage = d.one("data.files:stage")
    if stage is not None:
        d.choose(stage[1], f"rl: {stage[1].value} is not offered", "A recipe does supervised fine-tuning and pre-training on texts.")
    pretraining = d.one("data.files:pretraining")
    found = d.one("data.files")
    sources = [s for f in (found, pretraining) if f for s in _axolotl_sources(d, f[1], texts=f is pretraining)]
    for role in ("data.files", "data.files:pretraining"):
        if d.one(role):
            write_sources(d, role, "data.files", sources)
    held = d.one("data.held_out_files")
    if held is not None:
        write_sources(d, "data.held_out_files", "data.held_out_files", _axolotl_sources(d, held[1], texts=False))
    for part in ("path", "files", "format", "suffix", "subset", "split", "revision", "column"):
        for key, node in d.all_of(f"data.files:{part}"):
            if part == "revision":
                d.leave(key, node, "a dataset of a hub is read at its newest revision", matters=False)
            elif part in ("path", "files", "format", "column"):
                d.note(key, node, "data.files", [s.path for s in sources])
            else:
                d.leave(key, node, "found from the file's name and its rows", matters=part != "suffix")
    _axolotl_template(d, sources)
    _map_system(d)
    return bool(sources) and all(s.format == "text" for s in sources)


def _axolotl_sources(d: Draft, node: Node, texts: bool) -> list[Source]:
    items = node.value if isinstance(node.value, list) else [node]
    return [_axolotl_source(d, item if isinstance(item.value, dict) else Node({"path": item}, item.at, item.key_at), texts) for item in items]


def _axolotl_source(d: Draft, item: Node, texts: bool) -> Source:
    entry = item.plain()
    path, files = str(entry.get("path") or ""), entry.get("data_files")
    kind = entry.get("type")
    named = re.split(r"[.:]", kind)[0] if isinstance(kind, str) else ""
    mapping = entry.get("message_property_mappings") or {}
    role = mapping.get("role") or entry.get("message_field_role") or "role"
    columns: dict[str, str] = {}
    format_ = "text" if texts else _AXOLOTL_FORMATS.get(named, "auto")
    messages = entry.get("field_messages") or "messages"
    if format_ == "messages" and (role == "from" or messages == "conversations"):
        format_ = "sharegpt"
    if named == "chat_template" and messages not in ("messages", "conversations"):
        columns, format_ = {"messages": messages}, "auto"
    if isinstance(kind, dict) or (kind is not None and format_ == "auto" and not columns):
        name = kind if isinstance(kind, str) else "of one's own"
        d.choose(item, f"rows of the type {name} are not read", "Convert them, or write a function: data.files[].map.")
    text_column = entry.get("field") or entry.get("text_column") or "text"
    if format_ == "text" and text_column != "text":
        columns, format_ = {"prompt": text_column}, "auto"
    chosen = files[0] if isinstance(files, list) and len(files) == 1 else files
    if isinstance(files, list) and len(files) > 1:
        d.choose(item, f"several files stand below one data set: {', '.join(map(str, files))}", "Name each in data.files.")
        chosen = files[0]
    local = str(chosen) if chosen and (path in _FILE_KINDS or not path or is_file_name(d, path)) else path
    hub = "" if local != path or is_file_name(d, path) else "hub"
    subset, split = str(entry.get("name") or ""), str(entry.get("split") or "train")
    return Source(local, item, hub, format_, 0, subset, split, columns)


def _axolotl_template(d: Draft, sources: list[Source]) -> None:
    found = d.one("data.template") or d.one("data.template:dataset")
    jinja = d.one("data.template:jinja")
    name = str(found[1].value) if found else ""
    if jinja is not None and (name in ("", "jinja")):
        path = find_file(d, str(jinja[1].value)) if "\n" not in str(jinja[1].value) and "{" not in str(jinja[1].value) else None
        if path is not None:
            d.values["data.template"] = str(path)
            d.note(*jinja, "data.template", str(path))
        else:
            d.choose(jinja[1], "the chat template is written into the config", "Save it as my.jinja, and write data.template: my.jinja")
        if found is not None:
            d.note(*found, "data.template", d.values.get("data.template", "model"))
        return
    d.leave_all(("data.template:jinja",), "chat_template names another", matters=False)
    all_alpaca = bool(sources) and all(s.format == "alpaca" for s in sources)
    if all_alpaca and name in ("", "alpaca"):
        d.facts.add("alpaca")
        d.values["data.template"] = "llamafactory/alpaca"
        for key, node in [*d.all_of("data.template"), *d.all_of("data.files:format")][:1]:
            d.note(key, node, "data.template", "llamafactory/alpaca", "Axolotl's type alpaca writes the Alpaca prompt")
    elif name in _AXOLOTL_TEMPLATES and found:
        d.values["data.template"] = f"llamafactory/{_AXOLOTL_TEMPLATES[name]}"
        d.note(*found, "data.template", d.values["data.template"])
        d.facts.add("tool_template")
    elif found is not None:
        note = "" if name.startswith("tokenizer_default") else f"Axolotl's own text for {name} is meant for models that have it"
        write_model_template(d, *found, note)
    else:
        write_model_template(d)
    for key, node in d.all_of("data.template:dataset"):
        if found is None or found[1] is not node:
            d.note(key, node, "data.template", d.values.get("data.template", "model"), "one template for all rows")


def map_swift(d: Draft) -> bool:
    """`dataset` and `val_dataset` with their #n, :subset, hf:: and ms::."""
    texts = "pt" in d.facts
    found, held = d.one("data.files"), d.one("data.held_out_files")
    sources = _swift_sources(d, found[1], texts) if found else []
    write_sources(d, "data.files", "data.files", sources)
    limits = [s.max_rows for s in sources if s.max_rows]
    if len(sources) == 1 and limits:
        d.values["data.files"] = _without_limits(d.values["data.files"])
        d.values["data.max_rows"] = limits[0]
    if held is not None and held[1].value:
        write_sources(d, "data.held_out_files", "data.held_out_files", _swift_sources(d, held[1], texts))
    else:
        d.leave_all(("data.held_out_files",), "no file is held out", matters=False)
    d.leave_all(("data.files:weights",), "rows are not drawn by probability; weigh sources with data.files[].weight", matters=True)
    template = d.one("data.template")
    if template is not None:
        write_model_template(d, *template, "ms-swift's own for this family; the model's is used")
    if texts:
        d.leave_all(("data.system",), "texts have no system prompt", matters=False)
    else:
        _map_system(d)
    return texts


def _swift_sources(d: Draft, node: Node, texts: bool) -> list[Source]:
    items = node.value if isinstance(node.value, list) else [Node(p, node.at, node.key_at) for p in str(node.value).split()]
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
                d.note(key, node, "data.files", [s.path for s in sources])
    template = d.one("data.template")
    if template is not None:
        path = find_file(d, str(template[1].value))
        if path is not None and path.is_file():
            d.values["data.template"] = str(path)
            d.note(*template, "data.template", str(path))
        else:
            d.choose(template[1], f"{template[0]}: the template of another model is not fetched: {template[1].value}",
                     "Save it as my.jinja, and write data.template: my.jinja")
    return False


def _trl_source(d: Draft, item: Node) -> Source:
    entry = item.plain()
    path, files = str(entry.get("path") or ""), entry.get("data_files")
    if isinstance(files, dict):
        files = files.get("train") or next(iter(files.values()), None)
    if isinstance(files, list):
        if len(files) > 1:
            d.choose(item, f"several files stand below one data set: {', '.join(map(str, files))}", "Name each in data.files.")
        files = files[0] if files else None
    if files and path in _FILE_KINDS:
        return Source(str(files), item)
    hub = "" if is_file_name(d, path) else "hub"
    return Source(path, item, hub, subset=str(entry.get("name") or ""), split=str(entry.get("split") or "train"))

