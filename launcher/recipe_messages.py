"""What to tell a person about a key that does not exist, a value of the wrong kind, or something missing."""

from __future__ import annotations

import difflib
import re
from typing import Any

from .recipe_fields import Field, fields, keys_of, pattern, readable
from .recipe_words import EXAMPLES, FOREIGN_KEYS, FOREIGN_VALUES, NO_SUCH_KEY
from .recipe_yaml import Node, resolve_scalar

_MISSING = {
    "model": "Add for example: model: Qwen/Qwen2.5-7B-Instruct   (Hub id, folder or GGUF file)",
    "model.source": "Add for example: source: Qwen/Qwen2.5-7B-Instruct   (Hub id, folder or GGUF file)",
    "method": "Add: method: qlora   (or lora, or full)",
    "method.name": "Add: name: qlora   (or lora, or full)",
    "data": "Add: data: my.jsonl",
    "data.files": "Add: files: [my.jsonl]",
    "data.files.*.path": "Add: path: my.jsonl",
    "evaluate.prompts.*.user": 'Add the question: user: "Who are you?"',
}
_SWITCH_WORDS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def unknown_key(section: str, key: str, node: Node) -> tuple[str, str]:
    """(message, hint) for `key`, which the section at dotted path `section` ("" = the recipe) does not have."""
    here = keys_of(pattern(section))
    allowed = f"Allowed {f'under {readable(section)}' if section else 'here'}: {', '.join(here)}"
    if key == "extends":
        return "extends must stand at the top of the recipe", "Move it there."
    if re.search(r"\s", key.strip()):
        hint = f'A text with a colon needs quotes: "{key}: ..."' if pattern(section).endswith("*") else allowed
        return f"unknown key `{key}`", hint
    if not key:
        return "a key is missing before the colon", allowed
    word = key.strip().lower().replace("-", "_")
    if word in here:
        return f"unknown key `{key}`; did you mean {word}?", f"Write `{word}:`"
    if key in FOREIGN_KEYS:
        return _translated(section, key, FOREIGN_KEYS[key], node)
    homes = [f for f in fields().values() if f.path.rpartition(".")[2] == word]
    if homes:
        return _belongs(key, homes, node)
    if word in FOREIGN_KEYS:
        return _translated(section, key, FOREIGN_KEYS[word], node)
    if word in NO_SUCH_KEY:
        return f"unknown key `{key}`; a recipe has no such setting", NO_SUCH_KEY[word]
    near = difflib.get_close_matches(word, here, n=1, cutoff=0.6)
    if near:
        return f"unknown key `{key}`; did you mean {near[0]}?", allowed
    others = {f.path.rpartition(".")[2]: f for f in fields().values()}
    near = difflib.get_close_matches(word, others, n=1, cutoff=0.7)
    if near:
        return f"unknown key `{key}`; did you mean {others[near[0]].name}?", allowed
    return f"unknown key `{key}`", allowed


def _belongs(key: str, homes: list[Field], node: Node) -> tuple[str, str]:
    """For a key that other sections have."""
    parents = [home.name.rpartition(".")[0] for home in homes]
    if "" in parents:
        return f"unknown key `{key}` here; {key} is a section of its own", "Move it to the left margin."
    hint = EXAMPLES.get(key) or (f"Write it there:\n{_written(homes[0], node)}" if len(homes) == 1 else "")
    return f"unknown key `{key}` here; it belongs under {' or '.join(parents)}", hint


def _translated(section: str, key: str, ours: str, node: Node) -> tuple[str, str]:
    """For another tool's word."""
    home = fields()[ours.replace("[]", ".*")]
    message = f"unknown key `{key}`; a recipe calls it {home.name}"
    if key in EXAMPLES:
        return message, EXAMPLES[key]
    parent, _, name = home.path.rpartition(".")
    if parent == pattern(section):
        return message, f"Write `{name}: {_value_text(node)}`"
    return message, f"Write it there:\n{_written(home, node)}"


def _written(home: Field, node: Node) -> str:
    """The YAML lines that say the same under our key."""
    *parents, name = home.path.split(".")
    lines, depth = [], 0
    for parent in parents:
        if parent == "*":
            continue
        lines.append(f"{'  ' * depth}{parent}:")
        depth += 1
    dash = "- " if "*" in parents else ""
    return "\n".join([*lines, f"{'  ' * depth}{dash}{name}: {_value_text(node)}"])


def _value_text(node: Node) -> str:
    return node.text if isinstance(node.value, str | int | float) and node.text and len(node.text) < 60 else "..."


def not_a_section(path: str, node: Node) -> tuple[str, str]:
    """(message, hint) for a section that is written as a scalar or a list."""
    keys = keys_of(pattern(path))
    found_instead = "a list" if isinstance(node.value, list) else f"the value {node.text}"
    if found := re.fullmatch(r"([A-Za-z_]+):(\S.*)", node.text):
        hint = f"Write a space after the colon: `{found[1]}: {found[2]}`"
    else:
        hint = f"Indent keys below it. Allowed under {readable(path)}: {', '.join(keys)}"
    return f"{readable(path)} is a section with keys of its own, not {found_instead}", hint


