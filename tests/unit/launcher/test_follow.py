"""Reading and stopping a run from outside, through its folder alone."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path

import pytest

from cluster.job import JobSpec
from cluster.processes import ProcessIdentity
from launcher import follow
from launcher.errors import LaunchError
from launcher.follow import print_logs, stop, watch
from launcher.run_dir import RunDir
from launcher.status import RUNNING, STOPPED, SUCCEEDED, Attempt, Status


def running(root: Path, host: str) -> tuple[RunDir, Status]:
    """A run whose supervisor is this process, or some process of another host."""
    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    now = time.time()
    status = Status("r", RUNNING, 1, "train", {"train": RUNNING}, me.pid, me.start_ticks, host, now, now)
    run = RunDir(root)
    status.write(run)
    return run, status


def later(action, seconds: float = 0.5) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_a_run_of_another_host_is_stopped_through_the_shared_folder(tmp_path: Path, capsys) -> None:
    run, status = running(tmp_path, "beta.elsewhere")

    def supervisor() -> None:
        while not run.stop_request.exists():
            time.sleep(0.01)
        dataclasses.replace(status, state=STOPPED, exit_code=130).write(run)

    timer = later(supervisor, 0)
    stop(run, now=False, wait_s=10)
    timer.join()
    assert capsys.readouterr().out.endswith("stopped\n")


def test_a_run_of_another_host_is_not_killed_from_here(tmp_path: Path) -> None:
    run, _ = running(tmp_path, "beta.elsewhere")
    with pytest.raises(LaunchError, match=r"started on beta\.elsewhere") as refused:
        stop(run, now=True, wait_s=1)
    assert "Or on beta.elsewhere: launch runs stop" in refused.value.hint
    assert not run.stop_request.exists()


@pytest.mark.parametrize("looks", [(0, 1, 2, 3), (0, 2, 3), (0, 1, 3), (1, 3)], ids=str)
def test_who_watches_is_told_of_a_failed_attempt_however_seldom_they_look(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, looks: tuple[int, ...]
) -> None:
    """Looks: in prepare, in the first attempt of train, while it waits for the second, in the second."""
    run, status = running(tmp_path, "beta.elsewhere")
    jobs = [
        JobSpec(n, "w", (), 1, (), {}, str(tmp_path), str(tmp_path), "r") for n in ("prepare", "train", "consolidate")
    ]
    run.plan.write_text(
        json.dumps({"jobs": [dataclasses.asdict(job) for job in jobs], "spec": {"debug": False}}), encoding="utf-8"
    )
    stages = {"prepare": "done", "train": RUNNING, "consolidate": "waiting"}
    failed = Attempt(1, 1.0, 2.0, "train", 3, "crash", "killed", None, True, "crash 1 of 2", 1.0)
    first = dataclasses.replace(status, stages=stages, attempts=[Attempt(1, 1.0)])
    moments = (
        dataclasses.replace(first, stage="prepare", stages={**stages, "prepare": RUNNING, "train": "waiting"}),
        first,
        dataclasses.replace(first, stages={**stages, "train": "waiting"}, attempts=[failed], next_attempt_at=9.0),
        dataclasses.replace(first, attempts=[failed, Attempt(2, 3.0)], attempt=2),
    )
    end = dataclasses.replace(moments[3], state=SUCCEEDED, exit_code=0, stages={**stages, "train": "done"})
    answers = [moments[i] for i in (looks[0], *looks)] + [end] * 3
    monkeypatch.setattr(follow, "read_status", lambda _: answers.pop(0) if len(answers) > 1 else answers[0])
    monkeypatch.setattr(follow, "POLL_S", 0.0)
    assert watch(run) == 0
    said = capsys.readouterr().out
    assert said.count("FAILED") == said.count("attempt 2") == 1
    assert said.index("FAILED") < said.index("attempt 2") < said.rindex("train        done")


def test_followed_logs_name_their_rank_and_begin_where_the_tail_ended(tmp_path: Path, capsys) -> None:
    run, status = running(tmp_path, "beta.elsewhere")
    folder = run.logs(1, "train")
    folder.mkdir(parents=True)
    first, second = folder / "rank_0.log", folder / "rank_1.log"
    first.write_text("old 0\n", encoding="utf-8")
    character = "微".encode()

    def write() -> None:
        with first.open("ab") as log:
            log.write(b"new " + character[:2])
            log.flush()
            second.write_text("begins later\n", encoding="utf-8")
            time.sleep(0.5)
            log.write(character[2:] + b"\n")
        dataclasses.replace(status, state=STOPPED, exit_code=130).write(run)

    timer = later(write)
    print_logs(run, None, None, 5, follow=True)
    timer.join()
    said = capsys.readouterr().out.splitlines()
    assert said == [f"== {first}", "old 0", "[rank 1] begins later", "[rank 0] new 微"]
