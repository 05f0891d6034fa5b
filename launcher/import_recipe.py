"""`launch recipes import FILE`: another program's settings -> a recipe, and an account of every one of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LaunchError, Problem, RecipeError
from .import_axolotl import map_axolotl
from .import_draft import Draft
from .import_formats import Foreign, read_foreign
from .import_model import map_lengths, map_method, map_model
from .import_schedule import map_parallel, map_saving, map_training
from .import_sources import map_llamafactory, map_swift, map_trl
from .import_table import load_table
from .import_xtuner import map_xtuner
from .recipe import load_recipe, recipe_text
from .recipe_schema import SHORT_FORMS, Recipe
from .recipe_yaml import Node, shown
from .run_dir import file_of_the_user

_REFUSED_COMMANDS = ("rlhf", "dpo", "grpo", "kto", "reward")
_STRICT = {
    "llamafactory": "stops at it",
    "swift": "stops at it",
    "trl": "hands it on to accelerate",
    "axolotl": "drops it without a word",
    "xtuner": "fails at it, or never looks at it",
}


@dataclass(frozen=True)
class Imported:
    """A recipe made of another program's settings."""

    draft: Draft
    foreign: Foreign
    source: Path
    text: str
    """The recipe as YAML."""
    out: Path
    """Where it belongs: paths in it start there."""


def import_recipe(source: Path, program: str = "", out: Path | None = None) -> Imported:
    """Reads `source` and makes a recipe of it; nothing is written.

    Raises RecipeError with every key that its program does not have and every value that cannot be read; LaunchError
    when the program cannot be told or `out` exists.
    """
    foreign = read_foreign(source, program)
    target = out or _default_out(source)
    if target.exists():
        raise LaunchError(f"{shown(target)} exists", "Name another file: --out other.yaml")
    draft = Draft(load_table(foreign.program), foreign.settings, foreign.start)
    _check_keys(draft, foreign)
    _map(draft, foreign)
    if draft.problems:
        raise RecipeError(draft.problems)
    _account_for_the_rest(draft)
    for key, node in foreign.started:
        draft.leave(
            key,
            node,
            "processes are started by `launch` itself (--gpus, --hosts), with the environment that it has",
            False,
        )
    return Imported(draft, foreign, source, _text(draft, foreign, source, target), target)


def write(imported: Imported) -> list[Problem]:
    """Writes the recipe, and returns what `launch recipes check` says against it (nothing: it is ready)."""
    with file_of_the_user(imported.out) as f:
        f.write(imported.text)
    try:
        load_recipe(imported.out)
    except RecipeError as e:
        return e.problems
    return []


def _default_out(source: Path) -> Path:
    name = Path.cwd() / f"{source.stem}.yaml"
    return Path.cwd() / f"{source.stem}_recipe.yaml" if name.exists() else name


def _check_keys(draft: Draft, foreign: Foreign) -> None:
    """Every key that the program does not have is a mistake, with the nearest one."""
    table = draft.table
    for key, node in draft.settings:
        if table.knows(key):
            continue
        if node.value is None:
            draft.leave(key, node, f"{table.program} has no such key; it is not set", matters=False)
            continue
        near = table.nearest(key)
        meant = f"; did you mean {near}?" if near else ""
        hint = f"{table.program} {_STRICT[table.name]}. Correct it, or delete it."
        draft.problem(node, f"{table.program} has no key `{key}`{meant}", hint)
    if foreign.config is not None:
        _check_variables(draft, foreign)


def _check_variables(draft: Draft, foreign: Foreign) -> None:
    """Names of an XTuner config that nothing reads: a mistake where they look like one that is read, else told."""
    import difflib

    config = foreign.config
    assert config is not None
    from .import_xtuner import ROOTS

    roots = {name for name in ROOTS if name in config.variables}
    unread = [n for n in config.variables if n not in config.used and n not in ROOTS and not n.startswith("_")]
    for name in unread:
        node = config.variables[name]
        near = difflib.get_close_matches(name, (config.used & config.variables.keys()) | roots, n=1, cutoff=0.88)
        if near:
            hint = f"XTuner would use {near[0]}, and never look at {name}. Correct it, or delete it."
            draft.problem(node, f"nothing in the config reads `{name}`; did you mean {near[0]}?", hint)
        else:
            draft.leave(name, node, "nothing in the config reads it: it had no effect in XTuner either", matters=False)


