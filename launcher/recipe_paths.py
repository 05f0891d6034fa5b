"""Files that a recipe names: made absolute, and missing ones reported with the nearest name that exists."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from trainer.turn_templates import candidates, turn_templates

from .recipe_layers import Findings, get
from .recipe_messages import describe
from .recipe_yaml import Node, shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_URL = re.compile(r"https?://(huggingface\.co|hf-mirror\.com)/([\w.-]+/[\w.-]+)/?.*")
_SOURCES = (
    "A model is a Hub id (Qwen/Qwen2.5-7B-Instruct), modelscope:ID, a folder (./my_model), a GGUF file, "
    "package:NAME/FILE or random:FOLDER."
)


def resolve_paths(tree: Node, found: Findings, elsewhere: Sequence[Path] = ()) -> Node:
    """`tree` with absolute data files, template file and local model; every missing one is a problem.

    `elsewhere`: absolute folders of other machines. What a recipe names in them is taken as it is written.
    """
    for path in ("model.source", "data.template", *data_file_paths(tree)):
        node = get(tree, path)
        if node is None or not isinstance(node.value, str) or not node.value:
            continue
        if lies_in(node.value.removeprefix("random:"), elsewhere):
            continue
        if path == "model.source":
            value = _resolve_model(node, found)
        elif path == "data.template":
            value = _resolve_template(node, found)
        else:
            value = _resolve_file(node, found, "data file")
        tree = _replaced(tree, path.split("."), value)
    return tree


def lies_in(text: str, folders: Sequence[Path]) -> bool:
    """Whether `text` is an absolute path to or below one of `folders`, as written: nothing is looked up."""
    path = Path(os.path.normpath(text))
    return path.is_absolute() and any(path.is_relative_to(folder) for folder in folders)


def data_file_paths(tree: Node) -> list[str]:
    """Dotted paths of the path of every data file, held-out ones too."""
    lists = [(name, get(tree, name)) for name in ("data.files", "data.held_out_files")]
    counts = [(name, len(node.value) if node and isinstance(node.value, list) else 0) for name, node in lists]
    return [f"{name}.{i}.path" for name, count in counts for i in range(count)]


def _replaced(tree: Node, parts: list[str], value: str) -> Node:
    if not parts:
        return tree.with_value(value)
    head, *rest = parts
    if isinstance(tree.value, list):
        items = list(tree.value)
        items[int(head)] = _replaced(items[int(head)], rest, value)
        return tree.with_value(items)
    return tree.with_value({**tree.value, head: _replaced(tree.value[head], rest, value)})


def absolute(text: str, folder: Path) -> Path:
    """`text` (~ is the home folder) seen from `folder`. Symbolic links are kept."""
    return Path(os.path.abspath(folder / os.path.expanduser(text)))


def _resolve_file(node: Node, found: Findings, what: str) -> str:
    path = absolute(node.value, node.at.folder)
    if path.is_dir():
        found.add(node.at, f"the {what} {node.value} is a folder", _files_hint(path))
    elif not path.is_file():
        found.add(node.at, f"the {what} {node.value} does not exist", _near(path, node))
    return str(path)


def _resolve_template(node: Node, found: Findings) -> str:
    """`model`, a template's tool/name, or an absolute path."""
    named = candidates(node.value)
    if node.value == "model" or node.value in named:
        return node.value
    if len(named) == 1:
        return named[0]
    if named:
        problem = f"data.template: {node.value} is a template of XTuner and one of LLaMA-Factory, and they differ"
        found.add(node.at, problem, f"Write {' or '.join(named)}.")
        return node.value
    path = absolute(node.value, node.at.folder)
    if path.suffix not in (".jinja", ".jinja2", ".j2", ".txt") and not path.is_file():
        names = {key.split("/", 1)[1]: key for key in turn_templates()} | {key: key for key in turn_templates()}
        near = [names[name] for name in difflib.get_close_matches(node.value, names, n=3, cutoff=0.5)]
        meant = f"Did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
        expected = "expected model, a template's name, or a Jinja file that exists"
        found.add(
            node.at, f"data.template: {describe(node)}; {expected}", f"{meant}All names: launch recipes templates"
        )
        return str(path)
    return _resolve_file(node, found, "template file")


