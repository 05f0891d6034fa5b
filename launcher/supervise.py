"""Runs the stages of a plan one after another, on its backend, and keeps status.json true while it does."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import IO, Any, Protocol

from cluster.job import Backend, ClusterError, Failure, JobHandle, JobSpec, JobState, JobStatus, Meeting, NodeShare
from cluster.processes import ProcessIdentity
from cluster.registry import load
from trainer.spec import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER

from .errors import LaunchError
from .run_dir import RunDir, read_json
from .stages import set_output_aside, with_model_dir
from .status import DONE, FAILED, RUNNING, STOPPED, SUCCEEDED, Status

POLL_S = 0.1
FULL_DISK_BYTES = 2**20


class Watcher(Protocol):
    """Shows a run to a person; the supervisor tells it what happens."""

    def stage_started(self, job: JobSpec) -> None: ...
    def tick(self, job: JobSpec) -> None: ...
    def stage_ended(self, job: JobSpec, status: JobStatus, seconds: float) -> None: ...
    def note(self, text: str) -> None: ...


def hold(run: RunDir) -> IO[str]:
    """The run's lock, held as long as the file is open. Raises LaunchError when another launcher has it."""
    try:
        lock = open(run.supervisor_lock, "w", encoding="utf-8")  # noqa: SIM115  # closed by the caller
    except OSError as e:
        raise LaunchError(f"cannot write into {run.root}: {e.strerror}", "Free some space.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise LaunchError(
            f"{run.run_id} is being run by another launcher", f"Watch it: launch runs watch {run.root}"
        ) from None
    return lock


class Supervisor:
    """One attempt of a run. The first SIGINT, SIGTERM or SIGHUP stops it after a checkpoint, the second kills."""

    def __init__(self, run: RunDir, plan: dict[str, Any], attempt: int, watcher: Watcher) -> None:
        self.run, self.attempt, self.watcher = run, attempt, watcher
        self.backend: Backend = load(plan["backend"])
        self.jobs = [job_from_dict(j) for j in plan["jobs"]]
        self.signals = 0
        self.current: tuple[JobSpec, JobHandle] | None = None
        me = ProcessIdentity.of(os.getpid())
        assert me is not None
        self.status = Status(
            run_id=run.run_id,
            state=RUNNING,
            attempt=attempt,
            stage="",
            stages={j.name: "waiting" for j in self.jobs},
            pid=me.pid,
            pid_start=me.start_ticks,
            host=socket.gethostname(),
            started=time.time(),
            updated=time.time(),
        )

    def go(self, done: frozenset[str] = frozenset()) -> int:
        """Run every stage that is not in `done`. Returns 0, 2, 70, 75 or 130; never leaves a process behind."""
        lock = hold(self.run)
        self.run.stop_request.unlink(missing_ok=True)
        restore = self._catch_signals()
        try:
            for job in self.jobs:
                if job.name in done:
                    self.status.stages[job.name] = DONE
                    continue
                code = self._stage(job)
                if code != EXIT_OK:
                    return code
                if self.signals:
                    return self._end(STOPPED, EXIT_INTERRUPTED)
            return self._end(SUCCEEDED, EXIT_OK)
        finally:
            restore()
            lock.close()

    def _end(self, state: str, code: int) -> int:
        self.status.state, self.status.exit_code = state, code
        self.status.write(self.run)
        return code

    def _stage(self, job: JobSpec) -> int:
        self.status.stage = job.name
        self.status.stages[job.name] = RUNNING
        self.status.write(self.run)
        try:
            os.makedirs(job.log_dir, exist_ok=True)
        except OSError as e:
            raise LaunchError(f"cannot write {job.log_dir}: {e.strerror}", "Free some space.") from None
        set_output_aside(job, self.attempt)
        began = time.monotonic()
        self.watcher.stage_started(job)
        result = self._run_job(with_model_dir(job, self.run))
        seconds = time.monotonic() - began
        self.status.seconds[job.name] = round(seconds, 2)
        self.watcher.stage_ended(job, result, seconds)
        return self._record(job, result)

    def _record(self, job: JobSpec, result: JobStatus) -> int:
        if result.state is JobState.SUCCEEDED:
            self.status.stages[job.name] = DONE
            self.status.write(self.run)
            return EXIT_OK
        stopped = result.state is JobState.STOPPED
        self.status.state = self.status.stages[job.name] = STOPPED if stopped else FAILED
        self.status.exit_code = EXIT_INTERRUPTED if stopped else result.exit_code
        failure = None if result.failure is None else self._with_full_disk(result.failure)
        if failure is not None:
            self.status.exit_code = failure.exit_code
        self.status.failure = dataclasses.asdict(failure) if failure else None
        self.status.write(self.run)
        return EXIT_BUG if self.status.exit_code is None else self.status.exit_code

    def _with_full_disk(self, failure: Failure) -> Failure:
        """A worker on a full disk cannot write down why it ended."""
        if failure.kind == "user" or shutil.disk_usage(self.run.root).free > FULL_DISK_BYTES:
            return failure
        message = f"No space left on device: {self.run.root}. {failure.message}"
        return dataclasses.replace(failure, kind="user", message=message, hint="Free some space.", exit_code=EXIT_USER)

    def _run_job(self, job: JobSpec) -> JobStatus:
        handle = self.backend.start(job)
        self.current = (job, handle)
        if self.signals:
            self._stop_current()  # the signal came while the job was being started
        try:
            while not (status := self.backend.poll(handle)).state.is_terminal:
                self.watcher.tick(job)
                time.sleep(POLL_S)
            return status
        finally:
            self.current = None
            # Whatever ended the loop, no process of ours may stay.
            self.backend.kill(handle)

    def _catch_signals(self) -> Callable[[], None]:
        """Returns the function that puts the old handlers back."""
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)  # started by nohup: a closed terminal is no request to stop
        old = {number: signal.signal(number, self._on_signal) for number in numbers}

        def restore() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        return restore

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.current is not None:
            self._stop_current()

    def _stop_current(self) -> None:
        assert self.current is not None
        job, handle = self.current
        if self.signals > 1:
            self.watcher.note("killing the workers")
            self.backend.kill(handle)
        elif job.name == "train":
            self.run.stop_request.touch()
            self.watcher.note("stopping after the next step, with a checkpoint; once more to kill")
        else:
            self.watcher.note(f"stopping {job.name}; once more to kill")
            self.backend.stop(handle)


