"""One recipe in many layouts: the loss of each of 5 steps, the gradient's norm and chosen gradients are the same.

The supervised tokens are spread unevenly over ranks, micro batches and slices; rows are packed, or as they come.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.many_runs import REAL, TINY, carry_out, planned
from support.matrix import write_rows

STEPS = 5
RECIPE = """
model: {{source: "{source}", dtype: fp32}}
method: {{name: {method}{rank}}}
data: {{files: rows.jsonl, max_length: {length}, packing: {packing}}}
train: {{epochs: 9, micro_batch: {micro}, global_batch: {batch}, learning_rate: {rate}, weight_decay: 0.1, warmup_ratio: 0.0}}
parallel: {{zero: {zero}, sp: {sp}}}
"""


@dataclass(frozen=True)
class Layout:
    processes: int = 2
    zero: int = 1
    sp: int = 1
    micro: int = 1
    method: str = "full"
    packing: str = "true"
    source: str = TINY
    length: int = 126
    batch: int = 4

    @property
    def name(self) -> str:
        kind = "real" if self.source == REAL else "tiny"
        rows = "packed" if self.packing == "true" else "unpacked"
        return f"{kind}-{self.method}-{rows}-p{self.processes}-sp{self.sp}-zero{self.zero}-micro{self.micro}"

    @property
    def reference(self) -> Layout:
        """One process that takes one row after the other."""
        return Layout(1, 1, 1, 1, self.method, self.packing, self.source, self.length, self.batch)

    def plan(self, folder: Path) -> str:
        rank, rate = ("", 5e-3) if self.method == "full" else (", rank: 8", 1e-3)
        text = RECIPE.format(**vars(self), rank=rank, rate=rate)
        (folder / f"{self.name}.yaml").write_text(text, encoding="utf-8")
        return str(planned(folder, f"{self.name}.yaml", self.name, self.processes) / "plan.json")


LAYOUTS = (
    Layout(zero=1),
    Layout(zero=2, micro=2),
    Layout(zero=3),
    Layout(processes=1, zero=2, micro=4),
    Layout(zero=2, sp=2),
    Layout(zero=3, sp=2, micro=2),
    Layout(zero=2, packing="false", micro=2),
    Layout(zero=1, sp=2, packing="false"),
    # 9 heads, 3 of them key-value heads: three ranks can share a row, two cannot.
    Layout(processes=3, zero=2, sp=3, method="lora", source=REAL, length=96, batch=2),
)


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A folder with probe.json of each layout, its gradients compared with the reference's."""
    folder = tmp_path_factory.mktemp("layouts")
    write_rows(folder)
    references = list(dict.fromkeys(layout.reference for layout in LAYOUTS))
    work: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 3: []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        for layout in [*references, *LAYOUTS]:
            item = {"plan": layout.plan(folder), "probe": str(folder / f"{layout.name}-probe"), "steps": STEPS}
            if layout not in references:
                item["against"] = str(folder / f"{layout.reference.name}-probe")
            work[layout.processes].append(item)
    for processes, items in work.items():
        carry_out(folder, processes, items)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_computes_the_same(probes: Path, layout: Layout) -> None:
    def read(of: Layout) -> dict[str, Any]:
        return json.loads((probes / f"{of.name}-probe" / "probe.json").read_text(encoding="utf-8"))

    found, reference = read(layout), read(layout.reference)
    assert len(found["steps"]) == len(reference["steps"]) == STEPS
    for ours, theirs in zip(found["steps"], reference["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert {row["step"] for row in found["differences"]} == set(range(1, STEPS + 1))
    worst = max(row["relative"] for row in found["differences"])
    assert worst < 1e-4, worst
