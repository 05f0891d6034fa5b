"""Two steps of combinations that the table says work on CPU: so many that every two values that go together meet.

`make matrix` takes two steps of every single one.
"""

from __future__ import annotations

import itertools

import pytest
from support.compatible_cells import Runs, all_cells, check, name_of, pairwise, run_cells

CELLS = pairwise(all_cells())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Runs:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        return run_cells(tmp_path_factory.mktemp("compatibility"), CELLS)


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_what_the_table_says_works_trains(runs: Runs, cell: dict[str, str]) -> None:
    """`check` asserts steps, losses, skipped steps and samples."""
    check(runs, cell)


def test_every_two_values_that_go_together_meet() -> None:
    def pairs(cells: list[dict[str, str]]) -> set[tuple[str, str, str, str]]:
        return {(a, cell[a], b, cell[b]) for cell in cells for a, b in itertools.combinations(cell, 2)}

    assert pairs(CELLS) == pairs(all_cells())
