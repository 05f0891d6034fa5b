"""What becomes of every key of another program: import_<program>.json, one file each. Standard library only.

A key either `becomes` one of ours, or is `without` a counterpart, with a reason and an effect:
  same     nothing is lost: it is always so here, or is said elsewhere
  changes  the recipe trains otherwise, unless the value is off or the one named after `=`
  stop     a person must choose, unless the value is off or the one named after `=`
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("xtuner", "llamafactory", "axolotl", "swift", "trl")
_OFF = frozenset({"", "none", "no", "false", "null", "[]", "{}"})


@dataclass(frozen=True)
class Without:
    """Why a key has no counterpart."""

    why: str
    effect: str
    """same | changes | stop."""
    harmless: tuple[str, ...]
    """Values, beside nothing, false and 0, with which nothing is lost."""

    def matters(self, value: Any) -> bool:
        """Whether something is lost with this value."""
        if self.effect == "same":
            return False
        text = str(value).strip()
        if not value or text.lower() in _OFF:
            return bool(self.harmless) and text.lower() == "false" and "true" in self.harmless
        return not any(text.lower() == other.lower() or _equal(text, other) for other in self.harmless)


@dataclass(frozen=True)
class Table:
    """One program's keys."""

    name: str
    program: str
    version: str
    source: str
    becomes: dict[str, str]
    """Its key -> "our.key" or "our.key:part", where several keys make up one of ours."""
    without: dict[str, Without]
    """Its key, or `some.part.*`, -> why not."""
    defaults: dict[str, Any]
    """Our key -> what the program does where its own key is not written, if a recipe would do otherwise."""
    differs: tuple[tuple[str, str], ...]
    """(when, what the program does silently and a recipe does not)."""
    extra: dict[str, Any]
    """What else the file holds: XTuner's map functions and system prompts."""

    @property
    def keys(self) -> list[str]:
        """All keys, sorted."""
        return sorted({*self.becomes, *self.without})

    def reason(self, key: str) -> Without | None:
        """Why `key` has no counterpart; None when it has one, or is unknown."""
        if key in self.becomes:
            return None
        parts = key.split(".")
        candidates = [key, *(".".join(parts[:n]) + ".*" for n in range(len(parts) - 1, 0, -1))]
        return next((self.without[c] for c in candidates if c in self.without), None)

    def knows(self, key: str) -> bool:
        """Whether the program has such a key."""
        return key in self.becomes or self.reason(key) is not None

    def nearest(self, key: str) -> str:
        """The known key that is most like `key`, or ""."""
        same_parent = [k for k in self.keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
        for among in (same_parent, self.keys):
            near = difflib.get_close_matches(key, among, n=1, cutoff=0.7)
            if near:
                return near[0]
        return ""


@functools.cache
def load_table(name: str) -> Table:
    """The table of a program of PROGRAMS, or of `transformers`, with what it takes over from others."""
    text = Path(__file__).with_name(f"import_{name}.json").read_text(encoding="utf-8")
    raw = json.loads(text)
    becomes: dict[str, str] = dict(raw["becomes"])
    without = dict(_reasons(raw["without"]))
    for other, wanted in raw.get("extends", {}).items():
        base = load_table(other)
        for key in base.keys if wanted == "*" else wanted.split():
            if key in becomes or key in without:
                continue
            if key in base.becomes:
                becomes[key] = base.becomes[key]
            else:
                without[key] = base.without[key]
    differs = tuple((when, text) for when, text in raw.get("differs", ()))
    extra = {key: raw[key] for key in ("map_functions", "systems") if key in raw}
    return Table(
        name, raw["program"], raw["version"], raw["source"], becomes, without, raw.get("defaults", {}), differs, extra
    )


def _reasons(groups: Iterable[dict[str, str]]) -> Iterable[tuple[str, Without]]:
    for group in groups:
        for entry in group["keys"].split():
            key, _, values = entry.partition("=")
            yield key, Without(group["why"], group["effect"], tuple(values.split("|")) if values else ())


def _equal(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return False
