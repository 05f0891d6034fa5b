"""The numbers of two probes side by side: which differ, by how much, and whether that is rounding. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ProbeResult = dict[str, Any]
"""probe.json as trainer/parallel_probe.py writes it."""


@dataclass(frozen=True)
class Tolerance:
    """Largest deviations |a - b| / max(|a|, |b|) that are rounding."""

    loss: float
    norm: float
    """Of the gradient norm."""
    gradient: float
    """Of one parameter's gradient, in L2."""
    reason: str


_ROUNDING = {"bf16": 2**-9, "fp16": 2**-12}
"""Half of the distance of neighbouring numbers, relative."""
_ROUNDINGS_PER_LAYER = 20


def tolerance_of(dtype: str, num_layers: int) -> Tolerance:
    """What rounding may make of two layouts.

    fp32: fixed, far above its rounding. In 16 bits a gradient is rounded some 20 times in each layer, by chance up or
    down, which adds up to sqrt(20 x layers) roundings; three times that is allowed, because AdamW's first updates follow
    the sign of an element, however small it is. Norm and loss average over elements. Largest seen in 3 steps of
    SmolLM2-135M (30 layers, bf16): loss 2e-3, norm 5e-3, gradient 7e-2, where 5e-3, 2e-2 and 1.4e-1 are allowed.
    """
    if dtype == "fp32":
        return Tolerance(1e-5, 1e-4, 1e-4, "fp32 rounds at 6e-8, and a sum in another order is other roundings")
    rounding = _ROUNDING[dtype]
    gradient = 3 * rounding * math.sqrt(_ROUNDINGS_PER_LAYER * num_layers)
    reason = f"it rounds at {rounding:.0e} in each of {num_layers} layers; fp32 tells more: --set model.dtype=fp32"
    return Tolerance(gradient / 30, gradient / 8, gradient, reason)


@dataclass(frozen=True)
class Side:
    """One layout and what its probe found."""

    dp: int
    sp: int
    zero: int
    offload: str
    micro_batch: int
    accumulate: int
    result: ProbeResult

    @property
    def text(self) -> str:
        """dp 2 x sp 1, ZeRO 2."""
        offload = "" if self.offload == "none" else f", {self.offload} offloaded"
        return f"dp {self.dp} x sp {self.sp}, ZeRO {self.zero}{offload}"


@dataclass(frozen=True)
class Deviation:
    """The largest deviation of one quantity over all steps."""

    name: str
    value: float | None
    """|a - b| / max(|a|, |b|); None where a number is not finite."""
    max_abs: float | None
    step: int
    """1-based; 0 when no step could be compared."""
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.value is not None and self.value <= self.tolerance


@dataclass(frozen=True)
class Comparison:
    """The plan's layout against one reference."""

    deviations: tuple[Deviation, ...]
    problems: tuple[str, ...]
    """Where the two did not even compute the same thing: other rows, other tokens, a step that only one took."""

    @property
    def equal(self) -> bool:
        return not self.problems and all(d.ok for d in self.deviations)


