"""One attempt of a run: one supervisor a folder, nothing overwritten, failures on a full disk told as such."""

import dataclasses
import io
import json
from pathlib import Path

import pytest

from cluster.job import Failure, JobSpec, Meeting, NodeShare
from launcher.errors import LaunchError
from launcher.progress import Progress
from launcher.run_dir import RunDir
from launcher.stages import renumbered, set_output_aside
from launcher.status import CRASHED, RUNNING, read_status
from launcher.supervise import Supervisor, failure_text, hold

JOB = JobSpec("merge", "trainer.worker", ("merge", "--out", "X"), 1, (), {}, "L", "C", "run")


def supervisor(root: Path) -> Supervisor:
    run = RunDir(root)
    return Supervisor(run, {"backend": "torchrun", "jobs": [], "retry": {}}, 1, Progress(run, io.StringIO()))


def test_second_launcher_is_refused(tmp_path: Path) -> None:
    first = hold(supervisor(tmp_path).run)
    with pytest.raises(LaunchError, match="another launcher"):
        supervisor(tmp_path).go()
    first.close()
    assert supervisor(tmp_path).go() == 0


def test_job_survives_the_plan_file() -> None:
    assert JobSpec.from_dict(json.loads(json.dumps(dataclasses.asdict(JOB)))) == JOB
    nodes = (NodeShare("a", 1, ("GPU-1",)), NodeShare("b", 2, ("GPU-2", "GPU-3"), "/b/python"))
    over_hosts = dataclasses.replace(JOB, nodes=nodes, meeting=Meeting(29500, 10.0, 20.0))
    assert JobSpec.from_dict(json.loads(json.dumps(dataclasses.asdict(over_hosts)))) == over_hosts


def test_a_job_of_a_run_that_knew_no_hosts_is_read() -> None:
    data = json.loads(json.dumps(dataclasses.asdict(JOB)))
    del data["nodes"], data["meeting"]
    assert JobSpec.from_dict(data) == JOB


def test_output_of_an_earlier_job_is_set_aside(tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "mine").touch()
    set_output_aside(dataclasses.replace(JOB, args=("merge", "--out", str(out))), 2)
    assert not out.exists()
    assert (tmp_path / "merged.before_attempt_2" / "mine").exists()


def test_another_attempt_has_its_own_logs(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log_dir = str(run.logs(1, "train"))
    job = dataclasses.replace(
        JOB, name="train", log_dir=log_dir, args=("train", "--log-dir", log_dir, "--attempt", "1")
    )
    again = renumbered(job, run, 2)
    assert again.log_dir == str(run.logs(2, "train"))
    assert again.args == ("train", "--log-dir", again.log_dir, "--attempt", "2")


def test_full_disk_is_the_cause_when_the_worker_could_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = Failure(0, "bug", "exit code 70", "", "", 70, "log")
    assert supervisor(tmp_path)._with_full_disk(failure) == failure
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0})())
    told = supervisor(tmp_path)._with_full_disk(failure)
    assert told.exit_code == 2
    assert "No space left on device" in told.message


def test_running_without_a_supervisor_is_crashed_here_and_unknown_elsewhere(tmp_path: Path) -> None:
    one = supervisor(tmp_path)
    one.status.write(one.run)
    assert read_status(one.run).state == RUNNING
    one.status.pid_start += 1
    one.status.write(one.run)
    assert read_status(one.run).state == CRASHED
    one.status.host = "another-host"
    one.status.write(one.run)
    assert read_status(one.run).state == RUNNING


def test_first_cause_names_rank_fix_and_log() -> None:
    failure = dataclasses.asdict(Failure(3, "user", "data is missing", "Give it.", "", 2, "/logs/rank_3.log"))
    assert failure_text(failure) == "rank 3: data is missing\nGive it.\nlog: /logs/rank_3.log"
