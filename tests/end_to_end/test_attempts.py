"""Attempts follow one another as the policy says, with real processes that need no torch and end as they are told."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import ROOT, wait_until

from cluster.job import JobSpec, JobState, JobStatus
from cluster.processes import ProcessIdentity, is_alive
from launcher.attempts import attempt_lines, end_note
from launcher.follow import watch
from launcher.progress import Progress
from launcher.run_dir import RunDir, read_json, write_json
from launcher.status import read_status
from launcher.supervise import Supervisor

ENV = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}", "OMP_NUM_THREADS": "1"}
RETRY = {"crashes": 2, "node_losses": 2, "preemptions": 2, "hangs": 1, "wait_s": 0.01}


class Case:
    """A run of two stages, `prepare` and `train`, of which the second ends as the script says."""

    def __init__(
        self, root: Path, script: list[str], num_processes: int = 1, hang_s: float = 0, **retry: float
    ) -> None:
        self.run, self.out = RunDir(root), io.StringIO()
        jobs = [self._job("prepare", script, 1), self._job("train", script, num_processes)]
        plan = {
            "backend": "torchrun",
            "jobs": [dataclasses.asdict(job) for job in jobs],
            "retry": {**RETRY, **retry},
            "hang_s": hang_s,
            "spec": {"debug": False, "parallel": {"timeout_s": 60, "device": "cpu"}},
        }
        write_json(self.run.plan, plan)
        self.supervisor = Supervisor(self.run, read_json(self.run.plan), 1, Progress(self.run, self.out))

    def _job(self, stage: str, script: list[str], num_processes: int) -> JobSpec:
        log_dir = str(self.run.logs(1, stage))
        attempt = ("--attempt", "1") if stage == "train" else ()
        args = (stage, "--log-dir", log_dir, "--script", json.dumps(script), "--trail", str(self.trail), *attempt)
        name = self.run.run_id
        return JobSpec(stage, "attempt_worker", args, num_processes, (), ENV, log_dir, str(self.run.root), name)

    @property
    def trail(self) -> Path:
        return self.run.root / "trail"

    def starts(self) -> list[list[str]]:
        """[stage, rank, pid, attempt's folder] of every process that was started."""
        return [line.split() for line in self.trail.read_text(encoding="utf-8").splitlines()]

    def go(self) -> int:
        code = self.supervisor.go()
        assert not any(is_alive(p) for _, _, pid, _ in self.starts() if (p := ProcessIdentity.of(int(pid))))
        return code

    def causes(self) -> list[str]:
        return [attempt.cause for attempt in read_status(self.run).attempts]


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., Case]:
    return lambda script, *args, **kwargs: Case(tmp_path, script, *args, **kwargs)


def later(action: Callable[[], object], when: Callable[[], bool]) -> threading.Thread:
    def act() -> None:
        wait_until(when, 20)
        action()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_a_crash_becomes_a_new_attempt_with_its_own_logs_and_what_is_done_stays_done(
    case: Callable[..., Case],
) -> None:
    one = case(["kill", "done"])
    assert one.go() == 0
    assert [(stage, folder) for stage, _, _, folder in one.starts()] == [
        ("prepare", "attempt_1"),
        ("train", "attempt_1"),
        ("train", "attempt_2"),
    ]
    assert one.causes() == ["crash", "done"]
    status = read_status(one.run)
    assert (status.state, status.attempt, status.failure, status.next_attempt_at) == ("succeeded", 2, None, None)
    assert status.stages == {"prepare": "done", "train": "done"}
    train = read_json(one.run.plan)["jobs"][1]
    assert train["log_dir"] == str(one.run.logs(2, "train"))
    assert train["args"][train["args"].index("--attempt") + 1] == "2"
    assert "attempt 2 (crash 1 of 2 within 1000 steps): rank 0 was killed by SIGKILL" in one.out.getvalue()
    assert "going on from the beginning in 0.01 s" in one.out.getvalue()
    events = [json.loads(line) for line in one.run.events.read_text(encoding="utf-8").splitlines()]
    assert [(e["event"], e["attempt"], e["cause"]) for e in events] == [
        ("attempt_ended", 1, "crash"),
        ("attempt_ended", 2, "done"),
    ]
    assert 0 <= status.attempts[0].noticed_s < 10
    shown = "\n".join(attempt_lines(status.attempts, time.time()))
    assert "rank 0 was killed by SIGKILL" in shown
    assert "tried again: crash 1 of 2 within 1000 steps" in shown


@pytest.mark.parametrize(
    ("script", "code", "causes", "why"),
    [
        (["user"], 2, ["user"], "until something is changed"),
        (["bug"], 70, ["bug"], "would come again"),
        (["kill", "bug"], 70, ["crash", "bug"], "would come again"),
        # The pid in the message differs, the failure does not.
        (["retry", "retry"], 75, ["crash", "crash"], "the same failure at the same place (step 0) twice"),
        (["retry", "kill", "term", "user"], 2, ["crash", "crash", "preemption", "user"], "until something is changed"),
        (
            ["term", "term", "term"],
            75,
            ["preemption"] * 3,
            "preemption 3 within 1000 steps, and retry.preemptions is 2",
        ),
    ],
)
def test_what_is_tried_again(
    case: Callable[..., Case], script: list[str], code: int, causes: list[str], why: str
) -> None:
    one = case(script)
    assert one.go() == code
    assert one.causes() == causes
    status = read_status(one.run)
    assert (status.state, status.stages["train"]) == ("failed", "failed")
    assert why in status.attempts[-1].why
    assert status.failure["exit_code"] == code
    assert (why in end_note(status.attempts)) == (len(causes) > 1)