def job_from_dict(data: dict[str, Any]) -> JobSpec:
    """A job of plan.json."""
    fields = {f.name for f in dataclasses.fields(JobSpec)}
    values = {key: value for key, value in data.items() if key in fields}
    nodes = tuple(NodeShare(**{**node, "devices": tuple(node["devices"])}) for node in values["nodes"])
    values |= {"args": tuple(values["args"]), "devices": tuple(values["devices"]), "nodes": nodes}
    return JobSpec(**{**values, "meeting": Meeting(**values["meeting"])})


def supervise(run: RunDir, attempt: int, done: frozenset[str], watcher: Watcher) -> int:
    """Run the attempt that plan.json describes, in this process. Raises LaunchError when it cannot be started."""
    try:
        return Supervisor(run, read_json(run.plan), attempt, watcher).go(done)
    except ClusterError as e:
        raise LaunchError(e.message, e.hint, e.exit_code) from e


def detach(run: RunDir, attempt: int, done: frozenset[str]) -> int:
    """Start `supervise` in a session of its own, that outlives the terminal. Returns its pid."""
    import subprocess

    argv = [
        sys.executable,
        "-P",
        "-m",
        "launcher",
        "_supervise",
        str(run.root),
        str(attempt),
        "--done",
        ",".join(sorted(done)),
    ]
    with open(run.supervisor_log, "ab") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=run.root, start_new_session=True
        )
    return process.pid


def failure_text(failure: dict[str, Any] | None) -> str:
    """The first cause in one paragraph: which rank, what it said, what to do, where the whole log is."""
    if not failure:
        return ""
    rank = f"rank {failure['rank']}"
    who = f"{rank}: " if failure["rank"] >= 0 and not failure["message"].startswith(rank) else ""
    lines = [f"{who}{failure['message']}"]
    if failure["hint"]:
        lines.append(failure["hint"])
    if failure["kind"] == "bug" and failure["traceback"]:
        lines.append("\n".join(failure["traceback"].strip().splitlines()[-6:]))
    lines.append(f"log: {failure['log_file']}")
    return "\n".join(lines)
