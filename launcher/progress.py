"""The live line of a run. It reads the run folder and nothing else, so `launch runs watch` shows the same."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from cluster.job import JobSpec, JobState, JobStatus
from cluster.logs import waiting_for

from .run_dir import RunDir, read_json

REDRAW_S = 0.2
PLAIN_LINE_S = 15.0


class Follower:
    """Reads what was appended to a JSON-lines file since the last call; a cut last line is kept for later."""

    def __init__(self, path: Path, from_end: bool = False) -> None:
        self.path = path
        self.at = path.stat().st_size if from_end and path.is_file() else 0
        self.rest = b""

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as f:
            f.seek(self.at)
            data = self.rest + f.read()
            self.at = f.tell()
        *lines, self.rest = data.split(b"\n")
        rows = []
        for line in lines:
            # A line that a crash cut short stays in the file when the next attempt appends.
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows


class Progress:
    """A Watcher that draws one live line on a terminal, or a plain line now and then into a pipe."""

    def __init__(self, run: RunDir, out: TextIO) -> None:
        self.run, self.out = run, out
        self.live = out.isatty()
        self.metrics = Follower(run.metrics, from_end=True)
        self.last: dict[str, Any] | None = None
        self.began = self.drawn = 0.0
        self.seconds_per_step: list[float] = []

    def stage_started(self, job: JobSpec) -> None:
        self.began = self.drawn = time.monotonic()
        self.last = None
        if not self.live:
            self._line(f"{job.name} ...")

    def tick(self, job: JobSpec) -> None:
        now = time.monotonic()
        if now - self.drawn < (REDRAW_S if self.live else PLAIN_LINE_S):
            return
        self.drawn = now
        text = f"{job.name}  {clock(now - self.began)}  {self._training() or waiting_for(job.log_dir)}"
        if self.live:
            width = shutil.get_terminal_size().columns
            self._write("\r\033[K" + text[: width - 1])
        else:
            self._line(text)

    def stage_ended(self, job: JobSpec, status: JobStatus, seconds: float) -> None:
        self._read()
        if self.live:
            self._write("\r\033[K")
        mark = {JobState.SUCCEEDED: "done", JobState.STOPPED: "stopped"}.get(status.state, "FAILED")
        self._line(f"{job.name:<12} {mark:<8} {seconds:6.1f} s  {self._came_out(job, status)}".rstrip())
        if job.name == "prepare" and status.state is JobState.SUCCEEDED:
            for line in self._template_notes():
                self._line(line)

    def note(self, text: str) -> None:
        self._line(("\r\033[K" if self.live else "") + text)

    def _line(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        """A terminal that was closed, or a reader that went away, must not stop the run: the rest is not shown."""
        try:
            self.out.write(text)
            self.out.flush()
        except OSError:
            self.out = io.StringIO()
            self.live = False

    def _read(self) -> None:
        for row in self.metrics.rows():
            self.last = row
            self.seconds_per_step = [*self.seconds_per_step[-19:], row["seconds"]]

    def _training(self) -> str:
        self._read()
        row = self.last
        if row is None:
            return ""
        left = (row["total_steps"] - row["step"]) * sum(self.seconds_per_step) / len(self.seconds_per_step)
        return (
            f"step {row['step']}/{row['total_steps']}  loss {_loss(row)}  {row['tokens_per_second']:.0f} tokens/s  "
            f"{_peak(row, '  ')}ETA {clock(left)}  {row['memory_gb']:.1f} GB{_skipped(row, '  ')}"
        )

    def _template_notes(self) -> list[str]:
        """How a chosen template differs from the model's own."""
        prepared = [row for row in Follower(self.run.events).rows() if row.get("event") == "prepared"]
        return prepared[-1].get("template_notes", []) if prepared else []

    def _came_out(self, job: JobSpec, status: JobStatus) -> str:
        if job.name == "connect" and status.state is JobState.SUCCEEDED:
            return connection_line(self.run)
        return self._summary() if job.name == "train" else ""

    def _summary(self) -> str:
        row = self.last
        if row is None:
            return ""
        return (
            f"{row['step']} steps, loss {_loss(row)}, {row['tokens_per_second']:.0f} tokens/s, {_peak(row, ', ')}"
            f"{row['memory_gb']:.1f} GB{_skipped(row, ', ')}"
        )


def connection_line(run: RunDir) -> str:
    """What the ranks of several hosts measured between them."""
    found = read_json(run.connection)
    return (
        f"{found['ranks']} ranks met in {found['meet_s']:.1f} s; all-reduce {found['gb_per_s']:.2f} GB/s, "
        f"{found['latency_ms']:.2f} ms for one number"
    )


def _loss(row: dict[str, Any]) -> str:
    """The loss of a step that fp16 skipped may be null."""
    return "n/a" if row["loss"] is None else f"{row['loss']:.4f}"


def _peak(row: dict[str, Any], end: str) -> str:
    """Share of the machine's matrix product rate; null until that is measured."""
    share = row.get("share_of_peak")
    return "" if share is None else f"{share:.0%} of peak{end}"


def _skipped(row: dict[str, Any], start: str) -> str:
    skipped = row.get("skipped_steps")
    return f"{start}{skipped} skipped" if skipped else ""


def clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def terminal(run: RunDir) -> Progress:
    """The progress of `run` on standard output."""
    return Progress(run, sys.stdout)
