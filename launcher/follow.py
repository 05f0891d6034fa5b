"""Watching, reading and stopping a run from outside: only through its folder and its supervisor's signals."""

from __future__ import annotations

import signal
import socket
import sys
import time

from cluster.job import JobSpec, JobState, JobStatus
from cluster.logs import format_line, iter_follow, tail
from cluster.processes import is_alive, signal_process
from trainer.spec import EXIT_INTERRUPTED, EXIT_OK, EXIT_RETRY

from .attempts import end_note, reach_note, retry_note
from .errors import LaunchError
from .progress import Follower, Progress
from .run_dir import RunDir, read_json
from .status import RUNNING, SUCCEEDED, UNKNOWN, Status, read_status
from .supervise import failure_text

POLL_S = 0.2


def watch(run: RunDir) -> int:
    """Draw the live line until the run ends. Returns its exit code; Ctrl-C returns 130 and leaves it running."""
    progress = Progress(run, sys.stdout)
    jobs = {j["name"]: JobSpec.from_dict(j) for j in read_json(run.plan)["jobs"]}
    current: JobSpec | None = None
    told = len([attempt for attempt in read_status(run).attempts if attempt.ended is not None])
    is_unknown = False
    try:
        while True:
            status = read_status(run)
            waits = status.next_attempt_at is not None
            ended = ""
            if current is not None and (status.stage != current.name or status.state != RUNNING or waits):
                progress.stage_ended(current, _job_status(status, current.name), status.seconds.get(current.name, 0.0))
                ended, current = current.name, None
            for attempt in status.attempts[told:]:
                told += attempt.ended is not None
                if not attempt.retried:
                    continue
                if ended != attempt.stage:  # it began, or the next one did, since the last look
                    failed = JobStatus(JobState.FAILED, None, None)
                    progress.stage_ended(jobs[attempt.stage], failed, status.seconds.get(attempt.stage, 0.0))
                    current = None
                progress.note(retry_note(attempt))
            if is_unknown != (status.shown_state == UNKNOWN):
                is_unknown = not is_unknown
                progress.note(reach_note(is_unknown))
            if status.state != RUNNING:
                print_end(run, _exit_code(status))
                return _exit_code(status)
            if current is None and status.stage and not waits:
                current = jobs[status.stage]
                progress.stage_started(current)
            if current is not None:
                progress.tick(current)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\n{run.run_id} goes on; stop it: launch runs stop {run.root}")
        return EXIT_INTERRUPTED


def _job_status(status: Status, stage: str) -> JobStatus:
    states = {"done": JobState.SUCCEEDED, "stopped": JobState.STOPPED}
    return JobStatus(states.get(status.stages[stage], JobState.FAILED), status.exit_code, None)


def _exit_code(status: Status) -> int:
    return EXIT_RETRY if status.exit_code is None else status.exit_code


def print_end(run: RunDir, code: int) -> None:
    """What came out: the before/after table and the folders, or the first cause and how to go on."""
    status = read_status(run)
    table = run.report / "table.txt"
    if status.stage == "evaluate" and table.is_file():
        print("\n" + table.read_text(encoding="utf-8").rstrip())
    if code == EXIT_OK and status.state == SUCCEEDED:
        print(_memory_line(run), end="")
        print(f"\nmodel    {run.merged}\nreport   {run.report / 'report.html'}\nchat     launch chat {run.root}")
        return
    print(f"\n{status.stage} {status.state}", file=sys.stderr)
    if status.failure:
        print(failure_text(status.failure), file=sys.stderr)
    if note := end_note(status.attempts):
        print(note, file=sys.stderr)
    if any(run.checkpoints.glob("step_*/manifest.json")):
        print(f"continue: launch runs resume {run.root}", file=sys.stderr)


def _memory_line(run: RunDir) -> str:
    """For a debug run: what it used, what a whole run is estimated to need, and what the device has. Else ""."""
    plan = read_json(run.plan)
    if not plan["spec"]["debug"] or plan["memory"] is None:
        return ""
    used = max(row["memory_gb"] for row in Follower(run.metrics).rows())
    has = [f"{d['name']} {d['memory_total_gb']:.1f} GB" for d in plan["devices"]]
    return (
        f"\nmemory   {used:.1f} GB used in these steps, {plan['memory']['total_gb']:.1f} GB estimated for the whole run; "
        f"device: {', '.join(has) or 'CPU'}\n"
    )


def print_logs(run: RunDir, stage: str | None, rank: int | None, lines: int, follow: bool) -> None:
    """Print the end of the ranks' logs of one stage, and with `follow` what is added until the run ends."""
    status = read_status(run)
    folder = run.logs(status.attempt, stage or status.stage)
    logs = sorted(folder.glob("*.log"))
    if rank is not None:
        logs = [p for p in logs if p.name == f"rank_{rank}.log"]
    if not logs:
        names = ", ".join(p.name for p in sorted(run.root.glob(f"logs/attempt_{status.attempt}/*")))
        raise LaunchError(f"no log in {folder}", f"Stages with logs: {names or 'none'}")
    for path in logs:
        print(f"== {path}")
        print(tail(path, lines))
    if follow:
        start = {path: path.stat().st_size for path in logs}
        for path, line in iter_follow(str(folder), lambda: read_status(run).state != RUNNING, POLL_S, start):
            if rank is None or path in start:
                print(format_line(path, line), flush=True)


def stop(run: RunDir, now: bool, wait_s: float) -> None:
    """Ask the supervisor to stop (with a checkpoint) or to kill. Raises LaunchError when it has not ended in `wait_s`."""
    status = read_status(run)
    if status.state != RUNNING:
        raise LaunchError(f"{run.run_id} is not running ({status.state})")
    is_here = status.host == socket.gethostname()
    if not is_here and now:
        raise LaunchError(
            f"{run.run_id} was started on {status.host}: it can only be killed from there",
            f"Stop it with a checkpoint: launch runs stop {run.root}\nOr on {status.host}: launch runs stop {run.root} --now",
        )
    if not is_here:
        run.stop_request.touch()  # no signal gets there, but training looks for this in the shared folder
    else:
        signal_process(status.supervisor, signal.SIGINT)
    if now:
        time.sleep(POLL_S)
        signal_process(status.supervisor, signal.SIGINT)
    print(f"stopping {run.run_id} ...", flush=True)
    deadline = time.monotonic() + wait_s
    while is_alive(status.supervisor) if is_here else read_status(run).state == RUNNING:
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{run.run_id} has not stopped after {wait_s:g} s",
                f"Kill it: launch runs stop {run.root} --now\nOr wait longer: --wait-s",
                exit_code=75,
            )
        time.sleep(POLL_S)
    print(f"{run.run_id} {read_status(run).state}")
