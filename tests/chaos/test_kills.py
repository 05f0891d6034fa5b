"""kill -9 before every call with which a save changes the disk, and full, read-only and failing disks at each of them.

Short by default: every boundary once for each rank. TUNELAUNCH_CHAOS_KILLS=N kills N times more, at random boundaries, of
one rank and of all, and of the launcher at random times; `make chaos` writes what it did into docs/chaos.md.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chaos import Chain, Server, Table, every_loss, plan_chaos, saved_steps
from support.commands import FP32, LAUNCH, ROOT, losses, train_only, wait_until, worker_pids

from trainer.checkpoint_format import newest_verified

KILLS = int(os.environ.get("TUNELAUNCH_CHAOS_KILLS", "0"))
CHAINS = {"ZeRO-2, training waits": (2, False), "ZeRO-3, written beside training": (3, True)}
if KILLS:
    CHAINS |= {"ZeRO-2, written beside training": (2, True), "ZeRO-3, training waits": (3, False)}
ERRORS = ("ENOSPC", "EROFS", "EIO")


@pytest.fixture(scope="module", autouse=True)
def cache(environment: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("server"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """Of all tests; the long ones leave it as a page."""
    found = Table()
    yield found
    if KILLS:
        (ROOT / "docs" / "chaos.md").write_text(found.page(KILLS), encoding="utf-8")


def straight_losses(server: Server, folder: Path, name: str, steps: int) -> dict[int, float]:
    zero, asynchronous = CHAINS[name]
    run = plan_chaos(folder, "straight", zero, asynchronous, steps)
    answer = server.attempt(run, 1, None)
    assert answer["statuses"] == [0, 0]
    losses = dict(every_loss(run))
    assert len(losses) == steps
    return losses


@pytest.mark.parametrize("name", CHAINS)
def test_no_kill_costs_more_than_the_save_it_falls_into(
    name: str, server: Server, table: Table, tmp_path: Path
) -> None:
    zero, asynchronous = CHAINS[name]
    steps = 200 + 2 * KILLS
    straight = straight_losses(server, tmp_path, name, steps)
    chain = Chain(server, plan_chaos(tmp_path, "killed", zero, asynchronous, steps), straight, table)
    chain.boundaries()
    boundaries = chain.boundaries()
    assert len({label for points in boundaries for _, label in points}) >= 12
    planned = [([rank], call, label) for rank, points in enumerate(boundaries) for call, label in points]
    rng = random.Random(name)
    for _ in range(KILLS // len(CHAINS)):
        rank = rng.randrange(len(boundaries))
        call, label = rng.choice(boundaries[rank])
        planned.append((rng.choice([[rank], list(range(len(boundaries)))]), call, label))
    for ranks, call, label in planned:
        does = "half" if label.startswith("write") else "kill"
        chain.kill(ranks, call, does)
        who = "all ranks" if len(ranks) > 1 else f"rank {ranks[0]}"
        table.kills[who, f"half of {label}" if does == "half" else label] += 1
    # Nothing has piled up.
    chain.boundaries()
    assert len(saved_steps(chain.run)) == 2
    assert not list((chain.run / "checkpoints").glob("*.partial"))


def test_a_disk_that_refuses_costs_one_checkpoint_or_the_run_but_never_an_earlier_one(
    server: Server, table: Table, tmp_path: Path
) -> None:
    zero, asynchronous = CHAINS["ZeRO-2, training waits"]
    steps = 300
    straight = straight_losses(server, tmp_path, "ZeRO-2, training waits", steps)
    run = plan_chaos(tmp_path, "goes_on", zero, asynchronous, steps, on_error="continue")
    goes_on = Chain(server, run, straight, Table())
    boundaries = goes_on.boundaries()
    cases = [(rank, call, label) for rank, points in enumerate(boundaries) for call, label in points]
    # A folder that is there already need not be made.
    cases = [case for case in cases if case[2] != "mkdir checkpoints"]
    for i, (rank, call, label) in enumerate(cases):
        first = max(saved_steps(run), default=0)
        error = ERRORS[i % len(ERRORS)]
        accident = {"step": first + 2, "ranks": [rank], "call": call, "does": error, "until": first + 4}
        goes_on.start(accident)
        assert saved_steps(run)[0] == first + 3, f"{error} at {label}: the save after it did not work"
        told = goes_on.log(0).rpartition("WARNING")[2]
        assert os.strerror(getattr(errno, error)) in told, f"{error} at {label}"
        assert f"step_{first + 2:06d}" in told
        table.refusals[error, "training goes on"] += 1

    run = plan_chaos(tmp_path, "stops", zero, asynchronous, steps)
    stops = Chain(server, run, straight, Table())
    boundaries = stops.boundaries()
    for rank, points in enumerate(boundaries):
        call, label = points[len(points) // 2]
        first = max(saved_steps(run))
        stops.start(
            {"step": first + 2, "ranks": [rank], "call": call, "does": "ENOSPC", "until": first + 3}, codes=[2, 2]
        )
        assert saved_steps(run)[0] == first + 1, label
        assert "No space left on device" in stops.log(0)
        assert "launch runs resume" in stops.log(0)
        table.refusals["ENOSPC", "the run stops, exit 2"] += 1


def test_killed_launchers(environment: dict[str, str], table: Table, tmp_path: Path) -> None:
    """The command itself, with kill -9 at a random time after its first save: no worker stays, and resume goes on."""
    folder = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes", folder)
    text = (folder / "tiny_cpu.yaml").read_text(encoding="utf-8").replace("epochs: 10", "max_steps: 600")
    (folder / "often.yaml").write_text(text.replace("every_steps: 10", "every_steps: 1"), encoding="utf-8")
    straight = losses(train_only(folder, "often.yaml", 2, "straight", ["model.dtype=fp32"]))
    rng = random.Random(0)
    command, run = [LAUNCH, "often.yaml", "--cpu", "2", *FP32], folder / "runs" / "killed"
    arguments = ["--run-dir", str(run)]
    compared = 0
    for _ in range(max(KILLS // 10, 2)):
        before = saved_steps(run)
        with (tmp_path / "log").open("w") as log:
            launcher = subprocess.Popen([*command, *arguments], cwd=folder, env=environment, stdout=log, stderr=log)
        wait_until(lambda known=before: saved_steps(run)[:1] != known[:1], what="a new checkpoint")
        time.sleep(rng.uniform(0, 2))
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not worker_pids(run), 10, "no worker left")
        newest, skipped = newest_verified(run / "checkpoints")
        assert skipped == []
        assert newest is not None
        taken = every_loss(run)
        assert [loss for _, loss in taken[compared:]] == [straight[step] for step, _ in taken[compared:]]
        assert taken[compared][0] == max(before, default=0) + 1
        table.steps_compared += len(taken) - compared
        table.resumes += compared > 0
        table.kills["launcher", "a random time"] += 1
        compared = len(taken)
        command, arguments = [LAUNCH, "runs", "resume"], [str(run)]
