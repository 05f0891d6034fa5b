"""Real trainings that hang, are killed, or are merely slow: who is named, and that what follows equals a straight run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chaos import every_loss
from support.commands import ROOT, losses, train_only, try_training, wait_until

from launcher.run_dir import RunDir
from launcher.status import Attempt, read_status

EVERY, STEPS = 5, 24
SETS = {"model.dtype": "fp32", "train.max_steps": STEPS, "checkpoint.every_steps": EVERY, "retry.wait_s": 0.1}
# One that is being written beside training when a rank dies is none: what is lost then depends on the disk as well.
SETS["checkpoint.async"] = "false"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Path]:
    found = tmp_path_factory.mktemp("hangs") / "recipes"
    shutil.copytree(ROOT / "recipes", found)
    text = (found / "tiny_cpu.yaml").read_text(encoding="utf-8").replace("epochs: 10", f"max_steps: {STEPS}")
    (found / "short.yaml").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        yield found


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[int, float]:
    """Step -> loss on two processes without any accident."""
    return losses(train_only(folder, "short.yaml", 2, "straight", flags(SETS)))


def flags(sets: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in sets.items()]


def trained(folder: Path, name: str, sets: dict[str, object]) -> tuple[int, RunDir, list[Attempt]]:
    code, root = try_training(folder, "short.yaml", 2, name, flags({**SETS, **sets}))
    run = RunDir(root)
    return code, run, read_status(run).attempts


def accident(patch: pytest.MonkeyPatch, what: str) -> None:
    hook = ROOT / "tests" / "support" / "accident"
    patch.setenv("PYTHONPATH", os.pathsep.join([str(hook), str(ROOT)]))
    patch.setenv("ACCIDENT", what)


def require_equal(run: RunDir, straight: dict[int, float], attempts: list[Attempt]) -> None:
    """Every loss of every attempt is the straight run's, and at most one checkpoint interval was done again."""
    assert all(loss == straight[step] for step, loss in every_loss(run.root))
    assert losses(run.root) == straight
    for before in attempts[:-1]:
        assert before.step is not None
        assert before.step - (before.next_step or 0) <= EVERY


def send_at(run: Path, step: int, rank: int, signum: int) -> threading.Thread:
    """Send a signal to `rank` once the run has done `step` steps."""

    def act() -> None:
        wait_until(
            lambda: (run / "metrics.jsonl").is_file() and max(losses(run), default=0) >= step, 120, f"step {step}"
        )
        beat = json.loads((run / "logs" / "attempt_1" / "train" / f"heartbeat_rank_{rank}.json").read_text())
        os.kill(beat["pid"], signum)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_a_killed_rank_costs_at_most_a_checkpoint_interval_and_no_bit(folder: Path, straight: dict[int, float]) -> None:
    step = random.randrange(1, STEPS - 2)
    thread = send_at(folder / "killed", step, random.randrange(2), signal.SIGKILL)
    code, run, attempts = trained(folder, "killed", {})
    thread.join()
    assert (code, [a.cause for a in attempts]) == (0, ["crash", "done"]), f"killed at step {step}"
    assert "was killed by SIGKILL" in attempts[0].message
    require_equal(run, straight, attempts)


def test_a_frozen_rank_is_named_and_the_run_goes_on(folder: Path, straight: dict[int, float]) -> None:
    thread = send_at(folder / "frozen", 8, 1, signal.SIGSTOP)
    code, run, attempts = trained(folder, "frozen", {"run.hang_s": 5})
    thread.join()
    assert (code, [a.cause for a in attempts]) == (0, ["hang", "done"])
    assert "rank 1 is behind: rank 1: step " in attempts[0].message
    assert "its process is frozen" in attempts[0].message
    page = (run.logs(1, "train") / "hang.txt").read_text()
    assert "no stack" not in page
    assert page.count("in train_step") == 2
    for name in ("stacks_rank_0.txt", "stacks_rank_1_signal.txt"):
        assert "train.py" in (run.logs(1, "train") / name).read_text()
    assert attempts[0].noticed_s is not None
    assert 5 <= attempts[0].noticed_s < 10
    require_equal(run, straight, attempts)


def test_a_rank_that_sleeps_in_the_data_path_is_named_by_its_line(
    folder: Path, straight: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    accident(monkeypatch, "data:1:1:15")  # two micro batches a step: in step 8
    code, run, attempts = trained(folder, "asleep", {"run.hang_s": 5})
    assert (code, [a.cause for a in attempts]) == (0, ["hang", "done"])
    assert "rank 1 is behind: rank 1: step 8, micro batch 1, data, at accident/sitecustomize.py:" in attempts[0].message
    assert attempts[0].message.endswith("in sleep_for_ever")
    page = (run.logs(1, "train") / "hang.txt").read_text()
    assert "rank 0: step 8, micro batch 1, backward, waits for the others in " in page
    assert "in train_step" in page
    require_equal(run, straight, attempts)


def test_a_rank_that_never_enters_the_collective_is_told_from_those_that_wait_in_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accident(monkeypatch, "sum:0:0:3")
    code, run, attempts = trained(folder, "sum", {"run.hang_s": 4, "retry.hangs": 0})
    assert (code, [a.cause for a in attempts]) == (75, ["hang"])
    assert "rank 0 is behind: rank 0: step 3, sum over all ranks, at accident/sitecustomize.py:" in attempts[0].message
    page = (run.logs(1, "train") / "hang.txt").read_text()
    assert "rank 1: step 3, sum over all ranks, waits for the others in all_reduce, called at trainer/train.py:" in page
    assert attempts[0].why == "retry.hangs is 0"


def test_a_slow_run_is_not_hung(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of more than hang_s, of which each micro batch takes less; and saves that take more."""
    accident(monkeypatch, "slow:1:0:5")
    sets = {"run.hang_s": 2, "train.max_steps": 4, "train.global_batch": 8, "checkpoint.every_steps": 2}
    code, run, attempts = trained(folder, "slow", sets)
    assert (code, [a.cause for a in attempts]) == (0, ["done"])
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert max(row["seconds"] for row in rows) > 4
