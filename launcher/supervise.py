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

from cluster.job import Backend, ClusterError, Failure, JobHandle, JobSpec, JobState, JobStatus
from cluster.processes import ProcessIdentity
from cluster.registry import load
from cluster.retry import Cause, Fault, RetryLimits, Verdict, decide
from trainer.spec import EXIT_INTERRUPTED, EXIT_OK, EXIT_RETRY, EXIT_USER

from .attempts import DONE_CAUSE, STOPPED_CAUSE, close, earlier_attempts, fault_of, reach_note, retry_note
from .errors import LaunchError
from .job_watch import JobWatch
from .run_dir import RunDir, read_json, write_json
from .stages import renumbered, set_output_aside, with_model_dir
from .status import DONE, FAILED, RUNNING, STOPPED, SUCCEEDED, Attempt, Status

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
    """A run, attempt after attempt. The first SIGINT, SIGTERM or SIGHUP stops it after a checkpoint, the second kills."""

    def __init__(self, run: RunDir, plan: dict[str, Any], attempt: int, watcher: Watcher) -> None:
        self.run, self.plan, self.watcher = run, plan, watcher
        self.backend: Backend = load(plan["backend"])
        self.jobs = [JobSpec.from_dict(j) for j in plan["jobs"]]
        self.limits = RetryLimits(**plan["retry"])
        self.faults: list[Fault] = []
        self.signals: list[int] = []
        self.state = JobState.RUNNING
        """Of the current job, as it was last seen."""
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
        """Run every stage that is not in `done`, again where the policy says so. Returns 0, 2, 70, 75 or 130.

        Never leaves a process behind.
        """
        lock = hold(self.run)
        self.run.stop_request.unlink(missing_ok=True)
        self.status.attempts = earlier_attempts(self.run)
        self.status.stages.update({name: DONE for name in self.status.stages if name in done})
        restore = self._catch_signals()
        try:
            while True:
                self.status.attempts.append(Attempt(self.status.attempt, time.time()))
                ended = self._attempt()
                if ended.state is JobState.SUCCEEDED:
                    close(self.run, self.status.attempts[-1], self.status.stage, DONE_CAUSE, None, None)
                    return self._end(SUCCEEDED, EXIT_OK)
                if ended.state is JobState.STOPPED:
                    return self._stopped()
                if not self._tries_again(ended):
                    assert self.status.exit_code is not None
                    return self.status.exit_code
        finally:
            restore()
            lock.close()

    def _end(self, state: str, code: int) -> int:
        self.status.state, self.status.exit_code, self.status.next_attempt_at = state, code, None
        self.status.write(self.run)
        return code

    def _attempt(self) -> JobStatus:
        """The stages that are not done, one after another, to the end or to the first that fails."""
        for job in self.jobs:
            if self.status.stages[job.name] == DONE:
                continue
            result = self._stage(job)
            if result.state is not JobState.SUCCEEDED:
                return result
            if self.signals:
                return JobStatus(JobState.STOPPED, EXIT_INTERRUPTED, None)
        return JobStatus(JobState.SUCCEEDED, EXIT_OK, None)

    def _stage(self, job: JobSpec) -> JobStatus:
        self.status.stage = job.name
        self.status.stages[job.name] = RUNNING
        self.status.write(self.run)
        try:
            os.makedirs(job.log_dir, exist_ok=True)
        except OSError as e:
            raise LaunchError(f"cannot write {job.log_dir}: {e.strerror}", "Free some space.") from None
        set_output_aside(job, self.status.attempt)
        began = time.monotonic()
        self.watcher.stage_started(job)
        result = self._run_job(with_model_dir(job, self.run))
        seconds = time.monotonic() - began
        self.status.seconds[job.name] = round(seconds, 2)
        self.watcher.stage_ended(job, result, seconds)
        if result.state is JobState.SUCCEEDED:
            self.status.stages[job.name] = DONE
            self.status.write(self.run)
        return result

    def _stopped(self) -> int:
        """It ended because it was asked to: by a person, or by a scheduler that wants the machine."""
        self.status.stages[self.status.stage] = STOPPED if self.status.stages[self.status.stage] != DONE else DONE
        cause, verdict = STOPPED_CAUSE, None
        if signal.SIGTERM in self.signals:
            cause = Cause.PREEMPTION.value
            verdict = Verdict(False, "the launcher itself was asked to end (SIGTERM); launch runs resume goes on")
        if self.status.attempts[-1].ended is None:
            close(self.run, self.status.attempts[-1], self.status.stage, cause, None, verdict)
        return self._end(STOPPED, EXIT_INTERRUPTED)

    def _tries_again(self, ended: JobStatus) -> bool:
        """Write the failure down and decide. True once the next attempt may begin; else the run has ended."""
        stage, attempt = self.status.stage, self.status.attempts[-1]
        assert ended.failure is not None, "a job that failed says why"
        failure = self._with_full_disk(ended.failure)
        fault = fault_of(self.run, attempt.number, stage, failure)
        self.faults.append(fault)
        if self.signals and fault.cause is Cause.PREEMPTION:
            # A scheduler signals all processes of a job at once, the launcher's among them.
            self._stopped()
            return False
        verdict = Verdict(False, "it was asked to stop") if self.signals else decide(self.faults, self.limits)
        close(self.run, attempt, stage, fault.cause.value, failure, verdict)
        if not verdict.retry:
            self.status.stages[stage] = FAILED
            self.status.failure = dataclasses.asdict(failure)
            self._end(FAILED, failure.exit_code)
            return False
        self.watcher.note(retry_note(attempt))
        if not self._wait(verdict.wait_s):
            attempt.retried, attempt.why = False, "it was asked to stop before the next attempt"
            self._stopped()
            return False
        self._renumber()
        return True

    def _wait(self, seconds: float) -> bool:
        """False when a signal came meanwhile."""
        self.status.stages[self.status.stage] = "waiting"
        self.status.next_attempt_at = time.time() + seconds
        self.status.write(self.run)
        deadline = time.monotonic() + seconds
        while not self.signals and (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left_s))
        return not self.signals

    def _renumber(self) -> None:
        """The next attempt's jobs, with logs of their own; plan.json stays the record of what runs."""
        self.status.attempt += 1
        self.status.next_attempt_at = None
        self.jobs = [renumbered(job, self.run, self.status.attempt) for job in self.jobs]
        self.plan = {**self.plan, "jobs": [dataclasses.asdict(job) for job in self.jobs]}
        write_json(self.run.plan, self.plan)

    def _with_full_disk(self, failure: Failure) -> Failure:
        """A worker on a full disk cannot write down why it ended."""
        if failure.kind == "user" or shutil.disk_usage(self.run.root).free > FULL_DISK_BYTES:
            return failure
        message = f"No space left on device: {self.run.root}. {failure.message}"
        return dataclasses.replace(failure, kind="user", message=message, hint="Free some space.", exit_code=EXIT_USER)

    def _run_job(self, job: JobSpec) -> JobStatus:
        try:
            handle = self.backend.start(job)
        except ClusterError as e:
            if not self.faults or e.exit_code != EXIT_RETRY:
                raise
            # What made the last attempt fail may not be over yet.
            return _failed(Failure(-1, "retry", e.message, e.hint, "", e.exit_code, job.log_dir))
        self.current, self.state = (job, handle), JobState.RUNNING
        if self.signals:
            self._stop_current()  # the signal came while the job was being started
        watch = self._watch(job)
        try:
            while not (status := self.backend.poll(handle)).state.is_terminal:
                self.watcher.tick(job)
                self.state = status.state
                self._note_reachable(status.state)
                if job.name == "train" and status.state is JobState.PENDING and self.run.stop_request.exists():
                    self.backend.stop(handle)  # there is no rank yet that could read it
                if watch is not None and (hang := watch.look(status.state)):
                    return _failed(hang)
                time.sleep(POLL_S)
            return status if watch is None else _with_noticed(status, watch)
        finally:
            self.current = None
            # Whatever ended the loop, no process of ours may stay.
            self.backend.kill(handle)
            if watch is not None:
                watch.tidy()

    def _watch(self, job: JobSpec) -> JobWatch | None:
        """Only training may hang for longer than it takes: it waits for other ranks."""
        if job.name != "train":
            return None
        parallel = self.plan["spec"]["parallel"]
        return JobWatch(job, self.plan["hang_s"], parallel["timeout_s"], parallel["device"] == "cpu")

    def _note_reachable(self, state: JobState) -> None:
        """A job that cannot be asked may well run: it is waited for, and shown as unknown meanwhile."""
        is_unknown = state is JobState.UNKNOWN
        if is_unknown == (self.status.unreachable_since is not None):
            return
        self.status.unreachable_since = time.time() if is_unknown else None
        self.status.write(self.run)
        self.watcher.note(reach_note(is_unknown))

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
        self.signals.append(number)
        if self.current is not None:
            self._stop_current()

    def _stop_current(self) -> None:
        assert self.current is not None
        job, handle = self.current
        if len(self.signals) > 1:
            self.watcher.note("killing the workers")
            self.backend.kill(handle)
        elif job.name == "train" and self.state is not JobState.PENDING:
            self.run.stop_request.touch()
            self.watcher.note("stopping after the next step, with a checkpoint; once more to kill")
        else:
            self.watcher.note(f"stopping {job.name}; once more to kill")
            self.backend.stop(handle)


def _failed(failure: Failure) -> JobStatus:
    return JobStatus(JobState.FAILED, failure.exit_code, failure)


def _with_noticed(status: JobStatus, watch: JobWatch) -> JobStatus:
    if status.failure is None or status.failure.noticed_s is not None:
        return status
    failure = dataclasses.replace(status.failure, noticed_s=watch.noticed_s(status.failure.rank))
    return dataclasses.replace(status, failure=failure)


def supervise(run: RunDir, attempt: int, done: frozenset[str], watcher: Watcher) -> int:
    """Run the attempt that plan.json describes, and those that follow from it, in this process. Raises LaunchError when it cannot be started."""
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
