"""Runs whose checkpoints are copied to a bucket: a real S3 server, a lost machine, and the same losses as a straight run."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import pytest
from support.bucket import NAME, bucket
from support.commands import FP32, Launch, losses, only_run, train_only, wait_until, worker_pids

from launcher.progress import Follower
from trainer.storage import Storage

URL = f"s3://{NAME}/team/runs"
SECRETS = ("--set", "secrets=[AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY]")


@pytest.fixture(scope="module")
def s3(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A bucket; all commands of this module find it through their environment, as a user's do."""
    with bucket(tmp_path_factory.mktemp("s3") / "server.log") as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
            patch.setitem(environment, name, value)
        yield


def events(run: Path, name: str) -> list[dict[str, object]]:
    return [row for row in Follower(run / "events.jsonl").rows() if row["event"] == name]


def test_a_run_outlives_its_machine(
    s3: None, launch: Launch, started: Callable[..., Popen[str]], work: Path, tmp_path: Path
) -> None:
    text = (work / "tiny_cpu.yaml").read_text(encoding="utf-8").replace("epochs: 10", "max_steps: 40")
    (work / "long.yaml").write_text(text.replace("every_steps: 10", "every_steps: 5"), encoding="utf-8")
    straight = losses(train_only(work, "long.yaml", 1, "straight", ["model.dtype=fp32"]))
    command = started("long.yaml", "--cpu", "2", *FP32, *SECRETS, "--set", f"storage={URL}")
    wait_until(lambda: (work / "runs").is_dir() and any((work / "runs").iterdir()), what="a run folder")
    run = only_run(work)
    wait_until(lambda: len(events(run, "checkpoint_copied")) >= 3, 120, "the third copy")
    os.kill(command.pid, signal.SIGKILL)
    wait_until(lambda: not worker_pids(run), 20, "no worker left")
    copied = str(events(run, "checkpoint_copied")[-1]["checkpoint"])
    steps = [step for step, _ in Storage(f"{URL}/{run.name}").steps()]
    assert len(steps) == 2, "checkpoint.keep"
    assert f"step_{steps[0]:06d}" >= copied
    done = {step: loss for step, loss in losses(run).items() if step <= steps[0]}
    canary = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [p for p in run.rglob("*") if p.is_file() and canary in p.read_bytes()]

    shutil.rmtree(work / "runs")  # the machine and its disk are gone
    resumed = launch("runs", "resume", f"{URL}/{run.name}", cwd=work)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"fetched step_{steps[0]:06d} from {URL}/{run.name}" in resumed.stdout
    assert "make sure that it does not run there any more" in resumed.stdout
    assert min(step for step in losses(run) if step > steps[0]) == steps[0] + 1
    assert {**done, **losses(run)} == pytest.approx(straight, rel=1e-5)
    assert (run / "adapter" / "adapter_config.json").is_file()
    assert [step for step, _ in Storage(f"{URL}/{run.name}").steps()] == [40, 35]

    again = launch("runs", "fetch", f"{URL}/{run.name}", cwd=work)
    assert "step_000040 is here already and whole" in again.stdout, again.stdout + again.stderr


@pytest.mark.parametrize(
    ("storage", "code", "said"),
    [
        ("s3://nowhere/runs", 2, "The specified bucket does not exist"),
        ("file:///proc/runs", 2, "cannot write to file:///proc/runs"),
    ],
)
def test_a_storage_that_cannot_be_written_is_told_before_anything_is_computed(
    s3: None, launch: Launch, work: Path, storage: str, code: int, said: str
) -> None:
    done = launch("tiny_cpu.yaml", "--cpu", "1", "--set", f"storage={storage}", cwd=work)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stderr + done.stdout
    assert not (only_run(work) / "prepared.json").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"s3://{NAME}/team/runs/no-such-run", "holds no checkpoint"),
        ("http://host/run", "'http://host/run' is no place of runs"),
        ("s3://KEY:SECRET@bucket/run", "is no place of runs"),
    ],
)
def test_what_is_no_copied_run_is_told(s3: None, launch: Launch, work: Path, url: str, said: str) -> None:
    done = launch("runs", "fetch", url, cwd=work)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_storage_that_is_none_is_refused_with_what_is_allowed(launch: Launch, work: Path) -> None:
    (work / "bad.yaml").write_text(
        (work / "tiny_cpu.yaml").read_text(encoding="utf-8") + "\nstorage: runs/copies\n", encoding="utf-8"
    )
    done = launch("plan", "bad.yaml", "--cpu", "1", cwd=work)
    assert done.returncode == 2
    assert "s3://BUCKET/FOLDER" in done.stderr
    assert "bad.yaml:" in done.stderr
