"""How a job ended, from what it left in its log folder. The same for every backend whose workers are processes."""

from __future__ import annotations

from collections.abc import Mapping

from . import failure, logs
from .job import JobState, JobStatus


def job_status(
    code: int, exit_codes: Mapping[int, int], agent_log: str, stop_requested: bool, log_dir: str
) -> JobStatus:
    """The terminal status. `code`: of the job's first process; 0 means that all went well.

    `exit_codes`, `agent_log`: see `failure.first_cause`. Exit codes mean the same for every backend: 0, 2 user, 70 bug, 75 retry,
    130 stopped.
    """
    if code == 0:
        return JobStatus(JobState.SUCCEEDED, 0, None)
    failures = logs.read_failures(log_dir)
    stopped_itself = not failures and failure.EXIT_STOPPED in exit_codes.values()
    if stop_requested or stopped_itself:
        return JobStatus(JobState.STOPPED, failure.EXIT_STOPPED, None)
    tails = logs.rank_log_tails(log_dir)
    cause = failure.first_cause(failures, exit_codes, agent_log, tails, log_dir)
    if cause.exit_code == failure.EXIT_STOPPED:
        return JobStatus(JobState.STOPPED, failure.EXIT_STOPPED, None)
    return JobStatus(JobState.FAILED, cause.exit_code, cause)
