"""What a run left behind -> seconds, tokens and losses of its optimizer steps. Pure but for reading the files."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SKIPPED_STEPS = 3
"""Steps left out of the timing: the first ones build kernels for shapes not met before. Short runs leave out one."""
SHORT_RUN = 6
LAST_STEPS = 3
"""Optimizer steps whose mean is the loss at the end."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all processes."""

    time: float
    """Unix time at its end."""
    tokens: int
    """Without padding."""
    supervised: int
    slots: int
    """Tokens and padding; 0 where the program does not tell."""
    loss: float | None


@dataclass(frozen=True)
class Trace:
    """A run's steps so far."""

    began: float | None
    """Unix time at which training began, after the model was loaded; None where the program does not tell."""
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Measured:
    """The figures of one run; JSON in results.json."""

    steps: int
    skipped_steps: int
    seconds_per_step: float
    """Median over the steps that were not skipped, from the end of one to the end of the next."""
    tokens_per_s: float
    supervised_per_s: float
    padding_share: float | None
    first_step_s: float
    """From the start of the command to the end of the first optimizer step."""
    train_begins_s: float | None
    first_loss: float | None
    last_loss: float | None
    """Mean over the last steps."""
    losses: tuple[float | None, ...]
    tokens_of_steps: tuple[int, ...]
    supervised_of_steps: tuple[int, ...]
    last_step_time: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file; a line that is being written is left out. A missing file has none."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_peer(path: Path) -> Trace:
    """The trace that hook/sitecustomize.py wrote."""
    lines = read_lines(path)
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "loss"}
    began = next((line["time"] for line in lines if line["event"] == "train_begin"), None)
    steps = tuple(
        Step(line["time"], line["tokens"], line["supervised"], line["slots"], losses.get(line["step"]))
        for line in lines
        if line["event"] == "step"
    )
    return Trace(began, steps)


def read_product(run_dir: Path) -> Trace:
    """metrics.jsonl and events.jsonl of a run folder of this project."""
    events = read_lines(run_dir / "events.jsonl")
    began = next((line["time"] for line in events if line["event"] == "train_started"), None)
    steps = tuple(
        Step(line["time"], line["tokens"], line["supervised_tokens"], 0, line["loss"])
        for line in read_lines(run_dir / "metrics.jsonl")
    )
    return Trace(began, steps)


def measure(trace: Trace, started: float) -> Measured | None:
    """Figures of the run whose command was started at Unix time `started`; None before its second step has ended."""
    steps = trace.steps
    if len(steps) < 2:
        return None
    skipped = SKIPPED_STEPS if len(steps) >= SHORT_RUN else 1
    durations = [after.time - before.time for before, after in zip(steps[skipped - 1 :], steps[skipped:], strict=False)]
    timed, total = steps[skipped:], sum(durations)
    slots = sum(step.slots for step in steps)
    known = [step.loss for step in steps if step.loss is not None]
    return Measured(
        steps=len(steps),
        skipped_steps=skipped,
        seconds_per_step=statistics.median(durations),
        tokens_per_s=sum(step.tokens for step in timed) / total,
        supervised_per_s=sum(step.supervised for step in timed) / total,
        padding_share=1 - sum(step.tokens for step in steps) / slots if slots else None,
        first_step_s=steps[0].time - started,
        train_begins_s=trace.began - started if trace.began is not None else None,
        first_loss=steps[0].loss,
        last_loss=statistics.fmean(known[-LAST_STEPS:]) if known else None,
        losses=tuple(step.loss for step in steps),
        tokens_of_steps=tuple(step.tokens for step in steps),
        supervised_of_steps=tuple(step.supervised for step in steps),
        last_step_time=steps[-1].time,
    )
