"""What is generated from the schema: JSON Schema for editors, the reference page, the table of shipped recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compatibility_page import document
from .family_page import family_page
from .import_docs import page as import_page
from .recipe_fields import Field, fields
from .recipe_library import SCHEMA_FILE, list_recipes
from .recipe_schema import ITEM_SHORT_FORMS, NULLABLE, SHORT_FORMS, Recipe
from .template_docs import templates_page

if TYPE_CHECKING:
    from .recipe import LoadedRecipe

_EXTENDS = (
    "Another recipe (a file next to this one, or a shipped recipe's name) whose values hold where this one is silent."
)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file, short forms and `extends` included.

    A recipe that extends another may leave anything out, so no section key is required here; the loader says what is missing.
    """
    schema = _tidy(Recipe.model_json_schema())
    definitions = schema["$defs"]
    _drop_nulls(definitions)
    for name, key in SHORT_FORMS.items():
        section = definitions[Recipe.model_fields[name].annotation.__name__]  # type: ignore[union-attr]
        section.pop("required", None)
        whole = section["properties"][key]
        _accept_items(section, f"{name}.{key}", key)
        forms = [section["properties"][key] if whole.get("type") == "array" else _bare(whole)]
        reference = schema["properties"][name]["$ref"]
        schema["properties"][name] = {"anyOf": [*forms, {"$ref": reference}], "description": section["description"]}
    _accept_items(schema, "secrets", "secrets")
    schema["properties"] = {"extends": {"type": "string", "description": _EXTENDS}, **schema["properties"]}
    required = schema.pop("required")
    schema["anyOf"] = [{"required": ["extends"]}, {"required": required}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Recipe", **schema}


def schema_text() -> str:
    """The JSON Schema as text, as in docs/recipe.schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _accept_items(section: dict[str, Any], path: str, key: str) -> None:
    """Let a list of sections also hold bare scalars, or be one scalar or one section."""
    if path not in ITEM_SHORT_FORMS:
        return
    array = section["properties"][key]
    item = {"anyOf": [{"type": "string"}, array["items"]]}
    array["items"] = item
    section["properties"][key] = {"anyOf": [*item["anyOf"], array], "description": array.pop("description")}


def _drop_nulls(definitions: dict[str, Any]) -> None:
    """Python's None is "not written"; a recipe may write null only where NULLABLE says so."""
    for path, field in fields().items():
        if not field.section:
            continue
        properties = definitions[field.section.__name__]["properties"]
        prefix = f"{path}.*" if field.is_list else path
        for name, prop in properties.items():
            if {"type": "null"} in prop.get("anyOf", ()) and f"{prefix}.{name}" not in NULLABLE:
                rest = [form for form in prop.pop("anyOf") if form != {"type": "null"}]
                prop.update(rest[0] if len(rest) == 1 else {"anyOf": rest})


def _bare(whole: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in whole.items() if k != "description"}


def _tidy(schema: Any) -> Any:
    """Without titles, defaults of whole sections, and the nulls that a recipe may not write."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tidy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "title" and isinstance(value, str):
            continue
        if key == "default" and (value is None or isinstance(value, dict)):
            continue
        tidy[key] = _tidy(value)
    return tidy


_REFERENCE_HEAD = """# Recipe reference

Every key of a recipe, in the order in which data flows. This page and [recipe.schema.json](recipe.schema.json) are
generated from `launcher/recipe_schema.py` by `python -m launcher.recipe_docs`.

A recipe holds only what differs from the defaults. A key that is not listed here is an error, never ignored. `null` does not
mean "default": leave the line out.

"""

_REFERENCE_TAIL = """## extends

`extends: other.yaml` at the top names one recipe to build on: a file (relative to this one), or a shipped recipe's name. Chains are
fine. Mappings are merged key by key; lists and single values replace. What a later layer makes void is dropped from the
earlier ones, and said so: `max_steps` replaces `epochs` and the other way round, another `method` drops adapter
keys that it has no use for, another `model` drops the `revision` of the first.

## --set

`--set train.learning_rate=1e-4` sets one value after all files; it may be repeated. `--set 'data.files=[a.jsonl, b.jsonl]'` gives a whole
list; single items cannot be set. Paths in a recipe start at the recipe's folder, paths in a flag at the current one.

`launch recipes show RECIPE --origin` prints every value and the line or flag that set it.

## YAML

`2e-4` is a number. `true` and `false` are the only switches: `yes`, `no`, `on`, `off` are texts. `017`, `1_000`, `12:30:00` and dates are texts, and an
error where a number is wanted. `.nan` and `.inf`, duplicate keys, anchors, aliases, tags and tabs are errors. Files are UTF-8.
"""


def reference_page() -> str:
    """docs/recipe_reference.md."""
    parts = [_REFERENCE_HEAD]
    for path, field in fields().items():
        if field.section:
            title = field.name if not field.is_list else f"{field.name}[]"
            parts.append(f"## {title}\n\n{_cell((field.section.__doc__ or '').strip())}\n\n")
            prefix = f"{path}.*." if field.is_list else f"{path}."
            rows = [f for f in fields().values() if f.path.startswith(prefix) and "." not in f.path[len(prefix) :]]
            parts.append(_table(["key", "allowed", "default", "meaning"], [_reference_row(row) for row in rows]))
    return "".join(parts) + _REFERENCE_TAIL


def _reference_row(field: Field) -> list[str]:
    written = "" if field.default is None else f"`{plain_text(field.default)}`"
    default = "required" if field.required else written
    allowed = f"a list, see {field.name}[]" if field.section else field.allowed
    return [f"`{field.path.rpartition('.')[2]}`", allowed, default, field.sentence]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(text) for text in line)} |\n" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def plain_text(value: Any) -> str:
    """A value as it is written in a recipe, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(plain_text(item) for item in value)}]"
    if isinstance(value, float) and value < 0.001 and value:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return str(value)


