"""Jobs as Ray Train runs: on a Ray of their own on this host, or on a running cluster.

A job is one driver process of ours (`ray_driver`), which is started, watched and ended as the agent of torchrun is. A job
of one process that reports nothing to Ray needs no cluster, and a Ray of its own would take half a minute to start: on
this host alone it is a plain process, exactly as under torchrun.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from . import logs, processes, ray_local, ray_worker
from .environment import job_env
from .job import JobHandle, JobSpec, JobState, JobStatus
from .outcome import job_status
from .root_process import RootProcess
from .torchrun_backend import TorchrunBackend, TorchrunHandle

JOB_FILE = "job.json"
_AGENT_LOG_LINES = 200


@dataclass
class RayHandle:
    """A started job: the driver, with all that comes from it on this host."""

    job: JobSpec
    root: RootProcess
    status: JobStatus | None = None
    """Set once, when terminal."""
    is_running: bool = False
    """A rank has started."""

    @property
    def pids(self) -> tuple[int, ...]:
        """The driver."""
        return (self.root.process.pid,)


class RayBackend:
    """Ray Train. Processes on this host end with the thread that started them; those of other nodes with the driver."""

    name = "ray"

    def __init__(self) -> None:
        self._plain = TorchrunBackend()

    def command(self, job: JobSpec) -> tuple[str, ...]:
        """The exact argv: of the driver, which reads the job from its log folder, or of a plain process."""
        if is_plain(job):
            return self._plain.command(job)
        return (sys.executable, "-P", "-m", "cluster.ray_driver", str(Path(job.log_dir) / JOB_FILE))

    def start(self, job: JobSpec) -> RayHandle | TorchrunHandle:
        """Starts the driver and returns at once. Raises ClusterError when it cannot be started.

        Call it from a thread that lives as long as the job (see `processes.start_process`).
        """
        if is_plain(job):
            return self._plain.start(job)
        processes.require_folder(job.cwd)
        folder = Path(job.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        logs.remove_failures(job.log_dir)
        logs.remove_exits(job.log_dir)
        for name in (ray_worker.STOP_FILE, logs.WAITING, *(log.name for log in folder.glob("rank_*.log"))):
            (folder / name).unlink(missing_ok=True)
        logs.write_json(folder / JOB_FILE, dataclasses.asdict(job))
        tag = f"{job.run_id}/{job.name}/{uuid.uuid4().hex}"
        # Not in the job's folder: Ray puts the driver's current folder on the import path of its workers.
        log_file = str(folder / logs.AGENT_LOG)
        return RayHandle(
            job, RootProcess.start(self.command(job), job_env(job, os.environ), job.log_dir, log_file, tag)
        )

    def poll(self, handle: JobHandle) -> JobStatus:
        """Never blocks. A job is over when none of its processes is left on this host."""
        if not isinstance(handle, RayHandle):
            return self._plain.poll(handle)
        if handle.status is not None:
            return handle.status
        code = handle.root.poll()
        log_dir = handle.job.log_dir
        if code is None:
            handle.is_running = handle.is_running or any(Path(log_dir).glob("rank_*.log"))
            return JobStatus(JobState.RUNNING if handle.is_running else JobState.PENDING, None, None)
        exits = logs.read_exits(log_dir)
        if not any(exits.values()):
            exits = {-1: code}  # whatever ended the driver, it was none of these
        agent_log = logs.tail(Path(log_dir) / logs.AGENT_LOG, _AGENT_LOG_LINES)
        handle.status = job_status(code, exits, agent_log, handle.root.stop_requested, log_dir)
        ray_local.sweep()
        return handle.status

    def stop(self, handle: JobHandle) -> None:
        """SIGTERM to the driver, once; it ends the workers politely. Returns at once."""
        if not isinstance(handle, RayHandle):
            return self._plain.stop(handle)
        if not handle.root.stop_requested and handle.root.process.poll() is None:
            handle.root.stop_requested = True
            # Not its group: that holds a Ray of its own, which has to outlive the workers.
            processes.signal_process(handle.root.identity, signal.SIGTERM)

    def kill(self, handle: JobHandle, wait_s: float = 10.0) -> None:
        """SIGKILL every process of the job on this host; returns when none is left. Raises ClusterError after `wait_s`.

        Processes on other nodes end when Ray sees that the driver has gone: in seconds.
        """
        if not isinstance(handle, RayHandle):
            return self._plain.kill(handle, wait_s)
        if handle.status is None:
            handle.root.kill(wait_s)
            ray_local.sweep()


def is_plain(job: JobSpec) -> bool:
    """Whether Ray adds nothing to this job (see above)."""
    joins = job.ray is not None and bool(job.ray.address)
    return job.num_processes == 1 and job.report is None and not joins
