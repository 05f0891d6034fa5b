"""What an accident on one of several machines came to: measured from what the run left on disk, and told as a page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.run_dir import RunDir
from launcher.status import Attempt, read_status
from support.machines import started_at

EVERY = 5
"""Steps between two checkpoints."""
PARTS = ("noticed", "wait", "start", "load", "first step")


@dataclass
class Seen:
    """One accident. Times in seconds from the accident, or from the command where nothing was running yet."""

    accident: str
    backend: str
    state: str
    """What became of the run, as `launch runs show` says it."""
    cause: str
    """The first cause, in one line."""
    noticed_s: float | None = None
    lost_steps: int | None = None
    """Done again, or not done after the newest checkpoint."""
    new_step_s: float | None = None
    """Until the first new step was done; None where the run ended."""
    parts: dict[str, float] = field(default_factory=dict)
    """That by `PARTS`: until it was noticed, until the next attempt began, until its first rank's process did, until the model and
    the checkpoint were loaded, until the step was done. Empty where no other attempt followed."""
    begin: dict[str, float] = field(default_factory=dict)
    """From a submission to its first step, by `submitted.START_PARTS`."""
    left: int = 0
    """Processes of the run on any host afterwards."""
    gone_s: float | None = None
    """From the end of the launcher until no process was left."""


def rows_of(path: Path) -> list[dict]:
    """The lines of a file of JSON objects; a last line that is just being written is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def last_step(run: Path, attempt: int | None = None) -> int:
    """Of one attempt, or of all; 0 before there is one."""
    steps = [row["step"] for row in rows_of(run / "metrics.jsonl") if attempt in (None, row["attempt"])]
    return max(steps, default=0)


def recovery(run: Path, number: int, since: float, noticed: float) -> dict[str, float]:
    """The parts of the time from the accident to the first new step, which attempt `number` did."""
    attempt = next(a for a in read_status(RunDir(run)).attempts if a.number == number)
    beat = json.loads((run / "logs" / f"attempt_{number}" / "train" / "heartbeat_rank_0.json").read_text())
    began = next(e for e in rows_of(run / "events.jsonl") if e["event"] == "train_started" and e["attempt"] == number)
    first = next(row for row in rows_of(run / "metrics.jsonl") if row["attempt"] == number)
    marks = (since, noticed, attempt.started, started_at(beat["pid_start"]), began["time"], first["time"])
    return {part: round(b - a, 2) for part, (a, b) in zip(PARTS, itertools.pairwise(marks), strict=True)}


def of_attempts(accident: str, backend: str, run: Path, since: float) -> Seen:
    """What the first attempt's end, and the last attempt's beginning, say of the accident at `since` (Unix seconds)."""
    status = read_status(RunDir(run))
    first, last = status.attempts[0], status.attempts[-1]
    assert first.ended is not None
    seen = Seen(accident, backend, status.shown_state, first.message, round(first.ended - since, 2))
    seen.lost_steps = lost(run, first)
    if last is not first and last_step(run, last.number):
        seen.parts = recovery(run, last.number, since, first.ended)
        seen.new_step_s = round(sum(seen.parts.values()), 2)
    return seen