def compare(plan: Side, reference: Side, dtype: str) -> Comparison:
    """`reference.result` holds the differences of its gradients from the plan's."""
    tolerance = tolerance_of(dtype, plan.result["num_layers"])
    pairs = [
        (a, b)
        for a, b in zip(plan.result["steps"], reference.result["steps"], strict=False)
        if not a["skipped"] and not b["skipped"]
    ]
    rows = reference.result["differences"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    return Comparison(
        (
            _largest("loss", [_number("loss", a, b) for a, b in pairs], tolerance.loss),
            _largest("gradient norm", [_number("grad_norm", a, b) for a, b in pairs], tolerance.norm),
            *(_largest(name, [row for row in rows if row["name"] == name], tolerance.gradient) for name in names),
        ),
        (*_inputs(plan, reference), *_taken(plan, reference, pairs)),
    )


def _number(key: str, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The deviation of one number of a step, in the form in which the probe gives those of gradients."""
    x, y = a[key], b[key]
    if x is None or y is None:
        return {"step": a["step"], "relative": None, "max_abs": None}
    size = max(abs(x), abs(y))
    return {"step": a["step"], "relative": abs(x - y) / size if size else 0.0, "max_abs": abs(x - y)}


def _largest(name: str, rows: Sequence[dict[str, Any]], tolerance: float) -> Deviation:
    if not rows:
        return Deviation(name, None, None, 0, tolerance)
    worst = max(rows, key=lambda row: float("inf") if row["relative"] is None else row["relative"])
    return Deviation(name, worst["relative"], worst["max_abs"], worst["step"], tolerance)


def _taken(plan: Side, reference: Side, pairs: Sequence[object]) -> list[str]:
    ours, theirs = ([s["skipped"] for s in side.result["steps"]] for side in (plan, reference))
    problems = []
    if ours != theirs:
        problems.append(f"fp16's loss scale: the plan {_tried(ours)}, the other {_tried(theirs)}")
    if not pairs:
        problems.append("no step was taken by both, so nothing could be compared")
    return problems


def _tried(skipped: Sequence[bool]) -> str:
    which = ", ".join(str(i) for i, flag in enumerate(skipped, 1) if flag) or "none"
    return f"tried {len(skipped)} steps and skipped {which}"


def _inputs(plan: Side, reference: Side) -> list[str]:
    """Other rows, or tokens that were lost or read twice."""
    problems = []
    for a, b in zip(plan.result["steps"], reference.result["steps"], strict=False):
        where = f"step {a['step']}: "
        ours, theirs = (
            Counter(r for rank in s["rows"][:: side.sp] for r in rank) for s, side in ((a, plan), (b, reference))
        )
        if ours != theirs:
            problems.append(
                where + f"the rows differ: {_only(ours - theirs)} only in the plan, {_only(theirs - ours)} only there"
            )
        for side, step in ((plan, a), (reference, b)):
            problems += [where + problem for problem in _own_inputs(side, step)]
        # Rows are padded to a multiple of sp, and nothing else may differ.
        allowed = sum((side.sp - 1) * side.accumulate * side.dp for side in (plan, reference))
        if abs(a["positions"] - b["positions"]) > allowed:
            problems.append(
                where + f"the model read {a['positions']} positions in the plan's layout, {b['positions']} there"
            )
    return problems


def _own_inputs(side: Side, step: dict[str, Any]) -> list[str]:
    problems = []
    groups = [step["rows"][i : i + side.sp] for i in range(0, len(step["rows"]), side.sp)]
    if any(rank != group[0] for group in groups for rank in group):
        problems.append(f"{side.text}: ranks that should share a row read different ones")
    if step["supervised_seen"] != step["supervised_tokens"]:
        problems.append(
            f"{side.text}: {step['supervised_seen']} supervised tokens reached the model, the rows have {step['supervised_tokens']}"
        )
    return problems


def _only(rows: Counter[int]) -> str:
    return ", ".join(str(r) for r in sorted(rows.elements())[:8]) or "none"


def to_json(dtype: str, plan: Side, references: Sequence[tuple[Side, Comparison]], folder: str) -> dict[str, Any]:
    """What `--json` prints: every number of every step, and the largest deviations."""
    return {
        "equal": all(c.equal for _, c in references),
        "dtype": dtype,
        "tolerance": vars(tolerance_of(dtype, plan.result["num_layers"])),
        "folder": folder,
        "plan": _side_json(plan),
        "references": [
            {
                **_side_json(side),
                "equal": comparison.equal,
                "problems": list(comparison.problems),
                "largest": [{**vars(d), "ok": d.ok} for d in comparison.deviations],
                "gradient_differences": side.result["differences"],
            }
            for side, comparison in references
        ],
    }


def _side_json(side: Side) -> dict[str, Any]:
    layout = {key: value for key, value in vars(side).items() if key != "result"}
    kept = ("digest", "steps")
    return {"layout": layout, **{key: side.result[key] for key in kept}}
