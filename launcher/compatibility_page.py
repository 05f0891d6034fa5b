"""The table of combinations for people and programs: a page of the terminal, JSON, and docs/compatibility.md."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .compatibility import ON_CPU, Open, applied, cells, count, every_value, holds, nearest, run_by, works
from .compatibility_table import AXES, CAUTIONS, MANY, RULES, TRIALS, Axis, Rule
from .errors import Problem, RecipeError

MAX_CELLS = 10_000
"""So many combinations are listed one by one; more are only counted."""
_OTHER_NAMES = {
    "quantization": "quantisation",
    "devices": "device",
    "samples": "generation",
    "num_processes": "processes",
    **{axis.key: name for name, axis in AXES.items() if axis.key},
}
_OTHER_VALUES = {"true": "on", "false": "off", "gpu": "cuda", "sliding": "sliding window", "yes": "on", "no": "off"}
_GRID = ("zero", "offload", "dtype")


def parse_filters(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """`method=qlora`, `zero=2,3`, also with a recipe's key -> axis -> values. Raises RecipeError with every mistake."""
    fixed: dict[str, tuple[str, ...]] = {}
    problems = []
    for text in texts:
        name, equals, wanted = text.partition("=")
        axis = AXES.get(_OTHER_NAMES.get(name, name))
        if not equals or axis is None:
            near = difflib.get_close_matches(name, [*AXES, *_OTHER_NAMES], n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            problems.append(Problem(text, "there is no such choice", f"{meant}Choices: {', '.join(AXES)}"))
            continue
        values = [_value(axis, value.strip()) for value in wanted.split(",")]
        unknown = [value for value in values if value not in axis.values]
        if unknown or axis.name in fixed:
            message = f"{axis.name} is given twice" if not unknown else f"{axis.name} is never {unknown[0] or 'empty'}"
            problems.append(
                Problem(text, message, f"Allowed: {', '.join(axis.values)}; several with commas between them.")
            )
            continue
        fixed[axis.name] = tuple(value for value in axis.values if value in values)
    if problems:
        raise RecipeError(problems)
    return fixed


def _value(axis: Axis, text: str) -> str:
    if MANY in axis.values and text.isdigit():
        return "1" if text == "1" else MANY if int(text) > 1 else text
    if axis.name == "generation" and text.isdigit():
        return "on" if int(text) else "off"
    return text if text in axis.values else _OTHER_VALUES.get(text.lower(), text.lower())


def page(fixed: Open) -> str:
    """What works of the combinations that `fixed` leaves open, and why the others do not."""
    working, total = count(fixed)
    shown = " ".join(f"{axis}={','.join(values)}" for axis, values in fixed.items())
    lines = [f"{shown or 'all choices'}: {working:,} of {total:,} combinations work", ""]
    rules = rules_within(fixed)
    numbers = {rule.name: number for number, rule in enumerate(rules, 1)}
    lines += _choice_lines(fixed, numbers)
    if rules:
        lines += ["", "refused"]
    for rule in rules:
        lines += [f"{numbers[rule.name]:>4}  {when_text(rule)}", *(f"      {text}" for text in _below(rule, fixed))]
    held = [rule for rule in CAUTIONS if _within(rule, fixed)]
    if held:
        lines += ["", "works with a warning"]
        for rule in held:
            lines += [f"      {when_text(rule)}", f"      {_reason(rule)}"]
    return "\n".join([*lines, "", *_run_lines(fixed)])


def _choice_lines(fixed: Open, numbers: Mapping[str, int]) -> list[str]:
    lines = []
    for name, values in every_value(fixed).items():
        for i, value in enumerate(values):
            working, _ = count({**fixed, name: (value,)})
            within = [rule for rule in rules_within({**fixed, name: (value,)}) if name in rule.when]
            which = ", ".join(str(numbers[rule.name]) for rule in within)
            verdict = "refused" if not working else "works, not with everything" if which else "works"
            lines.append(f"{name if i == 0 else '':<13} {value:<15} {verdict}{f': see {which}' if which else ''}")
    return lines


def rules_within(fixed: Open) -> list[Rule]:
    """The refusals that may hold for something that `fixed` leaves open."""
    return [rule for rule in RULES if _within(rule, fixed)]


def _within(rule: Rule, fixed: Open) -> bool:
    values = every_value(fixed)
    return all(set(values[axis]) & set(wanted) for axis, wanted in rule.when.items())


def when_text(rule: Rule) -> str:
    """ "offload=parameters zero=0,1,2", and what numbers decide."""
    parts = [f"{axis}={','.join(values)}" for axis, values in rule.when.items()]
    if rule.condition:
        parts.append(f"where {rule.condition}")
    return " ".join(parts)


def _below(rule: Rule, fixed: Open) -> list[str]:
    lines = [_reason(rule)]
    found = nearest_within(rule, fixed)
    if found:
        lines.append(f"nearest that works: {', or '.join(_change_text(change) for change in found[:3])}")
    lines += _hint(rule).splitlines()
    if not rule.tried:
        lines.append("not seen to fail: nobody has seen it work")
    return [*lines, *(f"source: {source.where}" for source in rule.sources)]


def _hint(rule: Rule) -> str:
    """What else to do; "" where the nearest combination says it all."""
    return "" if "attention" in rule.when else rule.hint.format(limit="L")


def _reason(rule: Rule) -> str:
    """The reason without the values of one run."""
    numbers = {"length": "N", "limit": "L", "accumulate": "several"}
    values = {axis: " or ".join(wanted) for axis, wanted in rule.when.items()}
    return rule.reason.format(**{**values, **numbers})


def nearest_within(rule: Rule, fixed: Open) -> list[dict[str, str]]:
    """The smallest changes that end this refusal, beside what `fixed` decides."""
    decided = {axis: values[0] for axis, values in fixed.items() if len(values) == 1}
    values = every_value(fixed)
    named = {axis: [v for v in wanted if v in values[axis]][-1] for axis, wanted in rule.when.items()}
    return nearest({**decided, **named}, applied(rule)) if named else []


def _change_text(change: Mapping[str, str]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in change.items())


def _run_lines(fixed: Open) -> list[str]:
    lines = ["what shows it"]
    cpu = _narrowed(fixed, ON_CPU)
    if cpu is not None and (working := count(cpu)[0]):
        lines.append(f"      cpu without compile: two steps of each of the {working:,} that work, by `make matrix`")
        lines.append("      and by `make test` of so many that every two values that go together meet")
    for trial in TRIALS:
        if all(value in every_value(fixed)[axis] for axis, value in trial.choice.items()):
            lines.append(f"      cuda: on {trial.where}: {_change_text(trial.choice)}")
    return [*lines, f"      {'nothing else' if lines[1:] else 'none of these'} has been run here"]


def _narrowed(fixed: Open, more: Open) -> Open | None:
    """Both together; None when nothing is left."""
    both = {axis: [v for v in values if v in more.get(axis, values)] for axis, values in every_value(fixed).items()}
    return both if all(both.values()) else None


def as_json(fixed: Open) -> dict[str, Any]:
    """The same for programs; `cells` is null where there are more than MAX_CELLS."""
    working, total = count(fixed)
    return {
        "choices": {name: list(values) for name, values in every_value(fixed).items()},
        "combinations": total,
        "working": working,
        "rules": [_rule_json(rule, fixed) for rule in rules_within(fixed)],
        "cautions": [_rule_json(rule, fixed) for rule in CAUTIONS if _within(rule, fixed)],
        "cells": [_cell_json(cell) for cell in cells(fixed)] if total <= MAX_CELLS else None,
    }


def _rule_json(rule: Rule, fixed: Open) -> dict[str, Any]:
    return {
        "name": rule.name,
        "when": {axis: list(values) for axis, values in rule.when.items()},
        "condition": rule.condition,
        "key": rule.key,
        "reason": _reason(rule),
        "sources": [source.where for source in rule.sources],
        "hint": rule.hint,
        "tried": rule.tried,
        "nearest": nearest_within(rule, fixed),
    }


def _cell_json(cell: dict[str, str]) -> dict[str, Any]:
    refused = [rule.name for rule in RULES if not rule.condition and holds(rule, cell)]
    found = nearest(cell) if refused else []
    return {
        **cell,
        "works": not refused,
        "refused_by": refused,
        "nearest": found[:1],
        "run": "" if refused else run_by(cell),
    }


_HEAD = """# Compatibility

What can be combined with what, why not, and what works in its place. This page is generated from
`launcher/compatibility_table.py` by `python -m launcher.recipe_docs`; the checker and the planner refuse by the same table.

```
launch explain compatibility                          # all of it
launch explain compatibility method=qlora zero=3      # what that leaves open
launch explain compatibility method=full device=cuda zero=2,3 --json
```

A choice is written as below or with its recipe key (`parallel.zero=3`). What is refused in a recipe is told with file and line, the
reason, its source and the YAML lines that change least. How the numbers follow from each other: [parallelism.md](parallelism.md).

"""


def document() -> str:
    """docs/compatibility.md."""
    working, total = count({})
    parts = [
        _HEAD,
        "## Choices\n\n",
        _table(["choice", "values", "recipe key", "meaning"], map(_axis_row, AXES.values())),
    ]
    parts.append(f"{working:,} of the {total:,} combinations of these values work.\n\n## What is refused\n\n")
    parts.append(
        "What stands in no line works. *where ...*: numbers of the recipe, the model or the machine decide as well.\n\n"
    )
    parts.append(_table(["refused", "reason", "nearest that works", "source"], map(_rule_row, RULES)))
    parts.append("## What works with a warning\n\n")
    parts.append(
        _table(["combination", "warning", "source"], ([when_text(r), _reason(r), _sources(r)] for r in CAUTIONS))
    )
    parts.append("## ZeRO stage, offload and dtype\n\nFor softmax attention without samples and `train.compile`:\n\n")
    parts.append(_table(["device", "method", *_GRID[:2], "fp32", "bf16", "fp16", "run"], _grid_rows()))
    return "".join([*parts, *_evidence()])


def _axis_row(axis: Axis) -> list[str]:
    values = ", ".join(f"`{value}`" for value in axis.values)
    return [f"`{axis.name}`", values, f"`{axis.key}`" if axis.key else "", axis.meaning]


def _rule_row(rule: Rule) -> list[str]:
    found = nearest_within(rule, {})
    near = ", or ".join(f"`{_change_text(change)}`" for change in found[:3])
    hint = ". ".join(text for text in (near, _hint(rule)) if text)
    reason = _reason(rule) + ("" if rule.tried else " (not seen to fail: nobody has seen it work)")
    return [f"`{when_text(rule)}`" if not rule.condition else when_text(rule), reason, hint, _sources(rule)]


def _sources(rule: Rule) -> str:
    return "; ".join(f"<{s.where}>" if "://" in s.where else f"`{s.where}`" for s in rule.sources)


def _grid_rows() -> Iterable[list[str]]:
    for device in AXES["device"].values:
        for method in AXES["method"].values:
            for zero in AXES["zero"].values:
                for offload in AXES["offload"].values:
                    chosen = {"device": device, "method": method, "zero": zero, "offload": offload}
                    row = ["yes" if works({**chosen, "dtype": dtype}) else "no" for dtype in AXES["dtype"].values]
                    if "yes" in row:
                        yield [*chosen.values(), *row, _grid_run(chosen)]


def _grid_run(chosen: Mapping[str, str]) -> str:
    if chosen["device"] == "cpu":
        return "`make matrix`"
    seen = [t for t in TRIALS if all(t.choice[axis] == value for axis, value in chosen.items())]
    return "; ".join(f"{t.choice['dtype']} on {t.where}" for t in seen) or "not run here"


def _evidence() -> list[str]:
    working = count(ON_CPU)[0]
    lines = [
        "Rows of which no number format works are left out.\n\n## What shows it\n\n",
        f"* On CPU processes: every one of the {working:,} combinations that work, without `train.compile`, for two steps on a random\n"
        "  two-layer model, its losses compared with one plain process's (`make matrix`); `make test` runs so many of them that\n"
        "  every two values that go together meet at least once.\n",
    ]
    lines += [f"* On CUDA: `{_change_text(trial.choice)}`, on {trial.where}.\n" for trial in TRIALS]
    rest = "* Nothing else has been run here: what the table does not refuse of CUDA and `train.compile` follows from the sources alone.\n"
    return [*lines, rest]


def _table(head: list[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "".join(f"| {' | '.join(text.replace('|', '/').replace(chr(10), ' ') for text in line)} |\n" for line in lines)
        + "\n"
    )
