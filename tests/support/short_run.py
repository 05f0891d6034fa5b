"""One short run, the same everywhere, and its losses on one backend beside those on another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from support.commands import FP32, losses

STEPS = 8
SHORT = (*FP32, "--set", f"train.max_steps={STEPS}", "--set", "checkpoint.every_steps=3")
RELATIVE = 1e-4
"""By so much losses may differ, relative to each other, at every step."""


def check_equal(run: Path, expected: Mapping[int, float]) -> None:
    """Every step's loss; prints the worst deviation."""
    got = losses(run)
    worst = max(abs(got[step] / loss - 1) for step, loss in expected.items())
    print(f"worst relative deviation in {run.name}: {worst:.1e}")
    assert got == pytest.approx(expected, rel=RELATIVE)


def loss_table(runs: Mapping[str, Path]) -> tuple[str, float]:
    """Steps down, runs across, and how far those of a step lie apart, relative to the smallest. Returns the largest of these too."""
    found = {name: losses(run) for name, run in runs.items()}
    steps = sorted(next(iter(found.values())))
    assert all(sorted(of) == steps for of in found.values()), {name: sorted(of) for name, of in found.items()}
    rows = [[of[step] for of in found.values()] for step in steps]
    spread = [max(row) / min(row) - 1 for row in rows]
    lines = ["step  " + "  ".join(f"{name:>12}" for name in found) + "    apart"]
    for step, row, apart in zip(steps, rows, spread, strict=True):
        lines.append(f"{step:>4}  " + "  ".join(f"{loss:>12.7f}" for loss in row) + f"  {apart:.1e}")
    return "\n".join(lines), max(spread)
