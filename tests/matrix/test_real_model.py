"""The matrix of tests/distributed/test_matrix.py on a real model, SmolLM2-135M-Instruct: `make matrix`.

Each method x dtype is carried out, looked at and removed before the next: a full checkpoint has 1.6 GB.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.many_runs import REAL, carry_out
from support.matrix import Cell, check_cell, plan_cell, resumable, write_rows

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
HELD_OUT = "held_out_files: [held_out.jsonl]"
"""Many rows: in bf16 the loss of a single one is mostly rounding."""
RATE = {("full", "fp32"): 1e-6, ("full", "bf16"): 1e-5}
ADAPTER_RATE = 5e-5
"""Low: where a gradient is all but zero its sign decides Adam's step, and a high rate amplifies every rounding. But five
steps of a rate that is lower still change hardly any bf16 weight."""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_stage_trains_saves_resumes_and_consolidates(
    method: str, dtype: str, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [Cell(method, zero, dtype) for zero in range(4)]
    rate = RATE.get((method, dtype), ADAPTER_RATE)
    # As many rows as a step takes: every step sees the same ones, so that its loss can be compared with the first.
    write_rows(tmp_path, num_rows=4)
    write_rows(tmp_path, num_rows=40, name="held_out.jsonl")
    monkeypatch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
    reference = plan_cell(tmp_path, cells[0].reference, REAL, 64, rate, HELD_OUT)
    runs = [plan_cell(tmp_path, cell, REAL, 64, rate, HELD_OUT) for cell in cells]
    carry_out(tmp_path, 1, [{"plan": str(reference / "plan.json")}])
    shutil.rmtree(reference / "checkpoints")
    carry_out(tmp_path, 2, [{"plan": str(run / "plan.json")} for run in runs], timeout_s=1200)
    copies = [resumable(run) for run in runs]
    carry_out(tmp_path, 2, [{"plan": str(copy / "plan.json"), "attempt": 2} for copy in copies], timeout_s=1200)
    for cell in cells:
        # The assertions are in there; `make test` runs the same ones.
        worst = check_cell(tmp_path, cell, TOLERANCE[dtype])
        print(f"{cell.name}: worst deviation of a loss {worst:.1e}")
    shutil.rmtree(tmp_path)
