"""`launch runs ...` for a run on a Ray cluster. It asks the cluster each time, so any terminal on any day will do."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.job import ClusterError
from cluster.ray_jobs import RayJobs
from trainer.spec import EXIT_INTERRUPTED, EXIT_RETRY

from .errors import LaunchError
from .run_dir import RunDir
from .submission import (
    ENDED,
    NO_TUNELAUNCH,
    UNKNOWN,
    Observation,
    Submission,
    ask,
    client_of,
    log_of,
    note,
    observe,
    read_submission,
    visible,
)
from .supervise import failure_text

POLL_S = 1.0
# Ray gives a job's log as a whole only; a long one is asked for less often, so that no more than this share is spent on it.
FETCH_SHARE = 0.1
LIST_TIMEOUT_S = 5.0
UNREACHABLE_S = 600.0
NO_SUPERVISOR = "Job supervisor actor died"
"""What Ray says of a job whose supervisor, a process of Ray's, was killed."""


def observe_all(runs: Sequence[RunDir]) -> dict[RunDir, Observation]:
    """The state of many runs. All clusters are asked at the same time, and none is waited for longer than some seconds."""
    found = {run: read_submission(run) for run in runs}
    result = {run: Observation(s, s.state) for run, s in found.items() if s.state in ENDED}
    by_cluster: dict[tuple[str, bool, str | None], list[RunDir]] = defaultdict(list)
    for run, s in found.items():
        if run not in result:
            by_cluster[s.address, s.insecure, s.ca].append(run)
    if by_cluster:
        with ThreadPoolExecutor(max_workers=min(8, len(by_cluster))) as pool:
            for answer in pool.map(lambda some: _ask_one_cluster(some, found), by_cluster.values()):
                result |= answer
    return result


def _ask_one_cluster(runs: Sequence[RunDir], found: dict[RunDir, Submission]) -> dict[RunDir, Observation]:
    """One question for all jobs; then their logs, for the stages, while there is time."""
    deadline = time.monotonic() + LIST_TIMEOUT_S
    answer: dict[RunDir, Observation] = {}
    try:
        client = client_of(found[runs[0]], LIST_TIMEOUT_S)
        jobs = client.jobs()
        for run in runs:
            job = jobs.get(run.run_id)
            if job is not None and time.monotonic() > deadline:
                answer[run] = Observation(found[run], job.state)
                continue
            answer[run] = note(run, found[run], job, log_of(client, run.run_id, job) if job else "")
    except ClusterError as e:
        answer |= {run: Observation(found[run], UNKNOWN, e.message) for run in runs if run not in answer}
    return answer


def run_line(run: RunDir, seen: Observation) -> str:
    """One row of `launch runs`."""
    s = seen.submission
    when = time.strftime("%m-%d %H:%M", time.localtime(s.submitted))
    state = seen.state
    last = f" (last seen {s.state} {_clock(s.seen)}: {seen.why})" if state == UNKNOWN else ""
    return f"{run.run_id:<48} {state:<10} {s.status.get('stage', ''):<12} on {s.address}  {when}{last}"


def show(run: RunDir) -> None:
    """Print the state of each stage, the first cause of a failure, and where things are."""
    seen = observe(run)
    s = seen.submission
    print(f"{run.run_id}  {seen.state}")
    if seen.state == UNKNOWN:
        print(f"              {seen.why}\n              last seen {s.state}, {_clock(s.seen)}; it may well go on")
    print(f"cluster       {s.address}\nfolder        {_remote_folder(s)} (on the cluster)")
    print(f"submitted     {_clock(s.submitted)}" + (f", ended {_clock(s.ended)}" if s.ended else ""))
    for stage, state in s.status.get("stages", {}).items():
        seconds = s.status.get("seconds", {}).get(stage)
        print(f"{stage:<13} {state}" + (f"  {seconds:.1f} s" if seconds is not None else ""))
    if text := first_cause(seen):
        print(f"\n{text}")


def first_cause(seen: Observation) -> str:
    """Why it failed, in one paragraph: the launcher's own words where it came to say them, else what Ray says."""
    s = seen.submission
    if seen.state != "failed":
        return ""
    if failure := s.status.get("failure"):
        return failure_text(failure) + " (on the cluster)"
    other = "the tunelaunch of the cluster is of another version: it takes no submitted runs"
    for code, sign, cause in (
        (1, NO_TUNELAUNCH, "the Python of the cluster has no tunelaunch"),
        (2, "No such command '_submitted'", other),
        (127, "", "the cluster has no such Python"),
    ):
        if s.exit_code == code and sign in s.message:
            return f"{cause}\nInstall the same version there, and name its Python: launch submit ... --python PATH"
    if NO_SUPERVISOR in s.message:
        where = re.search(r"^\s*ip: (\S+)", s.message, re.MULTILINE)
        return (
            f"Ray's supervisor of the job has died{f' (on {where[1]})' if where else ''}; how the run ended is not known to Ray: "
            "without it a run saves a checkpoint and stops, unless its host went too\n"
            f"continue, on the cluster: launch runs resume {_remote_folder(s)}"
        )
    lines = visible(s.message).strip().splitlines() or ["Ray gives no reason"]
    return "\n".join(line[:500] for line in lines[-10:])


