"""A run that was submitted to a Ray cluster, as seen from here: the record of it, and what the cluster says now."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.job import ClusterError
from cluster.ray_jobs import RayJob, RayJobs, parse_address, require_private
from cluster.ray_token import HOW_TO_GET_ONE, read_token
from trainer.spec import EXIT_INTERRUPTED, EXIT_OK, EXIT_RETRY, EXIT_USER

from .run_dir import RunDir, read_json, write_atomic, write_json
from .status import FAILED, STOPPED, SUCCEEDED

SUBMITTING, PENDING, UNKNOWN = "submitting", "pending", "unknown"
ENDED = (SUCCEEDED, FAILED, STOPPED)
LOG_WAIT_S = 600.0
"""A log that cannot be had is asked for again for so long after the end."""
NO_TUNELAUNCH = "No module named launcher"
STATUS_MARK = "tunelaunch-status "
"""At the beginning of a line, in what a submitted run's launcher prints: the run's status follows, as JSON."""


@dataclass(frozen=True)
class Submission:
    """submission.json. Holds no secret: the token is read again for each command."""

    run_id: str
    """The id of the Ray job too."""
    address: str
    insecure: bool
    ca: str | None
    timeout_s: float
    run_dir: str
    """On the cluster; ~ is the home folder of the user that Ray runs as."""
    recipe: str
    command: str
    """As typed."""
    package: str
    files: list[dict[str, Any]]
    env: list[str]
    """Names of the variables that were sent."""
    secrets: list[str]
    submitted: float
    state: str = SUBMITTING
    """As last seen; `ENDED` ones stay. `unknown` is never stored."""
    seen: float = 0.0
    ended: float | None = None
    exit_code: int | None = None
    message: str = ""
    """What Ray says of a job that failed."""
    status: dict[str, Any] = field(default_factory=dict)
    """status.json of the run, as last printed by its launcher; empty before that."""


@dataclass(frozen=True)
class Observation:
    """A submitted run's state now. `unknown` means that nobody could be asked, never that it failed."""

    submission: Submission
    state: str
    why: str = ""
    """For `unknown`: the reason."""

    @property
    def is_over(self) -> bool:
        return self.state in ENDED

    @property
    def exit_code(self) -> int:
        """0, 2, 70, 75 or 130 once it is over; 75 while it is not."""
        if not self.is_over:
            return EXIT_RETRY
        if self.state == SUCCEEDED:
            return EXIT_OK
        if self.state == STOPPED:
            return EXIT_INTERRUPTED
        s = self.submission
        if code := (s.status.get("failure") or {}).get("exit_code"):
            return code
        if s.exit_code in (126, 127) or (s.exit_code == 1 and NO_TUNELAUNCH in s.message):
            return EXIT_USER
        return s.exit_code if s.exit_code in (2, 70, 75) else EXIT_RETRY


def read_submission(run: RunDir) -> Submission:
    """The record of a submitted run."""
    return Submission(**read_json(run.submission))


def write_submission(run: RunDir, submission: Submission) -> None:
    """Write it, atomically. Raises LaunchError on a full disk."""
    write_json(run.submission, vars(submission))


def client_of(submission: Submission, timeout_s: float | None = None) -> RayJobs:
    """The cluster that runs it, with the token of now. Raises ClusterError where there is none."""
    return connect(submission.address, submission.insecure, submission.ca, timeout_s or submission.timeout_s)


def connect(address: str, insecure: bool, ca: str | None, timeout_s: float) -> RayJobs:
    """Raises ClusterError for plain http to another machine, and without a token, unless `insecure`."""
    where = parse_address(address)
    require_private(where, insecure)
    token = read_token(os.environ)
    if token is None and not insecure:
        raise ClusterError(f"no token for {where} was found", HOW_TO_GET_ONE)
    return RayJobs(where, token, ca, timeout_s)


def observe(run: RunDir, client: RayJobs | None = None) -> Observation:
    """Ask the cluster, and keep the answer in the record. Of a run that has ended nobody is asked again."""
    submission = read_submission(run)
    if submission.state in ENDED:
        return Observation(submission, submission.state)
    try:
        client = client or client_of(submission)
        job, log = ask(client, submission.run_id)
    except ClusterError as e:
        return Observation(submission, UNKNOWN, e.message)
    return note(run, submission, job, log)


def ask(client: RayJobs, run_id: str) -> tuple[RayJob | None, str | None]:
    """The job, then its log: in this order the log of a job that is over is whole."""
    job = client.job(run_id)
    return job, "" if job is None else log_of(client, run_id, job)


def log_of(client: RayJobs, run_id: str, job: RayJob) -> str | None:
    """What the job has printed. None where the log of an ended one cannot be had, now or for ever: it lies on the job's node."""
    if job.state == PENDING:
        return ""
    try:
        return client.logs(run_id)
    except ClusterError:
        if job.state in ENDED:
            return None
        raise


def note(run: RunDir, submission: Submission, job: RayJob | None, log: str | None) -> Observation:
    """Keep what the cluster says in the record, and the log of a run that has ended: that is the last time it is asked.

    `log`: see `log_of`. Without it the end is not kept yet, unless it was long ago.
    """
    stored = read_submission(run)
    if stored.state in ENDED:
        return Observation(stored, stored.state)  # by another command, while this one asked
    if job is None:
        never = submission.state == SUBMITTING
        why = "it was never accepted" if never else "the cluster was restarted, or the job deleted"
        return Observation(submission, UNKNOWN, f"{submission.address} knows no such job: {why}")
    status = last_status(log or "") or submission.status
    state = _ended_as(job, status)
    new = replace(
        submission,
        state=state,
        seen=time.time(),
        ended=job.ended,
        exit_code=job.exit_code,
        message=job.message if state == FAILED else "",
        status=status,
    )
    if state in ENDED:
        if log is None and time.time() - (job.ended or 0.0) < LOG_WAIT_S:
            return Observation(new, state)
        write_atomic(run.job_log, log or "")
    if replace(new, seen=submission.seen) != submission:
        write_submission(run, new)
    return Observation(new, state)


def _ended_as(job: RayJob, status: dict[str, Any]) -> str:
    """Ray counts a run that was stopped on the cluster itself (130) as failed, and whatever ended after a stop as stopped."""
    if job.state == FAILED and job.exit_code == EXIT_INTERRUPTED:
        return STOPPED
    if job.state == STOPPED and status.get("state") in (FAILED, SUCCEEDED):
        return status["state"]
    return job.state


def last_status(log: str) -> dict[str, Any]:
    """The newest status that the launcher printed; {} where there is none."""
    _, mark, rest = log.rpartition("\n" + STATUS_MARK)
    line, end, _ = rest.partition("\n")
    if not (mark and end):
        return {}
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def visible(log: str) -> str:
    """The log without the lines that are for programs."""
    return "".join(line for line in log.splitlines(keepends=True) if not line.startswith(STATUS_MARK))
