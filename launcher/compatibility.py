"""Questions to the table of what can be combined: does it work, why not, what is nearest. Pure.

A choice may leave axes out, where they are not known yet: then only rules that need none of those can hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from .compatibility_table import AXES, MANY, RULES, TRIALS, Rule

Choice = Mapping[str, str]
"""Axis -> value. `compatibility_table.AXES` has both."""

_EASIEST_FIRST = ("generation", "compile", "zero", "offload", "dtype", "sp", "packing", "quantisation", "method")
"""Axes of recipe keys: what changes least of the result comes first."""
_OUTSIDE = ("processes", "device", "attention")
"""Axes that no recipe key of this combination changes: other devices, another model."""
_NEVER_PROPOSED = {"generation": "on", "compile": "on", "sp": MANY, "quantisation": "stored"}


def broken(choice: Choice, rules: Sequence[Rule] = RULES) -> list[Rule]:
    """The rules that hold for `choice`, in the table's order; those that numbers decide are left out."""
    return [rule for rule in rules if not rule.condition and holds(rule, choice)]


def holds(rule: Rule, choice: Choice) -> bool:
    """Whether all that `rule` names is chosen; its condition in words is not looked at."""
    return all(choice.get(axis) in values for axis, values in rule.when.items())


def works(choice: Choice) -> bool:
    """Whether nothing of the table refuses it."""
    return not broken(choice)


def nearest(choice: Choice, rules: Sequence[Rule] = RULES) -> list[dict[str, str]]:
    """The smallest sets of changes after which `choice` works, the easiest first; empty when it works.

    Recipe keys alone are changed where they can help; else the devices or the model too. A method brings its own
    quantisation along, which counts as no change. What no change of these can cure is left as it is.
    """
    for axes in (_EASIEST_FIRST, (*_EASIEST_FIRST, *_OUTSIDE)):
        held = broken(choice, rules)
        hopeless = {rule.name for rule in held if not any(_can_change(axis, choice, axes) for axis in rule.when)}
        if all(rule.name in hopeless for rule in held):
            continue
        for size in range(1, len(axes) + 1):
            found = [change for change in _changes(choice, axes, size) if _cures(choice, change, hopeless, rules)]
            if found:
                return found
    return []


def remedies(rule: Rule, choice: Choice, rules: Sequence[Rule] = RULES) -> list[tuple[str, str]]:
    """(axis, value): each single change of a recipe key that ends this refusal and brings no other."""
    known = {other.name for other in broken(choice, rules)} - {rule.name}
    changes = [change for change in _changes(choice, _EASIEST_FIRST, 1) if _cures(choice, change, known, rules)]
    return [pair for change in changes for pair in change.items() if pair[0] != "quantisation" or len(change) == 1]


def applied(rule: Rule) -> tuple[Rule, ...]:
    """The table, for a case in which the numbers have decided that `rule` holds."""
    return tuple(replace(other, condition="") if other.name == rule.name else other for other in RULES)


def _cures(choice: Choice, change: Mapping[str, str], allowed: set[str], rules: Sequence[Rule]) -> bool:
    return all(rule.name in allowed for rule in broken({**choice, **change}, rules))


def _can_change(axis: str, choice: Choice, axes: Sequence[str]) -> bool:
    return (
        axis in axes and axis in choice and (axis != "quantisation" or choice[axis] != "stored" or "attention" in axes)
    )


def _changes(choice: Choice, axes: Sequence[str], size: int) -> Iterator[dict[str, str]]:
    """Every way to change `size` axes, nearer values first."""
    usable = [axis for axis in axes if _can_change(axis, choice, axes)]
    for names in itertools.combinations(usable, size):
        for values in itertools.product(*(_others(axis, choice[axis]) for axis in names)):
            yield _with_quantisation(choice, dict(zip(names, values, strict=True)))


def _others(axis: str, value: str) -> list[str]:
    order = AXES[axis].values
    others = [v for v in order if v != value and v != _NEVER_PROPOSED.get(axis)]
    # Another model is another model: the plainest first.
    return others if axis in _OUTSIDE else sorted(others, key=lambda v: abs(order.index(v) - order.index(value)))


def _with_quantisation(choice: Choice, change: dict[str, str]) -> dict[str, str]:
    """The method decides whether the base is in 4 bits."""
    held = choice.get("quantisation")
    if "method" in change and held in ("none", "nf4", "nf4-double") and "quantisation" not in change:
        wanted = "none" if change["method"] != "qlora" else "nf4-double" if held == "none" else held
        if wanted != held:
            return {**change, "quantisation": wanted}
    return change


Open = Mapping[str, Sequence[str]]
"""Axis -> the values that are looked at: one where it is fixed."""


def every_value(fixed: Open) -> dict[str, Sequence[str]]:
    """`fixed`, and all values of the axes that it leaves out, in the table's order."""
    return {name: fixed.get(name, axis.values) for name, axis in AXES.items()}


def cells(fixed: Open) -> Iterator[dict[str, str]]:
    """Every combination of what `fixed` leaves open."""
    values = every_value(fixed)
    for picked in itertools.product(*values.values()):
        yield dict(zip(values, picked, strict=True))


def count(fixed: Open) -> tuple[int, int]:
    """(combinations that work, all combinations) of what `fixed` leaves open, without going through each."""
    values = every_value(fixed)
    total = 1
    for options in values.values():
        total *= len(options)
    rules = [rule for rule in RULES if not rule.condition]
    # Axes of many rules first: what is refused early is not looked into.
    axes = sorted(values, key=lambda axis: -sum(axis in rule.when for rule in rules))
    return _count(axes, values, rules), total


def _count(axes: Sequence[str], values: Mapping[str, Sequence[str]], rules: list[Rule]) -> int:
    """Combinations that break none of `rules`, each of which is still open: what it names may come."""
    named = {axis for rule in rules for axis in rule.when}
    if not named:
        whole = 1
        for axis in axes:
            whole *= len(values[axis])
        return whole
    axis, *rest = axes
    groups: dict[tuple[bool, ...], list[str]] = {}
    for value in values[axis]:
        groups.setdefault(tuple(value in rule.when.get(axis, (value,)) for rule in rules), []).append(value)
    found = 0
    for fits, members in groups.items():
        left = [rule for rule, fit in zip(rules, fits, strict=True) if fit]
        if any(not set(rule.when) & set(rest) for rule in left):
            continue
        found += len(members) * _count(rest, values, left)
    return found


def working(fixed: Open) -> Iterator[dict[str, str]]:
    """The combinations that work of what `fixed` leaves open."""
    values = every_value(fixed)
    yield from _working(list(values), values, {})


def _working(axes: list[str], values: Mapping[str, Sequence[str]], chosen: dict[str, str]) -> Iterator[dict[str, str]]:
    if not axes:
        yield chosen
        return
    for value in values[axes[0]]:
        longer = {**chosen, axes[0]: value}
        if works(longer):
            yield from _working(axes[1:], values, longer)


ON_CPU: Open = {"device": ("cpu",), "compile": ("off",)}
"""What every working combination of is run by a test."""


def run_by(cell: Choice) -> str:
    """What has shown that this working combination trains; "" for nothing."""
    if cell["device"] == "cpu":
        return "make matrix" if cell["compile"] == "off" else ""
    return next((trial.where for trial in TRIALS if trial.choice == dict(cell)), "")
