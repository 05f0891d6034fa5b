"""A recording of a few optimizer steps: a Chrome trace for a viewer, and one page of what they cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .disk import write_text, writing
from .engine import Ranks
from .progress import Step
from .spec import TrainSpec

TRACE, SUMMARY = "trace_rank_0.json.gz", "summary.md"
TOP = 10
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation", "aten::mkldnn_linear")
"""Operators that do nothing but a matrix product; what an operator calls counts as its own row."""


@dataclass(frozen=True)
class Cost:
    """One operator over all recorded steps, without the operators it calls."""

    name: str
    calls: int
    seconds: float


class StepProfiler:
    """Records the consecutive steps `spec.profile_steps` on rank 0 with torch.profiler; on other ranks it does nothing."""

    def __init__(self, spec: TrainSpec, ranks: Ranks, first_step: int, total_steps: int) -> None:
        self.spec, self.device = spec, ranks.device
        # A resumed run may have taken some of them already.
        self.wanted = [n for n in spec.profile_steps if first_step <= n <= total_steps] if ranks.rank == 0 else []
        if ranks.rank == 0 and len(self.wanted) < len(spec.profile_steps):
            left = sorted(set(spec.profile_steps) - set(self.wanted))
            print(f"not profiled: step {', '.join(map(str, left))}, of steps {first_step} to {total_steps}", flush=True)
        self.profile: Any = None
        self.steps: list[Step] = []

    def records(self, number: int) -> bool:
        """Whether the 1-based step `number` is recorded, and therefore slower."""
        return number in self.wanted

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the block if it is one of the steps."""
        if not self.records(number):
            yield
            return
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        if self.profile is None:
            self.profile = profile(activities=activities)
            self.profile.start()
        else:
            self.profile.toggle_collection_dynamic(True, activities)
        with record_function(f"optimizer step {number}"):
            yield
        # What lies between two steps, such as a checkpoint, is none of their cost.
        self.profile.toggle_collection_dynamic(False, activities)

    def stepped(self, number: int, step: Step, last: bool) -> None:
        """Take in what the step did; after the last one to record, or of the run, write the trace and the page."""
        if self.records(number):
            self.steps.append(step)
        if self.profile is not None and self.steps and (last or number == self.wanted[-1]):
            self.profile.stop()
            self._write()
            self.profile = None

    def _write(self) -> None:
        folder = Path(self.spec.paths.profile_dir)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.profile.export_chrome_trace(str(folder / TRACE))
        first = self.wanted[0]
        numbers = list(range(first, first + len(self.steps)))
        page = summary_page(self.spec, numbers, self.steps, costs_of(self.profile, self.device.type))
        write_text(folder / SUMMARY, page)
        print(f"profile of step {', '.join(map(str, numbers))}: {folder / SUMMARY}", flush=True)


def costs_of(recorded: Any, device_type: str) -> list[Cost]:
    """Own time of every operator, the most expensive first: seconds on the GPU where there is one, else on the CPU."""
    on_gpu = device_type == "cuda"
    costs = []
    for row in recorded.key_averages():
        # A kernel's time is also that of the operator which started it.
        if row.device_type.name != "CPU" or row.is_user_annotation:
            continue
        microseconds = row.self_device_time_total if on_gpu else row.self_cpu_time_total
        costs.append(Cost(row.key, row.count, microseconds / 1e6))
    return sorted(costs, key=lambda cost: -cost.seconds)


def summary_page(spec: TrainSpec, numbers: list[int], steps: list[Step], costs: list[Cost]) -> str:
    """summary.md: the wall time of the steps split by part, the top costs, the share of matrix products. Pure."""
    wall = sum(step.seconds for step in steps)
    parts: dict[str, float | None] = {}
    for step in steps:
        for name, seconds in step.seconds_parts.items():
            before = parts.get(name, 0.0)
            parts[name] = None if seconds is None or before is None else before + seconds
    counted = sum(cost.seconds for cost in costs)
    matmul = sum(cost.seconds for cost in costs if cost.name in MATMULS)
    tokens = sum(step.tokens for step in steps)
    rows = [(cost.name, f"{cost.calls:,}", cost.seconds) for cost in costs[:TOP]]
    where = "GPU" if spec.parallel.device == "cuda" else "CPU"
    lines = [
        f"# Profile of {'steps' if len(numbers) > 1 else 'step'} {_span(numbers)}",
        "",
        f"{spec.run_id}, rank 0 of {spec.parallel.world_size}, {spec.model.dtype}, torch {torch.__version__}",
        "",
        f"Wall time: {wall:.3f} s, {wall / len(steps):.3f} s a step, {tokens / wall:,.0f} tokens/s. "
        "Recording slows a step down: compare shares, not seconds, with other steps.",
        "",
        f"Matrix products: {matmul / wall:.0%} of the wall time. "
        f"Peak memory: {steps[-1].memory_gb:.2f} GB a process, recording included: it stays in memory_gb of later steps.",
        "",
        "## By part",
        "",
        "| part | seconds | share |",
        "|---|---:|---:|",
        *(f"| {name} | {_cells(seconds, wall)} |" for name, seconds in parts.items()),
        "",
        f"## Top {TOP} costs",
        "",
        f"Time on the {where} inside each operator, without the operators that it calls.",
        "",
        "| operator | calls | seconds | share |",
        "|---|---:|---:|---:|",
        *(f"| `{name}` | {calls} | {_cells(seconds, wall)} |" for name, calls, seconds in rows),
        f"| all others ({max(0, len(costs) - TOP)}) | | {_cells(counted - sum(r[2] for r in rows), wall)} |",
        f"| outside of operators: Python, waiting | | {_cells(wall - counted, wall)} |",
        "",
        "## The whole trace",
        "",
        f"Drag `{TRACE}` into https://ui.perfetto.dev (it stays in your browser), or load it in chrome://tracing.",
    ]
    return "\n".join(lines) + "\n"


def _cells(seconds: float | None, wall: float) -> str:
    return "not measured | " if seconds is None else f"{seconds:.3f} | {seconds / wall:.1%}"


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
