"""Runs under Ray on two nodes in network namespaces, of which a worker, and a whole node, are killed; and on a Ray of its own.

`make test-cluster`. That two nodes compute what every backend does: test_equal_losses.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import FP32, LAUNCH_TRAINING, TRAIN_AT_ONCE, Launch, losses, wait_until, worker_pids
from support.hosts import Host, hosts
from support.ray_nodes import RayNodes, ray_nodes
from support.ray_results import check_told_to_ray
from support.short_run import RELATIVE, SHORT, check_equal

ENDLESS = (*FP32, "--set", "train.max_steps=5000", "--set", "checkpoint.every_steps=20")
NO_RETRY = ("--set", "retry.crashes=0", "--set", "retry.node_losses=0")


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[list[Host]]:
    with hosts(2) as found:
        yield found


@pytest.fixture(scope="module")
def cluster(two_hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("ray"), two_hosts) as found:
        yield found


@pytest.fixture
def nodes(cluster: RayNodes) -> RayNodes:
    """Both of them, also after a test that one of them did not outlive."""
    cluster.repair()
    return cluster


def training(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until it has done that step."""

    def done() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return (run / "metrics.jsonl").is_file() and max(losses(run), default=0) >= step

    wait_until(done, 200, f"step {step} of {run.name}")


def worker_of(run: Path, rank: int) -> int:
    for pid in worker_pids(run):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process of rank {rank}")


def ended(process: subprocess.Popen[str], run: Path, since: float) -> dict:
    """The run's failure, once the command has ended and nothing of it is left."""
    output, _ = process.communicate(timeout=120)
    seconds = time.monotonic() - since
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    assert process.returncode == 75, output
    print(f"{run.name}: ended {seconds:.1f} s after the kill: {status['failure']['message']}")
    wait_until(lambda: not worker_pids(run), 20, "the end of all workers")
    return status["failure"]


@pytest.fixture
def train(folder: Path, environment: dict[str, str], two_hosts: list[Host], nodes: RayNodes):
    """Start a run over both nodes, which is to end with its training; returns once it has done 5 steps."""

    def begin(name: str, *flags: str) -> tuple[subprocess.Popen[str], Path]:
        args = ("tiny_cpu.yaml", "--cpu", "1", "--nodes", "2", "--run-dir", name, *flags)
        process = nodes.launch(two_hosts[0], args, folder, environment, TRAIN_AT_ONCE)
        training(folder / name, 5, process)
        return process, folder / name

    return begin


def test_a_killed_node_is_the_first_cause(train, two_hosts: list[Host], nodes: RayNodes) -> None:
    process, run = train("killed_node", *ENDLESS, *NO_RETRY)
    on_second = {p.pid for p in nodes.members(1)}
    (lost,) = [rank for rank in (0, 1) if worker_of(run, rank) in on_second]
    since = time.monotonic()
    nodes.kill(1)
    failure = ended(process, run, since)
    assert (failure["rank"], failure["kind"]) == (lost, "node_lost")
    assert failure["message"] == f"rank {lost} was lost with the node {two_hosts[1].address}"
    # Ray itself counts the node for half a minute more: a run that begins now is not to be planned for it.
    assert [n["ray"]["address"] for n in json.loads(nodes.survey())["nodes"]] == [two_hosts[0].address]


def test_a_run_goes_on_after_a_killed_worker_and_when_its_node_has_come_back(train, nodes: RayNodes) -> None:
    """Each is named. The attempt after the lost node begins while that is away, and waits for it."""
    # A checkpoint that is being written beside training when a worker dies is none: two intervals would be lost.
    sets = ("train.max_steps=200", "checkpoint.every_steps=5", "checkpoint.async=false", "retry.wait_s=1")
    process, run = train("back", *FP32, *(word for s in sets for word in ("--set", s)))
    attempts = lambda: json.loads((run / "status.json").read_text(encoding="utf-8"))["attempts"]  # noqa: E731
    since = time.time()
    os.kill(worker_of(run, 1), signal.SIGKILL)
    at = max(losses(run))
    wait_until(lambda: len(attempts()) == 2, 60, "the second attempt")
    assert attempts()[0]["ended"] - since < 45
    training(run, at + 10, process)
    nodes.kill(1)
    wait_until(lambda: len(attempts()) == 3, 90, "the third attempt")
    time.sleep(10)
    nodes.start(1)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    worker, node, last = attempts()
    assert [a["cause"] for a in (worker, node, last)] == ["crash", "node_lost", "done"]
    assert worker["message"].startswith("rank 1 was killed by SIGKILL (signal 9)")
    assert all(a["step"] - (a["next_step"] or 0) <= 5 for a in (worker, node))
    assert sorted(losses(run)) == list(range(1, 201))
    print(f"{run.name}: {attempts()}")


def test_a_ray_of_its_own_computes_what_torchrun_does(folder: Path, launch: Launch, torchrun_run: Path) -> None:
    flags = ("--backend", "ray", "--cpu", "2", "--run-dir", "own", *SHORT)
    done = launch("tiny_cpu.yaml", *flags, cwd=folder, RAY_ADDRESS="local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one of our own for training" in done.stdout
    check_equal(folder / "own", losses(torchrun_run))
    check_told_to_ray(folder / "own")


def test_a_run_of_torchrun_goes_on_under_ray(folder: Path, environment: dict[str, str], torchrun_run: Path) -> None:
    """As if it had been stopped after step 6."""
    run = folder / "resumed"
    shutil.copytree(torchrun_run, run)
    (run / "plan.json").write_text((run / "plan.json").read_text().replace(str(torchrun_run), str(run)))
    shutil.rmtree(run / "checkpoints" / "step_000008")
    status = json.loads((run / "status.json").read_text())
    status |= {"run_id": "resumed", "state": "stopped", "stages": {**status["stages"], "train": "stopped"}}
    (run / "status.json").write_text(json.dumps(status))
    argv = [*LAUNCH_TRAINING, "tiny_cpu.yaml", *SHORT, "--resume", str(run), "--backend", "ray"]
    env = {**environment, "RAY_ADDRESS": "local"}
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    again = {row["step"]: row["loss"] for row in rows if row["attempt"] == 2}
    assert sorted(again) == [7, 8]
    expected = losses(torchrun_run)
    assert again == pytest.approx({step: expected[step] for step in again}, rel=RELATIVE)