def null_value(path: str) -> tuple[str, str]:
    """(message, hint) for null or nothing where a value must stand."""
    field = fields().get(pattern(path))
    if path.rpartition(".")[2].isdigit():
        return f"{readable(path)}: this list item is empty", "Write a value after the dash, or remove the line."
    if field and field.section:
        return (
            f"{readable(path)} has nothing below it; null is not 'default': remove the line",
            f"Or indent keys below it. Allowed under {readable(path)}: {', '.join(keys_of(pattern(path)))}",
        )
    allowed = f"Or write {field.allowed}." if field else ""
    return f"{readable(path)} has no value; null is not 'default': remove the line", allowed


def missing(path: str) -> tuple[str, str]:
    """(message, hint) for a required key that is absent."""
    return f"{readable(path)} is missing", _MISSING.get(pattern(path), "")


def wrong_value(path: str, node: Node) -> tuple[str, str]:
    """(message, hint) for a value that the schema refuses at `path` (a key, or one item of a list)."""
    field = fields().get(pattern(path))
    if field is None:
        field = fields()[pattern(path).removesuffix(".*")]
        fix = _fix(field, node, item=True)
        return f"{readable(path)}: {describe(node)}; expected {field.item}", fix
    if field.section:
        return f"{readable(path)}: the list is empty", "Write at least one item."
    is_number = type(node.value) is int and "float" in field.kinds
    if (type(node.value).__name__ in field.kinds or is_number) and node.text:
        return f"{readable(path)}: {node.text}; expected {field.allowed}", _fix(field, node, item=False)
    return f"{readable(path)}: {describe(node)}; expected {field.allowed}", _fix(field, node, item=False)


def describe(node: Node) -> str:
    """ "'2' is a text", "a list" ..."""
    value = node.value
    if isinstance(value, dict):
        return "a mapping with keys of its own"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return f"{node.text} is a switch (true/false)"
    if isinstance(value, int | float):
        return f"{node.text} is a number"
    if value is None:
        return "nothing"
    shown = value if len(value) <= 40 else value[:37] + "..."
    return f"'{shown}' is a string"


def _fix(field: Field, node: Node, item: bool) -> str:
    """What to type instead, or "" when only the person can know."""
    value = node.value
    if isinstance(value, list):
        if "list" in field.kinds and not item:
            return ""
        return f"Write one value without brackets: {value[0].text}" if len(value) == 1 else "Write one value."
    if isinstance(value, dict):
        return "Write the value on the same line as its key."
    if "list" in field.kinds and not item and not field.literals:
        return f"Write a list: [{node.text}]"
    kinds = {"str" if field.item == "a text" else "float"} if item else field.kinds
    if isinstance(value, str):
        return _fix_text(field, kinds, node)
    if "str" in kinds:
        return f'Write it in quotes: "{node.text}"'
    if isinstance(value, float) and value.is_integer() and ("int" in kinds or int(value) in _numbers(field)):
        return f"Write {int(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and "bool" in kinds and value in (0, 1):
        return f"Write {'true' if value else 'false'}"
    return _nearest_literal(field, node.text)


def _numbers(field: Field) -> list[Any]:
    return [v for v in field.literals if isinstance(v, int)]


def _fix_text(field: Field, kinds: frozenset[str] | set[str], node: Node) -> str:
    text = node.value.strip()
    number, _ = resolve_scalar(text)
    wants_number = bool(kinds & {"int", "float"} or _numbers(field))
    if "bool" in kinds and text.lower() in _SWITCH_WORDS:
        return f"Write {_SWITCH_WORDS[text.lower()]}"
    if node.quoted and not isinstance(number, str) and number is not None and (wants_number or "bool" in kinds):
        return f"Write {text} without quotes"
    if wants_number and (found := _read_number(text)):
        return f"Write {found}"
    return _nearest_literal(field, text)


def _read_number(text: str) -> str:
    """The number that a person probably meant, or ""."""
    joined = re.sub(r"(?<=\d)[_,](?=\d)", "", text)
    if joined != text and not isinstance(resolve_scalar(joined)[0], str):
        return joined
    if re.fullmatch(r"0o?[0-7]+", text):
        return f"{text[1:].lstrip('o').lstrip('0') or '0'}, without the leading zero"
    if re.fullmatch(r"0x[0-9a-fA-F]+", text):
        return str(int(text, 16))
    if found := re.fullmatch(r"(\d+(\.\d+)?)\s*%", text):
        return f"{float(found[1]) / 100:g}"
    if found := re.fullmatch(r"(\d+)[kK]", text):
        return f"{int(found[1]) * 1024} or {int(found[1]) * 1000}"
    if found := re.fullmatch(r"(\d+):(\d\d):(\d\d)", text):
        return f"{int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3])}"
    return ""


def _nearest_literal(field: Field, text: str) -> str:
    words = [str(v) for v in field.literals]
    lowered = text.lower()
    candidate = lowered if lowered in words else FOREIGN_VALUES.get(lowered, "")
    if candidate in words:
        return f"Write {candidate}"
    near = difflib.get_close_matches(lowered, words, n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else ""