def lost(run: Path, ended: Attempt) -> int:
    """Steps that the attempt had done beyond the checkpoint from which the next one went on, or could go on."""
    kept = [int(p.parent.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*/manifest.json")]
    after = [row["step"] for row in rows_of(run / "metrics.jsonl") if row["attempt"] > ended.number]
    base = min(after) - 1 if after else max(kept, default=0)
    return last_step(run, ended.number) - base


@dataclass
class Book:
    """Every accident seen, kept as lines of JSON so that a page can be put together from several commands."""

    path: Path

    def add(self, seen: Seen) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(dataclasses.asdict(seen)) + "\n")
        print(f"\n{seen}")

    def all(self) -> list[Seen]:
        return [Seen(**row) for row in rows_of(self.path)]


def page(found: Sequence[Seen], cells: Sequence[tuple[str, str]]) -> str:
    """docs/chaos_hosts.md. `cells`: every (accident, backend) that belongs on it, in order."""
    lines = [
        "# Accidents on several machines",
        "",
        "Written by `make chaos`. torchrun: two processes on one host. ssh, ray: two hosts with one process each, network namespaces of one",
        "machine with a real sshd, or a real Ray that asks for a token; one thread a process. A checkpoint every "
        f"{EVERY} steps, `retry.wait_s` 1;",
        "where a cable is out for good `cluster.silence_s` 20, and no retry. Times in seconds, of several rounds the smallest and the largest.",
        "Every loss of every attempt equalled, to 1e-4, that of a run without an accident.",
        "",
        "| accident | backend | rounds | what became of it | noticed after | steps lost | first new step after | processes left |",
        "|---|---|---|---|---|---|---|---|",
    ]
    causes, parts = [], []
    for accident, backend in cells:
        rounds = [s for s in found if (s.accident, s.backend) == (accident, backend)]
        lines.append(f"| {accident} | {backend} | " + (_row(rounds) if rounds else "0 | not run |  |  |  |  |"))
        texts = dict.fromkeys(s.cause.replace("|", "\\|") for s in rounds if s.cause)
        causes += [f"| {accident} | {backend} | {text} |" for text in texts]
        if any(s.parts for s in rounds):
            parts.append(f"| {accident} | {backend} | " + " | ".join(_part(rounds, name) for name in PARTS) + " |")
    lines += [
        "",
        "## First causes, as they are shown",
        "",
        "| accident | backend | first cause |",
        "|---|---|---|",
        *causes,
    ]
    lines += ["", "## From the accident to the first new step, by part", ""]
    lines += [
        "Of several rounds the mean. `start`: from the beginning of the attempt to the process of the first rank. `load`: Python's",
        "imports, the model, the checkpoint.",
    ]
    lines += ["", "| accident | backend | " + " | ".join(PARTS) + " |", "|---|---|" + "---|" * len(PARTS), *parts]
    lines += _submissions([s.begin for s in found if s.begin])
    return "\n".join(lines) + "\n"


def _submissions(rounds: Sequence[dict[str, float]]) -> list[str]:
    """From `launch submit` to the first step of a run on two nodes."""
    if not rounds:
        return []
    names, total = list(rounds[0]), [sum(parts.values()) for parts in rounds]
    means = [f"{sum(parts[name] for parts in rounds) / len(rounds):.1f}" for name in names]
    return [
        "",
        "## From `launch submit` to the first step",
        "",
        f"A third host submits a run of two nodes: {_range(total)} s. `submit`: until the command returns. `Ray`: until the job's process",
        "begins. `plan`: until the first stage does. The stage `train` is a Ray Train run. Of several rounds the mean.",
        "",
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
        "| " + " | ".join(means) + " |",
    ]


def _row(rounds: Sequence[Seen]) -> str:
    states = " / ".join(dict.fromkeys(s.state for s in rounds))
    gone = [s.gone_s for s in rounds if s.gone_s is not None and s.gone_s >= 1]
    left = f"{max(s.left for s in rounds)}" + (f", after {max(gone):.0f} s" if gone else "")
    lost_steps = [s.lost_steps for s in rounds if s.lost_steps is not None]
    return (
        f"{len(rounds)} | {states} | {_range([s.noticed_s for s in rounds])} | {max(lost_steps) if lost_steps else ''} | "
        f"{_range([s.new_step_s for s in rounds])} | {left} |"
    )


def _range(values: Sequence[float | None]) -> str:
    found = [v for v in values if v is not None]
    if not found:
        return ""
    low, high = f"{min(found):.1f}", f"{max(found):.1f}"
    return low if low == high else f"{low} to {high}"


def _part(rounds: Sequence[Seen], name: str) -> str:
    found = [s.parts[name] for s in rounds if s.parts]
    return f"{sum(found) / len(found):.1f}"


def now() -> float:
    """Unix seconds, by the clock of everything that is written into a run folder."""
    return time.time()
