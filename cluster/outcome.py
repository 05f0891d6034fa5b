"""How a job ended, from what it left in its log folder. The same for every backend whose workers are processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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


def lost_rank(
    num_ranks: int, failed: Collection[int], died: set[int], exits: Mapping[int, int], node_is_gone: bool
) -> int | None:
    """The rank of which only Ray can say what became of it; None where the ranks have said all themselves. Pure.

    `failed`: ranks that Ray counts as failed. `died`: those whose Ray worker has gone, and not only lost its connection to
    others. A process that was killed together with its Ray worker and its node is the node's loss: as they do not end at
    the same instant, the signal may just have been written down. And the others may fail of it before Ray hears of the node.
    """
    silent = {rank for rank in failed if exits.get(rank, 0) == 0}
    taken = {rank for rank in died if exits.get(rank, 0) < 0} if node_is_gone else set()
    unheard = set(range(num_ranks)) - exits.keys() if node_is_gone else set()
    return min(died & silent | taken or silent or unheard, default=None)