def _map(draft: Draft, foreign: Foreign) -> None:
    if foreign.command in _REFUSED_COMMANDS:
        hint = "A recipe does supervised fine-tuning and pre-training on texts."
        raise LaunchError(f"{foreign.start.source}: `{foreign.command}` is not offered", hint)
    if foreign.command == "pt":
        draft.facts.add("pt")
    map_model(draft)
    map_method(draft)
    chosen = len(draft.choices)
    if foreign.program == "xtuner":
        assert foreign.config is not None
        texts = map_xtuner(draft, foreign.config)
    else:
        mappers = {"llamafactory": map_llamafactory, "axolotl": map_axolotl, "swift": map_swift, "trl": map_trl}
        texts = mappers[foreign.program](draft)
    if "data.files" not in draft.values and len(draft.choices) == chosen:
        draft.choose(None, "no data set can be taken over", "Write the file itself: data: my.jsonl")
    map_lengths(draft, texts)
    share = draft.number("data.held_out")
    if share and share < 1 and "data.held_out_files" not in draft.values:
        draft.write("data.held_out", share)
    elif share and share >= 1:
        draft.leave_all(
            ("data.held_out",), "rows are held out by a share of all: write data.held_out: 0.05", matters=True
        )
    else:
        draft.leave_all(("data.held_out",), "no share is held out", matters=False)
    map_training(draft)
    map_parallel(draft)
    map_saving(draft, bool(draft.values.get("data.held_out") or draft.values.get("data.held_out_files")))


def _account_for_the_rest(draft: Draft) -> None:
    """What no part has looked at has a reason in the table; a value with which it would matter is a choice or a loss."""
    told = {(m.where, m.key) for m in draft.mapped} | {(entry.where, entry.key) for entry in draft.left}
    stops: dict[str, list[tuple[str, Node]]] = {}
    for key, node in draft.settings:
        reason = draft.table.reason(key)
        if reason is None:
            if (node.key_at.origin, key) not in told and not isinstance(node.value, list | dict):
                decided = any(choice.where == node.key_at.origin for choice in draft.choices)
                why = "not set" if node.value is None else "at its default, or said by another key"
                why = "to be decided, see there" if decided else why
                draft.leave(key, node, why, matters=False)
            continue
        value = node.text if not isinstance(node.value, str | int | float | bool | list | dict | None) else node.plain()
        value = node.text.rpartition(".")[2] if node.value is not None and value is node.text else value
        matters = reason.matters(value)
        why = reason.why if matters or reason.effect == "same" else "off, or what a recipe does anyway"
        draft.leave(key, node, why, matters)
        if matters and reason.effect == "stop":
            stops.setdefault(reason.why, []).append((f"{key}: {draft.left[-1].value}", node))
    for why, found in stops.items():
        draft.choose(
            found[0][1], f"{', '.join(text for text, _ in found)}: cannot be taken over", f"{why[0].upper()}{why[1:]}."
        )


def _text(draft: Draft, foreign: Foreign, source: Path, out: Path) -> str:
    """The recipe: a comment with where it came from, and the values in the order of the schema."""
    folder = Path(os.path.abspath(out)).parent
    tree: dict[str, Any] = {}
    for section in Recipe.model_fields:
        below = {
            key.partition(".")[2]: value for key, value in draft.values.items() if key.partition(".")[0] == section
        }
        if below:
            tree[section] = {
                key: _relative(value, folder, f"{section}.{key}") for key, value in _ordered(section, below)
            }
    for section, key in SHORT_FORMS.items():
        if list(tree.get(section, ())) == [key]:
            tree[section] = tree[section][key]
    head = f"# {source.stem}: imported from {source.name} ({draft.table.program}).\n"
    head += "".join(f"# To decide: {' '.join(c.message.split())} {' '.join(c.hint.split())}\n" for c in draft.choices)
    return f"{head}{recipe_text(tree)}"


def _ordered(section: str, below: dict[str, Any]) -> list[tuple[str, Any]]:
    model: Any = Recipe.model_fields[section].annotation
    order = [field.alias or name for name, field in model.model_fields.items()]
    return sorted(below.items(), key=lambda item: order.index(item[0]))


def _relative(value: Any, folder: Path, key: str) -> Any:
    """Paths below the recipe's folder start there; others stay whole."""
    if key in ("model.source", "data.template") and isinstance(value, str) and value.startswith("/"):
        return _from(value, folder)
    if key in ("data.files", "data.held_out_files"):
        return [_from(v, folder) if isinstance(v, str) else {**v, "path": _from(v["path"], folder)} for v in value]
    return value


def _from(path: str, folder: Path) -> str:
    if not path.startswith("/"):
        return path
    above = os.path.commonpath([path, folder])
    near = len(Path(folder).relative_to(above).parts) <= 3 and len(Path(above).parts) > 2
    return os.path.relpath(path, folder) if near else path