_README_HEAD = """# Recipes

Each file opens with its run command, the hardware it needs, and what to expect. Take one as it is, or
`launch recipes copy NAME .` and change it; all keys: [docs/recipe_reference.md](../docs/recipe_reference.md).

"""

_README_TAIL = """For any other model: `launch recipes new --model ID --method qlora --data my.jsonl`; which are known, and which are not trained:
[docs/families.md](../docs/families.md).

`data/example_chat.jsonl` and `data/example_text.jsonl` only show the formats: put your own file in their place.
`tiny/` is a model folder without weights: a two-layer config and a byte-level BPE tokenizer with 1024 entries.
"""


def readme_page() -> str:
    """recipes/README.md, from the recipes' own headers."""
    rows = [[f"[{r.name}]({r.name}.yaml)", r.purpose, f"`{r.model}`", r.method, r.hardware] for r in list_recipes()]
    return _README_HEAD + _table(["recipe", "purpose", "model", "method", "hardware"], rows) + _README_TAIL


def generated_files() -> dict[Path, str]:
    """Files of a checkout that are generated, and what they must hold."""
    root = Path(__file__).parent.parent
    return {
        root / "docs" / "recipe_reference.md": reference_page(),
        root / "docs" / SCHEMA_FILE: schema_text(),
        root / "docs" / "templates.md": templates_page(),
        root / "docs" / "compatibility.md": document(),
        root / "docs" / "import.md": import_page(),
        root / "docs" / "families.md": family_page(),
        root / "recipes" / "README.md": readme_page(),
    }


def origin_rows(loaded: LoadedRecipe) -> list[tuple[str, str, str]]:
    """(dotted path, value, "file:line" | "--set" | "default") for every value of the recipe, defaults included."""
    rows: list[tuple[str, str, str]] = []
    for path, value in leaves(loaded.recipe.model_dump(by_alias=True), ""):
        origin = loaded.origins.get(path, "default")
        if value is not None or origin != "default":
            rows.append((path, "null" if value is None else plain_text(value).replace("\n", "\\n"), origin))
    return rows


def leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    """(dotted path, value) of everything below `path`; items of a list of sections are numbered."""
    if isinstance(value, dict):
        children = [(f"{path}.{key}".lstrip("."), child) for key, child in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        children = [(f"{path}.{i}", item) for i, item in enumerate(value)]
    else:
        return [(path, value)]
    return [leaf for below, child in children for leaf in leaves(child, below)]


if __name__ == "__main__":
    for file, text in generated_files().items():
        file.write_text(text, encoding="utf-8")
