"""A run folder made again from a bucket: what is whole is taken, what is not is said, and nothing here is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.tiny_checkpoints import save_checkpoint

from launcher.errors import LaunchError
from launcher.fetch import fetch
from launcher.run_dir import RunDir
from launcher.status import RUNNING, STOPPED, Attempt, Status, read_status
from trainer.spec import TrainError
from trainer.storage import Storage

RUN_ID = "tiny-20260102-030405-abcd"


def write_status(run: RunDir, state: str = RUNNING) -> None:
    stages = {"prepare": "done", "train": "running"}
    attempts = [Attempt(1, 1.0)]
    status = Status(RUN_ID, state, 1, "train", stages, 4711, 1, "lost-host", 1.0, 2.0, attempts=attempts)
    run.status.write_text(json.dumps(dataclasses.asdict(status)), encoding="utf-8")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a run with checkpoints 10 and 20 in a "bucket"; its own folder is the one of the machine that was lost."""
    lost = RunDir(tmp_path / "lost" / RUN_ID)
    lost.checkpoints.mkdir(parents=True)
    for path in (lost.recipe, lost.plan):
        path.write_text(path.name, encoding="utf-8")
    write_status(lost)
    storage = Storage(f"file://{tmp_path}/bucket/{RUN_ID}")
    for step in (10, 20):
        folder = save_checkpoint(lost.checkpoints / f"step_{step:06d}", {"a": torch.ones(50)}, step=step)
        storage.put_checkpoint(folder, 2, lost.taken_along)
    return storage.url


def damage(url: str, step: int) -> None:
    file = Path(url.removeprefix("file://"), "checkpoints", f"step_{step:06d}", "rank_00000.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def checkpoints(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_the_folder_is_made_again_and_counts_as_stopped(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fetch(url, tmp_path / "runs")
    assert run.root == tmp_path / "runs" / RUN_ID
    assert checkpoints(run) == ["step_000020"]
    assert run.recipe.read_text(encoding="utf-8") == "recipe.yaml"
    status = read_status(run)
    assert (status.state, set(status.stages.values())) == (STOPPED, {"waiting"})
    assert "ran on lost-host" in capsys.readouterr().out


def test_a_damaged_copy_is_skipped_as_a_resume_does(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(url, 20)
    assert checkpoints(fetch(url, tmp_path / "runs")) == ["step_000010"]
    assert "skipped: " in capsys.readouterr().out


def test_where_none_is_whole_it_is_said(url: str, tmp_path: Path) -> None:
    damage(url, 10)
    damage(url, 20)
    with pytest.raises(TrainError, match="none of its 2 checkpoints is whole"):
        fetch(url, tmp_path / "runs")


def test_a_folder_that_is_here_gets_only_what_it_lacks(url: str, tmp_path: Path) -> None:
    run = fetch(url, tmp_path / "runs")
    own = run.checkpoints / "step_000020" / "rank_00000.safetensors"
    own.write_bytes(own.read_bytes()[:-1] + b"x")
    run.recipe.write_text("changed here", encoding="utf-8")
    assert checkpoints(fetch(url, tmp_path / "runs")) == ["step_000020", "step_000020.damaged"]
    assert run.recipe.read_text(encoding="utf-8") == "changed here"


def test_a_run_that_runs_is_left_alone(url: str, tmp_path: Path) -> None:
    run = fetch(url, tmp_path / "runs")
    write_status(run)
    with pytest.raises(LaunchError, match="is running"):
        fetch(url, tmp_path / "runs")
