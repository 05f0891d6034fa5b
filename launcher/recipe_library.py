"""The shipped recipes: find one, list them, copy one out to change it.

Nothing here imports pydantic before it is needed: `launch RECIPE` and shell completion look names up with `find`.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import LaunchError
from .recipe_yaml import Node, parse_file, shown

SCHEMA_FILE = "recipe.schema.json"
_MODELINE = "# yaml-language-server: $schema="


@dataclass(frozen=True)
class RecipeRow:
    """A shipped recipe in one line."""

    name: str
    model: str
    method: str
    hardware: str
    """The header's "Hardware:" line."""
    purpose: str
    """The header's first sentence."""
    path: Path


def shipped_folder() -> Path:
    """Folder of the shipped recipes: inside the wheel, or recipes/ of a checkout."""
    packed = Path(__file__).parent / "_recipes"
    return packed if packed.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def find(name_or_path: str) -> Path:
    """A recipe file that exists, or else a shipped recipe by name, with or without .yaml.

    Raises LaunchError with the nearest names.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.glob("*.yaml"))[:5])
        hint = f"Name a recipe in it: {inside}" if inside else "Name a YAML file."
        raise LaunchError(f"{name_or_path} is a folder, not a recipe", hint)
    if path.is_file():
        if path.suffix == ".py":
            hint = f"Make a recipe of an XTuner config: launch recipes import {name_or_path}\nOr start from a shipped one: launch recipes list"
            raise LaunchError(f"{name_or_path} is a Python file, not a recipe", hint)
        return path
    shipped = shipped_folder() / f"{name_or_path.removesuffix('.yaml').removesuffix('.yml')}.yaml"
    if path.parent == Path(".") and shipped.is_file():
        return shipped
    raise LaunchError(f"there is no recipe {name_or_path}", _near(path))


def _near(path: Path) -> str:
    """Up to three names that may have been meant: files in the same folder first, then shipped recipes."""
    stem = re.sub(r"(\.(ya?ml|py|json))+$", "", path.name)
    beside = {}
    if path.parent.is_dir():
        beside = {p.stem: str(path.parent / p.name) for p in sorted(path.parent.glob("*.y*ml"))}
    names = {**{name: name for name in shipped_names()}, **beside}
    exact = [names[stem]] if stem in names else []
    within = [shown_as for name, shown_as in names.items() if stem and stem.lower() in name.lower()]
    close = [names[name] for name in difflib.get_close_matches(stem, names, n=3, cutoff=0.5)]
    best = list(dict.fromkeys([*exact, *within, *close]))[:3]
    hint = f"Did you mean {' or '.join(best)}?\n" if best else ""
    return f"{hint}Shipped recipes: launch recipes list"


def near_recipes(text: str) -> str:
    """A hint with the three names of shipped recipes nearest to `text`, and of known models."""
    from .known_models import nearest_models

    near = difflib.get_close_matches(text.lower(), shipped_names(), n=3, cutoff=0.0)
    models = nearest_models(text)
    also = f"\nKnown models nearest to it: {', '.join(models)}" if models else ""
    return f"Nearest recipes: {', '.join(near)}{also}\nAll recipes: launch recipes list"


def list_recipes(pattern: str = "") -> list[RecipeRow]:
    """Shipped recipes whose name, model, method or purpose holds `pattern` (in any case; * and ? are wildcards)."""
    rows = [_row(shipped_folder() / f"{name}.yaml") for name in shipped_names()]
    wanted = pattern.lower() if re.search(r"[*?\[]", pattern) else f"*{pattern.lower()}*"
    return [
        row
        for row in rows
        if any(fnmatch.fnmatchcase(text.lower(), wanted) for text in (row.name, row.model, row.method, row.purpose))
    ]


def _row(path: Path) -> RecipeRow:
    from .recipe import load_recipe  # here: it costs pydantic, and `find` must stay cheap

    header = read_header(path)
    values = load_recipe(path).values
    model = values["model"]["source"].removeprefix(f"{shipped_folder()}/").replace(f":{shipped_folder()}/", ":")
    return RecipeRow(path.stem, model, values["method"]["name"], header["hardware"], header["purpose"], path)


def read_header(path: Path) -> dict[str, str]:
    """`purpose`, `run`, `hardware` and `expect` of the comment block at the top; absent ones are ""."""
    header = {"purpose": "", "run": "", "hardware": "", "expect": ""}
    key = "purpose"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if line.startswith(_MODELINE):
            continue
        text = line.lstrip("#").strip()
        if found := re.match(r"(Run|Hardware|Expect):\s*(.*)", text):
            key, text = found[1].lower(), found[2]
        header[key] = f"{header[key]} {text}".strip()
    return header


def copy(name: str, dest: Path) -> list[Path]:
    """Copy a recipe to a new file, or into a folder, so that it works there; returns the files written.

    Data files and models that it names by a path below its own folder travel along; other paths become absolute.
    Raises LaunchError, before anything is written, when a file is in the way.
    """
    source = find(name)
    target = dest / source.name if dest.is_dir() or str(dest).endswith(os.sep) or not dest.suffix else dest
    text = source.read_text(encoding="utf-8-sig")
    writes: dict[Path, bytes] = {}
    for node in _references(source):
        text = _take_along(node, source.parent, target.parent, text, writes)
    text = re.sub(rf"(?m)^(#.*?)\S*{re.escape(source.name)}", lambda m: f"{m[1]}{shown(target)}", text)
    if _MODELINE in text:
        text = re.sub(rf"(?m)^{re.escape(_MODELINE)}.*$", f"{_MODELINE}{SCHEMA_FILE}", text)
        writes.setdefault(target.parent / SCHEMA_FILE, _schema_text().encode())
    writes = {path: data for path, data in writes.items() if not (path.is_file() and path.read_bytes() == data)}
    writes = {target: text.encode(), **writes}
    in_the_way = [shown(path) for path in writes if os.path.lexists(path)]
    if in_the_way:
        raise LaunchError(f"already there: {', '.join(in_the_way)}", "Copy to another name or folder.")
    try:
        for path, data in writes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    except OSError as e:
        raise LaunchError(f"cannot copy to {shown(target)}: {e.strerror}", "Choose another folder.") from None
    return list(writes)


def _schema_text() -> str:
    from .recipe_docs import schema_text  # here: it costs pydantic

    return schema_text()


def _references(source: Path) -> Iterator[Node]:
    """Scalars of a recipe that may name something on disk."""
    from .recipe_layers import Findings, get, shape  # here: it costs pydantic
    from .recipe_paths import data_file_paths

    node, _ = parse_file(source)
    if node is None:
        raise LaunchError(f"{shown(source)} cannot be read as a recipe", f"See: launch recipes check {shown(source)}")
    if "extends" in node.value:
        yield node.value["extends"]
    tree = shape(node, "", Findings()) or node
    for path in ("model.source", "data.template", *data_file_paths(tree)):
        found = get(tree, path)
        if found is not None and isinstance(found.value, str):
            yield found


def _take_along(node: Node, old: Path, new: Path, text: str, writes: dict[Path, bytes]) -> str:
    """`text` of the recipe with this one reference valid in folder `new`; files to write are added to `writes`."""
    written = node.text.removeprefix("random:")
    path = Path(os.path.abspath(old / Path(written).expanduser()))
    if not path.exists() or Path(written).is_absolute() or written == "model":
        return text
    inside = path.is_relative_to(os.path.abspath(old)) and ".." not in Path(written).parts
    if not inside or path.suffix in (".yaml", ".yml"):
        shipped = path.parent.samefile(shipped_folder())
        return text if shipped else _replace_at(text, node, written, str(path))
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            writes[new / os.path.relpath(file, old)] = file.read_bytes()
    return text


def _replace_at(text: str, node: Node, old: str, new: str) -> str:
    lines = text.splitlines(keepends=True)
    head, tail = lines[node.at.line - 1][: node.at.column - 1], lines[node.at.line - 1][node.at.column - 1 :]
    lines[node.at.line - 1] = head + tail.replace(old, new, 1)
    return "".join(lines)
