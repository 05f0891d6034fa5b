"""status.json: what a run is doing, written by its supervisor and read by everybody else."""

from __future__ import annotations

import dataclasses
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.processes import ProcessIdentity, is_alive

from .errors import LaunchError
from .run_dir import RunDir, read_json, write_json

RUNNING, SUCCEEDED, FAILED, STOPPED, CRASHED = "running", "succeeded", "failed", "stopped", "crashed"
UNKNOWN, DONE = "unknown", "done"


@dataclass
class Attempt:
    """One start of a run's workers, and how it ended."""

    number: int
    started: float
    """Seconds since 1970, as `ended`."""
    ended: float | None = None
    stage: str = ""
    """The one in which it ended."""
    step: int | None = None
    """The last optimizer step that was done; None before there was one."""
    cause: str = ""
    """done | stopped, or one of cluster.retry.Cause; "" while it runs."""
    message: str = ""
    """The first cause, in one line."""
    noticed_s: float | None = None
    """Seconds from the last sign of life until it was noticed; None where nobody knows."""
    retried: bool = False
    why: str = ""
    """Why it was tried again, or was not."""
    wait_s: float = 0.0
    """Before the next attempt."""
    next_step: int | None = None
    """The step of the checkpoint from which the next attempt goes on; None: from the beginning."""


@dataclass
class Status:
    """One run's state. `crashed` is never written: it is what a reader says of a `running` run without supervisor."""

    run_id: str
    state: str
    attempt: int
    stage: str
    stages: dict[str, str]
    """Stage -> waiting | running | done | failed | stopped."""
    pid: int
    pid_start: int
    host: str
    """Start time of the supervisor process, so that a recycled pid is not taken for it."""
    started: float
    updated: float
    exit_code: int | None = None
    failure: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each finished stage of this attempt."""
    attempts: list[Attempt] = field(default_factory=list)
    """All of them, the present one last; empty in runs of versions that did not keep them."""
    next_attempt_at: float | None = None
    """When the next attempt begins (seconds since 1970), while it is waited for."""
    unreachable_since: float | None = None
    """Since when nobody can say how the job is; None while that is known. It may well run."""

    def write(self, run: RunDir) -> None:
        self.updated = time.time()
        write_json(run.status, dataclasses.asdict(self))

    @property
    def shown_state(self) -> str:
        """The state for people: a job that cannot be asked is `unknown`, and still treated as running."""
        return UNKNOWN if self.state == RUNNING and self.unreachable_since is not None else self.state

    @property
    def supervisor(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.pid_start)


def read_status(run: RunDir) -> Status:
    """The run's state now. Raises LaunchError when the folder is no run."""
    if not run.status.is_file():
        if run.submission.is_file():
            raise LaunchError(
                f"{run.run_id} runs on a Ray cluster, and its files are there",
                f"See where: launch runs show {run.run_id}",
            )
        raise LaunchError(f"{run.root} is not a run folder (no status.json)", "List the runs: launch runs")
    data = read_json(run.status)
    status = Status(**{**data, "attempts": [Attempt(**row) for row in data.get("attempts", [])]})
    # On a shared file system the supervisor may be another host's process, which cannot be looked at from here.
    if status.state == RUNNING and status.host == socket.gethostname() and not is_alive(status.supervisor):
        status.state = CRASHED
    return status


def find_run(name: str, runs_dir: Path) -> RunDir:
    """A run by its folder, its id, the start of its id, or `last`. Raises LaunchError with the nearest names."""
    path = Path(name)
    if (path / "status.json").is_file() or (path / "submission.json").is_file():
        return RunDir(path.resolve())
    runs = list_runs(runs_dir)
    if name == "last" and runs:
        return runs[0]
    matches = [r for r in runs if r.run_id == name] or [r for r in runs if r.run_id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise LaunchError(f"{name!r} fits {len(matches)} runs", "\n".join(r.run_id for r in matches))
    if not runs:
        raise LaunchError(f"no run {name!r}: there are no runs in {runs_dir.resolve()}", "Start one: launch RECIPE")
    known = "\n".join(r.run_id for r in runs[:5])
    raise LaunchError(f"no run {name!r} in {runs_dir.resolve()}", f"Newest runs:\n{known}")


def list_runs(runs_dir: Path) -> list[RunDir]:
    """Run folders in `runs_dir`, and records of submitted runs, newest first."""
    if not runs_dir.is_dir():
        return []
    found = {p.parent.resolve(): p for name in ("status.json", "submission.json") for p in runs_dir.glob(f"*/{name}")}
    return [RunDir(root) for root in sorted(found, key=lambda root: found[root].stat().st_mtime, reverse=True)]