def _resolve_model(node: Node, found: Findings) -> str:
    text: str = node.value
    scheme, colon, rest = text.partition(":")
    if scheme == "random" and colon:
        return f"random:{_resolve_model_folder(rest, node, found, needs='config.json and a tokenizer')}"
    if scheme == "modelscope" and colon:
        if not _HUB_ID.fullmatch(rest):
            found.add(node.at, f"'{rest}' is not a ModelScope id", "Write modelscope:NAME/MODEL")
        return text
    if scheme == "package" and colon:
        if not re.fullmatch(r"[A-Za-z_][\w.]*(/[^/]+)+", rest):
            found.add(node.at, f"'{rest}' does not name a file in a package", "Write package:NAME/FILE")
        return text
    if url := _HUB_URL.fullmatch(text):
        found.add(node.at, "a model is named by its id, not by a web address", f"Write {url[2]}")
        return text
    if re.match(r"[A-Za-z]\w+:", text):
        found.add(node.at, f"'{text}': models do not come from `{scheme}:`", _SOURCES)
        return text
    path = absolute(text, node.at.folder)
    local = text.startswith((".", "/", "~")) or text.lower().endswith(".gguf") or text.count("/") > 1
    if not local and not path.exists():
        if not _HUB_ID.fullmatch(text):
            found.add(node.at, f"'{text}' is neither a Hub id nor something next to {node.at.source}", _SOURCES)
        return text
    if path.suffix.lower() == ".gguf":
        return _resolve_file(node, found, "GGUF file")
    return _resolve_model_folder(text, node, found, needs="config.json")


def _resolve_model_folder(text: str, node: Node, found: Findings, needs: str) -> str:
    path = absolute(text, node.at.folder)
    if not path.exists():
        found.add(node.at, f"the model folder {text} does not exist", f"{_near(path, node)}\n{_SOURCES}".strip())
    elif not path.is_dir():
        found.add(node.at, f"the model {text} is a file", f"Name its folder, or a file that ends in .gguf. {_SOURCES}")
    elif not (path / "config.json").is_file():
        found.add(node.at, f"the model folder {text} holds no config.json", _folder_hint(path, needs))
    return str(path)


def _folder_hint(folder: Path, needs: str) -> str:
    if (folder / "adapter_config.json").is_file():
        return "It holds an adapter: merge it into its base first, and name the merged folder."
    ggufs = sorted(p.name for p in folder.glob("*.gguf"))
    if ggufs:
        return f"Name the GGUF file itself: {folder / ggufs[0]}"
    inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
    return f"It holds {inner[0]}, which has one." if inner else f"A model folder holds {needs}."


def _near(path: Path, node: Node) -> str:
    """What exists instead: a similar name, or where the path breaks off."""
    lines = []
    here = path
    while not here.parent.is_dir():
        here = here.parent
    names = {name.lower(): name for name in sorted(os.listdir(here.parent))}
    close = difflib.get_close_matches(here.name.lower(), names, n=1, cutoff=0.5)
    if close:
        lines.append(f"Did you mean {os.path.relpath(here.parent / names[close[0]], node.at.folder)}?")
    elif here != path:
        lines.append(f"There is no folder {shown(here)}.")
    if node.at.line and not os.path.isabs(node.value) and absolute(node.value, Path.cwd()).exists():
        relative = os.path.relpath(absolute(node.value, Path.cwd()), node.at.folder)
        lines.append(f"Paths in a recipe start at the recipe's own folder; from there it is {relative}")
    return "\n".join(lines) or f"Looked for {path}"


def _files_hint(folder: Path) -> str:
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (".json", ".jsonl"))[:5]
    return f"Name files in it: {', '.join(files)}" if files else "Name a json or jsonl file."
