"""One cell of the matrix of combinations: its plan, its resumed copy, and what must be true of both."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from support.commands import held_out_losses, losses
from support.many_runs import planned

RECIPE = """
model: {{source: "{source}", dtype: {dtype}}}
method: {{name: {method}{rank}}}
data: {{files: rows.jsonl, max_length: {length}, {held_out}}}
train: {{max_steps: 5, micro_batch: 1, global_batch: 4, learning_rate: {rate}, weight_decay: 0.1, schedule: linear}}
parallel: {{zero: {zero}, sp: {sp}, offload: {offload}}}
checkpoint: {{every_steps: 3, keep: 3}}
evaluate: {{loss_every_steps: 3}}
"""


@dataclass(frozen=True)
class Cell:
    method: str
    zero: int
    dtype: str
    sp: int = 1
    offload: str = "none"
    processes: int = 2

    @property
    def name(self) -> str:
        return f"{self.method}-zero{self.zero}-{self.dtype}-sp{self.sp}-{self.offload}-{self.processes}"

    @property
    def reference(self) -> Cell:
        """The simplest layout: one process, everything whole."""
        return Cell(self.method, 0, self.dtype, processes=1)


def write_rows(folder: Path, num_rows: int = 22, name: str = "rows.jsonl") -> None:
    """Answers of very different lengths, so that a mean of means is far from the mean."""
    lines = [{"role": "assistant", "content": "a b " * (1 + 13 * (i % 4))} for i in range(num_rows)]
    rows = [{"messages": [{"role": "user", "content": "q" * (i % 5 + 1)}, line]} for i, line in enumerate(lines)]
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def plan_cell(folder: Path, cell: Cell, source: str, length: int, rate: float, held_out: str = "held_out: 0.2") -> Path:
    """Plan the cell and prepare its data; `rate` is the learning rate. Returns the run folder."""
    rank = "" if cell.method == "full" else ", rank: 4"
    text = RECIPE.format(**vars(cell), rank=rank, source=source, length=length, rate=rate, held_out=held_out)
    (folder / f"{cell.name}.yaml").write_text(text, encoding="utf-8")
    return planned(folder, f"{cell.name}.yaml", cell.name, cell.processes)


def resumable(run: Path) -> Path:
    """A copy of a finished run that has only its checkpoint of step 3."""
    copy = run.with_name(f"{run.name}-resumed")
    ignored = shutil.ignore_patterns("step_000005", "metrics.jsonl", "events.jsonl", "plan.json")
    # Linked: a full checkpoint of a real model has 1.6 GB, and nothing writes into a finished one.
    shutil.copytree(run, copy, ignore=ignored, copy_function=os.link)
    plan = (run / "plan.json").read_text(encoding="utf-8")
    (copy / "plan.json").write_text(plan.replace(f'{run}"', f'{copy}"').replace(f"{run}/", f"{copy}/"))
    return copy


def hand_over(run: Path, other: Path) -> None:
    """Give the checkpoint of step 3 to a planned run that has none."""
    step = Path("checkpoints") / "step_000003"
    shutil.copytree(run / step, other / step, copy_function=os.link)


def check_cell(folder: Path, cell: Cell, tolerance: float) -> float:
    """All that must hold of a cell. Returns the worst relative deviation of a step's loss."""
    worst = check_losses(folder, cell, tolerance)
    check_resumed(folder, cell)
    check_consolidated(folder, cell)
    return worst


def check_losses(folder: Path, cell: Cell, tolerance: float) -> float:
    """Returns the worst relative deviation of a step's loss from the simplest layout's."""
    got, expected = losses(folder / cell.name), losses(folder / cell.reference.name)
    assert sorted(got) == [1, 2, 3, 4, 5]
    assert expected[5] < expected[1] - 0.05
    for step, loss in expected.items():
        assert got[step] == pytest.approx(loss, rel=tolerance), f"{cell.name}, step {step}"
    held_out, expected_held_out = (held_out_losses(folder / c.name) for c in (cell, cell.reference))
    assert sorted(held_out) == [0, 3, 5]
    for step, loss in expected_held_out.items():
        assert held_out[step] == pytest.approx(loss, rel=tolerance), f"{cell.name}, held-out rows, step {step}"
    return max(abs(got[step] / loss - 1) for step, loss in expected.items())


def check_resumed(folder: Path, cell: Cell) -> None:
    """A resumed run goes on as if it had never stopped: the same losses, bit for bit."""
    straight, resumed = losses(folder / cell.name), losses(folder / f"{cell.name}-resumed")
    assert resumed == {step: straight[step] for step in (4, 5)}
    straight, resumed = held_out_losses(folder / cell.name), held_out_losses(folder / f"{cell.name}-resumed")
    # That of the checkpoint is taken again: a run that was stopped while saving it has not taken it yet.
    assert resumed == {step: straight[step] for step in (3, 5)}


def check_consolidated(folder: Path, cell: Cell) -> None:
    """The checkpoint becomes an adapter or a model in which no tensor is empty."""
    from trainer import consolidate
    from trainer.spec import Prepared

    run, out = folder / cell.name, folder / f"{cell.name}-out"
    base = Prepared.read(str(run / "prepared.json")).model_dir
    parser = argparse.ArgumentParser()
    consolidate.add_arguments(parser)
    flags = ["--source", str(run / "checkpoints"), "--base", base, "--out", str(out), "--dtype", "fp32"]
    consolidate.run(parser.parse_args(flags))
    weights = out / ("model.safetensors" if cell.method == "full" else "adapter_model.safetensors")
    manifest = json.loads((run / "checkpoints" / "step_000005" / "manifest.json").read_text(encoding="utf-8"))
    with safe_open(str(weights), "pt") as tensors:
        shapes = [tuple(tensors.get_tensor(name).shape) for name in tensors.keys()]  # noqa: SIM118  # not a mapping
    assert shapes
    assert all(min(shape) > 0 for shape in shapes)
    if cell.method != "full":
        assert len(shapes) == len(manifest["parameters"])
