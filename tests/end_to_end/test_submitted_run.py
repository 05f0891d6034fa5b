"""What Ray starts on the cluster for `launch submit`, started here as Ray does: by a shell, in a session of its own, SIGINT blocked."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.commands import ROOT, wait_until, worker_pids

from cluster.processes import descendants
from launcher.submission import STATUS_MARK, last_status

LONG = "model: {source: random:model, dtype: fp32}\nmethod: lora\ndata: {files: data/rows.jsonl, max_length: 256}\n" + (
    "train: {max_steps: 100000, micro_batch: 1, global_batch: 4}\ncheckpoint: {every_steps: 100000}\n"
)
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def uploaded(tmp_path: Path) -> Path:
    """A folder as Ray unpacks it."""
    folder = tmp_path / "working_dir"
    for source, target in (("tiny", "model"), ("data/example_chat.jsonl", "data/rows.jsonl")):
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        copy = subprocess.run(["cp", "-r", str(ROOT / "recipes" / source), str(folder / target)], check=False)
        assert copy.returncode == 0
    (folder / "long.yaml").write_text(LONG, encoding="utf-8")
    return folder


@pytest.fixture
def start(environment: dict[str, str], uploaded: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def run(*flags: str, expects: str = "0.1.0", run_dir: str = "") -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-P", "-m", "launcher", "_submitted", "long.yaml", "--package", "_ray_pkg_1.zip"]
        argv += [
            "--expects",
            expects,
            "--backend",
            "torchrun",
            "--cpu",
            "1",
            "--run-dir",
            run_dir or "~/runs/r1",
            *flags,
        ]
        env = {**environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HOME": str(tmp_path)}
        with open(tmp_path / "job.log", "ab") as log:
            process = subprocess.Popen(
                f"exec {shlex.join(argv)}",
                shell=True,
                start_new_session=True,
                cwd=uploaded,
                env=env,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}),
            )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def training(run: Path) -> None:
    wait_until(lambda: (run / "metrics.jsonl").is_file() and bool(worker_pids(run)), 120, "training")


def log(tmp_path: Path) -> str:
    return "\n" + (tmp_path / "job.log").read_text(encoding="utf-8")


def test_rays_stop_saves_a_checkpoint_and_leaves_nothing(start: Start, tmp_path: Path, uploaded: Path) -> None:
    process, run = start(), tmp_path / "runs" / "r1"
    training(run)
    # As Ray's job supervisor does it: SIGTERM to the command and to every descendant of it.
    victims = [process.pid, *(p.pid for p in descendants(process.pid))]
    for pid in victims:
        os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert len(list((run / "checkpoints").glob("step_*/manifest.json"))) == 1
    assert worker_pids(run) == []
    status = last_status(log(tmp_path))
    assert (status["state"], status["stages"]["train"], status["run_dir"]) == ("stopped", "stopped", str(run))
    # The run does not need the upload any more: its recipe names the copy beside the run folders.
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    copy = tmp_path / "runs" / ".inputs" / "_ray_pkg_1"
    assert plan["spec"]["data"]["files"][0]["path"] == str(copy / "data" / "rows.jsonl")
    assert (copy / "data" / "rows.jsonl").read_bytes() == (uploaded / "data" / "rows.jsonl").read_bytes()
    assert str(uploaded) not in (run / "recipe.yaml").read_text(encoding="utf-8")


def test_a_stop_on_the_cluster_itself_reaches_a_process_whose_sigint_ray_has_blocked(
    start: Start, tmp_path: Path, environment: dict[str, str]
) -> None:
    process, run = start(), tmp_path / "runs" / "r1"
    training(run)
    argv = [sys.executable, "-P", "-m", "launcher", "runs", "stop", str(run)]
    done = subprocess.run(
        argv, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert process.wait(timeout=30) == 130
    assert last_status(log(tmp_path))["state"] == "stopped"


def test_when_ray_kills_the_command_the_launcher_saves_and_ends_too(start: Start, tmp_path: Path) -> None:
    process, run = start(), tmp_path / "runs" / "r1"
    training(run)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not worker_pids(run), 60, "the end of the workers")
    wait_until(lambda: json.loads((run / "status.json").read_text())["state"] == "stopped", 30, "a status")
    assert len(list((run / "checkpoints").glob("step_*/manifest.json"))) == 1


def test_when_the_job_supervisor_dies_the_launcher_saves_and_ends(start: Start, tmp_path: Path) -> None:
    process, run = start(), tmp_path / "runs" / "r1"
    training(run)
    os.killpg(process.pid, signal.SIGKILL)  # what Ray's watcher does then
    process.wait()
    wait_until(lambda: not worker_pids(run), 30, "the end of the workers")
    assert list((run / "checkpoints").glob("step_*/manifest.json"))


def test_a_launcher_that_is_killed_ends_the_job(start: Start, tmp_path: Path) -> None:
    process, run = start(), tmp_path / "runs" / "r1"
    training(run)
    os.kill(json.loads((run / "status.json").read_text())["pid"], signal.SIGKILL)
    assert process.wait(timeout=30) == 75
    assert "was killed" in log(tmp_path)
    wait_until(lambda: not worker_pids(run), 30, "the end of the workers")


def test_another_version_is_refused_before_anything_is_written(start: Start, tmp_path: Path) -> None:
    assert start(expects="9.9.9").wait(timeout=60) == 2
    assert "has tunelaunch 0.1.0, the run was submitted by 9.9.9" in log(tmp_path)
    assert last_status(log(tmp_path))["failure"]["exit_code"] == 2
    assert not (tmp_path / "runs").exists()


def test_a_mistake_that_only_the_cluster_can_find_is_its_first_cause(start: Start, tmp_path: Path) -> None:
    assert start("--gpus", "99").wait(timeout=60) == 2
    assert "--gpus and --cpu contradict" in last_status(log(tmp_path))["failure"]["message"]
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert start(run_dir=f"{tmp_path}/file/r1").wait(timeout=60) == 2
    assert "--run-dir /shared/runs/NAME" in last_status(log(tmp_path))["failure"]["hint"]


def test_a_missing_secret_stops_the_first_worker_and_a_present_one_is_written_nowhere(
    start: Start, uploaded: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("canary-of-a-file-77", encoding="utf-8")
    (uploaded / "long.yaml").write_text(
        LONG.replace("100000", "2") + "secrets: [{name: WANDB_API_KEY, path: ~/key}, NOT_THERE]\n", encoding="utf-8"
    )
    assert start().wait(timeout=60) == 2
    failure = last_status(log(tmp_path))["failure"]
    assert "NOT_THERE is not set in the workers' environment" in failure["message"]
    assert failure["rank"] == 0
    for path in tmp_path.rglob("*"):
        assert path.name == "key" or not path.is_file() or b"canary-of" not in path.read_bytes(), path


def test_programs_see_each_stage(start: Start, uploaded: Path, tmp_path: Path) -> None:
    (uploaded / "long.yaml").write_text(LONG.replace("100000", "2"), encoding="utf-8")
    assert start().wait(timeout=200) == 0
    lines = [line for line in log(tmp_path).splitlines() if line.startswith(STATUS_MARK)]
    states = [json.loads(line.removeprefix(STATUS_MARK)) for line in lines]
    assert states[-1]["state"] == "succeeded"
    assert set(states[-1]["stages"].values()) == {"done"}
    assert any(s["stages"]["train"] == "running" for s in states)
    assert worker_pids(tmp_path / "runs" / "r1") == []
