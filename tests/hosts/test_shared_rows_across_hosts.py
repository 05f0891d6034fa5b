"""Training over a network: ranks of two hosts share rows (sp) and shards (ZeRO), and compute what one process computes.

`make test-cluster`: the hosts are network namespaces, which need root. Traffic of every exchange really crosses between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hosts import Host, hosts
from support.many_runs import TINY, carry_out
from support.matrix import Cell, check_cell, plan_cell, resumable, write_rows

CELLS = (
    Cell("full", 2, "fp32", sp=2),
    Cell("full", 3, "fp32", sp=2),
    Cell("qlora", 3, "fp32", sp=2),
    # 4 heads on 4 ranks, two on each host; 2 key-value heads.
    Cell("lora", 1, "fp32", sp=4, processes=4),
    # Two groups of two, each on one host; gradients cross.
    Cell("full", 3, "fp32", sp=2, processes=4),
)


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[list[Host]]:
    with hosts(2) as found:
        yield found


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], two_hosts: list[Host]) -> Path:
    """A run of every cell over the two hosts, resumed there from step 3, and the one-process runs beside them."""
    folder = tmp_path_factory.mktemp("hosts")
    write_rows(folder)
    references = list(dict.fromkeys(cell.reference for cell in CELLS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        runs = {cell: plan_cell(folder, cell, TINY, 126, 5e-3) for cell in (*references, *CELLS)}
    carry_out(folder, 1, [{"plan": str(runs[cell] / "plan.json")} for cell in references])
    for processes in (2, 4):
        cells = [cell for cell in CELLS if cell.processes == processes]
        before = two_hosts[1].received_bytes()
        carry_out(folder, processes, [{"plan": str(runs[c] / "plan.json")} for c in cells], hosts=two_hosts)
        copies = [resumable(runs[c]) for c in cells]
        items = [{"plan": str(copy / "plan.json"), "attempt": 2} for copy in copies]
        carry_out(folder, processes, items, hosts=two_hosts)
        # The shards and slices of some hundred thousand weights, several times a step.
        assert two_hosts[1].received_bytes() - before > 10e6
    return folder


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_two_hosts_compute_what_one_process_does_and_resume_and_consolidate(matrix: Path, cell: Cell) -> None:
    # Its assertions are those of the tiny and the real matrix; here all traffic crosses a network.
    assert check_cell(matrix, cell, 1e-5) <= 1e-5
