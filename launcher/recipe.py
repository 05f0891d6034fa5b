"""A recipe on disk -> a checked Recipe, with the origin of every value. All mistakes are reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .errors import Problem, RecipeError
from .recipe_checks import check_contradictions
from .recipe_data import resolve_data, source_line, sources_of
from .recipe_fields import fields, pattern
from .recipe_layers import Findings, get, merge, overlay, shape, walk
from .recipe_library import find, shipped_folder
from .recipe_messages import missing, wrong_value
from .recipe_paths import absolute, resolve_paths
from .recipe_schema import Recipe
from .recipe_yaml import Node, Place, parse_file, parse_flag_value, resolve_scalar, shown


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that has passed every check that needs no device."""

    recipe: Recipe
    values: dict[str, Any]
    """What was written, merged over all layers: short forms in full, paths absolute, defaults absent."""
    origins: dict[str, str]
    """Dotted path ("train.epochs", "data.files.0.path", sections too) -> "file:line" or "--set"."""
    files: tuple[Path, ...]
    """The recipe itself, then what it extends, nearest first. Absolute."""
    sources: tuple[str, ...] = ()
    """What each source of rows is, and which format its first row has."""
    notes: tuple[str, ...] = ()
    """Values of an earlier layer that a later one made void (max_steps over epochs, another method ...)."""

    @property
    def name(self) -> str:
        """`run.name`, or the file's name without its suffix."""
        return self.recipe.run.name or self.files[0].stem.replace(" ", "_")

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """The same with file:line in front of the recipe key that each names; a default has none."""
        origins = [(p, self.origins.get(p.where)) for p in problems]
        return [replace(p, where=f"{origin}: {p.where}") if origin else p for p, origin in origins]


def load_recipe(path: Path, sets: Sequence[str] = (), elsewhere: Sequence[Path] = ()) -> LoadedRecipe:
    """Read a recipe file (or a shipped recipe's name), what it extends, and `--set` flags ("train.epochs=2").

    `elsewhere`: folders of the machine that will run it; files in them need not exist here.
    Raises LaunchError when there is no such recipe, RecipeError with every mistake otherwise.
    """
    found = Findings()
    chain = _read_chain(find(str(path)), found)
    _refuse_foreign(chain)
    flags = _read_flags(sets, found)
    tree: Node | None = None
    layers = [shape(node, "", found) for _, node in reversed(chain) if node is not None]
    for layer in (*layers, flags):
        if layer is not None:
            tree = layer if tree is None else overlay(tree, layer, found)
    if tree is None or any(node is None for _, node in chain):
        raise RecipeError(found.problems)
    tree = resolve_data(resolve_paths(tree, found, elsewhere), found, elsewhere)
    recipe = _validate(tree, chain[0][0], found)
    check_contradictions(tree, found)
    if recipe is None or found.problems:
        raise RecipeError(found.problems)
    origins = {path: node.key_at.origin for path, node in walk(tree)}
    files, notes = tuple(file for file, _ in chain), tuple(found.notes)
    sources = tuple(source_line(source, elsewhere) for source in sources_of(recipe.data.files))
    return LoadedRecipe(recipe, tree.plain(), origins, files, sources, notes)


def dump_recipe(loaded: LoadedRecipe) -> str:
    """The merged values as YAML: one file that loads to an equal Recipe from any folder."""
    return recipe_text(loaded.values)


