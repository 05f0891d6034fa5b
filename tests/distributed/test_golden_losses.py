"""The loss of every step of three short trainings, as it was when the file was last written.

A change of data order, initialisation, scheduling or numerics shows here, whatever the other tests compare it with.
`pytest tests/distributed/test_golden_losses.py --update-golden` writes the files of the devices that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.commands import ROOT, losses
from support.many_runs import REAL, TINY, carry_out, planned

GOLDEN = ROOT / "tests" / "golden"
DATA = ROOT / "recipes" / "data" / "identity_en.jsonl"
STEPS = 20
TOLERANCE = 5e-4
"""Relative. Other processors add in another order; 20 steps let 1e-7 grow to a few 1e-5."""
RECIPE = """
model: {{source: "{source}", dtype: fp32}}
method: {{name: {method}{rank}}}
data: {{files: {data}, max_length: {length}, packing: {packing}}}
train: {{max_steps: {steps}, micro_batch: {micro}, accumulate: {accumulate}, learning_rate: {rate}, seed: 7}}
parallel: {{zero: 2}}
checkpoint: {{every_steps: 0}}
"""
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclass(frozen=True)
class Training:
    source: str
    method: str
    rate: float
    length: int
    packing: str = "true"
    micro: int = 1
    accumulate: int = 2

    def text(self) -> str:
        rank = "" if self.method == "full" else ", rank: 8"
        return RECIPE.format(**vars(self), rank=rank, data=DATA, steps=STEPS)


TRAININGS = {
    "smollm2_lora": Training(REAL, "lora", 1e-3, 160, accumulate=1),
    "tiny_full": Training(TINY, "full", 2e-3, 256),
    "tiny_qlora_unpacked": Training(TINY, "qlora", 5e-3, 256, "false", 4),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        for device in DEVICES:
            items = []
            for name, training in TRAININGS.items():
                (folder / f"{name}.yaml").write_text(training.text(), encoding="utf-8")
                run = planned(folder, f"{name}.yaml", f"{name}_{device}", 1 if device == "cpu" else None)
                items.append({"plan": str(run / "plan.json")})
            carry_out(folder, 1, items, on_gpu=device == "cuda")
    return folder


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRAININGS)
def test_losses_are_those_of_the_golden_file(
    runs: Path, request: pytest.FixtureRequest, name: str, device: str
) -> None:
    path = GOLDEN / f"loss_{name}_{device}.txt"
    got = losses(runs / f"{name}_{device}")
    assert sorted(got) == list(range(1, STEPS + 1))
    if request.config.getoption("--update-golden"):
        head = TRAININGS[name].text().strip().replace(str(ROOT), ".")
        lines = [f"# {line}" for line in head.splitlines()] + [f"{step} {loss:.6f}" for step, loss in got.items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not path.is_file():
        # Only a device for which nobody has written the file yet: the CPU's files are in the repository.
        assert device != "cpu"
        pytest.xfail(f"{path.name} has not been written yet: --update-golden, on a machine with a {device} device")
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    for step, loss in rows:
        assert got[int(step)] == pytest.approx(float(loss), rel=TOLERANCE), f"step {step}"
    assert len(rows) == STEPS
