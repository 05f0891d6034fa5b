"""Two steps of every combination that the compatibility table says works on CPU processes: `make matrix`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.compatible_cells import all_cells, check, name_of, run_cells


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_combination_that_works_on_cpu_takes_two_steps(
    method: str, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
    cells = [cell for cell in all_cells() if cell["method"] == method]
    runs = run_cells(tmp_path, cells)
    failed = []
    for cell in cells:
        try:
            check(runs, cell)
        except AssertionError as e:
            failed.append(f"{name_of(cell)}: {e}")
    print(f"{method}: {len(cells)} combinations, {len(failed)} failed")
    assert not failed, "\n".join(failed)
