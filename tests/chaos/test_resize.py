"""A checkpoint taken up by more processes, by fewer, under another ZeRO stage, with another sequence parallelism.

The losses must be those of the run that was never interrupted and kept its size; no row is repeated or skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import losses
from support.many_runs import TINY, carry_out, planned
from support.matrix import hand_over, write_rows

RECIPE = """
model: {{source: "{source}", dtype: fp32}}
method: {{name: {method}{rank}}}
data: {{files: rows.jsonl, max_length: 126}}
train: {{max_steps: 6, micro_batch: 1, global_batch: 12, learning_rate: 5e-3, weight_decay: 0.1, schedule: linear}}
parallel: {{zero: {zero}, sp: {sp}}}
checkpoint: {{every_steps: 3, keep: 3}}
"""


@dataclass(frozen=True)
class Size:
    processes: int
    zero: int
    sp: int = 1
    method: str = "full"

    @property
    def name(self) -> str:
        return f"{self.method}-{self.processes}-zero{self.zero}-sp{self.sp}"


RESIZES = (
    (Size(2, 2), Size(1, 2)),
    (Size(1, 2), Size(2, 2)),
    (Size(2, 2), Size(4, 2)),
    (Size(3, 3), Size(2, 2)),
    (Size(2, 3), Size(2, 2)),
    (Size(2, 2), Size(2, 3)),
    (Size(2, 2, sp=2), Size(2, 2)),
    (Size(2, 3, sp=2), Size(1, 0)),
    (Size(2, 2, method="lora"), Size(4, 3, method="lora")),
    (Size(3, 3, method="qlora"), Size(1, 1, method="qlora")),
)


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """Every first size trained to the end, and every second one from its checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("resized")
    write_rows(folder, 30)
    before = list(dict.fromkeys(first for first, _ in RESIZES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        for size in before:
            _plan(folder, size, size.name)
        for first, second in RESIZES:
            _plan(folder, second, f"{first.name}_to_{second.name}")
    for processes in sorted({size.processes for size in before}):
        runs = [folder / size.name for size in before if size.processes == processes]
        carry_out(folder, processes, [{"plan": str(run / "plan.json")} for run in runs])
    for first, second in RESIZES:
        hand_over(folder / first.name, folder / f"{first.name}_to_{second.name}")
    for processes in sorted({second.processes for _, second in RESIZES}):
        runs = [folder / f"{a.name}_to_{b.name}" for a, b in RESIZES if b.processes == processes]
        carry_out(folder, processes, [{"plan": str(run / "plan.json"), "attempt": 2} for run in runs])
    return folder


def _plan(folder: Path, size: Size, name: str) -> None:
    rank = "" if size.method == "full" else ", rank: 4"
    text = RECIPE.format(source=TINY, method=size.method, rank=rank, zero=size.zero, sp=size.sp)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    planned(folder, f"{name}.yaml", name, size.processes)


@pytest.mark.parametrize(("first", "second"), RESIZES, ids=lambda size: size.name)
def test_training_goes_on_as_if_nothing_had_changed(resized: Path, first: Size, second: Size) -> None:
    straight = losses(resized / first.name)
    after = losses(resized / f"{first.name}_to_{second.name}")
    assert sorted(after) == [4, 5, 6]
    assert straight[6] < straight[1] - 0.1
    worst = max(abs(loss / straight[step] - 1) for step, loss in after.items())
    print(f"{first.name} -> {second.name}: {worst:.1e}")
    assert worst < 1e-5
