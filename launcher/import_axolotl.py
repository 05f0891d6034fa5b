"""Data sets and chat templates of Axolotl."""

from __future__ import annotations

import re

from .import_data import FILE_KINDS, Source, find_file, is_file_name, map_system, write_model_template, write_sources
from .import_draft import Draft
from .recipe_yaml import Node

_FORMATS = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "chat_template": "messages",
}
_TEMPLATES = {
    "chatml": "chatml",
    "llama3": "llama3",
    "gemma": "gemma",
    "alpaca": "alpaca",
    "phi_3": "phi",
    "phi_4": "phi4",
    "deepseek_v3": "deepseek3",
}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def map_axolotl(d: Draft) -> bool:
    """`datasets`, `pretraining_dataset`, `test_datasets`, `chat_template`."""
    stage = d.one("data.files:stage")
    if stage is not None:
        d.choose(
            stage[1],
            f"rl: {stage[1].value} is not offered",
            "A recipe does supervised fine-tuning and pre-training on texts.",
        )
    pretraining = d.one("data.files:pretraining")
    found = d.one("data.files")
    sources = [s for f in (found, pretraining) if f for s in _sources(d, f[1], texts=f is pretraining)]
    for role in ("data.files", "data.files:pretraining"):
        if d.one(role):
            write_sources(d, role, "data.files", sources)
    held = d.one("data.held_out_files")
    if held is not None:
        write_sources(d, "data.held_out_files", "data.held_out_files", _sources(d, held[1], texts=False))
    for part in ("path", "files", "format", "suffix", "subset", "split", "revision", "column"):
        for key, node in d.all_of(f"data.files:{part}"):
            if part == "revision":
                d.leave(key, node, "a dataset of a hub is read at its newest revision", matters=False)
            elif part in ("path", "files", "format", "column"):
                d.note(key, node, "data.files[]")
            else:
                d.leave(key, node, "found from the file's name and its rows", matters=part != "suffix")
    for key, node in d.all_of("data.files:roles"):
        if _usual_roles(node):
            d.note(key, node, "data.files[]")
        else:
            d.choose(
                node, f"{key}: roles of one's own are not renamed", "Convert the rows to user, assistant and system."
            )
    for key, node in d.all_of("model.source:tokens"):
        if isinstance(node.value, dict) and node.value.keys() <= {"pad_token"}:
            d.leave(key, node, "padding is never learnt", matters=False)
        elif node.value:
            d.choose(node, f"{key}: the special tokens come with the model", "Choose a model whose tokenizer has them.")
    _template(d, sources)
    map_system(d)
    return bool(sources) and all(s.format == "text" for s in sources)


def _usual_roles(node: Node) -> bool:
    """Whether every role has the names that are known anyway."""
    roles = node.plain() if isinstance(node.value, dict) else {}
    return all(
        _ROLES.get(name) == role
        for role, names in roles.items()
        for name in (names if isinstance(names, list) else [names])
    )


def _sources(d: Draft, node: Node, texts: bool) -> list[Source]:
    items = node.value if isinstance(node.value, list) else [node]
    return [
        _source(d, item if isinstance(item.value, dict) else Node({"path": item}, item.at, item.key_at), texts)
        for item in items
    ]


def _source(d: Draft, item: Node, texts: bool) -> Source:
    entry = item.plain()
    path, files = str(entry.get("path") or ""), entry.get("data_files")
    kind = entry.get("type")
    named = re.split(r"[.:]", kind)[0] if isinstance(kind, str) else ""
    mapping = entry["message_property_mappings"] if isinstance(entry.get("message_property_mappings"), dict) else {}
    role = mapping.get("role") or entry.get("message_field_role") or "role"
    columns: dict[str, str] = {}
    format_ = "text" if texts else _FORMATS.get(named, "auto")
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
        d.choose(
            item, f"several files stand below one data set: {', '.join(map(str, files))}", "Name each in data.files."
        )
        chosen = files[0]
    local = str(chosen) if chosen and (path in FILE_KINDS or not path or is_file_name(d, path)) else path
    hub = "" if local != path or is_file_name(d, path) else "hub"
    subset, split = str(entry.get("name") or ""), str(entry.get("split") or "train")
    return Source(local, item, hub, format_, 0, subset, split, columns)


def _template(d: Draft, sources: list[Source]) -> None:
    found = d.one("data.template") or d.one("data.template:dataset")
    jinja = d.one("data.template:jinja")
    name = str(found[1].value) if found else ""
    if jinja is not None and (name in ("", "jinja")):
        path = (
            find_file(d, str(jinja[1].value))
            if "\n" not in str(jinja[1].value) and "{" not in str(jinja[1].value)
            else None
        )
        if path is not None:
            d.values["data.template"] = str(path)
            d.note(*jinja, "data.template", str(path))
        else:
            d.choose(
                jinja[1],
                "the chat template is written into the config",
                "Save it as my.jinja, and write data.template: my.jinja",
            )
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
    elif name in _TEMPLATES and found:
        d.values["data.template"] = f"llamafactory/{_TEMPLATES[name]}"
        d.note(*found, "data.template", d.values["data.template"])
        d.facts.add("tool_template")
    elif found is not None:
        note = (
            ""
            if name.startswith("tokenizer_default")
            else f"Axolotl's own text for {name} is meant for models that have it"
        )
        write_model_template(d, *found, note)
    else:
        write_model_template(d)
    for key, node in d.all_of("data.template:dataset"):
        if found is None or found[1] is not node:
            d.note(key, node, "data.template", d.values.get("data.template", "model"), "one template for all rows")
