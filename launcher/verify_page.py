"""The table of `launch verify parallel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .verify_compare import Comparison, Deviation, Side, tolerance_of

_GREEN, _RED, _PLAIN = "\033[32m", "\033[31m", "\033[0m"


def page(dtype: str, plan: Side, references: Sequence[tuple[Side, Comparison]], color: bool) -> str:
    """Values of every step by layout; then how far each reference is from the plan; then what that means."""
    tolerance = tolerance_of(dtype, plan.result["num_layers"])
    sides = [plan, *(side for side, _ in references)]
    heads = ["plan", *_numbered(references)]
    lines = [*_aligned([["", *heads], *_layout_rows(sides), *_value_rows(sides)]), ""]
    table = [["largest deviation from the plan", "allowed", *heads[1:]]]
    for i, first in enumerate(references[0][1].deviations):
        cells = [_cell(c.deviations[i]) for _, c in references]
        table.append([f"  {_short(first.name)}", f"{first.tolerance:.1e}", *cells])
    lines += [_colored(line, color) for line in _aligned(table)]
    lines += [f"  allowed for {dtype}: {tolerance.reason}", ""]
    for head, (side, comparison) in zip(heads[1:], references, strict=True):
        verdict = "ok" if comparison.equal else "DIFFERS"
        lines.append(_colored(f"{head}: {side.text}: {verdict}", color))
        lines += [f"  {problem}" for problem in comparison.problems]
    return "\n".join(lines)


def _numbered(references: Sequence[object]) -> list[str]:
    return ["reference"] if len(references) == 1 else [f"reference {i}" for i in range(1, len(references) + 1)]


def _layout_rows(sides: Sequence[Side]) -> list[list[str]]:
    return [
        ["layout", *(s.text for s in sides)],
        ["rows a step", *(f"micro {s.micro_batch} x accumulate {s.accumulate} x dp {s.dp}" for s in sides)],
    ]


def _value_rows(sides: Sequence[Side]) -> list[list[str]]:
    rows = []
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        for i in range(max(len(s.result["steps"]) for s in sides)):
            rows.append([f"{name}, step {i + 1}", *(_value(s.result["steps"][i : i + 1], key) for s in sides)])
    return rows


def _value(steps: Sequence[dict[str, Any]], key: str) -> str:
    """One number of a step, if it was tried: fp16 tries more where it skips some."""
    if not steps:
        return "not tried"
    number = steps[0][key]
    return "skipped" if steps[0]["skipped"] else "not finite" if number is None else f"{number:.7g}"


def _cell(deviation: Deviation) -> str:
    verdict = "ok" if deviation.ok else "DIFFERS"
    if deviation.step == 0:
        return f"not compared {verdict}"
    if deviation.value is None:
        return f"not finite (step {deviation.step}) {verdict}"
    return f"{deviation.value:.1e} (step {deviation.step}, {deviation.max_abs:.1e} absolute) {verdict}"


def _short(name: str) -> str:
    """A parameter's name without what is the same in all of them."""
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _colored(line: str, color: bool) -> str:
    if not color:
        return line
    for word, code in (("DIFFERS", _RED), ("ok", _GREEN)):
        line = " ".join(f"{code}{part}{_PLAIN}" if part == word else part for part in line.split(" "))
    return line