def print_logs(run: RunDir, lines: int, follow: bool) -> None:
    """Print the end of what the run's launcher printed, and with `follow` what is added until it ends."""
    s = read_submission(run)
    if s.state in ENDED:
        print(_end(visible(run.job_log.read_text(encoding="utf-8")), lines))
        return
    client = client_of(s)
    job = client.job(s.run_id)
    if job is None:
        raise LaunchError(f"{s.address} knows no job {s.run_id}", f"Its files are in {_remote_folder(s)} there.")
    log = client.logs(s.run_id)
    print(_end(visible(log), lines), flush=True)
    if follow and not note(run, s, job, log).is_over:
        _follow(run, client, log)


def watch(run: RunDir) -> int:
    """Print what the run's launcher prints, until it ends. Returns its exit code; Ctrl-C returns 130, and it goes on."""
    s = read_submission(run)
    try:
        seen = observe(run)
        if seen.is_over:
            print(visible(_kept_log(run)), end="")
        else:
            seen = _follow(run, client_of(s), "")
    except KeyboardInterrupt:
        print(f"\n{run.run_id} goes on; stop it: launch runs stop {shlex.quote(str(run.root))}")
        return EXIT_INTERRUPTED
    print(f"\n{run.run_id} {seen.state}" + (f": {seen.why}" if seen.why else ""), file=sys.stderr)
    text = first_cause(seen)
    if text and text.splitlines()[0] not in _kept_log(run):
        print(text, file=sys.stderr)
    if seen.state == "stopped":
        print(f"continue, on the cluster: launch runs resume {_remote_folder(seen.submission)}", file=sys.stderr)
    return seen.exit_code


def _kept_log(run: RunDir) -> str:
    """ "" where the run's end is known, and its log could not be had so far."""
    return run.job_log.read_text(encoding="utf-8") if run.job_log.is_file() else ""


def _follow(run: RunDir, client: RayJobs, shown: str) -> Observation:
    """Print what comes after `shown`. Raises LaunchError (75) when the cluster cannot be asked for ten minutes."""
    lost_since: float | None = None
    while True:
        began = time.monotonic()
        try:
            job, log = ask(client, run.run_id)
        except ClusterError as e:
            lost_since = _still_lost(run, lost_since, e)
            time.sleep(5 * POLL_S)
            continue
        lost_since = None
        seen = note(run, read_submission(run), job, log)
        log = shown if log is None else log
        new = log[len(shown) :] if log.startswith(shown) else log
        if not seen.is_over:
            new = new[: new.rfind("\n") + 1]  # a line that is still being written comes with the next answer
        shown = shown + new if log.startswith(shown) else new
        print(visible(new), end="", flush=True)
        if seen.is_over or job is None:
            return seen
        time.sleep(max(POLL_S, (time.monotonic() - began) / FETCH_SHARE))


def _still_lost(run: RunDir, lost_since: float | None, e: ClusterError) -> float:
    now = time.monotonic()
    if e.exit_code != EXIT_RETRY:
        raise e
    if lost_since is None:
        print(f"{e.message}; asking again for {UNREACHABLE_S:g} s, the run may well go on", file=sys.stderr)
        return now
    if now - lost_since > UNREACHABLE_S:
        raise LaunchError(e.message, f"Ask later: launch runs watch {run.root}", EXIT_RETRY)
    return lost_since


def stop(run: RunDir, now: bool, wait_s: float) -> None:
    """Ask Ray to end the job, which lets the launcher save a checkpoint. Raises LaunchError when it takes over `wait_s`."""
    from .submit import STOP_WAIT_S

    seen = observe(run)
    s = seen.submission
    if seen.is_over:
        raise LaunchError(f"{run.run_id} is not running ({seen.state})")
    if now:
        raise LaunchError(
            f"--now: Ray can only ask a job, and kills it after {STOP_WAIT_S} s",
            f"Leave --now out; or on the cluster: launch runs stop {_remote_folder(s)} --now",
        )
    client = client_of(s)
    client.stop(run.run_id)
    print(f"stopping {run.run_id}, with a checkpoint (Ray kills it after {STOP_WAIT_S} s) ...", flush=True)
    deadline = time.monotonic() + wait_s
    while not (seen := observe(run, client)).is_over:
        if time.monotonic() > deadline:
            state = f"its state is unknown: {seen.why}" if seen.state == UNKNOWN else "it has been asked to"
            raise LaunchError(
                f"{run.run_id} has not stopped after {wait_s:g} s; {state}", "Wait longer: --wait-s", EXIT_RETRY
            )
        time.sleep(POLL_S)
    print(f"{run.run_id} {seen.state}")


def _remote_folder(s: Submission) -> str:
    """In full once the run has said it."""
    return s.status.get("run_dir") or s.run_dir


def _end(text: str, lines: int) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "never"
