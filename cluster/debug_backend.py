"""A job inside the launcher's own process, so that breakpoints, prints and post-mortem debugging work."""

from __future__ import annotations

import contextlib
import importlib
import os
import pdb
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from . import failure, logs
from .environment import job_env
from .explain import explain
from .job import ClusterError, Failure, JobHandle, JobSpec, JobState, JobStatus

PDB_VARIABLE = "TUNELAUNCH_PDB"
"""Set to 1: an exception opens the debugger where it was raised."""


@dataclass(frozen=True)
class DebugHandle:
    """A job that has already run."""

    status: JobStatus

    @property
    def pids(self) -> tuple[int, ...]:
        """Empty: no process was created."""
        return ()


class DebugBackend:
    """World size 1, same process; `start` returns when the job is over. Output goes to the terminal."""

    name = "debug"

    def command(self, job: JobSpec) -> tuple[str, ...]:
        """The command that does the same in a process of its own."""
        return (sys.executable, "-P", "-m", job.entrypoint, *job.args)

    def start(self, job: JobSpec) -> DebugHandle:
        """Runs `entrypoint.main(args) -> exit code` to its end. The environment and folder are the job's meanwhile.

        Raises ClusterError for more than one process, or when the working folder does not exist.
        """
        if job.num_processes != 1:
            raise ClusterError(
                f"the debug backend runs one process, and {job.num_processes} are asked for",
                "Choose one device (--gpus 0) or --cpu 1, or use --backend torchrun.",
            )
        if not os.path.isdir(job.cwd):
            raise ClusterError(
                f"the working folder {job.cwd} does not exist", "Start the command again from an existing folder."
            )
        os.makedirs(job.log_dir, exist_ok=True)
        logs.remove_failures(job.log_dir)
        with _job_surroundings(job):
            return DebugHandle(_run(job))

    def poll(self, handle: JobHandle) -> JobStatus:
        """The result; `start` has already waited for it."""
        assert isinstance(handle, DebugHandle)
        return handle.status

    def stop(self, handle: JobHandle) -> None:
        """Nothing is left to stop."""

    def kill(self, handle: JobHandle, wait_s: float = 10.0) -> None:
        """Nothing is left to kill."""


@contextlib.contextmanager
def _job_surroundings(job: JobSpec) -> Iterator[None]:
    """The job's environment and current folder; both are as before afterwards."""
    saved_env, saved_cwd = dict(os.environ), os.getcwd()
    try:
        env = job_env(job, saved_env)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(job.cwd)
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved_env)
        os.chdir(saved_cwd)


def _run(job: JobSpec) -> JobStatus:
    try:
        code = importlib.import_module(job.entrypoint).main(list(job.args))
    except KeyboardInterrupt:
        return JobStatus(JobState.STOPPED, failure.EXIT_STOPPED, None)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except Exception as e:  # the border of the job: whatever escapes becomes its failure
        traceback.print_exc()
        if os.environ.get(PDB_VARIABLE) == "1":
            pdb.post_mortem(e.__traceback__)
        if not logs.read_failures(job.log_dir):
            return _failed(_failure_of(e, job))
        code = failure.EXIT_BUG
    if code == 0:
        return JobStatus(JobState.SUCCEEDED, 0, None)
    failures = logs.read_failures(job.log_dir)
    if code == failure.EXIT_STOPPED and not failures:
        return JobStatus(JobState.STOPPED, failure.EXIT_STOPPED, None)
    return _failed(failure.first_cause(failures, {0: code}, "", logs.rank_log_tails(job.log_dir), job.log_dir))


def _failed(cause: Failure) -> JobStatus:
    return JobStatus(JobState.FAILED, cause.exit_code, cause)


def _failure_of(error: Exception, job: JobSpec) -> Failure:
    text = "".join(traceback.format_exception(error))
    known = explain(text)
    kind = known.kind if known else "bug"
    exit_code = {"user": failure.EXIT_USER, "retry": failure.EXIT_RETRY}.get(kind, failure.EXIT_BUG)
    message = f"{type(error).__name__}: {error}"
    return Failure(0, kind, message, known.hint if known else "", text, exit_code, str(logs.rank_log(job.log_dir, 0)))
