"""What a recipe may change in the middle of a run. Pure.

Free keys change where and how it is computed, what is kept and what is asked, never what is learnt. Bound keys belong
to the weights that were saved, or to the run's folder. All others change what is learnt from here on: a person must
name them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import LaunchError
from .recipe_docs import leaves, plain_text
from .recipe_fields import fields
from .recipe_schema import Recipe

FREE = (
    "checkpoint",
    "cluster",
    "evaluate",
    "parallel",
    "retry",
    "run.hang_s",
    "run.timeout_s",
    "secrets",
    "storage",
    "model.trust_remote_code",
    "train.accumulate",
    "train.compile",
    "train.global_batch",
    "train.gradient_checkpointing",
    "train.micro_batch",
)
"""Whether the global batch stays the same is checked in the plan."""
BOUND = {
    "model.source": "the saved weights belong to its base",
    "model.revision": "the saved weights belong to its base",
    "method.name": "other weights were trained",
    "method.rank": "the saved adapters have another shape",
    "method.targets": "the saved adapters sit on other layers",
    "method.double_quant": "the saved adapters were trained on another base",
    "run.dir": "the run has its folder",
    "run.name": "the run has its name",
}


@dataclass(frozen=True)
class Change:
    """A value of the recipe that differs from the run's."""

    key: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


def changes(before: Recipe, after: Recipe) -> list[Change]:
    """Every value that differs, in the recipe's order; what one of them has not got is `-`."""
    old, new = (dict(leaves(recipe.model_dump(by_alias=True), "")) for recipe in (before, after))
    return [
        Change(key, _text(old, key), _text(new, key)) for key in {**old, **new} if _text(old, key) != _text(new, key)
    ]


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    return "-" if value is None else plain_text(value)


def require_allowed(found: Sequence[Change], forced: Sequence[str], recipe: str) -> None:
    """Raises LaunchError, naming every change that is not allowed, and every forced key that did not change."""
    unknown = [key for key in forced if not _is_key(key)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields(), 1)
        raise LaunchError(
            f"--force-key {unknown[0]}: a recipe has no such key",
            f"Nearest: {near[0]}" if near else "The keys: docs/recipe_reference.md",
        )
    bound = [change for change in found if change.key in BOUND]
    open_ones = [c for c in found if not _covered(c.key, (*FREE, *BOUND)) and not _covered(c.key, forced)]
    if bound:
        reasons = "\n".join(f"{change} ({BOUND[change.key]})" for change in bound)
        raise LaunchError(f"a run cannot change this any more:\n{reasons}", f"Start a new run: launch {recipe}")
    if open_ones:
        flags = " ".join(f"--force-key {change.key}" for change in open_ones)
        raise LaunchError(
            "these changes would alter what the run learns from here on:\n" + "\n".join(map(str, open_ones)),
            f"If you mean it: {flags}\nOr start a new run: launch {recipe}",
        )
    idle = [key for key in forced if not any(_covered(change.key, [key]) for change in found)]
    if idle:
        changed = ", ".join(change.key for change in found) or "nothing"
        raise LaunchError(f"--force-key {idle[0]}: its value is the run's own", f"Changed: {changed}")


def affects_training(found: Iterable[Change]) -> bool:
    """Whether a run whose training is done has to train again from its last checkpoint."""
    return any(not _covered(change.key, FREE) for change in found)


def affects_report(found: Iterable[Change]) -> bool:
    """Whether its report is out of date."""
    return any(_covered(change.key, ["evaluate"]) for change in found)


def _is_key(key: str) -> bool:
    """A key or a section of the recipe; an item of a list has its number in it."""
    path = ".".join("*" if part.isdigit() else part for part in key.split("."))
    return any(_covered(known, [path]) for known in fields())


def _covered(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