def recipe_text(values: dict[str, Any]) -> str:
    """Nested plain values as YAML that is read back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a recipe would read as something else; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        value, error = resolve_scalar(text)
        style = '"' if error or not isinstance(value, str) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _read_chain(path: Path, found: Findings) -> list[tuple[Path, Node | None]]:
    """The recipe and what it extends, nearest first, each without its `extends` key. Stops at what cannot be read."""
    chain: list[tuple[Path, Node | None]] = []
    here: Path | None = absolute(str(path), Path.cwd())
    while here is not None:
        node, problems = parse_file(here)
        found.problems.extend(problems)
        extends = node.value.get("extends") if node is not None else None
        rest = node and node.with_value({k: v for k, v in node.value.items() if k != "extends"})
        chain.append((here, rest))
        here = _parent(extends, [file for file, _ in chain], found) if extends is not None else None
        found.incomplete = found.incomplete or (extends is not None and here is None)
    return chain


def _refuse_foreign(chain: list[tuple[Path, Node | None]]) -> None:
    """Raises RecipeError for settings of another program: one line, not one for each of their keys."""
    path, node = chain[0]
    if node is None or len(chain) > 1:
        return
    from .import_formats import written_for

    if told := written_for(node.value.keys()):
        program, keys = told
        message = f"these are settings of {program} ({', '.join(keys[:4])}), not a recipe"
        hint = f"Make a recipe of them: launch recipes import {shown(path)}"
        raise RecipeError([Problem(f"{shown(path)}:1:1", message, hint)])


def _parent(extends: Node, files: list[Path], found: Findings) -> Path | None:
    """The file that an `extends` value names; None (with a problem) when there is none or it closes a circle."""
    if not isinstance(extends.value, str):
        hint = "Write extends: other.yaml. To build on several, let one extend the next."
        found.add(extends.at, "extends takes the name of one recipe", hint)
        return None
    near = absolute(extends.value, extends.at.folder)
    shipped = shipped_folder() / extends.value
    for path in (near, near.with_name(f"{near.name}.yaml"), shipped, shipped.with_name(f"{shipped.name}.yaml")):
        if path.is_file():
            break
    else:
        names = {p.name for folder in (near.parent, shipped_folder()) for p in folder.glob("*.y*ml")}
        close = difflib.get_close_matches(near.name, sorted(names), n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Name a file next to this one, or a shipped recipe."
        found.add(extends.at, f"extends: there is no recipe {extends.value}", hint)
        return None
    if any(path.samefile(file) for file in files):
        names = " -> ".join([*(shown(file) for file in files), shown(path)])
        found.add(extends.at, f"extends goes in a circle: {names}", "Remove one of these extends lines.")
        return None
    return path


def _read_flags(sets: Sequence[str], found: Findings) -> Node | None:
    """All --set flags as one layer, in full form."""
    layer: Node | None = None
    for flag in sets:
        at = Place(f"--set {flag}", 0, 0, Path.cwd())
        key, equals, text = flag.partition("=")
        key = key.strip()
        problem = _flag_problem(key, equals)
        if problem:
            found.add(at, *problem)
            continue
        node, problems = parse_flag_value(text, at)
        found.problems.extend(problems)
        for part in reversed(key.split(".")):
            node = node and Node({part: node}, at, at)
        shaped = shape(node, "", found) if node is not None else None
        if shaped is None:
            continue
        taken = [path for path, leaf in walk(shaped) if not isinstance(leaf.value, dict) and layer and get(layer, path)]
        if taken:
            found.add(at, f"{taken[0]} is set by two flags", "Keep one of them.")
        layer = shaped if layer is None else merge(layer, shaped)
    return layer


def _flag_problem(key: str, equals: str) -> tuple[str, str] | None:
    if not equals or not key:
        return "a setting is written key=value", "For example --set train.learning_rate=1e-4"
    if key == "extends":
        return "extends cannot be set by a flag", "Write it in the recipe file."
    parts = key.split(".")
    for depth in range(1, len(parts)):
        field = fields().get(pattern(".".join(parts[:depth])))
        if field and field.is_list:
            whole = ".".join(parts[:depth])
            return f"items of {whole} cannot be set one by one", f"Give the whole list: --set '{whole}=[...]'"
        if field and not field.section:
            return f"{field.path} is a single value; it has no {parts[depth]}", f"Write --set {field.path}=..."
    return None


def _validate(tree: Node, file: Path, found: Findings) -> Recipe | None:
    """The typed recipe, or None with problems: pydantic's findings in our words, at their places."""
    for path, node in walk(tree):
        field = fields().get(pattern(path))
        same = [v for v in field.literals if v == node.value] if field and not isinstance(node.value, dict) else []
        if same and type(same[0]) is not type(node.value):
            found.add(node.at, *wrong_value(path, node), path=path)
    try:
        return Recipe.model_validate(tree.plain())
    except ValidationError as e:
        errors = [(error["type"], error["loc"], *_locate(tree, error["loc"])) for error in e.errors(include_url=False)]
        # Deepest first: of a choice ("auto, or a list") every branch reports, and the one that came farthest is meant.
        for kind, loc, path, node in sorted(errors, key=lambda error: -error[2].count(".")):
            _translate(kind, loc, path, node, found)
    return None


def _locate(tree: Node, loc: tuple[int | str, ...]) -> tuple[str, Node]:
    """Where a pydantic error lies. Names of union branches in `loc` lead nowhere in the tree and are skipped."""
    path, node = "", tree
    for part in loc:
        below = get(node, str(part))
        if below is not None:
            path, node = f"{path}.{part}".lstrip("."), below
    return path, node


def _translate(kind: str, loc: tuple[int | str, ...], path: str, node: Node, found: Findings) -> None:
    """One pydantic error as a problem, unless there is one already."""
    if kind == "missing":
        gone = f"{path}.{loc[-1]}".lstrip(".")
        if not found.incomplete and not found.is_bad(gone):
            found.add(node.key_at, *missing(gone), path=gone)
    elif not found.is_bad(path):
        found.add(node.at, *wrong_value(path, node), path=path)
