"""Jobs as processes of this host: one worker directly, several under torch.distributed.run."""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from . import failure, logs
from .environment import job_env
from .job import JobHandle, JobSpec, JobState, JobStatus
from .outcome import job_status
from .root_process import RootProcess

GRACEFUL_S = 6
"""After SIGTERM workers have this long before the agent sends SIGKILL; with the launcher gone, none lives on for 10 s."""
AGENT_LOG_LINES = 2000


@dataclass
class TorchrunHandle:
    """A started job: the agent, or the only worker, with all that comes from it."""

    job: JobSpec
    root: RootProcess
    status: JobStatus | None = None
    """Set once, when terminal."""

    @property
    def pids(self) -> tuple[int, ...]:
        """The agent, or the only worker."""
        return (self.root.process.pid,)


class TorchrunBackend:
    """Processes on this host. They end when the thread that started them ends, however it ends."""

    name = "torchrun"

    def command(self, job: JobSpec) -> tuple[str, ...]:
        """The exact argv."""
        # A store on a port that the operating system chooses; without an address the host's name is looked up, which
        # fails or hangs without DNS.
        return worker_command(job, sys.executable, job.num_processes, ("--standalone", "--local-addr=127.0.0.1"))

    def start(self, job: JobSpec) -> TorchrunHandle:
        """Starts the processes and returns at once. Raises ClusterError when they cannot be started.

        Call it from a thread that lives as long as the job (see `processes.start_process`).
        """
        logs.remove_failures(job.log_dir)
        tag = f"{job.run_id}/{job.name}/{uuid.uuid4().hex}"
        log_file = str(Path(job.log_dir) / logs.AGENT_LOG)
        root = RootProcess.start(self.command(job), job_env(job, os.environ), job.cwd, log_file, tag)
        return TorchrunHandle(job, root)

    def poll(self, handle: JobHandle) -> JobStatus:
        """Never blocks. A job is over when none of its processes is left; stragglers are killed after a few seconds."""
        assert isinstance(handle, TorchrunHandle)
        if handle.status is not None:
            return handle.status
        code = handle.root.poll()
        if code is None:
            return JobStatus(JobState.RUNNING, None, None)
        handle.status = _terminal_status(handle, code)
        return handle.status

    def stop(self, handle: JobHandle) -> None:
        """SIGTERM, once; returns at once. Saving first is asked for through the plan's stop request file, not here."""
        assert isinstance(handle, TorchrunHandle)
        handle.root.stop()

    def kill(self, handle: JobHandle, wait_s: float = 10.0) -> None:
        """SIGKILL every process of the job; returns when none is left. Raises ClusterError after `wait_s`."""
        assert isinstance(handle, TorchrunHandle)
        if handle.status is None:
            handle.root.kill(wait_s)


def worker_command(job: JobSpec, python: str, num_processes: int, meeting: tuple[str, ...]) -> tuple[str, ...]:
    """The exact argv of one host's share: the only worker of a job directly, else an agent that meets the others by `meeting`.

    `-P` keeps the current folder, where a user's `trainer.py` may lie, out of the import path. Pure.
    """
    start = (python, "-P", "-m")
    if job.num_processes == 1:
        return (*start, job.entrypoint, *job.args)
    agent = (
        "torch.distributed.run",
        *meeting,
        f"--nproc-per-node={num_processes}",
        "--max-restarts=0",  # a retry is a new job, decided by the launcher
        f"--log-dir={os.devnull}",  # it would leave a folder in /tmp for each job; workers write their own logs
        f"--shutdown-timeout={GRACEFUL_S}",
        "-m",
    )
    return (*start, *agent, job.entrypoint, *job.args)


def _terminal_status(handle: TorchrunHandle, code: int) -> JobStatus:
    agent_log = logs.tail(Path(handle.job.log_dir) / logs.AGENT_LOG, AGENT_LOG_LINES)
    return ended_status(handle.job, code, agent_log, handle.root.stop_requested)


def ended_status(job: JobSpec, code: int, agent_log: str, stop_requested: bool) -> JobStatus:
    """What a job whose first process ended with `code` has come to (see `outcome.job_status`)."""
    codes = {0: code} if job.num_processes == 1 else failure.worker_exit_codes(agent_log) or {-1: code}
    return job_status(code, codes, agent_log, stop_requested, job.log_dir)
