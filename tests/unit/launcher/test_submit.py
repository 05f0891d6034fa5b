"""`launch submit` and `launch runs` on what was submitted, against a real HTTP server that stands in for Ray's dashboard."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import ROOT
from support.ray_head import TOKEN, RayHead, ray_head

from launcher.cli import main
from launcher.errors import LaunchError
from launcher.submission import STATUS_MARK, last_status, visible
from launcher.submit import remote_run_dir, travelling

Cli = Callable[..., tuple[int, str]]
ROW = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
STAGES = {"prepare": "done", "train": "failed", "merge": "waiting"}
FAILURE = {
    "rank": 1,
    "kind": "user",
    "message": "out of memory on GPU 1",
    "hint": "Use a smaller train.micro_batch.",
    "traceback": "",
    "exit_code": 2,
    "log_file": "/remote/logs/attempt_1/train/rank_1.log",
}


@pytest.fixture
def head() -> Iterator[RayHead]:
    with ray_head() as found:
        yield found


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`launch ...` in a folder with a recipe; returns (exit code, all that was printed)."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_AUTH_TOKEN_PATH", "HF_ENDPOINT", "HF_HUB_OFFLINE", "NCCL_DEBUG", "TUNELAUNCH_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(ROW, encoding="utf-8")
    (tmp_path / "q.yaml").write_text("model: a/b\nmethod: lora\ndata: rows.jsonl\n", encoding="utf-8")

    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["launch", *argv])
        with pytest.raises(SystemExit) as caught:
            main(list(argv))
        shown = capsys.readouterr()
        assert TOKEN not in shown.out + shown.err
        return int(caught.value.code or 0), shown.out + shown.err

    return run


@pytest.fixture
def submitted(cli: Cli, head: RayHead) -> str:
    """The run id of a submitted run."""
    code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1", "--run-dir", "/remote/r1")
    assert code == 0, text
    return "r1"


def record(run_id: str) -> dict[str, Any]:
    return json.loads(Path("runs", run_id, "submission.json").read_text(encoding="utf-8"))


def status_line(**values: object) -> str:
    base = {"run_id": "r1", "state": "running", "stage": "train", "stages": STAGES, "seconds": {"prepare": 1.25}}
    return STATUS_MARK + json.dumps({**base, "run_dir": "/remote/r1", "failure": None, **values}) + "\n"


def test_a_submission(cli: Cli, head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com")
    monkeypatch.setenv("HF_TOKEN", "canary-hf")
    monkeypatch.setenv("SECRET_OF_MINE", "canary-other")
    code, text = cli("submit", "q.yaml", "--ray", head.url, "--gpus", "free:2", "--set", "secrets=[HF_TOKEN]")
    assert code == 0, text
    (run_id,) = head.jobs
    job = head.jobs[run_id]
    assert "data/rows.jsonl" in text
    assert run_id in text
    assert "launch runs watch" in text
    assert "HF_TOKEN (read on" in text
    package = job["runtime_env"]["working_dir"].removeprefix("gcs://")
    assert job["runtime_env"] == {
        "working_dir": f"gcs://{package}",
        "env_vars": {"HF_ENDPOINT": "https://hf-mirror.com", "RAY_JOB_STOP_WAIT_TIME_S": "600"},
    }
    assert job["entrypoint"] == (
        f"exec python -P -m launcher _submitted q.yaml --run-dir '~/runs/{run_id}' --expects 0.1.0 "
        f"--package {package} --backend ray --gpus free:2"
    )
    found = record(run_id)
    assert (found["run_id"], found["state"], found["run_dir"]) == (run_id, "pending", f"~/runs/{run_id}")
    everything = json.dumps([job, found]) + text + head.packages[package].decode("latin-1")
    assert "canary" not in everything
    # The requests without a token come first: nothing is sent to a cluster that anybody may use.
    assert [sent for *_, sent in head.requests[:2]] == ["", ""]
    assert all(sent for *_, sent in head.requests[2:])


def test_the_same_files_are_sent_once(cli: Cli, head: RayHead) -> None:
    for _ in range(2):
        code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1")
        assert code == 0
    assert "nothing is sent" in text
    assert [method for method, *_ in head.requests].count("PUT") == 1
    assert len(head.jobs) == 2


def test_a_dry_run_asks_nobody(cli: Cli, head: RayHead) -> None:
    code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1", "--dry-run")
    assert code == 0
    assert "rows.jsonl" in text
    assert not head.requests
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ray", "http://10.0.0.1:8265"], "plain http to another machine"),
        (["--upload-limit", "50"], "the limit is 50 B"),
        (["--run-dir", "runs/x"], "is a folder on the cluster"),
        (["--gpus", "0,1"], "--gpus 0,1: Ray gives devices away by number"),
        ([], "how many devices?"),
        (["--backend", "rya"], "Choose one of: ray, torchrun"),
        (["--shared", "data"], "is not an absolute path"),
        (["--ca", "none.pem", "--ray", "https://localhost:1"], "no certificates can be read"),
    ],
)
def test_refusals_before_anything_is_sent(cli: Cli, head: RayHead, flags: list[str], said: str) -> None:
    amount = [] if not flags or "--gpus" in flags else ["--cpu", "1"]
    code, text = cli("submit", "q.yaml", "--ray", head.url, *amount, *flags)
    assert (code, head.packages, head.jobs) == (2, {}, {})
    assert said in text
    assert not Path("runs").exists()


def test_an_unprotected_cluster_gets_neither_files_nor_token(cli: Cli) -> None:
    with ray_head(token=None) as head:
        code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1")
        assert code == 2
        assert "CVE-2023-48022" in text
        assert not head.packages
        assert all(sent == "" for *_, sent in head.requests)
        code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1", "--insecure")
        assert code == 0
        assert len(head.jobs) == 1


def test_without_a_token_nothing_is_sent(cli: Cli, head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1")
    assert code == 2
    assert "no token" in text
    assert not head.requests


def test_a_job_that_is_refused_leaves_no_record(cli: Cli, head: RayHead) -> None:
    head.faults["POST", "/api/jobs/"] = (400, "Traceback\nValueError: bad label\n")
    code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1")
    assert code == 2
    assert "ValueError: bad label" in text
    assert not list(Path("runs").iterdir())


def test_an_answer_that_is_lost_loses_no_job(cli: Cli, head: RayHead) -> None:
    head.lose_answers_to = "POST"
    code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1", "--insecure")
    assert code == 0, text
    (run_id,) = head.jobs
    assert record(run_id)["state"] == "pending"


def test_an_answer_that_is_lost_with_the_cluster_is_told(cli: Cli, head: RayHead) -> None:
    head.faults["POST", "/api/jobs/"] = (503, "overloaded")
    code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1")
    assert code == 75
    assert "It may have been accepted all the same" in text
    (run_id,) = [p.name for p in Path("runs").iterdir()]
    code, text = cli("runs", "show", run_id)
    assert "unknown" in text
    assert "it was never accepted" in text


@pytest.mark.parametrize(
    ("ray_says", "shown"),
    [
        ("PENDING", "pending"),
        ("RUNNING", "running"),
        ("SUCCEEDED", "succeeded"),
        ("FAILED", "failed"),
        ("STOPPED", "stopped"),
    ],
)
def test_states(cli: Cli, head: RayHead, submitted: str, ray_says: str, shown: str) -> None:
    head.set_job("r1", ray_says, "start\n" + status_line(), driver_exit_code=70, end_time=5000)
    code, text = cli("runs", "list")
    assert code == 0
    assert text.split()[:2] == ["r1", shown]
    assert cli("runs", "show", "r1")[1].splitlines()[0] == f"r1  {shown}"
    assert cli("runs", "status", "r1") == cli("runs", "show", "r1")


def test_a_run_that_is_stopped_on_the_cluster_is_not_failed(cli: Cli, head: RayHead, submitted: str) -> None:
    head.set_job("r1", "FAILED", "", driver_exit_code=130)
    assert cli("runs", "show", "r1")[1].splitlines()[0] == "r1  stopped"


def test_unreachable_is_unknown_and_never_failed(cli: Cli, submitted: str, head: RayHead) -> None:
    head.set_job("r1", "RUNNING", "start\n" + status_line())
    cli("runs", "list")
    for fault, why in (((503, "gone"), "failed (503)"), ((403, "no"), "refuses the token")):
        head.faults["GET", "/api/jobs/"] = fault
        for argv in (("runs", "list"), ("runs", "show", "r1")):
            code, text = cli(*argv)
            assert code == 0
            assert "unknown" in text
            assert why in text
            assert "last seen running" in text
    assert record("r1")["state"] == "running"


def test_a_cluster_that_forgot_the_run(cli: Cli, head: RayHead, submitted: str) -> None:
    head.jobs.clear()
    text = cli("runs", "show", "r1")[1]
    assert "unknown" in text
    assert "the cluster was restarted" in text


def test_a_run_that_has_ended_is_known_without_the_cluster(cli: Cli, submitted: str, head: RayHead) -> None:
    log = "Running entrypoint\nstep 1\n" + status_line(state="failed", exit_code=2, failure=FAILURE) + "the end\n"
    head.set_job("r1", "FAILED", log, driver_exit_code=2, start_time=1000, end_time=5000)
    code, text = cli("runs", "watch", "r1")
    assert code == 2
    assert "step 1\nthe end\n" in text
    assert "r1 failed" in text
    assert STATUS_MARK not in text
    asked = len(head.requests)
    text = cli("runs", "show", "r1")[1]
    assert "rank 1: out of memory on GPU 1" in text
    assert "smaller train.micro_batch" in text
    assert "(on the cluster)" in text
    assert "prepare       done  1.2 s" in text
    assert "merge         waiting" in text
    assert cli("runs", "logs", "r1", "-n", "1") == (0, "the end\n")
    assert cli("runs", "list")[1].split()[1] == "failed"
    assert cli("runs", "watch", "r1")[0] == 2
    assert len(head.requests) == asked


def test_a_log_that_cannot_be_had_at_the_end_is_asked_for_again(cli: Cli, head: RayHead, submitted: str) -> None:
    log = "Running entrypoint\n" + status_line(state="failed", exit_code=2, failure=FAILURE) + "the end\n"
    head.set_job("r1", "FAILED", log, driver_exit_code=2, end_time=int(time.time() * 1000))
    head.faults["GET", "/api/jobs/r1/logs"] = (503, "slow")
    assert cli("runs", "list")[1].split()[1] == "failed"
    assert cli("runs", "watch", "r1")[0] == 2
    assert record("r1")["state"] == "pending"
    head.faults.clear()
    assert "rank 1: out of memory on GPU 1" in cli("runs", "show", "r1")[1]
    assert cli("runs", "logs", "r1", "-n", "1") == (0, "the end\n")
    head.set_job("r1", "RUNNING", "")  # an answer that was long on its way
    assert cli("runs", "list")[1].split()[1] == "failed"


def test_a_log_that_went_with_its_node_is_given_up(cli: Cli, head: RayHead, submitted: str) -> None:
    head.set_job("r1", "SUCCEEDED", "", end_time=5000)
    head.faults["GET", "/api/jobs/r1/logs"] = (500, "the node is gone")
    assert cli("runs", "list")[1].split()[1] == "succeeded"
    assert record("r1")["state"] == "succeeded"


def test_what_failed_while_it_was_stopped_is_failed(cli: Cli, head: RayHead, submitted: str) -> None:
    log = "start\n" + status_line(state="failed", exit_code=2, failure={**FAILURE, "exit_code": 75})
    head.set_job("r1", "STOPPED", log, end_time=5000)
    assert cli("runs", "watch", "r1")[0] == 75
    assert cli("runs", "show", "r1")[1].splitlines()[0] == "r1  failed"


def test_a_job_of_that_name_is_never_taken_for_this_one(cli: Cli, head: RayHead, submitted: str) -> None:
    shutil.rmtree("runs")  # as from another folder, or by another person
    code, text = cli("submit", "q.yaml", "--ray", head.url, "--cpu", "1", "--run-dir", "/other/r1")
    assert code == 2
    assert "has a job r1 already" in text
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("code", "message", "said"),
    [
        (1, "... /usr/bin/python: No module named launcher", "has no tunelaunch"),
        (2, "Error: No such command '_submitted'.", "takes no submitted runs"),
        (127, "sh: 1: exec: python: not found", "has no such Python"),
        (None, "runtime_env setup failed: no space", "runtime_env setup failed: no space"),
        (
            None,
            "Job supervisor actor died: It died.\n\tpid: 1\n\tip: 10.0.0.1\nIt is dead.",
            "died (on 10.0.0.1); how the run",
        ),
    ],
)
def test_failures_before_the_launcher_can_speak(
    cli: Cli, head: RayHead, submitted: str, code: int | None, message: str, said: str
) -> None:
    head.set_job("r1", "FAILED", message + "\n", message=message, driver_exit_code=code)
    assert said in cli("runs", "show", "r1")[1]
    assert cli("runs", "watch", "r1")[0] == (75 if code is None else 2)


def test_logs_and_stop(cli: Cli, head: RayHead, submitted: str) -> None:
    head.set_job("r1", "RUNNING", "one\ntwo\n" + status_line() + "three\n")
    assert cli("runs", "logs", "r1", "-n", "2") == (0, "two\nthree\n")
    code, text = cli("runs", "logs", "r1", "--rank", "0")
    assert code == 2
    assert "its files are there" in text
    code, text = cli("runs", "stop", "r1", "--now")
    assert code == 2
    assert head.jobs["r1"]["status"] == "RUNNING"
    assert "/remote/r1 --now" in text
    code, text = cli("runs", "stop", "r1")
    assert code == 0
    assert "with a checkpoint" in text
    assert text.endswith("r1 stopped\n")
    code, text = cli("runs", "stop", "r1")
    assert code == 2
    assert "is not running (stopped)" in text


def test_watch_shows_each_line_once_and_outlives_a_lost_connection(head: RayHead, cli: Cli, submitted: str) -> None:
    head.set_job("r1", "RUNNING", "one\ntw")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    watch = subprocess.Popen(
        [sys.executable, "-P", "-m", "launcher", "runs", "watch", "r1"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert watch.stdout is not None
    assert watch.stdout.readline() == "one\n"
    head.faults["GET", "/api/jobs/"] = (503, "gone")
    assert "the run may well go on" in watch.stdout.readline()
    head.set_job("r1", "SUCCEEDED", "one\ntwo\n" + status_line() + "three")
    head.faults.clear()
    rest, _ = watch.communicate(timeout=30)
    assert rest == "two\nthree\nr1 succeeded\n"
    assert watch.returncode == 0


def test_logs_follow_to_the_end(cli: Cli, head: RayHead, submitted: str) -> None:
    import threading

    head.set_job("r1", "RUNNING", "one\n")
    timer = threading.Timer(1.5, lambda: head.set_job("r1", "STOPPED", "one\ntwo\n", end_time=int(time.time() * 1000)))
    timer.start()
    assert cli("runs", "logs", "r1", "-f") == (0, "one\ntwo\n")


def test_the_client_needs_nothing_heavy(cli: Cli, head: RayHead, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom launcher.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'requests', 'aiohttp'} & set(sys.modules)\nassert not heavy, heavy"
    )
    argv = [sys.executable, "-P", "-c", code, "submit", "q.yaml", "--ray", head.url, "--cpu", "1"]
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(head.jobs) == 1


@pytest.mark.parametrize(
    "value", ["https://me:canary@mirror.org", "https://m.org/hf_abcdefgh1234", "https://m.org/?k=sk-canary1234567"]
)
def test_variables_that_look_secret_do_not_travel(value: str) -> None:
    with pytest.raises(LaunchError) as caught:
        travelling({"HF_ENDPOINT": value})
    assert value not in str(caught.value)


def test_only_listed_variables_travel() -> None:
    env = {
        "HF_ENDPOINT": "https://hf-mirror.com",
        "HF_TOKEN": "x",
        "RAY_AUTH_TOKEN": "x",
        "PATH": "/bin",
        "HF_HOME": "/h",
    }
    assert travelling(env) == {"HF_ENDPOINT": "https://hf-mirror.com"}


@pytest.mark.parametrize(
    ("given", "parent", "expected"),
    [
        (None, "runs", "~/runs/ID"),
        (None, "team/x/", "~/team/x/ID"),
        (None, "/shared/runs/", "/shared/runs/ID"),
        (None, "~/r", "~/r/ID"),
        ("/shared/a b", "runs", "/shared/a b"),
        ("~/x/", "/elsewhere", "~/x"),
    ],
)
def test_run_folders_on_the_cluster(given: str | None, parent: str, expected: str) -> None:
    assert remote_run_dir(given, parent, "ID") == expected


def test_a_status_line_that_is_cut_or_not_ours_is_not_taken() -> None:
    whole = "x\n" + status_line(state="succeeded")
    assert last_status(whole)["state"] == "succeeded"
    assert last_status(whole[:-1]) == {}
    assert last_status("x\n" + STATUS_MARK + "{\n") == {}
    assert last_status("") == {}
    assert visible(whole + "y") == "x\ny"
