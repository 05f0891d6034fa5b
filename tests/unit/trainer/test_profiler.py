"""What a recording leaves behind: a trace that a viewer opens, and one page."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
from support.handmade_run import make_spec

from trainer.engine import Ranks
from trainer.profiler import SUMMARY, TRACE, Cost, StepProfiler, summary_page
from trainer.progress import Step
from trainer.spec import TrainSpec

PARTS = {"data": 0.1, "forward": 0.5, "backward": 1.0, "optimizer": 0.2, "communication": 0.2}


def ranks(rank: int = 0) -> Ranks:
    return Ranks(rank, rank, 2, dp_rank=rank, sp_rank=0, device=torch.device("cpu"))


def step(**parts: float | None) -> Step:
    return Step(1.0, 100, 50, 1.0, False, None, False, 1.5, 2.0, {**PARTS, **parts})


@pytest.fixture
def spec(tmp_path: Path) -> TrainSpec:
    return dataclasses.replace(make_spec(tmp_path), profile_steps=(3, 4))


def train(profiler: StepProfiler, first: int, last: int) -> None:
    weight = torch.ones(64, 64)
    for number in range(first, last + 1):
        with profiler.step(number):
            (weight @ weight).sum()
        profiler.stepped(number, step(), last=number == last)
        weight.exp()  # what lies between two steps


def test_steps_leave_a_trace_and_a_page(spec: TrainSpec) -> None:
    train(StepProfiler(spec, ranks(), 1, 9), 1, 9)
    folder = Path(spec.paths.profile_dir)
    assert sorted(p.name for p in folder.iterdir()) == [SUMMARY, TRACE]
    events = json.loads(gzip.decompress((folder / TRACE).read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("aten::mm") == 2
    assert "aten::exp" not in names
    assert {n for n in names if str(n).startswith("optimizer step")} == {"optimizer step 3", "optimizer step 4"}
    page = (folder / SUMMARY).read_text(encoding="utf-8")
    assert page.startswith("# Profile of steps 3 to 4\n")
    assert "| `aten::mm` | 2 | " in page
    assert "optimizer step" not in page


def test_a_run_that_ends_early_leaves_what_it_has(spec: TrainSpec, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = StepProfiler(spec, ranks(), 1, 9)
    train(profiler, 1, 3)
    assert (Path(spec.paths.profile_dir) / SUMMARY).read_text(encoding="utf-8").startswith("# Profile of step 3\n")
    assert "profile of step 3: " in capsys.readouterr().out


def test_steps_that_will_not_come_are_said(spec: TrainSpec, capsys: pytest.CaptureFixture[str]) -> None:
    train(StepProfiler(spec, ranks(), 1, 3), 1, 3)
    assert "not profiled: step 4, of steps 1 to 3" in capsys.readouterr().out
    profiler = StepProfiler(spec, ranks(), 5, 9)
    train(profiler, 5, 9)
    assert "not profiled: step 3, 4, of steps 5 to 9" in capsys.readouterr().out
    assert not profiler.records(5)


def test_only_rank_0_records(spec: TrainSpec) -> None:
    train(StepProfiler(spec, ranks(1), 1, 9), 1, 9)
    assert not Path(spec.paths.profile_dir).exists()


def test_the_page_adds_up(spec: TrainSpec) -> None:
    costs = [Cost("aten::mm", 10, 2.0), Cost("aten::add", 7, 0.5), *(Cost(f"x{n}", 1, 0.05) for n in range(12))]
    page = summary_page(spec, [3, 4], [step(), step(communication=None)], costs)
    assert "Wall time: 4.000 s, 2.000 s a step, 50 tokens/s" in page
    assert "Matrix products: 50% of the wall time. Peak memory: 1.50 GB a process" in page
    assert "| backward | 2.000 | 50.0% |" in page
    assert "| communication | not measured |  |" in page
    assert "| `aten::mm` | 10 | 2.000 | 50.0% |" in page
    assert page.count("| `") == 10
    assert "| all others (4) | | 0.200 | 5.0% |" in page
    assert "| outside of operators: Python, waiting | | 0.900 | 22.5% |" in page
    assert "https://ui.perfetto.dev" in page
