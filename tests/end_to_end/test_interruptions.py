"""Kills, Ctrl-C and closed terminals: nothing is lost, nothing is left behind, and the losses stay the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import FP32, LAUNCH, ROOT, Launch, losses, only_run, train_only, wait_until, worker_pids

Started = Callable[..., "subprocess.Popen[str]"]


def write_long_recipe(folder: Path) -> str:
    """60 steps with a checkpoint every 7, beside the shipped recipes in `folder`; returns its name."""
    text = (folder / "tiny_cpu.yaml").read_text(encoding="utf-8").replace("epochs: 10", "max_steps: 60")
    (folder / "long.yaml").write_text(text.replace("every_steps: 10", "every_steps: 7"), encoding="utf-8")
    return "long.yaml"


@pytest.fixture
def long_recipe(work: Path) -> str:
    return write_long_recipe(work)


@pytest.fixture(scope="module")
def straight_losses(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Step -> loss of the same recipe without any interruption, on one process."""
    folder = tmp_path_factory.mktemp("long") / "recipes"
    shutil.copytree(ROOT / "recipes", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        return losses(train_only(folder, write_long_recipe(folder), 1, "straight", ["model.dtype=fp32"]))


def drain(fd: int) -> None:
    """Read a terminal until it is closed, so that its writer never waits."""
    try:
        while os.read(fd, 4096):
            pass
    except OSError:
        return


def run_when_at_step(folder: Path, step: int) -> Path:
    wait_until(lambda: (folder / "runs").is_dir() and any((folder / "runs").iterdir()), what="a run folder")
    run = only_run(folder)
    wait_until(lambda: (run / "metrics.jsonl").is_file() and max(losses(run), default=0) >= step, what=f"step {step}")
    return run


@pytest.mark.parametrize(("processes", "step"), [("1", 3), ("1", 16), ("2", 23)])
def test_killed_workers_resume_with_the_losses_of_a_straight_run(
    launch: Launch,
    started: Started,
    work: Path,
    long_recipe: str,
    straight_losses: dict[int, float],
    processes: str,
    step: int,
) -> None:
    command = started(long_recipe, "--cpu", processes, *FP32, "--set", "retry.crashes=0")
    run = run_when_at_step(work, step)
    os.kill(worker_pids(run)[-1], signal.SIGKILL)
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 75, output
    assert "SIGKILL" in output
    assert "not tried again: retry.crashes is 0" in output
    wait_until(lambda: not worker_pids(run), 10, "no worker left")
    resumed = launch("runs", "resume", str(run), cwd=work)
    if step < 7:
        assert resumed.returncode == 2
        assert "no checkpoint" in resumed.stderr
        return
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    log = (run / "logs" / "attempt_2" / "train" / "rank_0.log").read_text(encoding="utf-8")
    assert "resumed from step_0000" in log
    got = losses(run)
    assert got.keys() == straight_losses.keys()
    for number, loss in straight_losses.items():
        # One process is bit-identical; two add their sums in another order.
        assert got[number] == (loss if processes == "1" else pytest.approx(loss, rel=1e-5)), f"step {number}"


def test_killed_launcher_leaves_no_worker_and_fewer_processes_go_on(
    started: Started, launch: Launch, work: Path, long_recipe: str, straight_losses: dict[int, float]
) -> None:
    command = started(long_recipe, "--cpu", "2", *FP32)
    run = run_when_at_step(work, 12)
    assert worker_pids(run)
    command.kill()
    command.wait()
    wait_until(lambda: not worker_pids(run), 10, "no worker left")
    shown = launch("runs", "show", str(run), cwd=work)
    assert "crashed" in shown.stdout
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    for flags, told in (
        (["--set", "train.learning_rate=1e-5"], "--force-key train.learning_rate"),
        (["--set", "method.rank=3"], "the saved adapters have another shape"),
        (["--set", "train.global_batch=6"], "Keep it: --set train.global_batch=4"),
    ):
        refused = launch("runs", "resume", str(run), *flags, cwd=work)
        assert refused.returncode == 2, refused.stdout
        assert told in refused.stderr
    assert (run / "recipe.yaml").read_text(encoding="utf-8") == recipe
    resumed = launch("runs", "resume", str(run), "--cpu", "1", "--set", "parallel.zero=0", cwd=work)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "parallel.zero: auto -> 0" in resumed.stdout
    assert (run / "recipe.before_attempt_2.yaml").read_text(encoding="utf-8") == recipe
    assert losses(run) == pytest.approx(straight_losses, rel=1e-5)


def test_ctrl_c_saves_and_stops_and_resume_goes_on(
    started: Started, launch: Launch, work: Path, long_recipe: str
) -> None:
    command = started(long_recipe, "--cpu", "2", *FP32)
    run = run_when_at_step(work, 9)
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 130, output
    assert "checkpoint" in output
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    last = max(losses(run))
    assert (run / "checkpoints" / f"step_{last:06d}" / "manifest.json").is_file()
    assert not worker_pids(run)
    by_hand = launch("consolidate", str(run), cwd=work)
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    early = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    resumed = launch(long_recipe, *FP32, "--resume", str(run), cwd=work)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert max(losses(run)) == 60
    assert f"resumed from step_{last:06d}" in (run / "logs/attempt_2/train/rank_0.log").read_text()
    # What was made by hand from the earlier checkpoint is kept beside the result.
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() != early
    assert (run / "adapter.before_attempt_2" / "adapter_model.safetensors").read_bytes() == early


def test_closed_terminal_saves_and_stops(environment: dict[str, str], work: Path, long_recipe: str) -> None:
    master, terminal = os.openpty()
    command = subprocess.Popen(
        [LAUNCH, long_recipe, "--cpu", "1", *FP32],
        cwd=work,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    reader = threading.Thread(target=drain, args=(master,), daemon=True)
    reader.start()
    run = run_when_at_step(work, 9)
    os.kill(command.pid, signal.SIGHUP)
    os.close(master)
    assert command.wait(timeout=60) == 130
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert (run / "checkpoints" / f"step_{max(losses(run)):06d}" / "manifest.json").is_file()


def test_second_ctrl_c_kills(started: Started, work: Path, long_recipe: str) -> None:
    command = started(long_recipe, "--cpu", "1", *FP32)
    run = run_when_at_step(work, 2)
    # Frozen workers cannot answer the polite request.
    for pid in worker_pids(run):
        os.kill(pid, signal.SIGSTOP)
    command.send_signal(signal.SIGINT)
    wait_until(lambda: (run / "stop_requested").exists(), 10, "the stop request")
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=30)
    assert command.returncode == 130, output
    assert not worker_pids(run)


def test_detached_run_is_listed_watched_and_stopped(launch: Launch, work: Path, long_recipe: str) -> None:
    begun = launch(long_recipe, "--cpu", "1", *FP32, "--detach", cwd=work)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    run = run_when_at_step(work, 8)
    assert "running" in launch("runs", cwd=work).stdout
    stopped = launch("runs", "stop", "last", cwd=work)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "stopped" in stopped.stdout
    assert not worker_pids(run)
    resumed = launch("runs", "resume", "last", "--detach", cwd=work)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    watched = launch("runs", "watch", "last", cwd=work)
    assert watched.returncode == 0, watched.stdout + watched.stderr
    assert "report" in watched.stdout
    logs = launch("runs", "logs", "last", "--stage", "train", cwd=work)
    assert "step 60/60" in logs.stdout


def test_damaged_checkpoint_is_skipped_by_name(launch: Launch, work: Path, long_recipe: str, started: Started) -> None:
    command = started(long_recipe, "--cpu", "1", *FP32)
    run = run_when_at_step(work, 15)
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=60)
    newest = max((run / "checkpoints").glob("step_*"))
    shard = newest / "rank_00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    resumed = launch("runs", "resume", str(run), cwd=work)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    log = (run / "logs/attempt_2/train/rank_0.log").read_text()
    assert f"skipped checkpoint {newest.name}" in log
    assert "rank_00000.safetensors" in log
    assert max(losses(run)) == 60
