"""Every method x ZeRO stage x dtype, with sequence parallelism and offload: trains, saves, resumes and consolidates.

What must hold is asserted by the check_* functions of support.matrix, which `make matrix` uses too.
The tiny Qwen2-shaped model; `make matrix` does the same with a real one. Rows are packed and unevenly supervised.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import losses
from support.many_runs import TINY, carry_out
from support.matrix import (
    Cell,
    check_consolidated,
    check_losses,
    check_resumed,
    hand_over,
    plan_cell,
    resumable,
    write_rows,
)

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Relative, of every step's loss. bf16 has 8 bits: sums in another order change its weights in the last one."""
METHODS = ("full", "lora", "qlora")
CELLS = (
    *(Cell(m, z, d) for m in METHODS for z in range(4) for d in ("fp32", "bf16")),
    *(Cell(m, z, "fp32", sp=2) for m in METHODS for z in (1, 2, 3)),
    *(Cell(m, z, "fp32", offload="optimizer") for m, z in (("full", 1), ("full", 2), ("lora", 3))),
    *(Cell(m, 3, "fp32", offload="parameters") for m in ("full", "lora")),
)
CHANGES = (
    (Cell("full", 2, "fp32"), Cell("full", 3, "fp32", sp=2)),
    (Cell("lora", 3, "fp32", sp=2), Cell("lora", 0, "fp32")),
    (Cell("qlora", 1, "fp32"), Cell("qlora", 3, "fp32", sp=2)),
)
REFERENCES = tuple(dict.fromkeys(c.reference for c in CELLS))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A run of every cell, and of every one of two processes a second that was resumed from step 3."""
    folder = tmp_path_factory.mktemp("matrix")
    write_rows(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        runs = {cell: plan_cell(folder, cell, TINY, 126, 5e-3) for cell in (*REFERENCES, *CELLS)}
    carry_out(folder, 1, [{"plan": str(runs[c] / "plan.json")} for c in REFERENCES])
    carry_out(folder, 2, [{"plan": str(runs[c] / "plan.json")} for c in CELLS])
    copies = [resumable(runs[c]) for c in CELLS]
    (folder / "changed").mkdir()
    write_rows(folder / "changed")
    for before, after in CHANGES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
            copies.append(plan_cell(folder / "changed", after, TINY, 126, 5e-3))
        hand_over(runs[before], copies[-1])
    carry_out(folder, 2, [{"plan": str(c / "plan.json"), "attempt": 2} for c in copies])
    return folder


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_losses_equal_those_of_one_whole_process(matrix: Path, cell: Cell) -> None:
    check_losses(matrix, cell, TOLERANCE[cell.dtype])


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(matrix: Path, cell: Cell) -> None:
    check_resumed(matrix, cell)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_its_checkpoint_becomes_a_whole_adapter_or_model(matrix: Path, cell: Cell) -> None:
    check_consolidated(matrix, cell)


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=lambda c: c.name)
def test_a_run_resumed_in_another_layout_repeats_and_skips_no_row(matrix: Path, before: Cell, after: Cell) -> None:
    straight, resumed = losses(matrix / before.name), losses(matrix / "changed" / after.name)
    assert sorted(resumed) == [4, 5]
    for step, loss in resumed.items():
        assert loss == pytest.approx(straight[step], rel=1e-5), f"step {step}"