def test_a_debug_plan_stops_at_the_first(case: Callable[..., Case]) -> None:
    one = case(["kill", "done"], crashes=0)
    assert one.go() == 75
    assert "not tried again: retry.crashes is 0" in end_note(read_status(one.run).attempts)


@pytest.mark.parametrize(("signum", "cause"), [(signal.SIGINT, "crash"), (signal.SIGTERM, "crash")])
def test_a_signal_while_it_waits_stops(case: Callable[..., Case], signum: int, cause: str) -> None:
    one = case(["kill", "done"], wait_s=30)
    waiting = lambda: one.run.status.is_file() and read_status(one.run).next_attempt_at is not None  # noqa: E731
    thread = later(lambda: os.kill(os.getpid(), signum), waiting)
    began = time.monotonic()
    assert one.go() == 130
    thread.join()
    assert time.monotonic() - began < 25
    status = read_status(one.run)
    assert (status.state, status.stages["train"], status.next_attempt_at) == ("stopped", "stopped", None)
    assert one.causes() == [cause]
    assert not status.attempts[0].retried


def test_a_scheduler_that_ends_all_processes_is_a_preemption_and_no_failure(case: Callable[..., Case]) -> None:
    one = case(["wait"])

    def end_all() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(int(one.starts()[-1][2]), signal.SIGTERM)

    thread = later(end_all, lambda: one.trail.is_file() and len(one.starts()) == 2)
    assert one.go() == 130
    thread.join()
    status = read_status(one.run)
    assert (status.state, one.causes()) == ("stopped", ["preemption"])
    assert "launch runs resume" in status.attempts[0].why


def test_a_job_that_cannot_be_asked_is_waited_for_and_shown_as_unknown(case: Callable[..., Case]) -> None:
    one = case(["hang/x", "done"], hang_s=2)
    poll, until, seen = one.supervisor.backend.poll, time.monotonic() + 5, []

    def unreachable(handle: object) -> JobStatus:
        if one.supervisor.status.stage == "train" and time.monotonic() < until:
            seen.append(read_status(one.run).shown_state)
            return JobStatus(JobState.UNKNOWN, None, None)
        return poll(handle)

    one.supervisor.backend.poll = unreachable  # type: ignore[method-assign]  # a link that is cut
    assert one.go() == 0
    assert seen[-1] == "unknown"
    assert "cannot be reached" in one.out.getvalue()
    assert "reachable again" in one.out.getvalue()
    # Silence counts only from when it could be asked again, and nothing was started meanwhile.
    first = read_status(one.run).attempts[0]
    assert first.cause == "hang"
    assert first.ended - first.started > 5 + 1.5


@pytest.mark.parametrize("frozen", [False, True])
def test_a_hang_names_the_rank_that_is_behind_and_keeps_all_stacks(case: Callable[..., Case], frozen: bool) -> None:
    one = case(["wait/hang" if not frozen else "wait/wait", "done"], 2, hang_s=4)
    folder = one.run.logs(1, "train")
    if frozen:

        def both_wait() -> bool:
            files = [folder / f"heartbeat_rank_{rank}.json" for rank in (0, 1)]
            return all(f.is_file() and "optimizer" in f.read_text() for f in files)

        stopped = lambda: os.kill(read_json(folder / "heartbeat_rank_1.json")["pid"], signal.SIGSTOP)  # noqa: E731
        thread = later(stopped, both_wait)
    assert one.go() == 0
    if frozen:
        thread.join()
    assert one.causes() == ["hang", "done"]
    told = read_status(one.run).attempts[0].message
    phase = "optimizer, its process is frozen" if frozen else "forward"
    assert f"rank 1 is behind: rank 1: step 3, micro batch 2, {phase}, at support/attempt_worker.py:" in told
    assert told.endswith("in wait_for_nobody")
    for rank in (0, 1):
        assert "attempt_worker.py" in (folder / f"stacks_rank_{rank}.txt").read_text()
        assert "wait_for_nobody" in (folder / f"stacks_rank_{rank}.txt").read_text()
    page = (folder / "hang.txt").read_text()
    assert "rank 0: step 3, micro batch 2, optimizer" in page
    assert 4 <= read_status(one.run).attempts[0].noticed_s < 12
    # Nobody asked the second attempt for its stacks.
    assert not list(one.run.logs(2, "train").glob("stacks*"))


def test_who_watches_from_outside_is_told_the_same(
    case: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    one = case(["kill", "done"], wait_s=1)
    codes: list[int] = []
    thread = later(lambda: codes.append(watch(one.run)), one.run.status.is_file)
    assert one.go() == 0
    thread.join()
    told = capsys.readouterr().out
    assert codes == [0]
    assert "attempt 2 (crash 1 of 2 within 1000 steps): rank 0 was killed by SIGKILL" in told
    assert told.index("FAILED") < told.index("attempt 2") < told.rindex("done")


def test_a_launcher_that_was_killed_is_an_attempt_of_its_own(case: Callable[..., Case]) -> None:
    one = case(["kill", "done"])
    assert one.go() == 0
    status = read_status(one.run)
    status.attempts[-1].ended, status.attempts[-1].cause = None, ""
    status.write(one.run)
    again = Supervisor(one.run, read_json(one.run.plan), 3, Progress(one.run, io.StringIO()))
    assert again.go(frozenset({"prepare", "train"})) == 0
    attempts = read_status(one.run).attempts
    assert [(a.number, a.cause) for a in attempts] == [(1, "crash"), (2, "crash"), (3, "done")]
    assert "ended without a word" in attempts[1].message
