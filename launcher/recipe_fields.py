"""What the schema says about every key, by dotted path: what is allowed, the default, the sentence.

Errors, the reference page and the JSON Schema all read this one table.
"""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .recipe_schema import PATTERNS, Recipe


@dataclass(frozen=True)
class Field:
    """One key. A list item's key stands below `*`: "data.files.*.path"."""

    path: str
    section: type[BaseModel] | None
    """The model of a section, or of the items of a list of sections; None for a value."""
    is_list: bool
    """A list of sections, or a value that may be a list."""
    required: bool
    default: Any
    """None when required or a section."""
    sentence: str
    allowed: str
    """"a whole number, 1 or more", "bf16, fp16 or fp32"; "keys" for a section."""
    kinds: frozenset[str]
    """Python types that are taken besides `literals`: of str, int, float, bool, list."""
    literals: tuple[Any, ...]
    item: str
    """What one item of a list must be; "" where there is no list."""

    @property
    def name(self) -> str:
        """As people write it: "data.files[].path"."""
        return self.path.replace(".*", "[]")


def pattern(path: str) -> str:
    """ "data.files.0.path" -> "data.files.*.path"."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def readable(path: str) -> str:
    """ "data.files.0.path" -> "data.files[1].path": items are counted from 1, as people do."""
    text = ""
    for part in path.split("."):
        text += f"[{int(part) + 1}]" if part.isdigit() else f".{part}"
    return text.lstrip(".")


@functools.cache
def fields() -> dict[str, Field]:
    """Every key of the recipe, sections included, in the schema's order."""
    return {field.path: field for field in _walk(Recipe, "")}


def keys_of(path: str) -> list[str]:
    """Keys allowed in the section (or list item) at `path`; "" is the recipe itself."""
    prefix = f"{path}." if path else ""
    return [p.removeprefix(prefix) for p in fields() if p.startswith(prefix) and "." not in p.removeprefix(prefix)]


def _walk(model: type[BaseModel], prefix: str) -> list[Field]:
    found: list[Field] = []
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        section = _section_of(info.annotation)
        is_list = get_origin(info.annotation) is list
        found.append(_field(path, info, section, is_list))
        if section:
            found.extend(_walk(section, f"{path}.*." if is_list else f"{path}."))
    return found


def _field(path: str, info: FieldInfo, section: type[BaseModel] | None, is_list: bool) -> Field:
    sentence = info.description or (section.__doc__ or "").strip() if section else info.description or ""
    required = info.is_required()
    default = None if required or section else info.default
    if section:
        allowed = "a list" if is_list else "keys"
        kinds = frozenset({"list"} if is_list else ())
        return Field(path, section, is_list, required, default, sentence, allowed, kinds, (), "")
    kinds, literals, item = _kinds(info.annotation)
    allowed = _allowed(info.annotation, info.metadata)
    return Field(path, None, "list" in kinds, required, default, sentence, allowed, kinds, literals, item)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model` or `list[Model]`."""
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _kinds(annotation: Any) -> tuple[frozenset[str], tuple[Any, ...], str]:
    """(python kinds, literal values, what a list item is)."""
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return _kinds(get_args(annotation)[0])
    if origin is Literal:
        return frozenset(), get_args(annotation), ""
    if origin is list:
        return frozenset({"list"}), (), _allowed(get_args(annotation)[0], [])
    if origin in (typing.Union, types.UnionType):
        parts = [_kinds(arg) for arg in get_args(annotation) if arg is not type(None)]
        kinds = frozenset().union(*(p[0] for p in parts))
        return kinds, tuple(v for p in parts for v in p[1]), "".join(p[2] for p in parts)
    return frozenset({annotation.__name__}), (), ""


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    """An annotation in words."""
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        inner, *extra = get_args(annotation)
        return _allowed(inner, [m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])])
    if origin is Literal:
        return _either([_word(value) for value in get_args(annotation)])
    if origin is list:
        return _list_words(_allowed(get_args(annotation)[0], []), metadata)
    if origin in (typing.Union, types.UnionType):
        parts = [_allowed(arg, metadata) for arg in get_args(annotation) if arg is not type(None)]
        return parts[0] if len(parts) == 1 else ", or ".join(parts)
    if annotation is bool:
        return "true or false"
    if annotation is str:
        patterns = [words for m in metadata if (words := PATTERNS.get(getattr(m, "pattern", None) or ""))]
        return patterns[0] if patterns else "a text, not empty" if MinLen(1) in metadata else "a text"
    return f"{'a whole number' if annotation is int else 'a number'}{_range_words(annotation, metadata)}"


def _list_words(item: str, metadata: list[Any]) -> str:
    exact = next((m.max_length for m in metadata if isinstance(m, MaxLen)), 0)
    plural = {"a text": "texts", "a number": "numbers"}[item]
    return f"a list of {exact} {plural}" if exact else f"a list of {plural}"


def _range_words(annotation: Any, metadata: list[Any]) -> str:
    words: list[str] = []
    for m in metadata:
        if isinstance(m, Gt):
            words.append("1 or more" if annotation is int else f"more than {m.gt}")
        elif isinstance(m, Ge):
            words.append(f"{m.ge} or more")
        elif isinstance(m, Lt):
            words.append(f"less than {m.lt}")
        elif isinstance(m, Le):
            words.append(f"{m.le} or less")
    return f", {' and '.join(words)}" if words else ""


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
