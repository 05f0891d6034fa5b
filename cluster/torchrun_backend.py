"""Jobs as processes of this host: one worker directly, several under torch.distributed.run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from . import failure, logs, processes
from .environment import job_env
from .job import ClusterError, JobHandle, JobSpec, JobState, JobStatus
from .processes import ProcessIdentity

GRACEFUL_S = 6
"""After SIGTERM workers have this long before the agent sends SIGKILL; with the launcher gone, none lives on for 10 s."""
_LEFTOVER_S = 3.0
"""Helpers of a worker (data loading, clean-up of shared memory) may outlive the job by this much."""
_GIVE_UP_S = 15.0
_AGENT_LOG_LINES = 2000


@dataclass
class TorchrunHandle:
    """A started job: the agent, or the only worker, and the tag by which all its processes are recognised."""

    job: JobSpec
    process: subprocess.Popen[bytes]
    identity: ProcessIdentity
    tag: str
    stop_requested: bool = False
    ended_s: float | None = field(default=None)
    """time.monotonic() at which the first process was seen to have ended."""
    status: JobStatus | None = None
    """Set once, when terminal."""

    @property
    def pids(self) -> tuple[int, ...]:
        """The agent, or the only worker."""
        return (self.process.pid,)


class TorchrunBackend:
    """Processes on this host. They end when the thread that started them ends, however it ends."""

    name = "torchrun"

    def command(self, job: JobSpec) -> tuple[str, ...]:
        """The exact argv. `-P` keeps the current folder, where a user's `trainer.py` may lie, out of the import path."""
        python = (sys.executable, "-P", "-m")
        if job.num_processes == 1:
            return (*python, job.entrypoint, *job.args)
        agent = (
            "torch.distributed.run",
            "--standalone",  # a store on a port that the operating system chooses
            "--local-addr=127.0.0.1",  # otherwise the host's name is looked up, which fails or hangs without DNS
            f"--nproc-per-node={job.num_processes}",
            "--max-restarts=0",  # a retry is a new job, decided by the launcher
            f"--log-dir={os.devnull}",  # it would leave a folder in /tmp for each job; workers write their own logs
            f"--shutdown-timeout={GRACEFUL_S}",
            "-m",
        )
        return (*python, *agent, job.entrypoint, *job.args)

    def start(self, job: JobSpec) -> TorchrunHandle:
        """Starts the processes and returns at once. Raises ClusterError when they cannot be started.

        Call it from a thread that lives as long as the job (see `processes.start_process`).
        """
        logs.remove_failures(job.log_dir)
        tag = f"{job.run_id}/{job.name}/{uuid.uuid4().hex}"
        env = {**job_env(job, os.environ), processes.TAG_VARIABLE: tag}
        log_file = str(Path(job.log_dir) / logs.AGENT_LOG)
        process = processes.start_process(self.command(job), env, job.cwd, log_file)
        # Not yet waited for, so it has an identity even if it has already ended.
        identity = ProcessIdentity.of(process.pid)
        assert identity is not None
        return TorchrunHandle(job, process, identity, tag)

    def poll(self, handle: JobHandle) -> JobStatus:
        """Never blocks. A job is over when none of its processes is left; stragglers are killed after a few seconds."""
        assert isinstance(handle, TorchrunHandle)
        if handle.status is not None:
            return handle.status
        code = handle.process.poll()
        if code is None or self._has_leftovers(handle):
            return JobStatus(JobState.RUNNING, None, None)
        handle.status = _terminal_status(handle, code)
        return handle.status

    def stop(self, handle: JobHandle) -> None:
        """SIGTERM, once; returns at once. Saving first is asked for through the plan's stop request file, not here."""
        assert isinstance(handle, TorchrunHandle)
        if not handle.stop_requested and handle.process.poll() is None:
            handle.stop_requested = True
            processes.signal_group(handle.identity, signal.SIGTERM)

    def kill(self, handle: JobHandle, wait_s: float = 10.0) -> None:
        """SIGKILL every process of the job; returns when none is left. Raises ClusterError after `wait_s`."""
        assert isinstance(handle, TorchrunHandle)
        if handle.status is not None:
            return
        if handle.process.poll() is None:
            handle.stop_requested = True
        survivors = processes.kill_tree(handle.identity, handle.tag, wait_s)
        if survivors:
            raise ClusterError(
                f"{len(survivors)} process(es) did not end {wait_s:g} s after SIGKILL: pid "
                + ", ".join(str(s.pid) for s in survivors),
                "They hang inside the kernel (a device or network file system). Wait; if they stay, restart the host.",
                75,
            )
        handle.process.wait()

    @staticmethod
    def _has_leftovers(handle: TorchrunHandle) -> bool:
        leftovers = processes.tagged(handle.tag)
        if not leftovers:
            return False
        handle.ended_s = handle.ended_s or time.monotonic()
        waited_s = time.monotonic() - handle.ended_s
        if waited_s >= _LEFTOVER_S:
            for leftover in leftovers:
                processes.signal_process(leftover, signal.SIGKILL)
        # A process that hangs inside the kernel cannot be ended, and must not keep the result back for ever.
        return waited_s < _GIVE_UP_S


def _terminal_status(handle: TorchrunHandle, code: int) -> JobStatus:
    """Exit codes mean the same for every backend: 0, 2 user, 70 bug, 75 retry, 130 stopped."""
    if code == 0:
        return JobStatus(JobState.SUCCEEDED, 0, None)
    log_dir = handle.job.log_dir
    agent_log = logs.tail(Path(log_dir) / logs.AGENT_LOG, _AGENT_LOG_LINES)
    codes = {0: code} if handle.job.num_processes == 1 else failure.worker_exit_codes(agent_log) or {-1: code}
    failures = logs.read_failures(log_dir)
    stopped_itself = not failures and failure.EXIT_STOPPED in codes.values()
    if handle.stop_requested or stopped_itself:
        return JobStatus(JobState.STOPPED, failure.EXIT_STOPPED, None)
    cause = failure.first_cause(failures, codes, agent_log, logs.rank_log_tails(log_dir), log_dir)
    if cause.exit_code == failure.EXIT_STOPPED:
        return JobStatus(JobState.STOPPED, failure.EXIT_STOPPED, None)
    return JobStatus(JobState.FAILED, cause.exit_code, cause)
